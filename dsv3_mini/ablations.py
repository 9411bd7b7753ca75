"""The recipe with one part changed, three seeds each, and the speed of its step.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsv3_mini.accounting import count_parameters, flops_per_token
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import bits_per_byte
from dsv3_mini.evaluate import gaps, infill_exact_match, next_token_accuracy, validation_loss
from dsv3_mini.losses import training_losses
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.peer import time_in_turn, transformers_twin
from dsv3_mini.recipe import TrainOptions
from dsv3_mini.resume import read_log
from dsv3_mini.train import Run, make_optimizer, start_run, train_step

# Which part of the recipe earns its place?


def measure(run: Run, n_gaps: int = 80) -> dict[str, float]:
    """The main head on text it has not read: loss, bits per byte, accuracy, and gaps filled exactly."""
    windows = run.data.valid[:: max(1, len(run.data.valid) // 128)]
    loss = validation_loss(run.model, windows, 16, len(windows))
    holes = gaps(run.data.tokenizer, run.data.corpus.valid, n_gaps, run.options.seq_len // 2)
    return {
        "valid_loss": round(loss, 4),
        "valid_bits_per_byte": round(bits_per_byte(loss, 1, run.data.bytes_per_token), 4),
        "accuracy": round(next_token_accuracy(run.model, windows), 4),
        "infill": round(infill_exact_match(run.model, holes), 4),
        "infill_without_suffix": round(infill_exact_match(run.model, holes, see_suffix=False), 4),
    }


def recipe_run(variant: str, seed: int, **changes: Any) -> dict:
    """Train preset nano by the recipe, with changes to its options, and measure it."""
    options = TrainOptions(**{"steps": 150, "max_bytes": 3_000_000, "seed": seed, **changes})
    run, started, curve, violations = start_run(options, "unused"), time.perf_counter(), [], []
    while run.step < options.steps:
        entry = train_step(run)
        curve.append(entry["loss"])
        violations.append(entry["max_violation"])
    seconds, count = time.perf_counter() - started, count_parameters(run.model.config)
    return {
        "variant": variant,
        "seed": seed,
        "config": run.model.config.to_dict(),
        "options": options.__dict__,
        "corpus": run.data.corpus.sha256,
        "n_parameters": count.total,
        "n_activated": count.activated,
        "tokens": entry["tokens"],
        "seconds": round(seconds, 1),
        "train_loss": [[n, round(sum(curve[n - 10 : n]) / 10, 4)] for n in range(10, len(curve) + 1, 10)],
        "max_violation": round(sum(violations[len(violations) // 2 :]) / (len(violations) - len(violations) // 2), 3),
        **measure(run),
    }


def mtp_runs(seeds: int = 3) -> Iterator[dict]:
    """With and without the multi-token prediction module; the main head is measured."""
    for seed in range(seeds):
        yield recipe_run("with MTP", seed)
        yield recipe_run("without", seed, model={"num_nextn_predict_layers": 0})


def fim_runs(seeds: int = 3) -> Iterator[dict]:
    """Fill-in-the-middle at the report's rate, at five times that, and never."""
    for seed in range(seeds):
        for rate in (0.0, 0.1, 0.5):
            yield recipe_run(f"{rate:g}", seed, fim_rate=rate)


def dense_runs(seeds: int = 3) -> Iterator[dict]:
    """The mixture of experts against dense models with its activated, and with its total, number of parameters."""
    base = ModelConfig.preset("nano")
    experts = (base.n_routed_experts + base.n_shared_experts) * base.moe_intermediate_size
    stored = base.n_moe_layers * experts + base.first_k_dense_replace * base.intermediate_size
    chosen = (base.num_experts_per_tok + base.n_shared_experts) * base.moe_intermediate_size
    width = {"activated": chosen, "total": stored // base.num_hidden_layers}
    for seed in range(seeds):
        yield recipe_run("experts", seed, model={"num_nextn_predict_layers": 0})
        for name, size in width.items():
            dense = {"first_k_dense_replace": base.num_hidden_layers, "intermediate_size": size}
            yield recipe_run(f"dense, equal {name}", seed, model={"num_nextn_predict_layers": 0, **dense})


def gate_runs(seeds: int = 3) -> Iterator[dict]:
    """Sigmoid affinities, and a softmax over the experts, both with the bias."""
    for seed in range(seeds):
        for function in ("sigmoid", "softmax"):
            yield recipe_run(function, seed, model={"scoring_func": function})


def speed_of_bias_runs(seeds: int = 3) -> Iterator[dict]:
    """Speeds of the bias update, in a run of this length."""
    for seed in range(seeds):
        for gamma in (0.001, 0.01, 0.1):
            yield recipe_run(f"{gamma:g}", seed, gamma=gamma)


def our_step(model: DeepSeekV3, windows: torch.Tensor, dtype: torch.dtype):
    """A function that trains one step of the next-token loss as the trainer does, and returns its tokens."""
    optimizer = make_optimizer(model, TrainOptions())

    def step() -> int:
        losses, _ = training_losses(model, windows, mtp=False, balance=False, dtype=dtype)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return windows[:, 1:].numel()

    return step


def their_step(twin: nn.Module, windows: torch.Tensor, dtype: torch.dtype):
    """The same with transformers' model and loss, torch's AdamW and clipping as they come."""
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs, targets = windows[:, :-1], windows[:, 1:].contiguous()

    def step() -> int:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = twin(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        return targets.numel()

    return step


def matmul_rate(dtype: torch.dtype, size: int = 1024, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product, the best of some rounds."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def training_speed(preset: str, dtype: str = "float32", batch: int = 8, seq_len: int = 256, rounds: int = 3) -> dict:
    """Tokens a second of a training step, beside transformers on the same weights, in turn; and FLOP/s reached."""
    torch.manual_seed(0)
    config = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    model, kind = DeepSeekV3(config), getattr(torch, dtype)
    windows = torch.randint(5, config.vocab_size, (batch, seq_len + 1))
    sides = {
        "transformers": their_step(transformers_twin(model), windows, kind),
        "ours": our_step(model, windows, kind),
    }
    speed, rate = time_in_turn(sides, rounds), matmul_rate(kind)
    flops = flops_per_token(config, seq_len, training=True) * speed["ours"]
    speed["ratio"] = speed["ours"] / speed["transformers"]
    return {**speed, "flops_per_second": flops, "matmul_flops_per_second": rate, "utilisation": flops / rate}


def training_speed_runs() -> Iterator[dict]:
    """Both presets, both dtypes."""
    for preset in ("nano", "mini"):
        for dtype in ("float32", "bfloat16"):
            started = time.perf_counter()
            speed = {name: round(value, 3) for name, value in training_speed(preset, dtype).items()}
            seconds = round(time.perf_counter() - started, 1)
            yield {"variant": f"{preset} {dtype}", "seed": 0, "seconds": seconds, **speed}


def nano_runs(folder: str = "runs/nano") -> Iterator[dict]:
    """What `train` wrote with its defaults: the options, the corpus and the whole log."""
    described = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
    log, seed = read_log(folder), described["options"]["seed"]
    seconds, loss = described["seconds"], log[-1]["valid_loss"]
    yield {"variant": "nano", "seed": seed, "seconds": seconds, "valid_loss": loss, "run": described, "log": log}
