"""The extension of the mini model, measured: python -m dsv3_mini experiment long_context.

Generated from chapters/12_long_context.ipynb; edit the chapter, not this file.
"""

import copy
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_mini.data import Corpus
from dsv3_mini.dataset import read_sources
from dsv3_mini.long_context import (
    attention_entropy,
    cut,
    extend,
    final_learning_rate,
    long_windows,
    position_losses,
    stretch,
)
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.needle import needle_map, needle_words, teach

# How little tuning is enough?


@dataclass(frozen=True)
class Plan:
    """The sizes of the experiment. Two phases of equal steps and tokens, as in the report (section 4.3)."""

    trained: int = 256
    factor: float = 20.0
    phases: tuple[int, ...] = (1024, 4096)
    steps: int = 20  # of each phase
    tokens_per_step: int = 4096
    rate: float = 0.5  # of the peak of pre-training, falling to the final one in each phase
    teach_steps: int = 150
    n_windows: int = 2
    n_needles: int = 2  # texts a seed, each with one needle at every length and depth
    n_more: int = 8  # texts where every depth has a word of its own, for the same seeds as the controls
    n_controls: int = 1  # seeds for which the controls of the tuning are run
    dtype: str = "bfloat16"  # of matrix products while tuning


def by_block(losses: Tensor, block: int = 64) -> list[float]:
    """Mean of (n, T) losses over the windows and over blocks of positions."""
    return [round(x, 4) for x in losses.mean(0).unfold(0, block, block).mean(1).tolist()]


def measure(model: DeepSeekV3, windows: Tensor) -> dict:
    """Loss by position in blocks of 64, its mean, and the attention's entropy at powers of two in every layer."""
    losses, length = position_losses(model, windows), windows.shape[1] - 1
    positions = 2 ** torch.arange(4, length.bit_length()) - 1
    entropy = attention_entropy(model, windows[0, :-1], positions).mean(1)  # (layers, P)
    return {
        "results": {
            "loss": round(losses.mean().item(), 4),
            "last quarter": round(losses[:, -length // 4 :].mean().item(), 4),
        },
        "position_loss": by_block(losses),
        "entropy": [[round(x, 3) for x in row] for row in entropy.tolist()],
        "entropy_positions": positions.tolist(),
    }


@dataclass
class Bench:
    """What all runs of one seed share: the model as trained, held-out windows, text to tune on."""

    plan: Plan
    model: DeepSeekV3
    tokenizer: Tokenizer
    corpus: Corpus
    peak_rate: float
    seed: int

    def texts(self, length: int, count: int, train: bool) -> Tensor:
        texts = self.corpus.train if train else self.corpus.valid
        return long_windows(self.tokenizer, texts, length, count, self.seed)

    def extended(self, method: str, share: float | None = None) -> Iterator[tuple[str, DeepSeekV3, dict]]:
        """The model after each phase of tuning under a method's clocks: (name, model, what the phase cost).

        share: another start of the learning rate, as a share of the peak of pre-training.
        """
        model = copy.deepcopy(stretch(self.model, method, self.plan.factor, self.plan.trained))
        start, end = self.peak_rate * (share or self.plan.rate), final_learning_rate(self.peak_rate)
        for length in self.plan.phases:
            batch = max(1, self.plan.tokens_per_step // length)
            windows = self.texts(length, self.plan.steps * batch, train=True)
            cost = extend(model, windows, batch, start, end, getattr(torch, self.plan.dtype))
            cost |= {"length": length, "batch": batch, "rate": start, "end_rate": end}
            yield f"{method}, tuned to {length}", model, {"phase": cost}

    def needles(self, model: DeepSeekV3) -> dict:
        """Scores of needles in held-out text, of words that lessons used; "unseen": of words that none used."""
        longest = self.plan.phases[-1]
        lengths = [n for n in (self.plan.trained // 2 * 2**k for k in range(20)) if n <= longest]
        depths, hays = (0.0, 0.25, 0.5, 0.75, 1.0), self.texts(longest, self.plan.n_needles, train=False)
        words, unseen = (needle_words(self.tokenizer, held_out) for held_out in (False, True))
        found = needle_map(model, self.tokenizer, hays, lengths, depths, words, self.seed)
        found["unseen"] = needle_map(model, self.tokenizer, hays, [self.plan.trained], depths, unseen, self.seed)
        means = {f"{n}": round(sum(row) / len(row), 3) for n, row in zip(lengths, found["exact"], strict=True)}
        return {"results": means, "lengths": lengths, "depths": list(depths), **found}

    def more_needles(self, model: DeepSeekV3) -> dict:
        """Fewer depths and more texts than `needles`, and another word at every depth."""
        hays, depths = self.texts(self.plan.phases[-1], self.plan.n_more, train=False), (0.1, 0.5, 0.9)
        lengths = [n for n in (self.plan.trained // 2 * 2**k for k in range(20)) if n <= self.plan.phases[-1]]
        words, exact = needle_words(self.tokenizer, held_out=False), []
        for n, depth in enumerate(depths):
            found = needle_map(model, self.tokenizer, hays, lengths, [depth], words, seed=100 + n)
            exact.append([row[0] for row in found["exact"]])
        by_length = [list(row) for row in zip(*exact, strict=True)]
        means = {f"{n}": round(sum(row) / len(row), 3) for n, row in zip(lengths, by_length, strict=True)}
        return {"results": means, "lengths": lengths, "depths": list(depths), "exact": by_length, "texts": len(hays)}

    def taught(self, model: DeepSeekV3) -> tuple[DeepSeekV3, dict]:
        """A copy that has had the needle lessons, none longer than the trained length."""
        student, plan = copy.deepcopy(model), self.plan
        hays = self.texts(4 * plan.trained, 64, train=True)
        losses = teach(
            student,
            self.tokenizer,
            hays,
            plan.trained,
            plan.teach_steps,
            seed=self.seed,
            dtype=getattr(torch, plan.dtype),
        )
        return student, {"lesson_losses": losses}


UNTUNED = ("rope", "interpolation", "ntk", "yarn frequencies", "yarn")


def position_runs(bench: Bench, windows: Tensor) -> Iterator[tuple[str, dict]]:
    """The model as trained: whole windows under each method's clocks, and the same tokens cut into short windows."""
    plan = bench.plan
    pieces = position_losses(bench.model, cut(windows, plan.trained))
    pieces = pieces.view(len(windows), -1)
    yield "cut", {"results": {"loss": round(pieces.mean().item(), 4)}, "position_loss": by_block(pieces)}
    for method in UNTUNED:
        yield method, measure(stretch(bench.model, method, plan.factor, plan.trained), windows)


def control_runs(bench: Bench, windows: Tensor) -> Iterator[tuple[str, dict]]:
    """The same tuning without YaRN, and with YaRN at the report's final rate, first phase only."""
    for name, model, cost in bench.extended("rope"):
        yield name, {**measure(model, windows), **cost}
    name, model, cost = next(bench.extended("yarn", share=final_learning_rate(1.0)))
    yield f"final rate, {name}", {**measure(model, windows), **cost}


# Can it find a needle?


def seed_runs(bench: Bench) -> Iterator[tuple[str, dict]]:
    """Everything for one seed of windows, tuning text and needles: (variant, what was measured)."""
    plan, windows = bench.plan, bench.texts(bench.plan.phases[-1], bench.plan.n_windows, train=False)
    yield from position_runs(bench, windows)
    for name, model, cost in bench.extended("yarn"):
        yield name, {**measure(model, windows), **cost}
    extended = model
    student, losses = bench.taught(bench.model)
    yield "needle, rope", {**bench.needles(student), **losses}
    for method in ("interpolation", "yarn"):
        yield f"needle, {method}", bench.needles(stretch(student, method, plan.factor, plan.trained))
    student, losses = bench.taught(extended)
    yield "needle, extended", {**bench.needles(student), **losses}
    if bench.seed < plan.n_controls:
        yield "more needles, extended", bench.more_needles(student)
        yield from control_runs(bench, windows)


def long_context_runs(
    checkpoint: str | os.PathLike = "assets/checkpoints/mini", seeds: int = 3, plan: Plan | None = None
) -> Iterator[dict]:
    """Extend the trained mini model, three seeds: losses by position, entropies, needles, seconds."""
    plan, folder = plan or Plan(), Path(checkpoint)
    model = DeepSeekV3.from_pretrained(folder, torch.float32)
    trained = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    options = trained["options"]
    corpus = read_sources(options["data"], options["max_bytes"])
    shared = {"config": model.config.to_dict(), "plan": asdict(plan), "corpus": corpus.sha256}
    shared["same_text"] = corpus.sha256 == trained["corpus"]["sha256"]
    for seed in range(seeds):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        bench, started = Bench(plan, model, tokenizer, corpus, options["learning_rate"], seed), time.perf_counter()
        for variant, measured in seed_runs(bench):
            seconds, started = round(time.perf_counter() - started, 1), time.perf_counter()
            yield {"variant": variant, "seed": seed, "seconds": seconds, **measured, **shared}
