"""Logged comparisons by name: python -m dsv3_mini experiment NAME.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv3_mini.ablations import (
    dense_runs,
    fim_runs,
    gate_runs,
    mini_runs,
    mtp_runs,
    speed_of_bias_runs,
    training_speed_runs,
)
from dsv3_mini.balance import BiasBalancer, auxiliary_loss, expert_load, sequence_balance_loss
from dsv3_mini.baseline import Attention, LanguageModel, fit, next_token_loss
from dsv3_mini.checkpoint import write_json
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import (
    DOMAIN_VOCAB_SIZE,
    DOMAINS,
    Batches,
    bits_per_byte,
    domain_windows,
    encode,
    pack,
    python_corpus,
    train_tokenizer,
)
from dsv3_mini.mla import MLA
from dsv3_mini.moe import moe_feed_forward, record_routing

# Which part of the recipe earns its place?


def summary(variant: str, seed: int, model: nn.Module, losses: list[float], started: float) -> dict:
    """What every logged run holds: variant, seed, config, size, seconds, and a thinned training curve."""
    return {
        "variant": variant,
        "seed": seed,
        "config": model.config.to_dict(),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(losses),
        "seconds": round(time.perf_counter() - started, 1),
        "train_loss": [[n, round(sum(losses[n - 10 : n]) / 10, 4)] for n in range(10, len(losses) + 1, 10)],
    }


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor, batch_size: int = 64) -> float:
    """Mean nats a token over all windows."""
    parts = [next_token_loss(model, batch).item() * len(batch) for batch in windows.split(batch_size)]
    return sum(parts) / len(windows)


ATTENTIONS: dict[str, Callable] = {
    "mla": MLA,
    "mha": Attention,
    "gqa": partial(Attention, n_kv_heads=2),
    "mqa": partial(Attention, n_kv_heads=1),
}


def equal_size_config(config: ModelConfig, attention: Callable) -> ModelConfig:
    """`config` with its feed-forward width chosen so that every attention gives as many parameters as MLA."""
    with torch.device("meta"):
        wanted, given = (sum(p.numel() for p in build(config).parameters()) for build in (MLA, attention))
    missing = wanted - given
    return config.replace(intermediate_size=config.intermediate_size + round(missing / (3 * config.hidden_size)))


def attention_runs(seeds: int = 3, steps: int = 150) -> Iterator[dict]:
    """MLA, MHA, GQA and MQA at equal parameters on the standard library's text, the same batches for all."""
    corpus = python_corpus(max_bytes=3_000_000)
    tokenizer = train_tokenizer(corpus.train, 512)
    train, valid = (pack(encode(tokenizer, texts), 128) for texts in (corpus.train, corpus.valid))
    n_bytes = sum(len(text.encode()) for text in corpus.valid)
    base = ModelConfig.preset("nano", vocab_size=512, num_hidden_layers=3, initializer_range=0.02)
    for seed in range(seeds):
        for variant, attention in ATTENTIONS.items():
            torch.manual_seed(seed)
            started = time.perf_counter()
            model = LanguageModel(equal_size_config(base, attention), attention=attention)
            losses = fit(model, Batches(train, 16, seed), steps, progress=False)
            loss = mean_loss(model, valid[:: max(1, len(valid) // 128)])
            bits = bits_per_byte(loss, valid[:, 1:].numel(), n_bytes)
            run = summary(variant, seed, model, losses, started)
            yield {**run, "corpus": corpus.sha256, "valid_loss": round(loss, 4), "valid_bits_per_byte": round(bits, 4)}


def balance_run(variant: str, seed: int, gamma: float = 0.01, alpha: float = 0.01, steps: int = 150) -> dict:
    """Train a small mixture on the four languages; variant "none", "auxiliary", "sequence" or "bias".

    alpha scales the two losses, gamma the bias step. The log adds MaxVio over time and the load by domain.
    """
    windows, domain_idx = domain_windows(DOMAINS, 6600, 64, seed=seed)
    train, valid, valid_idx = windows[:6400], windows[6400:], domain_idx[6400:]
    config = ModelConfig.preset("nano", vocab_size=DOMAIN_VOCAB_SIZE, num_hidden_layers=3, initializer_range=0.02)
    torch.manual_seed(seed)
    started = time.perf_counter()
    model = LanguageModel(config, feed_forward=moe_feed_forward)
    balancer, violations = BiasBalancer(model, gamma if variant == "bias" else 0.0), []

    def loss_fn(model, batch):
        with record_routing(model) as routings:
            loss = next_token_loss(model, batch)
        balancer.observe(routings)
        if variant == "auxiliary":
            loss = loss + alpha * sum(auxiliary_loss(r) for r in routings)
        if variant == "sequence":
            top_k = config.num_experts_per_tok
            loss = loss + alpha * sum(sequence_balance_loss(r.scores, top_k, len(batch)) for r in routings)
        return loss

    def after_step(step, loss):
        violation = balancer.step()
        if (step + 1) % 5 == 0:
            violations.append([step + 1, [round(value, 3) for value in violation]])

    losses = fit(model, Batches(train, 32, seed), steps, loss_fn=loss_fn, after_step=after_step, progress=False)
    run = summary(variant, seed, model, losses, started) | {"gamma": gamma, "alpha": alpha, "max_violation": violations}
    run["valid_loss"] = round(mean_loss(model, valid), 4)
    return run | {"load_by_domain": load_by_domain(model, valid, valid_idx)}


@torch.no_grad()
def load_by_domain(model: nn.Module, windows: Tensor, domain_idx: Tensor) -> list[list[list[int]]]:
    """Choices of each expert on each domain's windows: for every mixture layer E rows of one count a domain."""
    columns = []
    for domain in range(int(domain_idx.max()) + 1):
        with record_routing(model) as routings:
            model(windows[domain_idx == domain, :-1])
        columns.append([expert_load(r.indices, r.scores.shape[1]) for r in routings])
    return [torch.stack(layer, dim=1).tolist() for layer in zip(*columns, strict=True)]


def balance_runs(seeds: int = 3, steps: int = 150) -> Iterator[dict]:
    """No balancing, auxiliary loss, sequence-wise loss and bias, the same data for each seed."""
    for seed in range(seeds):
        for variant in ("none", "auxiliary", "sequence", "bias"):
            yield balance_run(variant, seed, steps=steps)


def gamma_runs(seeds: int = 3, steps: int = 120) -> Iterator[dict]:
    """The bias update at four speeds."""
    for seed in range(seeds):
        for gamma in (0.0001, 0.001, 0.01, 0.1):
            yield {**balance_run("bias", seed, gamma=gamma, steps=steps), "variant": f"{gamma:g}"}


EXPERIMENTS: dict[str, Callable] = {
    "attention": attention_runs,
    "balance": balance_runs,
    "gamma": gamma_runs,
    "mtp": mtp_runs,
    "dense": dense_runs,
    "fim": fim_runs,
    "gate": gate_runs,
    "bias_speed": speed_of_bias_runs,
    "mini": mini_runs,
    "training_speed": training_speed_runs,
}


def run_experiment(name: str, folder: str | os.PathLike, on_run: Callable[[dict], None] = lambda run: None) -> Path:
    """Run a named experiment and log all its runs to FOLDER/NAME.json, whole or not at all."""
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}")
    runs = []
    for run in EXPERIMENTS[name]():
        runs.append(run)
        on_run(run)
    machine = {"system": platform.system(), "processor": platform.machine(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    file = Path(folder) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"experiment": name, "machine": machine, "versions": versions, "runs": runs})
    return file
