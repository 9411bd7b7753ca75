"""Pipeline schedules as plain data: GPipe, 1F1B, zero bubble, DualPipe and DualPipeV, timed by a simulator and drawn.

Generated from chapters/08_dualpipe.ipynb; edit the chapter, not this file.
"""

from collections import Counter, deque
from itertools import chain
from typing import NamedTuple

# Why does a pipeline idle?


class Chunk(NamedTuple):
    """One rank's work on one micro-batch.

    kind: "F" forward, "B" full backward, "I" the part of B that gives the input's gradient, "W" the part that gives
    the weights' gradients. direction: 0 enters at rank 0, 1 at the last rank. idx: micro-batch of that direction.
    """

    kind: str
    direction: int
    idx: int


class Schedule(list):
    """For each rank its ops in order; an op is a tuple of one Chunk or, overlapped, of two (forward first).

    folded: direction 1 is the second half of the way of direction 0's micro-batches, which turn at the last rank.
    """

    def __init__(self, ranks, folded: bool = False):
        super().__init__(ranks)
        self.folded = folded


class OpWriter:
    """Writes one rank's ops: each chunk takes the next micro-batch of its kind, W the oldest whose I has run."""

    def __init__(self):
        self.ops, self.counts, self.deferred = [], Counter(), deque()

    def add(self, *names: str, times: int = 1) -> None:
        """Append `times` ops: "F0" is one forward of direction 0; two names are one overlapped op; "W" has none."""
        for _ in range(times):
            self.ops.append(tuple(self.chunk(name) for name in names))

    def chunk(self, name: str) -> Chunk:
        if name == "W":
            return Chunk("W", *self.deferred.popleft())
        kind, direction = name[0], int(name[1])
        counter = ("F" if kind == "F" else "B", direction)
        idx = self.counts[counter]
        self.counts[counter] += 1
        if kind == "I":
            self.deferred.append((direction, idx))
        return Chunk(kind, direction, idx)


def gpipe_schedule(n_ranks: int, n_chunks: int) -> Schedule:
    """All forwards, then all backwards (GPipe)."""
    check_counts(n_ranks, n_chunks)
    ranks = [OpWriter() for _ in range(n_ranks)]
    for rank in ranks:
        rank.add("F0", times=n_chunks)
        rank.add("B0", times=n_chunks)
    return Schedule(rank.ops for rank in ranks)


def check_counts(n_ranks: int, n_chunks: int, least: int = 1) -> None:
    """Refuse counts for which there is no schedule."""
    if n_ranks < 1 or n_chunks < least:
        raise ValueError(f"n_ranks={n_ranks} must be 1 or more, n_chunks={n_chunks} must be {least} or more")


def source_of(chunk: Chunk, rank: int, n_ranks: int, folded: bool) -> tuple[int, Chunk] | None:
    """The rank and the chunk whose result `chunk` waits for on `rank`; None for a first forward.

    A gradient for the input is named "B" whether a full backward or an "I" gives it.
    """
    kind, direction, idx = chunk
    first, last, step = (0, n_ranks - 1, 1) if direction == 0 else (n_ranks - 1, 0, -1)
    if kind == "F" and rank != first:
        return rank - step, chunk
    if kind == "F":
        return (rank, Chunk("F", 0, idx)) if folded and direction == 1 else None
    if kind == "W":
        return rank, Chunk("B", direction, idx)
    if rank != last:
        return rank + step, Chunk("B", direction, idx)
    return rank, Chunk("B", 1, idx) if folded and direction == 0 else Chunk("F", direction, idx)


class Span(NamedTuple):
    """An op with its start and end, in units of time or in seconds."""

    rank: int
    op: tuple[Chunk, ...]
    start: float
    end: float


class Simulation(NamedTuple):
    """What a schedule costs: every op's Span, the end of the last, and per rank the idle time and the peak memory.

    peak_activations: the most micro-batches whose activations a rank keeps at once, from F to the end of B or W.
    """

    spans: list[Span]
    makespan: float
    idle: list[float]
    peak_activations: list[int]


def arrival_time(op, rank: int, n_ranks: int, folded: bool, done: dict, latency: float) -> float | None:
    """When all inputs of `op` are at `rank`; None if one has not been computed yet."""
    sources = [source for chunk in op if (source := source_of(chunk, rank, n_ranks, folded))]
    if not done.keys() >= set(sources):
        return None
    return max((done[source] + latency * (source[0] != rank) for source in sources), default=0.0)


def result_of(chunk: Chunk) -> Chunk:
    """What the chunk's end makes available: I, like B, the gradient for the input."""
    return chunk._replace(kind="B") if chunk.kind == "I" else chunk


def simulate(
    schedule: Schedule, F: float = 1, B: float = 2, W: float = 1, overlapped: float | None = None, latency: float = 0
) -> Simulation:
    """Run the clock over a schedule: an op starts when its rank is free and its inputs have arrived.

    F, B, W: durations of forward, full backward and its weight part ("I" takes B - W). overlapped: of a pair, F + B
    unless given. latency: added between ranks. Raises ValueError, naming the waiting ops, if no rank can go on.
    """
    lengths = {"F": F, "B": B, "I": B - W, "W": W, "FB": F + B if overlapped is None else overlapped}
    check_clock(schedule, lengths, latency)
    folded, n_ranks = getattr(schedule, "folded", False), len(schedule)
    done: dict[tuple[int, Chunk], float] = {}
    free, spans, todo = [0.0] * n_ranks, [], [deque(ops) for ops in schedule]
    while any(todo):
        before = len(spans)
        for rank, ops in enumerate(todo):
            while ops and (arrival := arrival_time(ops[0], rank, n_ranks, folded, done, latency)) is not None:
                op, start = ops.popleft(), max(free[rank], arrival)
                free[rank] = start + lengths["".join(chunk.kind for chunk in op)]
                done |= {(rank, result_of(chunk)): free[rank] for chunk in op}
                spans.append(Span(rank, op, start, free[rank]))
        if len(spans) == before:
            waiting = ", ".join(f"rank {rank} for the inputs of {ops[0]}" for rank, ops in enumerate(todo) if ops)
            raise ValueError(f"the schedule is stuck, all wait: {waiting}")
    busy = [sum(span.end - span.start for span in spans if span.rank == rank) for rank in range(n_ranks)]
    return Simulation(spans, max(free), [max(free) - time for time in busy], [peak_live(ops) for ops in schedule])


def check_clock(schedule: Schedule, lengths: dict[str, float], latency: float) -> None:
    """Refuse an op that has no duration, and a duration that is none."""
    if not all(0 <= time < float("inf") for time in (*lengths.values(), latency)):
        raise ValueError(f"durations must be finite and not negative: {lengths}, {latency=}")
    for rank, op in ((rank, op) for rank, ops in enumerate(schedule) for op in ops):
        if "".join(chunk.kind for chunk in op) not in lengths:
            raise ValueError(f"rank {rank}: {op} is neither one chunk (F, B, I, W) nor a pair (F, then B)")
    if not schedule:
        raise ValueError("the schedule has no ranks")


def peak_live(ops: list[tuple[Chunk, ...]]) -> int:
    """The most micro-batches whose activations are kept at once: F adds one, the end of B or W frees it."""
    live = peak = 0
    for chunk in chain.from_iterable(ops):
        live += {"F": 1, "B": -1, "I": 0, "W": -1}[chunk.kind]
        peak = max(peak, live)
    return peak


# What does 1F1B save?


def one_f_one_b_schedule(n_ranks: int, n_chunks: int) -> Schedule:
    """1F1B: rank r runs n_ranks - 1 - r forwards ahead, then one forward and one backward in turn."""
    check_counts(n_ranks, n_chunks)
    ranks = [OpWriter() for _ in range(n_ranks)]
    for r, rank in enumerate(ranks):
        ahead = min(n_ranks - 1 - r, n_chunks)
        rank.add("F0", times=ahead)
        for _ in range(n_chunks - ahead):
            rank.add("F0")
            rank.add("B0")
        rank.add("B0", times=ahead)
    return Schedule(rank.ops for rank in ranks)


# Why split the backward?


def zb1p_schedule(n_ranks: int, n_chunks: int) -> Schedule:
    """ZB1P (ZB-H1 of the Zero Bubble paper): 1F1B with the backward split; rank r runs W r micro-batches late."""
    check_counts(n_ranks, n_chunks)
    ranks = [OpWriter() for _ in range(n_ranks)]
    for r, rank in enumerate(ranks):
        ahead = min(n_ranks - 1 - r, n_chunks)
        rank.add("F0", times=ahead)
        for i in range(n_chunks):
            if i < n_chunks - ahead:
                rank.add("F0")
            rank.add("I0")
            if len(rank.deferred) > r:
                rank.add("W")
        rank.add("W", times=len(rank.deferred))
    return Schedule(rank.ops for rank in ranks)


def bubble(
    method: str, n_ranks: int, F: float = 1, B: float = 2, W: float = 1, overlapped: float | None = None
) -> float:
    """Idle time of a rank by the published formulas, in which B is the full backward, weight part included.

    method: "gpipe", "1f1b", "zb1p", "dualpipe" or "dualpipev" (there n_ranks / 2 ranks hold n_ranks stages).
    """
    if n_ranks < 1 or (n_ranks % 2 and method.startswith("dualpipe")):
        raise ValueError(f"{n_ranks=} must be 1 or more, and even for DualPipe")
    pair = F + B if overlapped is None else overlapped
    formulas = {
        "gpipe": (n_ranks - 1) * (F + B),
        "1f1b": (n_ranks - 1) * (F + B),
        "zb1p": (n_ranks - 1) * (F + B - 2 * W),
        "dualpipe": (n_ranks / 2 - 1) * (pair + B - 3 * W),
        "dualpipev": (n_ranks / 2 - 1) * (pair + B - 3 * W),
    }
    if method not in formulas:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(formulas)}")
    return formulas[method]


# Why send micro-batches from both ends?


def eight_steps(half: int, position: int, n: int, near: int, far: int) -> list[tuple[Chunk, ...]]:
    """The ops of the rank at `position` among the `half` ranks between an end and the middle (DeepSeek's eight steps).

    n: micro-batches of each direction. near: the direction that enters at this end; far: the one that leaves here.
    """
    rank, f0, f1, b0, b1 = OpWriter(), f"F{near}", f"F{far}", f"B{near}", f"B{far}"
    outer = half - position - 1  # ranks between this one and the middle
    rank.add(f0, times=2 * outer)  # 1
    for _ in range(position + 1):  # 2
        rank.add(f0)
        rank.add(f1)
    for _ in range(outer):  # 3: the far direction's first backwards, with the zero-bubble split
        rank.add(f"I{far}")
        rank.add("W")
        rank.add(f1)
    for i in range(n - 2 * half + position + 1):  # 4: both directions in the steady state
        for pair in ((f0, b1), (f1, b0)):
            if outer == 0 and i == 0 and pair == (f0, b1):  # apart, these two shorten the bubble
                rank.add(f0)
                rank.add(b1)
            else:
                rank.add(*pair)
    for _ in range(outer):  # 5
        rank.add(b1)
        rank.add(f1, b0)
    for i in range(2 * (position + 1)):  # 6: the second half leaves W for later
        rank.add(f"{'B' if i <= position else 'I'}{(far, near)[i % 2]}")
    for _ in range(outer):  # 7
        rank.add("W")
        rank.add(f"I{near}")
    rank.add("W", times=position + 1)  # 8
    return rank.ops


def dualpipe_schedule(n_ranks: int, n_chunks: int) -> Schedule:
    """DualPipe (report section 3.2.1): half of the micro-batches enter at rank 0, half at the last rank.

    n_chunks counts both directions. Rank r holds stage r for direction 0 and stage n_ranks - 1 - r for direction 1.
    """
    if n_ranks < 2 or n_ranks % 2:
        raise ValueError(f"n_ranks={n_ranks} must be even and 2 or more: DualPipe pairs rank r with n_ranks - 1 - r")
    if n_chunks % 2 or n_chunks < 2 * n_ranks:
        raise ValueError(f"n_chunks={n_chunks} must be even and at least 2 * n_ranks = {2 * n_ranks}")
    half, ranks = n_ranks // 2, range(n_ranks)
    sides = [(r, 0, 1) if r < half else (n_ranks - 1 - r, 1, 0) for r in ranks]  # position, near, far
    return Schedule(eight_steps(half, position, n_chunks // 2, near, far) for position, near, far in sides)


# What does it cost, and when does it lose?


def dualpipev_schedule(n_ranks: int, n_chunks: int) -> Schedule:
    """DualPipeV: DualPipe cut in half. Each micro-batch runs through the ranks and, turning at the last, back.

    n_chunks counts micro-batches. Rank r holds stages r and 2 * n_ranks - 1 - r: direction 0 is the way there,
    direction 1 the way back.
    """
    check_counts(n_ranks, n_chunks, least=2 * n_ranks)
    return Schedule((eight_steps(n_ranks, r, n_chunks, 0, 1) for r in range(n_ranks)), folded=True)
