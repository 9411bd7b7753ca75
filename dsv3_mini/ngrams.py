"""Five-token counts: an opponent that a trained model has to beat, built by sorting.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# How good is it, beside simpler things?


class Counts(NamedTuple):
    """The n-grams of one length, as sorted numbers, and what is known about their contexts."""

    grams: Tensor
    counts: Tensor  # of each gram
    contexts: Tensor
    totals: Tensor  # tokens that followed each context
    kinds: Tensor  # different ones among them
    favourites: Tensor  # the most frequent one


class NGrams:
    """An n-gram model with absolute discounting: each order gives part of its chance to the order below it.

    P(w | c) = (max(n(c w) - d, 0) + d u(c) P(w | shorter c)) / n(c), u(c) the number of different tokens after c.
    Contexts are numbers in base V, so V^order must stay below 2^63.
    """

    def __init__(self, windows: Tensor, vocab_size: int, order: int = 5, discount: float = 0.75):
        if vocab_size**order >= 2**63:
            raise ValueError(f"vocab_size={vocab_size} allows no {order}-grams: {vocab_size}^{order} exceeds 64 bits")
        self.vocab_size, self.order, self.discount = vocab_size, order, discount
        self.tables = [self.count(windows, n) for n in range(1, order + 1)]

    def number(self, windows: Tensor, n: int) -> Tensor:
        """The n-gram that ends at each token which has n - 1 tokens before it, as one integer."""
        if not 1 <= n <= windows.shape[1]:
            raise ValueError(f"windows of {windows.shape[1]} tokens hold no {n}-grams")
        grams = windows[:, : windows.shape[1] - n + 1]
        for i in range(1, n):
            grams = grams * self.vocab_size + windows[:, i : windows.shape[1] - n + 1 + i]
        return grams

    def count(self, windows: Tensor, n: int) -> Counts:
        """Every n-gram of the windows; among equally frequent followers the largest token is the favourite."""
        grams, counts = self.number(windows, n).flatten().unique(return_counts=True)
        contexts, place, kinds = (grams // self.vocab_size).unique_consecutive(return_inverse=True, return_counts=True)
        totals = torch.zeros(len(contexts)).index_add_(0, place, counts.float())
        most = torch.zeros_like(kinds).scatter_reduce_(0, place, counts, "amax")
        leads = counts == most[place]
        tokens = grams[leads] % self.vocab_size
        favourites = torch.zeros_like(contexts).scatter_reduce_(0, place[leads], tokens, "amax")
        return Counts(grams, counts.float(), contexts, totals, kinds.float(), favourites)

    def log_probabilities(self, windows: Tensor) -> Tensor:
        """Nats of tokens 1 .. T of each window given the tokens before them in it: (n, T + 1) -> (n, T)."""
        p = torch.full(windows.shape, 1 / self.vocab_size)
        for n, table in enumerate(self.tables, start=1):
            numbers = self.number(windows, n)
            hits = look_up(table.grams, table.counts, numbers)
            above, kind = (
                look_up(table.contexts, values, numbers // self.vocab_size) for values in (table.totals, table.kinds)
            )
            lower = p[:, n - 1 :]
            mixed = ((hits - self.discount).clamp(min=0) + self.discount * kind * lower) / above
            p = torch.cat((p[:, : n - 1], torch.where(above > 0, mixed, lower)), dim=1)
        return p[:, 1:].log()


def look_up(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """The value of each wanted key among sorted `keys`, 0 for a key that is not there."""
    place = torch.searchsorted(keys, wanted.contiguous()).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == wanted, values[place], 0)


def first_choices(ngrams: NGrams, windows: Tensor) -> Tensor:
    """The token that most often followed the longest known context, for tokens 1 .. T: (n, T + 1) -> (n, T)."""
    best = torch.zeros_like(windows)
    for n, table in enumerate(ngrams.tables, start=1):
        asked = ngrams.number(windows, n) // ngrams.vocab_size
        known = look_up(table.contexts, table.totals, asked) > 0
        best[:, n - 1 :] = torch.where(known, look_up(table.contexts, table.favourites, asked), best[:, n - 1 :])
    return best[:, 1:]
