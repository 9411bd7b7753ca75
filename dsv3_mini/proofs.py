"""Claims that package functions can compute on the spot.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor, nn

from dsv3_mini.accounting import count_parameters, flops_per_token, kv_cache_bytes_per_token, training_cost
from dsv3_mini.config import ModelConfig
from dsv3_mini.eplb import gpu_load, peak_over_mean, rebalance_experts
from dsv3_mini.expert_parallel import count_copies, distinct_nodes
from dsv3_mini.fp8 import act_dequant, act_quant, weight_dequant, weight_quant
from dsv3_mini.fp8_training import AdamW16
from dsv3_mini.layers import apply_rope, rope_frequencies, rope_table
from dsv3_mini.ledger import Bound, Effect, Finding, Logs, Number, flat
from dsv3_mini.mla import attend_absorbed, attend_expanded_reference
from dsv3_mini.moe import Gate, group_limited_topk
from dsv3_mini.overlap import chunk_costs
from dsv3_mini.precision import matmul_limited
from dsv3_mini.recipe import DECAY_END, DECAY_START, LAST_PLATEAU, learning_rate_factor
from dsv3_mini.schedule import dualpipe_schedule, simulate

# What do the logs say?


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|."""
    return ((x - reference).norm() / reference.norm()).item()


def cache_size(logs: Logs) -> list[Finding]:
    """Claim 1: MLA caches one latent a token."""
    v3 = ModelConfig.preset("v3")
    mla, mha = (kv_cache_bytes_per_token(v3, name) for name in ("mla", "mha"))
    groups = mla / (2 * v3.v_head_dim * 2 * v3.num_hidden_layers)
    return [Number("bytes a token", mla, 70_272), Number("MHA / MLA", mha / mla, 71.1), Number("groups", groups, 2.25)]


def absorption(logs: Logs) -> list[Finding]:
    """Claim 2: absorbed attention is the same function."""
    shapes = (2, 3, 5, 8), (2, 3, 5, 4), (2, 11, 12), (2, 11, 4), (5, 14, 12)
    tensors = [randn(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    outs = [attend(*tensors, scale=0.3) for attend in (attend_expanded_reference, attend_absorbed)]
    return [Bound("largest difference", [(outs[0] - outs[1]).abs().max().item()], 1e-10)]


def turn(x: Tensor, position: int) -> Tensor:
    """RoPE on rows (n, d) that all stand at one position."""
    return apply_rope(x[None, None], rope_table(torch.tensor([position]), rope_frequencies(x.shape[-1])))[0, 0]


def decoupling(logs: Logs) -> list[Finding]:
    """Claim 4: position must travel apart from content."""
    w, q, c = randn(16, 24), randn(1, 16, seed=1), randn(50, 24, seed=2)
    absorbed = q @ w @ c.T  # what one fixed matrix gives
    rotated = turn(q, 8) @ turn(c @ w.T, 0).T
    return [Bound("error if the content is rotated", [relative(absorbed, rotated)], 0.5, at_least=True)]


def rope_layout(logs: Logs) -> list[Finding]:
    """Claim 5: the weights want interleaved pairs."""
    q, k = randn(40, 64), randn(40, 64, seed=1)
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])  # interleaved pairs -> halves

    def halves(x: Tensor, position: int) -> Tensor:
        angle = position * rope_frequencies(64)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    right = (turn(q, 9) * turn(k, 2)).sum(-1)
    mended = (halves(q[:, order], 9) * halves(k[:, order], 2)).sum(-1)
    wrong = (halves(q, 9) * halves(k, 2)).sum(-1)
    gap = (wrong - right).abs().max().item()
    error = (mended - right).abs().max().item()
    return [
        Bound("difference after re-ordering", [error], 1e-4),
        Bound("difference without it", [gap], 1.0, at_least=True),
    ]


def bias_in_weight(logs: Logs) -> list[Finding]:
    """Claim 8: the bias changes the choice, not the weight."""
    gate = Gate(ModelConfig.preset("nano", n_group=1, topk_group=1))
    x = randn(50, 128)
    with torch.no_grad():
        gate.weight.copy_(0.1 * randn(16, 128, seed=1))
        before = gate(x)
        gate.e_score_correction_bias += 0.37  # the same for all: the choice stays
        after = gate(x)
        leaked = (after.scores + 0.37).gather(1, after.indices)
        leaked = 2.5 * leaked / leaked.sum(-1, keepdim=True)
    moved = (after.weights - before.weights).abs().max().item()
    wrong = (leaked - before.weights).abs().max().item()
    return [Bound("change of a weight", [moved], 1e-6), Bound("change if it leaked", [wrong], 0.01, at_least=True)]


def nodes_of_a_token(logs: Logs) -> list[Finding]:
    """Claim 11: a token visits at most four nodes, at little cost."""
    scores = torch.rand(20_000, 256, generator=torch.Generator().manual_seed(0))
    chosen = scores.topk(8).indices, group_limited_topk(scores, 8, 8, 4)
    free, limited = (distinct_nodes(indices, 256, 8).float() for indices in chosen)
    most = limited.max().item()
    loss = logs.difference("ledger", "limited to two groups", "any group", "valid_loss")
    return [
        Number("nodes, unrestricted", free.mean().item(), 5.29),
        Bound("nodes, limited", [most], 4),
        flat("change of the loss (nats)", loss, 0.02),
    ]


def outliers(logs: Logs) -> list[Finding]:
    """Claim 18: fine scales survive outliers."""
    x = randn(64, 1024)
    x[:, 0] = 1e5
    fine = act_dequant(*act_quant(x, 128))[:, 128:] == 0
    coarse = act_dequant(*act_quant(x.view(1, -1), x.numel()), x.numel()).view_as(x)[:, 128:] == 0
    lost = [coarse.float().mean().item(), fine.float().mean().item()]
    return [Bound("flushed to zero, tiles", lost[1:], 4e-4), Bound("flushed, one scale", lost[:1], 0.1, at_least=True)]


def gradient_blocks(logs: Logs) -> list[Finding]:
    """Claim 19: square blocks spoil gradients."""
    gradient = randn(256, 256) * (4 * randn(256, 1, seed=1)).exp()
    tiles = act_dequant(*act_quant(gradient, 128, min_amax=1e-30))
    blocks = weight_dequant(*weight_quant(gradient))
    worst = [((q - gradient).norm(dim=1) / gradient.norm(dim=1)) for q in (tiles, blocks)]
    spoiled = (worst[1] > 0.5).float().mean().item()
    return [
        Bound("worst row, tiles", [worst[0].max().item()], 0.03),
        Bound("rows spoiled by blocks", [spoiled], 0.2, at_least=True),
    ]


def accumulation(logs: Logs) -> list[Finding]:
    """Claim 20: short sums err, promotion mends it."""
    a, b = (torch.rand(16, 4096, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    a, b = (t.to(torch.float8_e4m3fn).float() for t in (a, b))
    exact = (a.double() @ b.double().T).float()
    errors = [((matmul_limited(a, b, n) - exact).abs() / exact).max().item() for n in (None, 128)]
    gain = errors[0] / errors[1]
    return [
        Number("largest error, K = 4096", errors[0], 0.02, 0.5, baseline=0.0),
        Bound("gain of promotion", [gain], 10, at_least=True),
    ]


def power_scales(logs: Logs) -> list[Finding]:
    """Claim 21: powers of two as scales cost little."""
    x = randn(256, 1024)
    errors = [relative(act_dequant(*act_quant(x, 128, fmt)), x) for fmt in (None, "ue8m0")]
    return [Bound("error added, relative", [errors[1] / errors[0] - 1], 0.1)]


def optimizer_precision(logs: Logs) -> list[Finding]:
    """Claim 22: moments may be BF16, weights may not."""
    target, ends = randn(64, 64, seed=5), {}
    for moments in (torch.float32, torch.bfloat16):
        for master in (torch.float32, torch.bfloat16):
            weight = nn.Parameter(randn(64, 64, seed=6))
            optimizer = AdamW16([weight], lr=1e-3, moments=moments, master=master)
            for _ in range(300):
                optimizer.zero_grad()
                loss = (weight - target).square().mean()
                loss.backward()
                optimizer.step()
            ends[moments, master] = loss.item()
    full, half = torch.float32, torch.bfloat16
    start = (randn(64, 64, seed=6) - target).square().mean().item()
    moved = start - ends[full, full]
    stalled = (ends[full, half] - ends[full, full]) / moved
    return [
        Bound("progress lost by BF16 moments", [abs(ends[half, full] - ends[full, full]) / moved], 0.01),
        Bound("progress lost by BF16 weights", [stalled], 0.1, at_least=True),
    ]


def dualpipe(logs: Logs) -> list[Finding]:
    """Claim 23: DualPipe's bubble and memory."""
    small, large, longer = (simulate(dualpipe_schedule(p, n)) for p, n in ((8, 20), (16, 40), (8, 40)))
    return [
        Number("idle, 8 ranks", max(small.idle), 6),
        Number("idle, 16 ranks", max(large.idle), 14),
        Number("idle, twice the micro-batches", max(longer.idle), 6),
        Number("live activations, 8 ranks", max(small.peak_activations), 9),
    ]


def overlap(logs: Logs) -> list[Finding]:
    """Claim 24: messages hide behind products at 1 : 1."""
    compute = 3 * (1 + 1)  # attention and experts: forward, gradients of inputs, gradients of weights
    even, slow = (chunk_costs(1, network, 1, network).overlapped / compute - 1 for network in (1, 3))
    return [
        Bound("time added by messages at 1 : 1", [even], 0.05),
        Bound("time added by messages at 1 : 3", [slow], 0.5, at_least=True),
    ]


def traffic(logs: Logs) -> list[Finding]:
    """Claim 25: 3.2 experts a node for one crossing."""
    scores, home = torch.rand(20_000, 256, generator=torch.Generator().manual_seed(0)), torch.arange(20_000) % 64
    slow, fast = count_copies(group_limited_topk(scores, 8, 8, 4), home, 256, n_nodes=8, n_gpus=64)
    return [
        Number("NVLink / InfiniBand, GB/s", 160 / 50, 3.2),
        Bound("slow copies a token", [slow.max().item()], 4),
        Bound("fast copies for each slow one", [(fast.float().mean() / slow.float().mean()).item()], 3.2),
    ]


def cost(logs: Logs) -> list[Finding]:
    """Claim 26: 2.788M hours, $5.576M."""
    hours = 180e3 * 14.8
    total = hours + 119e3 + 5e3
    return [
        Number("GPU-hours", total, 2788e3),
        Number("dollars", training_cost(total, 2.0), 5.576e6),
        Number("days a trillion tokens", 180e3 / 2048 / 24, 3.7, 0.02),
        Number("GFLOP a token", flops_per_token(ModelConfig.preset("v3"), 4096, training=True) / 1e9, 250),
    ]


def sparsity(logs: Logs) -> list[Finding]:
    """Claim 27: 671B stored, 37B active."""
    count = count_parameters(ModelConfig.preset("v3"))
    return [Number("stored", count.total, 671e9, 1e-3), Number("activated", count.activated, 37e9, 0.02)]


def rate_schedule(logs: Logs) -> list[Finding]:
    """Claim 28: the learning rate's schedule."""
    middle = (DECAY_START + DECAY_END) / 2
    return [
        Number("rate before 10T", 2.2e-4 * learning_rate_factor(DECAY_START - 1e-6), 2.2e-4),
        Number("rate at 12.15T", 2.2e-4 * learning_rate_factor(middle), 1.21e-4),
        Number("rate after 14.3T", 2.2e-4 * learning_rate_factor(DECAY_END), 2.2e-5),
        Number("last rate", 2.2e-4 * learning_rate_factor(LAST_PLATEAU), 7.3e-6),
    ]


def decoding_time(logs: Logs) -> list[Finding]:
    """Claim 37: the network allows 67 tokens/s."""
    stage = (1 + 2) * 32 * 9 * 7000 / 50e9  # bytes of dispatch and combine, tokens, experts, width, bandwidth
    milliseconds = 1e3 * 2 * 61 * stage
    return [Number("ms a token", milliseconds, 14.76), Number("tokens/s", 1e3 / milliseconds, 67, 0.02)]


def placement(logs: Logs) -> list[Finding]:
    """Claim 34: EPLB evens the load."""
    load = torch.tensor(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    found = []
    for policy, n_groups, nodes, reported in (("hierarchical", 4, 2, (1.208, 1.242)), ("global", 1, 1, (1.073, 1.190))):
        places = rebalance_experts(load, 16, n_groups, nodes, 8)[0]
        peaks = peak_over_mean(gpu_load(load, places, 8)).tolist()
        for layer, (peak, wanted) in enumerate(zip(peaks, reported, strict=True)):
            found.append(Number(f"{policy}, layer {layer}", peak, wanted, 1e-3))
    return found


def redundancy(logs: Logs) -> list[Finding]:
    """Claim 35: redundant experts lower the peak."""
    gains = []
    for seed in range(3):
        load = randn(20, 256, seed=seed).exp()
        peaks = [peak_over_mean(gpu_load(load, rebalance_experts(load, 256 + n, 8, 4, 32)[0], 32)) for n in (0, 32)]
        gains.append((peaks[1] - peaks[0]).mean().item())
    return [Effect("largest over mean load, 32 redundant - none", gains, -1)]
