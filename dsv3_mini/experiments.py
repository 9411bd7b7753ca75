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
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.ablations import (
    dense_runs,
    fim_runs,
    gate_runs,
    mini_runs,
    mtp_runs,
    nano_runs,
    plain_runs,
    speed_of_bias_runs,
)
from dsv3_mini.balance import (
    BiasBalancer,
    auxiliary_loss,
    expert_load,
    max_violation,
    sequence_balance_loss,
    specialisation,
)
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
from dsv3_mini.fp8_training import fp8_runs
from dsv3_mini.mla import MLA
from dsv3_mini.moe import Routing, moe_feed_forward, record_routing
from dsv3_mini.step_speed import training_speed_runs

# How were the comparisons run?


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


def attention_runs(seeds: int = 3, steps: int = 400) -> Iterator[dict]:
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
            losses = fit(model, Batches(train, 16, seed), steps, cooldown=steps // 2, progress=False)
            loss = mean_loss(model, valid[:: max(1, len(valid) // 128)])
            bits = bits_per_byte(loss, valid[:, 1:].numel(), n_bytes)
            run = summary(variant, seed, model, losses, started)
            yield {**run, "corpus": corpus.sha256, "valid_loss": round(loss, 4), "valid_bits_per_byte": round(bits, 4)}


BALANCE_MODEL = dict(
    vocab_size=DOMAIN_VOCAB_SIZE,
    hidden_size=64,
    num_hidden_layers=3,
    q_lora_rank=None,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    initializer_range=0.02,
)


BALANCING: dict[str, dict] = {
    "none": {},
    "auxiliary": {"auxiliary": 0.01},
    "auxiliary, strong": {"auxiliary": 0.1},
    "sequence": {"sequence": 0.01},
    "bias": {"gamma": 0.01},
    "bias, no dense layer": {"gamma": 0.01, "dense_layers": 0},
}


def balance_penalty(routings: list[Routing], auxiliary: float, sequence: float, n_sequences: int) -> Tensor | float:
    """The balance losses of all layers, each times its factor."""
    penalty = 0.0
    for r in routings:
        if auxiliary:
            penalty = penalty + auxiliary * auxiliary_loss(r)
        if sequence:
            penalty = penalty + sequence * sequence_balance_loss(r.scores, r.indices.shape[1], n_sequences)
    return penalty


@torch.no_grad()
def load_by_window(model: nn.Module, windows: Tensor) -> list[Tensor]:
    """Choices of each expert in each window, (E, B) counts for every mixture layer."""
    with record_routing(model) as routings:
        model(windows[:, :-1])
    layers = [(r.indices.chunk(len(windows)), r.scores.shape[1]) for r in routings]
    return [torch.stack([expert_load(i, n_experts) for i in parts], dim=1) for parts, n_experts in layers]


def balance_report(model: nn.Module, windows: Tensor, domain_idx: Tensor) -> dict[str, list]:
    """For every mixture layer: MaxVio over all windows and on average within one, load and information by domain."""
    names = "held_out_max_violation", "sequence_max_violation", "specialisation", "load_by_domain"
    report = {name: [] for name in names}
    for by_window in load_by_window(model, windows):
        by_domain = by_window @ F.one_hot(domain_idx)  # (E, domains)
        report["held_out_max_violation"].append(round(max_violation(by_window.sum(1)), 4))
        report["sequence_max_violation"].append(round(sum(map(max_violation, by_window.T)) / len(windows), 4))
        report["specialisation"].append(round(specialisation(by_domain), 4))
        report["load_by_domain"].append(by_domain.tolist())
    return report


def balance_run(
    variant: str,
    seed: int,
    *,
    auxiliary: float = 0.0,
    sequence: float = 0.0,
    gamma: float = 0.0,
    dense_layers: int = 1,
    steps: int = 500,
) -> dict:
    """Train a small mixture on the four languages: two losses by their factors, the bias by its step gamma.

    The log adds, for every mixture layer: MaxVio in every fifth batch as [step, MaxVio], MaxVio on held-out text and
    the mean bias as [step, MaxVio, bias]; at the end the biases and `balance_report`. Its training loss is the task's.
    """
    windows, domain_idx = domain_windows(DOMAINS, 6600, 48, seed=seed)
    train, valid, valid_idx = windows[:6000], windows[6000:], domain_idx[6000:]
    torch.manual_seed(seed)
    started = time.perf_counter()
    config = ModelConfig.preset("nano", **BALANCE_MODEL, first_k_dense_replace=dense_layers)
    model = LanguageModel(config, feed_forward=moe_feed_forward)
    balancer, task, in_batch, held_out = BiasBalancer(model, gamma), [], [], []

    def loss_fn(model, batch):
        with record_routing(model) as routings:
            loss = next_token_loss(model, batch)
        balancer.observe(routings)
        task.append(loss.item())
        return loss + balance_penalty(routings, auxiliary, sequence, len(batch))

    def after_step(step, loss):
        violations = [round(value, 3) for value in balancer.step()]
        if (step + 1) % 5 == 0:
            in_batch.append([step + 1, violations])
        if (step + 1) % 50 == 0:
            report = balance_report(model, valid[::2], valid_idx[::2])
            bias = [round(gate.e_score_correction_bias.mean().item(), 4) for gate in balancer.gates]
            held_out.append([step + 1, report["held_out_max_violation"], bias])

    fit(model, Batches(train, 32, seed), steps, loss_fn=loss_fn, after_step=after_step, progress=False)
    run = summary(variant, seed, model, task, started)
    run |= {"auxiliary": auxiliary, "sequence": sequence, "gamma": gamma, "max_violation": in_batch}
    run |= {"held_out": held_out, "valid_loss": round(mean_loss(model, valid), 4)}
    run["bias"] = [[round(value, 4) for value in gate.e_score_correction_bias.tolist()] for gate in balancer.gates]
    return run | balance_report(model, valid, valid_idx)


def balance_runs(seeds: int = 3, steps: int = 500) -> Iterator[dict]:
    """Every way of balancing, the same data and the same first weights for each seed."""
    for seed in range(seeds):
        for variant, options in BALANCING.items():
            yield balance_run(variant, seed, **options, steps=steps)


def gamma_runs(seeds: int = 3, steps: int = 500) -> Iterator[dict]:
    """The bias update at four speeds."""
    for seed in range(seeds):
        for gamma in (0.0001, 0.001, 0.01, 0.1):
            yield balance_run(f"{gamma:g}", seed, gamma=gamma, steps=steps)


EXPERIMENTS: dict[str, Callable] = {
    "attention": attention_runs,
    "balance": balance_runs,
    "gamma": gamma_runs,
    "fp8": fp8_runs,
    "mtp": mtp_runs,
    "dense": dense_runs,
    "fim": fim_runs,
    "gate": gate_runs,
    "bias_speed": speed_of_bias_runs,
    "nano": nano_runs,
    "mini": mini_runs,
    "plain": plain_runs,
    "training_speed": training_speed_runs,
}


def run_experiment(
    name: str,
    folder: str | os.PathLike,
    on_run: Callable[[dict], None] = lambda run: None,
    later: dict[str, Callable] | None = None,
) -> Path:
    """Run a named experiment and log all its runs to FOLDER/NAME.json, whole or not at all.

    later: the experiments of chapters after this one, by name.
    """
    known = EXPERIMENTS | (later or {})
    if name not in known:
        raise ValueError(f"unknown experiment {name!r}; choose one of {', '.join(known)}")
    runs = []
    for run in known[name]():
        runs.append(run)
        on_run(run)
    machine = {"system": platform.system(), "processor": platform.machine(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    file = Path(folder) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"experiment": name, "machine": machine, "versions": versions, "runs": runs})
    return file
