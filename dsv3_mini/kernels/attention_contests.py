"""The kernels of chapter 16 in the benchmark: V3's sizes and the mini's, and their rivals.

Generated from chapters/16_triton_attention_moe.ipynb; edit the chapter, not this file.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.kernels.bench import Contest
from dsv3_mini.kernels.contests import copying
from dsv3_mini.kernels.gate import route
from dsv3_mini.kernels.mla_decode import mla_decode
from dsv3_mini.kernels.mla_prefill import mla_prefill
from dsv3_mini.kernels.norm_rope import write_latents
from dsv3_mini.layers import apply_rope, rope_frequencies, rope_table
from dsv3_mini.moe import group_limited_topk

# How close to the roof?


def contests(device: torch.device) -> Iterator[Contest]:
    """Every kernel of chapter 16 on V3's sizes and the mini's, in bfloat16."""
    for preset in ("v3", "mini"):
        yield from contests_of(ModelConfig.preset(preset), preset, 4096, device)


def contests_of(config: ModelConfig, name: str, n_tokens: int, device: torch.device) -> Iterator[Contest]:
    """The sizes of one model: one long text, a batch, a batch that checks a draft; a prompt; gate and latents."""
    texts = max(n_tokens // 64, 1)
    for batch, length, new in ((1, 8 * n_tokens, 1), (texts, n_tokens, 1), (texts, n_tokens, 2)):
        yield decoding(config, f"{name} {batch} x {length}, {new} new", batch, length, new, device)
    yield prefilling(config, f"{name} 1 x {n_tokens}", n_tokens, device)
    yield gating(config, f"{name} {4 * n_tokens} tokens", 4 * n_tokens, device)
    yield storing(config, f"{name} 4 x {n_tokens}", 4, n_tokens, device)


def decoding(config: ModelConfig, shape: str, texts: int, length: int, new: int, device: torch.device) -> Contest:
    """The latents once, against torch's attention with all heads as queries of one key: its best case."""
    h, c, r = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q_c, q_pe, cache = draw(texts, new, h, c), draw(texts, new, h, r), draw(texts, length, c + r)
    lengths, scale = torch.full((texts,), length, device=device, dtype=torch.int32), (c + r) ** -0.5
    hidden = torch.arange(length, device=device) > length - new + torch.arange(new, device=device)[:, None]
    mask = None if new == 1 else ~hidden.repeat_interleave(h, 0)  # (T * H, S)
    q, keys = torch.cat((q_c, q_pe), -1).view(texts, 1, new * h, c + r), cache.unsqueeze(1)

    def library() -> Tensor:
        z = F.scaled_dot_product_attention(q, keys, keys[..., :c], attn_mask=mask, scale=scale)
        return z.view(texts, new, h, c)

    ours = {"taught": lambda: mla_decode(q_c, q_pe, cache, lengths, scale, longest=length)[0]}
    n_bytes, flops = 2 * (cache.numel() + 2 * q_c.numel() + q_pe.numel()), 2 * texts * length * new * h * (2 * c + r)
    peers = {"sdpa": library, "copy": copying(n_bytes, device)}
    return Contest("mla_decode", shape, ours, peers, library, 1e-2, n_bytes, flops)


def prefilling(config: ModelConfig, shape: str, tokens: int, device: torch.device) -> Contest:
    """Forward of one prompt, against torch's causal attention on keys and values prepared for it."""
    h, n, r = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    v = config.v_head_dim
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q, kv, k_pe = draw(1, tokens, h, n + r), draw(1, tokens, h, n + v), draw(1, tokens, r)
    k = torch.cat((kv[..., :n], k_pe.unsqueeze(2).expand(-1, -1, h, -1)), -1)
    wide = [x.transpose(1, 2).contiguous() for x in (q, k, F.pad(kv[..., n:], (0, n + r - v)))]
    scale = (n + r) ** -0.5

    def library() -> Tensor:
        return F.scaled_dot_product_attention(*wide, is_causal=True, scale=scale)[..., :v].transpose(1, 2)

    n_bytes = 2 * (q.numel() + kv.numel() + k_pe.numel() + tokens * h * v)
    flops = h * (n + r + v) * tokens * (tokens + 1)
    ours = {"taught": lambda: mla_prefill(q, kv, k_pe, scale)[0]}
    return Contest("mla_prefill", shape, ours, {"sdpa": library}, library, 1e-2, n_bytes, flops)


def gating(config: ModelConfig, shape: str, tokens: int, device: torch.device) -> Contest:
    """Logits to choices and weights, against chapter 04's operations and a copy; the tolerance lets near-ties swap."""
    logits = torch.randn(tokens, config.n_routed_experts, device=device)
    bias = torch.randn(config.n_routed_experts, device=device) / 10
    k, factor = config.num_experts_per_tok, config.routed_scaling_factor

    def unfused() -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        indices = group_limited_topk(scores + bias, k, config.n_group, config.topk_group)
        weights = scores.gather(1, indices)
        return indices, weights / (weights.sum(-1, keepdim=True) + 1e-20) * factor

    n_bytes = logits.nbytes + tokens * k * 12
    peers = {"torch": unfused, "copy": copying(n_bytes, device)}

    ours = {"taught": lambda: route(logits, bias, config)}
    return Contest("gate", shape, ours, peers, unfused, 1e-2, n_bytes)


def storing(config: ModelConfig, shape: str, texts: int, new: int, device: torch.device) -> Contest:
    """Norm, rotation and cache in one pass, against torch's operations and a copy."""
    c, r, eps = config.kv_lora_rank, config.qk_rope_head_dim, config.rms_norm_eps
    x = torch.randn(texts, new, c + r, device=device, dtype=torch.bfloat16)
    weight, cache = torch.rand(c, device=device, dtype=torch.bfloat16), torch.empty_like(x)
    rope = rope_table(torch.arange(new, device=device), rope_frequencies(r).to(device))
    starts = torch.zeros(texts, device=device, dtype=torch.int64)

    def unfused() -> Tensor:
        turned = apply_rope(x[..., None, c:], rope).squeeze(2)
        cache.copy_(torch.cat((F.rms_norm(x[..., :c], (c,), weight, eps), turned), -1))
        return cache

    def fused() -> Tensor:
        write_latents(x, weight, rope, starts, cache, eps, end=new)
        return cache

    n_bytes = 2 * x.nbytes
    peers = {"torch": unfused, "copy": copying(n_bytes, device)}
    return Contest("write_latents", shape, {"taught": fused}, peers, lambda: unfused().clone(), 1e-2, n_bytes)
