"""The moving average of the weights, kept beside them.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# What does a run consist of?


class WeightAverage:
    """Exponential moving average of the parameters, kept beside them: v = v + (p - v) / min(step, horizon)."""

    def __init__(self, model: nn.Module, horizon: float):
        self.parameters, self.horizon = dict(model.named_parameters()), max(1.0, horizon)
        self.values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step`, counted from 1: the plain mean at first, then the moving one."""
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), 1 / min(step, self.horizon))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the `with`, the model's parameters hold the average."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]
