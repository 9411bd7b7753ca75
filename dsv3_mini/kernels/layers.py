"""Layers that multiply with the kernels: a model is switched to them after `to_fp8`, or as it is in bfloat16.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3_mini import fp8
from dsv3_mini.fp8 import FP8Experts, FP8Linear, FP8SwiGLU, act_dequant, swiglu
from dsv3_mini.kernels.activation import swiglu_quant
from dsv3_mini.kernels.gemm import fp8_gemm
from dsv3_mini.kernels.grouped import grouped_fp8_gemm, grouped_fp8_wgrad, grouped_linear, start_tiles
from dsv3_mini.kernels.quantise import act_quant, check_tile, empty_rows, weight_quant
from dsv3_mini.moe import Experts, Routing

# How does the model use them?


def turned(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The transposed weight with its rows laid out for the tensor cores, which read E4M3 along K only."""
    out = empty_rows((*q.shape[:-2], q.shape[-1], q.shape[-2]), q.device)
    return out.copy_(q.transpose(-1, -2)), scale.transpose(-1, -2)


def weight_gradient(grad: Tensor, x: Tensor, tile: int, scale_fmt: str | None, interpret) -> Tensor:
    """Wgrad: gradient and input, both cut anew into tiles along the tokens: (N, out), (N, in) -> (out, in)."""
    columns = act_quant(grad.T, tile, scale_fmt, min_amax=1e-30, interpret=interpret)
    return fp8_gemm(*columns, *act_quant(x.T, tile, scale_fmt, interpret=interpret), tile, interpret=interpret)


class KernelMatmul(torch.autograd.Function):
    """`fp8.FP8Matmul` with its three products and their quantisation in kernels: y = x W^T, x (N, in), W (out, in)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, tile: int, scale_fmt: str | None, cache_format: str, interpret):
        quantise = partial(act_quant, tile=tile, scale_fmt=scale_fmt, interpret=interpret)
        if cache_format == "e4m3":
            kept = q, scale = quantise(x)
        else:  # twelve bits, for which Triton has no type either
            kept = fp8.act_quant(x, tile, scale_fmt, cache_format)
            q, scale = quantise(act_dequant(*kept, tile))
        w, w_scale = weight_quant(weight, tile, interpret=interpret)
        ctx.save_for_backward(*kept, w, w_scale)
        ctx.tile, ctx.scale_fmt, ctx.interpret, ctx.dtypes = tile, scale_fmt, interpret, (x.dtype, weight.dtype)
        return fp8_gemm(q, scale, w, w_scale, tile, x.dtype, interpret=interpret)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, scale, *weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            tiles = act_quant(grad, ctx.tile, ctx.scale_fmt, min_amax=1e-30, interpret=ctx.interpret)
            dx = fp8_gemm(*tiles, *turned(*weight), ctx.tile, ctx.dtypes[0], interpret=ctx.interpret)
        if ctx.needs_input_grad[1]:
            x = act_dequant(q, scale, ctx.tile)
            dw = weight_gradient(grad, x, ctx.tile, ctx.scale_fmt, ctx.interpret).to(ctx.dtypes[1])
        return dx, dw, None, None, None, None


class KernelLinear(FP8Linear):
    """An FP8 linear layer whose products are kernels on a GPU (with `interpret` on a CPU too), torch's elsewhere."""

    interpret: bool

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_cuda or self.interpret):
            return super().forward(x)
        rows, options = x.flatten(0, -2), (self.tile, self.scale_fmt, self.cache_format)
        return KernelMatmul.apply(rows, self.weight, *options, self.interpret or None).unflatten(0, x.shape[:-1])


class GroupedFeedForward(torch.autograd.Function):
    """`fp8.FP8FeedForward` for all experts at once, its products and quantisation in kernels.

    x: (M, D) sorted by expert, weights: (M, 1) or None, gate_up: (E, 2F, D), down: (E, D, F), ends: (E,) -> (M, D).
    F must be a multiple of tile, so that no tile holds a part of gate and a part of up: see `whole_tiles`.
    """

    @staticmethod
    def forward(ctx, x, weights, gate_up, down, ends, tile, scale_fmt, interpret):
        quantise = partial(act_quant, tile=tile, scale_fmt=scale_fmt, interpret=interpret)
        kept, blocks = quantise(x), [weight_quant(w, tile, interpret=interpret) for w in (gate_up, down)]
        inputs = grouped_fp8_gemm(*kept, *blocks[0], ends, tile, x.dtype, interpret=interpret)  # (M, 2F)
        h = swiglu_quant(inputs, weights, tile, scale_fmt, interpret=interpret)
        ctx.save_for_backward(*kept, *quantise(inputs), weights, *sum(blocks, ()), ends)
        ctx.options, ctx.dtypes = (tile, scale_fmt, interpret), (x.dtype, down.dtype)
        return grouped_fp8_gemm(*h, *blocks[1], ends, tile, x.dtype, interpret=interpret)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, scale, pre, pre_scale, weights, *blocks, ends = ctx.saved_tensors
        x, inputs = act_dequant(q, scale, ctx.options[0]), act_dequant(pre, pre_scale, ctx.options[0])
        leaves = [leaf.detach().requires_grad_() for leaf in (inputs, weights) if leaf is not None]
        with torch.enable_grad():
            h = swiglu(*leaves[0].chunk(2, -1), *leaves[1:])  # again, from what was kept
        d_inputs, *d_weights = torch.autograd.grad(h, leaves, input_gradient(grad, blocks[2:], ends, *ctx.options))
        dx = input_gradient(d_inputs, blocks[:2], ends, *ctx.options).to(ctx.dtypes[0])
        dw = (segment_gradients(g, t, ends, *ctx.options) for g, t in ((d_inputs, x), (grad, h.detach())))
        return dx, *(d_weights or [None]), *(w.to(ctx.dtypes[1]) for w in dw), None, None, None, None


def input_gradient(grad: Tensor, block: tuple, ends: Tensor, tile: int, scale_fmt: str | None, interpret) -> Tensor:
    """Dgrad of all segments: (M, out), weights (E, out, in) as Fprop quantised them -> (M, in) in float32."""
    tiles = act_quant(grad, tile, scale_fmt, min_amax=1e-30, interpret=interpret)
    return grouped_fp8_gemm(*tiles, *turned(*block), ends, tile, torch.float32, interpret=interpret)


def segment_gradients_reference(grad: Tensor, x: Tensor, ends: Tensor, *options) -> Tensor:
    """Wgrad of each segment in turn, zero for an expert without rows: (M, out), (M, in) -> (E, out, in)."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    pairs = zip(grad.split(counts), x.split(counts), strict=True)
    return torch.stack([weight_gradient(g, rows, *options) for g, rows in pairs])


def segment_gradients(
    grad: Tensor, x: Tensor, ends: Tensor, tile: int, scale_fmt: str | None = None, interpret: bool | None = None
) -> Tensor:
    """`segment_gradients_reference` with one launch a product, equal in every bit."""
    places, tile_ends = start_tiles(ends, len(x), tile)
    n_places = (len(x) // tile + len(ends)) * tile
    grad, x = (rows.new_zeros(n_places, rows.shape[1]).index_copy_(0, places, rows) for rows in (grad, x))
    columns = act_quant(grad.T, tile, scale_fmt, min_amax=1e-30, interpret=interpret)
    return grouped_fp8_wgrad(
        *columns, *act_quant(x.T, tile, scale_fmt, interpret=interpret), tile_ends, tile, interpret=interpret
    )


def whole_tiles(gate_up: Tensor, down: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Weights (E, 2F, D) and (E, D, F) with F filled up to whole tiles by zeros, which change no scale and no sum."""
    missing = -down.shape[-1] % tile
    if not missing:
        return gate_up, down
    return F.pad(gate_up.unflatten(1, (2, -1)), (0, 0, 0, missing)).flatten(1, 2), F.pad(down, (0, missing))


class KernelSwiGLU(FP8SwiGLU):
    """A dense FP8 feed-forward layer: one expert that sees every token."""

    interpret: bool

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_cuda or self.interpret):
            return super().forward(x)
        gate_up, rows = torch.cat([self.gate_proj.weight, self.up_proj.weight])[None], x.flatten(0, -2)
        ends = torch.tensor([len(rows)], dtype=torch.int32, device=x.device)
        weights = whole_tiles(gate_up, self.down_proj.weight[None], self.tile)
        return GroupedFeedForward.apply(rows, None, *weights, ends, self.tile, None, self.interpret or None).view_as(x)


class KernelFP8Experts(FP8Experts):
    """FP8 experts, all of them in one launch a product."""

    interpret: bool

    def feed_forward(self, rows: Tensor, weights: Tensor, ends: Tensor, product) -> Tensor:
        if not (rows.is_cuda or self.interpret):
            return super().feed_forward(rows, weights, ends, product)
        pair, options = whole_tiles(self.gate_up_proj, self.down_proj, self.tile), (ends, self.tile, "ue8m0")
        return GroupedFeedForward.apply(rows, weights, *pair, *options, self.interpret or None)


class KernelExperts(Experts):
    """Experts in bfloat16 whose grouped products are kernels on a GPU."""

    interpret: bool

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if not (x.is_cuda or self.interpret):
            return super().forward(x, routing)
        return super().forward(x, routing, product=partial(grouped_linear, interpret=self.interpret or None))


def use_kernels(model: nn.Module, interpret: bool = False) -> nn.Module:
    """Let a model's FP8 layers and its experts multiply with the kernels wherever its inputs are on a GPU; in place.

    On a CPU the torch twins stay, unless `interpret` asks for Triton's interpreter, which is exact and very slow.
    Raises ValueError if there is no layer to switch, or a tile that a kernel cannot cut.
    """
    classes = {FP8Linear: KernelLinear, FP8SwiGLU: KernelSwiGLU, FP8Experts: KernelFP8Experts, Experts: KernelExperts}
    found = [module for module in model.modules() if type(module) in classes]
    if not found:
        raise ValueError(f"{type(model).__name__} has neither FP8 layers nor experts; `to_fp8` makes the former")
    for module in found:
        check_tile(getattr(module, "tile", 128), None)
    for module in found:
        module.__class__, module.interpret = classes[type(module)], interpret
    return model
