"""The kernels of chapter 15 in the benchmark: V3's sizes and the mini's, tilings to choose from, and their rivals."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini import fp8
from dsv3_mini.baseline import next_token_loss
from dsv3_mini.config import ModelConfig
from dsv3_mini.kernels.activation import swiglu_quant
from dsv3_mini.kernels.bench import Contest
from dsv3_mini.kernels.gemm import Tiling, default_tiling, fp8_gemm
from dsv3_mini.kernels.grouped import grouped_fp8_gemm, grouped_fp8_wgrad, grouped_gemm, start_tiles
from dsv3_mini.kernels.layers import use_kernels
from dsv3_mini.kernels.quantise import act_quant, weight_dequant, weight_quant
from dsv3_mini.model import DeepSeekV3


def contests(device: torch.device) -> Iterator[Contest]:
    """Every kernel of the chapter on 4096 tokens."""
    for preset in ("v3", "mini"):
        yield from contests_of(ModelConfig.preset(preset), preset, 4096, device)


def contests_of(config: ModelConfig, name: str, n_tokens: int, device: torch.device) -> Iterator[Contest]:
    """The sizes of one model."""
    yield from quantising(config, name, n_tokens, device)
    for n, k in products(config):
        yield from gemms(name, n_tokens, n, k, device)
    yield from grouped(config, name, n_tokens, device)
    yield training_step(config, name, n_tokens, device)


def products(config: ModelConfig) -> list[tuple[int, int]]:
    """(N, K) of the projections: down to the latents, up to the heads, output, feed-forward."""
    heads, d, f = config.num_attention_heads, config.hidden_size, config.intermediate_size
    latents = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    return [(latents, d), (queries, config.q_lora_rank), (d, heads * config.v_head_dim), (2 * f, d), (d, f)]


def tilings(first: Tiling) -> list[Tiling]:
    """What the benchmark tries: the taught one first."""
    more = [
        Tiling(128, 128, 8, 3),
        Tiling(64, 128, 4, 4),
        Tiling(128, 64, 4, 4),
        Tiling(64, 256, 8, 3),
        Tiling(128, 256, 8, 3),
    ]
    return [first, *(tiling for tiling in more if tiling != first)]


def variants(run, first: Tiling) -> dict:
    """The same call with every tiling, by name."""
    return {"x".join(map(str, tiling)): partial(run, tiling=tiling) for tiling in tilings(first)}


def quantising(config: ModelConfig, model: str, n_tokens: int, device: torch.device) -> Iterator[Contest]:
    """Bound by memory: the rival is a copy of as many bytes."""
    d, f = config.hidden_size, config.moe_intermediate_size
    x = torch.randn(n_tokens, d, device=device, dtype=torch.bfloat16)
    w = torch.randn(config.intermediate_size, d, device=device, dtype=torch.bfloat16)
    gate_up = torch.randn(n_tokens * config.num_experts_per_tok, 2 * f, device=device, dtype=torch.bfloat16)
    q, scale = fp8.weight_quant(w)
    for fmt in (None, "ue8m0"):
        n_bytes = x.numel() * (2 + 1 + 4 / 128)
        ours = {"taught": partial(act_quant, x, scale_fmt=fmt)}
        peers = {"copy": copying(n_bytes, device), "torch": partial(fp8.act_quant, x, scale_fmt=fmt)}
        expected = partial(fp8.act_quant, x, scale_fmt=fmt)
        name = "act_quant_ue8m0" if fmt else "act_quant"
        yield Contest(name, f"{model} {n_tokens} x {d}", ours, peers, expected, 0.0, n_bytes)
    shape, n_bytes = f"{model} {len(w)} x {d}", w.numel() * 3
    copy = {"copy": copying(n_bytes, device)}
    yield Contest("weight_quant", shape, {"taught": partial(weight_quant, w)}, copy, lambda: (q, scale), 0.0, n_bytes)
    dequantise = partial(fp8.weight_dequant, q, scale, dtype=torch.bfloat16)
    yield Contest(
        "weight_dequant", shape, {"taught": partial(weight_dequant, q, scale)}, copy, dequantise, 0.0, n_bytes
    )
    n_bytes = gate_up.numel() * (2 + 1 / 2 + 4 / 256)

    def unfused() -> tuple[Tensor, Tensor]:
        gate, up = gate_up.float().chunk(2, -1)
        return fp8.act_quant(F.silu(gate) * up, scale_fmt="ue8m0")

    ours, peers = {"taught": partial(swiglu_quant, gate_up, scale_fmt="ue8m0")}, {"copy": copying(n_bytes, device)}
    yield Contest(
        "swiglu_quant", f"{model} {len(gate_up)} x {f}", ours, {**peers, "torch": unfused}, unfused, 1e-3, n_bytes
    )


def copying(n_bytes: float, device: torch.device):
    """A copy that reads and writes n_bytes together."""
    source = torch.empty(int(n_bytes) // 2, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def library_fp8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor):
    """torch's own block-scaled product, which takes scales with the rows next to each other."""
    tiles, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    turned = a_scale.T.contiguous().T, b_scale.T
    return partial(F.scaled_mm, a, b.T, turned[0], tiles, turned[1], blocks, output_dtype=torch.bfloat16)


def gemms(model: str, m: int, n: int, k: int, device: torch.device) -> Iterator[Contest]:
    """Both forms, against torch's bfloat16 product and its block-scaled FP8."""
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    shape, (a, blocks, tiles) = f"{model} {m} x {n} x {k}", (act_quant(x), weight_quant(w), act_quant(w))
    peers = {"bf16 matmul": partial(torch.mm, x, w.T), "library fp8": library_fp8(*a, *blocks)}
    for name, b, b_rows in (("fp8_gemm", blocks, 128), ("fp8_gemm_wgrad", tiles, 1)):
        ours = variants(partial(fp8_gemm, *a, *b, dtype=torch.bfloat16), default_tiling(b_rows))
        rivals = peers if b_rows > 1 else {"bf16 matmul": peers["bf16 matmul"]}
        n_bytes = m * k + n * k + 2 * m * n
        yield Contest(name, shape, ours, rivals, partial(fp8.fp8_gemm, *a, *b), 5e-3, n_bytes, 2 * m * n * k)


def grouped(config: ModelConfig, model: str, n_tokens: int, device: torch.device) -> Iterator[Contest]:
    """One rank's share of the experts, at most 32 of them, loaded unequally, and one of them not at all."""
    e, d, f = min(32, config.n_routed_experts), config.hidden_size, config.moe_intermediate_size
    m = n_tokens * config.num_experts_per_tok * e // config.n_routed_experts
    load = torch.rand(e, generator=torch.Generator().manual_seed(0)).pow(2)
    load[1] = 0
    ends = (load.cumsum(0) / load.sum() * m).round().to(device, torch.int32)
    for n, k in ((2 * f, d), (d, f)):
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        w = torch.randn(e, n, k, device=device, dtype=torch.bfloat16)
        peer = {"bf16 grouped_mm": partial(F.grouped_mm, x, w.transpose(1, 2), offs=ends)}
        shape, flops = f"{model} {e} experts {m} x {n} x {k}", 2 * m * n * k
        ours = variants(partial(grouped_gemm, x, w, ends), Tiling())
        n_bytes = 2 * (m * k + e * n * k + m * n)
        yield Contest("grouped_gemm", shape, ours, peer, peer["bf16 grouped_mm"], 1e-2, n_bytes, flops)
        a, b = act_quant(x), weight_quant(w)
        ours = variants(partial(grouped_fp8_gemm, *a, *b, ends), Tiling())
        expected = partial(segments, a, b, ends)
        n_bytes = m * k + e * n * k + 2 * m * n
        yield Contest("grouped_fp8_gemm", shape, ours, peer, expected, 5e-3, n_bytes, flops)
        yield weight_gradients(
            f"{model} {e} experts {n} x {k} x {m}", torch.randn_like(peer["bf16 grouped_mm"]()), x, ends
        )


def weight_gradients(shape: str, grad: Tensor, x: Tensor, ends: Tensor) -> Contest:
    """All experts' weight gradients from operands quantised along the tokens, against torch's in bfloat16."""
    places, tile_ends = start_tiles(ends, len(x), 128)
    n_places = (len(x) // 128 + len(ends)) * 128
    rows = [part.new_zeros(n_places, part.shape[1]).index_copy_(0, places, part) for part in (grad, x)]
    operands = [part for apart in rows for part in act_quant(apart.T)]
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()

    def one_by_one() -> Tensor:
        pairs = zip(grad.split(counts), x.split(counts), strict=True)
        return torch.stack([fp8.fp8_gemm(*fp8.act_quant(g.T), *fp8.act_quant(part.T)) for g, part in pairs])

    ours = variants(partial(grouped_fp8_wgrad, *operands, tile_ends), default_tiling(1))
    peer = {"bf16 grouped_mm": partial(F.grouped_mm, grad.T, x, offs=ends)}
    size = len(ends) * grad.shape[1] * x.shape[1]
    n_bytes, flops = n_places * (grad.shape[1] + x.shape[1]) + 4 * size, 2 * len(x) * grad.shape[1] * x.shape[1]
    return Contest("grouped_fp8_wgrad", shape, ours, peer, one_by_one, 5e-3, n_bytes, flops)


def segments(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], ends: Tensor) -> Tensor:
    """The grouped FP8 product by its twin, expert after expert."""
    bounds = [0, *ends.tolist()]
    rows = [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    return torch.cat([fp8.fp8_gemm(a[0][r], a[1][r], b[0][i], b[1][i]) for i, r in enumerate(rows)])


def training_step(config: ModelConfig, model: str, n_tokens: int, device: torch.device) -> Contest:
    """Forward and backward of the whole model in FP8 against the same in bfloat16; of V3 one dense layer fits."""
    if config.n_routed_experts > 64:
        model, sizes = f"{model}, 1 layer", dict(num_hidden_layers=1, first_k_dense_replace=1, vocab_size=4096)
        config = config.replace(**sizes)
    torch.manual_seed(0)
    plain = DeepSeekV3(config.replace(num_nextn_predict_layers=0)).to(device, torch.bfloat16)
    fast, twin = use_kernels(fp8.to_fp8(deepcopy(plain))), fp8.to_fp8(deepcopy(plain))
    batch = max(1, n_tokens // 1024)
    windows = torch.randint(config.vocab_size, (batch, n_tokens // batch + 1), device=device)

    def step(net: DeepSeekV3) -> Tensor:
        net.zero_grad()
        loss = next_token_loss(net, windows)
        loss.backward()
        return loss.detach()

    sides = {"taught": partial(step, fast)}, {"bf16": partial(step, plain), "torch fp8": partial(step, twin)}
    return Contest("training_step", f"{model} {n_tokens} tokens", *sides, partial(step, twin), 1e-2, 0.0)
