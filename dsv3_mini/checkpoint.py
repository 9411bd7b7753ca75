"""DeepSeek-V3 put together, and the published checkpoint layout: read, written, and refused when it is damaged.

Generated from chapters/10_full_model.ipynb; edit the chapter, not this file.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3_mini.fp8_checkpoint import check_dtype, dequantise, stored_tensors

# Is it the same 671 billion?


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


# How does it go to disk, whole or not at all?


def make_folder(folder: str | os.PathLike) -> Path:
    """The folder, made if missing; NotADirectoryError if a file stands in its place."""
    folder = Path(folder)
    if file := next((part for part in (folder, *folder.parents) if part.is_file()), None):
        raise NotADirectoryError(f"{file} is a file; a folder is needed to write a checkpoint into")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(file: Path, value: object) -> None:
    """Write whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    partial.replace(file)


def split_shards(sizes: dict[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order; no shard exceeds the limit unless one tensor alone does."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def save_weights(
    state: dict[str, Tensor],
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    documents: dict[str, str] | None = None,
) -> None:
    """Write a model's state dict in the published layout: one `model.safetensors`, or shards and their index.

    dtype: what floating tensors are stored in, as `stored_tensors` says; None keeps them. documents: text files to
    write with them, by name. Everything is written under temporary names first; on any error those are removed and
    an older checkpoint is left whole.
    """
    check_dtype(dtype, saving=True)
    folder, tensors = make_folder(folder), published_state(state)
    stored = {name: stored_tensors(name, tensor.to("meta"), dtype) for name, tensor in tensors.items()}
    sizes = {name: sum(part.nbytes for part in parts.values()) for name, parts in stored.items()}
    shards, texts = split_shards(sizes, max_shard_bytes), dict(documents or {})
    if len(shards) > 1:
        files = {file: [part for name in names for part in stored[name]] for file, names in shards.items()}
        texts[INDEX] = index_text(files, sum(sizes.values()))
    partials = {file: folder / f"{file}.partial" for file in (*shards, *texts)}
    try:
        for file, names in shards.items():
            shard = [stored_tensors(name, tensors[name].detach().cpu(), dtype) for name in names]
            shard = {part: t.contiguous().clone() for parts in shard for part, t in parts.items()}
            save_file(shard, partials[file], metadata={"format": "pt"})
        for file, text in texts.items():
            partials[file].write_text(text, encoding="utf-8")
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise
    for file, partial in partials.items():
        partial.replace(folder / file)
    remove_other_weights(folder, partials.keys())


def index_text(shards: dict[str, list[str]], total_size: int) -> str:
    """The JSON of the index: which shard holds which tensor, and the bytes of all tensors."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2) + "\n"


def remove_other_weights(folder: Path, keep: Collection[str]) -> None:
    """Delete an older checkpoint and what a killed writer left; the index first, lest it point at missing shards."""
    shard = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
    old = [file for file in sorted(folder.iterdir()) if file.name == INDEX or shard.fullmatch(file.name)]
    for file in sorted(old, key=lambda file: file.name != INDEX):
        if file.name not in keep:
            file.unlink()


def find_folder(folder_or_hub_id: str | os.PathLike) -> Path:
    """A local folder, or the download of a Hugging Face hub id such as "deepseek-ai/DeepSeek-V3"."""
    if (folder := Path(folder_or_hub_id)).is_dir():
        return folder
    text = str(folder_or_hub_id)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no checkpoint folder at {text}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{text} is neither a folder nor a hub id that could be fetched: {reason}") from error


def open_tensors(file: Path):
    """Open one safetensors file; a torn one is a ValueError that names it."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name. ValueError unless every file is a plain name inside the folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a checkpoint index: {error!r}") from error
    for name, file in pairs:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} sends {name} to {file!r}, which is not the name of a file beside it")
    return weight_map


def locate_tensors(folder: Path) -> dict[str, Path]:
    """Published name -> the file that holds it, from the index, the single file, or all files there are."""
    if (index := folder / INDEX).is_file():
        weight_map = read_index(index)
        if missing := sorted({file for file in weight_map.values() if not (folder / file).is_file()}):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:3])}, which its index names")
        return {name: folder / file for name, file in weight_map.items()}
    single, found = folder / "model.safetensors", {}
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    for file in files:
        for name in open_tensors(file).keys():
            if found.setdefault(name, file) != file:
                raise ValueError(f"{name} is in {found[name].name} and in {file.name}, and {folder} has no index")
    return found


# What is in the FP8 files?


class Reader:
    """Reads tensors of a checkpoint folder by published name; float8 ones are dequantised with their block scales.

    One file is open at a time, so that the memory of a large checkpoint is not mapped beside the tensors made from it.
    """

    def __init__(self, folder: Path, block: int = 128):
        self.files, self.block, self.opened = locate_tensors(folder), block, (None, None)

    def raw(self, name: str) -> Tensor:
        """The tensor as stored."""
        file = self.files[name]
        if self.opened[0] != file:
            self.opened = (file, open_tensors(file))
        try:
            return self.opened[1].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} lacks {name}, which its index promises: {error}") from error

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor's values in `dtype`; None keeps the stored one, and gives bfloat16 for float8.

        Raises ValueError for integers, for float8 without scales, and for scales without float8.
        """
        tensor, scaled = self.raw(name), f"{name}_scale_inv" in self.files
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is stored as {tensor.dtype}; a floating type is needed")
        if (tensor.dtype == torch.float8_e4m3fn) != scaled or tensor.dtype.itemsize == 1 and not scaled:
            found = "has" if scaled else "lacks"
            raise ValueError(f"{name} is {tensor.dtype}, and the checkpoint {found} scales {name}_scale_inv")
        if scaled:
            return dequantise(name, tensor, self.raw(f"{name}_scale_inv"), self.block, dtype or torch.bfloat16)
        return tensor if dtype is None else tensor.to(dtype)


def load_weights(
    state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None = None, ignore: tuple[str, ...] = (), device="cpu"
) -> dict[str, Tensor]:
    """Fill the shapes of `state` (tensors on the meta device will do) from a folder in the published layout.

    dtype: of floating tensors in the result (routing biases stay float32); None keeps what is stored, dequantised
    to bfloat16 where it is float8. ignore: name prefixes that the folder may hold though the model does not.
    A tensor that `state` holds under two names is kept once. Raises ValueError naming every missing, unexpected or
    misshapen tensor, the first that holds NaN or infinity, and copies that differ.
    """
    check_dtype(dtype)
    reader, loaded, first_names = Reader(folder), {}, {}
    parts = {name: list(published_parts(name, tensor)) for name, tensor in state.items()}
    check_names({part for found in parts.values() for part, _ in found}, reader.files.keys(), ignore)
    for name, found in parts.items():
        tensor = load_tensor(reader, name, state[name], found, dtype, device)
        first = first_names.setdefault(id(state[name]), name)
        if first != name and not torch.equal(tensor, loaded[first]):
            raise ValueError(f"{name} differs from {first}, whose copy it should be")
        loaded[name] = loaded[first] if first != name else tensor
    return loaded


def load_tensor(
    reader: Reader, name: str, like: Tensor, parts: list[tuple[str, tuple]], dtype: torch.dtype | None, device
) -> Tensor:
    """One tensor of the model, put together from its published parts."""
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    result = None
    for part, index in parts:
        piece, expected = reader.read(part, dtype), like[index].shape
        if piece.shape != expected:
            raise ValueError(f"{part} has shape {tuple(piece.shape)}, the config asks for {tuple(expected)}")
        if not all(extreme.isfinite() for extreme in piece.aminmax()):
            raise ValueError(f"{part} holds NaN or infinity")
        if result is None:
            result = torch.empty(like.shape, dtype=piece.dtype, device=device)
        result[index] = piece
    return result


def check_names(wanted: set[str], held: Collection[str], ignore: tuple[str, ...]) -> None:
    """Raise ValueError if the folder lacks tensors of the model, or holds others."""
    known = wanted | {f"{name}_scale_inv" for name in wanted}
    extra = {name for name in held if not name.endswith("rotary_emb.inv_freq") and not name.startswith(ignore)} - known
    problems = []
    for label, names in (("lacks", wanted - set(held)), ("has unexpected", extra)):
        if names:
            shown = ", ".join(sorted(names)[:3])
            problems.append(f"{label} {len(names)} tensors: {shown}{', …' if len(names) > 3 else ''}")
    if problems:
        raise ValueError("checkpoint " + "; ".join(problems))
