"""DeepSeek-V3 in small: every mechanism, written in the chapters of the book and exported from them.

from dsv3_mini import DeepSeekV3, ModelConfig, generate
"""

from importlib import import_module

EXPORTS = {
    "ModelConfig": "config",
    "count_parameters": "accounting",
    "flops_per_token": "accounting",
    "kv_cache_bytes_per_token": "accounting",
    "training_cost": "accounting",
    "train_tokenizer": "data",
    "python_corpus": "data",
    "folder_corpus": "data",
    "pack": "data",
    "fill_in_the_middle": "data",
    "DeepSeekV3": "model",
    "generate": "generate",
}
__all__ = list(EXPORTS)  # noqa: PLE0605


def __getattr__(name: str):
    """Import a public name when it is first asked for, so that `import dsv3_mini` costs nothing."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'dsv3_mini' has no attribute {name!r}")
    return getattr(import_module(f"dsv3_mini.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *EXPORTS]
