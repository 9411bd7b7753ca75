"""Checkpoints that many processes write together and any number of processes reads.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from dsv3_mini.checkpoint import write_json
from dsv3_mini.launch import from_first, raise_everywhere

# And on several machines?


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], document: Callable[[], dict]) -> None:
    """FOLDER/step-NNNNNNNN, written by all ranks under another name and then renamed; older ones are removed.

    Each rank writes one safetensors file; of equal tensors on several ranks one is written. A DTensor is a part of a
    larger tensor. document: made on rank 0, kept as JSON beside them. OSError on every rank if one cannot write.
    """
    whole = folder / f"step-{step:08d}"
    partial = whole.with_suffix(".partial")
    from_first(lambda: prepare_folder(partial))
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        from_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise_everywhere(OSError(f"{whole} could not be written by rank {rank} ({cause}); the one before it is whole"))
    from_first(lambda: finish_checkpoint(partial, whole, document()))


def prepare_folder(partial: Path) -> None:
    """An empty folder, whatever a killed run left there."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def finish_checkpoint(partial: Path, whole: Path, document: dict) -> None:
    """Rename the folder, so that it is there whole or not at all, then remove the checkpoints before it."""
    write_json(partial / "document.json", document)
    shutil.rmtree(whole, ignore_errors=True)
    partial.replace(whole)
    for old in whole.parent.glob("step-*"):
        if old != whole:
            doomed = old if old.suffix else old.replace(old.with_suffix(".partial"))
            shutil.rmtree(doomed)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder."""
    return max((path for path in folder.glob("step-*") if not path.suffix), default=None)


def read_document(folder: Path) -> dict:
    """What rank 0 wrote beside the tensors of the last checkpoint; FileNotFoundError if there is none."""
    if (path := last_checkpoint(folder)) is None:
        raise FileNotFoundError(f"nothing to resume: {folder} holds no checkpoint of several processes")
    try:
        return json.loads((path / "document.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}") from error


def load_tensors(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors, DTensors among them, from the last checkpoint, whoever wrote which part of them.

    All ranks must call it, unless `alone`. ValueError, naming the folder, if it lacks one or has another shape of it.
    """
    path = last_checkpoint(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nobody else takes part is meant so
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{path} is not a whole checkpoint of this run: {cause}") from error
