"""Draft of balance.py."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.moe import Gate, Routing


def expert_load(indices: Tensor, n_experts: int) -> Tensor:
    """How many of the N*K choices fell on each expert: (N, K) -> (E,) int64."""
    return torch.bincount(indices.flatten(), minlength=n_experts)


def max_violation(load: Tensor) -> float:
    """MaxVio = (largest load - mean load) / mean load; 0 is perfect balance."""
    mean = load.float().mean()
    return float((load.max() - mean) / mean)


def auxiliary_loss(routing: Routing) -> Tensor:
    """The classic balance loss over all N tokens at once: sum_i f_i P_i, which is 1 at perfect balance.

    f_i is the share of choices that fell on expert i times E, P_i the mean normalised affinity. Multiply by alpha.
    """
    n_experts = routing.scores.shape[1]
    f = expert_load(routing.indices, n_experts) * (n_experts / routing.indices.numel())
    p = F.normalize(routing.scores, p=1, dim=-1).mean(0)
    return (f * p).sum()


def sequence_balance_loss(scores: Tensor, top_k: int, n_sequences: int) -> Tensor:
    """The complementary sequence-wise loss, mean over sequences, without alpha (equations 17-20).

    scores: (N, E) sigmoid affinities of `n_sequences` sequences of equal length, one after the other. As printed in
    the report, the top K are counted on the affinities themselves: no bias, no groups.
    """
    scores = scores.unflatten(0, (n_sequences, -1))  # (B, T, E)
    n_tokens, n_experts = scores.shape[1:]
    chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(top_k).indices, 1.0)
    f = chosen.sum(1) * n_experts / (top_k * n_tokens)  # (B, E)
    p = F.normalize(scores, p=1, dim=-1).mean(1)  # (B, E)
    return (f * p).sum(-1).mean()


def update_bias(bias: Tensor, load: Tensor, gamma: float) -> None:
    """Auxiliary-loss-free balancing, in place: overloaded experts lose gamma, underloaded ones gain it."""
    violation = load.float().mean() - load.float()
    bias += gamma * violation.sign()


class BiasBalancer:
    """Counts every gate's load over the micro-batches of a step, then moves its bias once."""

    def __init__(self, model: nn.Module, gamma: float = 0.001):
        self.gates = [m for m in model.modules() if isinstance(m, Gate) and hasattr(m, "e_score_correction_bias")]
        self.gamma, self.loads = gamma, None

    def observe(self, routings: Sequence[Routing]) -> None:
        """Add the choices of one forward pass; `routings` as `record_routing` collected them."""
        if len(routings) != len(self.gates):
            raise ValueError(f"{len(routings)} routings for {len(self.gates)} gates: record one forward pass at a time")
        new = [expert_load(r.indices, r.scores.shape[1]) for r in routings]
        self.loads = new if self.loads is None else [a + b for a, b in zip(self.loads, new, strict=True)]

    def step(self) -> list[float]:
        """Move the biases, forget the counts; return each layer's MaxVio."""
        loads, self.loads = self.loads or [], None
        for gate, load in zip(self.gates, loads, strict=False):
            update_bias(gate.e_score_correction_bias, load, self.gamma)
        return [max_violation(load) for load in loads]
