"""Reinforcement learning against rewards, without a critic: groups of answers are compared with their own mean.

Generated from chapters/14_post_training.ipynb; edit the chapter, not this file.
"""

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_mini.generate import stream
from dsv3_mini.model import DeepSeekV3

# What is an answer worth?


@dataclass
class Rollouts:
    """Prompts and what the policy wrote after them, N rows.

    ids: (N, T + 1) token ids, filled up at the end; mask: (N, T), True where the *next* token is a written one;
    outputs: the written ids of each row, with the end token if it came.
    """

    ids: Tensor
    mask: Tensor
    outputs: list[list[int]]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> "Rollouts":
        """Rows of unequal lengths in one tensor, filled up with token 0, which no mask shows."""
        rows = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros(len(rows), ids.shape[1] - 1, dtype=torch.bool)
        for n, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            ids[n, : len(row)] = torch.tensor(row)
            mask[n, len(prompt) - 1 : len(row) - 1] = True
        return cls(ids, mask, [list(output) for output in outputs])

    def rows(self, chosen: Tensor) -> "Rollouts":
        """Some rows, by number."""
        return Rollouts(self.ids[chosen], self.mask[chosen], [self.outputs[n] for n in chosen.tolist()])


def roll_out(
    policy: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_new_tokens: int,
    seed: int,
    stop_when: Callable[[int, list[int]], bool] | None = None,
) -> Rollouts:
    """`group_size` outputs to each prompt, neighbours in the rows, sampled at temperature 1 by chapter 13's decoder."""
    rows, source = [prompt for prompt in prompts for _ in range(group_size)], random.Random(seed)
    outputs, seeds = [[] for _ in rows], [source.getrandbits(48) for _ in rows]
    ends = {"stop": [policy.config.eos_token_id], "stop_when": stop_when}
    for event in stream(policy, rows, max_new_tokens, temperature=1.0, seeds=seeds, **ends):
        outputs[event.row].append(event.token)
    return Rollouts.of(rows, outputs)


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """(Q, G) rewards -> (Q, G): how far each is above its group's mean, in standard deviations of its group.

    A group whose rewards are all equal says nothing and gets zeros (V3 publishes no epsilon for the division).
    """
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if divide_by_std:
        advantages = advantages / rewards.std(-1, correction=0, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # rounding gives equal rewards a tiny deviation
    return advantages.masked_fill(equal, 0.0)


def token_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """ln p of each token given those before it: ids (N, T + 1) -> (N, T), where entry t is of token t + 1."""
    log_p = model(ids[:, :-1]).float().log_softmax(-1)  # (N, T, V)
    return log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)


# How far may one step go?


def kl_estimate(logp: Tensor, ref: Tensor) -> Tensor:
    """Eq. 27: p_ref / p - ln(p_ref / p) - 1, elementwise; never negative, and KL(p || p_ref) on average over p."""
    difference = ref - logp
    return difference.exp() - difference - 1


def clipped_gain(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A): no reward for moving further than `clip`."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def grpo_loss_reference(
    logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, beta: float = 0.04
) -> Tensor:
    """`grpo_loss` read off the equation, an output and a token at a time."""
    outputs = []
    for n in range(len(logp)):
        terms = []
        for t in mask[n].nonzero().flatten().tolist():
            ratio = torch.exp(logp[n, t] - old[n, t])
            gain = min(ratio * advantages[n], ratio.clamp(1 - clip, 1 + clip) * advantages[n])
            to_ref = torch.exp(ref[n, t] - logp[n, t])
            terms.append(gain - beta * (to_ref - torch.log(to_ref) - 1))
        outputs.append(sum(terms) / len(terms))
    return -sum(outputs) / len(outputs)


def grpo_loss(
    logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, beta: float = 0.04
) -> Tensor:
    """DeepSeekMath's objective, negated: a ratio and a KL term a token, averaged over each output, then over all.

    logp, old, ref: (N, T) log-probabilities under the policy, the policy that sampled, the reference; advantages: (N,);
    mask: (N, T).
    """
    ratio = (logp - old).exp()
    gain = clipped_gain(ratio, advantages[:, None], clip) - beta * kl_estimate(logp, ref)
    return -(gain.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)).mean()


def grpo_loss_printed(
    logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, beta: float = 0.04
) -> Tensor:
    """Eq. 26 to 28 as the report prints them, negated: one ratio and one KL term for a whole output. As `grpo_loss`."""
    logp, old, ref = (x.masked_fill(~mask, 0.0).sum(-1) for x in (logp, old, ref))  # (N,): ln of whole outputs
    return -(clipped_gain((logp - old).exp(), advantages, clip) - beta * kl_estimate(logp, ref)).mean()


# Does the reward rise?


@dataclass(frozen=True)
class GRPOOptions:
    """Constants of a run. V3 publishes none; DeepSeekMath has G 64, beta 0.04, rate 1e-6; R1 G 16, beta 0.001, clip 10.

    group_size: G; clip: epsilon, infinity for none; n_updates: of the weights for each batch of outputs; printed: the
    loss of Eq. 26 to 28 instead of DeepSeekMath's.
    """

    group_size: int = 8
    max_new_tokens: int = 40
    learning_rate: float = 3e-4
    clip: float = 0.2
    beta: float = 0.04
    divide_by_std: bool = True
    n_updates: int = 1
    printed: bool = False

    def __post_init__(self):
        if self.group_size < 2 or self.n_updates < 1 or self.max_new_tokens < 1:
            counts = f"group_size={self.group_size}, n_updates={self.n_updates}, max_new_tokens={self.max_new_tokens}"
            raise ValueError(f"{counts}: a group needs 2 outputs or more, the others must be 1 or more")
        if not (self.clip > 0 and self.beta >= 0 and self.learning_rate > 0):
            wrong = f"clip={self.clip}, beta={self.beta}, learning_rate={self.learning_rate}"
            raise ValueError(f"{wrong}: clip and rate must be positive, beta 0 or more")


def checked_rewards(rewards: Tensor, n: int) -> Tensor:
    """A judge's rewards as they are: (n,) finite numbers, else ValueError."""
    if rewards.shape != (n,) or not rewards.isfinite().all():
        raise ValueError(f"the judge gave {rewards.tolist()}; {n} finite numbers are needed, one an output")
    return rewards


class GRPO:
    """A policy and what trains it on its own outputs: a judge, a frozen copy as reference, an optimizer.

    judge(questions, rollouts) -> rewards (N,): one question a row. A question has its token ids in `.prompt`.
    """

    def __init__(self, policy: DeepSeekV3, judge: Callable, options: GRPOOptions, seed: int = 0, stop_when=None):
        self.policy, self.judge, self.options = policy, judge, options
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        rate = {"lr": options.learning_rate, "weight_decay": 0.0, "betas": (0.9, 0.95)}
        self.optimizer = torch.optim.AdamW(policy.parameters(), **rate, fused=True)
        self.seeds, self.stop_when = random.Random(seed), stop_when

    def step(self, questions: Sequence[Any]) -> dict[str, float]:
        """Write a group for each question, judge, compare within groups, update; gives a log line."""
        o, started = self.options, time.perf_counter()
        prompts, seed = [question.prompt for question in questions], self.seeds.getrandbits(32)
        rollouts = roll_out(self.policy, prompts, o.group_size, o.max_new_tokens, seed, self.stop_when)
        asked = [question for question in questions for _ in range(o.group_size)]
        rewards = checked_rewards(self.judge(asked, rollouts), len(asked)).view(-1, o.group_size)  # (Q, G)
        advantages = group_advantages(rewards, o.divide_by_std)
        return {
            "reward": rewards.mean().item(),
            "equal_groups": (advantages == 0).all(-1).float().mean().item(),
            "length": rollouts.mask.sum(-1).float().mean().item(),
            **self.update(rollouts, advantages.flatten()),
            "seconds": time.perf_counter() - started,
        }

    def update(self, rollouts: Rollouts, advantages: Tensor) -> dict[str, float]:
        """`n_updates` steps of the optimizer on the same outputs; advantages: (N,)."""
        old, mask = None, rollouts.mask
        with torch.no_grad():
            ref = self.logprobs(self.reference, rollouts.ids)
        for _ in range(self.options.n_updates):
            logp = self.logprobs(self.policy, rollouts.ids)
            old = logp.detach() if old is None else old  # the weights that sampled: those before the first update
            self.optimizer.zero_grad()
            self.loss(logp, old, ref, advantages, mask).backward()
            norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0, foreach=True)
            self.optimizer.step()
        moved = (logp.detach() - old)[mask].exp()
        return {
            "kl": kl_estimate(old, ref)[mask].mean().item(),
            "entropy": -old[mask].mean().item(),  # the tokens are drawn from the policy: their surprise estimates it
            "clipped": ((moved - 1).abs() > self.options.clip).float().mean().item(),
            "gradient_norm": norm.item(),
        }

    def logprobs(self, model: nn.Module, ids: Tensor) -> Tensor:
        """(N, T): of the training model, whose gradient is wanted, not the decoder's."""
        return token_logprobs(model, ids)

    def loss(self, logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """The loss that the options ask for."""
        loss_fn = grpo_loss_printed if self.options.printed else grpo_loss
        return loss_fn(logp, old, ref, advantages, mask, self.options.clip, self.options.beta)


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Share of questions that k tries would solve, from (Q, n) tries: 1 - C(n - c, k) / C(n, k), c of n correct."""
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must lie in 1..{n}, the tries of each question")
    missed = [math.comb(n - c, k) / math.comb(n, k) for c in correct.bool().sum(-1).tolist()]
    return 1 - torch.tensor(missed).mean()
