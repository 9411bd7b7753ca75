"""Files that are whole or absent, and everything in them that the next step needs.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv3_mini.recipe import TrainOptions, sequences_before, settings_at

# What does a run consist of?


def log_entry(
    step: int, options: TrainOptions, losses: dict[str, Tensor], norm: Tensor, violation: float, seconds: float
) -> dict[str, float]:
    """The log line of a step that is done: losses, norm of the gradient before clipping, MaxVio of the worst layer."""
    settings, n_sequences = settings_at(step - 1, options), sequences_before(step, options.steps, options.batch_size)
    entry = {"step": step, **{name: round(loss.item(), 5) for name, loss in losses.items()}}
    entry |= {"learning_rate": float(f"{settings.learning_rate:.4g}"), "gradient_norm": round(norm.item(), 4)}
    entry |= {"max_violation": round(violation, 4), "tokens": n_sequences * options.seq_len}
    return entry | {"tokens_per_second": round(settings.batch_size * options.seq_len / seconds, 1)}


# What must survive a crash?


def write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file of a temporary name, then rename it: `file` is the old one or the new one, never half.

    Raises OSError, naming the file, when the disk does not take it.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        write(partial)
        with open(partial, "rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        kept = "; the one before it is untouched" if file.exists() else ""
        raise OSError(f"{file} could not be written ({error}){kept}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next step needs, as named tensors and text; a file of it is safetensors alone."""

    step: int
    options: TrainOptions
    corpus: str  # digest of the text
    tokenizer: str  # its JSON
    tensors: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write FOLDER/resume.safetensors, whole or not at all."""
        meta = {"step": str(self.step), "options": json.dumps(asdict(self.options))}
        meta |= {"corpus": self.corpus, "tokenizer": self.tokenizer}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        write_whole(folder / "resume.safetensors", lambda partial: save_file(tensors, partial, metadata=meta))

    @classmethod
    def load(cls, folder: Path) -> "Snapshot":
        """Read it; FileNotFoundError if there is none, ValueError, naming the file, if it is torn or another file."""
        file = folder / "resume.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"nothing to resume: {file} does not exist")
        try:
            with safe_open(file, framework="pt") as handle:
                meta, tensors = handle.metadata(), {name: handle.get_tensor(name) for name in handle.keys()}
            options = TrainOptions(**json.loads(meta["options"]))
            return cls(int(meta["step"]), options, meta["corpus"], meta["tokenizer"], tensors)
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is not a whole checkpoint of a run: {error}") from error

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, which is cut off."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def cut_log(log: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint, and a torn last line."""
    if log.exists():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_whole(log, lambda partial: partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))


def read_log(out: str | os.PathLike) -> list[dict]:
    """The lines of OUT/log.jsonl."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with shared tensors (embedding and head inside the MTP layers) named once."""
    seen, state = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step; the second one is not waited for."""
    requests: list[int] = []

    def note(number, frame):
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
