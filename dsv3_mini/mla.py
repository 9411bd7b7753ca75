"""Multi-head Latent Attention: keys and values of all heads rebuilt from one small cached vector.

Generated from chapters/03_latent_attention.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor, nn

from dsv3_mini.baseline import Cache, causal_attention, causal_mask
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import RMSNorm, apply_rope, softmax_scale

# What does the training form compute?


def mla_reference(x: Tensor, w: dict[str, Tensor], rope: tuple[Tensor, Tensor], config: ModelConfig) -> Tensor:
    """Equations 1-11 for one batch, token pairs written out: (B, T, D) -> (B, T, D); w: the layer's state dict."""
    h, nope = config.num_attention_heads, config.qk_nope_head_dim

    def norm(c, weight):
        return c * torch.rsqrt(c.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    c_q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"])
    q = (c_q @ w["q_b_proj.weight"].T).unflatten(-1, (h, -1))  # (B, T, H, nope + rope)
    down = x @ w["kv_a_proj_with_mqa.weight"].T  # (B, T, C + rope)
    c_kv = norm(down[..., : config.kv_lora_rank], w["kv_a_layernorm.weight"])
    k_pe = apply_rope(down[..., None, config.kv_lora_rank :], rope)  # (B, T, 1, rope), from x, one for all heads
    kv = (c_kv @ w["kv_b_proj.weight"].T).unflatten(-1, (h, -1))  # (B, T, H, nope + v)
    scores = torch.einsum("bthn,bshn->bhts", q[..., :nope], kv[..., :nope])
    scores = scores + torch.einsum("bthr,bsr->bhts", apply_rope(q[..., nope:], rope), k_pe.squeeze(2))
    scores = scores * softmax_scale(config) + torch.full_like(scores, float("-inf")).triu(1)
    out = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), kv[..., nope:])
    return out.flatten(2) @ w["o_proj.weight"].T


class MLA(nn.Module):
    """Multi-head Latent Attention (equations 1-11): keys and values of all heads come from one cached latent.

    forward: (B, T, D) and the rope table of its T positions -> (B, T, D). Without a cache the latent is expanded
    into keys and values (cheaper for many queries); with one, the up-projections are absorbed into the query and
    the output, and only the latent is read. `absorb` overrides the choice; the result is the same.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, h = config.hidden_size, config.num_attention_heads
        self.n_heads, self.scale = h, softmax_scale(config)
        self.nope_dim, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
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
        absorb = cache is not None if absorb is None else absorb
        attend = self.attend_absorbed if absorb else self.attend_expanded
        return self.o_proj(attend(q_nope, q_pe, c_kv, k_pe).flatten(2))

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Content and rotary part of every head's query (equations 6-9): (B, T, H, nope), (B, T, H, rope)."""
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_pe = q.unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        return q_nope, apply_rope(q_pe, rope)

    def latents(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the cache stores (equations 1 and 3): the normed latent (B, T, C), the turned key (B, T, rope)."""
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        return self.kv_a_layernorm(c_kv), apply_rope(k_pe.unsqueeze(2), rope).squeeze(2)

    def attend_expanded(self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor) -> Tensor:
        """Build every head's keys and values from the latent, then attend (equations 2, 4, 5, 10): (B, T, H, v)."""
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.n_heads, -1))  # (B, S, H, nope + v)
        k_nope, v = kv.split([self.nope_dim, self.v_dim], dim=-1)
        k_pe = k_pe.unsqueeze(2).expand(-1, -1, self.n_heads, -1)  # (B, S, H, rope)
        return causal_attention(torch.cat((q_nope, q_pe), -1), torch.cat((k_nope, k_pe), -1), v, self.scale)

    def attend_absorbed(self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor) -> Tensor:
        """Attend over the latent itself; W^UK moves into the query, W^UV behind the weighted sum: (B, T, H, v)."""
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], dim=1)
        q_c = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)  # (B, T, H, C)
        scores = torch.einsum("bthc,bsc->bhts", q_c, c_kv) + torch.einsum("bthr,bsr->bhts", q_pe, k_pe)
        if q_nope.shape[1] > 1:
            scores = scores.masked_fill(~causal_mask(*scores.shape[-2:], scores.device), float("-inf"))
        weights = (scores * self.scale).softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        z = torch.einsum("bhts,bsc->bthc", weights.type_as(c_kv), c_kv)  # (B, T, H, C)
        return torch.einsum("bthc,hvc->bthv", z, w_uv)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty latent cache: kv_lora_rank + qk_rope_head_dim numbers a position, whatever the head count."""
        weight = self.kv_b_proj.weight
        shapes = (batch, capacity, self.kv_lora_rank), (batch, capacity, self.rope_dim)
        return Cache(*shapes, dtype=weight.dtype, device=weight.device)
