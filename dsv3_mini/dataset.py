"""What a run reads: sources of text by name, pieces to fill in, windows in a repeatable order.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_mini.data import (
    BOS,
    EOS,
    Corpus,
    encode,
    fill_in_the_middle,
    folder_corpus,
    pack,
    python_corpus,
    read_folder,
    split_by_file,
    train_tokenizer,
)
from dsv3_mini.recipe import TrainOptions

# What does a run need to be repeated?


def read_source(source: str, max_bytes: int | None = None) -> Corpus:
    """One source of text: "stdlib", an installed package's sources by name, or a folder."""
    if source == "stdlib":
        return python_corpus(max_bytes)
    if source.isidentifier() and not Path(source).exists() and (spec := importlib.util.find_spec(source)):
        if not spec.submodule_search_locations:
            raise ValueError(f"{source} is a single module; a package, a folder or stdlib is needed")
        root = Path(spec.submodule_search_locations[0])
        return split_by_file(source, read_folder(root, ("*.py",), ("test", "tests", "testing")), max_bytes)
    return folder_corpus(source, max_bytes=max_bytes)


def read_sources(sources: str, max_bytes: int | None = None) -> Corpus:
    """Comma-separated sources as one corpus; what stands in both splits stays in training only."""
    names = [source.strip() for source in sources.split(",")]
    if not all(names):
        raise ValueError(f"data={sources!r} names an empty source; a name or a folder is needed between commas")
    corpora = [read_source(name, max_bytes) for name in names]
    if len(corpora) == 1:
        return corpora[0]
    train = list(dict.fromkeys(chain.from_iterable(corpus.train for corpus in corpora)))
    seen = set(train)
    valid = [text for corpus in corpora for text in corpus.valid if text not in seen]
    digest = hashlib.sha256("".join(corpus.sha256 for corpus in corpora).encode()).hexdigest()
    return Corpus("+".join(corpus.name for corpus in corpora), train, valid, digest)


def arrange(documents: list[list[int]], piece: int, fim_rate: float, seed: int) -> list[list[int]]:
    """Documents with their bos and eos, in which pieces of `piece` tokens are rearranged for filling in at `fim_rate`.

    The report rearranges documents. Ours are many windows long, so prefix and middle would never meet in one: a piece
    is what a document is there. A rearranged piece is a text of its own, from bos to eos, inside its document.
    """
    generator, arranged = torch.Generator().manual_seed(seed), []
    for ids in documents:
        stream = [BOS]
        for start in range(0, len(ids), piece):
            part = ids[start : start + piece]
            moved = fill_in_the_middle(part, generator, fim_rate)
            stream += part if moved is part else [BOS, *moved, EOS]
        arranged.append([*stream, EOS])
    return arranged


@dataclass(frozen=True)
class Dataset:
    """A tokenizer and the windows (n, seq_len + 1) that it cut from a corpus."""

    tokenizer: Tokenizer
    train: Tensor
    valid: Tensor
    bytes_per_token: float  # of the validation text
    corpus: Corpus


def prepare(options: TrainOptions, tokenizer: Tokenizer | None = None) -> Dataset:
    """Read the text, train its tokenizer (unless one is given), cut both splits into windows.

    Random splits of tokens and fill-in-the-middle are for training alone.
    """
    corpus = read_sources(options.data, options.max_bytes)
    tokenizer = tokenizer or train_tokenizer(corpus.train, options.config().vocab_size)
    documents = encode(tokenizer, corpus.train, split_rate=options.split_rate, seed=options.seed)
    documents = arrange(documents, max(2, options.seq_len // 2), options.fim_rate, options.seed)
    train = pack(documents, options.seq_len, eos_token_id=None, bos_token_id=None)
    valid_documents = encode(tokenizer, corpus.valid)
    n_bytes = sum(len(text.encode()) for text in corpus.valid)
    valid = pack(valid_documents, options.seq_len)
    return Dataset(tokenizer, train, valid, n_bytes / sum(map(len, valid_documents)), corpus)


class Stream:
    """An endless shuffled stream of windows; any stretch of it is a function of (seed, position) alone."""

    def __init__(self, windows: Tensor, seed: int = 0):
        self.windows, self.seed, self.order, self.epoch = windows, seed, None, -1

    def take(self, start: int, count: int) -> Tensor:
        """Windows start .. start + count - 1 of the stream, (count, seq_len + 1)."""
        parts = []
        while count:
            epoch, position = divmod(start, len(self.windows))
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
                self.order, self.epoch = torch.randperm(len(self.windows), generator=generator), epoch
            parts.append(self.windows[self.order[position : position + count]])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)
