"""Layers that multiply with the kernels: a model is switched to them after `to_fp8`, or as it is in bfloat16.

Generated from chapters/15_triton_fp8.ipynb; edit the chapter, not this file.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3_mini import fp8
from dsv3_mini.fp8 import FP8Experts, FP8Linear, act_dequant
from dsv3_mini.kernels.activation import swiglu_quant
from dsv3_mini.kernels.gemm import fp8_gemm
from dsv3_mini.kernels.grouped import grouped_fp8_gemm, grouped_linear
from dsv3_mini.kernels.quantise import act_quant, check_tile, empty_rows, weight_quant
from dsv3_mini.moe import Experts, Routing, sort_by_expert

# How does the model use them?


def turned(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The transposed weight with its rows laid out for the tensor cores, which read E4M3 along K only."""
    out = empty_rows((*q.shape[:-2], q.shape[-1], q.shape[-2]), q.device)
    return out.copy_(q.transpose(-1, -2)), scale.transpose(-1, -2)


def weight_gradient(grad: Tensor, q: Tensor, scale: Tensor, tile: int, scale_fmt: str | None, interpret) -> Tensor:
    """Wgrad: gradients and kept inputs, both cut anew into tiles along the tokens: (N, out), (N, in) -> (out, in)."""
    columns = act_quant(grad.T, tile, scale_fmt, min_amax=1e-30, interpret=interpret)
    inputs = act_quant(act_dequant(q, scale, tile).T, tile, scale_fmt, interpret=interpret)
    return fp8_gemm(*columns, *inputs, tile, interpret=interpret)


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
            dw = weight_gradient(grad, q, scale, ctx.tile, ctx.scale_fmt, ctx.interpret).to(ctx.dtypes[1])
        return dx, dw, None, None, None, None


class KernelLinear(FP8Linear):
    """An FP8 linear layer whose products are kernels on a GPU (with `interpret` on a CPU too), torch's elsewhere."""

    interpret: bool

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_cuda or self.interpret):
            return super().forward(x)
        rows, options = x.flatten(0, -2), (self.tile, self.scale_fmt, self.cache_format)
        return KernelMatmul.apply(rows, self.weight, *options, self.interpret or None).unflatten(0, x.shape[:-1])


class GroupedFP8(torch.autograd.Function):
    """Row segments times their experts' weights, all three products in FP8 with power-of-two scales.

    x: (M, in), weight: (E, out, in), ends: (E,) -> (M, out). gated: x is [gate | up] (M, 2 in), and silu(gate) * up is
    what is quantised; x is kept and the activation differentiated anew in the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor, tile: int, gated: bool, interpret) -> Tensor:
        q, scale = (swiglu_quant if gated else act_quant)(x, tile, "ue8m0", interpret=interpret)
        w, w_scale = weight_quant(weight, tile, interpret=interpret)
        ctx.save_for_backward(q, scale, w, w_scale, ends, *([x] if gated else []))
        ctx.tile, ctx.interpret, ctx.dtypes = tile, interpret, (x.dtype, weight.dtype)
        return grouped_fp8_gemm(q, scale, w, w_scale, ends, tile, x.dtype, interpret=interpret)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, scale, w, w_scale, ends, *gate_up = ctx.saved_tensors
        tile, interpret = ctx.tile, ctx.interpret
        tiles = act_quant(grad, tile, "ue8m0", min_amax=1e-30, interpret=interpret)
        dx = grouped_fp8_gemm(*tiles, *turned(w, w_scale), ends, tile, ctx.dtypes[0], interpret=interpret)
        dw, start = torch.zeros(w.shape, device=w.device), 0
        for i, end in enumerate(ends.tolist()):
            if start < end:
                rows = slice(start, end)
                dw[i] = weight_gradient(grad[rows], q[rows], scale[rows], tile, "ue8m0", interpret)
            start = end
        return swiglu_gradient(*gate_up, dx) if gate_up else dx, dw.to(ctx.dtypes[1]), None, None, None, None


def swiglu_gradient(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Of silu(gate) * up with regard to [gate | up]: (M, 2F), (M, F) -> (M, 2F)."""
    gate, up = gate_up.chunk(2, -1)
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad * up * slope, grad * gate * sigmoid], -1)


class KernelFP8Experts(FP8Experts):
    """FP8 experts, all of them in one launch a product; SwiGLU is fused with the quantisation that follows it."""

    interpret: bool

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if not (x.is_cuda or self.interpret):
            return super().forward(x, routing)
        order, ends = sort_by_expert(routing.indices, len(self.down_proj))
        token, interpret = order // routing.indices.shape[1], self.interpret or None
        gate_up = GroupedFP8.apply(x[token], self.gate_up_proj, ends, self.tile, False, interpret)
        y = GroupedFP8.apply(gate_up, self.down_proj, ends, self.tile, True, interpret)
        return torch.zeros_like(x).index_add(0, token, (y * routing.weights.flatten()[order, None]).type_as(x))


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
    classes = {FP8Linear: KernelLinear, FP8Experts: KernelFP8Experts, Experts: KernelExperts}
    found = [module for module in model.modules() if type(module) in classes]
    if not found:
        raise ValueError(f"{type(model).__name__} has neither FP8 layers nor experts; `to_fp8` makes the former")
    for module in found:
        check_tile(getattr(module, "tile", 128), None)
    for module in found:
        module.__class__, module.interpret = classes[type(module)], interpret
    return model
