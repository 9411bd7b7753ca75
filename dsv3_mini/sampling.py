"""How the next token is chosen, and how a drafted one is judged without changing the distribution.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

# How is a token chosen, and a draft checked?


def next_distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution to draw from, (..., V): one-hot at temperature 0, else a softmax cut to top_p."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probabilities = (logits / temperature).softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # the token that crosses top_p stays
        probabilities = torch.zeros_like(ordered).scatter_(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(weights: Tensor, u: float) -> int:
    """The token where the running sum of weights (V,) passes the share u of its total, 0 <= u < 1."""
    total = weights.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(total, u * total[-1], right=True).item()
    return min(token, len(weights) - 1)


def accept_draft(draft: int, p: Tensor, q: Tensor, source: random.Random) -> tuple[bool, int]:
    """Speculative sampling's rule: keep the draft with chance min(1, p/q), else draw from what p has more than q.

    draft: drawn from q; p, q: (V,). The token returned is distributed as p, whatever q is.
    """
    if source.random() * q[draft].item() < p[draft].item():
        return True, draft
    excess = (p - q).clamp(min=0)
    return False, draw(excess if excess.sum() > 0 else p, source.random())  # no excess: p and q differ by rounding


class Sampler:
    """How tokens are chosen, with a source of random numbers for each row, so that rows do not disturb each other."""

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int | None]):
        self.temperature, self.top_p = temperature, top_p
        self.sources = [random.Random(seed) for seed in seeds]

    def choose(self, logits: Tensor) -> tuple[list[int], Tensor | None]:
        """A token for each row of (B, V), and the distributions (B, V) that they come from; None when greedy."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist(), None
        p = next_distribution(logits, self.temperature, self.top_p)
        return [draw(p[i], source.random()) for i, source in enumerate(self.sources)], p

    def targets(self, logits: Tensor) -> Sequence:
        """What `verify` compares drafts with, for each row of (B, n + 1, V): the best tokens, or the distributions."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        return next_distribution(logits, self.temperature, self.top_p)

    def verify(self, row: int, drafts: Sequence[int], target: Sequence, q: Sequence[Tensor]) -> tuple[int, int]:
        """How many of a row's n drafts stand, and the token that follows them. target: the row's; q: n times (V,)."""
        if self.temperature == 0:
            kept = next((k for k, draft in enumerate(drafts) if draft != target[k]), len(drafts))
            return kept, target[kept]
        for k, draft in enumerate(drafts):
            accepted, token = accept_draft(draft, target[k], q[k], self.sources[row])
            if not accepted:
                return k, token
        return len(drafts), draw(target[-1], self.sources[row].random())
