"""The layers of a DeepSeekV3 laid out for decoding: absorbed attention, few operations.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.baseline import Block
from dsv3_mini.layers import RMSNorm
from dsv3_mini.mla import MLA
from dsv3_mini.moe import MoE
from dsv3_mini.mtp import MTPLayer

# Where does the time of one token go?


class UnitNorm:
    """RMSNorm without its gain and factor: x / sqrt(|x|^2 + D eps), three small operations instead of six."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype):
        dim, device = norm.weight.numel(), norm.weight.device
        self.floor = torch.tensor(math.sqrt(dim * norm.eps), dtype=dtype, device=device)
        self.gain = norm.weight.detach().to(dtype) * math.sqrt(dim)  # RMSNorm(x) = unit(x) * gain

    def __call__(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)

    def fold(self, *weights: Tensor) -> Tensor:
        """The matrices of (out, in) that follow the norm, side by side and transposed: (in, sum of out)."""
        return (torch.cat([weight.detach().to(self.gain.dtype) for weight in weights]) * self.gain).T.contiguous()


def quarter_turn(weight: Tensor) -> Tensor:
    """Rows (a, b) of every rotary pair become (-b, a): (..., rope, in). RoPE(Wx) = cos * Wx + sin * turn(W)x."""
    a, b = weight.unflatten(-2, (-1, 2)).unbind(-2)
    return torch.stack((-b, a), dim=-2).flatten(-3, -2)


class Places(NamedTuple):
    """Where the T new tokens of every row stand; worked out once a step, used by all layers."""

    cos: Tensor  # (B * T, rope), each value twice
    sin: Tensor
    cos_q: Tensor  # (B * T, 1, rope): the same for all heads
    sin_q: Tensor
    start: int  # of the first row
    rows: Tensor | None  # (B, 1), of the cache; None where there is one row
    positions: Tensor | None  # (B, T), of the cache
    end: int  # cached positions that are read
    mask: Tensor | None  # (B, T * H, end), minus infinity where a query may not look
    only_last: bool = False  # of one row: the other new tokens are put into the cache, and no more
    lengths: Tensor | None = None  # (B,) int32, cached positions with the new ones; only for an `Attend` of your own


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of your own, see `DecodePlan`


class AttentionStep:
    """MLA for a few new tokens a row, absorbed, over a cache (B, capacity, C + rope) that is written in place.

    call: the residual stream (B * T, D), the cache, the places -> the stream (of the last token
    if the places say so), with the output added in place.
    kernel: takes the place of `attend`, see `DecodePlan`.
    """

    def __init__(self, norm: RMSNorm, attention: MLA, dtype: torch.dtype, kernel: Attend | None = None):
        h, n, r, c = attention.n_heads, attention.nope_dim, attention.rope_dim, attention.kv_lora_rank
        self.sizes, self.kernel, compressed = (h, n, r, c), kernel, hasattr(attention, "q_a_proj")
        q = (attention.q_b_proj if compressed else attention.q_proj).weight.unflatten(0, (h, n + r)) * attention.scale
        q = torch.cat((q, quarter_turn(q[:, n:])), dim=1).flatten(0, 1)  # (H * (nope + 2 rope), in)
        first = attention.q_a_proj.weight if compressed else q
        latent, k_pe = attention.kv_a_proj_with_mqa.weight.split([c, r])
        self.unit, self.unit_c = UnitNorm(norm, dtype), UnitNorm(attention.kv_a_layernorm, dtype)
        self.down, self.parts = self.unit.fold(first, latent, k_pe, quarter_turn(k_pe)), [len(first), c, r, r]
        self.unit_q = UnitNorm(attention.q_a_layernorm, dtype) if compressed else None
        self.q_up = self.unit_q.fold(q) if compressed else None
        kv_b = attention.kv_b_proj.weight.detach().to(dtype).unflatten(0, (h, -1))
        self.w_uk, self.w_uv = kv_b[:, :n].contiguous(), kv_b[:, n:].transpose(1, 2).contiguous()
        self.out = attention.o_proj.weight.detach().to(dtype).T.contiguous()

    def __call__(self, x: Tensor, cache: Tensor, at: Places) -> Tensor:
        q, c_kv, k_pe, k_turned = (self.unit(x) @ self.down).split_with_sizes(self.parts, dim=-1)
        self.write(c_kv, torch.addcmul(k_pe * at.cos, k_turned, at.sin), cache, at)
        if at.only_last:
            x, q = x[-1:], q[-1:]
        q_c, q_pe = self.queries(q, at)
        if self.kernel is None:
            z = self.attend(torch.cat((q_c, q_pe), dim=-1), cache[:, : at.end], at.mask)  # (H, B * T, C)
        else:
            q_c, q_pe = (part.contiguous().unflatten(0, (len(cache), -1)) for part in (q_c, q_pe))
            z = self.kernel(q_c, q_pe, cache, at.lengths).flatten(0, 1).transpose(0, 1)
        o = torch.bmm(z, self.w_uv).transpose(0, 1).reshape(len(x), -1)  # (B * T, H * v)
        return x.addmm_(o, self.out)

    def write(self, c_kv: Tensor, k_pe: Tensor, cache: Tensor, at: Places) -> None:
        """Put the new latents and keys, (B * T, C) and (B * T, rope), into the cache."""
        new = (self.unit_c(c_kv).mul_(self.unit_c.gain), k_pe)
        if at.rows is None:
            torch.cat(new, dim=-1, out=cache[0].narrow(0, at.start, len(k_pe)))
        else:
            cache[at.rows, at.positions] = torch.cat(new, dim=-1).view(*at.positions.shape, -1)

    def queries(self, q: Tensor, at: Places) -> tuple[Tensor, Tensor]:
        """Content part carried into the latent's space, and rotary part turned: (B * T, H, C), (B * T, H, rope)."""
        h, n, r, _ = self.sizes
        q = q if self.q_up is None else self.unit_q(q) @ self.q_up
        q_nope, q_pe, q_turned = q.view(-1, h, n + 2 * r).split_with_sizes([n, r, r], dim=-1)
        q_c = torch.bmm(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1)
        return q_c, torch.addcmul(q_pe * at.cos_q, q_turned, at.sin_q)

    def attend(self, q: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Weighted sums of the latents: all heads and queries of a row are one matrix product. (H, B * T, C)"""
        h, _, _, c = self.sizes
        q, keys_t = q.view(len(keys), -1, q.shape[-1]), keys.transpose(1, 2)
        scores = torch.bmm(q, keys_t) if mask is None else torch.baddbmm(mask, q, keys_t)  # (B, T * H, S)
        return torch.bmm(scores.softmax(-1), keys[..., :c]).view(-1, h, c).transpose(0, 1)


def choose_experts(choice: Sequence[float], top_k: int, n_group: int, topk_group: int, top_two: bool) -> list[int]:
    """`group_limited_topk` of chapter 04 for one token, best expert first: E numbers -> K indices."""
    experts = range(len(choice))
    if n_group > 1:
        size = len(choice) // n_group
        worth = [sum(sorted(choice[i : i + size])[-1 - top_two :]) for i in experts[::size]]  # (G,)
        kept = sorted(range(n_group), key=worth.__getitem__, reverse=True)[:topk_group]
        experts = [i for group in kept for i in experts[group * size : (group + 1) * size]]
    return sorted(experts, key=choice.__getitem__, reverse=True)[:top_k]


class DenseStep:
    """A SwiGLU layer with its norm, added to the residual stream (N, D) in place. Gate and up are one product."""

    def __init__(self, norm: RMSNorm, mlp: nn.Module, dtype: torch.dtype):
        self.unit = UnitNorm(norm, dtype)
        self.up = self.unit.fold(mlp.gate_proj.weight, mlp.up_proj.weight)
        self.down = mlp.down_proj.weight.detach().to(dtype).T.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = (self.unit(x) @ self.up).chunk(2, dim=-1)
        return x.addmm_(F.silu(gate) * up, self.down)


class MoEStep:
    """A mixture of experts with its norm, added to the residual stream (N, D) in place, for a handful of tokens.

    Sorting tokens by expert, as chapter 04 does it, pays for many tokens (more than `few`). For a few, each chosen
    expert is two matrix-vector products, read where it lies.
    """

    few = 16

    def __init__(self, norm: RMSNorm, moe: MoE, dtype: torch.dtype):
        self.norm, self.moe, self.unit, self.config = norm, moe, UnitNorm(norm, dtype), moe.gate.config
        self.gate, bias = self.unit.fold(moe.gate.weight), getattr(moe.gate, "e_score_correction_bias", None)
        self.bias = None if bias is None else bias.to(dtype)
        self.gate_up = [weight.to(dtype) for weight in moe.experts.gate_up_proj.detach()]  # E times (2F, D)
        self.down = [weight.to(dtype) for weight in moe.experts.down_proj.detach()]  # E times (D, F)
        n_routed, width = len(self.down), moe.experts.down_proj.shape[2]
        if hasattr(moe, "shared_experts"):
            shared = moe.shared_experts
            rows = zip(shared.gate_proj.weight.split(width), shared.up_proj.weight.split(width), strict=True)
            self.gate_up += [torch.cat(pair).detach().to(dtype) for pair in rows]
            self.down += [w.detach().to(dtype).contiguous() for w in shared.down_proj.weight.split(width, dim=1)]
        self.always = list(range(n_routed, len(self.down)))

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > self.few:
            return x.add_(self.moe(self.norm(x)))
        u = self.unit(x)
        for x_i, u_i, chosen in zip(x.unbind(), (u * self.unit.gain).unbind(), self.route(u), strict=True):
            self.token(x_i, u_i, *chosen)
        return x

    def token(self, x: Tensor, u: Tensor, experts: list[int], weights: list[float]) -> None:
        """One token's weighted sum over its experts, from its normed state (D,), added to x (D,)."""
        gate, up = torch.stack([torch.mv(self.gate_up[i], u) for i in experts]).chunk(2, dim=1)  # (experts, F)
        for i, weight, y in zip(experts, weights, (F.silu(gate) * up).unbind(), strict=True):
            x.addmv_(self.down[i], y, alpha=weight)

    def route(self, u: Tensor) -> list[tuple[list[int], list[float]]]:
        """The gate of chapter 04 on normed tokens (N, D), then the shared experts: each token's experts and weights."""
        c, scores, chosen = self.config, u @ self.gate, []
        scores = scores.sigmoid() if c.scoring_func == "sigmoid" else scores.softmax(-1)
        choice = scores if self.bias is None else scores + self.bias
        n_group = 1 if c.topk_method == "greedy" else c.n_group
        for s, biased in zip(scores.tolist(), choice.tolist(), strict=True):
            experts = choose_experts(biased, c.num_experts_per_tok, n_group, c.topk_group, self.bias is not None)
            scale = c.routed_scaling_factor / (sum(s[i] for i in experts) + 1e-20 if c.norm_topk_prob else 1.0)
            chosen.append((experts + self.always, [s[i] * scale for i in experts] + [1.0] * len(self.always)))
        return chosen


class MTPStep:
    """One MTP layer for a few tokens: states (N, D) and the tokens that follow them (N,) -> normed states (N, D)."""

    def __init__(self, layer: MTPLayer, dtype: torch.dtype, kernel: Attend | None = None):
        of_token, of_state = layer.eh_proj.weight.chunk(2, dim=1)
        self.enorm, self.hnorm = UnitNorm(layer.enorm, dtype), UnitNorm(layer.hnorm, dtype)
        self.join = torch.cat((self.enorm.fold(of_token), self.hnorm.fold(of_state)))  # (2D, D)
        self.embedding = layer.embed_tokens.weight.detach().to(dtype)
        self.attention, self.mlp = plan_block(layer, dtype, kernel)
        self.norm = UnitNorm(layer.shared_head.norm, dtype)

    def __call__(self, h: Tensor, ids: Tensor, cache: Tensor, at: Places) -> Tensor:
        x = torch.cat((self.enorm(F.embedding(ids, self.embedding)), self.hnorm(h)), dim=-1) @ self.join
        return self.norm(self.mlp(self.attention(x, cache, at))) * self.norm.gain


def plan_block(block: Block, dtype: torch.dtype, kernel: Attend | None) -> tuple[AttentionStep, DenseStep | MoEStep]:
    """The two halves of a layer, prepared for decoding."""
    step = MoEStep if isinstance(block.mlp, MoE) else DenseStep
    attention = AttentionStep(block.input_layernorm, block.self_attn, dtype, kernel)
    return attention, step(block.post_attention_layernorm, block.mlp, dtype)
