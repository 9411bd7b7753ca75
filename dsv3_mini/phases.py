"""The phases of a whole run, each a function that gets the folders of those before it and fills one of its own.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

import copy
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3_mini.balance import expert_load
from dsv3_mini.checkpoint import write_json
from dsv3_mini.data import encode, pack, train_tokenizer
from dsv3_mini.dataset import read_sources
from dsv3_mini.decode import DecodePlan, Decoder
from dsv3_mini.distributed import continue_together, holdings, publish_together
from dsv3_mini.eplb import gpu_load, peak_over_mean, rebalance_experts
from dsv3_mini.evaluate import validation_loss
from dsv3_mini.fp8 import to_fp8
from dsv3_mini.generate import generate, load_tokenizer
from dsv3_mini.grid import assemble
from dsv3_mini.grpo import GRPO, GRPOOptions
from dsv3_mini.launch import from_first
from dsv3_mini.long_context import extend, long_windows, position_losses, stretch
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import record_routing
from dsv3_mini.recipe import TrainOptions, sequences_before
from dsv3_mini.resume import read_log
from dsv3_mini.rewards import by_rule
from dsv3_mini.sft import complete, exchange, fine_tune, pack_samples
from dsv3_mini.train import start_run
from dsv3_mini.verifiable import CHAT_TOKENS, is_correct, score, sums
from dsv3_mini.workers import Workers

# What stands behind what?


@dataclass(frozen=True)
class Plan:
    """The sizes of a whole run; as they stand, seconds a phase on two CPU cores."""

    seed: int = 0
    model: dict[str, Any] = field(default_factory=lambda: {"vocab_size": 512})  # what differs from preset nano
    max_bytes: int = 400_000  # of the standard library
    # pre-training, on pipeline * experts processes
    steps: int = 24
    batch_size: int = 16
    seq_len: int = 64
    pipeline: int = 2
    experts: int = 2
    # placement
    nodes: int = 2
    gpus: int = 4
    redundant: int = 8
    # context extension, in FP8
    factor: float = 4.0
    extend_steps: int = 6
    extend_batch: int = 4
    # post-training
    lessons: int = 160
    epochs: int = 8
    answer: int = 8  # tokens at most
    rewarded_steps: int = 12
    # serving
    new_tokens: int = 64

    def options(self) -> TrainOptions:
        """Those of pre-training: the report's recipe at this size."""
        sizes = {"steps": self.steps, "batch_size": self.batch_size, "seq_len": self.seq_len}
        rare = {"checkpoint_every": max(1, self.steps), "validate_every": max(1, self.steps)}
        return TrainOptions(model=self.model, max_bytes=self.max_bytes, seed=self.seed, gamma=0.02, **sizes, **rare)

    @property
    def tokens(self) -> int:
        """Tokens of pre-training, the ramp of the batch included."""
        return sequences_before(self.steps, self.steps, self.batch_size) * self.seq_len


def make_data(plan: Plan, folder: Path, out: Path) -> dict:
    """Chapter 01: a tokenizer, held-out windows (n, T + 1), and long windows to extend the context on."""
    options = plan.options()
    corpus = read_sources(options.data, options.max_bytes)
    tokenizer = train_tokenizer(corpus.train, options.config().vocab_size - len(CHAT_TOKENS))
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    tokenizer.save(str(out / "tokenizer.json"))
    documents, length = encode(tokenizer, corpus.valid), int(plan.factor * plan.seq_len)
    count = plan.extend_steps * plan.extend_batch
    windows = {
        "valid": pack(documents, plan.seq_len),
        "long": long_windows(tokenizer, corpus.train, length, count, plan.seed),
        "long valid": long_windows(tokenizer, corpus.valid, length, 8, plan.seed),
    }
    save_file(windows, out / "windows.safetensors")
    n_bytes = sum(len(text.encode()) for text in corpus.valid)
    return {"corpus": corpus.sha256, "bytes_per_token": round(n_bytes / sum(map(len, documents)), 3)}


def read_windows(folder: Path, name: str) -> Tensor:
    """Windows that `make_data` cut."""
    return load_file(folder / "tokenizer/windows.safetensors")[name]


def train_rank(plan: Plan, folder: Path, out: Path) -> dict:
    """What each process of pre-training does: take its place, train, publish; what it held and computed."""
    options, tokenizer = plan.options(), load_tokenizer(folder / "tokenizer")
    start = partial(start_run, options, out, tokenizer)
    member = assemble(options.config(), start, out, plan.pipeline, plan.experts, options.device)
    started, busy = time.perf_counter(), time.process_time()
    continue_together(member, progress=False)
    spent = {"seconds": time.perf_counter() - started, "processor": time.process_time() - busy}
    from_first(lambda: publish_together(member))
    return holdings(member) | {name: round(value, 3) for name, value in spent.items()}


def pretrain(plan: Plan, folder: Path, out: Path) -> dict:
    """Chapters 03 to 11: DualPipe stages times spread experts, biases and MTP, each rank a process."""
    n_ranks = plan.pipeline * plan.experts
    with Workers(n_ranks, timeout=600, preload=("dsv3_mini.distributed", "torch._dynamo")) as workers:
        held = workers.run(train_rank, [(plan, folder, out)] * n_ranks)
    log = read_log(out)
    ends = {name: [log[0][name], log[-1][name]] for name in ("loss", "mtp", "max_violation")}
    training = {"training_seconds": max(rank["seconds"] for rank in held), "ranks": held}
    return {"steps": len(log), "tokens": log[-1]["tokens"], **ends, "valid_loss": log[-1]["valid_loss"], **training}


def open_model(folder: Path) -> DeepSeekV3:
    """A model of any phase, in float32."""
    return DeepSeekV3.from_pretrained(folder, torch.float32)


def distance(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|."""
    return ((x - reference).norm() / reference.norm()).item()


@torch.no_grad()
def store(plan: Plan, folder: Path, out: Path) -> dict:
    """Chapter 10: the published FP8 layout, opened again by us, and its dequantised copy by transformers."""
    from transformers import AutoModelForCausalLM

    model, valid = open_model(folder / "pre-training"), read_windows(folder, "valid")
    model.save_pretrained(out, torch.float8_e4m3fn)
    opened = open_model(out)
    main = DeepSeekV3(model.config.replace(num_nextn_predict_layers=0))  # its class knows no prediction module
    main.load_state_dict(opened.state_dict(), strict=False)
    main.save_pretrained(out / "dequantised")
    twin = AutoModelForCausalLM.from_pretrained(out / "dequantised", dtype=torch.float32)
    logits = [net(valid[:4, :-1]) for net in (model, opened)]
    losses = [round(validation_loss(net, valid, 16), 4) for net in (model, opened)]
    return {
        "bytes": sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values()),
        "fp8_distance": distance(logits[1], logits[0]),
        "transformers_distance": distance(twin(valid[:4, :-1]).logits, logits[1]),
        "valid_loss": losses,
    }


@torch.no_grad()
def place(plan: Plan, folder: Path, out: Path) -> dict:
    """Chapter 09: the measured load of every expert, and where EPLB puts them; largest over mean load of a GPU."""
    model, valid = open_model(folder / "checkpoint"), read_windows(folder, "valid")
    config = model.config
    with record_routing(model) as routings:
        model(valid[:64, :-1])
    load = torch.stack([expert_load(r.indices, config.n_routed_experts) for r in routings])  # (L, E)
    n_places = config.n_routed_experts + plan.redundant
    places, _, _ = rebalance_experts(load, n_places, config.n_group, plan.nodes, plan.gpus)
    write_json(out / "placement.json", {"load": load.tolist(), "physical_to_logical": places.tolist()})
    in_order = load.unflatten(1, (plan.gpus, -1)).sum(-1).float()
    peaks = {"in_order": in_order, "placed": gpu_load(load, places, plan.gpus)}
    return {name: round(peak_over_mean(carried).mean().item(), 4) for name, carried in peaks.items()}


def extend_context(plan: Plan, folder: Path, out: Path) -> dict:
    """Chapters 07 and 12: slower clocks, a few steps on long windows in FP8; the loss at the far end of windows."""
    model, far = open_model(folder / "checkpoint"), read_windows(folder, "long valid")

    def far_loss(net: DeepSeekV3) -> float:
        return round(position_losses(net, far)[:, -plan.seq_len :].mean().item(), 4)

    stretched = to_fp8(stretch(copy.deepcopy(model), "yarn", plan.factor, plan.seq_len))
    losses = {"rope": far_loss(model), "yarn": far_loss(stretched)}
    peak = plan.options().learning_rate
    cost = extend(stretched, read_windows(folder, "long"), plan.extend_batch, peak / 2, peak / 30)
    losses["tuned"] = far_loss(stretched)
    stretched.save_pretrained(out, torch.float8_e4m3fn)
    return {"far_loss": losses, **cost}


def post_train(plan: Plan, folder: Path, out: Path) -> dict:
    """Chapter 14: worked examples, then rewards by a rule; share of right answers at temperature 1 after each."""
    model, tokenizer = open_model(folder / "context"), load_tokenizer(folder / "tokenizer")
    generator = torch.Generator().manual_seed(plan.seed)
    lessons, test = (sums(tokenizer, n, generator, n_terms=2) for n in (plan.lessons, 64))

    def right() -> float:
        answers = complete(model, [p.prompt for p in test], plan.answer, temperature=1.0, seed=plan.seed)
        return score(tokenizer, test, answers)[0]

    shares = {"base": right()}
    worked = [exchange(tokenizer, p.question, f"[{p.answer}]") for p in lessons]
    losses = fine_tune(model, pack_samples(worked, plan.seq_len), plan.epochs, seed=plan.seed)
    shares["sft"] = right()
    options = GRPOOptions(group_size=8, max_new_tokens=plan.answer)
    trainer = GRPO(model, by_rule(partial(is_correct, tokenizer)), options, plan.seed)
    rewards = [trainer.step(sums(tokenizer, 8, generator, n_terms=2))["reward"] for _ in range(plan.rewarded_steps)]
    shares["grpo"] = right()
    model.save_pretrained(out, torch.float8_e4m3fn)
    return {"right": shares, "sft_loss": [round(x, 4) for x in (losses[0], losses[-1])], "rewards": rewards}


def serve(plan: Plan, folder: Path, out: Path) -> dict:
    """Chapter 13: greedy decoding, plain and with drafts from the MTP layer, of the last two phases' models.

    ValueError if the drafts change the text.
    """
    tokenizer, prompt = load_tokenizer(folder / "tokenizer"), read_windows(folder, "valid")[:1, : plan.seq_len // 2]
    texts, found = {}, {}
    for name in ("context", "post-training"):
        prepared = DecodePlan(open_model(folder / name))
        plain, drafted = (generate(prepared, prompt, plan.new_tokens, speculative=s, stop=()) for s in (False, True))
        if not torch.equal(plain.tokens, drafted.tokens):
            raise ValueError(f"speculative decoding changed the text of the model {name!r}")
        texts[name] = tokenizer.decode(plain.tokens[0].tolist())
        found[name] = {"drafted": drafted.drafted, "accepted": drafted.accepted}
        found[name]["tokens_per_second"] = [round(plan.new_tokens / g.seconds, 1) for g in (plain, drafted)]
    write_json(out / "text.json", {"prompt": tokenizer.decode(prompt[0].tolist()), **texts})
    capacity = prompt.shape[1] + plan.new_tokens
    return {**found, "cache_bytes_per_token": Decoder(prepared, 1, capacity).n_bytes / capacity}


@torch.no_grad()
def run_kernels(plan: Plan, folder: Path, out: Path) -> dict:
    """Chapters 15 and 16: one forward and a few decoded tokens through interpreted Triton kernels, against torch's."""
    try:
        from dsv3_mini.kernels.layers import use_kernels
        from dsv3_mini.kernels.mla_decode import attend
    except ModuleNotFoundError as error:  # Triton has wheels for Linux only
        return {"skipped": str(error)}
    model, ids = open_model(folder / "post-training"), read_windows(folder, "valid")[:1, :9]
    tokens = [generate(DecodePlan(model, attend=way), ids, 3, stop=()).tokens for way in (None, attend)]
    plain = to_fp8(copy.deepcopy(model))(ids)
    kernels = use_kernels(to_fp8(model), interpret=True)(ids)
    return {"forward_distance": distance(kernels, plain), "same_tokens": torch.equal(*tokens)}
