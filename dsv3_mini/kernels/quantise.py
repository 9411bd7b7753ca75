"""Quantise on the GPU: one pass over the data, and bit for bit what chapter 07 computes.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor

from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.interpreter import expect, launch, tl, triton

# How is a tensor quantised in one pass?


@triton.jit
def scale_of(amax, POWER_OF_TWO: tl.constexpr):
    """amax / 448, or the power of two at or above it, read off the bits of the quotient."""
    scale = tl.div_rn(amax, 448.0)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def act_quant_kernel(
    x, q, scale, n_rows, n_columns, stride_row, stride_column, stride_q, min_amax,
    TILE: tl.constexpr, ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """One program: ROWS x TILE numbers, a scale for each row of them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE).to(tl.int64)
    inside = (row[:, None] < n_rows) & (column[None, :] < n_columns)
    tile = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_column, inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(tile), 1), min_amax)  # (ROWS,)
    s = scale_of(amax, POWER_OF_TWO)
    quantised = tl.div_rn(tile, tl.broadcast_to(s[:, None], (ROWS, TILE))).to(q.dtype.element_ty)
    tl.store(q + row[:, None] * stride_q + column[None, :], quantised, inside)
    tl.store(scale + row * tl.num_programs(1) + tl.program_id(1), s, row < n_rows)


def act_quant(
    x: Tensor,
    tile: int = 128,
    scale_fmt: str | None = None,
    min_amax: float = 1e-4,
    interpret: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`fp8.act_quant` as a kernel: (..., K) -> q (..., K) float8_e4m3fn and scale (..., ceil(K/tile)) float32.

    Any strides, so `act_quant(grad.T)` needs no copy. q's rows start at multiples of 16 bytes, as `fp8_gemm` needs.
    A NaN stays NaN in its place, and the scale of its tile ignores it.
    """
    check_tile(tile, scale_fmt)
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x is {tuple(x.shape)} of {x.dtype}; floats of one dimension or more needed")
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    (m, k), n_tiles = rows.shape, -(-x.shape[-1] // tile)
    q = empty_rows((m, k), x.device)
    scale = torch.empty(m, n_tiles, dtype=torch.float32, device=x.device)
    meta = dict(TILE=tile, ROWS=32, POWER_OF_TWO=scale_fmt == "ue8m0")
    grid, strides = (-(-m // meta["ROWS"]), n_tiles), (*rows.stride(), q.stride(0))
    launch(act_quant_kernel, grid, rows, q, scale, m, k, *strides, min_amax, interpret=interpret, **meta)
    return q.view(*x.shape[:-1], k), scale.view(*x.shape[:-1], n_tiles)


def empty_rows(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Room for E4M3 numbers with the rows of the last dimension 16 bytes aligned, as TMA asks for."""
    width = -(-shape[-1] // 16) * 16
    return torch.empty(*shape[:-1], width, dtype=torch.float8_e4m3fn, device=device)[..., : shape[-1]]


def check_tile(tile: int, scale_fmt: str | None) -> None:
    """Kernels cut memory into powers of two, and tensor cores take 32 E4M3 numbers at a time."""
    if tile not in (32, 64, 128) or scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"{tile=}, {scale_fmt=}; a kernel needs a tile of 32, 64 or 128, and None or 'ue8m0'")


@triton.jit
def weight_quant_kernel(
    w, q, scale, n_rows, n_columns, stride_matrix, stride_row, stride_column, stride_q,
    BLOCK: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """One program: a BLOCK x BLOCK square of one matrix, and its scale."""
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = (row[:, None] < n_rows) & (column[None, :] < n_columns)
    place = matrix * stride_matrix + row[:, None] * stride_row + column[None, :] * stride_column
    block = tl.load(w + place, inside, other=0.0).to(tl.float32)
    s = scale_of(tl.maximum(tl.max(tl.max(tl.abs(block), 1), 0), 1e-30), POWER_OF_TWO)
    quantised = tl.div_rn(block, tl.zeros((BLOCK, BLOCK), tl.float32) + s).to(q.dtype.element_ty)
    tl.store(q + (matrix * n_rows + row[:, None]) * stride_q + column[None, :], quantised, inside)
    block_idx = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scale + block_idx, s)


def weight_quant(
    w: Tensor, block: int = 128, scale_fmt: str | None = None, interpret: bool | None = None
) -> tuple[Tensor, Tensor]:
    """`fp8.weight_quant` as a kernel: (..., M, N) -> float8_e4m3fn (..., M, N), scale (..., M/block, N/block).

    Any strides; leading dimensions are stacked experts. q's rows start at multiples of 16 bytes.
    """
    check_tile(block, scale_fmt)
    if not w.is_floating_point() or w.dim() < 2:
        raise ValueError(f"w is {tuple(w.shape)} of {w.dtype}; floats of two dimensions or more needed")
    stack = w[None] if w.dim() == 2 else w.flatten(0, -3)
    e, m, n = stack.shape
    grid = (-(-m // block), -(-n // block), e)
    q = empty_rows(stack.shape, w.device)
    scale = torch.empty(e, *grid[:2], dtype=torch.float32, device=w.device)
    meta, strides = dict(BLOCK=block, POWER_OF_TWO=scale_fmt == "ue8m0"), (*stack.stride(), q.stride(1))
    launch(weight_quant_kernel, grid, stack, q, scale, m, n, *strides, num_warps=8, interpret=interpret, **meta)
    return q.view(w.shape), scale.view(*w.shape[:-2], *grid[:2])


@triton.jit
def weight_dequant_kernel(q, scale, w, n_rows, n_columns, stride_matrix, stride_row, BLOCK: tl.constexpr):
    """One program: a BLOCK x BLOCK square of one matrix times its scale."""
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = (row[:, None] < n_rows) & (column[None, :] < n_columns)
    place = matrix * stride_matrix + row[:, None] * stride_row + column[None, :]
    block_idx = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    block = tl.load(q + place, inside, other=0.0).to(tl.float32) * tl.load(scale + block_idx)
    place = (matrix * n_rows + row[:, None]) * n_columns + column[None, :]
    tl.store(w + place, block.to(w.dtype.element_ty), inside)


def weight_dequant(
    q: Tensor, scale: Tensor, block: int = 128, dtype: torch.dtype = torch.bfloat16, interpret: bool | None = None
) -> Tensor:
    """`fp8.weight_dequant` as a kernel: q * scale, also of a checkpoint's `weight_scale_inv`: (..., M, N).

    q float8_e4m3fn with contiguous rows; scale (..., ceil(M/block), ceil(N/block)) float32, a factor: it multiplies.
    """
    check_tile(block, None)
    if q.dtype != torch.float8_e4m3fn or q.dim() < 2 or (q.stride(-1) != 1 and q.numel()):
        raise ValueError(
            f"q is {tuple(q.shape)} {q.dtype}, strides {q.stride()}; float8_e4m3fn, rows contiguous, needed"
        )
    m, n = q.shape[-2:]
    stack = q[None] if q.dim() == 2 else q.flatten(0, -3)
    n_blocks = (-(-m // block), -(-n // block))
    expect("scale", scale, (*q.shape[:-2], *n_blocks), torch.float32)
    w = torch.empty(q.shape, dtype=dtype, device=q.device)
    grid, meta = (*n_blocks, len(stack)), dict(BLOCK=block, num_warps=8, interpret=interpret)
    launch(weight_dequant_kernel, grid, stack, scale.contiguous(), w, m, n, *stack.stride()[:2], **meta)
    return w


# What will the GPU execute?


def compile_cases() -> dict[str, Case]:
    """The kernels as the report trains with them: bfloat16 activations, tiles and blocks of 128."""
    sizes = {"n_rows": "i32", "n_columns": "i32:16"}
    tiles = {"x": "*bf16:16", "q": "*fp8e4nv:16", "scale": "*fp32:16", **sizes}
    tiles |= {"stride_row": "i32:16", "stride_q": "i32:16", "min_amax": "fp32"}
    blocks = {"w": "*bf16:16", "q": "*fp8e4nv:16", "scale": "*fp32:16", **sizes}
    strides = {"stride_matrix": "i64:16", "stride_row": "i32:16", "stride_q": "i32:16"}
    meta = {"TILE": 128, "ROWS": 32, "stride_column": 1}
    return {
        "act_quant": Case(act_quant_kernel, tiles, {**meta, "POWER_OF_TWO": False}),
        "act_quant_ue8m0": Case(act_quant_kernel, tiles, {**meta, "POWER_OF_TWO": True}),
        "weight_quant": Case(
            weight_quant_kernel, blocks | strides, {"stride_column": 1, "BLOCK": 128, "POWER_OF_TWO": False}, 8
        ),
        "weight_dequant": Case(
            weight_dequant_kernel, blocks | {k: strides[k] for k in ("stride_matrix", "stride_row")}, {"BLOCK": 128}, 8
        ),
    }
