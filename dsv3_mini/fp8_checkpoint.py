"""In which type each tensor is stored: float8 beside the scales of its blocks, or plain.

Generated from chapters/10_full_model.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor

from dsv3_mini.fp8 import runs_in_fp8, weight_dequant, weight_quant

# How does it go to disk, whole or not at all?


def check_dtype(dtype: torch.dtype | None, saving: bool = False) -> None:
    """ValueError unless dtype is None or a floating type of 16 bits or more; or, to save, float8_e4m3fn with scales."""
    fits = dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    if not (fits or saving and dtype == torch.float8_e4m3fn):
        more = ", or torch.float8_e4m3fn with scales" if saving else ""
        raise ValueError(
            f"dtype={dtype!r} must be None or a floating type such as torch.bfloat16 or torch.float32{more}"
        )


def stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which a tensor goes to disk; what a float8 checkpoint does not quantise is bfloat16."""
    keep = dtype is None or not tensor.is_floating_point() or name.endswith("e_score_correction_bias")
    return tensor.dtype if keep else torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


# What is in the FP8 files?


def stored_tensors(name: str, tensor: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What one published tensor is on disk: itself in `dtype` (None keeps its own), or float8 values and their scales.

    float8_e4m3fn: projections of attention, feed-forward and experts are quantised in 128 x 128 blocks, `X.weight`
    beside `X.weight_scale_inv`, float32 factors to multiply with; the rest is bfloat16. Routing biases stay float32.
    """
    if dtype == torch.float8_e4m3fn and name.endswith(".weight") and runs_in_fp8(name.removesuffix(".weight")):
        q, scale = weight_quant(tensor)
        return {name: q, f"{name}_scale_inv": scale}
    return {name: tensor.to(stored_dtype(name, tensor, dtype))}


def dequantise(name: str, q: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """w = q * scale, block by block, in float32: `weight_scale_inv` is a factor in spite of its name."""
    blocks = tuple(-(-n // block) for n in q.shape)  # rounded up: edge blocks may be partly empty
    if scale.shape != blocks:
        raise ValueError(f"{name}_scale_inv has shape {tuple(scale.shape)}, {tuple(q.shape)} needs {blocks}")
    return weight_dequant(q, scale.float(), block, dtype)
