"""Many experts, one launch: products over contiguous segments of unequal length, in bfloat16 and in FP8.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.gemm import Tiling, check_operand, default_tiling
from dsv3_mini.kernels.interpreter import expect, in_blocks, launch, tl, triton
from dsv3_mini.kernels.quantise import check_tile

# How do 256 experts fit in one launch?


@triton.jit
def find_segment(ends, n_groups, n_rows, tile, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Which group row tile `tile` belongs to, its first row, and where the group ends; 0, 0, 0 past the last tile."""
    group = tl.arange(0, GROUPS)
    end = tl.maximum(tl.load(ends + group, group < n_groups, other=0), 0)
    start = tl.maximum(tl.load(ends + group - 1, (group > 0) & (group < n_groups), other=0), 0)
    n_tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK_M)  # an empty group has none
    before = tl.cumsum(n_tiles, 0) - n_tiles
    mine = (before <= tile) & (tile < before + n_tiles)
    first = tl.sum(tl.where(mine, start + (tile - before) * BLOCK_M, 0), 0)
    last = tl.minimum(tl.sum(tl.where(mine, end, 0), 0), n_rows)  # wrong ends reach no other memory
    return tl.sum(tl.where(mine, group, 0), 0), first, last


@triton.jit
def grouped_gemm_kernel(
    a, a_scale, b, b_scale, ends, c, n_groups, m, n, k, stride_am, stride_ak, stride_be, stride_bn, stride_bk,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, K_FIRST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one group times BLOCK_N columns of its matrix; in FP8 where there are scales."""
    group, first, end = find_segment(ends, n_groups, m, tl.program_id(1), BLOCK_M, GROUPS)
    if first == end:
        return
    j = tl.program_id(0)
    row = first + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(0, tl.cdiv(k, TILE)):
        x = a.load([first, tile * TILE])  # may reach into the next group; those rows are not stored
        if K_FIRST:
            y = b.load([group, tile * TILE, j * BLOCK_N]).reshape(TILE, BLOCK_N)
        else:
            y = b.load([group, j * BLOCK_N, tile * TILE]).reshape(BLOCK_N, TILE).T
        if a_scale is None:
            acc = tl.dot(x, y, acc)
        else:
            s_a = tl.load(a_scale + row * stride_am + tile * stride_ak, row < end, other=0.0)
            place = group * stride_be + column // TILE * stride_bn + tile * stride_bk
            s_b = tl.load(b_scale + place, column < n, other=0.0)
            acc += tl.dot(x, y) * (s_a[:, None] * s_b[None, :])
    place = c + row[:, None].to(tl.int64) * n + column[None, :]
    tl.store(place, acc.to(c.dtype.element_ty), (row[:, None] < end) & (column[None, :] < n))


def check_ends(name: str, ends: Tensor, groups: int, last: int) -> None:
    """Refuse ends that do not rise from 0 to at most `last`. On a GPU reading them would make the host wait."""
    expect(name, ends, (groups,), torch.int32)
    if ends.device.type == "cpu" and (ends.diff(prepend=ends.new_zeros(1), append=ends.new_tensor([last])) < 0).any():
        raise ValueError(f"{name} {ends.tolist()} must rise, from 0 or more to {last} or less")


def run_grouped(a, a_scale, b, b_scale, ends, dtype, tile, k_first, tiling, interpret) -> Tensor:
    """Check the sizes that both precisions share, and launch."""
    (m, k), groups = a.shape, len(b)
    n = b.shape[2 if k_first else 1]
    check_ends("ends", ends, groups, m)
    c = torch.empty(m, n, dtype=dtype, device=a.device)
    if 0 in (m, n, k, groups):
        return c.zero_()
    a_blocks = in_blocks(a, tiling.block_m, tile)
    b_blocks = in_blocks(b, *((1, tile, tiling.block_n) if k_first else (1, tiling.block_n, tile)))
    strides = (*a_scale.stride(), *b_scale.stride()) if a_scale is not None else (0,) * 5
    grid = (-(-n // tiling.block_n), -(-m // tiling.block_m) + groups)  # each group wastes less than one tile of rows
    meta = dict(TILE=tile, GROUPS=triton.next_power_of_2(groups), K_FIRST=k_first, **tiling.options())
    arguments = (a_blocks, a_scale, b_blocks, b_scale, ends, c, groups, m, n, k, *strides)
    launch(grouped_gemm_kernel, grid, *arguments, interpret=interpret, **meta)
    return c


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    k_first: bool = False,
    tiling: Tiling = Tiling(),  # noqa: B008
    interpret: bool | None = None,
) -> Tensor:
    """Row segment i of x, which ends before ends[i], times weight[i]^T: (M, K), (E, N, K), (E,) int32 -> (M, N).

    bfloat16 or float16, summed in float32. k_first: weight is (E, K, N) and is not transposed. Segments may be empty;
    the last ends at M, for rows behind it would not be written.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {tuple(x.shape)} of {x.dtype}; bfloat16 or float16 needed")
    check_operand("x", x, (None, None), x.dtype)
    check_operand("weight", weight, (None, x.shape[1], None) if k_first else (None, None, x.shape[1]), x.dtype)
    return run_grouped(x, None, weight, None, ends, x.dtype, 64, k_first, tiling, interpret)


def grouped_fp8_gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    tile: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    tiling: Tiling = Tiling(),  # noqa: B008
    interpret: bool | None = None,
) -> Tensor:
    """`grouped_gemm` of E4M3 operands: x (M, K), scales (M, K/tile); weight (E, N, K), scales (E, N/tile, K/tile).

    Quotients are rounded up. Operands as `act_quant` and `weight_quant` write them -> (M, N) of `dtype`.
    """
    check_tile(tile, None)
    check_operand("x", x, (None, None))
    check_operand("weight", weight, (None, None, x.shape[1]))
    n_tiles = -(-x.shape[1] // tile)
    expect("x_scale", x_scale, (len(x), n_tiles), torch.float32)
    expect("weight_scale", weight_scale, (len(weight), -(-weight.shape[1] // tile), n_tiles), torch.float32)
    return run_grouped(x, x_scale, weight, weight_scale, ends, dtype, tile, False, tiling, interpret)


class GroupedLinear(torch.autograd.Function):
    """`grouped_gemm` with its gradients; that of the weights is torch's own grouped product."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor, interpret: bool | None) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.interpret = interpret
        return grouped_gemm(x, weight, ends, interpret=interpret)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        dx = grouped_gemm(grad, weight, ends, k_first=True, interpret=ctx.interpret)
        return dx, F.grouped_mm(grad.T, x, offs=ends), None, None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, interpret: bool | None = None) -> Tensor:
    """`moe.grouped_linear` as a kernel, forward and backward; under autocast in its type, else bfloat16 or float16."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, weight))
    return GroupedLinear.apply(x, weight, ends, interpret)


def start_tiles(ends: Tensor, n_rows: int, tile: int) -> tuple[Tensor, Tensor]:
    """Move rows apart so that each segment starts a tile: segments' ends (E,) -> new places of the rows (n_rows,) and
    where each segment's tiles end (E,) int32, at most n_rows // tile + E. Nothing is read back from the GPU.
    """
    check_ends("ends", ends, len(ends), n_rows)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    tiles = (sizes + tile - 1) // tile
    tile_ends = tiles.cumsum(0, dtype=torch.int32)
    moved = (tile_ends - tiles) * tile - (ends - sizes)  # how far each segment moves
    return torch.arange(n_rows, device=ends.device) + moved.repeat_interleave(sizes, output_size=n_rows), tile_ends


@triton.jit
def grouped_wgrad_kernel(
    a, a_scale, b, b_scale, tile_ends, c, m, n, k, stride_am, stride_ak, stride_bn, stride_bk,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M x BLOCK_N of one group's C = A B^T, summed over the tiles that belong to the group."""
    i, j = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    group = tl.program_id(2)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.maximum(tl.load(tile_ends + group - 1, group > 0, other=0), 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(first, tl.minimum(tl.load(tile_ends + group), tl.cdiv(k, TILE))):
        x = a.load([i * BLOCK_M, tile * TILE])
        y = b.load([j * BLOCK_N, tile * TILE])
        s_a = tl.load(a_scale + row * stride_am + tile * stride_ak, row < m, other=0.0)
        s_b = tl.load(b_scale + column * stride_bn + tile * stride_bk, column < n, other=0.0)
        acc += tl.dot(x, y.T) * (s_a[:, None] * s_b[None, :])
    place = c + (group.to(tl.int64) * m + row[:, None]) * n + column[None, :]
    tl.store(place, acc, (row[:, None] < m) & (column[None, :] < n))


def grouped_fp8_wgrad(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    tile_ends: Tensor,
    tile: int = 128,
    tiling: Tiling | None = None,
    interpret: bool | None = None,
) -> Tensor:
    """All weight gradients at once: a (out, T), b (in, T) float8_e4m3fn, tile_ends (E,) int32 -> (E, out, in) float32.

    Group i has the tiles before tile_ends[i] that no group before it has, as `start_tiles` lays them out; one without
    tiles gets zeros. Scales: (out, ceil(T/tile)) and (in, ceil(T/tile)). Operands as `act_quant` writes them.
    """
    check_tile(tile, None)
    check_operand("a", a, (None, None))
    check_operand("b", b, (None, a.shape[1]))
    (m, k), n, n_tiles = a.shape, len(b), -(-a.shape[1] // tile)
    expect("a_scale", a_scale, (m, n_tiles), torch.float32)
    expect("b_scale", b_scale, (n, n_tiles), torch.float32)
    check_ends("tile_ends", tile_ends, len(tile_ends), n_tiles)
    dw = torch.empty(len(tile_ends), m, n, dtype=torch.float32, device=a.device)
    if 0 in (m, n, k):
        return dw.zero_()
    tiling = tiling or default_tiling(b_rows=1)
    grid = (-(-m // tiling.block_m), -(-n // tiling.block_n), len(tile_ends))
    blocks = in_blocks(a, tiling.block_m, tile), a_scale, in_blocks(b, tiling.block_n, tile), b_scale
    numbers = (m, n, k, *a_scale.stride(), *b_scale.stride())
    launch(
        grouped_wgrad_kernel, grid, *blocks, tile_ends, dw, *numbers, TILE=tile, interpret=interpret, **tiling.options()
    )
    return dw


# What will the GPU execute?


def compile_cases() -> dict[str, Case]:
    """256 experts: bfloat16 forward and input gradient, FP8, and its weight gradient."""
    t, w = Tiling(), default_tiling(b_rows=1)
    numbers = {"n_groups": "i32", "m": "i32", "n": "i32:16", "k": "i32:16"}
    common = {"ends": "*i32:16", "c": "*bf16:16", **numbers}
    scales = {"a_scale": "*fp32:16", "b_scale": "*fp32:16", "stride_am": "i32", "stride_be": "i32", "stride_bn": "i32"}
    meta = {"BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "GROUPS": 256, "K_FIRST": False, "stride_ak": 1, "stride_bk": 1}
    plain = {"a_scale": None, "b_scale": None, "stride_am": 0, "stride_be": 0, "stride_bn": 0, "TILE": 64}
    blocks = {"a": f"tensordesc<bf16[{t.block_m}, 64]>", "b": f"tensordesc<bf16[1, {t.block_n}, 64]>"}
    turned = {**blocks, "b": f"tensordesc<bf16[1, 64, {t.block_n}]>"}
    narrow = {"a": f"tensordesc<fp8e4nv[{t.block_m}, 128]>", "b": f"tensordesc<fp8e4nv[1, {t.block_n}, 128]>"}
    deep = {"a": f"tensordesc<fp8e4nv[{w.block_m}, 128]>", "b": f"tensordesc<fp8e4nv[{w.block_n}, 128]>"}
    deep |= {"a_scale": "*fp32:16", "b_scale": "*fp32:16", "tile_ends": "*i32:16", "c": "*fp32:16"}
    deep |= {"m": "i32:16", "n": "i32:16", "k": "i32:16", "stride_am": "i32", "stride_bn": "i32"}
    ones = {"stride_ak": 1, "stride_bk": 1, "TILE": 128, "BLOCK_M": w.block_m, "BLOCK_N": w.block_n}
    size = (t.num_warps, t.num_stages)
    return {
        "grouped_gemm": Case(grouped_gemm_kernel, common | blocks, meta | plain, *size),
        "grouped_gemm_dgrad": Case(grouped_gemm_kernel, common | turned, {**meta, **plain, "K_FIRST": True}, *size),
        "grouped_fp8_gemm": Case(grouped_gemm_kernel, common | narrow | scales, {**meta, "TILE": 128}, *size),
        "grouped_fp8_wgrad": Case(grouped_wgrad_kernel, deep, ones, w.num_warps, w.num_stages),
    }
