"""What a training step reaches, beside transformers and a plain matrix product, and where its time goes.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from dsv3_mini.accounting import flops_per_token
from dsv3_mini.config import ModelConfig
from dsv3_mini.losses import training_losses
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.peer import time_in_turn, transformers_twin
from dsv3_mini.recipe import TrainOptions
from dsv3_mini.train import make_optimizer

# How were the comparisons run?


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


def clock() -> float:
    """Seconds: of the processor where one thread works, so that other programs do not count, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(step: Callable[[], int]) -> Callable[[], tuple[int, float]]:
    """A side of `time_in_turn` that counts the seconds of `clock`."""

    def work() -> tuple[int, float]:
        started = clock()
        return step(), clock() - started

    return work


def matmul_rate(dtype: torch.dtype, size: int = 1024, rounds: int = 20) -> float:
    """FLOP/s of a square matrix product, the best of some rounds."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        started = clock()
        a @ b
        best = min(best, clock() - started)
    return 2 * size**3 / best


OPERATIONS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "softmax over the vocabulary": ("log_softmax", "nll_loss", "aten::exp_"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index", "aten::_index", "aten::fill_", "embedding_bag"),
    "optimizer": ("adamw", "AdamW", "_foreach", "aten::addcmul_", "aten::addcdiv_", "aten::lerp_"),
}


def where_time_goes(step: Callable[[], int]) -> dict[str, float]:
    """Share of a step's time in each kind of operation, after one to warm up; what no kind claims is the rest."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    spent = dict.fromkeys((*OPERATIONS, "rest"), 0.0)
    for event in profiler.key_averages():
        kinds = [kind for kind, names in OPERATIONS.items() if any(name in event.key for name in names)]
        spent[kinds[0] if kinds else "rest"] += event.self_cpu_time_total
    return {kind: round(microseconds / sum(spent.values()), 4) for kind, microseconds in spent.items()}


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
    speed, rate = time_in_turn({name: timed(step) for name, step in sides.items()}, rounds), matmul_rate(kind)
    flops = flops_per_token(config, seq_len, training=True) * speed["ours"]
    speed |= {"ratio": speed["ours"] / speed["transformers"], "utilisation": flops / rate}
    speed |= {"flops_per_second": flops, "matmul_flops_per_second": rate}
    measured = {name: round(value, 3) for name, value in speed.items()}
    return measured | {"profile": {name: where_time_goes(step) for name, step in sides.items()}}


def training_speed_runs() -> Iterator[dict]:
    """Both presets, both dtypes."""
    for preset in ("nano", "mini"):
        for dtype in ("float32", "bfloat16"):
            started, speed = time.perf_counter(), training_speed(preset, dtype, rounds=5)
            seconds = round(time.perf_counter() - started, 1)
            yield {"variant": f"{preset} {dtype}", "seed": 0, "seconds": seconds, **speed}
