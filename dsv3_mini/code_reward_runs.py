"""Rewards for code, measured on the mini model: python -m dsv3_mini experiment code_reward.

Generated from chapters/14_post_training.ipynb; edit the chapter, not this file.
"""

import copy
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_mini.code_rewards import Body, Head, any_python, heads_of, no_trifles, read_body
from dsv3_mini.data import bits_per_byte, encode, pack, token_bytes
from dsv3_mini.dataset import read_sources
from dsv3_mini.evaluate import complete_statements, function_heads, validation_loss
from dsv3_mini.grpo import GRPO, GRPOOptions, Rollouts, roll_out
from dsv3_mini.model import DeepSeekV3

# What does a policy make of a bad rule?


@dataclass(frozen=True)
class CodePlan:
    """The sizes of the experiment; steps and rule by variant."""

    steps: int = 40
    n_questions: int = 4  # a step
    tries: int = 2  # at each held-out head, before and after
    n_windows: int = 32
    options: GRPOOptions = field(
        default_factory=lambda: GRPOOptions(group_size=12, max_new_tokens=48, learning_rate=2e-4, beta=0.02)
    )


RULES: dict[str, Callable[[Body], float]] = {"any python": any_python, "no trifles": no_trifles}


class Writing:
    """What a policy's ids say: the text up to the line that leaves the function, and what can be said of it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens = token_bytes(tokenizer)

    def left(self, row: int, new: Sequence[int]) -> bool:
        """Whether the text has left the function: a line that begins in the first column."""
        return re.search(rb"\n[^ \t\n#)]", b"".join(self.tokens[i] for i in new[-3:])) is not None

    def text(self, head: Head, output: Sequence[int]) -> str:
        written = b"".join(self.tokens[i] for i in output).decode("utf-8", errors="replace")
        return complete_statements(head.text + written, finished=False)

    def bodies(self, heads: Sequence[Head], rollouts: Rollouts) -> list[Body]:
        return [read_body(self.text(*pair)) for pair in zip(heads, rollouts.outputs, strict=True)]


def describe_bodies(bodies: Sequence[Body]) -> dict[str, float]:
    """Means: what parses, what is trivial among all, different statements, reads a parameter."""
    names = ("parses", "trivial", "statements", "reads_parameter")
    return {name: round(sum(getattr(body, name) for body in bodies) / len(bodies), 4) for name in names}


@dataclass
class CodeBench:
    """What all runs share: the model as trained, heads to practise on, heads and text that it has never read."""

    plan: CodePlan
    model: DeepSeekV3
    writing: Writing
    heads: list[Head]
    held_out: list[Head]
    windows: Tensor
    bytes_per_token: float

    def measure(self, policy: DeepSeekV3, seed: int) -> dict:
        """Bodies for held-out heads, some of them in full, and bits per byte of held-out text."""
        prompts, tries = [head.prompt for head in self.held_out], self.plan.tries
        rollouts = roll_out(policy, prompts, tries, self.plan.options.max_new_tokens, seed, self.writing.left)
        asked = [head for head in self.held_out for _ in range(tries)]
        loss = validation_loss(policy, self.windows, 8, self.plan.n_windows)
        results = {
            **describe_bodies(self.writing.bodies(asked, rollouts)),
            "length": round(rollouts.mask.sum().item() / len(asked), 2),
            "bits_per_byte": round(bits_per_byte(loss, 1, self.bytes_per_token), 4),
        }
        shown = range(0, 8 * tries, tries)
        return {"results": results, "examples": [self.writing.text(asked[n], rollouts.outputs[n]) for n in shown]}

    def train(self, rule: Callable[[Body], float], seed: int) -> tuple[DeepSeekV3, list[dict]]:
        """A copy of the model after GRPO by a rule, and a line for each step."""
        seen: list[list[Body]] = []

        def judge(heads: Sequence[Head], rollouts: Rollouts) -> Tensor:
            seen.append(self.writing.bodies(heads, rollouts))
            return torch.tensor([rule(body) for body in seen[-1]])

        run = GRPO(copy.deepcopy(self.model), judge, self.plan.options, seed, self.writing.left)
        source, curve = random.Random(seed), []
        for _ in range(self.plan.steps):
            log = run.step(source.sample(self.heads, self.plan.n_questions))
            curve.append({name: round(x, 4) for name, x in (log | describe_bodies(seen[-1])).items()})
        return run.policy, curve


def open_bench(checkpoint: Path, plan: CodePlan) -> tuple[CodeBench, dict]:
    """The bench on a trained folder and its own corpus, and what a log says of them."""
    model = DeepSeekV3.from_pretrained(checkpoint, torch.float32)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    trained = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    corpus = read_sources(trained["options"]["data"], trained["options"]["max_bytes"])
    practice, held_out = (heads_of(tokenizer, function_heads(texts, 5000)) for texts in (corpus.train, corpus.valid))
    short = [head for head in practice if len(head.prompt) <= 24 and "()" not in head.text]
    valid = encode(tokenizer, corpus.valid)
    per_token = sum(len(text.encode()) for text in corpus.valid) / sum(map(len, valid))
    windows = pack(valid, trained["options"]["seq_len"])
    bench = CodeBench(plan, model, Writing(tokenizer), short, held_out, windows, per_token)
    about = {"config": model.config.to_dict(), "plan": asdict(plan), "corpus": corpus.sha256}
    return bench, about | {"same_text": corpus.sha256 == trained["corpus"]["sha256"]}


def code_reward_runs(
    checkpoint: str | os.PathLike = "assets/checkpoints/mini", seeds: int = 3, plan: CodePlan | None = None
) -> Iterator[dict]:
    """The mini model under two rules, and before either: what its functions look like, what else it forgot."""
    bench, about = open_bench(Path(checkpoint), plan or CodePlan())
    for seed in range(seeds):
        started = time.perf_counter()
        before = bench.measure(bench.model, seed)
        yield {"variant": "before", "seed": seed, "seconds": round(time.perf_counter() - started, 1), **before, **about}
        for name, rule in RULES.items():
            started = time.perf_counter()
            policy, curve = bench.train(rule, seed)
            after, seconds = bench.measure(policy, seed), round(time.perf_counter() - started, 1)
            yield {"variant": name, "seed": seed, "seconds": seconds, **after, "curve": curve, **about}
