"""Time kernels on a GPU against the best library call at hand, in turn and after a check of their results."""

import json
import platform
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_mini.checkpoint import write_json
from dsv3_mini.kernels import offers


class Contest(NamedTuple):
    """One kernel at one size. A module of this package that offers `contests(device)` puts its own into the benchmark.

    ours and peers: name -> a function of no arguments to be timed; ours may hold several tilings, the taught one
    first. expected: what ours must return within `tolerance` (relative, Frobenius). n_bytes, flops: of one call.
    """

    kernel: str
    shape: str
    ours: dict[str, Callable[[], object]]
    peers: dict[str, Callable[[], object]]
    expected: Callable[[], object]
    tolerance: float
    n_bytes: float
    flops: float = 0.0


def relative_error(result: object, expected: object) -> float:
    """|a - b| / |b| in float64 over all tensors of a result, 8-bit floats too; infinite where the result has NaN."""
    results, wanted = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (result, expected))
    pairs = [(a.double(), b.double()) for a, b in zip(results, wanted, strict=True)]
    error = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    return float(error.sqrt().nan_to_num(nan=torch.inf))


def device_clock(function: Callable[[], object], flush: Tensor | None = None) -> float:
    """Milliseconds of one call between two events on the device.

    Writing `flush` before empties the device's cache, and keeps it busy while the CPU enqueues what is timed.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(contest: Contest, clock: Callable[[Callable], float], rounds: int = 30) -> dict:
    """Check first, then time all sides in turn, round by round; medians in ms, and what our best side achieves.

    Raises FloatingPointError where a result of ours is wrong. What this machine cannot run is noted with the reason.
    """
    expected, taught = contest.expected(), next(iter(contest.ours))
    sides, missing, errors = {}, {}, {}
    for name, run in (contest.ours | contest.peers).items():
        try:
            result = run()
        except Exception as reason:
            if name == taught:
                raise
            missing[name] = (str(reason).splitlines() or [type(reason).__name__])[0][:200]
            continue
        sides[name] = run
        if name in contest.ours:
            errors[name] = relative_error(result, expected)
    if wrong := [name for name, error in errors.items() if not error <= contest.tolerance]:
        raise FloatingPointError(f"{contest.kernel} {contest.shape}, {wrong[0]}: relative error {errors[wrong[0]]:.2e}")
    times = {name: [] for name in sides}
    for step in range(rounds + 3):
        for name, run in sides.items():
            elapsed = clock(run)
            if step >= 3:  # the first ones warm up
                times[name].append(elapsed)
    ms = {name: statistics.median(values) for name, values in times.items()}
    best = min(errors, key=ms.get)
    return {
        "kernel": contest.kernel, "shape": contest.shape, "ms": ms, "best": best, "missing": missing,
        "bytes": contest.n_bytes, "flops": contest.flops, "taught": taught, "error": max(errors.values()),
        "gb_per_s": contest.n_bytes / ms[best] / 1e6, "tflops": contest.flops / ms[best] / 1e9,
        "against": {name: ms[name] / ms[best] for name in contest.peers if name in ms},
    }  # fmt: skip


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return found | {"cuda": str(torch.version.cuda), "system": platform.platform()}


def benchmark(out: Path | None = None, show: Callable[[str], object] = print, only: str = "", rounds: int = 30) -> Path:
    """Measure every contest whose kernel's name contains `only`, a line each; write the figures to JSON.

    out: assets/benchmarks/<gpu>.json if None. Raises ValueError without an NVIDIA GPU of compute capability 9.0 or
    more, and where `only` is given and `out` is not.
    """
    if not torch.cuda.is_available():
        raise ValueError("kernels are timed on an NVIDIA GPU, and torch finds none on this machine")
    device, capability = torch.device("cuda"), torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if only and out is None:
        raise ValueError(f"{only=} measures a part and would replace the whole; name another file to write")
    if capability < (9, 0):
        raise ValueError(f"{name} has compute capability {capability}; the FP8 kernels need (9, 0), Hopper, or later")
    flush = torch.empty(2**30, dtype=torch.uint8, device=device)
    results = []
    for contest in all_contests(device):
        if only in contest.kernel:
            results.append(measure(contest, lambda run: device_clock(run, flush), rounds))
            show(line(results[-1]))
    out = out or Path("assets/benchmarks") / (re.sub(r"\W+", "_", name.lower()) + ".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"gpu": name, "capability": list(capability), "versions": versions(), "rounds": rounds}
    write_json(out, document | {"results": results})
    return out


def read_benchmarks(folder: Path) -> dict[str, dict]:
    """What was measured so far, by GPU; empty where nothing was."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {document["gpu"]: document for document in documents}


def all_contests(device: torch.device) -> Iterator[Contest]:
    """One after the other, so that only one's tensors are in memory."""
    for contests in offers("contests"):
        yield from contests(device)


def line(result: dict) -> str:
    """One result for people."""
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in result["against"].items())
    speed = f"{result['gb_per_s']:7.0f} GB/s {result['tflops']:7.1f} TFLOP/s"
    return f"{result['kernel']:18} {result['shape']:28} {result['ms'][result['best']]:8.3f} ms {speed}  {ratios}"
