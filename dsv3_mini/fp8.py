"""FP8 as the report trains with it: a scale for each tile and block, three products a layer, one switch for a model.

Generated from chapters/07_fp8.ipynb; edit the chapter, not this file.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3_mini.layers import SwiGLU
from dsv3_mini.moe import Experts, Routing
from dsv3_mini.precision import check_float, largest_value, multiply_float32, round_to_format, rows_of_scales, scale_for

# What does a scale rescue?


def act_quant_reference(x: Tensor, tile: int = 128) -> tuple[Tensor, Tensor]:
    """One tile after the other, without torch's float8: (N, K) -> E4M3 values, scales (N, K/tile), float32."""
    q, scale = torch.empty(x.shape), torch.empty(len(x), -(-x.shape[1] // tile))
    for row in range(len(x)):
        for i, part in enumerate(x[row].float().split(tile)):
            scale[row, i] = part.abs().max().clamp(min=1e-4) / 448
            q[row, i * tile : i * tile + len(part)] = round_to_format(part / scale[row, i], 4, 3, infinity=False)
    return q, scale


def act_quant(
    x: Tensor, tile: int = 128, scale_fmt: str | None = None, number_format: str = "e4m3", min_amax: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Quantise along the last dimension, a scale for each `tile` elements (report section 3.3.2).

    x: (..., K) -> q (..., K) and scale (..., ceil(K/tile)) float32, x ~ q * scale; the last tile may be short.
    scale_fmt: None or "ue8m0". number_format: "e4m3" gives float8_e4m3fn, "e5m6" float32 holding 12-bit values, for
    which torch has no type. A tile's largest magnitude counts as `min_amax` at least, as in DeepSeek's kernel.
    """
    check_float(x, tile, 1)
    if number_format not in ("e4m3", "e5m6"):
        raise ValueError(f"number_format={number_format!r}; choose 'e4m3' or 'e5m6'")
    largest = 448.0 if number_format == "e4m3" else largest_value(5, 6)
    n = x.shape[-1]
    tiles = F.pad(x.float(), (0, -n % tile)).unflatten(-1, (-(-n // tile), tile))
    scale = scale_for(tiles.abs().amax(-1).clamp(min=min_amax), scale_fmt, largest)
    q = (tiles / scale[..., None]).flatten(-2)[..., :n]
    return (q.to(torch.float8_e4m3fn) if number_format == "e4m3" else round_to_format(q, 5, 6)), scale


def act_dequant(q: Tensor, scale: Tensor, tile: int = 128) -> Tensor:
    """q * scale for `act_quant`'s results: (..., K) float32."""
    expected = (*q.shape[:-1], -(-q.shape[-1] // tile))
    if scale.shape != expected:
        raise ValueError(f"scales {tuple(scale.shape)} for {tuple(q.shape)} in tiles of {tile}; {expected} needed")
    return q.float() * scale.repeat_interleave(tile, -1)[..., : q.shape[-1]]


def weight_quant(w: Tensor, block: int = 128, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantise in square blocks: (..., M, N) -> float8_e4m3fn (..., M, N), scale (..., ceil(M/block), ceil(N/block)).

    Blocks at the edges are filled up with zeros: 576 rows give 5 block rows. Leading dimensions: stacked experts.
    """
    check_float(w, block, 2)
    m, n = w.shape[-2:]
    padded = F.pad(w.float(), (0, -n % block, 0, -m % block))
    blocks = padded.unflatten(-1, (-(-n // block), block)).unflatten(-3, (-(-m // block), block))
    scale = scale_for(blocks.abs().amax((-3, -1)).clamp(min=1e-30), scale_fmt)
    q = (blocks / scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2)
    return q[..., :m, :n].to(torch.float8_e4m3fn), scale


def weight_dequant(q: Tensor, scale: Tensor, block: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale for `weight_quant`'s results, and for the published `weight` and `weight_scale_inv`: (..., M, N)."""
    m, n = q.shape[-2:]
    expected = (*q.shape[:-2], -(-m // block), -(-n // block))
    if scale.shape != expected:
        raise ValueError(f"scales {tuple(scale.shape)} for {tuple(q.shape)} in blocks of {block}; {expected} needed")
    spread = scale.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return (q.float() * spread[..., :m, :n]).to(dtype)


# How many bits does a sum need?


def fp8_gemm_reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, tile: int = 128) -> Tensor:
    """One element after the other: sum over K blocks of (a . b) a_scale b_scale, b scaled in blocks."""
    out = torch.zeros(len(a), len(b))
    for i in range(len(a)):
        for j in range(len(b)):
            for k in range(a_scale.shape[1]):
                part = slice(k * tile, (k + 1) * tile)
                partial = (a[i, part].double() * b[j, part].double()).sum()
                out[i, j] += partial.float() * (a_scale[i, k] * b_scale[j // tile, k])
    return out


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    tile: int = 128,
    multiply: Callable[[Tensor, Tensor], Tensor] = multiply_float32,
) -> Tensor:
    """C = A B^T of float8 operands, each partial sum of `tile` elements scaled when it is promoted to float32.

    a: (M, K), b: (N, K); scales for 1 x tile tiles (rows, ceil(K/tile)) or for tile x tile blocks -> (M, N) float32.
    multiply: how a partial product is added up; `matmul_limited` gives the tensor core's few bits.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)}: (M, K) and (N, K) with one K needed")
    a_scale, b_scale = rows_of_scales("a", a, a_scale, tile), rows_of_scales("b", b, b_scale, tile)
    out = torch.zeros(len(a), len(b), device=a.device)
    for k in range(a_scale.shape[1]):
        part = slice(k * tile, (k + 1) * tile)
        out += multiply(a[:, part], b[:, part]) * (a_scale[:, k, None] * b_scale[None, :, k])
    return out


# Which products does a linear layer need?


def dgrad(grad: Tensor, w: Tensor, w_scale: Tensor, tile: int, scale_fmt: str | None, gemm: Callable) -> Tensor:
    """dX = dY W: gradient (N, out) in tiles along out, weight (out, in) as it was quantised for Fprop -> (N, in)."""
    return gemm(*act_quant(grad, tile, scale_fmt, min_amax=1e-30), w.T, w_scale.T, tile)


def wgrad(grad: Tensor, x: Tensor, tile: int, scale_fmt: str | None, gemm: Callable) -> Tensor:
    """dW = dY^T X: gradient (N, out) and input (N, in), both in tiles along the tokens -> (out, in)."""
    columns = act_quant(grad.T, tile, scale_fmt, min_amax=1e-30)
    return gemm(*columns, *act_quant(x.T, tile, scale_fmt), tile)


class FP8Matmul(torch.autograd.Function):
    """y = x W^T in three FP8 products: Fprop, Dgrad, Wgrad (report figure 6). x: (N, in), W: (out, in).

    Each product cuts its activations and gradients into 1 x tile tiles along its own inner dimension: in, out, N.
    W is quantised once, in blocks, which serve both directions. What is kept for Wgrad is the quantised input.
    gemm: what computes all three, with the arguments of `fp8_gemm`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, tile: int, scale_fmt: str | None, cache_format: str, gemm=fp8_gemm):
        kept = act_quant(x, tile, scale_fmt, cache_format)
        q, scale = kept if cache_format == "e4m3" else act_quant(act_dequant(*kept, tile), tile, scale_fmt)
        w, w_scale = weight_quant(weight, tile)
        ctx.save_for_backward(*kept, w, w_scale)
        ctx.options, ctx.x_dtype, ctx.w_dtype = (tile, scale_fmt, gemm), x.dtype, weight.dtype
        return gemm(q, scale, w, w_scale, tile).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, scale, w, w_scale = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dgrad(grad, w, w_scale, *ctx.options).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dw = wgrad(grad, act_dequant(q, scale, ctx.options[0]), *ctx.options).to(ctx.w_dtype)
        return dx, dw, None, None, None, None


class FP8Linear(nn.Linear):
    """A linear layer without bias whose three products run in FP8; the weight itself stays in its own precision.

    scale_fmt and cache_format: those of its input, "ue8m0" and "e5m6" before the output projection of attention.
    gemm: what multiplies, with the arguments of `fp8_gemm`. ValueError for a format or tile that does not exist.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tile: int = 128,
        scale_fmt: str | None = None,
        cache_format: str = "e4m3",
        gemm: Callable = fp8_gemm,
    ):
        super().__init__(in_features, out_features, bias=False)
        act_quant(torch.zeros(1, device="cpu"), tile, scale_fmt, cache_format)  # refuses wrong options at once
        self.tile, self.scale_fmt, self.cache_format, self.gemm = tile, scale_fmt, cache_format, gemm

    def forward(self, x: Tensor) -> Tensor:
        options = self.tile, self.scale_fmt, self.cache_format, self.gemm
        return FP8Matmul.apply(x.flatten(0, -2), self.weight, *options).unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tile={self.tile}, scale_fmt={self.scale_fmt}, cache_format={self.cache_format}"


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up, and the gate weights of routed tokens where given: (N, F), (N, F), (N, 1) -> (N, F)."""
    h = F.silu(gate) * up
    return h if weights is None else h * weights


class FP8FeedForward(torch.autograd.Function):
    """down(swiglu(gate(x), up(x), weights)) in FP8, which keeps no output of SwiGLU (report section 3.3.3).

    x: (N, D), weights: (N, 1) or None, gate and up: (F, D), down: (D, F) -> (N, D). Kept in FP8 are x and SwiGLU's two
    inputs; its output is computed again from them for Wgrad. Tiles and gemm as in `FP8Matmul`.
    """

    @staticmethod
    def forward(ctx, x, weights, gate, up, down, tile, scale_fmt, gemm):
        kept, blocks = act_quant(x, tile, scale_fmt), [weight_quant(w, tile) for w in (gate, up, down)]
        inputs = torch.stack([gemm(*kept, *block, tile).to(x.dtype) for block in blocks[:2]])  # (2, N, F)
        ctx.save_for_backward(*kept, *act_quant(inputs, tile, scale_fmt), weights, *sum(blocks, ()))
        ctx.options, ctx.dtypes = (tile, scale_fmt, gemm), (x.dtype, down.dtype)
        return gemm(*act_quant(swiglu(*inputs, weights), tile, scale_fmt), *blocks[2], tile).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, scale, pre, pre_scale, weights, *blocks = ctx.saved_tensors
        x, inputs = act_dequant(q, scale, ctx.options[0]), act_dequant(pre, pre_scale, ctx.options[0])
        leaves = [leaf.detach().requires_grad_() for leaf in (*inputs, weights) if leaf is not None]
        with torch.enable_grad():
            h = swiglu(*leaves)  # again, from what was kept
        dgate, dup, *dweights = torch.autograd.grad(h, leaves, dgrad(grad, *blocks[4:], *ctx.options))
        dx = dgrad(dgate, *blocks[:2], *ctx.options) + dgrad(dup, *blocks[2:4], *ctx.options)
        dw = (wgrad(g, t, *ctx.options).to(ctx.dtypes[1]) for g, t in ((dgate, x), (dup, x), (grad, h.detach())))
        return dx.to(ctx.dtypes[0]), *(dweights or [None]), *dw, None, None, None


# What stays out of FP8?


class FP8SwiGLU(SwiGLU):
    """The feed-forward layer of chapter 02 in FP8: its three projections and what they keep."""

    tile: int = 128
    gemm: Callable = staticmethod(fp8_gemm)

    def forward(self, x: Tensor) -> Tensor:
        weights = (layer.weight for layer in (self.gate_proj, self.up_proj, self.down_proj))
        y = FP8FeedForward.apply(x.flatten(0, -2), None, *weights, self.tile, None, self.gemm)
        return y.unflatten(0, x.shape[:-1])


class FP8Experts(Experts):
    """The routed experts of chapter 04 in FP8, one expert after the other; sorting and summing are inherited.

    All their tiles have power-of-two scales, as the report asks of what is dispatched: inputs, and the gradients that
    come back. The `product` that chapter 04 hands on is here `gemm`.
    """

    tile: int = 128
    gemm: Callable = staticmethod(fp8_gemm)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return super().forward(x, routing, product=self.gemm)

    def feed_forward(self, rows: Tensor, weights: Tensor, ends: Tensor, product: Callable) -> Tensor:
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        gate_up, down = self.gate_up_proj.unflatten(1, (2, -1)).unbind(), self.down_proj.unbind()
        blocks = zip(rows.split(counts), weights.split(counts), gate_up, down, strict=True)
        # experts without rows are left out; where there is no row at all, all stay, for their gradients of zero
        blocks = [block for block in blocks if len(block[0]) or not len(rows)]
        options = self.tile, "ue8m0", product
        return torch.cat([FP8FeedForward.apply(x, g, *pair, w, *options) for x, g, pair, w in blocks])


def runs_in_fp8(name: str) -> bool:
    """Whether a linear layer of that name is one of V3's FP8 layers: all projections of attention and feed-forward."""
    last = name.rpartition(".")[2]
    return last.endswith(("_proj", "_proj_with_mqa")) and last != "eh_proj"


def to_fp8(model: nn.Module, tile: int = 128, gemm: Callable = fp8_gemm) -> nn.Module:
    """Switch a model to FP8 in place: its projections and routed experts; parameters and their names stay.

    Embedding, head, gate, norms and the attention core are left as they are, and so is `eh_proj`, which the published
    checkpoint holds in BF16. The input of `o_proj` is kept in E5M6 with power-of-two scales. gemm: what multiplies,
    with the arguments of `fp8_gemm`. Raises ValueError if the model has no layer to switch, if one has a bias, or if
    `tile` is less than one; the model is then as it was.
    """
    if tile < 1:
        raise ValueError(f"tile={tile}; 1 or more needed, 128 in V3")
    twins = {SwiGLU: FP8SwiGLU, Experts: FP8Experts}
    found = [(name, part) for name, part in model.named_modules() if type(part) in (nn.Linear, *twins)]
    found = [(name, part) for name, part in found if type(part) in twins or runs_in_fp8(name)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no projection or experts to switch to FP8")
    if biased := [name for name, part in found if getattr(part, "bias", None) is not None]:
        raise ValueError(f"{biased[0]} has a bias; FP8Linear has none")
    for name, part in found:
        if type(part) in twins:
            part.__class__, part.tile, part.gemm = twins[type(part)], tile, gemm
            continue
        options = dict(scale_fmt="ue8m0", cache_format="e5m6") if name.endswith("o_proj") else {}
        with torch.device("meta"):
            layer = FP8Linear(part.in_features, part.out_features, tile, gemm=gemm, **options)
        layer.weight = part.weight
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return model
