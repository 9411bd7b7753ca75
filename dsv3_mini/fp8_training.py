"""Training a small V3 in four precisions, and an AdamW that keeps less than float32.

Generated from chapters/07_fp8.ipynb; edit the chapter, not this file.
"""

import time
from collections.abc import Iterator

import torch
from torch import nn

from dsv3_mini.baseline import LanguageModel, fit, next_token_loss
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import DOMAIN_VOCAB_SIZE, DOMAINS, Batches, domain_windows
from dsv3_mini.fp8 import to_fp8
from dsv3_mini.mla import MLA
from dsv3_mini.moe import moe_feed_forward

# Does it train as well?


def build_model(variant: str, seed: int) -> nn.Module:
    """The small V3 of the experiment, the same first weights for every variant: "fp32", "nudged", "bf16" or "fp8".

    nudged: float32 with every first weight 1 + 1e-6 times as large. Tiles are 32 wide, half the hidden size.
    """
    if variant not in ("fp32", "nudged", "bf16", "fp8"):
        raise ValueError(f"unknown variant {variant!r}; choose fp32, nudged, bf16 or fp8")
    experts = dict(n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=64)
    shape = dict(vocab_size=DOMAIN_VOCAB_SIZE, hidden_size=64, num_hidden_layers=3, q_lora_rank=None, kv_lora_rank=32)
    config = ModelConfig.preset("nano", **shape, **experts, intermediate_size=192, initializer_range=0.02)
    torch.manual_seed(seed)
    model = LanguageModel(config, attention=MLA, feed_forward=moe_feed_forward)
    if variant == "nudged":
        with torch.no_grad():
            for p in model.parameters():
                p *= 1 + 1e-6
    return to_fp8(model, tile=32) if variant == "fp8" else model


def precision_run(variant: str, seed: int, steps: int = 200) -> dict:
    """Train `build_model(variant, seed)` on the four languages of chapter 01; the loss of every step in the log.

    "bf16" runs under torch's bfloat16 autocast, and so does "fp8" outside its FP8 products.
    """
    windows, _ = domain_windows(DOMAINS, 6000, 48, seed=seed)
    model, started = build_model(variant, seed), time.perf_counter()

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=variant in ("bf16", "fp8")):
            return next_token_loss(model, batch)

    losses = fit(model, Batches(windows, 32, seed), steps, loss_fn=loss_fn, progress=False)
    run = {"variant": variant, "seed": seed, "config": model.config.to_dict(), "steps": steps}
    return run | {"seconds": round(time.perf_counter() - started, 1), "losses": [round(x, 5) for x in losses]}


def fp8_runs(seeds: int = 3, steps: int = 200) -> Iterator[dict]:
    """Four precisions, the same data and the same first weights for each seed."""
    for seed in range(seeds):
        for variant in ("fp32", "nudged", "bf16", "fp8"):
            yield precision_run(variant, seed, steps)


# What may an optimizer forget?


class AdamW16(torch.optim.Optimizer):
    """AdamW that keeps its moments, and its weights between steps, in the types given (report section 3.3.3).

    The arithmetic of a step is float32; only what is kept until the next one is rounded to `moments` and `master`.
    """

    def __init__(
        self,
        params,
        lr: float,
        moments=torch.float32,
        master=torch.float32,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
    ):
        types = dict(moments=moments, master=master)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **types))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, grad = self.state[p], p.grad.float()
                if not state:
                    state.update(n=0, m=torch.zeros_like(p, dtype=group["moments"]))
                    state["v"] = torch.zeros_like(state["m"])
                beta1, beta2 = group["betas"]
                m = state["m"].float().lerp(grad, 1 - beta1)
                v = state["v"].float().lerp(grad.square(), 1 - beta2)
                state.update(n=state["n"] + 1, m=m.to(group["moments"]), v=v.to(group["moments"]))
                m, v = m / (1 - beta1 ** state["n"]), v / (1 - beta2 ** state["n"])
                decayed = p * (1 - group["lr"] * group["weight_decay"])
                p.copy_((decayed - group["lr"] * m / (v.sqrt() + group["eps"])).to(group["master"]))
