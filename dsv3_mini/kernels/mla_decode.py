"""Absorbed attention over the latent cache: split over the sequence, then combined.

Generated from chapters/16_triton_attention_moe.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor

from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.interpreter import expect, launch, tl, triton

# How do 132 processors share one text?


@triton.jit
def mla_decode_split(
    q_c, q_pe, cache, lengths, z, lse, cache_stride, n_positions, n_queries, n_heads, scale,
    C: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of queries and heads on one stretch of one text. Log-sum-exps are in base 2."""
    batch, n_rows = tl.program_id(1).to(tl.int64), n_queries * n_heads
    length = tl.minimum(tl.load(lengths + batch), n_positions).to(tl.int32)
    stretch = tl.cdiv(tl.cdiv(length, BLOCK_S), tl.num_programs(2)) * BLOCK_S
    first = tl.program_id(2) * stretch
    m, c, r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, C), tl.arange(0, R)
    seen = length - n_queries + 1 + m // n_heads  # positions that a row may look at
    inside = m[:, None] < n_rows
    content = tl.load(q_c + batch * n_rows * C + m[:, None] * C + c[None, :], mask=inside, other=0.0)
    turned = tl.load(q_pe + batch * n_rows * R + m[:, None] * R + r[None, :], mask=inside, other=0.0)
    peak, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, C), tl.float32)
    for start in range(first, tl.minimum(first + stretch, length), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        # A tile that passes the end reads the last latent again: no mask to hold in registers, and the scores hide it.
        latents = cache + batch * cache_stride + tl.minimum(s, length - 1)[:, None] * (C + R)
        c_kv, k_pe = tl.load(latents + c[None, :]), tl.load(latents + C + r[None, :])
        scores = tl.dot(turned, k_pe.T, input_precision="ieee")
        scores = tl.dot(content, c_kv.T, scores, input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where(s[None, :] < seen[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet
        p, keep = tl.exp2(scores - base[:, None]), tl.exp2(peak - base)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(c_kv.dtype), c_kv, acc * keep[:, None], input_precision="ieee")
        peak = new_peak
    out = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + batch) * n_rows
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(z + out * C + m[:, None] * C + c[None, :], acc, mask=inside)
    tl.store(lse + out + m, peak + tl.log2(total), mask=m < n_rows)


@triton.jit
def mla_decode_combine(z, lse, out, out_lse, n_splits, C: tl.constexpr):
    """One program: the stretches of one row, each weighed by its share of the whole sum."""
    row, n_rows, c = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.arange(0, C)
    peak = tl.load(lse + row)  # the first stretch is never empty
    for split in range(1, n_splits):
        peak = tl.maximum(peak, tl.load(lse + split * n_rows + row))
    total, acc = 0.0, tl.zeros((C,), tl.float32)
    for split in range(n_splits):
        share = tl.exp2(tl.load(lse + split * n_rows + row) - peak)
        acc += share * tl.load(z + (split * n_rows + row) * C + c)
        total += share
    tl.store(out + row * C + c, (acc / total).to(out.dtype.element_ty))
    tl.store(out_lse + row, (peak + tl.log2(total)) * 0.6931471805599453)  # back to base e


def choose_splits(n_tiles: int, n_programs: int, n_processors: int = 132) -> int:
    """Stretches of a text, so that programs fill whole rounds of the processors and no stretch is less than a tile.

    n_tiles: tiles of the longest text; n_programs: programs without a split. The time is counted in tiles: rounds
    times the tiles of a stretch, and one more for its start and end. 132: processors of an H100 or H200.
    """
    rounds = range(1, 9)
    candidates = [max(1, min(n_tiles, k * n_processors // max(n_programs, 1))) for k in rounds]
    return min(candidates, key=lambda splits: -(-n_programs * splits // n_processors) * (-(-n_tiles // splits) + 1))


def check_decode(q_c: Tensor, q_pe: Tensor, cache: Tensor, lengths: Tensor) -> None:
    """Shapes, types and strides of a decoding step."""
    expect("q_c", q_c, (None, None, None, None), torch.bfloat16, torch.float16, torch.float32)
    expect("q_pe", q_pe, (*q_c.shape[:3], None), q_c.dtype)
    c, r = q_c.shape[-1], q_pe.shape[-1]
    expect("cache", cache, (len(q_c), None, c + r), q_c.dtype)
    expect("lengths", lengths, (len(q_c),), torch.int32, torch.int64)
    if any(width < 16 or width & (width - 1) for width in (c, r)):
        raise ValueError(f"q_c {tuple(q_c.shape)} and q_pe {tuple(q_pe.shape)}: tiles need widths 16, 32, 64 and so on")
    for name, x in (("q_c", q_c), ("q_pe", q_pe), ("lengths", lengths)):
        if not x.is_contiguous():
            raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}; call .contiguous() first")
    if cache.numel() and cache.stride()[1:] != (c + r, 1):
        raise ValueError(
            f"cache {tuple(cache.shape)} has strides {cache.stride()}; a text's positions must be adjacent"
        )


def check_lengths(lengths: Tensor, n_queries: int, n_positions: int) -> int:
    """The longest text. Reads the lengths, so the CPU waits for the GPU."""
    if not lengths.numel():
        return 0
    shortest, longest = (int(bound) for bound in lengths.aminmax())
    if shortest < n_queries or longest > n_positions:
        raise ValueError(
            f"lengths {tuple(lengths.shape)} lie in {shortest}..{longest}; {n_queries} new tokens in a cache of "
            f"{n_positions} positions need {n_queries}..{n_positions}"
        )
    return longest


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; for the interpreter, as many as an H100 has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def mla_decode(
    q_c: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    lengths: Tensor,
    scale: float = 1.0,
    n_splits: int | None = None,
    longest: int | None = None,
    interpret: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention of the last T positions of every text over its latent cache (report section 2.1.1).

    q_c (B, T, H, C): content queries carried into the latent's space; q_pe (B, T, H, R), turned. cache (B, S, C + R),
    any batch stride, valid up to lengths (B,), which count the new positions. Returns the weighted latents
    (B, T, H, C) in q_c's type and the log-sum-exp of the scores (B, T, H) in float32. longest: a bound on lengths that
    the caller vouches for; without one they are read and checked. Without gradient. ValueError names what does not fit.
    """
    check_decode(q_c, q_pe, cache, lengths)
    if n_splits is not None and n_splits < 1:
        raise ValueError(f"{n_splits=}; 1 or more stretches of each text, or None for as many as fill the GPU")
    (b, t, h, c), n_positions, device = q_c.shape, cache.shape[1], q_c.device
    longest = check_lengths(lengths, t, n_positions) if longest is None else longest
    block_m, num_stages = (64, 3) if t * h > 16 and q_c.dtype != torch.float32 else (16, 2)
    row_blocks = -(-t * h // block_m)
    n_splits = n_splits or choose_splits(-(-longest // 32), b * row_blocks, processors(device))
    z, lse = (torch.empty(n_splits, b, t, h, *last, dtype=torch.float32, device=device) for last in ((c,), ()))
    meta = dict(C=c, R=q_pe.shape[-1], BLOCK_M=block_m, BLOCK_S=32, num_warps=8, num_stages=num_stages)
    given = q_c, q_pe, cache, lengths, z, lse, cache.stride(0), n_positions, t, h, scale
    launch(mla_decode_split, (row_blocks, b, n_splits), *given, interpret=interpret, **meta)
    out, out_lse = torch.empty_like(q_c), torch.empty(b, t, h, dtype=torch.float32, device=device)
    launch(mla_decode_combine, (b * t * h,), z, lse, out, out_lse, n_splits, C=c, interpret=interpret)
    return out, out_lse


# Does the text stay the same?


def attend(q_c: Tensor, q_pe: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """For `DecodePlan(model, attend=attend)`: generation with this kernel, on a GPU or, slowly, interpreted."""
    return mla_decode(q_c, q_pe, cache, lengths, longest=cache.shape[1])[0]


# What does the compiler make of it?


def compile_cases() -> dict[str, Case]:
    """V3 in bfloat16: a full tile of 64 heads, a tile of 16 for few heads, and the merge."""
    tensors = {"q_c": "*bf16:16", "q_pe": "*bf16:16", "cache": "*bf16:16", "lengths": "*i32:16"}
    tensors |= {"z": "*fp32:16", "lse": "*fp32:16"}
    numbers = {"cache_stride": "i64:16", "n_positions": "i32", "n_queries": "i32", "n_heads": "i32", "scale": "fp32"}
    meta = {"C": 512, "R": 64, "BLOCK_S": 32}
    merge = {"z": "*fp32:16", "lse": "*fp32:16", "out": "*bf16:16", "out_lse": "*fp32:16", "n_splits": "i32"}
    return {
        "mla_decode": Case(mla_decode_split, tensors | numbers, {**meta, "BLOCK_M": 64}, 8, 3),
        "mla_decode_few_heads": Case(mla_decode_split, tensors | numbers, {**meta, "BLOCK_M": 16}, 8, 2),
        "mla_decode_combine": Case(mla_decode_combine, merge, {"C": 512}),
    }
