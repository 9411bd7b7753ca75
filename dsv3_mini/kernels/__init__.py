"""Triton kernels of chapters 15 and 16; `compile_for` makes machine code of all of them on any Linux machine."""

from importlib import import_module
from pkgutil import iter_modules


def compile_for(arch: int) -> dict:
    """Every kernel compiled ahead of time for sm_<arch>, 90 (H100, H200) or 100 (B200): {name: compiled kernel}.

    Needs Triton and no GPU. Each module of this package that offers `compile_cases() -> {name: Case}` takes part;
    names are unique. Raises ModuleNotFoundError where Triton is missing, ValueError for an unknown architecture.
    """
    from dsv3_mini.kernels.ahead import compile_case

    if arch not in (90, 100):
        raise ValueError(f"arch={arch!r}; choose 90 (Hopper) or 100 (Blackwell), the first with E4M3 tensor cores")
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    cases = [case for module in modules if hasattr(module, "compile_cases") for case in module.compile_cases().items()]
    return {name: compile_case(case, arch) for name, case in cases}
