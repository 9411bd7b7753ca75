"""A model's own weights as numpy arrays, and its rules of routing, as compiled loops take them.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import RMSNorm
from dsv3_mini.mla import MLA
from dsv3_mini.moe import MoE
from dsv3_mini.mtp import MTPLayer

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


def join_arrays(layer: MTPLayer) -> JoinArrays:
    """The weights of an MTP layer's two norms before it, its projection, and the norm at its end."""
    return JoinArrays(
        *arrays(*(part.weight for part in (layer.enorm, layer.hnorm, layer.eh_proj, layer.shared_head.norm)))
    )


def routing_rules(config: ModelConfig) -> Rules:
    """The config's fields for `choose` and `route`."""
    n_group = 1 if config.topk_method == "greedy" else config.n_group
    chosen = (config.num_experts_per_tok, n_group, config.topk_group, config.topk_method == "noaux_tc")
    weighted = (config.scoring_func == "sigmoid", config.norm_topk_prob, float(config.routed_scaling_factor))
    return Rules(*chosen, *weighted)
