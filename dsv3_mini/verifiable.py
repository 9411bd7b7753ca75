"""Questions whose answers a rule can check, and the pages of a small exercise book.

Generated from chapters/14_post_training.ipynb; edit the chapter, not this file.
"""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import torch
from tokenizers import Tokenizer
from torch import Generator

from dsv3_mini.data import EOS, SPECIAL_TOKENS, train_tokenizer
from dsv3_mini.sft import exchange

# What does a pretrained model do with a question?


HOURS = 5  # of the clock on which sums are taken


def sum_on_clock(question: str) -> str:
    """What belongs into the box: "3 + 4 + 4" -> "1"."""
    return str(sum(map(int, question.split(" + "))) % HOURS)


def steps_on_clock(question: str) -> str:
    """The same, one step after the other: "3 + 4 + 4" -> "3+4=2+4=1"."""
    first, *others = map(int, question.split(" + "))
    text, total = str(first), first
    for term in others:
        total = (total + term) % HOURS
        text += f"+{term}={total}"
    return text


def town_facts(n_towns: int, generator: Generator) -> dict[str, str]:
    """Invented towns and the land of each, one of 16: {"ba": "K", ...}. Early ones are written about more often."""
    names = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    if n_towns > len(names):
        raise ValueError(f"n_towns={n_towns} exceeds the {len(names)} names")
    order = torch.randperm(len(names), generator=generator)[:n_towns].tolist()
    lands = torch.randint(16, (n_towns,), generator=generator).tolist()
    return {names[i]: "ABCDEFGHIJKLMNOP"[land] for i, land in zip(order, lands, strict=True)}


def draw_town(facts: dict[str, str], generator: Generator) -> str:
    """A town; every other one is of the first quarter."""
    place = len(facts) * torch.rand((), generator=generator).item() ** 2
    return list(facts)[int(place)]


def is_held_out(question: str) -> bool:
    """A quarter of the questions, which no page and no lesson shows; the table of pairs is shown whole."""
    return question.count("+") > 1 and crc32(question.encode()) % 4 == 0


def draw_sum(n_terms: int, generator: Generator, held_out: bool = False) -> str:
    """A question such as "3 + 4 + 4", of those that are held out or of the others."""
    while True:
        question = " + ".join(str(x) for x in torch.randint(HOURS, (n_terms,), generator=generator).tolist())
        if is_held_out(question) == held_out:
            return question


PAGES = {"steps": 0.5, "pairs": 0.15, "answers": 0.1, "sheet": 0.05, "facts": 0.2}  # kinds and how frequent they are


def write_page(kind: str, facts: dict[str, str], generator: Generator) -> str:
    """A page of the exercise book: sums in steps, pairs, boxed answers alone, questions alone, or facts."""
    if kind == "facts":
        towns = [draw_town(facts, generator) for _ in range(6)]
        return "\n".join(f"{town}:[{facts[town]}]" for town in towns)
    questions = [draw_sum(2 if kind == "pairs" else 4, generator) for _ in range(10 if kind == "pairs" else 4)]
    if kind == "pairs":
        return "\n".join(steps_on_clock(q) for q in questions)
    if kind == "sheet":
        return "\n".join(questions)
    steps = [steps_on_clock(q) if kind == "steps" else "" for q in questions]
    return "\n".join(f"{q}:{s}[{sum_on_clock(q)}]" for q, s in zip(questions, steps, strict=True))


def exercise_book(n_pages: int, facts: dict[str, str], generator: Generator) -> list[str]:
    """The corpus: pages of all kinds, drawn by their frequency."""
    kinds, shares = list(PAGES), torch.tensor(list(PAGES.values()))
    chosen = torch.multinomial(shares, n_pages, replacement=True, generator=generator).tolist()
    return [write_page(kinds[i], facts, generator) for i in chosen]


CHAT_TOKENS = ("<｜User｜>", "<｜Assistant｜>")


def exercise_tokenizer() -> Tokenizer:
    """Chapter 01's tokenizer without merges, ids 0 to 260, and the two tokens of the chat template."""
    tokenizer = train_tokenizer([], 256 + len(SPECIAL_TOKENS))
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    return tokenizer


# What is a conversation to the model?


class Problem(NamedTuple):
    """A question, what belongs into the box, and the prompt: token ids up to the assistant's turn."""

    question: str
    answer: str
    prompt: list[int]


def sums(
    tokenizer: Tokenizer, n: int, generator: Generator, system: str = "", held_out: bool = False, n_terms: int = 4
) -> list[Problem]:
    """n questions such as "3 + 4 + 4 + 0", with a system message or none, held out from all lessons or not."""
    drawn = [draw_sum(n_terms, generator, held_out) for _ in range(n)]
    return [Problem(q, sum_on_clock(q), exchange(tokenizer, q, system=system).ids) for q in drawn]


def towns(tokenizer: Tokenizer, facts: dict[str, str], system: str = "") -> list[Problem]:
    """A question for every fact."""
    return [Problem(town, land, exchange(tokenizer, town, system=system).ids) for town, land in facts.items()]


def is_correct(tokenizer: Tokenizer, problem: Problem, completion: Sequence[int]) -> bool:
    """The rule: the completion ends (eos) with a box, its only one, which holds the answer."""
    if EOS not in completion:
        return False
    text = tokenizer.decode(list(completion)[: list(completion).index(EOS)], skip_special_tokens=False)
    return text.endswith(f"[{problem.answer}]") and text.count("[") == text.count("]") == 1


def score(
    tokenizer: Tokenizer, problems: Sequence[Problem], completions: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Share of correct completions, and their mean length in tokens."""
    pairs = zip(problems, completions, strict=True)
    correct = sum(is_correct(tokenizer, problem, completion) for problem, completion in pairs)
    return correct / len(problems), sum(map(len, completions)) / len(completions)
