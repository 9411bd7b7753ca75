"""Quantise on the GPU: one pass over the data, and bit for bit what chapter 07 computes."""

import torch
from torch import Tensor

from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.interpreter import expect, launch, tl, triton


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
    x, q, scale, n_rows, n_columns, width, stride_row, stride_column, min_amax,
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
    tl.store(q + row[:, None] * width + column[None, :], quantised, (row[:, None] < n_rows) & (column[None, :] < width))
    tl.store(scale + row * tl.num_programs(1) + tl.program_id(1), s, row < n_rows)


def act_quant(
    x: Tensor,
    tile: int = 128,
    scale_fmt: str | None = None,
    min_amax: float = 1e-4,
    multiple: int = 1,
    interpret: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`fp8.act_quant` as a kernel: (..., K) -> q (..., K) float8_e4m3fn and scale (..., ceil(K/tile)) float32.

    Any strides, so `act_quant(grad.T)` needs no copy. multiple: q's last dimension is filled up with zeros to a
    multiple of it, as `fp8_gemm` needs. A NaN stays NaN in its place and is ignored by the scale of its tile.
    """
    check_tile(tile, scale_fmt)
    if not x.is_floating_point() or x.dim() < 1 or multiple < 1:
        raise ValueError(f"x is {tuple(x.shape)} of {x.dtype}; floats of one dimension or more needed, {multiple=}")
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    (m, k), n_tiles = rows.shape, -(-x.shape[-1] // tile)
    width = -(-k // multiple) * multiple
    q = torch.empty(m, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(m, n_tiles, device=x.device)
    meta = dict(TILE=tile, ROWS=32, POWER_OF_TWO=scale_fmt == "ue8m0")
    grid = (-(-m // meta["ROWS"]), max(n_tiles, -(-width // tile)))
    launch(act_quant_kernel, grid, rows, q, scale, m, k, width, *rows.stride(), min_amax, interpret=interpret, **meta)
    return q.view(*x.shape[:-1], width), scale.view(*x.shape[:-1], n_tiles)


@triton.jit
def weight_quant_kernel(
    w, q, scale, n_rows, n_columns, stride_matrix, stride_row, stride_column,
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
    tl.store(q + (matrix * n_rows + row[:, None]) * n_columns + column[None, :], quantised, inside)
    block_idx = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scale + block_idx, s)


def weight_quant(
    w: Tensor, block: int = 128, scale_fmt: str | None = None, interpret: bool | None = None
) -> tuple[Tensor, Tensor]:
    """`fp8.weight_quant` as a kernel: (..., M, N) -> float8_e4m3fn (..., M, N), scale (..., M/block, N/block) rounded up.

    Any strides; leading dimensions are stacked experts. The result is contiguous.
    """
    check_tile(block, scale_fmt)
    if not w.is_floating_point() or w.dim() < 2:
        raise ValueError(f"w is {tuple(w.shape)} of {w.dtype}; floats of two dimensions or more needed")
    stack = w.reshape(-1, *w.shape[-2:]) if w.dim() != 3 else w
    e, m, n = stack.shape
    grid = (-(-m // block), -(-n // block), e)
    q = torch.empty(stack.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scale = torch.empty(e, *grid[:2], device=w.device)
    meta = dict(BLOCK=block, POWER_OF_TWO=scale_fmt == "ue8m0")
    launch(weight_quant_kernel, grid, stack, q, scale, m, n, *stack.stride(), num_warps=8, interpret=interpret, **meta)
    return q.view(w.shape), scale.view(*w.shape[:-2], *grid[:2])


@triton.jit
def weight_dequant_kernel(q, scale, w, n_rows, n_columns, BLOCK: tl.constexpr):
    """One program: a BLOCK x BLOCK square of one matrix times its scale."""
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = (row[:, None] < n_rows) & (column[None, :] < n_columns)
    place = (matrix * n_rows + row[:, None]) * n_columns + column[None, :]
    block_idx = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    block = tl.load(q + place, inside, other=0.0).to(tl.float32) * tl.load(scale + block_idx)
    tl.store(w + place, block.to(w.dtype.element_ty), inside)


def weight_dequant(
    q: Tensor, scale: Tensor, block: int = 128, dtype: torch.dtype = torch.bfloat16, interpret: bool | None = None
) -> Tensor:
    """`fp8.weight_dequant` as a kernel: q * scale, for `weight` and `weight_scale_inv` of a checkpoint too: (..., M, N).

    q contiguous float8_e4m3fn; scale (..., ceil(M/block), ceil(N/block)) float32, a factor: it multiplies.
    """
    check_tile(block, None)
    if q.dtype != torch.float8_e4m3fn or q.dim() < 2 or not q.is_contiguous():
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype} with strides {q.stride()}; contiguous float8_e4m3fn needed")
    m, n = q.shape[-2:]
    n_blocks = (-(-m // block), -(-n // block))
    expect("scale", scale, (*q.shape[:-2], *n_blocks), torch.float32)
    w = torch.empty(q.shape, dtype=dtype, device=q.device)
    grid = (*n_blocks, q.shape[:-2].numel())
    launch(weight_dequant_kernel, grid, q, scale.contiguous(), w, m, n, num_warps=8, interpret=interpret, BLOCK=block)
    return w


def check_tile(tile: int, scale_fmt: str | None) -> None:
    """Kernels cut memory into powers of two, and tensor cores take 32 E4M3 numbers at a time."""
    if tile not in (32, 64, 128) or scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"{tile=}, {scale_fmt=}; a kernel needs a tile of 32, 64 or 128, and None or 'ue8m0'")


def compile_cases() -> dict[str, Case]:
    """The kernels as the report trains with them: bfloat16 activations, tiles and blocks of 128."""
    sizes = {"n_rows": "i32", "n_columns": "i32:16"}
    tiles = {"x": "*bf16:16", "q": "*fp8e4nv:16", "scale": "*fp32:16", **sizes, "width": "i32:16"}
    tiles |= {"stride_row": "i32:16", "min_amax": "fp32"}
    blocks = {"w": "*bf16:16", "q": "*fp8e4nv:16", "scale": "*fp32:16", **sizes}
    strides = {"stride_matrix": "i64:16", "stride_row": "i32:16"}
    meta = {"TILE": 128, "ROWS": 32, "stride_column": 1}
    return {
        "act_quant": Case(act_quant_kernel, tiles, {**meta, "POWER_OF_TWO": False}),
        "act_quant_ue8m0": Case(act_quant_kernel, tiles, {**meta, "POWER_OF_TWO": True}),
        "weight_quant": Case(
            weight_quant_kernel, blocks | strides, {"stride_column": 1, "BLOCK": 128, "POWER_OF_TWO": False}, 8
        ),
        "weight_dequant": Case(weight_dequant_kernel, blocks, {"BLOCK": 128}, 8),
    }
