"""Text turned into training batches: corpora, byte-level BPE, fill-in-the-middle, packing.

Generated from chapters/01_text_to_tokens.ipynb; edit the chapter, not this file.
"""

import hashlib
import math
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_mini.domains import DOMAIN_SYMBOLS as DOMAIN_SYMBOLS
from dsv3_mini.domains import DOMAIN_VOCAB_SIZE as DOMAIN_VOCAB_SIZE
from dsv3_mini.domains import DOMAINS as DOMAINS
from dsv3_mini.domains import domain_entropy as domain_entropy
from dsv3_mini.domains import domain_windows as domain_windows
from dsv3_mini.domains import draw_domain as draw_domain

# Where does text come from?


@dataclass(frozen=True)
class Corpus:
    """Whole documents, split by file. `sha256` is the digest of the texts, in order, and of the place of the split."""

    name: str
    train: list[str]
    valid: list[str]
    sha256: str


def read_folder(root: Path, patterns: Sequence[str], excluded: Sequence[str] = ()) -> dict[str, str]:
    """{relative path: text} of UTF-8 files, line ends untouched; bytes that are not UTF-8 become U+FFFD."""
    texts = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if any(fnmatch(file.name, pattern) for pattern in patterns) and file.is_file():
                texts[file.relative_to(root).as_posix()] = file.read_bytes().decode("utf-8", errors="replace")
    return texts


def digest(train: list[str], valid: list[str]) -> str:
    """SHA-256 over the digest of each text, in order, and over where training ends."""
    parts = [hashlib.sha256(text.encode()).digest() for text in (*train, *valid)]
    return hashlib.sha256(b"".join([len(train).to_bytes(8, "big"), *parts])).hexdigest()


def split_by_file(name: str, texts: dict[str, str], max_bytes: int | None = None) -> Corpus:
    """Split {relative path: text} by a hash of the path: about 5 % of the bytes, in whole files, become validation.

    Empty and repeated texts are left out. `max_bytes` keeps a part of the files, the same part on every machine.
    Raises ValueError where fewer than two files remain.
    """
    order = sorted(texts, key=lambda path: hashlib.sha256(path.encode()).digest())
    sizes = {text: len(text.encode()) for text in (texts[path] for path in order) if text}
    kept, room = [], math.inf if max_bytes is None else max_bytes
    for text, size in sizes.items():
        if size <= room:
            kept.append(text)
            room -= size
    if len(kept) < 2:
        raise ValueError(f"corpus {name!r}: {len(kept)} usable files; validation takes whole files, so 2 are needed")
    limit = max(0.05 * sum(sizes[text] for text in kept), min(sizes[text] for text in kept))
    valid, taken = [], 0
    for text in kept:
        if sizes[text] <= limit and taken < limit:
            valid.append(text)
            taken += sizes[text]
    held_out = set(valid)
    train = [text for text in kept if text not in held_out]
    return Corpus(name, train, valid, digest(train, valid))


def python_corpus(max_bytes: int | None = None) -> Corpus:
    """The running interpreter's standard library without its tests; it differs between Python versions."""
    excluded = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages")
    return split_by_file("python", read_folder(Path(sysconfig.get_paths()["stdlib"]), ["*.py"], excluded), max_bytes)


def folder_corpus(
    path: str | os.PathLike,
    patterns: Sequence[str] | str = ("*.py", "*.txt", "*.md", "*.rst", "*.tex", "*.c", "*.h", "*.cpp", "*.js", "*.rs"),
    max_bytes: int | None = None,
) -> Corpus:
    """All files below `path` whose name matches one of `patterns`, hidden files and folders left out.

    Raises FileNotFoundError for a missing folder, ValueError for a file or for fewer than two texts.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"no folder at {root}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; a folder of text files is needed")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return split_by_file(root.resolve().name, read_folder(root, patterns), max_bytes)


# What should a token be?


SPECIAL_TOKENS = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    *("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"),
)


BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END = range(5)


WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


CUTS = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", WORDS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE whose merges stay inside V3's cuts.

    The ids 0 to 4 are SPECIAL_TOKENS, then come 256 bytes, then merges. A small corpus may give fewer tokens.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one string; a list of texts is needed")
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} must be at least {least}: the bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in CUTS]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text; a special token's name inside a text is ordinary text."""
    if isinstance(texts, str):
        raise ValueError("texts is one string; a list of texts is needed")
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        tokenizer.encode_special_tokens = before


def byte_symbols() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level vocabulary (GPT-2's table)."""
    printable, others = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}, iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token id stands for; special tokens stand for none."""
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    special = tokenizer.get_added_tokens_decoder()
    spelled = ("" if i in special else tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size()))
    return [bytes(byte_of[symbol] for symbol in token) for token in spelled]


def encode_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Token ids of any bytes: what is not UTF-8 becomes single-byte tokens, so nothing is lost."""
    single = [tokenizer.token_to_id(symbol) for symbol in byte_symbols()]
    pieces = re.split("([\udc80-\udcff])", data.decode("utf-8", errors="surrogateescape"))
    ids = token_ids(tokenizer, pieces[::2])
    stray = [[single[ord(byte) - 0xDC00]] for byte in pieces[1::2]] + [[]]
    return list(chain.from_iterable(chain.from_iterable(zip(ids, stray, strict=True))))


# How do we compare losses between tokenizers?


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """The loss in bits for each byte of text, comparable between tokenizers: nats x tokens / (bytes x ln 2)."""
    if n_bytes < 1:
        raise ValueError(f"n_bytes={n_bytes} must be at least 1")
    return nats_per_token * n_tokens / (n_bytes * math.log(2))


# Why are some tokens split at random?


def boundary_pieces(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """For each token of punctuation and line breaks: the ids of its two halves. White space alone is no boundary."""
    pieces = {}
    for i, token in enumerate(token_bytes(tokenizer)):
        text = token.decode("utf-8", errors="surrogateescape")
        if match := re.fullmatch(r"(.*\S)([\r\n]+)", text, re.DOTALL):
            halves = (half.encode("utf-8", errors="surrogateescape") for half in match.groups())
            pieces[i] = list(chain.from_iterable(encode_bytes(tokenizer, half) for half in halves))
    return pieces


def split_boundary_tokens(
    ids: list[int], pieces: dict[int, list[int]], generator: torch.Generator, rate: float
) -> list[int]:
    """Replace each token found in `pieces` by its halves with probability `rate` (report section 4.1)."""
    if not 0 <= rate <= 1:
        raise ValueError(f"split rate={rate} must lie between 0 and 1")
    chance = torch.rand(len(ids), generator=generator).tolist()
    parts = (pieces[i] if i in pieces and c < rate else [i] for i, c in zip(ids, chance, strict=True))
    return list(chain.from_iterable(parts))


# How does a left-to-right model learn to fill a gap?


def fill_in_the_middle(ids: list[int], generator: torch.Generator, rate: float = 0.1) -> list[int]:
    """With probability `rate`, move a random middle to the end: begin prefix hole suffix end middle (PSM).

    The end token that tells where the middle stops is the document's own; packing adds it.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must lie between 0 and 1")
    if torch.rand((), generator=generator) >= rate:
        return ids
    i, j = sorted(torch.randint(len(ids) + 1, (2,), generator=generator).tolist())
    return [FIM_BEGIN, *ids[:i], FIM_HOLE, *ids[j:], FIM_END, *ids[i:j]]


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], fim_rate: float = 0.0, split_rate: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Token ids of each text, split and rearranged at the given rates. Packing adds bos and eos."""
    documents = token_ids(tokenizer, texts)
    generator = torch.Generator().manual_seed(seed)
    if split_rate:
        pieces = boundary_pieces(tokenizer)
        documents = [split_boundary_tokens(ids, pieces, generator, split_rate) for ids in documents]
    if fim_rate:
        documents = [fill_in_the_middle(ids, generator, fim_rate) for ids in documents]
    return documents


# How do documents become windows?


def pack(
    documents: Iterable[Sequence[int]],
    seq_len: int,
    eos_token_id: int | None = EOS,
    bos_token_id: int | None = BOS,
) -> torch.Tensor:
    """Join documents as bos, ids, eos and cut the stream into windows (n_windows, seq_len + 1), int64.

    Neighbours share one token, the last target of one and first input of the next, so each token but the stream's
    first is predicted once. The remainder, shorter than `seq_len`, is dropped. No mask between documents.
    Raises ValueError where not one window is filled.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    bos = [] if bos_token_id is None else [bos_token_id]
    eos = [] if eos_token_id is None else [eos_token_id]
    stream = torch.tensor(list(chain.from_iterable((*bos, *ids, *eos) for ids in documents)), dtype=torch.long)
    if len(stream) < seq_len + 1:
        raise ValueError(f"{len(stream)} tokens do not fill one window of seq_len + 1 = {seq_len + 1}")
    return stream.unfold(0, seq_len + 1, seq_len).contiguous()


class Batches:
    """Shuffled batches that are a function of (seed, step) alone, so a run resumes from its step number."""

    def __init__(self, windows: torch.Tensor, batch_size: int, seed: int = 0):
        if not 1 <= batch_size <= len(windows):
            raise ValueError(f"batch_size={batch_size} must lie in 1..{len(windows)}, the number of windows")
        self.windows, self.batch_size, self.seed = windows, batch_size, seed

    def __len__(self) -> int:
        """Batches in one epoch; the windows left over wait for the next permutation."""
        return len(self.windows) // self.batch_size

    def batch(self, step: int) -> torch.Tensor:
        """The batch of a step, (batch_size, seq_len + 1); each epoch has its own permutation."""
        if step < 0:
            raise ValueError(f"step={step} must be 0 or more")
        epoch, position = divmod(step, len(self))
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.windows), generator=generator)
        return self.windows[order[position * self.batch_size :][: self.batch_size]]
