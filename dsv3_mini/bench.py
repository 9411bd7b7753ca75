"""Cached decoding, sampling, and speculative decoding that writes exactly what plain decoding would.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import platform
import time
from collections.abc import Callable

import torch
from torch import nn

from dsv3_mini.baseline import next_token_loss
from dsv3_mini.config import ModelConfig
from dsv3_mini.generate import generate
from dsv3_mini.model import DeepSeekV3

# How fast is it, beside transformers?


def transformers_twin(model: DeepSeekV3) -> nn.Module:
    """transformers' DeepseekV3ForCausalLM with the same weights; ImportError says how to get it."""
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError as error:
        raise ValueError("bench compares with transformers, which is missing: pip install transformers") from error
    twin = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict({**model.config.to_dict(), "torch_dtype": "float32"}))
    twin.load_state_dict({name: model.state_dict()[name] for name in twin.state_dict()})
    return twin


def time_in_turn(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens a second of each side, the median of `rounds` measured in turn after one warm-up."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            tokens = work()
            if round_:
                speeds[name].append(tokens / (time.perf_counter() - started))
    medians = {name: sorted(values)[len(values) // 2] for name, values in speeds.items()}
    return {**medians, "ratio": medians["ours"] / medians["transformers"]}


def training_step(model: nn.Module, forward: Callable, windows: torch.Tensor) -> Callable[[], int]:
    """A function that runs one step of AdamW on the next-token loss and returns its token count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> int:
        loss = next_token_loss(forward, windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return windows[:, 1:].numel()

    return step


def compare_with_transformers(preset: str = "nano", rounds: int = 5, new_tokens: int = 64) -> dict:
    """Training step and greedy decoding of both implementations on the same weights, float32, in turn."""
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be 1 or more")
    torch.manual_seed(0)
    config = ModelConfig.preset(preset, num_nextn_predict_layers=0, initializer_range=0.02, eos_token_id=None)
    model = DeepSeekV3(config)
    twin = transformers_twin(model)
    windows, prompt = torch.randint(5, config.vocab_size, (8, 257)), torch.randint(5, config.vocab_size, (1, 64))

    def ours() -> int:
        return generate(model, prompt, new_tokens).tokens.shape[1]

    def theirs() -> int:
        out = twin.generate(prompt, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
        return out.shape[1] - prompt.shape[1]

    decoding = time_in_turn({"ours": ours, "transformers": theirs}, rounds)
    steps = {
        "ours": training_step(model, model, windows),
        "transformers": training_step(twin, lambda ids: twin(ids, use_cache=False).logits, windows),
    }
    measured = {"training step": time_in_turn(steps, rounds), "greedy decoding": decoding}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"preset": preset, "rounds": rounds, "versions": versions, "measured": measured}
