"""The FP8 product of the report as a kernel: E4M3 tensor cores, partial sums scaled while they are promoted.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.interpreter import expect, in_blocks, launch, tl, triton
from dsv3_mini.kernels.quantise import check_tile

# Where do the scales go in a product?


class Tiling(NamedTuple):
    """How a product is cut: a program makes block_m x block_n of C with num_stages tiles of A and B on their way."""

    block_m: int = 128
    block_n: int = 128
    num_warps: int = 8
    num_stages: int = 4

    def options(self) -> dict[str, int]:
        """As the kernels take them."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def default_tiling(b_rows: int) -> Tiling:
    """Scales for each row and column of C (Wgrad) take registers, so that form makes half as much of C at a time."""
    return Tiling() if b_rows > 1 else Tiling(block_m=64, num_warps=4)


@triton.jit
def fp8_gemm_kernel(
    a, a_scale, b, b_scale, c, m, n, k, stride_am, stride_ak, stride_bn, stride_bk,
    TILE: tl.constexpr, B_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M x BLOCK_N of C. B_ROWS rows of B share a scale: TILE for blocks, 1 for tiles."""
    i, j = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(0, tl.cdiv(k, TILE)):
        x = a.load([i * BLOCK_M, tile * TILE])  # (BLOCK_M, TILE); zeros beyond the edges
        y = b.load([j * BLOCK_N, tile * TILE])  # (BLOCK_N, TILE)
        partial = tl.dot(x, y.T)
        s_a = tl.load(a_scale + row * stride_am + tile * stride_ak, row < m, other=0.0)
        s_b = tl.load(b_scale + column // B_ROWS * stride_bn + tile * stride_bk, column < n, other=0.0)
        acc += partial * (s_a[:, None] * s_b[None, :])  # promotion: the scales go in here, tile by tile
    place = c + row[:, None].to(tl.int64) * n + column[None, :]
    tl.store(place, acc.to(c.dtype.element_ty), (row[:, None] < m) & (column[None, :] < n))


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    tile: int = 128,
    dtype: torch.dtype = torch.float32,
    tiling: Tiling | None = None,
    interpret: bool | None = None,
) -> Tensor:
    """`fp8.fp8_gemm` as a kernel, C = A B^T: a (M, K), b (N, K) float8_e4m3fn -> (M, N) of `dtype`.

    a_scale: (M, ceil(K/tile)). b_scale: (ceil(N/tile), ceil(K/tile)) for blocks (Fprop, Dgrad), (N, ceil(K/tile)) for
    tiles (Wgrad). Rows must be contiguous and 16 bytes aligned, as the quantising kernels write them.
    """
    check_tile(tile, None)
    check_operand("a", a, (None, None))
    check_operand("b", b, (None, a.shape[1]))
    (m, k), n, n_tiles = a.shape, len(b), -(-a.shape[1] // tile)
    expect("a_scale", a_scale, (m, n_tiles), torch.float32)
    b_rows = 1 if b_scale.shape == (n, n_tiles) and n > 1 else tile
    expect("b_scale", b_scale, (-(-n // b_rows), n_tiles), torch.float32)
    tiling = tiling or default_tiling(b_rows)
    if 0 in (m, n, k):
        return torch.zeros(m, n, dtype=dtype, device=a.device)
    c = torch.empty(m, n, dtype=dtype, device=a.device)
    grid = (-(-m // tiling.block_m), -(-n // tiling.block_n))
    a_blocks = in_blocks(a, tiling.block_m, tile)
    b_blocks = in_blocks(b, tiling.block_n, tile)
    numbers = (m, n, k, *a_scale.stride(), *b_scale.stride())
    meta = dict(TILE=tile, B_ROWS=b_rows, interpret=interpret, **tiling.options())
    launch(fp8_gemm_kernel, grid, a_blocks, a_scale, b_blocks, b_scale, c, *numbers, **meta)
    return c


def check_operand(
    name: str, x: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype = torch.float8_e4m3fn
) -> None:
    """Refuse what the GPU cannot fetch in blocks: rows must be contiguous and start at multiples of 16 bytes."""
    expect(name, x, shape, dtype)
    bytes_apart = [stride * x.element_size() for stride in x.stride()[:-1]]
    if x.numel() and (x.stride(-1) != 1 or any(apart % 16 for apart in bytes_apart) or x.data_ptr() % 16):
        raise ValueError(
            f"{name} {tuple(x.shape)} has strides {x.stride()}: the last dimension must be contiguous and the others a "
            f"multiple of {16 // x.element_size()}; pad K to that, or take what act_quant and weight_quant return"
        )


# What will the GPU execute?


def compile_cases() -> dict[str, Case]:
    """Both forms, with bfloat16 results for activations and their gradients, float32 for those of weights."""
    sizes = {"m": "i32", "n": "i32:16", "k": "i32:16", "stride_am": "i32", "stride_bn": "i32"}
    cases = {}
    for name, b_rows, result in (("fp8_gemm", 128, "*bf16:16"), ("fp8_gemm_wgrad", 1, "*fp32:16")):
        m, n, warps, stages = default_tiling(b_rows)
        tensors = {"a": f"tensordesc<fp8e4nv[{m}, 128]>", "b": f"tensordesc<fp8e4nv[{n}, 128]>", "c": result}
        tensors |= {"a_scale": "*fp32:16", "b_scale": "*fp32:16"}
        meta = {"stride_ak": 1, "stride_bk": 1, "TILE": 128, "B_ROWS": b_rows, "BLOCK_M": m, "BLOCK_N": n}
        cases[name] = Case(fp8_gemm_kernel, tensors | sizes, meta, warps, stages)
    return cases
