"""One run through everything that the book built, phase by phase, in a folder that is complete or not there.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from dsv3_mini.bill import make_bill
from dsv3_mini.checkpoint import write_json
from dsv3_mini.phases import Plan, extend_context, make_data, place, post_train, pretrain, run_kernels, serve, store
from dsv3_mini.step_speed import matmul_rate

# What stands behind what?


PHASES: dict[str, Callable[[Plan, Path, Path], dict]] = {
    "tokenizer": make_data,
    "pre-training": pretrain,
    "checkpoint": store,
    "placement": place,
    "context": extend_context,
    "post-training": post_train,
    "serving": serve,
    "kernels": run_kernels,
}


def run_phase(name: str, plan: Plan, folder: Path) -> dict:
    """What a phase measured. Its folder is complete or not there at all; a phase that is there already is only read.

    seconds: by the wall clock; processor: seconds of all processors that worked on it, what a GPU-hour counts.
    """
    done, partial = folder / name, folder / f"{name}.partial"
    if not done.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        started, busy = time.perf_counter(), time.process_time()
        result = PHASES[name](plan, folder, partial)
        ranks = sum(rank["processor"] for rank in result.get("ranks", []))
        spent = {"seconds": time.perf_counter() - started, "processor": time.process_time() - busy + ranks}
        write_json(partial / "result.json", {name: round(value, 2) for name, value in spent.items()} | result)
        partial.rename(done)
    return json.loads((done / "result.json").read_text(encoding="utf-8"))


def check_plan(plan: Plan, folder: Path) -> None:
    """A folder keeps the plan that it was begun with; ValueError names what differs."""
    file, wanted = folder / "plan.json", asdict(plan)
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files of something else; an empty or new folder is needed")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    stored = json.loads(file.read_text(encoding="utf-8"))
    if differing := [f"{name}={stored.get(name)!r}" for name in wanted if stored.get(name) != wanted[name]]:
        raise ValueError(
            f"{folder} was begun with {', '.join(differing)}; continue with that plan, or name a new folder"
        )


def run_system(
    plan: Plan, folder: str | os.PathLike, on_phase: Callable[[str, dict], None] = lambda name, result: None
) -> dict[str, dict]:
    """All phases in their order, in `folder`; a run that was stopped goes on where it stopped.

    on_phase: called with each phase's name and what it measured. ValueError for a folder of another plan.
    """
    folder, results = Path(folder), {}
    check_plan(plan, folder)
    for name in PHASES:
        results[name] = run_phase(name, plan, folder)
        on_phase(name, results[name])
    return results


def whole_system_runs(
    seeds: Iterable[int] = range(3), folder: str | os.PathLike = "runs/whole_system"
) -> Iterator[dict]:
    """The whole run for some seeds, each with the bill that was written before it started."""
    for seed in seeds:
        plan, place = Plan(seed=seed), Path(folder) / str(seed)
        shutil.rmtree(place, ignore_errors=True)
        bill = make_bill(plan.options().config(), plan.tokens, plan.seq_len, matmul_rate(torch.float32))
        started, phases = time.perf_counter(), run_system(plan, place)
        seconds = round(time.perf_counter() - started, 1)
        described = {"config": plan.options().config().to_dict(), "plan": asdict(plan), "bill": asdict(bill)}
        yield {"variant": "whole system", "seed": seed, "seconds": seconds, **described, "phases": phases}
