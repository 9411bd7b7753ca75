"""Run any pipeline schedule on torch.distributed: one rank of it, its mailbox, and a whole step.

Generated from chapters/08_dualpipe.ipynb; edit the chapter, not this file.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_mini.schedule import Chunk, Schedule, Span, result_of, simulate, source_of
from dsv3_mini.stages import Stage, WeightGradStore, defer_weight_gradients, split_into_stages, stages_of_rank
from dsv3_mini.workers import Workers

# How do ranks talk without waiting in a circle?


class Transfer(NamedTuple):
    """A result that travels: the activations after F, or the gradient of a stage's input after B or I."""

    source: int
    target: int
    payload: Chunk


def plan_transfers(schedule: Schedule) -> list[list[list[Transfer]]]:
    """For each rank one batch of sends and receives before each op, and one after the last.

    Both ends post a transfer in the first batch whose op starts, on an ideal clock, when the payload is ready or
    later. So a rank can only wait for one that stands at an earlier time, and waiting never goes round in a circle.
    """
    folded, n_ranks = schedule.folded, len(schedule)
    spans = simulate(schedule).spans
    starts = [[span.start for span in spans if span.rank == rank] for rank in range(n_ranks)]
    ready = {(span.rank, result_of(chunk)): span.end for span in spans for chunk in span.op}
    batches = [[[] for _ in range(len(ops) + 1)] for ops in schedule]
    sources = ((source_of(chunk, s.rank, n_ranks, folded), s.rank) for s in spans for chunk in s.op)
    moves = (Transfer(source[0], rank, source[1]) for source, rank in sources if source and source[0] != rank)
    for transfer in sorted(moves, key=lambda move: (ready[move.source, move.payload], move)):
        for rank in transfer[:2]:
            batches[rank][bisect_left(starts[rank], ready[transfer.source, transfer.payload])].append(transfer)
    return batches


class Mailbox:
    """Sends and receives of one rank: what `plan_transfers` says, when it says.

    schedule, rank, group: as in `Pipeline`; buffer: makes an empty payload. A payload is kept until it is over.
    """

    def __init__(self, schedule: Schedule, rank: int, group: dist.ProcessGroup | None, buffer: Callable[[], Tensor]):
        self.rank, self.group, self.buffer, self.n_ranks = rank, group, buffer, len(schedule)
        self.folded, self.batches = schedule.folded, iter(plan_transfers(schedule)[rank])
        self.here: dict[Chunk, tuple[dist.Work | None, Tensor]] = {}
        self.results: dict[Chunk, Tensor] = {}
        self.sending: list[tuple[dist.Work, Tensor]] = []

    def post(self) -> None:
        """Start the next batch in one call, when the sends of the batch before are over."""
        self.finish()
        batch, moves = next(self.batches), []
        for source, target, payload in batch:
            call, peer = (dist.isend, target) if source == self.rank else (dist.irecv, source)
            tensor = self.results.pop(payload) if source == self.rank else self.buffer()
            tag = 4 * payload.idx + 2 * payload.direction + (payload.kind == "B")
            moves.append(dist.P2POp(call, tensor, group=self.group, tag=tag, group_peer=peer))
        works = dist.batch_isend_irecv(moves) if moves else []
        works = works if len(works) == len(moves) else works * len(moves)  # NCCL answers with one for all
        for work, move, transfer in zip(works, moves, batch, strict=True):
            if transfer.source == self.rank:
                self.sending.append((work, move.tensor))
            else:
                self.here[transfer.payload] = work, move.tensor

    def finish(self) -> None:
        """Wait until the sends are over, and let go of what was sent."""
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()

    def take(self, chunk: Chunk) -> Tensor | None:
        """The input of `chunk`, once it has come, to keep; None where a stage needs none: first, loss, and W."""
        source = source_of(chunk, self.rank, self.n_ranks, self.folded)
        if source is None or chunk.kind == "W" or (chunk.kind != "F" and source[1].kind == "F"):
            return None
        if source[0] == self.rank:  # where a folded pipeline turns
            return self.results.pop(source[1])
        work, tensor = self.here.pop(source[1])
        work.wait()
        return tensor

    def put(self, result: Chunk, tensor: Tensor) -> None:
        """Leave a result for the batch that sends it, or for the chunk on this rank that takes it."""
        like = self.buffer()
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            found, needed = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, like))
            raise ValueError(f"{result}: the stage gave {found}; {needed} is needed")
        self.results[result] = tensor.contiguous()


class StageRunner:
    """Runs the chunks of one rank on its stages and keeps what their backwards need.

    stages: by direction; windows (n_chunks, B, T + 1); second: the micro-batch at which direction 1 starts.
    """

    def __init__(self, stages: Sequence[Stage], store: WeightGradStore, windows: Tensor, second: int):
        self.stages, self.store, self.windows, self.second = stages, store, windows, second
        self.saved: dict[tuple[int, int], tuple] = {}
        self.losses: dict[int, Tensor] = {}
        self.peak_live = 0

    def run(self, chunk: Chunk, given: Tensor | None) -> Tensor | None:
        """F: hidden states in and out. B, I: gradient of the output in, of the input out. The ends give None."""
        if chunk.kind == "F":
            return self.forward(chunk, given)
        return self.store.pop(chunk[1:]) if chunk.kind == "W" else self.backward(chunk, given)

    def forward(self, chunk: Chunk, x: Tensor | None) -> Tensor | None:
        """Only the graph behind the output is kept, so the output itself is gone as soon as it is sent."""
        stage, micro_batch = self.stages[chunk.direction], chunk.direction * self.second + chunk.idx
        x = x if x is None else x.requires_grad_()
        out = stage(x, self.windows[micro_batch])
        balance = stage.balance_loss(len(self.windows[micro_batch]))
        roots = [out] if balance is None else [out, balance]
        self.saved[chunk[1:]] = x, [torch.autograd.graph.get_gradient_edge(root) for root in roots]
        self.peak_live = max(self.peak_live, len(self.saved) + len(self.store.queue))
        if stage.is_last:
            self.losses[micro_batch] = out.detach()
            return None
        if out._is_view():
            raise ValueError(f"{chunk}: the stage returned a view, which keeps its base alive; return a clone()")
        return out.detach()

    def backward(self, chunk: Chunk, grad: Tensor | None) -> Tensor | None:
        """Gradient of the stage's input and, unless put off ("I"), of its weights; the mean loss is differentiated."""
        x, edges = self.saved.pop(chunk[1:])
        like = self.losses[chunk.direction * self.second + chunk.idx] if grad is None else grad
        share = like.new_tensor(1 / len(self.windows))  # of the losses that start in this stage
        self.store.deferring = chunk.kind == "I"
        torch.autograd.backward(edges, [share if grad is None else grad, share][: len(edges)])
        if chunk.kind == "I":
            self.store.flush(chunk[1:])
        return None if x is None else x.grad


class Pipeline:
    """One rank of a pipeline, which replays its part of a schedule over one stage for each direction.

    stages: by direction, from `stages_of_rank`; their products are changed to defer weight gradients. group: the
    torch.distributed group of the schedule's ranks, None for all. pace: least seconds for a unit of the ideal clock
    (F 1, B 2, I 1, W 1); a rank that is done earlier sleeps, as if every rank had a processor of its own.
    """

    def __init__(
        self, stages: Sequence[Stage], schedule: Schedule, group: dist.ProcessGroup | None = None, pace: float = 0.0
    ):
        self.stages, self.schedule, self.group, self.pace = list(stages), schedule, group, pace
        self.rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
        if n_ranks != len(schedule):
            raise ValueError(f"the schedule is for {len(schedule)} ranks, the group has {n_ranks}")
        per_direction = [sum(chunk[:2] == ("F", d) for op in schedule[self.rank] for chunk in op) for d in (0, 1)]
        self.n_chunks = per_direction[0] if schedule.folded else sum(per_direction)
        self.second = 0 if schedule.folded else per_direction[0]
        self.store, self.parameters = WeightGradStore(), {}
        for stage in self.stages:
            defer_weight_gradients(stage, self.store)
            self.parameters |= dict(stage.named_parameters())

    def step(self, windows: Tensor) -> dict[int, Tensor]:
        """Forward and backward of all micro-batches, windows (n_chunks, B, T + 1); only first and last stage read them.

        Returns the losses that end on this rank, by micro-batch; gradients of the mean loss, and of the stages' mean
        balance losses, are added to the parameters, summed over copies. ValueError if the shapes of windows differ
        between ranks, or if a stage's output does not fit or is a view.
        """
        losses = self.replay(windows)
        sum_copies(self.parameters, self.group)
        return losses

    def replay(self, windows: Tensor) -> dict[int, Tensor]:
        """`step` without the sum over copies: each rank keeps the gradients of its own micro-batches."""
        check_windows(windows, self.n_chunks, self.group)
        example = next(iter(self.parameters.values()))
        shape = (*windows[0, :, 1:].shape, self.stages[0].hidden_size)  # (B, T, D)
        buffer = partial(torch.empty, shape, dtype=example.dtype, device=example.device)
        self.mail = Mailbox(self.schedule, self.rank, self.group, buffer)
        self.runner, self.trace = StageRunner(self.stages, self.store, windows, self.second), []
        for op in self.schedule[self.rank]:
            self.run(op)
        self.mail.post()
        self.mail.finish()
        return self.runner.losses

    def run(self, op: tuple[Chunk, ...]) -> None:
        """Post a batch, wait for what the op needs, run it and note the time. A pair runs one after the other."""
        self.mail.post()
        inputs = [self.mail.take(chunk) for chunk in op]
        started, units = time.monotonic(), sum(2 if chunk.kind == "B" else 1 for chunk in op)
        for chunk, given in zip(op, inputs, strict=True):
            if (result := self.runner.run(chunk, given)) is not None:
                self.mail.put(result_of(chunk), result)
        time.sleep(max(0.0, started + units * self.pace - time.monotonic()))
        self.trace.append(Span(self.rank, op, started, time.monotonic()))


def check_windows(windows: Tensor, n_chunks: int, group: dist.ProcessGroup | None) -> None:
    """All ranks must have windows of one shape, (n_chunks, B, T + 1); every rank hears of the first that differs."""
    shape = torch.tensor((*windows.shape, 0, 0, 0)[:3], device=windows.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group)
    shapes = [part.tolist() for part in shapes]
    for rank, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(f"windows on rank {rank} have shape {other}, on rank 0 {shapes[0]}: they must agree")
    if windows.dim() != 3 or len(windows) != n_chunks:
        raise ValueError(f"windows {tuple(windows.shape)} must be (n_chunks = {n_chunks}, B, T + 1)")


def sum_copies(parameters: dict[str, nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Add the gradients of parameters that rank r and rank n_ranks - 1 - r both hold; other ranks share none.

    With DualPipe that is all of them; with one direction, the embedding that the MTP layers use at the other end.
    """
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    names, partner = [None] * n_ranks, n_ranks - 1 - rank
    dist.all_gather_object(names, sorted(parameters), group)
    shared = [parameters[name] for name in names[rank] if name in set(names[partner])]
    if partner == rank or not shared:
        return
    mine = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in shared])
    theirs = torch.empty_like(mine)
    moves = [dist.P2POp(dist.isend, mine, group=group, group_peer=partner)]
    moves.append(dist.P2POp(dist.irecv, theirs, group=group, group_peer=partner))
    for work in dist.batch_isend_irecv(moves):
        work.wait()
    for p, grad in zip(shared, (mine + theirs).split([p.numel() for p in shared]), strict=True):
        p.grad = grad.view_as(p)


@dataclass(frozen=True)
class PipelineRun:
    """One step as it was executed: losses (n_chunks,), gradients by parameter name, ops timed in seconds, per rank
    the most micro-batches whose activations were alive at once."""

    losses: Tensor
    gradients: dict[str, Tensor]
    spans: list[Span]
    peak_live: list[int]


def run_rank(stages: list[Stage], schedule: Schedule, windows: Tensor, pace: float) -> tuple:
    """What each process does for `run_schedule`."""
    pipeline = Pipeline(stages, schedule, pace=pace)
    losses = pipeline.step(windows)
    gradients = {name: p.grad for name, p in pipeline.parameters.items()}
    return losses, gradients, pipeline.trace, pipeline.runner.peak_live


def run_schedule(
    model: nn.Module,
    windows: Tensor,
    schedule: Schedule,
    workers: Workers,
    mtp_weight: float = 0.3,
    pace: float = 0.0,
    alpha: float = 0.0,
) -> PipelineRun:
    """One training step of `model` on the processes of `workers`, which get copies; windows (n_chunks, B, T + 1).

    Only the ranks that hold a first or last stage receive the tokens. `model` itself is left as it is.
    """
    n_ranks = len(schedule)
    stages = split_into_stages(model, n_ranks * (2 if schedule.folded else 1), mtp_weight, alpha)
    mine = [stages_of_rank(stages, schedule, rank) for rank in range(n_ranks)]
    reads = [any(stage.is_first or stage.is_last for stage in pair) for pair in mine]
    tokens = [windows if read else torch.zeros_like(windows) for read in reads]
    arguments = [(pair, schedule, text, pace) for pair, text in zip(mine, tokens, strict=True)]
    results = workers.run(run_rank, arguments)
    losses = {k: loss for part in results for k, loss in part[0].items()}
    spans = [span for part in results for span in part[2]]
    begin = min(span.start for span in spans)
    return PipelineRun(
        losses=torch.stack([losses[k] for k in range(len(windows))]),
        gradients={name: grad for part in results for name, grad in part[1].items()},
        spans=[span._replace(start=span.start - begin, end=span.end - begin) for span in spans],
        peak_live=[part[3] for part in results],
    )
