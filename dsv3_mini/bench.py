"""Training step and decoding against transformers on the same weights, and what a step must read.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from dsv3_mini.baseline import next_token_loss
from dsv3_mini.compiled import CompiledPlan
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import python_corpus, token_ids
from dsv3_mini.decode import DecodePlan
from dsv3_mini.decode_layers import MoEStep
from dsv3_mini.generate import Plan, generate, load_tokenizer
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.peer import time_in_turn, transformers_twin

# How fast is it?


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


def training_sides(config: ModelConfig) -> dict[str, Callable[[], int]]:
    """One training step of 8 windows of 256 tokens, of both implementations on the same weights."""
    torch.manual_seed(0)
    model = DeepSeekV3(config.replace(num_nextn_predict_layers=0))
    twin, windows = transformers_twin(model), torch.randint(5, config.vocab_size, (8, 257))
    return {
        "ours": training_step(model, model, windows),
        "transformers": training_step(twin, lambda ids: twin(ids, use_cache=False).logits, windows),
    }


def decoding_only(write: Callable[[int, Callable], object], new_tokens: int) -> Callable[[], tuple[int, float]]:
    """A side of `time_in_turn`: write(n, note) continues a prompt by n tokens and calls note at each of them.

    The clock runs from the third token on, so that no prefill is counted, of the main model or of the MTP layer.
    """

    def work() -> tuple[int, float]:
        times: list[float] = []
        write(new_tokens + 3, lambda *_: times.append(time.perf_counter()))
        return new_tokens, times[-1] - times[2]

    return work


class Listener:
    """What transformers' `generate` takes as a streamer: it is given the prompt (1, T) first, then each token (1,)."""

    def __init__(self, note: Callable):
        self.note = note

    def put(self, ids: torch.Tensor) -> None:
        if ids.dim() == 1:
            self.note()

    def end(self) -> None:
        pass


def decoding_sides(model: DeepSeekV3, prompt: torch.Tensor, new_tokens: int) -> dict[str, Callable]:
    """Greedy decoding of one prompt (1, T) by transformers, the plan and compiled loops, and with one draft a step.

    Drafts need a model with an MTP layer. Plans are made before the clock starts, as the twin is.
    """
    twin, plan, loops = transformers_twin(model), DecodePlan(model), CompiledPlan(model)

    def theirs(n: int, note: Callable) -> None:
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "streamer": Listener(note)}
        twin.generate(prompt, max_new_tokens=n, min_new_tokens=n, **options)

    def ours(plan: Plan, n_drafts: int) -> Callable:
        return lambda n, note: generate(plan, prompt, n, stop=(), speculative=n_drafts, on_token=note)

    writers = {"ours": ours(plan, 0), "transformers": theirs, "compiled": ours(loops, 0)}
    if model.mtp_layers:
        writers |= {"speculative": ours(plan, 1), "compiled speculative": ours(loops, 1)}
    return {name: decoding_only(write, new_tokens) for name, write in writers.items()}


def with_ratios(speeds: dict[str, float]) -> dict[str, float]:
    """The speeds, and each side's relative to transformers: "ratio" is ours, "compiled_ratio" the compiled loops'."""
    names = {"ours": "ratio"} | {side: f"{side.replace(' ', '_')}_ratio" for side in speeds if side != "ours"}
    return speeds | {names[s]: speed / speeds["transformers"] for s, speed in speeds.items() if s != "transformers"}


def bytes_per_token(plan: DecodePlan, context: int) -> dict[str, int]:
    """What one greedy step must read at least: weights of the main layers and head, and the latents cached so far."""
    weights = [plan.head]
    for attention, mlp in plan.layers:
        weights += [attention.down, attention.w_uk, attention.w_uv, attention.out]
        weights += [attention.q_up] if attention.q_up is not None else []
        if isinstance(mlp, MoEStep):
            n_used = plan.config.num_experts_per_tok + len(mlp.always)
            weights += [mlp.gate, *mlp.gate_up[-n_used:], *mlp.down[-n_used:]]
        else:
            weights += [mlp.up, mlp.down]
    c = plan.config
    per_position = len(plan.layers) * (c.kv_lora_rank + c.qk_rope_head_dim) * plan.head.itemsize
    return {"weights": sum(weight.nbytes for weight in weights), "cache": context * per_position}


def read_bandwidth(n_bytes: int, rounds: int = 15) -> float:
    """Bytes a second at which this machine sums a float32 tensor of `n_bytes`, the median of `rounds`."""
    numbers = torch.ones(n_bytes // 4)
    return time_in_turn({"sum": lambda: n_bytes * bool(numbers.sum() > 0)}, rounds)["sum"]


def compare_with_transformers(
    preset: str = "nano",
    rounds: int = 5,
    new_tokens: int = 64,
    checkpoint: str | os.PathLike | None = None,
    contexts: Sequence[int] = (64,),
) -> dict:
    """Training step and greedy decoding of both implementations on the same weights, float32, in turn.

    checkpoint: a trained folder instead of random weights of a preset, and real text as prompt; only then is
    speculation measured, since drafts of random weights are worth nothing. contexts: prompt lengths. ValueError for
    what does not fit the model.
    """
    if rounds < 1 or new_tokens < 1 or min(contexts, default=0) < 1:
        raise ValueError(f"{rounds=}, {new_tokens=} and contexts={list(contexts)} must be 1 or more")
    started, model = time.perf_counter(), open_model(preset, checkpoint)
    config = model.config
    if (longest := max(contexts) + new_tokens + 3) > config.max_position_embeddings:
        raise ValueError(f"{longest} positions are needed; max_position_embeddings is {config.max_position_embeddings}")
    measured = {"training step": with_ratios(time_in_turn(training_sides(config), rounds))}
    for context in contexts:
        prompt = bench_prompt(config, checkpoint, context)
        speeds = time_in_turn(decoding_sides(model, prompt, new_tokens), rounds)
        measured[f"greedy decoding at {context}"] = with_ratios(speeds)
        if model.mtp_layers:
            drafts = generate(model, prompt, new_tokens + 1, stop=(), speculative=True)
            measured[f"greedy decoding at {context}"]["acceptance"] = drafts.accepted / drafts.drafted
    plan = DecodePlan(model)
    needed = {str(context): bytes_per_token(plan, context) for context in contexts}
    bandwidth = read_bandwidth(needed[str(min(contexts))]["weights"])
    return {
        **{"preset": preset if checkpoint is None else str(checkpoint), "seed": 0, "config": config.to_dict()},
        **{"rounds": rounds, "new_tokens": new_tokens, "measured": measured},
        **{"bytes_per_token": needed, "bytes_per_second": bandwidth},
        **{"versions": versions(), "seconds": round(time.perf_counter() - started, 1)},
    }


def open_model(preset: str, checkpoint: str | os.PathLike | None) -> DeepSeekV3:
    """A trained folder in float32, or a preset with random weights and without the MTP layer they make useless."""
    if checkpoint is not None:
        return DeepSeekV3.from_pretrained(checkpoint, dtype=torch.float32).eval()
    config = ModelConfig.preset(preset, num_nextn_predict_layers=0, initializer_range=0.02)
    torch.manual_seed(0)
    return DeepSeekV3(config).eval()


def bench_prompt(config: ModelConfig, checkpoint: str | os.PathLike | None, context: int) -> torch.Tensor:
    """(1, context) tokens: Python that a trained folder has not read, or random ones."""
    if checkpoint is None:
        return torch.randint(5, config.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
    text = "\n".join(python_corpus(12_000_000).valid)[: 20 * context]
    return torch.tensor([token_ids(load_tokenizer(checkpoint), [text])[0][:context]])


def versions() -> dict[str, str | int]:
    """What a measured number depends on."""
    from transformers import __version__ as of_transformers

    libraries = {"python": platform.python_version(), "torch": torch.__version__, "transformers": of_transformers}
    return libraries | {"threads": torch.get_num_threads(), "machine": f"{platform.system()} {platform.machine()}"}
