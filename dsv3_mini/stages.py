"""A model cut into pipeline stages, and weight gradients that can be computed later.

Generated from chapters/08_dualpipe.ipynb; edit the chapter, not this file.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.balance import sequence_balance_loss
from dsv3_mini.layers import rope_table
from dsv3_mini.moe import Experts, Routing, grouped_linear, record_routing
from dsv3_mini.mtp import mtp_losses
from dsv3_mini.schedule import Schedule

# How is a model cut and a gradient put off?


class Stage(nn.Module):
    """Consecutive blocks of a model, its parameters under their names in the whole model.

    The first stage embeds, the last ends in the loss. forward: hidden states (B, T, D), None for the first stage,
    and the windows (B, T + 1), which first and last stage read -> hidden states, or the loss in nats a token.
    alpha: factor of the balance loss of its own gates, which a forward leaves behind for `balance_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: range,
        is_first: bool,
        is_last: bool,
        mtp_weight: float = 0.3,
        alpha: float = 0.0,
    ):
        super().__init__()
        whole, mtp = model.model, getattr(model, "mtp_layers", []) if is_last and mtp_weight else []
        self.is_first, self.is_last, self.mtp_weight, self.alpha = is_first, is_last, mtp_weight, alpha
        self.routings: list[Routing] = []
        self.frequencies, self.rope_amplitude = whole.frequencies, whole.rope_amplitude
        self.layer_idx, self.hidden_size = layers, model.config.hidden_size
        self.mtp_idx = range(whole.n_layers, whole.n_layers + len(mtp))
        self.model = nn.Module()
        if is_first or mtp:  # the MTP layers embed with the first stage's matrix
            self.model.embed_tokens = whole.embed_tokens
        self.model.layers = nn.ModuleDict({str(i): whole.layers[i] for i in (*layers, *self.mtp_idx)})
        if is_last:
            self.model.norm, self.lm_head = whole.norm, model.lm_head

    def forward(self, x: Tensor | None, windows: Tensor | None) -> Tensor:
        with record_routing(self) as self.routings:
            h = self.blocks(x, windows)
            return self.loss(self.model.norm(h), windows) if self.is_last else h

    def blocks(self, x: Tensor | None, windows: Tensor | None) -> Tensor:
        """Hidden states (B, T, D) behind its last block, before the norm."""
        x = self.model.embed_tokens(windows[:, :-1]) if self.is_first else x  # (B, T, D)
        rope = self.rope(0, x.shape[1])
        for i in self.layer_idx:
            x = self.model.layers[str(i)](x, rope)
        return x

    def loss(self, h: Tensor, windows: Tensor) -> Tensor:
        """Next-token loss plus mtp_weight times the mean loss of the MTP layers; h (B, T, D) after the norm."""
        loss = F.cross_entropy(self.lm_head(h).flatten(0, 1), windows[:, 1:].flatten())
        if mtp := mtp_losses([self.model.layers[str(i)] for i in self.mtp_idx], h, windows, self.rope):
            loss = loss + self.mtp_weight * torch.stack(mtp).mean()
        return loss

    def balance_loss(self, n_sequences: int) -> Tensor | None:
        """alpha times the sequence-wise loss of the forward just done, summed over its gates; None if there is none."""
        routings, self.routings = self.routings, []
        if not (routings and self.alpha):
            return None
        losses = [sequence_balance_loss(r.scores, r.indices.shape[1], n_sequences) for r in routings]
        return self.alpha * torch.stack(losses).sum()

    def rope(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        device = next(self.parameters()).device
        positions = torch.arange(start, start + length, device=device)
        return rope_table(positions, self.frequencies.to(device), self.rope_amplitude)


def split_into_stages(
    model: nn.Module, n_stages: int, mtp_weight: float = 0.3, alpha: float = 0.0, kind: type[Stage] = Stage
) -> list[Stage]:
    """Cut a DeepSeekV3 or LanguageModel into stages of as equal depth as can be; early ones take what is left over.

    The stages, of class `kind`, share the model's parameters. ValueError if there are fewer layers than stages.
    """
    n_layers = model.model.n_layers
    if not 1 <= n_stages <= n_layers:
        raise ValueError(f"n_stages={n_stages} must lie in 1..{n_layers}, the number of layers")
    ends = [sum(n_layers // n_stages + (s < n_layers % n_stages) for s in range(k)) for k in range(n_stages + 1)]
    return [
        kind(model, range(ends[s], ends[s + 1]), s == 0, s == n_stages - 1, mtp_weight, alpha) for s in range(n_stages)
    ]


class WeightGradStore:
    """Weight gradients put off: closures gather while `deferring`, flush() closes a chunk, pop() runs the oldest."""

    def __init__(self):
        self.deferring, self.pending, self.queue = False, [], deque()

    def put(self, compute: Callable[[], None]) -> None:
        """Keep `compute` for later, or run it now."""
        if self.deferring:
            self.pending.append(compute)
        else:
            compute()

    def flush(self, chunk: tuple[int, int]) -> None:
        """Everything put since the last flush belongs to this (direction, micro-batch)."""
        self.queue.append((chunk, self.pending))
        self.pending = []

    def pop(self, chunk: tuple[int, int]) -> None:
        """Compute the weight gradients of the oldest chunk, which must be this one."""
        if not self.queue or self.queue[0][0] != chunk:
            raise ValueError(f"W of {chunk} is due, but the oldest stored are {[key for key, _ in self.queue][:3]}")
        for compute in self.queue.popleft()[1]:
            compute()


class DeferredProduct(torch.autograd.Function):
    """function(x, weight), linear in both, whose backward gives x's gradient and leaves the weight's to a store."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, function: Callable, store: WeightGradStore) -> Tensor:
        with torch.enable_grad():
            ctx.x, ctx.w = x.detach().requires_grad_(), weight.detach().requires_grad_()
            ctx.y = function(ctx.x, ctx.w)
        ctx.weight, ctx.store = weight, store
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (grad_x,) = torch.autograd.grad(ctx.y, ctx.x, grad, retain_graph=True)
        y, w, weight = ctx.y, ctx.w, ctx.weight

        def add_weight_gradient():
            (grad_w,) = torch.autograd.grad(y, w, grad)
            weight.grad = grad_w if weight.grad is None else weight.grad.add_(grad_w)

        ctx.store.put(add_weight_gradient)
        ctx.x = ctx.y = ctx.w = None
        return grad_x, None, None, None


def defer_weight_gradients(module: nn.Module, store: WeightGradStore) -> None:
    """From now on the products of `module` leave their weight gradients to `store`: linear layers and experts.

    Norm gains, embeddings and the gate's small matrix get theirs in the ordinary backward. ValueError for a layer that
    multiplies in its own way, as chapter 07's do: deferring would replace its arithmetic.
    """
    for name, part in module.named_modules():
        if any(isinstance(part, base) and type(part) is not base for base in (nn.Linear, Experts)):
            raise ValueError(f"{name} is {type(part).__name__}; a pipeline defers the products of plain layers only")
        if isinstance(part, nn.Linear) and part.bias is None:
            part.forward = partial(linear_deferred, part, store)
        elif isinstance(part, Experts):
            part.forward = partial(experts_deferred, part, store)


def linear_deferred(linear: nn.Linear, store: WeightGradStore, x: Tensor) -> Tensor:
    """`nn.Linear.forward` with its product deferred."""
    return DeferredProduct.apply(x, linear.weight, F.linear, store)


def experts_deferred(experts: Experts, store: WeightGradStore, x: Tensor, routing: Routing) -> Tensor:
    """`Experts.forward` with both grouped products deferred."""

    def product(rows: Tensor, weight: nn.Parameter, ends: Tensor) -> Tensor:
        return DeferredProduct.apply(rows, weight, partial(grouped_linear, ends=ends), store)

    return Experts.forward(experts, x, routing, product)


def stages_of_rank(stages: Sequence[Stage], schedule: Schedule, rank: int) -> list[Stage]:
    """The stages that a rank holds, by direction: `rank` for direction 0, counted from the end for direction 1."""
    n_ranks = len(schedule)
    if len(stages) != (n_stages := n_ranks * (2 if schedule.folded else 1)):
        raise ValueError(f"{len(stages)} stages, but the schedule runs {n_stages} on {n_ranks} ranks")
    two_ways = any(chunk.direction for op in schedule[rank] for chunk in op)
    return [stages[rank], stages[-1 - rank]] if two_ways else [stages[rank]]
