"""What a forward and a backward cost when a GPU computes and sends at the same time.

Generated from chapters/08_dualpipe.ipynb; edit the chapter, not this file.
"""

from typing import NamedTuple

# Why send micro-batches from both ends?


def chunk_tasks(attention: float, dispatch: float, mlp: float, combine: float) -> dict[str, tuple[str, float, tuple]]:
    """The parts of one forward and one backward chunk: {name: (stream, duration, names that come before)}.

    Each input-gradient part takes as long as its forward part, and so does each weight part (report, figure 4).
    """
    parts = {"attention": attention, "dispatch": dispatch, "mlp": mlp, "combine": combine}
    streams = dict(attention="compute", dispatch="network", mlp="compute", combine="network")
    tasks = {}
    for kind, names in (("F", list(parts)), ("I", list(parts)[::-1])):
        for before, name in zip([None, *names[:-1]], names, strict=True):
            tasks[f"{kind} {name}"] = streams[name], parts[name], (f"{kind} {before}",) if before else ()
            if kind == "I" and streams[name] == "compute":
                tasks[f"W {name}"] = "compute", parts[name], (f"I {name}",)
    return tasks


def run_streams(tasks: dict[str, tuple[str, float, tuple]]) -> dict[str, tuple[float, float]]:
    """Start and end of every task when the compute and the network stream of a GPU work at the same time.

    Whatever can start first does; at a tie, weight gradients wait, for nothing depends on them.
    """
    spans, free, waiting = {}, {"compute": 0.0, "network": 0.0}, dict(tasks)
    while waiting:
        ready = [
            (max(free[stream], *(spans[task][1] for task in before), 0.0), name.startswith("W"), order, name)
            for order, (name, (stream, _, before)) in enumerate(waiting.items())
            if spans.keys() >= set(before)
        ]
        start, *_, name = min(ready)
        stream, duration, _ = waiting.pop(name)
        spans[name] = start, start + duration
        free[stream] = start + duration
    return spans


class Costs(NamedTuple):
    """Durations for `simulate(schedule, **costs._asdict())`."""

    F: float
    B: float
    W: float
    overlapped: float


def chunk_costs(attention: float, dispatch: float, mlp: float, combine: float) -> Costs:
    """Durations of the chunks: alone, all parts one after the other; as a pair, computing while sending."""
    if min(attention, dispatch, mlp, combine) < 0:
        raise ValueError(f"durations must not be negative: {attention=}, {dispatch=}, {mlp=}, {combine=}")
    compute, network = attention + mlp, dispatch + combine
    ends = run_streams(chunk_tasks(attention, dispatch, mlp, combine)).values()
    return Costs(compute + network, 2 * compute + network, compute, max(end for _, end in ends))
