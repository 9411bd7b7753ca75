"""Expanded attention for prompts and training, causal, values narrower than keys, with its gradient.

Generated from chapters/16_triton_attention_moe.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_mini.kernels.ahead import Case
from dsv3_mini.kernels.interpreter import expect, launch, tl, triton

# Why is a prompt another problem?


@triton.jit
def load_rows(x, row, inside, column, WIDTH: tl.constexpr):
    """Some columns of some rows of a table WIDTH wide; zeros for rows that do not exist."""
    return tl.load(x + row[:, None] * WIDTH + column[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def load_queries(q, row, inside, N: tl.constexpr, R: tl.constexpr):
    """Both parts of some queries of one head: (rows, N), and the rotated (rows, R)."""
    return load_rows(q, row, inside, tl.arange(0, N), N + R), load_rows(q + N, row, inside, tl.arange(0, R), N + R)


@triton.jit
def load_keys(kv, k_pe, row, shared_row, inside, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr):
    """Both parts of some keys, the rotated one shared by all heads: (rows, N), (rows, R)."""
    content = load_rows(kv, row, inside, tl.arange(0, N), N + V)
    return content, load_rows(k_pe, shared_row, inside, tl.arange(0, R), R)


@triton.jit
def score(a, a_pe, b, b_pe):
    """One product of both parts' widths together, a power of two each: (rows of a, rows of b)."""
    content = tl.dot(a, b.T, input_precision="ieee")
    return tl.dot(a_pe, b_pe.T, content, input_precision="ieee")


@triton.jit
def mla_prefill_forward(
    q, kv, k_pe, out, lse, n_queries, n_keys, n_heads, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries of one head on all keys that they may see."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    v, t, older = tl.arange(0, V), block * BLOCK_T + tl.arange(0, BLOCK_T), n_keys - n_queries
    q_row = (batch * n_queries + t) * n_heads + head
    q_nope, q_pe = load_queries(q, q_row, t < n_queries, N, R)
    peak, total = tl.full((BLOCK_T,), float("-inf"), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, V), tl.float32)
    for start in range(0, tl.minimum(n_keys, (block + 1) * BLOCK_T + older), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        kv_row = (batch * n_keys + s) * n_heads + head
        k_nope, k_turned = load_keys(kv, k_pe, kv_row, batch * n_keys + s, s < n_keys, N, R, V)
        scores = score(q_nope, q_pe, k_nope, k_turned) * (scale * 1.4426950408889634)
        scores = tl.where(s[None, :] <= t[:, None] + older, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        p, keep = tl.exp2(scores - new_peak[:, None]), tl.exp2(peak - new_peak)
        total = total * keep + tl.sum(p, 1)
        value = load_rows(kv + N, kv_row, s < n_keys, v, N + V)
        acc = tl.dot(p.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
        peak = new_peak
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + q_row[:, None] * V + v[None, :], acc, mask=t[:, None] < n_queries)
    tl.store(lse + q_row, (peak + tl.log2(total)) * 0.6931471805599453, mask=t < n_queries)


# What must a backward pass remember?


@triton.jit
def mla_prefill_backward_q(
    q, kv, k_pe, d_out, lse, delta, d_q, n_queries, n_keys, n_heads, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_T queries of one head, over the keys that they saw."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, r, v = tl.arange(0, N), tl.arange(0, R), tl.arange(0, V)
    t, older = block * BLOCK_T + tl.arange(0, BLOCK_T), n_keys - n_queries
    q_row = (batch * n_queries + t) * n_heads + head
    q_nope, q_pe = load_queries(q, q_row, t < n_queries, N, R)
    g = load_rows(d_out, q_row, t < n_queries, v, V)
    row_lse = tl.load(lse + q_row, mask=t < n_queries, other=0.0)
    row_delta = tl.load(delta + q_row, mask=t < n_queries, other=0.0)
    d_nope, d_pe = tl.zeros((BLOCK_T, N), tl.float32), tl.zeros((BLOCK_T, R), tl.float32)
    for start in range(0, tl.minimum(n_keys, (block + 1) * BLOCK_T + older), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        kv_row = (batch * n_keys + s) * n_heads + head
        k_nope, k_turned = load_keys(kv, k_pe, kv_row, batch * n_keys + s, s < n_keys, N, R, V)
        value = load_rows(kv + N, kv_row, s < n_keys, v, N + V)
        scores = score(q_nope, q_pe, k_nope, k_turned) * scale
        p = tl.exp2((scores - row_lse[:, None]) * 1.4426950408889634)
        p = tl.where(s[None, :] <= t[:, None] + older, p, 0.0)
        d_scores = p * (tl.dot(g, value.T, input_precision="ieee") - row_delta[:, None]) * scale
        d_nope = tl.dot(d_scores.to(k_nope.dtype), k_nope, d_nope, input_precision="ieee")
        d_pe = tl.dot(d_scores.to(k_nope.dtype), k_turned, d_pe, input_precision="ieee")
    rows = d_q + q_row[:, None] * (N + R)
    tl.store(rows + n[None, :], d_nope.to(d_q.dtype.element_ty), mask=t[:, None] < n_queries)
    tl.store(rows + N + r[None, :], d_pe.to(d_q.dtype.element_ty), mask=t[:, None] < n_queries)


@triton.jit
def mla_prefill_backward_kv(
    q, kv, k_pe, d_out, lse, delta, d_kv, d_k_pe, n_queries, n_keys, n_heads, scale,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_S keys and values of one head, over the queries that saw them."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, r, v = tl.arange(0, N), tl.arange(0, R), tl.arange(0, V)
    s, older = block * BLOCK_S + tl.arange(0, BLOCK_S), n_keys - n_queries
    kv_row = (batch * n_keys + s) * n_heads + head
    k_nope, k_turned = load_keys(kv, k_pe, kv_row, batch * n_keys + s, s < n_keys, N, R, V)
    value = load_rows(kv + N, kv_row, s < n_keys, v, N + V)
    d_nope, d_pe = tl.zeros((BLOCK_S, N), tl.float32), tl.zeros((BLOCK_S, R), tl.float32)
    d_value = tl.zeros((BLOCK_S, V), tl.float32)
    for start in range(tl.maximum(block * BLOCK_S - older, 0) // BLOCK_T * BLOCK_T, n_queries, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        q_row = (batch * n_queries + t) * n_heads + head
        q_nope, q_pe = load_queries(q, q_row, t < n_queries, N, R)
        g = load_rows(d_out, q_row, t < n_queries, v, V)
        row_lse = tl.load(lse + q_row, mask=t < n_queries, other=0.0)
        row_delta = tl.load(delta + q_row, mask=t < n_queries, other=0.0)
        scores = score(k_nope, k_turned, q_nope, q_pe) * scale  # (BLOCK_S, BLOCK_T)
        p = tl.exp2((scores - row_lse[None, :]) * 1.4426950408889634)
        p = tl.where(s[:, None] <= t[None, :] + older, p, 0.0)  # rows past the last query are all zeros
        d_value = tl.dot(p.to(g.dtype), g, d_value, input_precision="ieee")
        d_scores = p * (tl.dot(value, g.T, input_precision="ieee") - row_delta[None, :]) * scale
        d_nope = tl.dot(d_scores.to(q_nope.dtype), q_nope, d_nope, input_precision="ieee")
        d_pe = tl.dot(d_scores.to(q_nope.dtype), q_pe, d_pe, input_precision="ieee")
    rows = d_kv + kv_row[:, None] * (N + V)
    tl.store(rows + n[None, :], d_nope.to(d_kv.dtype.element_ty), mask=s[:, None] < n_keys)
    tl.store(rows + N + v[None, :], d_value.to(d_kv.dtype.element_ty), mask=s[:, None] < n_keys)
    tl.store(d_k_pe + kv_row[:, None] * R + r[None, :], d_pe, mask=s[:, None] < n_keys)


def tile_sizes(dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Queries and keys of a tile, forward and backward, so that V3's widths fit into registers."""
    if dtype == torch.float32:
        return {"BLOCK_T": 32, "BLOCK_S": 32}, {"BLOCK_T": 16, "BLOCK_S": 32}
    return {"BLOCK_T": 128, "BLOCK_S": 64}, {"BLOCK_T": 64, "BLOCK_S": 64}


class MLAPrefill(torch.autograd.Function):
    """The three kernels as one differentiable operation; `mla_prefill` checks its arguments."""

    @staticmethod
    def forward(ctx, q, kv, k_pe, scale, interpret):
        (b, t, h, width), r = q.shape, k_pe.shape[-1]
        sizes = {"N": width - r, "R": r, "V": kv.shape[-1] - width + r}
        ctx.numbers = t, kv.shape[1], h, scale
        forward, ctx.tile = tile_sizes(q.dtype)
        ctx.options = {**sizes, "num_warps": 8, "num_stages": 2, "interpret": interpret}
        out = torch.empty(b, t, h, sizes["V"], dtype=q.dtype, device=q.device)
        lse = torch.empty(b, t, h, dtype=torch.float32, device=q.device)
        grid = (-(-t // forward["BLOCK_T"]), h, b)
        launch(mla_prefill_forward, grid, q, kv, k_pe, out, lse, *ctx.numbers, **forward, **ctx.options)
        ctx.save_for_backward(q, kv, k_pe, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, _):
        q, kv, k_pe, out, lse = ctx.saved_tensors
        d_out, (b, s, h, _) = d_out.contiguous(), kv.shape
        given = q, kv, k_pe, d_out, lse, (d_out.float() * out.float()).sum(-1)
        d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
        d_k_pe = torch.empty(b, s, h, k_pe.shape[-1], dtype=torch.float32, device=q.device)
        options = ctx.options | ctx.tile
        q_blocks, kv_blocks = -(-q.shape[1] // options["BLOCK_T"]), -(-s // options["BLOCK_S"])
        launch(mla_prefill_backward_q, (q_blocks, h, b), *given, d_q, *ctx.numbers, **options)
        launch(mla_prefill_backward_kv, (kv_blocks, h, b), *given, d_kv, d_k_pe, *ctx.numbers, **options)
        return d_q, d_kv, d_k_pe.sum(2).type_as(k_pe), None, None


def mla_prefill(
    q: Tensor, kv: Tensor, k_pe: Tensor, scale: float, interpret: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Expanded causal attention with gradients (report section 2.1.1): no key is copied, no table of scores written.

    q (B, T, H, nope + rope), kv (B, S, H, nope + v) as kv_b_proj makes it, k_pe (B, S, rope), all contiguous. The T
    queries are the last T of S positions. Returns out (B, T, H, v) and the log-sum-exp of the scores (B, T, H) in
    float32, without gradient. ValueError names what does not fit.
    """
    floats = torch.bfloat16, torch.float16, torch.float32
    expect("q", q, (None, None, None, None), *floats)
    expect("kv", kv, (len(q), None, q.shape[2], None), q.dtype)
    expect("k_pe", k_pe, (*kv.shape[:2], None), q.dtype)
    nope = q.shape[-1] - k_pe.shape[-1]
    parts = {"nope": nope, "rope": k_pe.shape[-1], "v": kv.shape[-1] - nope}
    if any(part < 16 or part & (part - 1) for part in parts.values()):
        raise ValueError(f"q {tuple(q.shape)} and kv {tuple(kv.shape)} make {parts}; powers of two from 16 on needed")
    if q.shape[1] > kv.shape[1]:
        raise ValueError(f"q {tuple(q.shape)} has more positions than kv {tuple(kv.shape)}; its own must be among them")
    for name, x in (("q", q), ("kv", kv), ("k_pe", k_pe)):
        if not x.is_contiguous():
            raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}; call .contiguous() first")
    return MLAPrefill.apply(q, kv, k_pe, scale, interpret)


# What does the compiler make of it?


def compile_cases(dtype: torch.dtype = torch.bfloat16) -> dict[str, Case]:
    """V3's widths: forward, and the two halves of backward."""
    x = {torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16", torch.float32: "*fp32:16"}[dtype]
    inputs, saved = dict.fromkeys(("q", "kv", "k_pe"), x), {"d_out": x, "lse": "*fp32:16", "delta": "*fp32:16"}
    numbers = {"n_queries": "i32", "n_keys": "i32", "n_heads": "i32", "scale": "fp32"}
    forward, backward = tile_sizes(dtype)
    of = {
        "forward": (mla_prefill_forward, {"out": x, "lse": "*fp32:16"}, forward),
        "backward_q": (mla_prefill_backward_q, {**saved, "d_q": x}, backward),
        "backward_kv": (mla_prefill_backward_kv, {**saved, "d_kv": x, "d_k_pe": "*fp32:16"}, backward),
    }
    return {
        f"mla_prefill_{name}": Case(kernel, inputs | more | numbers, {"N": 128, "R": 64, "V": 128, **tile}, 8, 2)
        for name, (kernel, more, tile) in of.items()
    }
