"""Four small generated languages whose entropy is known exactly, so that a loss has a floor.

Generated from chapters/01_text_to_tokens.ipynb; edit the chapter, not this file.
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch

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
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    return makers[domain](n, length, generator)


def domain_windows(
    domains: Sequence[str], n_windows: int, seq_len: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (n_windows, seq_len + 1) of one domain each, in random order, and their index (n_windows,) in `domains`.

    Token 0 of a window names its domain, so the `seq_len` predicted tokens cost `domain_entropy` on average.
    """
    if not domains or n_windows < 1:
        raise ValueError(f"domains={domains!r} and n_windows={n_windows}: at least one of each is needed")
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
