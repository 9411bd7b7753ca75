"""The trainer on many processes: DualPipe stages, spread experts, replicas with sharded moments.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from tqdm.auto import tqdm

from dsv3_mini.data import bits_per_byte
from dsv3_mini.grid import Member, assemble, deal, owned
from dsv3_mini.launch import from_first, raise_everywhere
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.recipe import Settings, TrainOptions, check_same_options, sequences_before, settings_at
from dsv3_mini.resume import cut_log, log_entry, stop_requests, unique_tensors
from dsv3_mini.sharded import load_tensors, read_document, save_checkpoint
from dsv3_mini.train import Run, publish, start_run

# And on several machines?


def sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add up the gradients over all ranks of a group, in one message."""
    sizes = [p.numel() for p in parameters]
    total = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(total, group=group)
    for p, grad in zip(parameters, total.split(sizes), strict=True):
        p.grad = grad.view_as(p)


def squared_norm(member: Member) -> Tensor:
    """This rank's part of the squared norm of the whole gradient: of tensors with copies, the first holder's counts."""
    mine = [p.grad for part, group in member.copies() if dist.get_rank(group) == 0 for p in part.values()]
    device = member.options.device
    return sum((grad.double().square().sum() for grad in mine), torch.zeros((), dtype=torch.float64, device=device))


def distributed_gradient(member: Member, settings: Settings) -> tuple[dict[str, Tensor], Tensor]:
    """The batch's losses and the norm of its gradient, which is summed over all copies and clipped by that norm."""
    options, grid, pipeline = member.options, member.grid, member.pipeline
    first = sequences_before(member.step, options.steps, options.batch_size)
    windows = member.stream.take(first, settings.batch_size)
    for stage in member.stages:
        stage.begin(options, settings, pipeline.n_chunks)
    for p in pipeline.parameters.values():
        p.grad = None
    pipeline.replay(deal(windows, pipeline.n_chunks, grid.n_shares, grid.share).to(options.device))
    for parameters, group in member.copies():
        sum_gradients(list(parameters.values()), group)
    numbers = torch.stack([*sum(stage.parts for stage in member.stages), squared_norm(member)])
    dist.all_reduce(numbers)
    norm = numbers[3].sqrt()
    grads = list(pipeline.parameters.values())
    nn.utils.clip_grads_with_norm_(grads, options.clip or float("inf"), norm.float(), foreach=True)
    used = {"loss": True, "mtp": options.mtp_weight > 0, "balance": options.alpha > 0}
    return {name: value for (name, use), value in zip(used.items(), numbers, strict=False) if use}, norm


def distributed_step(member: Member) -> dict[str, float]:
    """`train_step` on all processes at once; the same log line on every rank."""
    options, settings, started = member.options, settings_at(member.step, member.options), time.perf_counter()
    losses, norm = distributed_gradient(member, settings)
    total = losses["loss"] + settings.mtp_weight * losses.get("mtp", 0.0) + norm
    if not torch.isfinite(total):
        for stage in member.stages:
            stage.balancer.loads = None
        error = FloatingPointError(
            f"step {member.step + 1}: loss {losses['loss'].item()}, gradient norm {norm.item()}; the weights were left "
            f"as they were. A lower learning rate than {options.learning_rate:g} may help"
        )
        raise_everywhere(error)
    for optimizer in member.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate
        optimizer.step()
    violations = []
    for stage in member.stages:
        stage.balancer.gamma = settings.gamma
        violations += stage.balancer.step()
    member.step += 1
    member.average.update(member.step)
    violation = torch.tensor(max(violations, default=0.0), dtype=torch.float64)
    dist.all_reduce(violation, dist.ReduceOp.MAX)
    return log_entry(member.step, options, losses, norm, violation.item(), time.perf_counter() - started)


@torch.no_grad()
def pipeline_validation_loss(member: Member, max_windows: int = 64) -> float:
    """`validation_loss` forward through the stages: each share of the windows goes down the ranks of its pipeline."""
    grid, chosen = member.grid, member.valid[:: max(1, len(member.valid) // max_windows)]
    group, stage = grid.mesh.get_group("pipeline"), member.pipeline.stages[0]
    peers, nats = dist.get_process_group_ranks(group), torch.zeros((), dtype=torch.float64)
    n_chunks = -(-len(chosen) // (grid.n_shares * member.options.batch_size))
    for windows in deal(chosen, n_chunks, grid.n_shares, grid.share).to(member.options.device):
        real, x = windows[:, 0] >= 0, None
        if not stage.is_first:
            x = next(stage.parameters()).new_empty(*windows[:, 1:].shape, stage.hidden_size)
            dist.recv(x, peers[grid.stage - 1])
        h = stage.blocks(x, windows.clamp(min=0))  # (B, T, D)
        if stage.is_last:
            logits = stage.lm_head(stage.model.norm(h))[real]
            nats += F.cross_entropy(logits.flatten(0, 1), windows[real, 1:].flatten(), reduction="sum").cpu()
        else:
            dist.send(h, peers[grid.stage + 1])
    dist.all_reduce(nats)
    return nats.item() / chosen[:, 1:].numel()


def distributed_validate(member: Member) -> dict[str, float]:
    """`validate` on all processes at once."""
    loss = pipeline_validation_loss(member)
    with member.average.in_place():
        averaged = pipeline_validation_loss(member)
    bits = {"valid_bits_per_byte": loss, "valid_ema_bits_per_byte": averaged}
    per_byte = {name: round(bits_per_byte(value, 1, member.bytes_per_token), 5) for name, value in bits.items()}
    return {"valid_loss": round(loss, 5), **per_byte}


def tensors_of(member: Member) -> dict[str, Tensor]:
    """What this rank adds to a checkpoint, and fills from one: weights, biases, their average, the moments it owns."""
    named = {name: t for stage in member.stages for name, t in unique_tensors(stage).items()}
    tensors = {f"model.{name}": t for name, t in named.items()}
    tensors |= {f"average.{name.partition('.')[2]}": t for name, t in member.average.values.items()}
    names = {p: name for name, p in (member.dense | member.routed).items()}
    for optimizer in member.optimizers:
        for p in owned(optimizer):
            tensors |= {f"{key}.{names[p]}": optimizer.optim.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
    tensors = {name: t.detach() for name, t in tensors.items()}
    if member.grid.n_experts == 1:
        return tensors
    mesh = member.grid.mesh["experts"]
    return {k: DTensor.from_local(t, mesh, [Shard(0)]) if ".experts." in k else t for k, t in tensors.items()}


def save_member(member: Member) -> None:
    """A checkpoint of the whole run, by all processes, in OUT/checkpoints."""

    def document() -> dict:
        data = member.run.data
        text = {"corpus": data.corpus.sha256, "tokenizer": data.tokenizer.to_str()}
        return {"step": member.step, "options": asdict(member.options), **text}

    save_checkpoint(member.out / "checkpoints", member.step, tensors_of(member), document)


def load_member(member: Member, step: int) -> None:
    """Take up the run at the step of its last checkpoint, whatever the number of processes that wrote it."""
    load_tensors(member.out / "checkpoints", tensors_of(member))
    for optimizer in member.optimizers:
        for p in owned(optimizer):
            optimizer.optim.state[p]["step"].fill_(step)
    member.step = step


def restart(folder: Path, options: TrainOptions | None, document: dict) -> Run:
    """On rank 0: the run that a checkpoint's document describes, without its weights; later log lines are cut off."""
    stored = TrainOptions(**document["options"])
    check_same_options(options or stored, stored)
    run = start_run(stored, folder, Tokenizer.from_str(document["tokenizer"]))
    if run.data.corpus.sha256 != document["corpus"]:
        raise ValueError(f"{folder}: the text of {stored.data} has changed since the checkpoint; resume needs it")
    cut_log(folder / "log.jsonl", document["step"])
    return run


def continue_together(member: Member, progress: bool = True) -> None:
    """`continue_run` on all processes: rank 0 logs, all write checkpoints, and a signal to one stops all."""
    options, first = member.options, member.run is not None
    from_first(lambda: member.out.mkdir(parents=True, exist_ok=True))
    bar = tqdm(total=options.steps, initial=member.step, disable=not (progress and first), unit="step")
    log = open(member.out / "log.jsonl" if first else os.devnull, "a", encoding="utf-8")
    saved = -1
    with bar, log, stop_requests() as requests:
        while member.step < options.steps:
            entry = distributed_step(member)
            if member.step == options.steps or member.step % options.validate_every == 0:
                entry |= distributed_validate(member)
            log.write(json.dumps(entry) + "\n")
            log.flush()
            stop = torch.tensor(len(requests))
            dist.all_reduce(stop)
            if stop or member.step % options.checkpoint_every == 0:
                save_member(member)
                saved = member.step
            if stop:
                raise KeyboardInterrupt
            bar.update()
            bar.set_postfix_str(f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:.0f} tokens/s")
        if saved != member.step:
            save_member(member)


def publish_together(member: Member, dtype: torch.dtype | None = None) -> None:
    """On rank 0: the whole model from the last checkpoint, in the published layout."""
    model = DeepSeekV3(member.options.config())
    tensors = {f"model.{name}": tensor.detach() for name, tensor in unique_tensors(model).items()}
    load_tensors(member.out / "checkpoints", tensors, alone=True)
    member.run.model = model
    publish(member.run, dtype)


def holdings(member: Member) -> dict:
    """What this rank holds: its place, its layers, and bytes of weights, of its own moments, of all moments it uses."""
    stages = [[*stage.layer_idx, *stage.mtp_idx] for stage in member.pipeline.stages]
    weights = sum(p.nbytes for p in member.pipeline.parameters.values())
    moments = sum(2 * p.nbytes for optimizer in member.optimizers for p in owned(optimizer))
    place = dict(zip(member.grid.mesh.mesh_dim_names, member.grid.mesh.get_coordinate(), strict=True))
    return {**place, "layers": stages, "weights": weights, "moments": moments, "unsharded": 2 * weights}


def run_rank(*arguments, **options) -> dict:
    """What each process does for the chapter: train, then say what it holds."""
    return holdings(train_together(*arguments, **options))


def train_together(
    options: TrainOptions | None,
    out: str | os.PathLike,
    pipeline: int = 1,
    experts: int = 1,
    resume: bool = False,
    progress: bool = True,
    save_dtype: torch.dtype | None = None,
) -> Member:
    """`train` on all processes of the group: `pipeline` stages, `experts` ranks a set of experts, the rest data.

    It may be resumed on another number of processes. At the end rank 0 publishes the whole model, member.run.model.
    """
    folder = Path(out)

    def begin() -> tuple[TrainOptions, dict | None]:
        if resume:
            document = read_document(folder / "checkpoints")
            return TrainOptions(**document["options"]), document
        if options and options.recompute:
            raise ValueError("recompute=True is for one process: a deferred weight gradient keeps what it would drop")
        if (folder / "log.jsonl").exists():
            raise ValueError(f"{out} already holds a run: pass --resume to continue it, or name another folder")
        return options or TrainOptions(), None

    stored, document = from_first(begin)

    def make() -> Run:
        return restart(folder, options, document) if resume else start_run(stored, folder)

    member = assemble(stored.config(), make, folder, pipeline, experts, stored.device)
    if resume:
        load_member(member, document["step"])
    continue_together(member, progress)
    from_first(lambda: publish_together(member, save_dtype))
    return member
