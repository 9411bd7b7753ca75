"""What the chosen positions hold, and what the loss says, at 4,096 tokens.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

import copy
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_mini.dataset import read_sources
from dsv3_mini.long_context import extend, final_learning_rate, long_windows, position_losses, record_attention, stretch
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.sparse_attention import (
    Scorer,
    choose_positions,
    make_sparse,
    score_by_attention,
    score_by_indexer,
    score_by_recency,
    train_indexers,
)

# What came after?


@dataclass(frozen=True)
class SparsePlan:
    """The sizes of the experiment."""

    trained: int = 256
    length: int = 4096
    extend_steps: int = 10
    n_lessons: int = 8
    draws: int = 12  # steps of the indexers on each lesson
    top_k: tuple[int, ...] = (16, 64, 256)  # 64 of 4,096 is V3.2's share, 2,048 of 128K
    dtype: str = "bfloat16"  # of matrix products while tuning


@torch.no_grad()
def attention_held(model: DeepSeekV3, scorers: list[Scorer], ids: Tensor, top_k: tuple[int, ...]) -> list[float]:
    """Share of the attention that each scorer's k best positions hold, of queries in the last quarter of one text."""
    with record_attention(model) as found:
        model.model(ids[None])
    positions = torch.arange(3 * len(ids) // 4, len(ids), 16)
    held = torch.zeros(len(top_k))
    for scorer, (attention, x, rope) in zip(scorers, found, strict=True):
        weights = score_by_attention(attention, x, rope, positions).clamp(min=0) / attention.n_heads  # (1, P, T)
        scores = scorer(attention, x, rope, positions)
        for n, k in enumerate(top_k):
            chosen, _ = choose_positions(scores, k)
            held[n] += weights.gather(-1, chosen).sum(-1).mean() / len(found)
    return [round(share, 4) for share in held.tolist()]


def sparse_attention_runs(
    checkpoint: str | os.PathLike = "assets/checkpoints/mini",
    seeds: Iterable[int] = range(3),
    plan: SparsePlan = SparsePlan(),
) -> Iterator[dict]:
    """Extend the mini model, train indexers on it, and read held-out text with k positions a query, three ways."""
    folder = Path(checkpoint)
    options = json.loads((folder / "run.json").read_text(encoding="utf-8"))["options"]
    corpus = read_sources(options["data"], options["max_bytes"])
    tokenizer, rate = Tokenizer.from_file(str(folder / "tokenizer.json")), options["learning_rate"]
    for seed in seeds:
        started = time.perf_counter()
        train = long_windows(tokenizer, corpus.train, plan.length, plan.extend_steps + plan.n_lessons, seed)
        text = long_windows(tokenizer, corpus.valid, plan.length, 1, seed)
        model = stretch(DeepSeekV3.from_pretrained(folder, torch.float32), "yarn", 20.0, plan.trained)
        tuning = train[: plan.extend_steps], 1, rate / 2, final_learning_rate(rate), getattr(torch, plan.dtype)
        extend(model, *tuning)
        indexers, losses = train_indexers(model, train[-plan.n_lessons :], plan.draws, seed=seed)
        shared = {"seed": seed, "config": model.config.to_dict(), "plan": asdict(plan), "corpus": corpus.sha256}
        dense, layers = position_losses(model, text).mean().item(), model.config.num_hidden_layers
        seconds = round(time.perf_counter() - started, 1)
        yield {"variant": "dense", "seconds": seconds, "results": {"loss": round(dense, 4)}, "kl": losses, **shared}
        scorers = {"indexer": [score_by_indexer(indexer) for indexer in indexers]}
        scorers |= {"true attention": [score_by_attention] * layers, "latest": [score_by_recency] * layers}
        for name, which in scorers.items():
            yield {"variant": name, **read_sparsely(model, which, text, plan), **shared}


def read_sparsely(model: DeepSeekV3, scorers: list[Scorer], text: Tensor, plan: SparsePlan) -> dict:
    """Loss over one text (1, T + 1), and attention held, for every k of the plan."""
    started = time.perf_counter()
    sparse = make_sparse(copy.deepcopy(model), scorers, plan.length)
    losses = []
    for k in plan.top_k:
        for layer in list(sparse.model.layers)[: model.config.num_hidden_layers]:
            layer.self_attn.top_k = k
        losses.append(round(position_losses(sparse, text).mean().item(), 4))
    held = attention_held(model, scorers, text[0, :-1], plan.top_k)
    results = {"loss": losses, "held": held}
    return {"results": results, "top_k": list(plan.top_k), "seconds": round(time.perf_counter() - started, 1)}
