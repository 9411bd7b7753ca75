"""A model's own weights as arrays, and the decoder whose steps are compiled loops.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.decode import Decoder, widened
from dsv3_mini.decode_loops import add_layer, join, linear, rms_norm
from dsv3_mini.layers import RMSNorm
from dsv3_mini.mla import MLA
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import MoE

# What would a token cost if nothing were dispatched?


class AttentionArrays(NamedTuple):
    """The weights of an MLA and of the norm before it; matrices are (out, in), as in the checkpoint."""

    norm: np.ndarray  # (D,)
    q_a: np.ndarray  # (0, D) where queries are not compressed
    q_norm: np.ndarray
    q_b: np.ndarray  # (H * (nope + rope), q_lora_rank or D)
    kv_a: np.ndarray  # (C + rope, D)
    kv_norm: np.ndarray  # (C,)
    w_uk: np.ndarray  # (H, nope, C)
    w_uv: np.ndarray  # (H, v, C)
    out: np.ndarray  # (D, H * v)
    scale: float
    eps: float


class Rules(NamedTuple):
    """The config's fields that say how experts are chosen and weighted."""

    top_k: int
    n_group: int
    topk_group: int
    top_two: bool  # a group is worth its two best experts, not its best one
    sigmoid: bool
    normalised: bool
    factor: float


class FeedForwardArrays(NamedTuple):
    """The weights of a mixture of experts and of the norm before it. A dense layer has shared experts only."""

    norm: np.ndarray  # (D,)
    gate: np.ndarray  # (E, D)
    bias: np.ndarray  # (E,)
    gate_up: np.ndarray  # (E, 2F, D)
    down: np.ndarray  # (E, D, F)
    shared_gate_up: np.ndarray  # (2F', D); (0, D) where nothing is shared
    shared_down: np.ndarray  # (D, F')
    eps: float


class JoinArrays(NamedTuple):
    """What an MTP layer has beside its attention and experts."""

    enorm: np.ndarray  # (D,)
    hnorm: np.ndarray  # (D,)
    eh_proj: np.ndarray  # (D, 2D)
    norm: np.ndarray  # (D,), at its end


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors' own memory where it is in order, else a copy."""
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def attention_arrays(norm: RMSNorm, mla: MLA) -> AttentionArrays:
    """The weights of a layer's attention; only the halves of kv_b_proj are copied."""
    compressed = hasattr(mla, "q_a_proj")
    q_b = (mla.q_b_proj if compressed else mla.q_proj).weight
    q_a = mla.q_a_proj.weight if compressed else q_b.new_empty(0, q_b.shape[1])
    q_norm = mla.q_a_layernorm.weight if compressed else q_b.new_empty(0)
    w_uk, w_uv = mla.kv_b_proj.weight.unflatten(0, (mla.n_heads, -1)).tensor_split([mla.nope_dim], dim=1)
    latent = (mla.kv_a_proj_with_mqa.weight, mla.kv_a_layernorm.weight)
    matrices = arrays(norm.weight, q_a, q_norm, q_b, *latent, w_uk, w_uv, mla.o_proj.weight)
    return AttentionArrays(*matrices, float(mla.scale), float(norm.eps))


def feed_forward_arrays(norm: RMSNorm, mlp: nn.Module) -> FeedForwardArrays:
    """The weights of a layer's experts; only gate_proj and up_proj of the shared ones are copied, to lie together."""
    w = norm.weight
    gate, bias, gate_up, down = w.new_empty(0, len(w)), w.new_empty(0), w.new_empty(0, 0, len(w)), w.new_empty(0, 0, 0)
    shared = mlp
    if isinstance(mlp, MoE):
        gate, gate_up, down = mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj
        bias = getattr(mlp.gate, "e_score_correction_bias", gate.new_zeros(len(gate))).to(gate.dtype)
        shared = getattr(mlp, "shared_experts", None)
    both = [w.new_empty(0, len(w)), w.new_empty(len(w), 0)]
    if shared is not None:
        both = [torch.cat((shared.gate_proj.weight, shared.up_proj.weight)), shared.down_proj.weight]
    return FeedForwardArrays(*arrays(w, gate, bias, gate_up, down, *both), float(norm.eps))


def routing_rules(config: ModelConfig) -> Rules:
    """The config's fields for `choose` and `route`."""
    n_group = 1 if config.topk_method == "greedy" else config.n_group
    chosen = (config.num_experts_per_tok, n_group, config.topk_group, config.topk_method == "noaux_tc")
    weighted = (config.scoring_func == "sigmoid", config.norm_topk_prob, float(config.routed_scaling_factor))
    return Rules(*chosen, *weighted)


class CompiledPlan:
    """A DeepSeekV3 for decoding in compiled loops: in place of a `DecodePlan`, three times as fast for one text.

    It looks at the model's own weights, or at a float32 copy of narrower ones; after a training step, make a new one.
    Loops run on one core, rows one after the other; they are compiled at their first use, some seconds a dtype.
    n_tokens: only the first tokens may be written. ValueError where the model is not on the CPU.
    """

    @torch.no_grad()
    def __init__(self, model: DeepSeekV3, n_tokens: int | None = None):
        self.device = model.lm_head.weight.device
        if self.device.type != "cpu":
            raise ValueError(f"compiled loops need a model on the CPU, not on {self.device}; a DecodePlan runs there")
        self.model = model = widened(model)
        self.config, self.dtype, self.rules = model.config, model.lm_head.weight.dtype, routing_rules(model.config)
        self.layers = [self.layer(block) for block in list(model.model.layers)[: self.config.num_hidden_layers]]
        self.mtp = [
            (
                JoinArrays(*arrays(*(part.weight for part in (m.enorm, m.hnorm, m.eh_proj, m.shared_head.norm)))),
                *self.layer(m),
            )
            for m in model.mtp_layers
        ]
        self.embedding = model.model.embed_tokens.weight.detach()
        self.norm, self.head = arrays(model.model.norm.weight, model.lm_head.weight[:n_tokens])

    def layer(self, block: nn.Module) -> tuple[AttentionArrays, FeedForwardArrays]:
        """Both halves of a layer."""
        attention = attention_arrays(block.input_layernorm, block.self_attn)
        return attention, feed_forward_arrays(block.post_attention_layernorm, block.mlp)

    def decoder(self, batch: int, capacity: int, n_mtp: int = 0) -> "CompiledDecoder":
        """Room for the texts of a batch, see `Decoder`."""
        return CompiledDecoder(self, batch, capacity, n_mtp)


class CompiledDecoder(Decoder):
    """A `Decoder` whose steps are compiled loops; prompts are read by the model itself, as there."""

    def __init__(self, plan: CompiledPlan, batch: int, capacity: int, n_mtp: int = 0):
        super().__init__(plan, batch, capacity, n_mtp)
        self.tables = arrays(*(part.to(plan.dtype) for part in plan.model.model.rope(0, capacity)))
        self.rows = list(zip(*(arrays(*cache) for cache in self.caches), strict=True))  # of each text, all its caches

    def step(self, ids: Tensor, starts: Sequence[int]) -> Tensor:
        self.check(starts, ids.shape[1])
        plan, x = self.plan, F.embedding(ids, self.plan.embedding).numpy()  # (B, T, D)
        for row, caches, start in zip(x, self.rows, starts, strict=True):
            for (a, m), cache in zip(plan.layers, caches):  # noqa: B905 (MTP caches follow)
                add_layer(row, a, m, cache, start, *self.tables, plan.rules, 0)
            rms_norm(row, plan.norm, a.eps, row)
        return torch.from_numpy(x)

    def mtp_step(self, depth: int, h: Tensor, ids: Tensor, starts: Sequence[int], only_last: bool = False) -> Tensor:
        self.check(starts, length := ids.shape[1])
        plan, n_written, states = self.plan, length - 1 if only_last else 0, []
        (w, a, m), embedded = plan.mtp[depth], F.embedding(ids, plan.embedding).numpy()
        for row, h_row, caches, start in zip(embedded, *arrays(h), self.rows, starts, strict=True):
            x = join(h_row, row, w, a.eps)
            add_layer(x, a, m, caches[len(plan.layers) + depth], start, *self.tables, plan.rules, n_written)
            rms_norm(x, w.norm, a.eps, x)
            states.append(x[n_written:])
        return torch.from_numpy(np.stack(states))

    def logits(self, h: Tensor) -> Tensor:
        (rows,) = arrays(h.reshape(-1, h.shape[-1]))
        out = np.empty((len(rows), len(self.plan.head)), rows.dtype)
        linear(self.plan.head, rows, out)
        return torch.from_numpy(out).view(*h.shape[:-1], -1)
