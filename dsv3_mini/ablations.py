"""The recipe with one part changed, three seeds each.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dsv3_mini.accounting import count_parameters
from dsv3_mini.baseline import LanguageModel
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import bits_per_byte
from dsv3_mini.dataset import Dataset, prepare
from dsv3_mini.evaluate import evaluate, gaps, infill_exact_match, next_token_accuracy, validation_loss
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.recipe import TrainOptions
from dsv3_mini.resume import read_log
from dsv3_mini.train import Run, continue_run, describe, load_run, start_run, train_step

# How were the comparisons run?


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


def plain_model(config: ModelConfig) -> dict[str, int]:
    """Changes to a config with which chapter 02's transformer has as many parameters as `config` activates a token."""
    changes = {"first_k_dense_replace": config.num_hidden_layers, "num_nextn_predict_layers": 0}
    with torch.device("meta"):
        given = sum(p.numel() for p in LanguageModel(config.replace(**changes)).parameters())
    missing = (count_parameters(config).activated - given) / (3 * config.hidden_size * config.num_hidden_layers)
    return changes | {"intermediate_size": config.intermediate_size + round(missing)}


def read_run(folder: str | os.PathLike) -> dict:
    """What `train` wrote of itself into a folder; FileNotFoundError says how to get such a folder."""
    if not (file := Path(folder) / "run.json").is_file():
        raise FileNotFoundError(f"no {file}: `python -m dsv3_mini train --out {folder}` makes such a run")
    return json.loads(file.read_text(encoding="utf-8"))


def committed_run(folder: str | os.PathLike, data: Dataset) -> dict:
    """The description of a folder that `train` wrote; ValueError if `data` is not what it was trained on."""
    described = read_run(folder)
    same_tokens = Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).to_str() == data.tokenizer.to_str()
    if described["corpus"]["sha256"] != data.corpus.sha256 or not same_tokens:
        raise ValueError(f"{folder} was trained on other text than this machine's {described['options']['data']}")
    return described


def mini_runs(folder: str = "assets/checkpoints/mini") -> Iterator[dict]:
    """The committed model beside counts, compressors and the text itself, on text that it has not read."""
    options = TrainOptions(**read_run(folder)["options"])
    data, started = prepare(options), time.perf_counter()
    described, model = committed_run(folder, data), DeepSeekV3.from_pretrained(folder, dtype=torch.float32)
    results = evaluate(model, data)
    yield {
        **{"variant": "mini", "seed": options.seed, "seconds": round(time.perf_counter() - started, 1)},
        **{"config": model.config.to_dict(), "n_activated": count_parameters(model.config).activated},
        **{"run": described, "results": results},
    }


def plain_runs(folder: str = "assets/checkpoints/mini", out: str = "runs/plain") -> Iterator[dict]:
    """Chapter 02's transformer by the same recipe on the same tokens, at equal activated parameters; it can resume."""
    options = TrainOptions(**read_run(folder)["options"])
    options = dataclasses.replace(options, model=plain_model(options.config()), mtp_weight=0.0)
    resume = (Path(out) / "resume.safetensors").exists()
    run = load_run(out, options, LanguageModel) if resume else start_run(options, out, build=LanguageModel)
    committed_run(folder, run.data)
    continue_run(run)
    yield {
        **{"variant": "transformer of chapter 02", "seed": options.seed, "config": run.model.config.to_dict()},
        **{"seconds": describe(run)["seconds"], "n_parameters": sum(p.numel() for p in run.model.parameters())},
        **{"run": describe(run), "log": [entry for entry in read_log(out) if "valid_loss" in entry]},
        **{"results": evaluate(run.model, run.data)},
    }


def nano_runs(folder: str = "runs/nano") -> Iterator[dict]:
    """What `train` wrote with its defaults: the options, the corpus and the whole log."""
    described = read_run(folder)
    log, seed = read_log(folder), described["options"]["seed"]
    seconds, loss = described["seconds"], log[-1]["valid_loss"]
    yield {"variant": "nano", "seed": seed, "seconds": seconds, "valid_loss": loss, "run": described, "log": log}
