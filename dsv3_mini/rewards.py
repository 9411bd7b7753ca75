"""What an output is worth: rules that check it, and a model that learned from preferences to rate it.

Generated from chapters/14_post_training.ipynb; edit the chapter, not this file.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.grpo import Rollouts
from dsv3_mini.model import DeepSeekV3

# What is an answer worth?


def by_rule(check: Callable[[Any, list[int]], float]) -> Callable[[Sequence[Any], Rollouts], Tensor]:
    """A judge for `GRPO` out of a rule: (question, output ids) -> number."""

    def judge(questions: Sequence[Any], rollouts: Rollouts) -> Tensor:
        return torch.tensor([float(check(*pair)) for pair in zip(questions, rollouts.outputs, strict=True)])

    return judge


# What if the judge is a model?


class RewardModel(nn.Module):
    """The trunk of a trained model and, in place of its head, one number read from the state of the last written token.

    model(rollouts) -> (N,). As in the report, it starts from the SFT checkpoint.
    """

    def __init__(self, sft_model: DeepSeekV3):
        super().__init__()
        self.trunk = copy.deepcopy(sft_model.model)
        self.head = nn.Linear(sft_model.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, rollouts: Rollouts) -> Tensor:
        positions = torch.arange(1, rollouts.ids.shape[1])
        last = (rollouts.mask * positions).amax(-1)  # (N,): what follows is filling
        h = self.trunk(rollouts.ids)[torch.arange(len(last)), last]  # (N, D)
        return self.head(h).squeeze(-1)


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry: -ln sigmoid(r_chosen - r_rejected), mean over pairs of scores (P,)."""
    return -F.logsigmoid(chosen - rejected).mean()


def preference_pairs(rewards: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Row numbers of a better and a worse output to each question, (P,) each, drawn at random.

    rewards: (Q, G). Questions whose outputs are all alike give no pair.
    """
    generator, pairs = torch.Generator().manual_seed(seed), []
    for q, row in enumerate(rewards):
        best, worst = ((row == value).nonzero().flatten() for value in (row.max(), row.min()))
        if row.max() > row.min():
            drawn = (rows[torch.randint(len(rows), (), generator=generator)].item() for rows in (best, worst))
            pairs.append([q * len(row) + n for n in drawn])
    chosen, rejected = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return chosen, rejected


def train_reward_model(
    model: RewardModel,
    rollouts: Rollouts,
    pairs: tuple[Tensor, Tensor],
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
) -> list[float]:
    """Fit the scores of chosen and rejected rows (P,) of `rollouts` by Bradley-Terry; the loss of every step.

    ValueError if there is no pair.
    """
    if not len(pairs[0]):
        raise ValueError("no pair of outputs to prefer between: every group's rewards are equal")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator, losses, (chosen, rejected) = torch.Generator().manual_seed(seed), [], pairs
    for step in range(steps):
        drawn = torch.randint(len(chosen), (batch_size,), generator=generator)
        scores = model(rollouts.rows(torch.cat((chosen[drawn], rejected[drawn]))))
        loss = preference_loss(*scores.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)
        optimizer.step()
        losses.append(loss.item())
    return losses
