"""Text turned into training batches: corpora, byte-level BPE, fill-in-the-middle, packing, known entropy.

Generated from chapters/01_text_to_tokens.ipynb; edit the chapter, not this file.
"""

import hashlib
import math
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Where does text come from?


@dataclass(frozen=True)
class Corpus:
    """Whole documents, split by file into training and validation; `sha256` is the digest of the sorted documents."""

    name: str
    train: list[str]
    valid: list[str]
    sha256: str


def split_by_file(name: str, texts: dict[str, str], max_bytes: int | None = None) -> Corpus:
    """Split {relative path: text} by a hash of the path: about 5 % of the bytes, in whole files, become validation.

    Empty and repeated texts are left out. `max_bytes` keeps a part of the files, the same part on every machine.
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
    digest = hashlib.sha256(b"\0".join(text.encode() for text in sorted(kept))).hexdigest()
    return Corpus(name, [text for text in kept if text not in held_out], valid, digest)


def python_corpus(max_bytes: int | None = None) -> Corpus:
    """The running interpreter's standard library without its tests; it differs between Python versions."""
    excluded = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    return read_folder("python", Path(sysconfig.get_paths()["stdlib"]), ("*.py",), max_bytes, excluded)


def folder_corpus(
    path: str | os.PathLike,
    patterns: Sequence[str] = ("*.py", "*.txt", "*.md", "*.rst", "*.tex", "*.c", "*.h", "*.cpp", "*.js", "*.rs"),
    max_bytes: int | None = None,
) -> Corpus:
    """All files below `path` that match a pattern, hidden folders left out.

    Raises FileNotFoundError for a missing folder, ValueError for a file or for fewer than two texts.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"no folder at {root}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; a folder of text files is needed")
    return read_folder(root.name, root, patterns, max_bytes, excluded=set())


def read_folder(name: str, root: Path, patterns: Sequence[str], max_bytes: int | None, excluded: set[str]) -> Corpus:
    """Read UTF-8 files, line ends untouched; bytes that are not UTF-8 become U+FFFD."""
    texts = {}
    for file in {file for pattern in patterns for file in root.rglob(pattern)}:
        parts = file.relative_to(root).parts
        if file.is_file() and not any(part in excluded or part.startswith(".") for part in parts):
            texts["/".join(parts)] = file.read_bytes().decode("utf-8", errors="replace")
    return split_by_file(name, texts, max_bytes)


# What should a token be?


SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
)


BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END = range(5)


WORDS = (
    r"[!-/:-~&&\p{P}\p{S}][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with V3's cuts: digits in groups of at most three, a word, or punctuation with its line break.

    The ids 0 to 4 are SPECIAL_TOKENS, then come 256 bytes, then merges. A small corpus may give fewer tokens.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size={vocab_size} must be at least {256 + len(SPECIAL_TOKENS)}: bytes, special tokens")
    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", WORDS)]
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
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    tokenizer.encode_special_tokens = before
    return ids


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token id stands for; special tokens stand for none."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    special = tokenizer.get_added_tokens_decoder()
    spelled = ("" if i in special else tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size()))
    return [bytes(alphabet[symbol] for symbol in token) for token in spelled]


def encode_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Token ids of any bytes: what is not UTF-8 becomes single-byte tokens, so nothing is lost."""
    single = {token[0]: i for i, token in enumerate(token_bytes(tokenizer)) if len(token) == 1}
    pieces = re.split("([\udc80-\udcff])", data.decode("utf-8", errors="surrogateescape"))
    ids = token_ids(tokenizer, pieces[::2])
    stray = [[single[ord(byte) - 0xDC00]] for byte in pieces[1::2]] + [[]]
    return list(chain.from_iterable(chain.from_iterable(zip(ids, stray, strict=True))))


# How do we compare losses between tokenizers?


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """The loss in bits for each byte of text, comparable between tokenizers: nats x tokens / (bytes x ln 2)."""
    return nats_per_token * n_tokens / (n_bytes * math.log(2))


# Why are some tokens split at random?


def boundary_pieces(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """For each token that ends in a line break after something else: the ids of its two halves."""
    pieces = {}
    for i, token in enumerate(token_bytes(tokenizer)):
        if match := re.fullmatch(rb"(.*[^\r\n])([\r\n]+)", token, re.DOTALL):
            pieces[i] = encode_bytes(tokenizer, match[1]) + encode_bytes(tokenizer, match[2])
    return pieces


def split_boundary_tokens(
    ids: list[int], pieces: dict[int, list[int]], generator: torch.Generator, rate: float
) -> list[int]:
    """Replace each token found in `pieces` by its halves with probability `rate` (report section 4.1)."""
    chance = torch.rand(len(ids), generator=generator).tolist()
    parts = (pieces[i] if i in pieces and c < rate else [i] for i, c in zip(ids, chance, strict=True))
    return list(chain.from_iterable(parts))


# How does a left-to-right model learn to fill a gap?


def fill_in_the_middle(ids: list[int], generator: torch.Generator, rate: float = 0.1) -> list[int]:
    """With probability `rate`, move a random middle to the end: begin prefix hole suffix end middle (PSM)."""
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


# What would a perfect model score?


DOMAINS = ("arithmetic", "brackets", "recall", "copy")


DOMAIN_SYMBOLS = "ABRC0123456789abcdefghijklmnopqrstuvwx()[]{}<>+*=;:|"


DOMAIN_VOCAB_SIZE = 64


DIGIT, LETTER, BRACKET, SIGN = (DOMAIN_SYMBOLS.index(symbol) for symbol in "0a(+")


PLUS, TIMES, EQUALS, STOP, COLON, BAR = range(SIGN, SIGN + 6)


def repeat_episodes(episodes: torch.Tensor, nats: list[float], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay (n, episodes, width) tokens and the cost of one episode end to end; cut both to `length`."""
    costs = torch.tensor(nats, dtype=torch.float64).repeat(episodes.shape[1])
    return episodes.flatten(1)[:, :length], costs[:length]


def arithmetic(n: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`7+5=12;` two digits and the sign are drawn, the rest follows. Tokens (n, length), nats (length,)."""
    m = -(-length // 7)
    a, b = torch.randint(10, (2, n, m), generator=generator)
    times = torch.randint(2, (n, m), generator=generator)
    result = torch.where(times.bool(), a * b, a + b)
    equals, stop = torch.full_like(a, EQUALS), torch.full_like(a, STOP)
    tokens = [DIGIT + a, PLUS + times, DIGIT + b, equals, DIGIT + result // 10, DIGIT + result % 10, stop]
    return repeat_episodes(torch.stack(tokens, -1), [math.log(10), math.log(2), math.log(10), 0, 0, 0, 0], length)


def recall(n: int, length: int, generator: torch.Generator, pairs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """`k3a7f1c9:f1a7a7k3;` distinct keys with values, then keys asked for: each value is free once, known later."""
    m = -(-length // (4 * pairs + 2))
    keys = torch.rand(n, m, 16, generator=generator).argsort(-1)[..., :pairs]
    values = torch.randint(10, (n, m, pairs), generator=generator)
    asked = torch.randint(pairs, (n, m, pairs), generator=generator)
    table = torch.stack([LETTER + keys, DIGIT + values], -1).flatten(2)
    answers = torch.stack([LETTER + keys.gather(-1, asked), DIGIT + values.gather(-1, asked)], -1).flatten(2)
    colon, stop = torch.full((n, m, 1), COLON), torch.full((n, m, 1), STOP)
    nats = list(chain.from_iterable((math.log(16 - i), math.log(10)) for i in range(pairs)))
    return repeat_episodes(
        torch.cat([table, colon, answers, stop], -1), nats + [0] + [math.log(pairs), 0] * pairs + [0], length
    )


def copy(n: int, length: int, generator: torch.Generator, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """`mxkqijpv|mxkqijpv;` letters are drawn, then repeated."""
    m = -(-length // (2 * width + 2))
    letters = LETTER + 8 + torch.randint(16, (n, m, width), generator=generator)
    bar, stop = torch.full((n, m, 1), BAR), torch.full((n, m, 1), STOP)
    return repeat_episodes(
        torch.cat([letters, bar, letters, stop], -1), [math.log(16)] * width + [0] * (width + 2), length
    )


def brackets(n: int, length: int, generator: torch.Generator, depth: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """`([]{()})<>` opens or closes with equal chance, never past `depth`; which bracket closes is known."""
    stack, level, rows = torch.zeros(n, depth + 1, dtype=torch.long), torch.zeros(n, dtype=torch.long), torch.arange(n)
    chance, tokens, nats = torch.eye(depth + 1, dtype=torch.float64)[0], [], []
    free = math.log(2) + 0.5 * math.log(4)
    for _ in range(length):
        nats.append(chance[0] * math.log(4) + chance[1:-1].sum() * free)
        up = torch.cat([chance[:1], 0.5 * chance[1:-1]])
        chance = torch.cat([torch.zeros(1), up]) + torch.cat([0.5 * chance[1:-1], chance[-1:], torch.zeros(1)])
        opens = (level == 0) | ((level < depth) & (torch.rand(n, generator=generator) < 0.5))
        kind = torch.randint(4, (n,), generator=generator)
        stack[rows[opens], level[opens]] = kind[opens]
        tokens.append(BRACKET + torch.where(opens, 2 * kind, 2 * stack[rows, level - 1] + 1))
        level = level + torch.where(opens, 1, -1)
    return torch.stack(tokens, 1), torch.stack(nats)


def draw_domain(domain: str, n: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, length) of a domain and the entropy (length,) of each, in nats, given all before it."""
    makers = dict(zip(DOMAINS, (arithmetic, brackets, recall, copy), strict=True))
    if domain not in makers:
        raise ValueError(f"unknown domain {domain!r}; choose from {', '.join(DOMAINS)}")
    return makers[domain](n, length, generator)


def domain_windows(
    domains: Sequence[str], n_windows: int, seq_len: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (n_windows, seq_len + 1) of one domain each, in random order, and their index (n_windows,) in `domains`.

    Token 0 of a window names its domain, so the `seq_len` predicted tokens cost `domain_entropy` on average.
    """
    generator = torch.Generator().manual_seed(seed)
    domain_idx = torch.arange(n_windows)[torch.randperm(n_windows, generator=generator)] % len(domains)
    windows = torch.empty(n_windows, seq_len + 1, dtype=torch.long)
    for i, domain in enumerate(domains):
        mine = domain_idx == i
        windows[mine, 1:] = draw_domain(domain, int(mine.sum()), seq_len, generator)[0]
        windows[mine, 0] = DOMAINS.index(domain)
    return windows, domain_idx


def domain_entropy(domain: str, seq_len: int) -> float:
    """The loss of a perfect predictor on `domain_windows([domain], …)`, in nats per predicted token."""
    return draw_domain(domain, 1, seq_len, torch.Generator().manual_seed(0))[1].mean().item()
