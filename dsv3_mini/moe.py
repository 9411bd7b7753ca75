"""DeepSeekMoE: many small experts, a gate that chooses few of them, and a dispatch that wastes nothing.

Generated from chapters/04_expert_routing.ipynb; edit the chapter, not this file.
"""

from collections.abc import Callable, Iterator
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


# Why may a token visit only four groups?


def group_limited_topk(scores: Tensor, top_k: int, n_group: int, topk_group: int, top_two: bool = True) -> Tensor:
    """The K best experts of the `topk_group` best groups, best first: (N, E) -> (N, K).

    A group is worth the sum of its two best experts, or its best one (`top_two=False`, DeepSeek-V2). Raises ValueError
    where the groups are uneven or the kept ones hold fewer than K experts.
    """
    n_experts, group_size = scores.shape[-1], scores.shape[-1] // n_group
    unfit = n_experts % n_group or group_size < 1 + top_two or topk_group > n_group or top_k > topk_group * group_size
    if top_k > n_experts or n_group > 1 and unfit:
        raise ValueError(f"{top_k=} of {n_experts} experts does not fit {topk_group=} of {n_group=}")
    if n_group > 1:
        grouped = scores.unflatten(-1, (n_group, -1))  # (N, G, E/G)
        worth = grouped.topk(2, dim=-1).values.sum(-1) if top_two else grouped.amax(-1)  # (N, G)
        kept_mask = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(topk_group).indices, True)
        scores = grouped.masked_fill(~kept_mask.unsqueeze(-1), float("-inf")).flatten(-2)
    return scores.topk(top_k).indices


# Who may change the choice, and who the weight?


class Gate(nn.Module):
    """Choose K experts a token by affinity plus bias; weigh them by affinity alone (equations 13-16).

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
        exact = getattr(self, "e_score_correction_bias", None)
        super()._apply(fn, recurse)
        if exact is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self


# What does the layer compute, and how fast?


def experts_reference(x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Sum of each token's chosen experts, one expert after the other (the sum of equation 12).

    x: (N, D); gate_up_proj: (E, 2F, D); down_proj: (E, D, F) -> (N, D).
    """
    out = torch.zeros_like(x)
    for i, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        token, slot = (routing.indices == i).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down) * routing.weights[token, slot, None]
        out.index_add_(0, token, y.type_as(out))
    return out


def sort_by_expert(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """The order that brings each expert's rows together, and where its block ends: (N, K) -> (N*K,), (E,) int32.

    Row r of the sorted rows is choice order[r] % K of token order[r] // K. An expert without tokens has an empty block.
    """
    expert, order = indices.flatten().sort(stable=True)
    return order, torch.bincount(expert, minlength=n_experts).cumsum(0, dtype=torch.int32)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of x runs: autocast's where it is on, but for float64."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row block i of x (it ends before ends[i]) times weight[i]^T: (M, in), (E, out, in), (E,) -> (M, out).

    Obeys autocast as F.linear does. What torch's grouped_mm does not take, float64 or widths that are no multiple of
    16 bytes, is multiplied block by block.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight = x.to(product_dtype(x)), weight.to(product_dtype(x))
    if x.dtype == torch.float64 or any(width * x.element_size() % 16 for width in weight.shape[1:]):
        starts = [0, *ends[:-1].tolist()]
        return torch.cat([x[a:b] @ w.T for a, b, w in zip(starts, ends.tolist(), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def pad_blocks(order: Tensor, ends: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fill each block of `sort_by_expert` up to a multiple: (choice in each row, row of each choice, new ends).

    order: (N*K,), ends: (E,) -> (M,), (N*K,), (E,) with M >= N*K. Rows that fill up repeat choice 0.
    """
    sizes = ends.diff(prepend=ends.new_zeros(1))
    longer = (sizes + multiple - 1) // multiple * multiple
    new_ends = longer.cumsum(0, dtype=torch.int32)
    moved = (new_ends - longer) - (ends - sizes)  # how far each block moves
    rows = torch.arange(len(order), device=order.device)
    if multiple > 1:
        rows = rows + moved.repeat_interleave(sizes, output_size=len(order))
    choice = order.new_zeros(int(new_ends[-1]) if multiple > 1 else len(order))
    choice[rows] = order
    return choice, torch.empty_like(order).scatter_(0, order, rows), new_ends


class Experts(nn.Module):
    """E SwiGLU experts whose weights are stacked: gate_up_proj (E, 2F, D), down_proj (E, D, F).

    forward: (N, D) and its Routing -> (N, D). Tokens are sorted by expert, so that each expert is one matrix product,
    by `product`, which takes the arguments of `grouped_linear`; a handful of tokens on a CPU go by `visit_experts`. A
    subclass may compute the sorted rows in another way.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x: Tensor, routing: Routing, product: Callable = grouped_linear) -> Tensor:
        indices, n_experts = routing.indices, len(self.down_proj)
        if x.is_cpu and product is grouped_linear and 0 < 4 * indices.numel() <= n_experts:
            return visit_experts(x, routing, self.gate_up_proj, self.down_proj)
        x = x.to(product_dtype(x))
        multiple = 32 if product is grouped_linear and x.is_cpu and x.dtype == torch.bfloat16 else 1
        choice, row, ends = pad_blocks(*sort_by_expert(indices, n_experts), multiple)
        rows = x.index_select(0, choice // indices.shape[1])  # (M, D), M >= N*K
        y = self.feed_forward(rows, routing.weights.flatten()[choice, None], ends, product)  # (M, D)
        return F.embedding_bag(row.view_as(indices), y, mode="sum")

    def feed_forward(self, rows: Tensor, weights: Tensor, ends: Tensor, product: Callable) -> Tensor:
        gate, up = product(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        return product(F.silu(gate) * up * weights, self.down_proj, ends)


def visit_experts(x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """`experts_reference` token by token, reading the chosen experts only: for a handful of tokens on a CPU."""
    out = []
    for row, chosen, weights in zip(x, routing.indices.tolist(), routing.weights.unsqueeze(-1), strict=True):
        gate, up = torch.stack([gate_up_proj[i] @ row for i in chosen]).chunk(2, dim=-1)  # (K, F) each
        h = F.silu(gate) * up * weights
        out.append(torch.stack([down_proj[i] @ h[k] for k, i in enumerate(chosen)]).sum(0))
    return torch.stack(out)


# How does it all come together?


class MoE(nn.Module):
    """DeepSeekMoE (equation 12 without the residual): shared experts for all tokens, K routed ones for each.

    forward: (..., D) -> (..., D).
    """

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
