"""How good a trained model is, beside counts, compressors, a parser and the text itself.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import ast
import gzip
import lzma
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from dsv3_mini.baseline import next_token_loss
from dsv3_mini.data import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, bits_per_byte, token_ids
from dsv3_mini.dataset import Dataset
from dsv3_mini.model import DeepSeekV3

# How good is it, beside simpler things?


@torch.no_grad()
def validation_loss(model: nn.Module, windows: Tensor, batch_size: int, max_windows: int = 64) -> float:
    """Mean nats a token of the main head over about `max_windows` windows, evenly spaced."""
    chosen = windows[:: max(1, len(windows) // max_windows)]
    parts = [next_token_loss(model, batch).item() * len(batch) for batch in chosen.split(batch_size)]
    return sum(parts) / len(chosen)


@torch.no_grad()
def next_token_accuracy(model: nn.Module, windows: Tensor, batch_size: int = 16) -> float:
    """Share of tokens that are the model's first choice; windows (n, T + 1)."""
    hits = [(model(batch[:, :-1]).argmax(-1) == batch[:, 1:]).float().mean(1) for batch in windows.split(batch_size)]
    return torch.cat(hits).mean().item()


class NGrams:
    """An n-gram model with absolute discounting: each order gives part of its chance to the order below it.

    P(w | c) = (max(n(c w) - d, 0) + d u(c) P(w | shorter c)) / n(c), u(c) the number of different tokens after c.
    Contexts are numbers in base V, so V^order must stay below 2^63.
    """

    def __init__(self, windows: Tensor, vocab_size: int, order: int = 5, discount: float = 0.75):
        if vocab_size**order >= 2**63:
            raise ValueError(f"vocab_size={vocab_size} allows no {order}-grams: {vocab_size}^{order} exceeds 64 bits")
        self.vocab_size, self.order, self.discount, self.tables = vocab_size, order, discount, []
        for n in range(1, order + 1):
            grams, counts = self.number(windows, n).flatten().unique(return_counts=True)
            contexts, inverse = (grams // vocab_size).unique(return_inverse=True)
            totals = torch.zeros(len(contexts)).index_add_(0, inverse, counts.float())
            self.tables.append((grams, counts.float(), contexts, totals, torch.bincount(inverse).float()))

    def number(self, windows: Tensor, n: int) -> Tensor:
        """The n-gram that ends at each token which has n - 1 tokens before it, as one integer."""
        grams = windows.unfold(1, n, 1)
        return (grams * self.vocab_size ** torch.arange(n - 1, -1, -1)).sum(-1)

    def log_probabilities(self, windows: Tensor) -> Tensor:
        """Nats of tokens 1 .. T of each window given the tokens before them in it: (n, T + 1) -> (n, T)."""
        p = torch.full(windows.shape, 1 / self.vocab_size)
        for n, (grams, counts, contexts, totals, kinds) in enumerate(self.tables, start=1):
            numbers = self.number(windows, n)
            hits = look_up(grams, counts, numbers)
            above, kind = (look_up(contexts, values, numbers // self.vocab_size) for values in (totals, kinds))
            lower = p[:, n - 1 :]
            mixed = ((hits - self.discount).clamp(min=0) + self.discount * kind * lower) / above
            p = torch.cat((p[:, : n - 1], torch.where(above > 0, mixed, lower)), dim=1)
        return p[:, 1:].log()


def look_up(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """The value of each wanted key among sorted `keys`, 0 for a key that is not there."""
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == wanted, values[place], 0.0)


def compressed_bits_per_byte(texts: Sequence[str]) -> dict[str, float]:
    """What gzip and xz make of the texts, joined."""
    data = "\n".join(texts).encode()
    return {
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }


def first_choices(ngrams: NGrams, windows: Tensor) -> Tensor:
    """The token that most often followed the longest known context, for tokens 1 .. T: (n, T + 1) -> (n, T)."""
    best = torch.zeros_like(windows)
    for n, (grams, counts, contexts, _, _) in enumerate(ngrams.tables, start=1):
        order = counts.argsort(stable=True)
        favourite = torch.zeros_like(contexts)
        favourite[torch.searchsorted(contexts, grams[order] // ngrams.vocab_size)] = grams[order] % ngrams.vocab_size
        asked = ngrams.number(windows, n) // ngrams.vocab_size
        place = torch.searchsorted(contexts, asked).clamp(max=len(contexts) - 1)
        best[:, n - 1 :] = torch.where(contexts[place] == asked, favourite[place], best[:, n - 1 :])
    return best[:, 1:]


def function_heads(texts: Sequence[str], count: int) -> list[str]:
    """First lines of functions at column 0, one a text at most, from texts that the model has not read."""
    found = (re.search(r"^def \w+\([^\n]*\):\n", text, re.M) for text in texts)
    return [match[0] for match in found if match][:count]


def complete_statements(text: str, finished: bool) -> str:
    """The text up to the first line that leaves the function; its last line is cut unless the text is finished."""
    lines = text.splitlines(keepends=True)
    lines = lines if finished or not lines else lines[:-1]
    body = next((i for i, line in enumerate(lines) if i and line[:1] not in (" ", "\t", "\n", "#", ")")), len(lines))
    return "".join(lines[:body])


def is_python(code: str) -> bool:
    """Whether `code` parses and has a body. It is never executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            ast.parse(textwrap.dedent(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return code.count("\n") > 1


def valid_share(write: Callable[[str], str], heads: Sequence[str]) -> float:
    """Share of function heads that `write` continues to code that parses."""
    texts = [head + write(head) for head in heads]
    return sum(is_python(complete_statements(text, finished=False)) for text in texts) / len(heads)


@torch.inference_mode()
def continue_ids(
    model: DeepSeekV3, ids: Sequence[int], new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """Up to `new_tokens` ids after `ids`, one at a time over a latent cache, the end token included if it comes."""
    generator, caches = torch.Generator().manual_seed(seed), model.new_caches(1, len(ids) + new_tokens)
    step, new = torch.tensor([list(ids)]), []
    while len(new) < new_tokens and new[-1:] != [model.config.eos_token_id]:
        logits = model.lm_head(model.model(step, caches)[:, -1]).float()  # (1, V)
        if temperature:
            step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            step = logits.argmax(-1, keepdim=True)
        new.append(step.item())
    return new


def writer(model: DeepSeekV3, tokenizer: Tokenizer, new_tokens: int = 80, temperature: float = 0.0, seed: int = 0):
    """A function that continues a text with the model."""

    def write(text: str) -> str:
        new = continue_ids(model, [BOS, *token_ids(tokenizer, [text])[0]], new_tokens, temperature, seed)
        return tokenizer.decode([i for i in new if i != EOS])

    return write


def ngram_writer(ngrams: NGrams, tokenizer: Tokenizer, new_tokens: int = 80):
    """A function that continues a text with the n-gram model's first choices."""

    def write(text: str) -> str:
        ids = token_ids(tokenizer, [text])[0]
        start = len(ids)
        for _ in range(new_tokens):
            window = torch.tensor([[*([BOS] * ngrams.order), *ids, BOS][-ngrams.order :]])  # the last one is unknown
            ids.append(first_choices(ngrams, window)[0, -1].item())
        return tokenizer.decode([i for i in ids[start:] if i != EOS])

    return write


def gaps(tokenizer: Tokenizer, texts: Sequence[str], count: int, context: int, seed: int = 0) -> list[tuple]:
    """(prefix, middle, suffix) token ids: holes of 1 to 4 tokens in `context` tokens of text, the texts in turn."""
    generator, found = torch.Generator().manual_seed(seed), []
    long_enough = [ids for ids in token_ids(tokenizer, texts) if len(ids) > 2 * context]
    for ids in (long_enough * count)[:count]:
        start, at, width = torch.rand(3, generator=generator).tolist()
        start, at, width = int(start * (len(ids) - context)), int(at * (context - 4)), 1 + int(width * 4)
        part = ids[start : start + context]
        found.append((part[:at], part[at : at + width], part[at + width :]))
    return found


def infill_exact_match(model: DeepSeekV3, found: Sequence[tuple], see_suffix: bool = True) -> float:
    """Share of gaps that greedy decoding fills with exactly the tokens that stood there.

    see_suffix=False asks for the same tokens from left to right, without the text behind the gap.
    """
    hits = 0
    for prefix, middle, suffix in found:
        asked = [BOS, FIM_BEGIN, *prefix, FIM_HOLE, *suffix, FIM_END] if see_suffix else [BOS, *prefix]
        new = continue_ids(model, asked, len(middle) + see_suffix)
        hits += new == [*middle, EOS] if see_suffix else new == middle
    return hits / len(found)


def evaluate(model: DeepSeekV3, data: Dataset, max_windows: int = 256, n_heads: int = 50, n_gaps: int = 100) -> dict:
    """A model and simpler things on text that none of them has read: {measure: {who: value}}.

    Bits per byte of the text, share of next tokens guessed, of function bodies that parse, of gaps filled exactly.
    """
    windows = data.valid[:: max(1, len(data.valid) // max_windows)]
    vocab_size, tokenizer, texts = model.config.vocab_size, data.tokenizer, data.corpus.valid
    ngrams = {"unigram": NGrams(data.train, vocab_size, 1), "5-gram": NGrams(data.train, vocab_size, 5)}
    loss = {name: -counts.log_probabilities(windows).mean().item() for name, counts in ngrams.items()}
    loss["model"] = validation_loss(model, windows, 16, max_windows)
    bits = {name: bits_per_byte(nats, 1, data.bytes_per_token) for name, nats in loss.items()}
    guessed = {name: (first_choices(n, windows) == windows[:, 1:]).float().mean().item() for name, n in ngrams.items()}
    heads, holes = function_heads(texts, n_heads), gaps(tokenizer, texts, n_gaps, windows.shape[1] // 2)
    truth = {head: text[text.index(head) + len(head) :] for text in texts for head in heads if head in text}
    return {
        "bits per byte": compressed_bits_per_byte(texts) | bits,
        "next token": guessed | {"model": next_token_accuracy(model, windows)},
        "body parses": {
            "5-gram": valid_share(ngram_writer(ngrams["5-gram"], tokenizer), heads),
            "model": valid_share(writer(model, tokenizer), heads),
            "the text itself": valid_share(truth.get, heads),
        },
        "gap filled": {
            "model, left to right": infill_exact_match(model, holes, see_suffix=False),
            "model, both sides": infill_exact_match(model, holes),
        },
    }
