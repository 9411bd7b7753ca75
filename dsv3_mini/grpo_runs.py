"""Reinforcement learning, measured: python -m dsv3_mini experiment grpo.

Generated from chapters/14_post_training.ipynb; edit the chapter, not this file.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_mini.grpo import GRPO, GRPOOptions, Rollouts, pass_at_k, roll_out
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.post_training_runs import base_model, expert_model
from dsv3_mini.rewards import RewardModel, by_rule, preference_pairs, train_reward_model
from dsv3_mini.verifiable import Problem, exercise_tokenizer, is_correct, sums

# Does the reward rise?


@dataclass(frozen=True)
class Plan:
    """The sizes of the experiment, the same number of outputs a step for every group size."""

    steps: int = 20
    outputs: int = 64  # a step
    max_new_tokens: int = 40
    learning_rate: float = 7e-4
    n_test: int = 32  # questions asked before and after
    tries: int = 32  # at each of them
    n_preferences: int = 96  # questions whose outputs the reward model is trained on
    judge_steps: int = 60
    steps_against_model: int = 30

    def options(self, **changes: Any) -> GRPOOptions:
        return GRPOOptions(**{"max_new_tokens": self.max_new_tokens, "learning_rate": self.learning_rate, **changes})


VARIANTS: dict[str, dict] = {
    "GRPO": {},
    "group of 4": {"group_size": 4},
    "group of 16": {"group_size": 16},
    "without deviation": {"divide_by_std": False},
    "without KL": {"beta": 0.0},
    "as printed": {"printed": True},
    "4 updates": {"n_updates": 4},
    "4 updates, no clip": {"n_updates": 4, "clip": 1e6},
}


class Unshifted(GRPO):
    """The mistake on purpose: log-probabilities taken where the token is read, not where it is predicted."""

    def logprobs(self, model: nn.Module, ids: Tensor) -> Tensor:
        seen = ids[:, 1:]
        return model(seen).log_softmax(-1).gather(-1, seen[..., None]).squeeze(-1)


class ReferenceAsOld(GRPO):
    """The mistake on purpose: ratios to the reference instead of the policy that sampled."""

    def loss(self, logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return super().loss(logp, ref, ref, advantages, mask)


MISTAKES: dict[str, type[GRPO]] = {"not shifted": Unshifted, "reference as old": ReferenceAsOld}


class Exam:
    """Fresh sums without end, a function of the seed, and the rule that checks the answers."""

    def __init__(self, seed: int):
        self.tokenizer, self.generator = exercise_tokenizer(), torch.Generator().manual_seed(1_000_003 * seed + 1)
        self.judge = by_rule(partial(is_correct, self.tokenizer))

    def take(self, count: int) -> list[Problem]:
        return sums(self.tokenizer, count, self.generator)

    def sit(self, policy: DeepSeekV3, asked: Sequence[Problem], tries: int, plan: "Plan", seed: int) -> tuple:
        """`tries` outputs to each question, and which are correct (Q, tries)."""
        rollouts = roll_out(policy, [p.prompt for p in asked], tries, plan.max_new_tokens, seed)
        correct = self.judge([p for p in asked for _ in range(tries)], rollouts)
        return rollouts, correct.view(len(asked), tries)


def measure(policy: DeepSeekV3, plan: Plan, seed: int) -> dict:
    """Many tries at each of some questions: share correct, pass@k, length, share of outputs that work in steps."""
    exam = Exam(50_000 + seed)
    rollouts, correct = exam.sit(policy, exam.take(plan.n_test), plan.tries, plan, seed)
    lengths = rollouts.mask.sum(-1).float()
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= plan.tries]
    return {
        "results": {"correct": round(correct.mean().item(), 4), "length": round(lengths.mean().item(), 2)},
        "in_steps": round((lengths > 10).float().mean().item(), 4),  # a box and its end take four tokens
        "pass_at_k": [[k, round(pass_at_k(correct, k).item(), 4)] for k in ks],
    }


def train(run: GRPO, plan: Plan, seed: int, steps: int, more: Callable[[], dict] = dict) -> list[dict]:
    """`steps` steps on fresh questions; a line each, with what `more` adds."""
    exam, n_questions, curve = Exam(seed), plan.outputs // run.options.group_size, []
    for _ in range(steps):
        log = run.step(exam.take(n_questions)) | more()
        curve.append({name: round(x, 4) for name, x in log.items()})
    return curve


def variant_run(start: DeepSeekV3, plan: Plan, seed: int, changes: dict, kind: type[GRPO] = GRPO) -> dict:
    """One variant from the fine-tuned model on."""
    started, options = time.perf_counter(), plan.options(**changes)
    run = kind(copy.deepcopy(start), Exam(seed).judge, options, seed)
    curve = train(run, plan, seed, plan.steps)
    measured = measure(run.policy, plan, seed)
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, **measured, "options": asdict(options), "curve": curve}


# What if the judge is a model?


BETAS = (0.0, 0.04, 0.4)  # leashes of the runs against the reward model


def learn_preferences(start: DeepSeekV3, plan: Plan, seed: int) -> tuple[RewardModel, dict]:
    """A reward model from pairs of outputs of the fine-tuned model, and how often it is right about other pairs."""
    torch.manual_seed(seed)
    model, exam = RewardModel(start), Exam(100_000 + seed)
    rollouts, correct = exam.sit(start, exam.take(plan.n_preferences), 8, plan, seed)
    pairs = preference_pairs(correct, seed)
    losses = train_reward_model(model, rollouts, pairs, plan.judge_steps, seed)
    others, correct = exam.sit(start, exam.take(plan.n_preferences), 8, plan, seed + 1)
    chosen, rejected = preference_pairs(correct, seed)
    with torch.no_grad():
        scores = model(others)
    right = (scores[chosen] > scores[rejected]).float().mean().item()
    return model, {"pairs": len(pairs[0]), "loss": round(losses[-1], 4), "right_about_pairs": round(right, 4)}


def against_model_run(start: DeepSeekV3, judge: RewardModel, plan: Plan, seed: int, beta: float) -> dict:
    """GRPO with the learned reward; the rule looks on and has no say."""
    started, exam, seen = time.perf_counter(), Exam(seed), []

    @torch.no_grad()
    def rate(questions: Sequence[Problem], rollouts: Rollouts) -> Tensor:
        seen.append(exam.judge(questions, rollouts).mean().item())
        return judge(rollouts)

    options = plan.options(beta=beta)
    run = GRPO(copy.deepcopy(start), rate, options, seed)
    curve = train(run, plan, seed, plan.steps_against_model, lambda: {"true_reward": seen[-1]})
    measured, asked = measure(run.policy, plan, seed), Exam(50_000 + seed).take(4)
    written = roll_out(run.policy, [p.prompt for p in asked], 1, plan.max_new_tokens, seed)
    texts = [exam.tokenizer.decode(output) for output in written.outputs]
    examples = [[p.question, p.answer, text] for p, text in zip(asked, texts, strict=True)]
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, **measured, "options": asdict(options), "curve": curve, "examples": examples}


def seed_runs(start: DeepSeekV3, plan: Plan, seed: int) -> Iterator[tuple[str, dict]]:
    """Everything for one fine-tuned model: (variant, what was measured)."""
    started, before = time.perf_counter(), measure(start, plan, seed)
    yield "fine-tuned", {"seconds": round(time.perf_counter() - started, 1), **before}
    for name, changes in VARIANTS.items():
        yield name, variant_run(start, plan, seed, changes)
    for name, kind in MISTAKES.items():
        yield name, variant_run(start, plan, seed, {}, kind)
    judge, about = learn_preferences(start, plan, seed)
    for beta in BETAS:
        yield f"learned reward, beta {beta:g}", against_model_run(start, judge, plan, seed, beta) | {"judge": about}


def grpo_runs(seeds: int = 3, plan: Plan | None = None) -> Iterator[dict]:
    """Variants, mistakes and a learned reward, from a model that is pretrained and fine-tuned anew for each seed."""
    plan = plan or Plan()
    for seed in range(seeds):
        start = expert_model(*base_model(seed), seed)
        shared = {"config": start.config.to_dict(), "plan": asdict(plan)}
        for variant, measured in seed_runs(start, plan, seed):
            yield {"variant": variant, "seed": seed, **measured, **shared}
