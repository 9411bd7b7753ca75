"""The gate of DeepSeekMoE in one kernel: sigmoid, bias, groups, choice and weights.

Generated from chapters/16_triton_attention_moe.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.interpreter import expect, launch, tl, triton

# What do many small operations cost?


@triton.jit
def gate_kernel(
    logits, bias, indices, weights, factor,
    E: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program, of one warp: one token. SLOTS is K rounded up to a power of two. Ties go to the lower index."""
    row, e, g, slot = tl.program_id(0).to(tl.int64), tl.arange(0, E), tl.arange(0, G), tl.arange(0, SLOTS)
    scores = tl.sigmoid(tl.load(logits + row * E + e).to(tl.float32))
    choice = tl.reshape(scores + tl.load(bias + e), (G, E // G))
    best, best_idx = tl.max(choice, 1, return_indices=True)
    others = tl.where(tl.arange(0, E // G)[None, :] == best_idx[:, None], float("-inf"), choice)
    worth, kept = best + tl.max(others, 1), g < 0  # (G,), none is kept yet
    for _ in tl.static_range(KEPT):
        top = g == tl.argmax(worth, 0)
        kept, worth = kept | top, tl.where(top, float("-inf"), worth)
    choice = tl.reshape(tl.where(kept[:, None], choice, float("-inf")), (E,))
    chosen, weight = tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.float32)
    for k in tl.static_range(K):
        top = tl.argmax(choice, 0)
        chosen = tl.where(slot == k, top, chosen)
        weight = tl.where(slot == k, tl.sum(tl.where(e == top, scores, 0.0), 0), weight)  # the score without its bias
        choice = tl.where(e == top, float("-inf"), choice)
    weight = weight / (tl.sum(weight, 0) + 1e-20) * factor
    tl.store(indices + row * K + slot, chosen.to(tl.int64), mask=slot < K)
    tl.store(weights + row * K + slot, weight, mask=slot < K)


def route(logits: Tensor, bias: Tensor, config: ModelConfig, interpret: bool | None = None) -> tuple[Tensor, Tensor]:
    """Chosen experts and their weights (equations 13-16, and the factor of the published code) in one kernel.

    logits (N, E) bfloat16 or float32, bias (E,) float32, both contiguous -> indices (N, K) int64, best first, weights
    (N, K) float32. Ties go to the lower index. Without gradient. ValueError for another kind of gate, or what does
    not fit.
    """
    e, g, k, kept = config.n_routed_experts, config.n_group, config.num_experts_per_tok, config.topk_group
    if config.topk_method != "noaux_tc" or config.scoring_func != "sigmoid" or not config.norm_topk_prob:
        raise ValueError(
            f"topk_method={config.topk_method!r}, scoring_func={config.scoring_func!r}, norm_topk_prob="
            f"{config.norm_topk_prob}; this kernel is V3's gate: 'noaux_tc', 'sigmoid', True"
        )
    if e & (e - 1) or g & (g - 1) or e < 2 * g or k > kept * (e // g):
        raise ValueError(f"{e} experts in {g} groups, {k} of {kept} groups: powers of two, 2 to a group, k of the kept")
    expect("logits", logits, (None, e), torch.bfloat16, torch.float32)
    expect("bias", bias, (e,), torch.float32)
    if not logits.is_contiguous() or not bias.is_contiguous():
        raise ValueError(f"logits {tuple(logits.shape)} has strides {logits.stride()}; call .contiguous() first")
    indices = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(len(logits), k, dtype=torch.float32, device=logits.device)
    meta = dict(E=e, G=g, K=k, KEPT=kept, SLOTS=triton.next_power_of_2(k), num_warps=1, interpret=interpret)
    launch(gate_kernel, (len(logits),), logits, bias, indices, weights, config.routed_scaling_factor, **meta)
    return indices, weights


# What does the compiler make of it?


def compile_cases() -> dict[str, Case]:
    """V3's gate: 8 of 256 experts, from 4 of 8 groups."""
    tensors = {"logits": "*fp32:16", "bias": "*fp32:16", "indices": "*i64:16", "weights": "*fp32:16", "factor": "fp32"}
    return {"gate": Case(gate_kernel, tensors, {"E": 256, "G": 8, "K": 8, "KEPT": 4, "SLOTS": 8}, 1)}
