"""Attention, gate and latent kernels in the interpreter, against the modules of earlier chapters."""

import math
import re
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.config import ModelConfig
from dsv3_mini.decode import DecodePlan
from dsv3_mini.generate import generate
from dsv3_mini.kernels.ahead import compile_case, resources
from dsv3_mini.kernels.attention_contests import contests_of
from dsv3_mini.kernels.bench import relative_error
from dsv3_mini.kernels.gate import route
from dsv3_mini.kernels.mla_decode import attend, choose_splits, mla_decode
from dsv3_mini.kernels.mla_prefill import mla_prefill
from dsv3_mini.kernels.norm_rope import write_latents
from dsv3_mini.layers import rope_frequencies, rope_table
from dsv3_mini.mla import MLA, attend_absorbed, attend_expanded_reference
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import Gate

NAN = float("nan")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated holds NaN: a number that a kernel forgets to write shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poison(*args, real=real, **kwargs):
            x = real(*args, **kwargs)
            return x.fill_(NAN) if x.is_floating_point() and x.device.type == "cpu" else x

        monkeypatch.setattr(torch, name, poison)


# Decoding


def decoding_inputs(lengths, t=1, h=5, c=32, r=16, capacity=90, dtype=torch.float32):
    """Queries, and a cache that holds NaN behind each text's end."""
    cache = torch.randn(len(lengths), capacity, c + r).to(dtype)
    for row, length in enumerate(lengths):
        cache[row, length:] = NAN
    b = len(lengths)
    q_c, q_pe = torch.randn(b, t, h, c).to(dtype), torch.randn(b, t, h, r).to(dtype)
    return q_c, q_pe, cache, torch.tensor(lengths, dtype=torch.int64)


def decoding_twin(q_c, q_pe, cache, lengths, scale):
    """Chapter 03's absorbed form in float64, text by text, with identities for W^UK and W^UV."""
    (h, c), z = q_c.shape[2:], []
    kv_b = torch.eye(c).double().repeat(2, 1).expand(h, -1, -1)
    for row, length in enumerate(lengths.tolist()):
        latents, keys = cache[row : row + 1, :length].double().split([c, cache.shape[-1] - c], dim=-1)
        queries = q_c[row : row + 1].double(), q_pe[row : row + 1].double()
        z.append(attend_absorbed(*queries, latents, keys, kv_b, scale))
    return torch.cat(z)


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n_splits", [None, 1, 2, 7])
def test_decoding_equals_chapter_03_on_texts_of_unequal_length(n_splits):
    inputs = decoding_inputs([77, 33, 1])
    close(mla_decode(*inputs, 0.3, n_splits)[0], decoding_twin(*inputs, 0.3))


@pytest.mark.parametrize("t, h, lengths", [(2, 3, [33, 2]), (3, 7, [40, 3]), (5, 1, [37])])
def test_new_tokens_see_the_past_and_themselves(t, h, lengths):
    inputs = decoding_inputs(lengths, t, h)
    close(mla_decode(*inputs, 0.25, 3)[0], decoding_twin(*inputs, 0.25))


def test_positions_past_the_end_get_no_weight():
    """Masking with 0 instead of minus infinity gives each of them e^0."""
    q_c, q_pe, cache, lengths = decoding_inputs([1, 2])
    z, _ = mla_decode(q_c, q_pe, cache, lengths, 1e-3)  # flat scores: weights are equal
    close(z[0, 0], cache[0, :1, :32].expand(5, -1))
    close(z[1, 0], cache[1, :2, :32].mean(0).expand(5, -1), 0.05)


def test_stretches_are_merged_by_their_log_sum_exps():
    """A loud stretch outweighs quiet ones; an average of the stretches would not know."""
    q_c, q_pe, cache, lengths = decoding_inputs([90])
    cache[0, 50, :32] = q_c[0, 0, 0] * 2
    z, lse = mla_decode(q_c, q_pe, cache, lengths, 1.0, n_splits=3)
    close(z, decoding_twin(q_c, q_pe, cache, lengths, 1.0), 1e-5)
    scores = torch.cat((q_c, q_pe), -1)[0, 0] @ cache[0].T
    close(lse[0, 0], scores.logsumexp(-1))


def test_half_precision_decoding_uses_full_tiles_and_stays_close():
    inputs = decoding_inputs([70, 40], t=1, h=20, dtype=torch.bfloat16)
    z, lse = mla_decode(*inputs, 0.2)
    assert z.dtype == torch.bfloat16 and lse.dtype == torch.float32
    close(z, decoding_twin(*inputs, 0.2), 2e-2)


def test_cache_may_be_a_window_of_a_larger_one_and_lengths_may_be_vouched_for():
    q_c, q_pe, cache, lengths = decoding_inputs([60, 31], capacity=64)
    roomy = torch.full((4, 100, 48), NAN)
    roomy[::2, :64] = cache
    z, _ = mla_decode(q_c, q_pe, roomy[::2, :64], lengths.int(), 0.3, longest=64)
    close(z, decoding_twin(q_c, q_pe, cache, lengths, 0.3))


def test_vouched_lengths_that_are_wrong_never_read_past_the_cache():
    q_c, q_pe, cache, lengths = decoding_inputs([64], capacity=90)
    z, _ = mla_decode(q_c, q_pe, cache[:, :64], lengths + 20, 0.3, longest=64)  # NaN lies behind
    close(z, decoding_twin(q_c, q_pe, cache, lengths, 0.3))


def test_no_text_and_no_head_are_no_error():
    z, lse = mla_decode(*decoding_inputs([]), 0.3)
    assert z.shape == (0, 1, 5, 32) and lse.shape == (0, 1, 5)
    assert mla_decode(*decoding_inputs([9], h=0), 0.3)[0].shape == (1, 1, 0, 32)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5000), programs=st.integers(1, 400), processors=st.integers(1, 200))
def test_splits_are_tiles_at_least_and_never_slower_than_none(n, programs, processors):
    def time(splits):
        return math.ceil(programs * splits / processors) * (math.ceil(n / splits) + 1)

    splits = choose_splits(n, programs, processors)
    assert 1 <= splits <= n and time(splits) <= time(1)


def test_splits_fill_rounds_of_processors():
    assert choose_splits(512, 2) == 66 and choose_splits(512, 132) == 1  # one full round
    assert choose_splits(512, 140) == 7  # without a split, a second round would hold eight programs
    assert choose_splits(1, 2) == 1 and choose_splits(0, 0) == 1


BAD_DECODING = {
    "width": (lambda q_c, q_pe, cache, lengths: (q_c[..., :24].contiguous(), q_pe, cache[..., :40], lengths), "24"),
    "heads": (lambda q_c, q_pe, cache, lengths: (q_c, q_pe[:, :, :4], cache, lengths), r"q_pe is \(2, 1, 4, 16\)"),
    "batch": (lambda q_c, q_pe, cache, lengths: (q_c, q_pe, cache[:1], lengths), r"cache is \(1, 90, 48\)"),
    "dtype": (lambda q_c, q_pe, cache, lengths: (q_c, q_pe, cache.double(), lengths), "float64"),
    "float64": (lambda q_c, q_pe, cache, lengths: (q_c.double(), q_pe, cache, lengths), "float64"),
    "strides": (lambda q_c, q_pe, cache, lengths: (q_c.mT.contiguous().mT, q_pe, cache, lengths), "strides"),
    "cache": (lambda q_c, q_pe, cache, lengths: (q_c, q_pe, cache.mT.contiguous().mT, lengths), "adjacent"),
    "long": (lambda q_c, q_pe, cache, lengths: (q_c, q_pe, cache, lengths + 60), "100.*90 positions"),
    "short": (lambda q_c, q_pe, cache, lengths: (q_c, q_pe, cache, lengths * 0), r"0\.\.0.*1\.\.90"),
    "lengths": (lambda q_c, q_pe, cache, lengths: (q_c, q_pe, cache, lengths.float()), "lengths is"),
}


@pytest.mark.parametrize("change, message", BAD_DECODING.values(), ids=BAD_DECODING)
def test_bad_decoding_is_refused_with_its_shape(change, message):
    with pytest.raises(ValueError, match=message):
        mla_decode(*change(*decoding_inputs([40, 7])))


def test_a_number_of_stretches_below_one_is_refused():
    with pytest.raises(ValueError, match="n_splits=-1"):
        mla_decode(*decoding_inputs([40, 7]), 0.3, n_splits=-1)


def test_compiled_kernels_refuse_cpu_memory():
    with pytest.raises(ValueError, match=r"compiled mla_decode_split.*\(2, 1, 5, 32\) on cpu"):
        mla_decode(*decoding_inputs([40, 7]), interpret=False)


@pytest.mark.parametrize("speculative", [False, True])
def test_generation_with_the_kernel_writes_the_same_tokens(speculative):
    torch.manual_seed(0)
    config = ModelConfig.preset("nano", num_hidden_layers=1, hidden_size=64, kv_lora_rank=16, initializer_range=0.1)
    model, prompts = DeepSeekV3(config).eval(), torch.randint(5, 1000, (2, 5))
    plain, ours = (
        generate(DecodePlan(model, attend=kernel), prompts, 4, stop=(), speculative=speculative).tokens
        for kernel in (None, attend)
    )
    assert torch.equal(plain, ours)


# Prompts


def prefill_inputs(b=2, t=70, s=75, h=3, n=32, r=16, v=16, dtype=torch.float32):
    shapes = (b, t, h, n + r), (b, s, h, n + v), (b, s, r)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def prefill_twin(q, kv, k_pe, scale):
    """Chapter 03's reference in float64: each head's keys and values stand in their own part of a wide latent."""
    (h, width), r = kv.shape[2:], k_pe.shape[-1]
    n = q.shape[-1] - r
    kv_b = torch.eye(h * width).double().unflatten(0, (h, width))
    q, k_pe = q.double(), k_pe.double()
    return attend_expanded_reference(q[..., :n], q[..., n:], kv.double().flatten(2), k_pe, kv_b, scale)


@pytest.mark.parametrize("t, s, v", [(70, 75, 16), (65, 65, 64), (1, 66, 16), (130, 130, 16)])
def test_prefill_equals_chapter_03_in_outputs_and_gradients(t, s, v):
    inputs = prefill_inputs(1 + (t == 1), t, s, h=2, n=32, v=v)
    out, twin = mla_prefill(*inputs, 0.2)[0], prefill_twin(*inputs, 0.2)
    close(out, twin, 1e-5)
    g = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(y, inputs, g.type_as(y)) for y in (out, twin))
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 1e-4)


def test_prefill_returns_the_log_sum_exps_of_what_each_query_sees():
    q, kv, k_pe = (x.detach() for x in prefill_inputs(t=7, s=9))
    keys = torch.cat((kv[..., :32], k_pe.unsqueeze(2).expand(-1, -1, 3, -1)), -1)
    scores = torch.einsum("bthd,bshd->bths", q, keys) * 0.2
    seen = torch.ones(7, 9).tril(2).bool()[:, None]
    close(mla_prefill(q, kv, k_pe, 0.2)[1], scores.masked_fill(~seen, -torch.inf).logsumexp(-1))


def test_half_precision_prefill_stays_close():
    inputs = prefill_inputs(1, 40, 40, dtype=torch.bfloat16)
    out, twin = mla_prefill(*inputs, 0.2)[0], prefill_twin(*inputs, 0.2)
    assert out.dtype == torch.bfloat16 and relative_error(out.detach(), twin.detach()) < 5e-3
    found, wanted = (torch.autograd.grad(y.float().square().sum(), inputs) for y in (out, twin))
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(found, wanted, strict=True))


def test_prefill_of_nothing_has_gradients_of_zero():
    inputs = prefill_inputs(b=1, t=0, s=5)
    out = mla_prefill(*inputs, 0.2)[0]
    assert out.shape == (1, 0, 3, 16)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), inputs))


def test_second_derivatives_of_a_prompt_are_refused_and_not_wrong():
    inputs = prefill_inputs(1, 3, 3, h=1)
    (first,) = torch.autograd.grad(mla_prefill(*inputs, 0.2)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


BAD_PREFILL = {
    "heads": (lambda q, kv, k_pe: (q[:, :, :2], kv, k_pe), r"kv is \(2, 75, 3, 48\)"),
    "widths": (lambda q, kv, k_pe: (q[..., :40], kv, k_pe), "'nope': 24"),
    "more queries": (lambda q, kv, k_pe: (q, kv[:, :60], k_pe[:, :60]), "more positions"),
    "strides": (lambda q, kv, k_pe: (q, kv, torch.cat((k_pe, k_pe), -1)[..., :16]), r"k_pe .* strides \(2400, 32, 1\)"),
    "dtype": (lambda q, kv, k_pe: (q, kv.bfloat16(), k_pe), "bfloat16; .* float32 needed"),
}


@pytest.mark.parametrize("change, message", BAD_PREFILL.values(), ids=BAD_PREFILL)
def test_bad_prefill_is_refused_with_its_shape(change, message):
    with pytest.raises(ValueError, match=message):
        mla_prefill(*change(*prefill_inputs()), 0.2)


# Gate


def router(preset="mini", std=0.2):
    gate = Gate(ModelConfig.preset(preset, hidden_size=32))
    torch.nn.init.normal_(gate.weight, std=0.5)
    gate.e_score_correction_bias.normal_(std=std)
    return gate


def route_twin(logits, bias, config):
    """The gate with stable sorts: ties go to the lower index."""
    scores = logits.float().sigmoid()
    groups = (scores + bias).unflatten(1, (config.n_group, -1))
    worth = groups.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    kept = worth.sort(dim=-1, descending=True, stable=True).indices[:, : config.topk_group]
    lost = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
    choice = groups.masked_fill(lost.unsqueeze(-1), -torch.inf).flatten(1)
    indices = choice.sort(dim=-1, descending=True, stable=True).indices[:, : config.num_experts_per_tok]
    weights = scores.gather(1, indices)
    return indices, weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


@pytest.mark.parametrize("preset", ["nano", "mini", "v3"])
def test_gate_kernel_chooses_and_weighs_as_chapter_04(preset):
    gate, x = router(preset), torch.randn(13, 32)
    wanted, logits = gate(x), (x @ gate.weight.T).detach()
    indices, weights = route(logits, gate.e_score_correction_bias, gate.config)
    assert torch.equal(indices, wanted.indices)
    close(weights, wanted.weights)


def test_gate_kernel_gives_ties_to_the_lower_index():
    gate = router("mini", std=0.0)
    logits = torch.randint(0, 3, (20, 32)).to(torch.bfloat16)
    indices, weights = route(logits, gate.e_score_correction_bias, gate.config)
    wanted = route_twin(logits, gate.e_score_correction_bias, gate.config)
    assert torch.equal(indices, wanted[0])
    close(weights, wanted[1])


def test_gate_kernel_bias_changes_choice_not_weight():
    gate, logits = router(), torch.randn(9, 32)
    indices, weights = route(logits, gate.e_score_correction_bias + 2.02, gate.config)
    scores = logits.sigmoid().gather(1, indices)
    close(weights, scores / scores.sum(-1, keepdim=True) * gate.config.routed_scaling_factor)
    assert not torch.equal(indices, route(logits, torch.zeros(32), gate.config)[0])


def test_gate_kernel_scores_groups_by_their_best_two():
    config = ModelConfig.preset("nano", topk_group=1, num_experts_per_tok=2)
    logits = torch.full((1, 16), -9.0)
    logits[0, 0], logits[0, 5:7] = 3.0, 1.0  # the best expert is alone in its group
    assert sorted(route(logits, torch.zeros(16), config)[0][0].tolist()) == [5, 6]


def test_gate_kernel_never_leaves_the_kept_groups_where_biases_are_negative():
    """Masking lost groups with 0 would prefer them to negative numbers."""
    gate, logits = router(), torch.randn(9, 32)
    wanted = route_twin(logits, gate.e_score_correction_bias - 3, gate.config)
    assert torch.equal(route(logits, gate.e_score_correction_bias - 3, gate.config)[0], wanted[0])


def test_gate_kernel_of_no_tokens():
    indices, weights = route(torch.zeros(0, 32), torch.zeros(32), router().config)
    assert indices.shape == weights.shape == (0, 4)


def test_compiled_gate_compares_the_experts_numbers_where_scores_tie():
    """The interpreter takes the lower one in any case; only the compiler's own code shows what a GPU would do."""
    (case,) = import_module("dsv3_mini.kernels.gate").compile_cases().values()
    regions = re.findall(r'"tt\.reduce"(.*?)tt\.reduce\.return ([^:]*)', compile_case(case, 90).asm["ttir"], re.S)
    with_index = [body for body, returned in regions if "," in returned]
    assert len(with_index) == 1 + case.constexprs["KEPT"] + case.constexprs["K"]  # best of a group, groups, experts
    assert all("cmpi slt" in body and "cmpf oeq" in body for body in with_index)


BAD_GATE = {
    "v2": ("v2-lite", (4, 64), {}, "topk_method='greedy'"),
    "experts": ("mini", (4, 24), {"n_routed_experts": 24}, "24 experts in 8 groups"),
    "logits": ("mini", (4, 31), {}, r"logits is \(4, 31\)"),
}


@pytest.mark.parametrize("preset, shape, change, message", BAD_GATE.values(), ids=BAD_GATE)
def test_bad_routing_is_refused(preset, shape, change, message):
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(shape), torch.zeros(shape[1]), ModelConfig.preset(preset, **change))


# Norm, rotation, cache


def latent_inputs(t=5, dtype=torch.float32):
    layer = MLA(ModelConfig.preset("nano", hidden_size=48)).to(dtype)
    torch.nn.init.normal_(layer.kv_a_layernorm.weight)
    x, cache = torch.randn(3, t, 48).to(dtype), torch.full((3, 40, 64 + 16), NAN, dtype=dtype)
    return layer, x, rope_table(torch.arange(40), rope_frequencies(16)), torch.tensor([0, 35, 17]), cache


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_latents_are_those_of_chapter_03_in_their_places(dtype, tolerance):
    layer, x, rope, starts, cache = latent_inputs(dtype=dtype)
    weight, eps = layer.kv_a_layernorm.weight, layer.kv_a_layernorm.eps
    write_latents(layer.kv_a_proj_with_mqa(x), weight, rope, starts, cache, eps)
    for row, start in enumerate(starts.tolist()):
        wanted = layer.latents(x[row : row + 1], tuple(part[start : start + 5] for part in rope))
        close(cache[row, start : start + 5], torch.cat(wanted, -1)[0], tolerance)
    assert cache.isnan().all(-1).sum().item() == 3 * 35 and cache.isnan().sum() == 3 * 35 * 80


@torch.no_grad()
def test_latents_go_through_strides_and_never_past_the_end():
    layer, x, rope, starts, cache = latent_inputs()
    roomy = torch.full((6, 50, 80), NAN)
    projected = F.pad(layer.kv_a_proj_with_mqa(x), (0, 8))[..., :80]
    write_latents(projected, layer.kv_a_layernorm.weight, rope, starts + 3, roomy[::2, :40], 1e-6, end=43)
    assert roomy[1::2].isnan().all() and roomy[:, 40:].isnan().all()
    assert not roomy[2, 38:40].isnan().any()


@torch.no_grad()
def test_bad_latents_are_refused():
    layer, x, rope, starts, cache = latent_inputs()
    weight, projected = layer.kv_a_layernorm.weight, layer.kv_a_proj_with_mqa(x)
    write_latents(projected[:, :0], weight, rope, starts, cache, 1e-6)
    assert cache.isnan().all()
    for change, message in (
        ((projected, weight, rope, starts + 1, cache), "lie in 6..41; 5 new tokens in a cache of 40"),
        ((projected, weight[:48], rope, starts, cache), r"cosines is \(40, 8\)"),
        ((projected.mT.contiguous().mT, weight, rope, starts, cache), "strides"),
        ((projected, weight, rope, starts, cache[..., :79]), r"cache is \(3, 40, 79\)"),
        ((projected, weight, (rope[0], rope[1][:30]), starts, cache), r"sines is \(30, 8\)"),
        ((projected[0], weight, rope, starts, cache), r"x is \(5, 80\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write_latents(*change, 1e-6)


# Machine code and benchmark


@pytest.mark.parametrize("arch, product", [(90, "wgmma.mma_async"), (100, "tcgen05.mma")])
def test_products_run_on_tensor_cores_within_registers_and_shared_memory(arch, product):
    modules = [
        import_module(f"dsv3_mini.kernels.{name}") for name in ("mla_decode", "mla_prefill", "gate", "norm_rope")
    ]
    for name, case in [item for module in modules for item in module.compile_cases().items()]:
        compiled = compile_case(case, arch)
        used, ptx = resources(compiled), compiled.asm["ptx"]
        assert used.spilled == 0 and used.shared <= 227 * 1024, (name, used)
        full_tiles = name in ("mla_decode", "mla_prefill_forward", "mla_prefill_backward_q", "mla_prefill_backward_kv")
        assert (product in ptx) == full_tiles and ("mma.sync" in ptx) == (name == "mla_decode_few_heads"), name


def test_float32_prompts_of_v3s_widths_fit_into_registers():
    cases = import_module("dsv3_mini.kernels.mla_prefill").compile_cases(torch.float32)
    used = resources(compile_case(cases["mla_prefill_backward_kv"], 90))  # the hungriest of the three
    assert used.spilled == 0 and used.shared <= 227 * 1024, used


def test_results_do_not_depend_on_the_default_dtype_either():
    decoding, prompt = decoding_inputs([40, 7]), prefill_inputs(1, 5, 9)
    gate, logits = router(), torch.randn(9, 32)

    def run():
        out, lse = mla_prefill(*prompt, 0.2)
        routed = route(logits, gate.e_score_correction_bias, gate.config)
        return [*mla_decode(*decoding, 0.3, 2), out, lse, *routed, *torch.autograd.grad(out.sum(), prompt)]

    expected = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


def test_contests_of_a_small_model_are_right_in_the_interpreter():
    config, seen = ModelConfig.preset("nano", num_attention_heads=2), set()
    for contest in contests_of(config, "tiny", 9, torch.device("cpu")):
        error = relative_error(contest.ours["taught"](), contest.expected())
        assert error <= contest.tolerance and contest.n_bytes > 0, (contest.shape, error)
        assert all(peer() is not None for peer in contest.peers.values())
        seen.add(contest.kernel)
    assert seen == {"mla_decode", "mla_prefill", "gate", "write_latents"}
