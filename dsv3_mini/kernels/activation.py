"""SwiGLU and quantisation in one pass: the activation between an expert's two products never visits memory.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor

from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.interpreter import launch, tl, triton
from dsv3_mini.kernels.quantise import check_tile, empty_rows, scale_of

# What does fusing save?


@triton.jit
def swiglu_quant_kernel(
    gate_up, weights, q, scale, n_rows, n_columns, stride_row, stride_q, min_amax,
    TILE: tl.constexpr, ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS x TILE numbers of silu(gate) * up (* weight), and a scale for each row of them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row[:, None] < n_rows) & (column[None, :] < n_columns)
    place = gate_up + row[:, None] * stride_row + column[None, :]
    gate = tl.load(place, inside, other=0.0).to(tl.float32)
    up = tl.load(place + n_columns, inside, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        h *= tl.load(weights + row, row < n_rows, other=0.0).to(tl.float32)[:, None]
    s = scale_of(tl.maximum(tl.max(tl.abs(h), 1), min_amax), POWER_OF_TWO)
    quantised = tl.div_rn(h, tl.broadcast_to(s[:, None], (ROWS, TILE))).to(q.dtype.element_ty)
    tl.store(q + row[:, None] * stride_q + column[None, :], quantised, inside)
    tl.store(scale + row * tl.num_programs(1) + tl.program_id(1), s, row < n_rows)


def swiglu_quant(
    gate_up: Tensor,
    weights: Tensor | None = None,
    tile: int = 128,
    scale_fmt: str | None = None,
    min_amax: float = 1e-4,
    interpret: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """act_quant(silu(gate) * up * weights), [gate | up] = gate_up: (N, 2F) -> q (N, F), scale (N, ceil(F/tile)).

    weights: (N, 1), a token's gate weight for the expert, or None. Computed in float32 from any float.
    Rows of gate_up must be contiguous.
    """
    check_tile(tile, scale_fmt)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_floating_point():
        raise ValueError(f"gate_up is {tuple(gate_up.shape)} of {gate_up.dtype}; floats (N, 2F) needed")
    if gate_up.stride(1) != 1 and gate_up.numel():
        raise ValueError(f"gate_up {tuple(gate_up.shape)} has strides {gate_up.stride()}; contiguous rows needed")
    n, f = len(gate_up), gate_up.shape[1] // 2
    if weights is not None and (weights.shape != (n, 1) or not weights.is_contiguous()):
        raise ValueError(f"weights are {tuple(weights.shape)}; one a row, ({n}, 1) and contiguous, needed")
    q = empty_rows((n, f), gate_up.device)
    scale = torch.empty(n, -(-f // tile), dtype=torch.float32, device=gate_up.device)
    numbers = (n, f, gate_up.stride(0), q.stride(0), min_amax)
    meta = dict(TILE=tile, ROWS=16, POWER_OF_TWO=scale_fmt == "ue8m0", WEIGHTED=weights is not None)
    tensors = gate_up, gate_up if weights is None else weights, q, scale
    launch(swiglu_quant_kernel, (-(-n // 16), scale.shape[1]), *tensors, *numbers, **meta, interpret=interpret)
    return q, scale


# What will the GPU execute?


def compile_cases() -> dict[str, Case]:
    """As the report asks of what is dispatched: scales that are powers of two."""
    sizes = {"n_rows": "i32", "n_columns": "i32:16", "stride_row": "i32:16", "stride_q": "i32:16", "min_amax": "fp32"}
    tensors = {"gate_up": "*bf16:16", "weights": "*fp32:16", "q": "*fp8e4nv:16", "scale": "*fp32:16"}
    constants = {"TILE": 128, "ROWS": 16, "POWER_OF_TWO": True, "WEIGHTED": True}
    return {"swiglu_quant": Case(swiglu_quant_kernel, tensors | sizes, constants)}
