"""Part of dsv3_mini; its chapter follows."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def published_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, tuple]]:
    """Where a tensor of the model stands in the published files: (published name, index into the tensor).

    Experts are stacked in memory and stored one by one; everything else has the same name on both sides.
    """
    stem, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        half = tensor.shape[1] // 2
        for i in range(tensor.shape[0]):
            yield f"{stem}.{i}.gate_proj.weight", (i, slice(None, half))
            yield f"{stem}.{i}.up_proj.weight", (i, slice(half, None))
    elif last == "down_proj":
        for i in range(tensor.shape[0]):
            yield f"{stem}.{i}.down_proj.weight", (i,)
    else:
        yield name, ()


def published_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the published names; the tensors are views."""
    return {part: tensor[index] for name, tensor in state.items() for part, index in published_parts(name, tensor)}


# Writing


def save_weights(
    state: dict[str, Tensor],
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model's state dict in the published layout: one `model.safetensors`, or shards and their index.

    dtype: what floating tensors are stored in (routing biases stay float32); None keeps them. Every file is written
    under a temporary name first; on any error those are removed and an older checkpoint is left whole.
    """
    folder = make_folder(folder)
    tensors = {name: stored(name, tensor, dtype) for name, tensor in published_state(state).items()}
    shards = split_shards({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_bytes)
    files = shard_names(len(shards))
    partials = [folder / f"{file}.partial" for file in files]
    try:
        for names, partial in zip(shards, partials, strict=True):
            save_file({name: tensors[name].contiguous().clone() for name in names}, partial, metadata={"format": "pt"})
    except BaseException:
        for partial in partials:
            partial.unlink(missing_ok=True)
        raise
    for stale in {*folder.glob("model*.safetensors"), folder / INDEX} - {folder / file for file in files}:
        stale.unlink(missing_ok=True)
    for partial, file in zip(partials, files, strict=True):
        partial.replace(folder / file)
    if len(files) > 1:
        weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor as it goes to disk."""
    keep = dtype is None or not tensor.is_floating_point() or name.endswith("e_score_correction_bias")
    return tensor.detach().cpu() if keep else tensor.detach().to("cpu", dtype)


def split_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds the limit unless one tensor alone does."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def shard_names(n: int) -> list[str]:
    """Hugging Face's names for one file or for several."""
    if n == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def make_folder(folder: str | os.PathLike) -> Path:
    """The folder, made if missing; NotADirectoryError if a file stands in its place."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a folder is needed to write a checkpoint into")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(file: Path, value: object) -> None:
    """Write whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    partial.replace(file)


# Reading


def find_folder(folder_or_hub_id: str | os.PathLike) -> Path:
    """A local folder, or the download of a Hugging Face hub id such as "deepseek-ai/DeepSeek-V3"."""
    if (folder := Path(folder_or_hub_id)).is_dir():
        return folder
    text = str(folder_or_hub_id)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no checkpoint folder at {text}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(text, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{text} is neither a folder nor a hub id that could be fetched: {reason}") from error


def locate_tensors(folder: Path) -> dict[str, Path]:
    """Published name -> the file that holds it, from the index or the single file."""
    if (index := folder / INDEX).is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not a checkpoint index: {error!r}") from error
        if missing := sorted({file for file in weight_map.values() if not (folder / file).is_file()}):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:3])}, which its index names")
        return {name: folder / file for name, file in weight_map.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    return {name: file for file in files for name in open_tensors(file).keys()}


def open_tensors(file: Path):
    """Open one safetensors file; a torn one is a ValueError that names it."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


class Reader:
    """Reads tensors of a checkpoint folder by published name; float8 ones are dequantised with their block scales."""

    def __init__(self, folder: Path, block: int = 128):
        self.files, self.block, self.handles = locate_tensors(folder), block, {}

    def raw(self, name: str) -> Tensor:
        file = self.files[name]
        if file not in self.handles:
            self.handles[file] = open_tensors(file)
        try:
            return self.handles[file].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} lacks {name}, which its index promises: {error}") from error

    def read(self, name: str) -> Tensor:
        """The tensor's values; w = w_q * scale for float8, whose scale is stored as `weight_scale_inv`."""
        tensor = self.raw(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        if f"{name}_scale_inv" not in self.files:
            raise ValueError(f"{name} is float8, and the checkpoint lacks its scales {name}_scale_inv")
        scale = self.raw(f"{name}_scale_inv").float()  # (rows / block, columns / block), rounded up
        scale = scale.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]


def load_weights(
    state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None = None, ignore: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Fill the shapes of `state` (tensors on the meta device will do) from a folder in the published layout.

    dtype: of floating tensors in the result (routing biases stay float32); None keeps what is stored, dequantised
    to bfloat16 where it is float8. ignore: name prefixes that the folder may hold though the model does not.
    Raises ValueError naming every missing, unexpected or misshapen tensor.
    """
    reader = Reader(folder)
    parts = {name: list(published_parts(name, tensor)) for name, tensor in state.items()}
    check_names({part for found in parts.values() for part, _ in found}, reader.files.keys(), ignore)
    loaded = {}
    for name, found in parts.items():
        pieces = [(part, index, reader.read(part)) for part, index in found]
        for part, index, piece in pieces:
            if piece.shape != (expected := state[name][index].shape):
                raise ValueError(f"{part} has shape {tuple(piece.shape)}, the config asks for {tuple(expected)}")
        kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype or pieces[0][2].dtype
        loaded[name] = torch.empty(state[name].shape, dtype=kind)
        for _, index, piece in pieces:
            loaded[name][index] = piece
    return loaded


def check_names(wanted: set[str], held, ignore: tuple[str, ...]) -> None:
    """Raise ValueError if the folder lacks tensors of the model, or holds others."""
    extra = {name for name in held if not name.endswith(("_scale_inv", "rotary_emb.inv_freq"))} - wanted
    problems = []
    for label, names in (("lacks", wanted - held), ("has unexpected", {n for n in extra if not n.startswith(ignore)})):
        if names:
            shown = ", ".join(sorted(names)[:3])
            problems.append(f"{label} {len(names)} tensors: {shown}{', …' if len(names) > 3 else ''}")
    if problems:
        raise ValueError("checkpoint " + "; ".join(problems))
