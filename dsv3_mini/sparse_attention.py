"""Attention over a few chosen positions of the latent cache: an indexer scores, the best k are read.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.baseline import Cache, causal_mask
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import apply_rope
from dsv3_mini.long_context import attention_weights, record_attention
from dsv3_mini.mla import MLA
from dsv3_mini.model import DeepSeekV3

# What came after?


def turn_halves(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the pairs (i, i + d/2), which the indexer has, not (2i, 2i + 1), which MLA has: (B, T, H, d)."""
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return apply_rope(pairs, rope).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class LightningIndexer(nn.Module):
    """Scores of all positions for each query (DeepSeek-V3.2-Exp, equation 1); parameters named as published.

    forward: x (B, T, D), MLA's compressed queries c_q (B, T, q_lora_rank), the rope table of the T positions, and the
    positions (P,) that ask -> (B, P, T), minus infinity for what comes later. V3.2 has 64 heads of 128.
    """

    def __init__(self, config: ModelConfig, n_heads: int = 4, head_dim: int = 32):
        super().__init__()
        if config.q_lora_rank is None or head_dim < config.qk_rope_head_dim:
            raise ValueError(f"q_lora_rank={config.q_lora_rank} and {head_dim=}: the indexer reads compressed queries")
        self.n_heads, self.head_dim, self.rope_dim = n_heads, head_dim, config.qk_rope_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, head_dim, bias=False)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, n_heads, bias=False)

    def forward(self, x: Tensor, c_q: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
        turned = tuple(part[positions] for part in rope)
        q = self.turn(self.wq_b(c_q[:, positions]).unflatten(-1, (self.n_heads, -1)), turned)  # (B, P, H, d)
        k = self.turn(self.k_norm(self.wk(x)).unsqueeze(2), rope).squeeze(2)  # (B, T, d)
        weights = self.weights_proj(x[:, positions]) * self.n_heads**-0.5
        scores = F.relu(torch.einsum("bphd,btd->bpht", q, k) * self.head_dim**-0.5)
        scores = torch.einsum("bpht,bph->bpt", scores, weights)
        return scores.masked_fill(~causal_mask(x.shape[1], x.shape[1], x.device)[positions], float("-inf"))

    def turn(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """RoPE on the first `rope_dim` channels of each head."""
        pe, rest = x.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        return torch.cat((turn_halves(pe, rope), rest), dim=-1)


def choose_positions(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best positions of each query and which of them it may see: (B, P, T) -> (B, P, k') twice, k' <= k."""
    best = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return best.indices, best.values > float("-inf")


def attend_chosen(
    q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, kv_b: Tensor, scale: float, chosen: Tensor, seen: Tensor
) -> Tensor:
    """`attend_absorbed` where query t reads the positions chosen[:, t] alone; chosen, seen: (B, T, k).

    q_nope (B, T, H, nope), q_pe (B, T, H, rope), c_kv (B, S, C), k_pe (B, S, rope), kv_b (H, nope + v, C)
    -> (B, T, H, v). What is chosen and not `seen` counts nothing.
    """
    w_uk, w_uv = kv_b.split([q_nope.shape[-1], kv_b.shape[1] - q_nope.shape[-1]], dim=1)
    text = torch.arange(len(chosen), device=chosen.device)[:, None, None]
    latents, keys = c_kv[text, chosen], k_pe[text, chosen]  # (B, T, k, C), (B, T, k, rope)
    q_c = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)
    scores = q_c @ latents.mT + q_pe @ keys.mT  # (B, T, H, k)
    weights = (scores * scale).masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
    return torch.einsum("bthc,hvc->bthv", weights @ latents, w_uv)


Scorer = Callable[[MLA, Tensor, tuple[Tensor, Tensor], Tensor], Tensor]  # layer, x, rope, positions -> (B, P, T)


class SparseMLA(MLA):
    """MLA in which each query reads its `top_k` best positions by `scorer`, some hundred queries at a time."""

    scorer: Scorer
    top_k: int

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None, absorb: bool | None = None
    ) -> Tensor:
        if cache is not None:
            raise ValueError("SparseMLA reads whole texts; a cache of the indexer's keys is not built here")
        q_nope, q_pe = self.queries(x, rope)
        c_kv, k_pe = self.latents(x, rope)
        kv_b, outs = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1)), []
        for positions in torch.arange(x.shape[1], device=x.device).split(256):
            picked = choose_positions(self.scorer(self, x, rope, positions), self.top_k)
            query = q_nope[:, positions], q_pe[:, positions]
            outs.append(attend_chosen(*query, c_kv, k_pe, kv_b, self.scale, *picked))
        return self.o_proj(torch.cat(outs, dim=1).flatten(2))


def make_sparse(model: DeepSeekV3, scorers: Sequence[Scorer], top_k: int) -> DeepSeekV3:
    """Let the main layers of a model read `top_k` positions, layer i by scorers[i]; in place, weights unchanged."""
    layers = list(model.model.layers)[: model.config.num_hidden_layers]
    for layer, scorer in zip(layers, scorers, strict=True):
        attention = layer.self_attn
        attention.__class__, attention.scorer, attention.top_k = SparseMLA, scorer, top_k
    return model


def score_by_indexer(indexer: LightningIndexer) -> Scorer:
    """What an indexer says."""

    def scorer(attention: MLA, x: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
        return indexer(x, attention.q_a_layernorm(attention.q_a_proj(x)), rope, positions)

    return scorer


def score_by_attention(attention: MLA, x: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    """What a perfect indexer would say: the true attention of all heads, of one text."""
    total = attention_weights(attention, x, rope, positions).sum(0)[None]  # (1, P, T)
    return total.masked_fill(~causal_mask(x.shape[1], x.shape[1], x.device)[positions], float("-inf"))


def score_by_recency(attention: MLA, x: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    """The later the better: a sliding window."""
    scores = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), len(positions), -1)
    return scores.masked_fill(~causal_mask(x.shape[1], x.shape[1], x.device)[positions], float("-inf"))


def indexer_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean KL divergence of softmax(scores) from the attention `target` that it should imitate, (B, P, T) each."""
    log_q = scores.log_softmax(-1)
    return (torch.xlogy(target, target) - target * log_q.masked_fill(target == 0, 0.0)).sum(-1).mean()


def train_indexers(
    model: DeepSeekV3, windows: Tensor, draws: int, n_queries: int = 64, learning_rate: float = 2e-3, seed: int = 0
) -> tuple[list[LightningIndexer], list[float]]:
    """An indexer for each main layer, trained on a frozen model's attention: (indexers, mean loss of each step).

    windows: (n, T + 1), each read once; draws: steps on each, with `n_queries` positions drawn anew.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    indexers = nn.ModuleList(LightningIndexer(model.config) for _ in range(model.config.num_hidden_layers))
    optimizer, losses = torch.optim.Adam(indexers.parameters(), lr=learning_rate, betas=(0.9, 0.95)), []
    for window in windows:
        with torch.no_grad(), record_attention(model) as found:
            model.model(window[None, :-1])
        for _ in range(draws):
            positions = torch.randperm(len(window) - 1, generator=generator)[:n_queries]
            total = 0.0
            for indexer, (attention, x, rope) in zip(indexers, found, strict=True):
                target = attention_weights(attention, x, rope, positions).mean(0)[None]
                total = total + indexer_loss(score_by_indexer(indexer)(attention, x, rope, positions), target)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.item() / len(indexers))
    return list(indexers.eval().requires_grad_(False)), losses
