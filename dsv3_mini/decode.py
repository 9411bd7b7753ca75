"""A DeepSeekV3 laid out for decoding: few operations, a latent cache in one piece, absorbed attention.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.baseline import Block, Cache
from dsv3_mini.layers import RMSNorm
from dsv3_mini.mla import MLA
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import MoE, group_limited_topk
from dsv3_mini.mtp import MTPLayer

# Where does the time of one token go?


class UnitNorm:
    """RMSNorm without its gain and factor: x / sqrt(|x|^2 + D eps), three small operations instead of six."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype):
        dim, device = norm.weight.numel(), norm.weight.device
        self.floor = torch.tensor(math.sqrt(dim * norm.eps), dtype=dtype, device=device)
        self.gain = norm.weight.detach().to(dtype) * math.sqrt(dim)  # RMSNorm(x) = unit(x) * gain

    def __call__(self, x: Tensor) -> Tensor:
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)

    def fold(self, *weights: Tensor) -> Tensor:
        """The matrices of (out, in) that follow the norm, side by side and transposed: (in, sum of out)."""
        return (torch.cat([weight.detach().to(self.gain.dtype) for weight in weights]) * self.gain).T.contiguous()


def quarter_turn(weight: Tensor) -> Tensor:
    """Rows (a, b) of every rotary pair become (-b, a): (..., rope, in). RoPE(Wx) = cos * Wx + sin * turn(W)x."""
    a, b = weight.unflatten(-2, (-1, 2)).unbind(-2)
    return torch.stack((-b, a), dim=-2).flatten(-3, -2)


class Places(NamedTuple):
    """Where the T new tokens of every row stand; worked out once a step, used by all layers."""

    cos: Tensor  # (B * T, 1, rope), each value twice
    sin: Tensor
    start: int  # of the first row
    rows: Tensor | None  # (B, 1), of the cache; None where there is one row
    positions: Tensor | None  # (B, T), of the cache
    end: int  # cached positions that are read
    mask: Tensor | None  # (B, T, 1, end), minus infinity where a query may not look
    lengths: Tensor | None = None  # (B,) int32, cached positions with the new ones; only for an `Attend` of your own


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of your own, see `DecodePlan`


class AttentionStep:
    """MLA for a few new tokens a row, absorbed, over a cache (B, capacity, C + rope) that is written in place.

    call: (B * T, D), the cache, the places -> (B * T, D), residual included. kernel: takes the place of `attend`,
    see `DecodePlan`.
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
        self.write(c_kv, torch.addcmul(k_pe * at.cos[:, 0], k_turned, at.sin[:, 0]), cache, at)
        q_c, q_pe = self.queries(q, at)
        if self.kernel is None:
            z = self.attend(torch.cat((q_c, q_pe), dim=-1), cache[:, : at.end], at.mask)  # (H, B * T, C)
        else:
            q_c, q_pe = (part.contiguous().unflatten(0, (len(cache), -1)) for part in (q_c, q_pe))
            z = self.kernel(q_c, q_pe, cache, at.lengths).flatten(0, 1).transpose(0, 1)
        o = torch.bmm(z, self.w_uv).transpose(0, 1).reshape(len(x), -1)  # (B * T, H * v)
        return torch.addmm(x, o, self.out)

    def write(self, c_kv: Tensor, k_pe: Tensor, cache: Tensor, at: Places) -> None:
        """Put the new latents and keys, (B * T, C) and (B * T, rope), into the cache."""
        new = (self.unit_c(c_kv) * self.unit_c.gain, k_pe)
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
        return q_c, torch.addcmul(q_pe * at.cos, q_turned, at.sin)

    def attend(self, q: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Weighted sums of the latents: all heads and queries of a row are one matrix product. (H, B * T, C)"""
        h, _, _, c = self.sizes
        scores = torch.bmm(q.view(len(keys), -1, q.shape[-1]), keys.transpose(1, 2))  # (B, T * H, S)
        if mask is not None:
            scores = (scores.unflatten(1, (-1, h)) + mask).flatten(1, 2)
        return torch.bmm(scores.softmax(-1), keys[..., :c]).view(-1, h, c).transpose(0, 1)


class DenseStep:
    """A SwiGLU layer with its norm and residual: (N, D) -> (N, D), gate and up in one product."""

    def __init__(self, norm: RMSNorm, mlp: nn.Module, dtype: torch.dtype):
        self.unit = UnitNorm(norm, dtype)
        self.up = self.unit.fold(mlp.gate_proj.weight, mlp.up_proj.weight)
        self.down = mlp.down_proj.weight.detach().to(dtype).T.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = (self.unit(x) @ self.up).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate) * up, self.down)


class MoEStep:
    """A mixture of experts with its norm and residual: (N, D) -> (N, D), for a handful of tokens.

    Sorting and grouping, as chapter 04 does it, pay for many tokens (more than `few`). For a few, each chosen expert
    is two matrix-vector products, read where it lies. A shared expert is cut into experts of the routed width, which
    every token uses with weight 1.
    """

    few = 16

    def __init__(self, norm: RMSNorm, moe: MoE, dtype: torch.dtype):
        self.norm, self.moe, self.unit = norm, moe, UnitNorm(norm, dtype)
        self.config, self.n_routed = moe.gate.config, len(moe.experts.down_proj)
        self.gate, bias = self.unit.fold(moe.gate.weight), getattr(moe.gate, "e_score_correction_bias", None)
        self.bias = None if bias is None else bias.to(dtype)
        self.gate_up = [weight.to(dtype) for weight in moe.experts.gate_up_proj.detach()]  # E times (2F, D)
        self.down = [weight.to(dtype) for weight in moe.experts.down_proj.detach()]  # E times (D, F)
        if hasattr(moe, "shared_experts"):
            shared, width = moe.shared_experts, moe.experts.down_proj.shape[2]
            rows = zip(shared.gate_proj.weight.split(width), shared.up_proj.weight.split(width), strict=True)
            self.gate_up += [torch.cat(pair).detach().to(dtype) for pair in rows]
            self.down += [w.detach().to(dtype).contiguous() for w in shared.down_proj.weight.split(width, dim=1)]

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > self.few:
            return x + self.moe(self.norm(x))
        u = self.unit(x)
        indices, weights = self.route(u)
        always, rows = list(range(self.n_routed, len(self.down))), (u * self.unit.gain).unbind()
        tokens = zip(x.unbind(), rows, indices.tolist(), weights, strict=True)
        return torch.stack([self.token(x_i, u_i, chosen + always, g) for x_i, u_i, chosen, g in tokens])

    def token(self, x: Tensor, u: Tensor, experts: list[int], weights: Tensor) -> Tensor:
        """One token's sum over its experts, added to the residual: (D,) -> (D,)."""
        gate, up = torch.stack([torch.mv(self.gate_up[i], u) for i in experts]).chunk(2, dim=1)  # (experts, F)
        y = F.silu(gate) * up
        y[: len(weights)] *= weights.unsqueeze(1)
        out = x.clone()
        for i, y_i in zip(experts, y.unbind(), strict=True):
            out.addmv_(self.down[i], y_i)
        return out

    def route(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The gate of chapter 04 on normed tokens (N, D): chosen experts and their weights, (N, K) each."""
        c, scores = self.config, u @ self.gate
        scores = scores.sigmoid() if c.scoring_func == "sigmoid" else scores.softmax(-1)
        choice = scores if self.bias is None else scores + self.bias
        n_group = 1 if c.topk_method == "greedy" else c.n_group
        indices = group_limited_topk(choice, c.num_experts_per_tok, n_group, c.topk_group, self.bias is not None)
        weights = scores.gather(1, indices)
        scale = c.routed_scaling_factor / (weights.sum(-1, keepdim=True) + 1e-20 if c.norm_topk_prob else 1.0)
        return indices, weights * scale


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


class DecodePlan:
    """A DeepSeekV3 with its weights laid out for decoding: prepared once, used for any number of texts.

    dtype: float32, or float64 where the model has it. It reads the model's weights as they are now: after a training
    step, make a new one. n_tokens: only the first tokens may be written (a tokenizer smaller than the model's table).
    attend: an attention kernel of your own, say for a GPU, in place of torch's products. attend(q_latent, q_pe, cache,
    lengths) -> (B, T, H, C) gets contiguous queries (B, T, H, C) and (B, T, H, rope) that already carry the softmax
    scale, the whole cache (B, capacity, C + rope), latents first, and lengths (B,) int32: query t of row i sees
    positions 0 .. lengths[i] - T + t, and no other.
    """

    @torch.no_grad()
    def __init__(self, model: DeepSeekV3, n_tokens: int | None = None, attend: Attend | None = None):
        self.dtype = torch.promote_types(model.lm_head.weight.dtype, torch.float32)
        if model.lm_head.weight.dtype != self.dtype:
            model = copy.deepcopy(model).to(self.dtype)
        self.model, self.config, self.device = model, model.config, model.lm_head.weight.device
        blocks, self.norm = list(model.model.layers)[: self.config.num_hidden_layers], model.model.norm
        self.attend, self.layers = attend, [plan_block(block, self.dtype, attend) for block in blocks]
        self.mtp = [MTPStep(layer, self.dtype, attend) for layer in model.mtp_layers]
        self.unit, self.embedding = UnitNorm(self.norm, self.dtype), model.model.embed_tokens.weight.detach()
        self.head = model.lm_head.weight.detach()[:n_tokens].T.contiguous()  # (D, V)


class Decoder:
    """The caches of B texts, and the steps that fill them. Where a step begins is an argument, so forgetting is free.

    capacity: positions a row can hold; n_mtp: MTP layers that keep a cache too.
    """

    def __init__(self, plan: DecodePlan, batch: int, capacity: int, n_mtp: int = 0):
        c, shape = plan.config, (batch, capacity)
        self.plan, self.capacity, self.parts = plan, capacity, [c.kv_lora_rank, c.qk_rope_head_dim]
        n_layers = len(plan.layers) + n_mtp
        self.caches = [
            torch.zeros(*shape, sum(self.parts), dtype=plan.dtype, device=plan.device) for _ in range(n_layers)
        ]
        table = plan.model.model.rope(0, capacity)
        self.cos, self.sin = (part.to(plan.dtype).repeat_interleave(2, dim=-1).unsqueeze(1) for part in table)

    def places(self, starts: Sequence[int], length: int) -> Places:
        """Positions starts[i] .. starts[i] + length - 1 of each row. ValueError beyond the capacity."""
        if (end := max(starts) + length) > self.capacity:
            raise ValueError(f"{end} positions do not fit the cache of {self.capacity}")
        device, lengths = self.cos.device, None
        if self.plan.attend is not None:
            lengths = torch.tensor([start + length for start in starts], dtype=torch.int32, device=device)
        if len(starts) == 1:
            mask = None if length == 1 else self.cos.new_full((length, end), -math.inf).triu_(starts[0] + 1)
            mask = mask if mask is None else mask[None, :, None]
            return Places(
                self.cos[starts[0] : end], self.sin[starts[0] : end], starts[0], None, None, end, mask, lengths
            )
        rows, offsets = torch.arange(len(starts), device=device), torch.arange(length, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + offsets
        unseen = torch.arange(end, device=device) > positions[..., None]  # (B, T, end)
        mask = torch.zeros(unseen.shape, dtype=self.plan.dtype, device=device).masked_fill_(unseen, -math.inf)
        cos, sin = self.cos[positions.flatten()], self.sin[positions.flatten()]
        return Places(cos, sin, starts[0], rows[:, None], positions, end, mask.unsqueeze(2), lengths)

    def step(self, ids: Tensor, starts: Sequence[int]) -> Tensor:
        """New tokens (B, T), row i from position starts[i] on -> normed hidden states (B, T, D)."""
        plan, at = self.plan, self.places(starts, ids.shape[1])
        x = F.embedding(ids.flatten(), plan.embedding)  # (B * T, D)
        for (attention, mlp), cache in zip(plan.layers, self.caches):  # noqa: B905 (MTP caches follow)
            x = mlp(attention(x, cache, at))
        return (plan.unit(x) * plan.unit.gain).view(*ids.shape, -1)

    def mtp_step(self, depth: int, h: Tensor, ids: Tensor, starts: Sequence[int]) -> Tensor:
        """States (B, T, D) from position starts[i] on, and the tokens (B, T) that follow them -> (B, T, D)."""
        cache = self.caches[len(self.plan.layers) + depth]
        at = self.places(starts, ids.shape[1])
        return self.plan.mtp[depth](h.flatten(0, 1), ids.flatten(), cache, at).view_as(h)

    def prefill(self, ids: Tensor) -> Tensor:
        """Whole prompts (B, T) from position 0, through the model itself -> normed hidden states (B, T, D).

        Rows may be filled up at their end with any token: what follows a row's last token is overwritten later.
        """
        return self.plan.model.model(ids, [self.as_cache(cache) for cache in self.caches[: len(self.plan.layers)]])

    def mtp_prefill(self, depth: int, h: Tensor, ids: Tensor) -> Tensor:
        """`prefill` for an MTP layer: states and the tokens that follow them -> normed states, (B, T, D)."""
        layer, cache = self.plan.model.mtp_layers[depth], self.as_cache(self.caches[len(self.plan.layers) + depth])
        return layer.shared_head.norm(layer(h, ids, self.plan.model.model.rope(0, ids.shape[1]), cache))

    def logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return h @ self.plan.head

    def as_cache(self, tensor: Tensor) -> Cache:
        """The same memory as the cache that chapter 03's attention writes, empty."""
        cache = Cache((1, 0))
        cache.tensors = list(tensor.split(self.parts, dim=-1))
        return cache

    @property
    def n_bytes(self) -> int:
        """Memory of all caches, filled or not."""
        return sum(cache.nbytes for cache in self.caches)
