"""DeepSeekMoE: many small experts, a gate that chooses few of them, and a dispatch that wastes nothing.

Generated from chapters/04_expert_routing.ipynb; edit the chapter, not this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import SwiGLU

# How does a token choose?


class Routing(NamedTuple):
    """What the gate decided for N tokens."""

    indices: Tensor  # (N, K) chosen experts
    weights: Tensor  # (N, K) g_{i,t}, the routed scaling factor included
    scores: Tensor  # (N, E) affinities s_{i,t} before bias and choice


def group_limited_topk(scores: Tensor, top_k: int, n_group: int, topk_group: int, top_two: bool = True) -> Tensor:
    """The K best experts of the `topk_group` best groups: (N, E) -> (N, K).

    A group is worth the sum of its two best experts, or its best one (`top_two=False`, DeepSeek-V2).
    """
    if n_group > 1:
        grouped = scores.unflatten(-1, (n_group, -1))  # (N, G, E/G)
        worth = grouped.topk(2, dim=-1).values.sum(-1) if top_two else grouped.amax(-1)  # (N, G)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(topk_group).indices, True)
        scores = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    return scores.topk(top_k).indices


class Gate(nn.Module):
    """Choose K experts a token by sigmoid affinity plus bias; weigh them by affinity alone (equations 13-16).

    forward: (N, D) -> Routing. Runs in float32 whatever the model's dtype: near-ties must not flip.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        c = self.config
        scores = self.affinities(x)
        bias = getattr(self, "e_score_correction_bias", None)
        choice = scores.detach() if bias is None else scores.detach() + bias
        n_group = 1 if c.topk_method == "greedy" else c.n_group
        indices = group_limited_topk(choice, c.num_experts_per_tok, n_group, c.topk_group, top_two=bias is not None)
        weights = scores.gather(1, indices)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(indices, (weights * c.routed_scaling_factor).type_as(x), scores)

    def affinities(self, x: Tensor) -> Tensor:
        """s_{i,t}: (N, D) -> (N, E), float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)

    def _apply(self, fn, recurse=True):
        """Move with the model, but keep the bias in float32 as the checkpoint does: 0.001 steps vanish in bfloat16."""
        super()._apply(fn, recurse)
        if (bias := getattr(self, "e_score_correction_bias", None)) is not None and bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.float()
        return self


# What does the layer compute?


def experts_reference(x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Sum of each token's chosen experts, one expert after the other.

    x: (N, D); gate_up_proj: (E, 2F, D); down_proj: (E, D, F) -> (N, D).
    """
    out = torch.zeros_like(x)
    for i in range(gate_up_proj.shape[0]):
        token, slot = (routing.indices == i).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up_proj[i]).chunk(2, dim=-1)
        out = out.index_add(0, token, F.linear(F.silu(gate) * up, down_proj[i]) * routing.weights[token, slot, None])
    return out


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row block i of x (it ends before ends[i]) times weight[i]^T: (M, in), (E, out, in), (E,) -> (M, out)."""
    if x.dtype == torch.float64:  # torch's grouped_mm has no float64; gradient checks need it
        starts = [0, *ends[:-1].tolist()]
        return torch.cat([x[a:b] @ w.T for a, b, w in zip(starts, ends.tolist(), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2).to(x.dtype), offs=ends)


class Experts(nn.Module):
    """E SwiGLU experts whose weights are stacked: gate_up_proj (E, 2F, D), down_proj (E, D, F).

    forward: (N, D) and its Routing -> (N, D). Tokens are sorted by expert, so that each expert is one matrix product.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        top_k = routing.indices.shape[1]
        expert, order = routing.indices.flatten().sort(stable=True)  # (N*K,)
        token = order // top_k
        ends = torch.searchsorted(expert, torch.arange(len(self.down_proj), device=x.device), right=True).int()
        gate, up = grouped_linear(x[token], self.gate_up_proj, ends).chunk(2, dim=-1)
        y = grouped_linear(F.silu(gate) * up, self.down_proj, ends)  # (N*K, D)
        y = y * routing.weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, y.type_as(x))


# How does it all come together?


class MoE(nn.Module):
    """DeepSeekMoE (equation 12 without the residual): shared experts for all tokens, K routed ones for each."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate, self.experts = Gate(config), Experts(config)
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, D)
        y = self.experts(tokens, self.gate(tokens)).view_as(x)
        return y + self.shared_experts(x) if hasattr(self, "shared_experts") else y


def moe_feed_forward(config: ModelConfig, layer_idx: int) -> nn.Module:
    """Dense in the first layers, a mixture of experts after them: for `LanguageModel(feed_forward=...)`."""
    return MoE(config) if config.is_moe(layer_idx) else SwiGLU(config.hidden_size, config.intermediate_size)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect each gate's Routing, in the order of the layers, for the forward passes inside the `with`.

    Close it before `backward`: a recomputed forward would be recorded, and counted, twice.
    """
    records: list[Routing] = []
    hooks = [
        module.register_forward_hook(lambda gate, inputs, routing: records.append(routing))
        for module in model.modules()
        if isinstance(module, Gate)
    ]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()
