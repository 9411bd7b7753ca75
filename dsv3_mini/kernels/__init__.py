"""Triton kernels of chapters 15 and 16, and `compile_for`, which makes machine code of all of them without a GPU.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

# What will the GPU execute?


def offers(name: str) -> list[Callable]:
    """The functions of that name in this package's modules: how kernels join `compile_for` and the benchmark."""
    package = import_module("dsv3_mini.kernels")
    modules = [import_module(f"dsv3_mini.kernels.{module.name}") for module in iter_modules(package.__path__)]
    return [getattr(module, name) for module in modules if hasattr(module, name)]


def compile_for(arch: int) -> dict:
    """Every kernel compiled ahead of time for sm_<arch>, 90 (H100, H200) or 100 (B200): {name: compiled kernel}.

    Needs Triton, no GPU. Each module of this package that offers `compile_cases() -> {name: Case}` takes part. Raises
    ModuleNotFoundError where Triton is missing, ValueError for another architecture.
    """
    from dsv3_mini.kernels.ahead import compile_case

    if arch not in (90, 100):
        raise ValueError(f"arch={arch!r}; choose 90 (Hopper) or 100 (Blackwell), which have E4M3 tensor cores")
    cases = [case for compile_cases in offers("compile_cases") for case in compile_cases().items()]
    return {name: compile_case(case, arch) for name, case in cases}
