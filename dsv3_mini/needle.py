"""A word hidden in a long text, the question for it, and how the answer is scored.

Generated from chapters/12_long_context.ipynb; edit the chapter, not this file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from dsv3_mini.data import token_bytes, token_ids
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.recipe import TrainOptions
from dsv3_mini.train import make_optimizer

# Can it find a needle?


QUESTION, END = "\n# secret:", "\n"


def needle_words(tokenizer: Tokenizer, held_out: bool) -> list[int]:
    """Ids of tokens that are a space and four or more lower-case letters; every fourth one is held out of teaching."""
    found = [i for i, b in enumerate(token_bytes(tokenizer)) if re.fullmatch(rb" [a-z]{4,}", b)]
    return [word for n, word in enumerate(found) if (n % 4 == 0) == held_out]


@dataclass(frozen=True)
class Haystack:
    """Token ids of a text with a needle in it and the question at its end (length,), the answer, and wrong answers."""

    ids: Tensor
    answer: int
    decoys: list[int]


def hide_needle(
    tokenizer: Tokenizer, hay: Tensor, length: int, depth: float, words: Sequence[int], seed: int, n_decoys: int = 9
) -> Haystack:
    """The line "# secret: WORD" inside the first tokens of `hay`, at `depth` from 0 to 1 (the end), and "# secret:".

    Text, needle and question make `length` tokens. The answer and the decoys are drawn from `words` that the text
    lacks. Raises ValueError where needle, text or words do not suffice.
    """
    question, end = token_ids(tokenizer, [QUESTION, END])
    needle_size = len(question) + 1 + len(end)
    room = length - needle_size - len(question)
    if room < 0:
        raise ValueError(f"a needle of {needle_size} tokens and its question of {len(question)} exceed {length=}")
    if len(hay) < room or not 0 <= depth <= 1:
        raise ValueError(f"{length=} needs {room} tokens of text, there are {len(hay)}; {depth=} must lie in 0..1")
    present = set(hay[:room].tolist())
    free = [word for word in words if word not in present]
    if len(free) <= n_decoys:
        raise ValueError(f"an answer and {n_decoys} decoys are needed; the text lacks only {len(free)} of the words")
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))[: n_decoys + 1].tolist()
    answer, *decoys = (free[i] for i in order)
    at = round(depth * room)
    ids = [*hay[:at].tolist(), *question, answer, *end, *hay[at:room].tolist(), *question]
    return Haystack(torch.tensor(ids), answer, decoys)


@torch.inference_mode()
def ask(model: DeepSeekV3, haystacks: Sequence[Haystack]) -> list[dict[str, float]]:
    """Read haystacks of one length and score the token that the model would write next, a dict each.

    "exact": 1 if it is the answer, of the whole vocabulary. "share": the answer's part of the probability that it and
    its decoys have together; a model that knows only what words look like would have 1 / (decoys + 1) on average.
    """
    if not haystacks:
        raise ValueError("no haystack was given, so there is nothing to ask")
    h = model.model(torch.stack([stack.ids for stack in haystacks]))[:, -1]
    log_p, scores = model.lm_head(h).float().log_softmax(-1), []
    for stack, row in zip(haystacks, log_p, strict=True):
        share = row[[stack.answer, *stack.decoys]].softmax(0)[0].item()
        scores.append({"exact": float(row.argmax() == stack.answer), "share": round(share, 4)})
    return scores


def needle_map(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    hays: Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    words: Sequence[int],
    seed: int = 0,
) -> dict[str, list[list[float]]]:
    """Mean scores of a needle in each text of hays (n, T), at every length and depth: {score: lengths x depths}."""
    maps = {"exact": [], "share": []}
    for length in lengths:
        rows = {"exact": [], "share": []}
        for depth in depths:
            seeds = range(seed * len(hays), (seed + 1) * len(hays))
            stacks = [hide_needle(tokenizer, hay, length, depth, words, s) for hay, s in zip(hays, seeds, strict=True)]
            scores = ask(model, stacks)
            for name, row in rows.items():
                row.append(round(sum(score[name] for score in scores) / len(scores), 4))
        for name, row in rows.items():
            maps[name].append(row)
    return maps


def lesson_loss(model: nn.Module, haystacks: Sequence[Haystack]) -> tuple[Tensor, Tensor]:
    """Mean nats of the text, and of the answers alone, which stand at the end of haystacks of one length."""
    windows = torch.stack([torch.cat((stack.ids, torch.tensor([stack.answer]))) for stack in haystacks])
    logits = model(windows[:, :-1]).float()
    losses = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)
    return losses[:, :-1].mean(), losses[:, -1].mean()


def lessons(
    tokenizer: Tokenizer, hays: Tensor, longest: int, words: Sequence[int], n_tokens: int, generator: torch.Generator
) -> list[Haystack]:
    """About `n_tokens` tokens of haystacks of one length, drawn between 32 and `longest`, out of hays (n, T)."""

    def draw(low, high):
        return torch.randint(low, high + 1, (), generator=generator).item()

    length, stacks = draw(min(32, longest), longest), []
    for _ in range(max(1, n_tokens // length)):
        hay, depth = hays[draw(0, len(hays) - 1)], draw(0, 1000) / 1000
        start = draw(0, len(hay) - length)
        stacks.append(hide_needle(tokenizer, hay[start:], length, depth, words, draw(0, 2**31), n_decoys=0))
    return stacks


def teach(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    hays: Tensor,
    length: int,
    steps: int,
    learning_rate: float = 1e-3,
    n_tokens: int = 1024,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Tune on needles in texts out of hays (n, T): the answers' loss at every step. Changes the model.

    No text is longer than `length`; the first are short, and the limit grows over two thirds of the steps. The words
    are those that `needle_words` does not hold out.
    """
    optimizer, words, losses = make_optimizer(model, TrainOptions()), needle_words(tokenizer, False), []
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        longest = min(length, 32 + round((length - 32) * step / (steps * 2 / 3)))
        stacks = lessons(tokenizer, hays, longest, words, n_tokens, generator)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            text, answers = lesson_loss(model, stacks)
        optimizer.zero_grad()
        (0.3 * text + answers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 10, 3 * (steps - step) / steps)
        optimizer.step()
        losses.append(round(answers.item(), 4))
    return losses
