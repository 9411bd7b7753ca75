"""The decoder whose steps are compiled loops over a model's own weights.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.decode import Decoder, widened
from dsv3_mini.decode_arrays import (
    AttentionArrays,
    FeedForwardArrays,
    arrays,
    attention_arrays,
    feed_forward_arrays,
    join_arrays,
    routing_rules,
)
from dsv3_mini.decode_loops import add_layer, join, linear, rms_norm
from dsv3_mini.model import DeepSeekV3

# What would a token cost if nothing were dispatched?


class CompiledPlan:
    """A DeepSeekV3 for decoding one text at a time in compiled loops, in place of a `DecodePlan`.

    It looks at the model's own weights, or at a float32 copy of narrower ones; after a training step, make a new one.
    Loops run on one core, rows one after the other. They are compiled at their first use, some seconds for a dtype,
    and kept on disk. n_tokens: only the first tokens may be written. ValueError where the model is not on the CPU.
    """

    @torch.no_grad()
    def __init__(self, model: DeepSeekV3, n_tokens: int | None = None):
        self.device = model.lm_head.weight.device
        if self.device.type != "cpu":
            raise ValueError(f"compiled loops need a model on the CPU, not on {self.device}; a DecodePlan runs there")
        self.model = model = widened(model)
        self.config, self.dtype, self.rules = model.config, model.lm_head.weight.dtype, routing_rules(model.config)
        self.layers = [self.layer(block) for block in list(model.model.layers)[: self.config.num_hidden_layers]]
        self.mtp = [(join_arrays(layer), *self.layer(layer)) for layer in model.mtp_layers]
        self.embedding = model.model.embed_tokens.weight.detach()
        self.norm, self.head = arrays(model.model.norm.weight, model.lm_head.weight[:n_tokens])
        self.eps = float(model.model.norm.eps)

    def layer(self, block: nn.Module) -> tuple[AttentionArrays, FeedForwardArrays]:
        """Both halves of a layer."""
        attention = attention_arrays(block.input_layernorm, block.self_attn)
        return attention, feed_forward_arrays(block.post_attention_layernorm, block.mlp)

    def decoder(self, batch: int, capacity: int, n_mtp: int = 0) -> "CompiledDecoder":
        """Room for the texts of a batch, see `Decoder`."""
        return CompiledDecoder(self, batch, capacity, n_mtp)


class CompiledDecoder(Decoder):
    """A `Decoder` whose steps are compiled loops; prompts are read by the model itself, as there.

    Loops check no index, so states that do not fit are refused before they enter: ValueError.
    """

    def __init__(self, plan: CompiledPlan, batch: int, capacity: int, n_mtp: int = 0):
        super().__init__(plan, batch, capacity, n_mtp)
        self.tables = arrays(*(part.to(plan.dtype) for part in plan.model.model.rope(0, capacity)))
        self.rows = list(zip(*(arrays(*cache) for cache in self.caches), strict=True))  # of each text, all its caches

    def states(self, h: Tensor, *shape: int) -> np.ndarray:
        """Hidden states (*shape, D) of the plan's dtype, as an array."""
        if (found := (tuple(h.shape), h.dtype)) != (wanted := ((*shape, len(self.plan.norm)), self.plan.dtype)):
            raise ValueError(f"hidden states are {found}; {wanted} is needed")
        return h.detach().contiguous().numpy()

    def step(self, ids: Tensor, starts: Sequence[int]) -> Tensor:
        self.check(starts, ids.shape[1])
        plan, x = self.plan, F.embedding(ids, self.plan.embedding).numpy()  # (B, T, D)
        for row, caches, start in zip(x, self.rows, starts, strict=True):
            for (a, m), cache in zip(plan.layers, caches):  # noqa: B905 (MTP caches follow)
                add_layer(row, a, m, cache, start, *self.tables, plan.rules, 0)
            rms_norm(row, plan.norm, plan.eps, row)
        return torch.from_numpy(x)

    def mtp_step(self, depth: int, h: Tensor, ids: Tensor, starts: Sequence[int], only_last: bool = False) -> Tensor:
        self.check(starts, length := ids.shape[1])
        plan, n_written, states = self.plan, length - 1 if only_last else 0, []
        (w, a, m), embedded = plan.mtp[depth], F.embedding(ids, plan.embedding).numpy()
        for h_row, row, caches, start in zip(self.states(h, *ids.shape), embedded, self.rows, starts, strict=True):
            x = join(h_row, row, w, plan.eps)
            add_layer(x, a, m, caches[len(plan.layers) + depth], start, *self.tables, plan.rules, n_written)
            rms_norm(x, w.norm, plan.eps, x)
            states.append(x[n_written:])
        return torch.from_numpy(np.stack(states))

    def logits(self, h: Tensor) -> Tensor:
        rows = self.states(h, *h.shape[:-1]).reshape(-1, h.shape[-1])
        out = np.empty((len(rows), len(self.plan.head)), rows.dtype)
        linear(self.plan.head, rows, out)
        return torch.from_numpy(out).view(*h.shape[:-1], -1)
