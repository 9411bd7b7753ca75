"""DeepSeek-V3 in small: every mechanism, written in the chapters of the book and exported from them.

from dsv3_mini import DeepSeekV3, ModelConfig, generate
"""

import sys
from importlib import import_module
from types import ModuleType

MODULES = {
    "config": ("ModelConfig",),
    "accounting": ("count_parameters", "flops_per_token", "kv_cache_bytes_per_token", "training_cost"),
    "data": ("train_tokenizer", "python_corpus", "folder_corpus", "pack", "fill_in_the_middle"),
    "fp8": ("act_quant", "weight_quant", "weight_dequant", "fp8_gemm"),
    "schedule": ("dualpipe_schedule", "dualpipev_schedule", "one_f_one_b_schedule", "zb1p_schedule", "simulate"),
    "eplb": ("rebalance_experts",),
    "model": ("DeepSeekV3",),
    "generate": ("generate",),
}
EXPORTS = {name: module for module, names in MODULES.items() for name in names}
__all__ = list(EXPORTS)  # noqa: PLE0605


class Package(ModuleType):
    """A module whose public names stay what they are, though a submodule has the name of its function."""

    def __setattr__(self, name: str, value: object) -> None:
        shadowed = name in EXPORTS and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if shadowed else value)


sys.modules[__name__].__class__ = Package


def __getattr__(name: str):
    """Import a public name when it is first asked for, so that `import dsv3_mini` costs nothing."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'dsv3_mini' has no attribute {name!r}")
    return getattr(import_module(f"dsv3_mini.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *EXPORTS]
