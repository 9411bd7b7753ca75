"""A training run by the report's recipe: schedules, data, losses, checkpoints, and what a crash may not change.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsv3_mini.average import WeightAverage
from dsv3_mini.balance import BiasBalancer
from dsv3_mini.checkpoint import write_json
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import bits_per_byte
from dsv3_mini.dataset import Dataset, Stream, prepare
from dsv3_mini.evaluate import continue_ids, validation_loss
from dsv3_mini.losses import training_losses
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.recipe import Settings, TrainOptions, check_same_options, sequences_before, settings_at
from dsv3_mini.recompute import recompute_activations
from dsv3_mini.resume import Snapshot, cut_log, log_entry, read_log, stop_requests, unique_tensors, write_whole

# What does a run consist of?


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) in one fused kernel. Matrices decay, the embedding, head and gates among them; norms do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)


@dataclass
class Run:
    """A training run in a folder, at a step: everything that the next step reads or changes."""

    options: TrainOptions
    out: Path
    data: Dataset
    stream: Stream
    model: DeepSeekV3
    optimizer: torch.optim.AdamW
    balancer: BiasBalancer
    average: WeightAverage
    step: int = 0


def start_run(
    options: TrainOptions,
    out: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    build: Callable[[ModelConfig], nn.Module] = DeepSeekV3,
) -> Run:
    """Check the request, read the text, build the model from the seed. Nothing is written yet.

    build: what makes a model of a config; one without `mtp_layers` needs mtp_weight=0.
    """
    config, folder = options.config(), Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a folder is needed for the run")
    check_device(options.device)
    data = prepare(options, tokenizer)
    if options.batch_size > len(data.train):
        raise ValueError(f"batch_size={options.batch_size} exceeds the {len(data.train)} windows that the text gives")
    torch.manual_seed(options.seed)
    model = build(config)
    if options.embedding_std:
        nn.init.normal_(model.model.embed_tokens.weight, std=options.embedding_std)
    model.to(options.device)
    return Run(
        options=options,
        out=folder,
        data=data,
        stream=Stream(data.train, options.seed),
        model=model,
        optimizer=make_optimizer(model, options),
        balancer=BiasBalancer(model, options.gamma),
        average=WeightAverage(model, options.ema_horizon * options.steps),
    )


def check_device(device: str) -> None:
    """ValueError unless torch can compute there on this machine."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def total_loss(run: Run, windows: Tensor, settings: Settings) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of a batch, and its parts; the routing of the batch goes to the balancer, once."""
    options = run.options
    with recompute_activations(run.model) if options.recompute else nullcontext():
        losses, routings = training_losses(
            run.model, windows, settings.mtp_weight > 0, options.alpha > 0, getattr(torch, options.dtype)
        )
    run.balancer.observe(routings)
    factors = {"loss": 1.0, "mtp": settings.mtp_weight, "balance": options.alpha}
    return sum(factors[name] * loss for name, loss in losses.items()), losses


def train_step(run: Run) -> dict[str, float]:
    """One update of the weights, their average and, from the same batch's load, the routing biases; gives a log line.

    FloatingPointError when loss or gradient stop being finite; weights and biases are then those of the step before.
    """
    options, settings, started = run.options, settings_at(run.step, run.options), time.perf_counter()
    first = sequences_before(run.step, options.steps, options.batch_size)
    windows = run.stream.take(first, settings.batch_size).to(options.device)
    total, losses = total_loss(run, windows, settings)
    run.optimizer.zero_grad()
    total.backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), options.clip or float("inf"), foreach=True)
    if not torch.isfinite(total + norm):
        run.balancer.loads = None
        raise FloatingPointError(
            f"step {run.step + 1}: loss {losses['loss'].item()}, gradient norm {norm.item()}; the weights were left "
            f"as they were. A lower learning rate than {options.learning_rate:g} may help"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = settings.learning_rate
    run.optimizer.step()
    run.balancer.gamma = settings.gamma
    violation = max(run.balancer.step(), default=0.0)
    run.step += 1
    run.average.update(run.step)
    return log_entry(run.step, options, losses, norm, violation, time.perf_counter() - started)


def validate(run: Run) -> dict[str, float]:
    """Validation loss in nats a token and in bits per byte, of the weights and of their average, for the log."""
    windows, batch = run.data.valid.to(run.options.device), run.options.batch_size
    loss = validation_loss(run.model, windows, batch)
    with run.average.in_place():
        averaged = validation_loss(run.model, windows, batch)
    bits = {"valid_bits_per_byte": loss, "valid_ema_bits_per_byte": averaged}
    per_byte = {name: round(bits_per_byte(value, 1, run.data.bytes_per_token), 5) for name, value in bits.items()}
    return {"valid_loss": round(loss, 5), **per_byte}


# What must survive a crash?


def save_run(run: Run) -> None:
    """Weights, biases, moments, average, position and random state to OUT/resume.safetensors."""
    tensors = {f"model.{name}": tensor for name, tensor in unique_tensors(run.model).items()}
    tensors |= {f"average.{name}": tensor for name, tensor in run.average.values.items()}
    for name, parameter in run.model.named_parameters():
        tensors |= {f"{key}.{name}": torch.as_tensor(value) for key, value in run.optimizer.state[parameter].items()}
    tensors["random_state"] = torch.get_rng_state()
    tokenizer = run.data.tokenizer.to_str()
    Snapshot(run.step, run.options, run.data.corpus.sha256, tokenizer, tensors).save(run.out)


def load_run(
    out: str | os.PathLike, options: TrainOptions | None = None, build: Callable[[ModelConfig], nn.Module] = DeepSeekV3
) -> Run:
    """The run of a folder as its last checkpoint left it; log lines written after that are cut off.

    options: what the caller believes that the run was started with; ValueError if it was not, or if the text changed.
    build: as in `start_run`.
    """
    folder = Path(out)
    snapshot = Snapshot.load(folder)
    check_same_options(options or snapshot.options, snapshot.options)
    run = start_run(snapshot.options, folder, Tokenizer.from_str(snapshot.tokenizer), build)
    if run.data.corpus.sha256 != snapshot.corpus:
        raise ValueError(f"{folder}: the text of {run.options.data} has changed since the checkpoint; resume needs it")
    targets = unique_tensors(run.model) | {f"average {k}": v for k, v in run.average.values.items()}
    sources = snapshot.group("model.") | {f"average {k}": v for k, v in snapshot.group("average.").items()}
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(sources[name])
    moments = {key: snapshot.group(f"{key}.") for key in ("step", "exp_avg", "exp_avg_sq")}
    for name, parameter in run.model.named_parameters():
        if name in moments["step"]:
            run.optimizer.state[parameter] = {key: values[name].to(parameter.device) for key, values in moments.items()}
    torch.set_rng_state(snapshot.tensors["random_state"])
    run.step = snapshot.step
    cut_log(folder / "log.jsonl", run.step)
    return run


def continue_run(run: Run, progress: bool = True) -> None:
    """Train to the last step, logging each; checkpoint every so often and, between two steps, when asked to stop.

    A SIGINT or SIGTERM becomes KeyboardInterrupt once the checkpoint is written.
    """
    options = run.options
    run.out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=options.steps, initial=run.step, disable=not progress, unit="step")
    with bar, stop_requests() as requests, open(run.out / "log.jsonl", "a", encoding="utf-8") as log:
        while run.step < options.steps:
            entry = train_step(run)
            if run.step == options.steps or run.step % options.validate_every == 0:
                entry |= validate(run)
            log.write(json.dumps(entry) + "\n")
            log.flush()
            if requests or run.step == options.steps or run.step % options.checkpoint_every == 0:
                save_run(run)
            if requests:
                raise KeyboardInterrupt
            bar.update()
            bits = f", valid {entry['valid_bits_per_byte']:.3f} bits/byte" if "valid_loss" in entry else ""
            bar.set_postfix_str(f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:.0f} tokens/s{bits}")


def publish(run: Run, dtype: torch.dtype | None = None) -> None:
    """Write config, weights, tokenizer and what transformers' Auto classes ask for into the run's folder."""
    config, tokenizer = run.model.config, run.data.tokenizer
    begin, end = (tokenizer.id_to_token(i) for i in (config.bos_token_id, config.eos_token_id))
    special = {"bos_token": begin, "eos_token": end, "pad_token": end, "clean_up_tokenization_spaces": False}
    limit = {"model_max_length": config.max_position_embeddings, "tokenizer_class": "PreTrainedTokenizerFast"}
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.eos_token_id,
    }
    run.model.save_pretrained(run.out, dtype)
    write_whole(run.out / "tokenizer.json", lambda partial: tokenizer.save(str(partial)))
    write_json(run.out / "tokenizer_config.json", special | limit)
    write_json(run.out / "generation_config.json", {**ids, "do_sample": False})
    write_json(run.out / "run.json", describe(run))


def describe(run: Run) -> dict:
    """What repeats the run, and what it took: options, text, versions, machine, seconds of all its steps."""
    entries = read_log(run.out)
    new_tokens = [b - a for a, b in pairwise([0, *(entry["tokens"] for entry in entries)])]
    size = {split: sum(len(text.encode()) for text in getattr(run.data.corpus, split)) for split in ("train", "valid")}
    return {
        "options": asdict(run.options),
        "corpus": {"name": run.data.corpus.name, "sha256": run.data.corpus.sha256, "bytes": size},
        "tokens": entries[-1]["tokens"] if entries else 0,
        "seconds": round(sum(n / entry["tokens_per_second"] for n, entry in zip(new_tokens, entries, strict=True)), 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }


def train(
    options: TrainOptions | None,
    out: str | os.PathLike,
    resume: bool = False,
    progress: bool = True,
    save_dtype: torch.dtype | None = None,
) -> DeepSeekV3:
    """Train, or continue, a model in folder `out`; it ends with the published layout and tokenizer.json in it.

    ValueError if `out` holds a run that is not to be resumed, or was started with other options than those given.
    """
    if not resume and (Path(out) / "log.jsonl").exists():
        raise ValueError(f"{out} already holds a run: pass --resume to continue it, or name another folder")
    run = load_run(out, options) if resume else start_run(options or TrainOptions(), out)
    continue_run(run, progress)
    publish(run, save_dtype)
    return run.model


def show_result(model: DeepSeekV3, out: str | os.PathLike, prompt: str = "def ", new_tokens: int = 60) -> str:
    """For the terminal: the loss curve in one line, the score on fresh text, and how a prompt goes on."""
    entries = read_log(out)
    if not entries:
        return f"wrote an untrained model to {out}"
    losses = [entry["loss"] for entry in entries]
    means = [
        sum(part) / len(part)
        for i in range(40)
        if (part := losses[i * len(losses) // 40 : (i + 1) * len(losses) // 40])
    ]
    low, high = min(means), max(means)
    curve = "".join("▁▂▃▄▅▆▇█"[int(7.99 * (mean - low) / max(high - low, 1e-9))] for mean in means)
    tokenizer = Tokenizer.from_file(str(Path(out) / "tokenizer.json"))
    new = continue_ids(model, tokenizer.encode(prompt).ids, new_tokens, temperature=0.7)
    bits = entries[-1]["valid_bits_per_byte"]
    return (
        f"loss {losses[0]:.2f} {curve} {means[-1]:.2f}, {bits:.3f} bits/byte on fresh text\n"
        f"{prompt}{tokenizer.decode(new)}\n"
        f"wrote {out}: config.json, model.safetensors, tokenizer.json, log.jsonl"
    )
