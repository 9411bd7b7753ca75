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
from dsv3_mini.ngrams import NGrams, first_choices

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


def compressed_bits_per_byte(texts: Sequence[str]) -> dict[str, float]:
    """What gzip and xz make of the texts, joined."""
    data = "\n".join(texts).encode()
    return {
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }


def function_heads(texts: Sequence[str], count: int) -> list[str]:
    """First lines of functions at column 0, four a text at most and none twice, from texts that were not read."""
    found = (head for text in texts for head in re.findall(r"^def \w+\([^\n]*\):\n", text, re.M)[:4])
    return list(dict.fromkeys(found))[:count]


def is_python(code: str) -> bool:
    """Whether `code` parses and has a body. It is never executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            ast.parse(textwrap.dedent(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return code.count("\n") > 1


def complete_statements(text: str, finished: bool) -> str:
    """The text up to the first line that leaves the function; its last line is cut unless the text is finished.

    A line that would leave it in the middle of a string or bracket does not, if a later one completes the function.
    """
    lines = text.splitlines(keepends=True)
    lines = lines if finished or not lines else lines[:-1]
    leaving = [i for i, line in enumerate(lines) if i and line[:1] not in (" ", "\t", "\n", "#", ")")]
    cuts = ["".join(lines[:i]) for i in (*leaving, len(lines))]
    return next((code for code in cuts if is_python(code)), cuts[0])


def valid_share(write: Callable[[str], str], heads: Sequence[str]) -> float:
    """Share of function heads that `write` continues to code that parses."""
    texts = [head + write(head) for head in heads]
    return sum(is_python(complete_statements(text, finished=False)) for text in texts) / len(heads)


@torch.inference_mode()
def continue_ids(
    model: DeepSeekV3, ids: Sequence[int], new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """Up to `new_tokens` ids after `ids`, one at a time over a latent cache, the end token included if it comes."""
    if not ids or temperature < 0:
        raise ValueError(f"{len(ids)} ids and {temperature=}: one id at least, and a temperature of 0 or more")
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


@torch.inference_mode()
def continue_together(model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """`continue_ids` of each prompt, greedily, for all of them in step: no padding, so no mask."""
    lengths = [len(ids) for ids in prompts]
    total = max(lengths) + new_tokens
    texts = torch.tensor([[*ids, *[-1] * (total - len(ids))] for ids in prompts])  # -1 is still to be written
    caches, start = model.new_caches(len(prompts), total), 0
    for end in range(min(lengths), total):
        choice = model.lm_head(model.model(texts[:, start:end], caches)[:, -1]).argmax(-1)
        texts[:, end] = torch.where(texts[:, end] < 0, choice, texts[:, end])
        start = end
    new = [row[n : n + new_tokens] for row, n in zip(texts.tolist(), lengths, strict=True)]
    last = model.config.eos_token_id
    return [ids[: ids.index(last) + 1] if last in ids else ids for ids in new]


def writer(model: DeepSeekV3, tokenizer: Tokenizer, new_tokens: int = 80, temperature: float = 0.0, seed: int = 0):
    """A function that continues a text with the model."""

    def write(text: str) -> str:
        new = continue_ids(model, [BOS, *token_ids(tokenizer, [text])[0]], new_tokens, temperature, seed)
        return tokenizer.decode([i for i in new if i != EOS])

    return write


def write_together(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], new_tokens: int = 80) -> dict:
    """{text: how `writer` continues it}, all texts at once."""
    new = continue_together(model, [[BOS, *ids] for ids in token_ids(tokenizer, texts)], new_tokens)
    return {text: tokenizer.decode([i for i in ids if i != EOS]) for text, ids in zip(texts, new, strict=True)}


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


@torch.no_grad()
def would_write(model: nn.Module, prompts: Sequence, answers: Sequence, batch_size: int = 16) -> list[bool]:
    """Whether greedy decoding after each prompt gives exactly its answer; both are lists of token ids."""
    hits, asked = [], list(zip(prompts, answers, strict=True))
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        longest = max(len(prompt) + len(answer) for prompt, answer in part)
        ids = torch.tensor([[*p, *a, *[EOS] * (longest - len(p) - len(a))] for p, a in part])
        choices = model(ids).argmax(-1)  # (B, T)
        hits += [row[len(p) - 1 :][: len(a)] == [*a] for row, (p, a) in zip(choices.tolist(), part, strict=True)]
    return hits


def infill_exact_match(
    model: nn.Module, found: Sequence[tuple], see_suffix: bool = True, must_end: bool = True
) -> float:
    """Share of gaps that greedy decoding fills with exactly the tokens that stood there.

    see_suffix=False asks for the same tokens from left to right, without the text behind the gap. With it, the end
    token must follow, unless must_end=False asks for the tokens alone.
    """
    if see_suffix:
        prompts = [[BOS, FIM_BEGIN, *prefix, FIM_HOLE, *suffix, FIM_END] for prefix, _, suffix in found]
    else:
        prompts = [[BOS, *prefix] for prefix, _, _ in found]
    answers = [[*middle, EOS] if see_suffix and must_end else middle for _, middle, _ in found]
    return sum(would_write(model, prompts, answers)) / len(found)


def measure_model(model: nn.Module, data: Dataset, windows: Tensor, heads: Sequence[str], holes: Sequence) -> dict:
    """{measure: {who: value}} of the model."""
    bits = bits_per_byte(validation_loss(model, windows, 16, len(windows)), 1, data.bytes_per_token)
    return {
        "bits per byte": {"model": bits},
        "next token": {"model": next_token_accuracy(model, windows)},
        "body parses": {"model": valid_share(write_together(model, data.tokenizer, heads).get, heads)},
        "gap filled": {
            "model, left to right": infill_exact_match(model, holes, see_suffix=False),
            "model, both sides": infill_exact_match(model, holes, must_end=False),
            "model, and stops": infill_exact_match(model, holes),
        },
    }


def measure_counts(data: Dataset, vocab_size: int, windows: Tensor, heads: Sequence[str], holes: Sequence) -> dict:
    """{measure: {who: value}} of single tokens, five-token counts, compressors and the text itself."""
    ngrams = {"unigram": NGrams(data.train, vocab_size, 1), "5-gram": NGrams(data.train, vocab_size, 5)}
    loss = {name: -counts.log_probabilities(windows).mean().item() for name, counts in ngrams.items()}
    guessed = {name: (first_choices(n, windows) == windows[:, 1:]).float().mean().item() for name, n in ngrams.items()}
    texts, five = data.corpus.valid, ngrams["5-gram"]
    after = {head: text[text.index(head) + len(head) :] for text in texts for head in heads if head in text}
    truth = {
        head: data.tokenizer.decode(ids[:80])
        for head, ids in zip(after, token_ids(data.tokenizer, [*after.values()]), strict=True)
    }
    filled = [
        first_choices(five, torch.tensor([[*[BOS] * five.order, *prefix, *middle]]))[0, -len(middle) :].tolist()
        == [*middle]
        for prefix, middle, _ in holes
    ]
    return {
        "bits per byte": compressed_bits_per_byte(texts)
        | {name: bits_per_byte(nats, 1, data.bytes_per_token) for name, nats in loss.items()},
        "next token": guessed,
        "body parses": {
            "5-gram": valid_share(ngram_writer(five, data.tokenizer), heads),
            "the text itself": valid_share(truth.get, heads),
        },
        "gap filled": {"5-gram, left to right": sum(filled) / len(filled)},
    }


def evaluate(model: nn.Module, data: Dataset, max_windows: int = 256, n_heads: int = 100, n_gaps: int = 200) -> dict:
    """A model and simpler things on text that none of them has read: {measure: {who: value}}.

    Bits per byte of the text, share of next tokens guessed, of function bodies that parse, of gaps filled exactly.
    """
    windows = data.valid[:: max(1, len(data.valid) // max_windows)]
    heads = function_heads(data.corpus.valid, n_heads)
    holes = gaps(data.tokenizer, data.corpus.valid, n_gaps, windows.shape[1] // 2)
    if not heads or not holes:
        found = f"{len(heads)} function heads and {len(holes)} texts that are long enough for a gap"
        raise ValueError(f"the validation text of {data.corpus.name} has {found}; both are needed")
    asked = windows, heads, holes
    counted, measured = measure_counts(data, model.config.vocab_size, *asked), measure_model(model, data, *asked)
    return {measure: values | measured[measure] for measure, values in counted.items()}
