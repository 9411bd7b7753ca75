"""Activations that are computed again instead of kept: norms and MLA's up-projections.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dsv3_mini.layers import RMSNorm
from dsv3_mini.mla import MLA

# What does a step cost?


def attention_contexts(mla: MLA):
    """Contexts for `checkpoint`: keep the core attention's result and the two small latents, redo all the rest.

    A core of plain products, chapter 02's for bfloat16 on a CPU, is redone as well.
    """
    kept = {mla.q_a_proj.out_features if hasattr(mla, "q_a_proj") else 0, mla.kv_a_proj_with_mqa.out_features}

    def policy(ctx, op, *args, **kwargs):
        is_latent = op is torch.ops.aten.mm.default and args[1].shape[1] in kept
        is_core = "scaled_dot_product" in op.name()
        return CheckpointPolicy.MUST_SAVE if is_latent or is_core else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class ForgottenNorms:
    """Norm outputs that are not stored: where autograd would keep one, it gets the norm and its input instead."""

    def __init__(self):
        self.sources: dict[int, tuple] = {}

    def note(self, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of a norm: remember what made this output."""
        self.sources[id(output)] = (weakref.ref(output), norm, inputs[0].detach())

    def pack(self, tensor: Tensor):
        """What autograd stores in place of a tensor: for a norm's output, or a view of it, how to make it again."""
        base = tensor if tensor._base is None else tensor._base
        output, norm, x = self.sources.get(id(base), (lambda: None, None, None))
        if output() is not base:
            return tensor
        return norm, x, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed) -> Tensor:
        """The tensor that was packed."""
        if isinstance(packed, Tensor):
            return packed
        norm, x, *layout = packed
        with torch.no_grad():
            return type(norm).forward(norm, x).as_strided(*layout)


@contextmanager
def recompute_activations(model: nn.Module) -> Iterator[None]:
    """Forward passes inside the `with` keep no outputs of norms and of MLA's up-projections (report section 3.2.3).

    The backward pass, which may come after it, computes them again. Gradients are the same, bit for bit.
    """
    attentions = [module for module in model.modules() if isinstance(module, MLA)]
    inner = {id(part) for mla in attentions for part in mla.modules()}
    norms = [module for module in model.modules() if isinstance(module, RMSNorm) and id(module) not in inner]
    forgotten = ForgottenNorms()
    hooks = [norm.register_forward_hook(forgotten.note) for norm in norms]
    for norm in norms:
        norm.forward = partial(checkpoint, norm.forward, use_reentrant=False)
    for mla in attentions:
        contexts = partial(attention_contexts, mla)
        mla.forward = partial(checkpoint, mla.forward, use_reentrant=False, context_fn=contexts)
    try:
        with torch.autograd.graph.saved_tensors_hooks(forgotten.pack, forgotten.unpack):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in (*norms, *attentions):
            del module.forward


def activation_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that stand allocated when `forward` has run and its graph waits for the backward pass (CPU)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
    del loss
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())
