"""Every kernel compiled and run on an NVIDIA GPU, at odd sizes, against its twin in torch on the CPU.

Without a GPU the same tests run in the interpreter, so that a machine with one meets no slip of theirs.
"""

from contextlib import nullcontext

import pytest
import torch
from test_kernels import LOADS, SIZES, awkward, cast_kernel, draw, gradients, relative, same_bits, small_moe
from test_kernels_attention import (
    decoding_inputs,
    decoding_twin,
    latent_inputs,
    prefill_inputs,
    prefill_twin,
    route_twin,
    router,
)

from dsv3_mini import fp8, moe
from dsv3_mini.config import ModelConfig
from dsv3_mini.decode import DecodePlan
from dsv3_mini.generate import generate
from dsv3_mini.kernels.activation import swiglu_quant
from dsv3_mini.kernels.gate import route
from dsv3_mini.kernels.gemm import fp8_gemm
from dsv3_mini.kernels.grouped import grouped_fp8_gemm, grouped_linear
from dsv3_mini.kernels.interpreter import launch
from dsv3_mini.kernels.layers import segment_gradients, segment_gradients_reference, use_kernels
from dsv3_mini.kernels.mla_decode import attend, mla_decode
from dsv3_mini.kernels.mla_prefill import mla_prefill
from dsv3_mini.kernels.norm_rope import write_latents
from dsv3_mini.kernels.quantise import act_quant, weight_dequant, weight_quant
from dsv3_mini.model import DeepSeekV3

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU of compute capability 9.0 (H100) or later")
both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)], ids=["interpreter", "gpu"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def at(device, *tensors):
    """Copies on the device, leaves of their own."""
    return [x.detach().to(device).requires_grad_(x.requires_grad) for x in tensors]


def back(*tensors):
    return [x.detach().cpu() for x in tensors]


# Quantisation: bit for bit


@both
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_compiled_casts_are_torchs(device, dtype):
    x = torch.cat((draw(1000, spread=5).clamp(-400, 400), torch.linspace(120, 136, 24)))
    y = torch.empty(1024, dtype=dtype, device=device)
    launch(cast_kernel, (1,), x.to(device), y, N=1024)
    assert same_bits(back(y), [x.to(dtype)])


@both
@pytest.mark.parametrize("fmt", [None, "ue8m0"])
def test_tiles_and_blocks_have_the_twins_bits(device, fmt):
    x, w = awkward(37, 333), torch.stack([awkward(65, 130), awkward(65, 130)])
    for view in (x, x.bfloat16(), x.T, x[:, ::2], x[0]):
        assert same_bits(back(*act_quant(view.to(device), 128, fmt)), fp8.act_quant(view, 128, fmt))
    q, scale = weight_quant(w.to(device), 32, fmt)
    assert same_bits(back(q, scale), fp8.weight_quant(w, 32, fmt))
    assert same_bits(back(weight_dequant(q, scale, 32)), [fp8.weight_dequant(*back(q, scale), 32, torch.bfloat16)])


@both
def test_nan_stays_in_its_place_when_compiled(device):
    x = draw(2, 64)
    x[1, 40] = torch.nan
    q, scale = back(*act_quant(x.to(device), 32))
    assert q.float().isnan().nonzero().tolist() == [[1, 40]] and scale.isfinite().all()


@both
def test_fused_activation_is_that_of_two_steps(device):
    gate_up, weights = draw(19, 400, spread=1).bfloat16(), torch.rand(19, 1)
    expected, expected_scale = fp8.act_quant(fp8.swiglu(*gate_up.float().chunk(2, -1), weights), 128)
    q, scale = back(*swiglu_quant(*at(device, gate_up, weights)))
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    assert relative(fp8.act_dequant(q, scale), fp8.act_dequant(expected, expected_scale)) < 2e-3


# Products: Hopper adds 128 of them with some 14 bits, so a GPU's differ from the twin's


@both
@pytest.mark.parametrize("m, n, k, tile", SIZES)
def test_fp8_products_stay_within_the_accumulators_bits(device, m, n, k, tile):
    x, w = draw(m, k, spread=1), draw(n, k, spread=1)
    for quantise in (weight_quant, act_quant):
        a, b = act_quant(x.to(device), tile), quantise(w.to(device), tile)
        expected = fp8.fp8_gemm(*back(*a), *back(*b), tile)
        assert relative(*back(fp8_gemm(*a, *b, tile)), expected) < 2e-3


@both
def test_grouped_products_and_gradients_with_empty_experts(device):
    ends, grad = LOADS.cumsum(0).int(), draw(109, 24).bfloat16()
    leaves = draw(109, 40).bfloat16().requires_grad_(), draw(7, 24, 40).bfloat16().requires_grad_()
    on_device = at(device, *leaves)
    y, expected = grouped_linear(*on_device, ends.to(device)), moe.grouped_linear(*leaves, ends)
    ours = back(y, *torch.autograd.grad(y, on_device, grad.to(device)))
    for a, b in zip(ours, (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
        assert relative(a, b) < 5e-3


@both
def test_grouped_fp8_product_equals_one_product_an_expert_on_the_device(device):
    a, b, ends = act_quant(draw(109, 72).to(device), 32), weight_quant(draw(7, 50, 72).to(device), 32), LOADS.cumsum(0)
    (out,) = back(grouped_fp8_gemm(*a, *b, ends.int().to(device), 32, torch.float32))
    (q, s), (w, ws) = back(*a), back(*b)
    for i, (end, load) in enumerate(zip(ends.tolist(), LOADS.tolist(), strict=True)):
        rows = slice(end - load, end)
        assert not load or relative(out[rows], fp8.fp8_gemm(q[rows], s[rows], w[i], ws[i], 32)) < 2e-3


@both
def test_weight_gradients_of_all_experts_have_the_bits_of_single_ones(device):
    grad, x, ends = at(device, draw(109, 40).bfloat16(), draw(109, 72), LOADS.cumsum(0).int())
    together, singly = (f(grad, x, ends, 32, None, None) for f in (segment_gradients, segment_gradients_reference))
    assert torch.equal(together, singly) and not together[LOADS == 0].any()
    assert relative(*back(together[2]), fp8.wgrad(*back(grad[5:75], x[5:75]), 32, None, fp8.fp8_gemm)) < 2e-3


@both
def test_layers_switched_to_kernels_equal_their_twins(device):
    for convert, dtype in ((lambda layer: fp8.to_fp8(layer, 32), torch.float32), (lambda layer: layer, torch.bfloat16)):
        layer, x, grad = convert(small_moe().to(dtype)), draw(5, 64).to(dtype).requires_grad_(), draw(5, 64).to(dtype)
        expected = gradients(layer, x, grad)
        layer = use_kernels(layer.to(device), interpret=device == "cpu")
        ours = back(*gradients(layer, *at(device, x, grad)))
        assert max(map(relative, ours, expected)) < 3e-2  # a product's last bits move roundings of the next one


# Attention, gate, latents


@both
@pytest.mark.parametrize("dtype, h, tolerance", [(torch.float32, 5, 1e-5), (torch.bfloat16, 20, 2e-2)])
@pytest.mark.parametrize("t, lengths, n_splits", [(1, [77, 33, 1], None), (2, [40, 2], 3)])
def test_decoding_on_the_device_equals_chapter_03(device, dtype, h, tolerance, t, lengths, n_splits):
    inputs = decoding_inputs(lengths, t, h, dtype=dtype)
    (z,) = back(mla_decode(*at(device, *inputs), 0.25, n_splits)[0])
    torch.testing.assert_close(z.double(), decoding_twin(*inputs, 0.25), rtol=tolerance, atol=tolerance)


@both
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_prompts_on_the_device_equal_chapter_03_with_gradients(device, dtype, tolerance):
    inputs = prefill_inputs(1, 37, 70, h=2, dtype=dtype)
    on_device, g = at(device, *inputs), draw(1, 37, 2, 16)
    out, twin = mla_prefill(*on_device, 0.2)[0], prefill_twin(*inputs, 0.2)
    ours = back(out, *torch.autograd.grad(out, on_device, g.to(device, dtype)))
    for a, b in zip(ours, (twin, *torch.autograd.grad(twin, inputs, g.double())), strict=True):
        assert relative(a, b) < tolerance


@both
@pytest.mark.parametrize("preset", ["nano", "v3"])
def test_compiled_gate_gives_ties_to_the_lower_index(device, preset):
    gate = router(preset, std=0.0)
    logits = torch.randint(0, 3, (20, gate.config.n_routed_experts)).to(torch.bfloat16)
    indices, weights = back(*route(*at(device, logits, gate.e_score_correction_bias), gate.config))
    wanted = route_twin(logits, gate.e_score_correction_bias, gate.config)
    assert torch.equal(indices, wanted[0]) and relative(weights, wanted[1]) < 1e-5


@both
@torch.no_grad()
def test_latents_reach_their_places_on_the_device(device):
    layer, x, rope, starts, cache = latent_inputs()
    projected, norm, filled = layer.kv_a_proj_with_mqa(x), layer.kv_a_layernorm, cache.to(device)
    write_latents(*at(device, projected, norm.weight), at(device, *rope), starts.to(device), filled, norm.eps)
    for row, start in enumerate(starts.tolist()):
        wanted = layer.latents(x[row : row + 1], tuple(part[start : start + 5] for part in rope))
        assert relative(filled[row, start : start + 5].cpu(), torch.cat(wanted, -1)[0]) < 1e-5
    assert filled.isnan().all(-1).sum().item() == 3 * 35


@both
def test_generation_on_the_device_writes_the_same_tokens(device):
    config = ModelConfig.preset("nano", num_hidden_layers=1, hidden_size=64, kv_lora_rank=16, initializer_range=0.1)
    model, prompts = DeepSeekV3(config).eval(), torch.randint(5, 1000, (2, 5))
    plain = generate(DecodePlan(model), prompts, 3, stop=()).tokens
    ours = generate(DecodePlan(model.to(device), attend=attend), prompts, 3, stop=(), speculative=True).tokens
    assert torch.equal(plain, ours.cpu())


# What only a device can get wrong


@both
def test_no_rows_and_no_texts_launch_nothing(device):
    none, a, b = torch.zeros(0, 32, device=device), *(draw(5, 32).to(device) for _ in range(2))
    assert fp8_gemm(*act_quant(none, 32), *weight_quant(b, 32), 32).shape == (0, 5)
    assert not fp8_gemm(*act_quant(a[:, :0]), *weight_quant(b[:, :0])).any()
    assert not segment_gradients(none, none, torch.zeros(3, dtype=torch.int32, device=device), 32).any()
    assert mla_decode(*at(device, *decoding_inputs([])), 0.3)[0].shape == (0, 1, 5, 32)
    layer = use_kernels(fp8.to_fp8(small_moe(), 32).to(device), interpret=device == "cpu")
    assert layer(torch.zeros(0, 64, device=device)).shape == (0, 64)


@both
def test_forward_and_backward_run_on_the_callers_stream(device):
    leaves, grad, ends = (draw(109, 40), draw(7, 24, 40)), draw(109, 24).bfloat16().to(device), LOADS.cumsum(0).int()
    leaves = [x.requires_grad_() for x in at(device, *(x.bfloat16() for x in leaves))]
    results = []
    for other in (False, True):
        stream = torch.cuda.Stream() if other and device == "cuda" else None
        with torch.cuda.stream(stream) if stream else nullcontext():
            if stream:
                stream.wait_stream(torch.cuda.default_stream())
                torch.cuda._sleep(10**7)  # what runs on another stream would be done long before this one's inputs
            doubled = [2 * x for x in leaves]
            results.append(torch.autograd.grad(grouped_linear(*doubled, ends.to(device)), leaves, grad))
        if stream:
            stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs of capability 9.0")
def test_a_kernel_runs_where_its_tensors_are_on_a_second_gpu():
    x = draw(37, 333)
    assert same_bits(back(*act_quant(x.to("cuda:1"))), fp8.act_quant(x))


@needs_gpu
def test_addresses_beyond_two_to_the_31_are_reached_on_a_gpu():
    x, last = torch.zeros(2**15 + 1, 2**16, dtype=torch.bfloat16, device="cuda"), draw(1, 2**16).bfloat16()
    x[-1:] = last.cuda()
    q, scale = act_quant(x)
    assert same_bits(back(q[-1:], scale[-1:]), fp8.act_quant(last)) and not q[:-1].view(torch.uint8).any()
    del x, q, scale
    a, b = act_quant(torch.ones(47_000, 128, device="cuda")), weight_quant(torch.ones(46_000, 128, device="cuda"))
    assert (fp8_gemm(*a, *b, dtype=torch.bfloat16)[-1] == 128).all()


@needs_gpu
def test_a_text_far_inside_the_cache_is_read_on_a_gpu():
    q_c, q_pe, small, lengths = decoding_inputs([9, 7, 5], h=3, c=64, dtype=torch.bfloat16)
    cache = torch.zeros(3, 2**31 // 80 + 1, 80, dtype=torch.bfloat16, device="cuda")
    cache[:, :90] = small.cuda()
    (z,) = back(mla_decode(*at("cuda", q_c, q_pe), cache, lengths.cuda(), 0.25)[0])
    assert relative(z, decoding_twin(q_c, q_pe, small, lengths, 0.25)) < 1e-2
