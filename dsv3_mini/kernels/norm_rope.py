"""RMSNorm of the latent and rotation of its key, written straight into the cache.

Generated from chapters/16_triton_attention_moe.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor

from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.interpreter import expect, launch, tl, triton
from dsv3_mini.kernels.mla_decode import check_lengths

# What can be done on the way into the cache?


@triton.jit
def latent_kernel(
    x, weight, cos, sin, starts, cache, x_batch, x_row, cache_stride, n_positions, eps,
    C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One program, of one warp: one row of kv_a's output, written to its position in its text's cache."""
    t, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position, c = tl.load(starts + batch) + t, tl.arange(0, C)
    source, target = x + batch * x_batch + t * x_row, cache + batch * cache_stride + position * (C + R)
    if position < n_positions:
        latent = tl.load(source + c).to(tl.float32)
        latent = latent * tl.rsqrt(tl.sum(latent * latent, 0) / C + eps) * tl.load(weight + c).to(tl.float32)
        tl.store(target + c, latent.to(cache.dtype.element_ty))
        pair = tl.arange(0, R // 2)
        columns = C + 2 * pair[:, None] + tl.arange(0, 2)[None, :]  # (R / 2, 2)
        a, b = tl.split(tl.load(source + columns).to(tl.float32))
        cosine, sine = tl.load(cos + position * (R // 2) + pair), tl.load(sin + position * (R // 2) + pair)
        turned = tl.join(a * cosine - b * sine, a * sine + b * cosine)
        tl.store(target + columns, turned.to(cache.dtype.element_ty))


def write_latents(
    x: Tensor,
    weight: Tensor,
    rope: tuple[Tensor, Tensor],
    starts: Tensor,
    cache: Tensor,
    eps: float,
    end: int | None = None,
    interpret: bool | None = None,
) -> None:
    """Norm the latents, turn the keys, and store both in the cache: equations 1 and 3 for T new tokens of each text.

    x (B, T, C + R) from kv_a_proj_with_mqa; weight (C,) of kv_a_layernorm; rope: cosines and sines (positions, R / 2)
    float32; text i gets positions starts[i] .. starts[i] + T - 1 of cache (B, S, C + R). end: a bound on what is
    written that the caller vouches for; without one, starts (B,) are read and checked. Without gradient.
    """
    floats = torch.bfloat16, torch.float16, torch.float32
    expect("starts", starts, (None,), torch.int32, torch.int64)
    expect("weight", weight, (None,), *floats)
    expect("x", x, (len(starts), None, None), *floats)
    (b, t, width), c = x.shape, len(weight)
    expect("cache", cache, (b, None, width), *floats)
    expect("cosines", rope[0], (None, (width - c) // 2), torch.float32)
    expect("sines", rope[1], tuple(rope[0].shape), torch.float32)
    if c & (c - 1) or width - c < 2 or (width - c) & (width - c - 1):
        raise ValueError(f"x {tuple(x.shape)} is {c} + {width - c} wide; both parts must be powers of two")
    if x.stride(-1) != 1 or (cache.numel() and cache.stride()[1:] != (width, 1)):
        raise ValueError(f"x has strides {x.stride()}, cache {cache.stride()}; rows contiguous, the cache's adjacent")
    n_positions = min(cache.shape[1], len(rope[0]))
    if end is None:
        check_lengths(starts + t, t, n_positions)
    numbers = x.stride(0), x.stride(1), cache.stride(0), n_positions, eps
    tensors = x, *(part.contiguous() for part in (weight, *rope, starts)), cache
    launch(latent_kernel, (t, b), *tensors, *numbers, C=c, R=width - c, num_warps=1, interpret=interpret)


# What does the compiler make of it?


def compile_cases() -> dict[str, Case]:
    """V3's latent in bfloat16."""
    tensors = {"x": "*bf16:16", "weight": "*bf16:16", "cos": "*fp32:16", "sin": "*fp32:16", "starts": "*i64:16"}
    numbers = {"x_batch": "i64:16", "x_row": "i32:16", "cache_stride": "i64:16", "n_positions": "i32", "eps": "fp32"}
    return {"write_latents": Case(latent_kernel, {**tensors, "cache": "*bf16:16", **numbers}, {"C": 512, "R": 64}, 1)}
