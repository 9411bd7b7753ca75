"""FP8: formats from their bits, tiles and blocks, limited sums, the linear layer and the published layout."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.fp8 import (
    FP8Experts,
    FP8FeedForward,
    FP8Linear,
    FP8Matmul,
    FP8SwiGLU,
    act_dequant,
    act_quant,
    act_quant_reference,
    fp8_gemm,
    fp8_gemm_reference,
    swiglu,
    to_fp8,
    weight_dequant,
    weight_quant,
)
from dsv3_mini.fp8_training import AdamW16, build_model, precision_run
from dsv3_mini.layers import SwiGLU
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import MoE, experts_reference, record_routing
from dsv3_mini.precision import decode, dot_limited_reference, largest_value, matmul_limited, round_to_format

FORMATS = {
    torch.float8_e4m3fn: (4, 3, False),
    torch.float8_e5m2: (5, 2, True),
    torch.float16: (5, 10, True),
    torch.bfloat16: (8, 7, True),
}


def draw(*shape, seed=0, spread=0.0):
    """Normal numbers, each times a log-normal factor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def awkward():
    """Ragged width, a zero tile, an outlier, and numbers deep among the subnormals."""
    x = draw(7, 333, spread=3)
    x[1, :128], x[2, 5], x[3] = 0, 1e6, x[3] * 1e-9
    return x


# Formats


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_all_256_patterns_mean_what_torch_says(dtype):
    codes = torch.arange(256)
    theirs = codes.to(torch.uint8).view(dtype).double()
    torch.testing.assert_close(decode(codes, *FORMATS[dtype]), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_is_torchs_cast_bit_for_bit(dtype):
    largest = largest_value(*FORMATS[dtype])
    assert largest == torch.finfo(dtype).max
    grid = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()  # all bfloat16 numbers
    x = torch.cat([draw(100_003, spread=6), grid, grid * 1.0625])
    x = x[x.abs() <= largest]
    rounded = round_to_format(x, *FORMATS[dtype])
    assert torch.equal(rounded, x.to(dtype).float()) and torch.equal(rounded.signbit(), x.signbit())


def test_ties_go_to_the_even_neighbour():
    x = torch.tensor([17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10])
    expected = torch.tensor([16.0, 20.0, -16.0, 0.0, 2.0**-8])
    assert torch.equal(round_to_format(x, 4, 3, infinity=False), expected)


def test_too_large_saturates_and_nan_stays():
    x = torch.tensor([1e9, -float("inf"), float("nan")])
    assert round_to_format(x, 4, 3, infinity=False)[:2].tolist() == [448, -448]
    assert round_to_format(x, 5, 6)[:2].tolist() == [65024, -65024]
    assert round_to_format(x, 5, 6)[2].isnan()


def test_e5m6_values_are_those_of_its_bits():
    values = decode(torch.arange(2**12), 5, 6)
    values = values[values.isfinite()]
    assert torch.equal(round_to_format(values, 5, 6), values)
    middle = (values[1:100] + values[:99]) / 2
    assert not torch.isin(round_to_format(middle, 5, 6), middle).any()


def test_a_format_needs_bits():
    with pytest.raises(ValueError, match="exponent_bits=1"):
        largest_value(1, 3)


# Quantisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tile", [128, 50])
def test_tiles_equal_the_reference_bit_for_bit(dtype, tile):
    x = awkward().to(dtype)
    (q, scale), (expected, expected_scale) = act_quant(x, tile), act_quant_reference(x, tile)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert torch.equal(q.float(), expected) and torch.equal(scale, expected_scale)


def test_fp8_is_not_rounding_to_integers():
    x = draw(5, 256)
    q, scale = act_quant(x)
    assert ((q.float() != q.float().round()).float().mean() > 0.02) and relative(act_dequant(q, scale), x) < 0.03
    assert torch.equal(q.float(), round_to_format(x / scale.repeat_interleave(128, 1), 4, 3, infinity=False))


def test_blocks_equal_a_loop_at_ragged_edges():
    w = draw(300, 261, spread=1)
    q, scale = weight_quant(w)
    assert scale.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            assert scale[i, j] == w[here].abs().max() / 448
            assert torch.equal(q[here].float(), round_to_format(w[here] / scale[i, j], 4, 3, infinity=False))


def test_576_rows_make_five_block_rows():
    assert weight_quant(draw(576, 130))[1].shape == (5, 2)


def test_stacked_experts_are_quantised_one_by_one():
    w = draw(3, 70, 150)
    stacked, single = weight_quant(w, 64), [weight_quant(expert, 64) for expert in w]
    assert torch.equal(stacked[0].float(), torch.stack([q.float() for q, _ in single]))
    assert torch.equal(stacked[1], torch.stack([scale for _, scale in single]))
    assert relative(weight_dequant(*stacked, 64), w) < 0.03


def test_a_block_is_a_block_from_both_sides():
    q, scale = weight_quant(draw(200, 300))
    turned, turned_scale = weight_quant(draw(200, 300).T)
    assert torch.equal(q.T.float(), turned.float()) and torch.equal(scale.T, turned_scale)


def test_ue8m0_scales_are_the_next_power_of_two():
    x = awkward()
    scale, fine = act_quant(x, scale_fmt="ue8m0")[1], act_quant(x)[1]
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert ((scale >= fine) & (scale < 2 * fine)).all()
    exact = torch.full((1, 128), 448.0 * 2**-3)
    assert act_quant(exact, scale_fmt="ue8m0")[1].item() == 2**-3
    overflown = act_quant(torch.tensor([[1.0, torch.inf]]), scale_fmt="ue8m0")[1]
    assert overflown.isinf().all()


def test_power_of_two_scales_survive_retiling():
    x = draw(256, 256) * torch.exp(draw(256, 1, seed=1))
    moved = {}
    for scale_fmt in (None, "ue8m0"):
        once = act_dequant(*act_quant(x, scale_fmt=scale_fmt))
        moved[scale_fmt] = (act_dequant(*act_quant(once.T, scale_fmt=scale_fmt)).T != once).float().mean()
    assert moved["ue8m0"] < 0.01 and moved[None] > 0.9


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 140), st.integers(-20, 20), st.sampled_from([None, "ue8m0"]))
def test_error_is_bounded_by_half_a_step(width, tile, exponent, scale_fmt):
    x = draw(3, width, seed=width, spread=2) * 2.0**exponent
    q, scale = act_quant(x, tile, scale_fmt)
    scale = scale.repeat_interleave(tile, 1)[:, :width]
    bound = torch.maximum(x.abs() / 16, scale * 2.0**-10) * (1 + 1e-5)
    assert ((act_dequant(q, scale[:, ::tile], tile) - x).abs() <= bound).all()


def test_nothing_and_zeros_quantise_to_nothing_and_zeros():
    q, scale = act_quant(torch.zeros(2, 200))
    assert not q.float().any() and (scale > 0).all()
    assert act_quant(torch.zeros(0, 200))[1].shape == (0, 2)
    assert not weight_dequant(*weight_quant(torch.zeros(130, 5))).any()


def test_one_scale_survives_moderate_outliers_where_int8_does_not():
    """The usual verdict on per-tensor scales holds for integers; E4M3's exponent hides outliers of 1000."""
    x = draw(64, 512)
    x[::9, 7] = 1000.0
    others, step = x.abs() < 100, x.abs().max()
    whole = act_dequant(*act_quant(x.view(1, -1), x.numel()), x.numel()).view_as(x)
    integer = (x / step * 127).round() * step / 127
    assert relative(whole[others], x[others]) < 0.03 < 0.9 < relative(integer[others], x[others])


def test_tiles_save_what_one_scale_flushes_to_zero():
    x = draw(64, 512)
    x[::16, 7] = 1e5
    whole = act_quant(x.view(1, -1), x.numel())[0].view_as(x)
    flushed = [((q.float() == 0) & (x != 0)).float().mean() for q in (whole, act_quant(x)[0])]
    assert flushed[0] > 0.1 and flushed[1] < 0.01


def test_blocks_lose_rows_of_gradients_that_tiles_keep():
    x = draw(512, 256) * torch.exp(4 * draw(512, 1, seed=1))
    lost = []
    for y in (act_dequant(*act_quant(x, min_amax=1e-30)), weight_dequant(*weight_quant(x))):
        lost.append(((y - x).norm(dim=1) / x.norm(dim=1) > 0.5).float().mean())
    assert lost[0] == 0 and lost[1] > 0.1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: act_quant(torch.ones(3, 4, dtype=torch.long)), r"\(3, 4\) of torch.int64"),
        (lambda: act_quant(torch.ones(3, 4), tile=0), "tile >= 1"),
        (lambda: act_quant(torch.ones(3, 4), scale_fmt="e8m0"), "scale_fmt='e8m0'"),
        (lambda: act_quant(torch.ones(3, 4), number_format="e3m4"), "number_format='e3m4'"),
        (lambda: weight_quant(torch.ones(4)), "2 dimensions"),
        (lambda: weight_dequant(*weight_quant(torch.ones(130, 4)), block=64), r"\(3, 1\) needed"),
        (lambda: act_dequant(*act_quant(torch.ones(3, 300)), tile=256), r"\(3, 3\) for \(3, 300\) in tiles of 256"),
        (lambda: matmul_limited(torch.ones(3, 64), torch.ones(4, 32)), "one K needed"),
        (lambda: FP8Linear(4, 4, tile=0), "tile >= 1"),
        (lambda: FP8Linear(4, 4, scale_fmt="e8m0"), "scale_fmt='e8m0'"),
        (lambda: FP8Linear(4, 4, cache_format="e5m7"), "number_format='e5m7'"),
        (lambda: to_fp8(nn.ModuleDict({"up_proj": nn.Linear(3, 3, bias=False)}), tile=0), "tile=0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Sums


@pytest.mark.parametrize("promote_every", [None, 32, 96])
def test_fast_limited_sums_equal_the_loop_bit_for_bit(promote_every):
    a, b = (draw(n, 203, seed=n, spread=2).clamp(-448, 448).to(torch.float8_e4m3fn).double() for n in (3, 5))
    loop = [[dot_limited_reference(r, s, promote_every) for s in b.tolist()] for r in a.tolist()]
    assert torch.equal(matmul_limited(a, b, promote_every), torch.tensor(loop))


def test_limited_sum_by_hand():
    """1 + 2^-13 fits into 13 bits of fraction, 1 + 2^-14 is cut, also when it is negative: towards zero."""
    one = torch.ones(1, 2)
    for small, expected in ((2.0**-13, 1 + 2.0**-13), (2.0**-14, 1.0), (-(2.0**-14), 1.0)):
        assert matmul_limited(one, torch.tensor([[1.0, small]])).item() == expected


def test_promotion_shrinks_the_error_for_both_kinds_of_data():
    errors = {}
    for kind, make in (("uniform", torch.rand), ("normal", torch.randn)):
        generator = torch.Generator().manual_seed(0)
        a, b = (make(12, 4096, generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
        exact = (a.double() @ b.double().T).float()
        errors[kind] = [relative(matmul_limited(a, b, p), exact) for p in (None, 128)]
    assert errors["uniform"][0] > 0.02 and errors["normal"][0] < 0.002
    assert all(before > 8 * after for before, after in errors.values())


def test_promotion_needs_whole_groups():
    with pytest.raises(ValueError, match="promote_every=48"):
        matmul_limited(torch.ones(1, 96), torch.ones(1, 96), promote_every=48)


@pytest.mark.parametrize("tile", [128, 32])
def test_gemm_equals_the_loop_with_blocks(tile):
    operands = (*act_quant(draw(5, 150, spread=1), tile), *weight_quant(draw(37, 150, seed=1), tile))
    torch.testing.assert_close(fp8_gemm(*operands, tile), fp8_gemm_reference(*operands, tile), rtol=1e-5, atol=1e-5)


def test_gemm_with_tiles_on_both_sides_equals_dequantised_product():
    a, b = act_quant(draw(9, 150, spread=1), 32), act_quant(draw(11, 150, seed=1, spread=1), 32)
    exact = act_dequant(*a, 32).double() @ act_dequant(*b, 32).double().T
    torch.testing.assert_close(fp8_gemm(*a, *b, 32).double(), exact, rtol=1e-5, atol=1e-3)


def test_gemm_scales_limited_partial_sums():
    operands = (*act_quant(draw(6, 512), 128), *weight_quant(draw(7, 512, seed=1)))
    assert 1e-5 < relative(fp8_gemm(*operands, multiply=matmul_limited), fp8_gemm(*operands)) < 1e-3


@pytest.mark.parametrize("fault", ["dtype", "inner", "scales", "tile"])
def test_gemm_names_what_does_not_fit(fault):
    a, a_scale = act_quant(draw(5, 256))
    b, b_scale = weight_quant(draw(200, 256))
    tile = 64 if fault == "tile" else 128
    a = a.float() if fault == "dtype" else a
    b = b[:, :130] if fault == "inner" else b
    b_scale = b_scale[:, :1] if fault == "scales" else b_scale
    expected = {"dtype": "a is torch.float32", "inner": r"\(200, 130\)", "scales": r"\(200, 1\)|\(2, 1\)"}
    with pytest.raises(ValueError, match=expected.get(fault, r"\(5, 4\) for tiles")):
        fp8_gemm(a, a_scale, b, b_scale, tile)


# The linear layer


def products(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, (x, layer.weight), dy))


@pytest.mark.parametrize("scale_fmt, cache_format", [(None, "e4m3"), ("ue8m0", "e4m3"), ("ue8m0", "e5m6")])
def test_three_products_are_those_of_the_recipe(scale_fmt, cache_format):
    """Each product from dequantised operands, tiled along its own inner dimension."""
    x, dy, layer = draw(45, 70), 1e-7 * draw(45, 50, seed=1), FP8Linear(70, 50, 32, scale_fmt, cache_format)
    found = products(layer, x, dy)

    def tiled(t, number_format="e4m3", min_amax=1e-30):
        return act_dequant(*act_quant(t, 32, scale_fmt, number_format, min_amax), 32)

    kept = tiled(x, cache_format)
    used = kept if cache_format == "e4m3" else tiled(kept)
    w = weight_dequant(*weight_quant(layer.weight.detach(), 32), 32)
    expected = used @ w.T, tiled(dy) @ w, tiled(dy.T) @ tiled(kept.T).T
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * e.abs().max().item())


def test_products_are_close_to_those_of_float32():
    x, dy, layer = draw(300, 256), draw(300, 384, seed=1), FP8Linear(256, 384)
    plain = nn.Linear(256, 384, bias=False)
    plain.weight = layer.weight
    for f, e in zip(products(layer, x, dy), products(plain, x, dy), strict=True):
        assert 0.02 < relative(f, e) < 0.05


def test_tiny_gradients_are_not_flushed():
    x, layer = draw(64, 64), FP8Linear(64, 64, 32)
    large, tiny = (products(layer, x, factor * draw(64, 64, seed=1)) for factor in (1.0, 2.0**-40))
    for a, b in zip(large[1:], tiny[1:], strict=True):
        assert relative(b * 2.0**40, a) < 1e-6


def test_only_the_quantised_input_is_kept():
    seen, layer, x = [], FP8Linear(96, 160, 32), draw(77, 96).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        layer(x)
    tokens = [t for t in seen if t.shape[0] == 77]
    assert sorted(t.itemsize * t[0].numel() for t in tokens) == [3 * 4, 96]


def test_one_argument_replaces_all_three_products():
    shapes = []

    def gemm(a, a_scale, b, b_scale, tile):
        shapes.append((a.shape, a_scale.shape, b.shape, b_scale.shape))
        return 2 * fp8_gemm(a, a_scale, b, b_scale, tile)

    layers = [FP8Linear(70, 50, 32), FP8Linear(70, 50, 32, gemm=gemm)]
    layers[1].weight = layers[0].weight
    plain, doubled = (products(layer, draw(45, 70), draw(45, 50, seed=1)) for layer in layers)
    assert all(torch.equal(2 * p, d) for p, d in zip(plain, doubled, strict=True))
    fprop, inner_out, inner_tokens = (
        ((45, 70), (45, 3), (50, 70), (2, 3)),
        ((45, 50), (45, 2), (70, 50), (3, 2)),
        ((50, 45), (50, 2), (70, 45), (70, 2)),
    )
    assert shapes == [fprop, inner_out, inner_tokens]


def test_no_tokens_give_no_output_and_no_gradient():
    y, dx, dw = products(FP8Linear(70, 50, 32), torch.zeros(0, 70), torch.zeros(0, 50))
    assert y.shape == (0, 50) and dx.shape == (0, 70) and not dw.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_and_gradients_have_their_owners_dtypes(dtype):
    layer = FP8Linear(64, 48, 32).to(dtype)
    y, dx, dw = products(layer, draw(2, 5, 64).to(dtype), draw(2, 5, 48).to(dtype))
    assert y.shape == (2, 5, 48) and {y.dtype, dx.dtype, dw.dtype} == {dtype}


# The feed-forward layer


def feed_forward_inputs(n=77, weighted=True):
    """x, gate weights of routed tokens or None, and the three matrices, of odd sizes."""
    weights = draw(n, 1, seed=9).abs() if weighted else None
    tensors = draw(n, 70), weights, 0.2 * draw(48, 70, seed=1), 0.2 * draw(48, 70, seed=2), 0.2 * draw(70, 48, seed=3)
    return [t if t is None else t.requires_grad_() for t in tensors]


def by_layers(x, weights, gate, up, down):
    """The same from three FP8Matmul, which keep everything."""
    parts = (FP8Matmul.apply(x, w, 32, None, "e4m3") for w in (gate, up))
    return FP8Matmul.apply(swiglu(*parts, weights), down, 32, None, "e4m3")


@pytest.mark.parametrize("weighted", [True, False])
def test_recomputed_swiglu_is_three_layers_forward_and_near_them_backward(weighted):
    inputs, dy = feed_forward_inputs(weighted=weighted), draw(77, 70, seed=4)
    leaves = [t for t in inputs if t is not None]
    found, plain = FP8FeedForward.apply(*inputs, 32, None, fp8_gemm), by_layers(*inputs)
    assert torch.equal(found, plain)
    exact = inputs[1:2] + inputs[2:]
    h = swiglu(inputs[0] @ exact[1].T, inputs[0] @ exact[2].T, inputs[1])
    true = torch.autograd.grad(h @ inputs[4].T, leaves, dy)
    pairs = zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(plain, leaves, dy), true, strict=True)
    for recomputed, kept, t in pairs:
        assert 0 < relative(recomputed, kept) < 0.07 and relative(recomputed, t) < 1.25 * relative(kept, t)


def test_no_output_of_swiglu_is_kept():
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        FP8FeedForward.apply(*feed_forward_inputs(), 32, None, fp8_gemm)
    tokens = [t for t in seen if 77 in t.shape[:2]]
    shapes = {(*t.shape, t.dtype.itemsize) for t in tokens}
    assert shapes == {(77, 70, 1), (77, 3, 4), (2, 77, 48, 1), (2, 77, 2, 4), (77, 1, 4)}


def test_gate_and_up_are_kept_in_tiles_of_their_own():
    """A tile that ran over from gate to up would take one scale for both."""
    x, _, gate, up, down = feed_forward_inputs(weighted=False)
    grads = []
    for factor in (1.0, 1e6):
        y = FP8FeedForward.apply(x, None, gate, factor * up, down / factor, 32, None, fp8_gemm)
        grads.append(torch.autograd.grad(y.sum(), gate)[0])
    assert relative(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_feed_forward_gives_each_its_own_dtype(dtype):
    layer = to_fp8(SwiGLU(64, 48), 32).to(dtype)
    assert type(layer) is FP8SwiGLU
    x = draw(2, 5, 64).to(dtype).requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y.sum(), (x, *layer.parameters()))
    assert y.shape == x.shape and {y.dtype, *(g.dtype for g in grads)} == {dtype}


def test_twins_built_directly_are_those_of_the_switch():
    built, switched = FP8SwiGLU(130, 48), to_fp8(SwiGLU(130, 48))
    switched.load_state_dict(built.state_dict())
    x = draw(5, 130)
    assert torch.equal(built(x), switched(x))
    moe = MoE(ModelConfig.preset("nano", initializer_range=0.2))
    experts, routing = FP8Experts(moe.gate.config), moe.gate(x[:, :128])
    assert experts(x[:, :128], routing).shape == (5, 128)


# The model


def nano(**changes):
    torch.manual_seed(0)
    return DeepSeekV3(ModelConfig.preset("nano", **{"num_hidden_layers": 2, "initializer_range": 0.05, **changes}))


def test_switch_changes_projections_and_experts_only():
    model, plain = to_fp8(nano(), tile=64), nano()
    switched = {name for name, m in model.named_modules() if isinstance(m, (FP8Linear, FP8Experts))}
    linear = {name for name, m in plain.named_modules() if isinstance(m, nn.Linear)}
    kept = {name.rpartition(".")[2] for name in linear - switched}  # the head is listed by its first name only
    assert kept == {"eh_proj", "head"}
    assert {"model.layers.1.mlp.experts", "model.layers.0.mlp.up_proj"} < switched
    assert model.state_dict().keys() == plain.state_dict().keys()
    formats = {name.rpartition(".")[2]: m.cache_format for name, m in model.named_modules() if type(m) is FP8Linear}
    assert [name for name, fmt in formats.items() if fmt == "e5m6"] == ["o_proj"]


def test_switch_keeps_the_parameters_themselves():
    model = nano()
    before = {name: id(p) for name, p in model.named_parameters()}
    assert {name: id(p) for name, p in to_fp8(model).named_parameters()} == before


def test_switch_refuses_what_it_cannot_turn():
    with pytest.raises(ValueError, match="no projection"):
        to_fp8(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="up_proj has a bias"):
        to_fp8(nn.ModuleDict({"up_proj": nn.Linear(3, 3)}))


def test_fp8_experts_follow_the_routing_of_the_loop():
    torch.manual_seed(0)
    moe = MoE(ModelConfig.preset("nano", initializer_range=0.2, n_shared_experts=0))
    x = draw(23, 128)
    with record_routing(moe) as routings:
        plain = moe(x)
    experts = to_fp8(moe, 32).experts
    assert relative(experts(x, routings[0]), plain) < 0.12
    exact = experts_reference(x, routings[0], experts.gate_up_proj, experts.down_proj)
    assert relative(experts(x, routings[0]), exact) == pytest.approx(relative(experts(x, routings[0]), plain), rel=1e-3)


@pytest.mark.parametrize("n_tokens", [5, 1])
def test_fp8_experts_equal_each_expert_alone(n_tokens):
    """Sorted blocks, those of experts without tokens left out, against one expert after the other."""
    torch.manual_seed(0)
    moe = MoE(ModelConfig.preset("nano", initializer_range=0.2, n_shared_experts=0))
    x, experts = draw(n_tokens, 128), to_fp8(moe, 32).experts
    routing, out = moe.gate(x), torch.zeros(n_tokens, 128)
    for token in range(n_tokens):
        for i, g in zip(routing.indices[token].tolist(), routing.weights[token], strict=True):
            gate, up = experts.gate_up_proj[i].chunk(2)
            options = experts.down_proj[i], 32, "ue8m0", fp8_gemm
            out[token] += FP8FeedForward.apply(x[token, None], g.view(1, 1), gate, up, *options)[0]
    torch.testing.assert_close(experts(x, routing), out, rtol=1e-5, atol=1e-6)
    assert len(routing.indices.unique()) < 16


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_experts_without_tokens_get_gradient_zero(n_tokens):
    moe = to_fp8(MoE(ModelConfig.preset("nano", initializer_range=0.2)), 32)
    moe(draw(n_tokens, 128)).sum().backward()
    busy = moe.experts.down_proj.grad.flatten(1).any(1).sum()
    assert busy == 4 * n_tokens and moe.experts.gate_up_proj.grad.shape == (16, 128, 128)


def test_one_argument_replaces_the_products_of_a_model():
    calls = []
    model = to_fp8(nano(num_nextn_predict_layers=0), 64, gemm=lambda *a: calls.append(a) or fp8_gemm(*a))
    model(torch.arange(60).view(2, 30)).square().mean().backward()
    experts = sum((m.down_proj.grad.flatten(1).any(1)).sum().item() for m in model.modules() if type(m) is FP8Experts)
    attention, feed_forward = 2 * 5 * 3, 3 + 3 + 3  # fprop, dgrad and wgrad of each product
    assert len(calls) == attention + feed_forward * (2 + experts)  # one dense layer, one shared expert


def test_switched_model_trains_every_parameter():
    model = to_fp8(nano(num_nextn_predict_layers=0), 64)
    model(torch.arange(60).view(2, 30)).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_switched_model_is_near_the_plain_one():
    ids = torch.arange(40).view(2, 20)
    plain = nano(first_k_dense_replace=2)
    with torch.no_grad():
        exact = plain(ids)
        assert 0.005 < relative(to_fp8(plain, 64)(ids), exact) < 0.2


# Training


def test_adamw16_in_float32_is_torchs_adamw():
    models = [nn.Linear(5, 7) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = AdamW16(models[0].parameters(), lr=1e-2, weight_decay=0.3)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.3)
    for step in range(5):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(draw(3, 5, seed=step)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_bfloat16_weights_stall_and_bfloat16_moments_do_not():
    moved = {}
    for name, types in {"moments": dict(moments=torch.bfloat16), "master": dict(master=torch.bfloat16)}.items():
        p = nn.Parameter(torch.ones(64))
        optimizer = AdamW16([p], lr=1e-3, **types)
        for _ in range(50):
            p.grad = torch.ones(64)
            optimizer.step()
        moved[name] = (1 - p).mean().item()
    assert moved["moments"] == pytest.approx(0.05, rel=0.02) and moved["master"] == 0


def test_variants_start_from_the_same_weights():
    plain, fp8, nudged = (build_model(variant, 1).state_dict() for variant in ("fp32", "fp8", "nudged"))
    for name, weight in plain.items():
        assert torch.equal(weight, fp8[name])
        torch.testing.assert_close(weight, nudged[name], rtol=2e-6, atol=0)
    assert not torch.equal(plain["lm_head.weight"], nudged["lm_head.weight"])
    with pytest.raises(ValueError, match="unknown variant 'fp4'"):
        build_model("fp4", 0)


def test_a_short_run_logs_every_loss():
    run = precision_run("fp8", seed=0, steps=3)
    assert len(run["losses"]) == run["steps"] == 3 and run["losses"][0] == pytest.approx(4.16, abs=0.05)


def test_log_holds_every_variant_and_seed_of_this_model():
    runs = json.loads((Path(__file__).parents[1] / "assets/runs/fp8.json").read_text())["runs"]
    variants = ("fp32", "nudged", "bf16", "fp8")
    assert [(run["seed"], run["variant"]) for run in runs] == list(product(range(3), variants))
    config = json.loads(json.dumps(build_model("fp32", 0).config.to_dict()))
    assert all(run["config"] == config and len(run["losses"]) == run["steps"] == 200 for run in runs)
