"""Draft."""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsv3_mini.balance import BiasBalancer, sequence_balance_loss
from dsv3_mini.checkpoint import make_folder
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import Batches, bits_per_byte, encode, folder_corpus, pack, python_corpus, train_tokenizer
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import record_routing
from dsv3_mini.mtp import mtp_losses


@dataclass(frozen=True)
class TrainOptions:
    """What a run needs to be repeated: model, data, recipe, seed."""

    preset: str = "nano"
    data: str | None = None  # a folder of text; None is the standard library
    steps: int = 600
    batch_size: int = 16
    seq_len: int = 128
    learning_rate: float = 3e-3
    warmup: int = 30
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3  # lambda
    gamma: float = 0.001  # bias update speed
    alpha: float = 1e-4  # sequence-wise balance loss factor
    fim_rate: float = 0.1
    max_bytes: int | None = None
    seed: int = 0
    checkpoint_every: int = 200
    validate_every: int = 100

    def __post_init__(self):
        for name in ("batch_size", "seq_len", "checkpoint_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("steps", "warmup", "learning_rate", "mtp_weight", "gamma", "alpha", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"fim_rate={self.fim_rate} must lie between 0 and 1")


@dataclass(frozen=True)
class Dataset:
    """A tokenizer and the windows (n, seq_len + 1) that it cut from a corpus."""

    tokenizer: Tokenizer
    train: Tensor
    valid: Tensor
    bytes_per_token: float
    sha256: str


def prepare(options: TrainOptions, vocab_size: int) -> Dataset:
    """Read the corpus, train its tokenizer, cut both splits into windows; fill-in-the-middle in training only."""
    read = partial(folder_corpus, options.data) if options.data else python_corpus
    corpus = read(max_bytes=options.max_bytes)
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    train = pack(encode(tokenizer, corpus.train, fim_rate=options.fim_rate, seed=options.seed), options.seq_len)
    valid_documents = encode(tokenizer, corpus.valid)
    n_bytes = sum(len(text.encode()) for text in corpus.valid)
    bytes_per_token = n_bytes / max(1, sum(len(document) for document in valid_documents))
    valid = pack(valid_documents, options.seq_len)
    return Dataset(tokenizer, train, valid, bytes_per_token, corpus.sha256)


def learning_rate_at(step: int, options: TrainOptions) -> float:
    """Linear warm-up, constant, then a cosine over the last third down to a tenth."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    start = options.steps * 2 / 3
    decay = min(1.0, max(0.0, (step - start) / max(1.0, options.steps - start)))
    return options.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * decay))


def training_losses(model: DeepSeekV3, windows: Tensor, options: TrainOptions) -> tuple[dict[str, Tensor], list]:
    """Every part of the loss for windows (B, T + 1), and the routings of the main layers and MTP layers."""
    with record_routing(model) as routings:
        h = model.model(windows[:, :-1])  # (B, T, D)
        logits = model.lm_head(h)
        main = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        mtp = mtp_losses(model.mtp_layers, h, windows, model.model.rope) if options.mtp_weight else []
    top_k, batch = model.config.num_experts_per_tok, len(windows)
    losses = {"loss": main}
    if mtp:
        losses["mtp"] = torch.stack(mtp).mean()
    if routings and options.alpha:
        losses["balance"] = torch.stack([sequence_balance_loss(r.scores, top_k, batch) for r in routings]).mean()
    return losses, routings


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); matrices decay, gains of norms do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))


@torch.no_grad()
def validation_loss(model: DeepSeekV3, windows: Tensor, batch_size: int, max_windows: int = 128) -> float:
    """Mean nats a token of the main head over about `max_windows` windows, evenly spaced."""
    total, count = 0.0, 0
    for batch in windows[:: max(1, len(windows) // max_windows)].split(batch_size):
        logits = model(batch[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
    return total / count


@dataclass
class Run:
    """A training run in a folder, at a step: everything that the next step reads or changes."""

    options: TrainOptions
    out: Path
    data: Dataset
    batches: Batches
    model: DeepSeekV3
    optimizer: torch.optim.AdamW
    balancer: BiasBalancer
    step: int = 0


def start_run(options: TrainOptions, out: str | os.PathLike) -> Run:
    """Make the folder, read the text, build the model from the seed. Nothing is written yet."""
    folder, config = make_folder(out), ModelConfig.preset(options.preset)
    data = prepare(options, config.vocab_size)
    torch.manual_seed(options.seed)
    model = DeepSeekV3(config)
    batches = Batches(data.train, options.batch_size, options.seed)
    optimizer, balancer = make_optimizer(model, options), BiasBalancer(model, options.gamma)
    return Run(options, folder, data, batches, model, optimizer, balancer)


def train_step(run: Run) -> dict[str, float]:
    """One update of the weights and, from the same batch's load, of the routing biases; returns a log line.

    Raises FloatingPointError when loss or gradient stop being finite; the weights are then those of the step before.
    """
    options, started = run.options, time.perf_counter()
    windows = run.batches.batch(run.step)
    losses, routings = training_losses(run.model, windows, options)
    factors = {"loss": 1.0, "mtp": options.mtp_weight, "balance": options.alpha}
    run.optimizer.zero_grad()
    sum(factors[name] * loss for name, loss in losses.items()).backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), options.clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {run.step}: loss {losses['loss'].item()}, gradient norm {norm.item()}")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(run.step, options)
    run.optimizer.step()
    run.balancer.observe(routings)
    violation = max(run.balancer.step(), default=0.0)
    run.step += 1
    seconds, n_tokens = time.perf_counter() - started, windows[:, 1:].numel()
    entry = {"step": run.step, **{name: round(loss.item(), 5) for name, loss in losses.items()}}
    entry |= {"max_violation": round(violation, 4), "gradient_norm": round(norm.item(), 4)}
    return entry | {"tokens": run.step * n_tokens, "tokens_per_second": round(n_tokens / seconds, 1)}


def validate(run: Run) -> dict[str, float]:
    """Validation loss in nats a token and in bits per byte, for the log."""
    loss = validation_loss(run.model, run.data.valid, run.options.batch_size)
    bits = bits_per_byte(loss, 1, run.data.bytes_per_token)
    return {"valid_loss": round(loss, 5), "valid_bits_per_byte": round(bits, 5)}


def save_resume(run: Run) -> None:
    """Everything that the next step needs, in OUT/resume.safetensors, which appears whole or not at all."""
    tensors = {f"model.{name}": tensor for name, tensor in unique_state(run.model).items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    meta = {"step": str(run.step), "options": json.dumps(asdict(run.options)), "corpus": run.data.sha256}
    partial = run.out / "resume.safetensors.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=meta)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(run.out / "resume.safetensors")


def load_resume(run: Run) -> None:
    """Continue from OUT/resume.safetensors; log lines written after it are cut off."""
    tensors, meta = read_resume(run.out)
    if meta["corpus"] != run.data.sha256:
        raise ValueError(f"{run.out}: the text has changed since the checkpoint; resume needs the same files")
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    with torch.no_grad():
        for name, tensor in unique_state(run.model).items():
            tensor.copy_(weights[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    run.step = int(meta["step"])
    cut_log(run.out / "log.jsonl", run.step)


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with shared tensors (embedding and head inside the MTP layers) named once."""
    seen, state = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state


def read_resume(out: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of OUT/resume.safetensors; one clear error if it is missing or torn."""
    file = out / "resume.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"nothing to resume: {file} does not exist")
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata()
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole checkpoint: {error}") from error


def cut_log(log: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint."""
    if log.exists():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        partial = log.with_name(log.name + ".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(log)


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    partial = out / "tokenizer.json.partial"
    tokenizer.save(str(partial))
    partial.replace(out / "tokenizer.json")


def continue_run(run: Run, progress: bool = True) -> None:
    """Train to the last step, logging each; keep a resumable checkpoint, also when the run is interrupted."""
    options, bar = run.options, tqdm(total=run.options.steps, initial=run.step, disable=not progress, unit="step")
    with bar, open(run.out / "log.jsonl", "a", encoding="utf-8") as log:
        try:
            while run.step < options.steps:
                entry = train_step(run)
                if run.step == options.steps or run.step % options.validate_every == 0:
                    entry |= validate(run)
                log.write(json.dumps(entry) + "\n")
                log.flush()
                if run.step % options.checkpoint_every == 0:
                    save_resume(run)
                bar.update()
                bits = f", valid {entry['valid_bits_per_byte']:.3f} bits/byte" if "valid_loss" in entry else ""
                bar.set_postfix_str(f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:.0f} tokens/s{bits}")
        except KeyboardInterrupt:
            save_resume(run)
            raise
    save_resume(run)


def train(options: TrainOptions, out: str | os.PathLike, resume: bool = False, progress: bool = True) -> DeepSeekV3:
    """Train, or continue, a model in folder `out`; it ends with the published layout and tokenizer.json in it.

    A resumed run takes its checkpoint's own options. Raises ValueError if `out` already holds a run and `resume` is
    not asked for, FileNotFoundError if there is nothing to resume.
    """
    folder = make_folder(out)
    if resume:
        options = TrainOptions(**json.loads(read_resume(folder)[1]["options"]))
    elif (folder / "log.jsonl").exists():
        raise ValueError(f"{folder} already holds a run: pass --resume to continue it, or name another folder")
    run = start_run(options, folder)
    if resume:
        load_resume(run)
    continue_run(run, progress)
    run.model.save_pretrained(folder)
    save_tokenizer(run.data.tokenizer, folder)
    return run.model
