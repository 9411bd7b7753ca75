"""Balancing the experts: the auxiliary loss, a bias that only steers the choice, and the loss for single sequences.

Generated from chapters/05_load_balance.ipynb; edit the chapter, not this file.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.moe import Gate, Routing

# What happens if nobody balances?


def expert_load(indices: Tensor, n_experts: int) -> Tensor:
    """How many of the N*K choices fell on each expert: (N, K) -> (E,) int64."""
    load = torch.bincount(indices.flatten(), minlength=n_experts)
    if len(load) != n_experts:
        raise ValueError(f"expert {len(load) - 1} was chosen, but n_experts={n_experts}")
    return load


def max_violation(load: Tensor) -> float:
    """MaxVio = (largest load - mean load) / mean load of (E,) counts: 0 when balanced, E/K - 1 at the worst."""
    if not (total := load.sum().item()):
        raise ValueError("MaxVio of a load that counts no choice")
    return load.max().item() * len(load) / total - 1


# What does an auxiliary loss do to the gradient?


def auxiliary_loss(routing: Routing) -> Tensor:
    """The classic balance loss over all N tokens at once, without alpha: sum_i f_i P_i, which is 1 at perfect balance.

    f_i is the share of the choices that fell on expert i, times E; P_i the mean affinity, normalised to sum one over
    the experts of a token. Only P carries a gradient. For V3's sigmoid gate or V2's softmax gate alike.
    """
    n_experts = routing.scores.shape[1]
    load = expert_load(routing.indices, n_experts).type_as(routing.scores)
    f = load * (n_experts / routing.indices.numel())  # (E,)
    p = F.normalize(routing.scores, p=1, dim=-1).mean(0)  # (E,)
    return (f * p).sum()


# Can the choice be corrected without a gradient?


def update_bias(bias: Tensor, load: Tensor, gamma: float, zero_mean: bool = False) -> None:
    """Auxiliary-loss-free balancing, in place: overloaded experts lose gamma, underloaded ones gain it (section 2.1.2).

    bias: (E,); load: (E,) counts of one whole step. `zero_mean` takes the mean off the step, as torchtitan does, so
    that the biases cannot drift together; it changes no choice. Signs are exact: counts are compared as integers.
    """
    if bias.shape != load.shape:
        raise ValueError(f"a bias of shape {tuple(bias.shape)} and a load of shape {tuple(load.shape)}")
    step = gamma * (load.sum() - len(load) * load).sign()
    bias += step - step.mean() if zero_mean else step


# What must be counted, and when?


class BiasBalancer:
    """Counts the load of every gate over the micro-batches of a step, then moves each bias once.

    gamma: 0.001 in V3, for hundreds of thousands of steps; about 0.01 in runs of a few hundred. 0 only counts.
    group: the processes that share a batch (all data-parallel ranks); their counts are added before the sign is taken.
    """

    def __init__(self, model: nn.Module, gamma: float = 0.001, group: dist.ProcessGroup | None = None):
        if not gamma >= 0:
            raise ValueError(f"gamma={gamma} must be 0 or more: overloaded experts lose it, underloaded ones gain it")
        self.gates = [module for module in model.modules() if isinstance(module, Gate)]
        if gamma and not all(hasattr(gate, "e_score_correction_bias") for gate in self.gates):
            raise ValueError(f"gamma={gamma} needs gates with a bias: topk_method='noaux_tc'; without it, gamma=0")
        self.gamma, self.group, self.loads = gamma, group, None

    def observe(self, routings: Sequence[Routing]) -> None:
        """Add the choices of one forward pass; `routings` as `record_routing` collected them."""
        if len(routings) != len(self.gates):
            raise ValueError(f"{len(routings)} routings for {len(self.gates)} gates: record one forward pass at a time")
        new = [expert_load(r.indices, r.scores.shape[1]) for r in routings]
        self.loads = new if self.loads is None else [a + b for a, b in zip(self.loads, new, strict=True)]

    def step(self) -> list[float]:
        """After the optimiser's step: move the biases, forget the counts; return each layer's MaxVio."""
        if self.loads is None and self.gates:
            raise ValueError("no forward pass was observed since the last step")
        loads, self.loads = self.loads or [], None
        if self.group is not None and loads:
            total = torch.cat(loads)  # one message for all layers
            dist.all_reduce(total, group=self.group)
            loads = total.split([len(load) for load in loads])
        for gate, load in zip(self.gates, loads, strict=True):
            if self.gamma:
                update_bias(gate.e_score_correction_bias, load, self.gamma)
        return [max_violation(load) for load in loads]


# Must every sequence be balanced?


def sequence_balance_loss_reference(scores: Tensor, top_k: int, n_sequences: int) -> Tensor:
    """Equations 17 to 20 as printed, without alpha: one sequence, one expert, one token after the other, then the mean.

    scores: (N, E) sigmoid affinities of `n_sequences` sequences of equal length, one after the other.
    """
    losses = []
    for sequence in scores.chunk(n_sequences):  # (T, E)
        n_tokens, n_experts = sequence.shape
        loss = 0.0
        for i in range(n_experts):
            chosen = sum(int(i in s.topk(top_k).indices) for s in sequence)
            f = n_experts / (top_k * n_tokens) * chosen  # equation 18
            p = sum(s[i] / s.sum() for s in sequence) / n_tokens  # equations 19 and 20
            loss = loss + f * p
        losses.append(loss)
    return torch.stack(losses).mean()


def sequence_balance_loss(scores: Tensor, top_k: int, n_sequences: int) -> Tensor:
    """The complementary sequence-wise loss, mean over sequences, without alpha (equations 17-20).

    scores: (N, E) sigmoid affinities of `n_sequences` sequences of equal length, one after the other. As printed in
    the report, the top K are counted on the affinities themselves: no bias, no groups. Only P carries a gradient.
    """
    if n_sequences < 1 or len(scores) % n_sequences:
        raise ValueError(f"{len(scores)} tokens do not make n_sequences={n_sequences} sequences of equal length")
    if not 0 < top_k <= scores.shape[1]:
        raise ValueError(f"top_k={top_k} of {scores.shape[1]} experts")
    scores = scores.unflatten(0, (n_sequences, -1))  # (B, T, E)
    n_tokens, n_experts = scores.shape[1:]
    chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(top_k).indices, 1.0)
    f = chosen.sum(1) * n_experts / (top_k * n_tokens)  # (B, E)
    p = F.normalize(scores, p=1, dim=-1).mean(1)  # (B, E)
    return (f * p).sum(-1).mean()


# What do the runs say?


def specialisation(load: Tensor) -> float:
    """Mutual information, in nats, between expert and domain in (E, domains) counts of choices.

    0 when every domain uses the experts alike, log(domains) when equal domains share no expert.
    """
    if load.dim() != 2 or not load.sum():
        raise ValueError(
            f"specialisation needs (E, domains) counts of some choices, not {load.sum()} in {tuple(load.shape)}"
        )
    joint = load.double() / load.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)  # the table of experts that know nothing
    return torch.special.xlogy(joint, joint / apart.clamp(min=1e-30)).sum().item()
