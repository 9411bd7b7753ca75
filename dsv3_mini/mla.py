"""Multi-head Latent Attention: every head's keys and values come from one small cached vector.

Generated from chapters/03_latent_attention.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor, nn

from dsv3_mini.baseline import Cache, causal_attention, causal_mask
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import RMSNorm, apply_rope, softmax_scale

# What does training compute?


def attend_expanded_reference(
    q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, kv_b: Tensor, scale: float
) -> Tensor:
    """Equations 2, 4, 5 and 10, one head at a time: keys and values rebuilt from the latent -> (B, T, H, v).

    q_nope (B, T, H, nope), q_pe (B, T, H, rope), c_kv (B, S, C), k_pe (B, S, rope), kv_b (H, nope + v, C): for each
    head the rows of W^UK, then those of W^UV. The T queries are the last T of S positions.
    """
    heads = []
    for i in range(q_nope.shape[2]):
        k_nope, v = (c_kv @ kv_b[i].T).tensor_split([q_nope.shape[-1]], dim=-1)  # (B, S, nope), (B, S, v)
        q, k = torch.cat((q_nope[:, :, i], q_pe[:, :, i]), -1), torch.cat((k_nope, k_pe), -1)
        scores = (q @ k.transpose(1, 2)) * scale  # (B, T, S)
        hidden_mask = ~causal_mask(q.shape[1], k.shape[1], q.device)
        heads.append(scores.masked_fill(hidden_mask, float("-inf")).softmax(-1) @ v)
    return torch.stack(heads, dim=2)


# What does decoding compute?


def attend_absorbed(q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, kv_b: Tensor, scale: float) -> Tensor:
    """`attend_expanded_reference` without a key or value: W^UK moves into the query, W^UV behind the weighted sum.

    Same arguments and result, (B, T, H, v). The softmax is taken in float32 at least.
    """
    (n_queries, n_heads), n_keys = q_nope.shape[1:3], c_kv.shape[1]
    w_uk, w_uv = kv_b.split([q_nope.shape[-1], kv_b.shape[1] - q_nope.shape[-1]], dim=1)  # (H, nope, C), (H, v, C)
    q_c = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)
    scores = q_c.flatten(1, 2) @ c_kv.mT + q_pe.flatten(1, 2) @ k_pe.mT  # (B, T*H, S)
    if n_queries > 1:  # one query is the last position and sees everything
        hidden_mask = ~causal_mask(n_queries, n_keys, scores.device).repeat_interleave(n_heads, dim=0)  # (T*H, S)
        scores = scores.masked_fill(hidden_mask, float("-inf"))
    weights = (scores * scale).softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    z = (weights.type_as(c_kv) @ c_kv).unflatten(1, (n_queries, n_heads))  # (B, T, H, C)
    return torch.einsum("bthc,hvc->bthv", z, w_uv)


# Which form is cheaper, and when?


def absorbing_is_cheaper(config: ModelConfig, n_queries: int, n_keys: int) -> bool:
    """Whether T queries on S cached latents cost fewer FLOPs absorbed than expanded: 1/T - 1/S > 2/(n + v) - 1/C."""
    threshold = 2 / (config.qk_nope_head_dim + config.v_head_dim) - 1 / config.kv_lora_rank
    return 1 / n_queries - 1 / n_keys > threshold


# How does it become one module?


class MLA(nn.Module):
    """Multi-head Latent Attention (equations 1-11): keys and values of all heads come from one cached latent.

    forward: (B, T, D) and the rope table of its T positions -> (B, T, D). Without a cache the latent is expanded into
    keys and values; with one, the form with fewer FLOPs is taken. `absorb` overrides; the result is the same.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, h = config.hidden_size, config.num_attention_heads
        self.config, self.n_heads, self.scale = config, h, softmax_scale(config)
        self.nope_dim, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.core = causal_attention  # of the expanded form; chapter 14 puts a narrower mask in its place
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(d, h * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(d, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, h * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, config.kv_lora_rank + self.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, h * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(h * self.v_dim, d, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None, absorb: bool | None = None
    ) -> Tensor:
        q_nope, q_pe = self.queries(x, rope)
        c_kv, k_pe = self.latents(x, rope)
        if cache is not None:
            c_kv, k_pe = cache.append(c_kv, k_pe)  # (B, S, C), (B, S, rope)
        if absorb is None:
            absorb = cache is not None and absorbing_is_cheaper(self.config, x.shape[1], c_kv.shape[1])
        attend = self.attend_absorbed if absorb else self.attend_expanded
        return self.o_proj(attend(q_nope, q_pe, c_kv, k_pe).flatten(2))

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Content and rotary part of every head's query (equations 6-9): (B, T, H, nope), (B, T, H, rope)."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_pe = q.unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        return q_nope, apply_rope(q_pe, rope)

    def latents(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the cache stores (equations 1 and 3): the normed latent (B, T, C), the turned key (B, T, rope)."""
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        return self.kv_a_layernorm(c_kv), apply_rope(k_pe.unsqueeze(2), rope).squeeze(2)

    def attend_expanded(self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor) -> Tensor:
        """`attend_expanded_reference` for all heads at once, by torch's fused attention: (B, T, H, v)."""
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.n_heads, -1))  # (B, S, H, nope + v)
        k_nope, v = kv.split([self.nope_dim, self.v_dim], dim=-1)
        k_pe = k_pe.unsqueeze(2).expand(-1, -1, self.n_heads, -1)  # (B, S, H, rope)
        return self.core(torch.cat((q_nope, q_pe), -1), torch.cat((k_nope, k_pe), -1), v, self.scale)

    def attend_absorbed(self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor) -> Tensor:
        """The function above with this layer's weights: (B, T, H, v)."""
        kv_b = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1))
        return attend_absorbed(q_nope, q_pe, c_kv, k_pe, kv_b, self.scale)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty latent cache: kv_lora_rank + qk_rope_head_dim numbers a position, whatever the head count."""
        weight = self.kv_b_proj.weight
        shapes = (batch, capacity, self.kv_lora_rank), (batch, capacity, self.rope_dim)
        return Cache(*shapes, dtype=weight.dtype, device=weight.device)
