"""The Triton kernels in the interpreter, against their torch twins and references of other making."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini import fp8, moe
from dsv3_mini.config import ModelConfig
from dsv3_mini.kernels import compile_for, grouped, layers
from dsv3_mini.kernels.activation import swiglu_quant
from dsv3_mini.kernels.gemm import Tiling, fp8_gemm
from dsv3_mini.kernels.grouped import grouped_fp8_gemm, grouped_fp8_wgrad, grouped_gemm, grouped_linear, start_tiles
from dsv3_mini.kernels.interpreter import interpreter, launch, tl, triton
from dsv3_mini.kernels.layers import KernelExperts, KernelFP8Experts, KernelLinear, KernelSwiGLU, turned, use_kernels
from dsv3_mini.kernels.quantise import act_quant, weight_dequant, weight_quant
from dsv3_mini.precision import round_to_format

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated holds NaN: a number that a kernel forgets to write shows."""
    real = torch.empty

    def empty(*args, **kwargs):
        x = real(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() and x.device.type == "cpu" else x

    monkeypatch.setattr(torch, "empty", empty)


def draw(*shape, spread=0.0):
    """Fresh normal numbers, each times a log-normal factor."""
    return torch.randn(shape) * torch.exp(spread * torch.randn(shape))


def awkward(*shape):
    """A tile of zeros, an outlier, numbers deep among the subnormals, signed zeros."""
    x = draw(*shape, spread=3).clamp(-6e4, 6e4)
    x[1, :128], x[2, 5], x[3], x[4, ::2] = 0, 6e4, x[3] * 1e-9, -0.0
    return x


def same_bits(a, b):
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) and x.dtype == y.dtype for x, y in zip(a, b, strict=True)
    )


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# The interpreter


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + i, tl.dot(tl.load(a + i), tl.load(b + i)))


def stock(kernel, *args, **meta):
    """Triton's interpreter as it comes."""
    interpreter.InterpretedFunction(kernel.fn)[(1,)](*args, **meta)


@pytest.mark.parametrize("dtype, wrong", [(torch.float8_e4m3fn, 64.0), (torch.bfloat16, 127.5)])
def test_upstream_casts_are_still_wrong(dtype, wrong):
    """Goes red when Triton mends its interpreter; then MendedBuilder can shrink."""
    x, y = torch.tensor([127.9, 1.0]), torch.zeros(2, dtype=dtype)
    stock(cast_kernel, x, y, N=2)
    assert y.tolist() == [wrong, 1.0] and x.to(dtype).tolist() == [128.0, 1.0]


def test_upstream_product_of_bfloat16_still_multiplies_bit_patterns():
    """Goes red when Triton mends its interpreter; then MendedBuilder can shrink."""
    a, c = torch.ones(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16)
    stock(dot_kernel, a, a, c, N=16)
    assert c[0, 0] == 16 * float(a.view(torch.uint16)[0, 0]) ** 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_casts_are_torchs(dtype):
    x, y = draw(1024, spread=5).clamp(-400, 400), torch.empty(1024, dtype=dtype)
    launch(cast_kernel, (1,), x, y, N=1024)
    back = torch.empty(1024)
    launch(cast_kernel, (1,), y, back, N=1024)
    assert same_bits([y], [x.to(dtype)]) and torch.equal(back, y.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_numbers(dtype):
    a, b, c = draw(32, 32).to(dtype), draw(32, 32).to(dtype), torch.empty(32, 32)
    launch(dot_kernel, (1,), a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_interpreting_leaves_the_language_as_it_was():
    places = (tl, tl.core, tl.tensor, triton.runtime.jit.JITFunction, type(interpreter.interpreter_builder))
    patch = interpreter._patch_lang_tensor
    before = [{name: getattr(place, name, None) for name in dir(place)} for place in places]
    act_quant(draw(3, 40))
    with pytest.raises(interpreter.InterpreterError):
        launch(dot_kernel, (1,), draw(4), draw(4), draw(4), N="four")
    after = [{name: getattr(place, name, None) for name in dir(place)} for place in places]
    assert all(old.items() <= new.items() for old, new in zip(before, after, strict=True))
    assert type(interpreter.interpreter_builder) is interpreter.InterpreterBuilder
    assert interpreter._patch_lang_tensor is patch


def test_a_compiled_kernel_refuses_cpu_memory():
    with pytest.raises(ValueError, match=r"act_quant_kernel cannot read CPU memory: \(3, 40\) on cpu"):
        act_quant(draw(3, 40), interpret=False)
    with pytest.raises(ValueError, match=r"one device: \(2,\) on cpu, \(2,\) on meta"):
        launch(cast_kernel, (1,), draw(2), torch.zeros(2, device="meta"), N=2)


def forget_kernels(monkeypatch):
    """For one test, import the kernels anew."""
    for name in [name for name in sys.modules if name.startswith("dsv3_mini.kernels.")]:
        monkeypatch.delitem(sys.modules, name)


def test_kernels_run_under_triton_interpret_too(monkeypatch):
    forget_kernels(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gemm, operands = (
        import_module("dsv3_mini.kernels.gemm"),
        (*act_quant(draw(5, 64), 32), *weight_quant(draw(7, 64), 32)),
    )
    assert isinstance(gemm.fp8_gemm_kernel, interpreter.InterpretedFunction)
    torch.testing.assert_close(gemm.fp8_gemm(*operands, 32), fp8.fp8_gemm(*operands, 32))
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set"):
        compile_for(90)


@pytest.mark.parametrize("module", ["interpreter", "gemm", "layers"])
def test_without_triton_a_kernel_says_what_is_missing(monkeypatch, module):
    forget_kernels(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    for use in (lambda: compile_for(90), lambda: import_module(f"dsv3_mini.kernels.{module}")):
        with pytest.raises(
            ModuleNotFoundError, match="Triton has no wheel for this platform .* the rest of dsv3_mini does not"
        ):
            use()


def test_the_rest_of_the_package_does_not_import_triton():
    imports = r"^(from|import) (triton|dsv3_mini\.kernels)"
    modules = [path for path in (ROOT / "dsv3_mini").glob("*.py")] + [ROOT / "dsv3_mini/kernels/__init__.py"]
    assert not [path.name for path in modules if re.search(imports, path.read_text(), re.M)]


# Quantisation


@pytest.mark.parametrize("fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_equal_the_twin_bit_for_bit(dtype, fmt):
    for tile, x in ((128, awkward(37, 333)), (32, awkward(5, 200)), (64, draw(7, 1))):
        assert same_bits(act_quant(x.to(dtype), tile, fmt), fp8.act_quant(x.to(dtype), tile, fmt))


def test_tiles_equal_a_reference_that_rounds_by_arithmetic():
    x = awkward(6, 300)
    q, scale = act_quant(x)
    expected, expected_scale = fp8.act_quant_reference(x)
    assert torch.equal(q.float(), expected) and torch.equal(scale, expected_scale)


def test_power_of_two_scales_are_the_next_one_up():
    x = awkward(6, 128)
    x[0, 0], x[0, 1:] = 448 * 2.0**-5, 0  # exactly a power of two: nothing to round up
    q, scale = act_quant(x, scale_fmt="ue8m0")
    amax = x.abs().amax(1, keepdim=True).clamp(min=1e-4).double()
    powers = torch.arange(-60.0, 60.0, dtype=torch.float64).exp2()
    expected = powers[(powers < (amax / 448)).sum(1)][:, None].float()
    assert torch.equal(scale, expected) and scale[0] == 2.0**-5
    assert torch.equal(q.float(), round_to_format(x / expected, 4, 3, infinity=False))


def test_any_strides_and_leading_dimensions():
    x = draw(3, 50, 70)
    views = (x, x[0].T, x[1, ::3, 5:], x[:, :, 0], x[0, 0], x[0, :1].expand(4, -1))
    for view in views:
        assert same_bits(act_quant(view, 64), fp8.act_quant(view, 64))
    assert same_bits(weight_quant(x.transpose(1, 2), 32), fp8.weight_quant(x.transpose(1, 2), 32))


@pytest.mark.parametrize("fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_equal_the_twin_bit_for_bit(dtype, fmt):
    for block, w in ((128, awkward(200, 130)), (32, torch.stack([awkward(33, 50), awkward(33, 50)]))):
        assert same_bits(weight_quant(w.to(dtype), block, fmt), fp8.weight_quant(w.to(dtype), block, fmt))


def test_the_stored_scale_is_a_factor():
    w = draw(2, 150, 90)
    stored = fp8.weight_quant(w)
    assert same_bits([weight_dequant(*stored)], [fp8.weight_dequant(*stored, dtype=torch.bfloat16)])
    assert relative(weight_dequant(*weight_quant(w), dtype=torch.float32), w) < 0.03


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 100), st.floats(0, 6), st.integers(0, 2**31))
def test_error_of_a_tile_is_bounded_by_the_format(m, k, spread, seed):
    torch.manual_seed(seed)
    x = draw(m, k, spread=spread)
    q, scale = act_quant(x, 32)
    error = (fp8.act_dequant(q, scale, 32) - x).abs()
    step = scale.repeat_interleave(32, 1)[:, :k] * 2.0**-9
    assert (error <= torch.maximum(x.abs() * 2.0**-4, step / 2) * 1.001).all()


def test_nan_stays_in_its_place():
    x = draw(2, 64)
    x[1, 40] = torch.nan
    q, scale = act_quant(x, 32)
    assert q.float().isnan().nonzero().tolist() == [[1, 40]] and scale.isfinite().all()


def test_empty_tensors_pass():
    q, scale = act_quant(torch.zeros(0, 128))
    assert q.shape == (0, 128) and scale.shape == (0, 1)
    assert [x.shape for x in act_quant(torch.zeros(4, 0))] == [(4, 0), (4, 0)]
    assert [x.shape for x in weight_quant(torch.zeros(0, 40, 40))] == [(0, 40, 40), (0, 1, 1)]
    assert swiglu_quant(torch.zeros(0, 64))[0].shape == (0, 32)
    operands = *act_quant(torch.zeros(4, 0)), *weight_quant(torch.zeros(5, 0))
    assert torch.equal(fp8_gemm(*operands), torch.zeros(4, 5))
    assert fp8_gemm(*act_quant(torch.zeros(0, 32)), *weight_quant(draw(5, 32))).shape == (0, 5)
    nobody = torch.zeros(3, dtype=torch.int32)
    assert grouped_gemm(torch.zeros(0, 32).half(), draw(3, 24, 32).half(), nobody).shape == (0, 24)


@pytest.mark.parametrize("n, f, tile, fmt", [(1, 32, 32, None), (19, 200, 128, "ue8m0"), (33, 72, 64, None)])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_and_quantisation_in_one_pass(n, f, tile, fmt, weighted):
    gate_up, weights = draw(n, 2 * f, spread=1).bfloat16(), torch.rand(n, 1) if weighted else None
    expected, expected_scale = fp8.act_quant(fp8.swiglu(*gate_up.float().chunk(2, -1), weights), tile, fmt)
    q, scale = swiglu_quant(gate_up, weights, tile, fmt)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert (q.float() != expected.float()).float().mean() < 0.01  # where exp differs in its last bit, at a tie
    assert relative(fp8.act_dequant(q, scale, tile), fp8.act_dequant(expected, expected_scale, tile)) < 1e-3


# Products

SIZES = [(5, 3, 7, 32), (70, 130, 300, 128), (130, 50, 260, 64), (1, 200, 128, 32), (33, 1, 64, 32)]


@pytest.mark.parametrize("m, n, k, tile", SIZES)
def test_fp8_product_equals_the_twin(m, n, k, tile):
    a, b = act_quant(draw(m, k, spread=1), tile), weight_quant(draw(n, k, spread=1), tile)
    torch.testing.assert_close(fp8_gemm(*a, *b, tile), fp8.fp8_gemm(*a, *b, tile), rtol=1e-5, atol=1e-4)
    assert relative(fp8_gemm(*a, *b, tile, torch.bfloat16), fp8.fp8_gemm(*a, *b, tile)) < 4e-3


@pytest.mark.parametrize("m, n, k, tile", SIZES)
def test_weight_gradient_form_has_a_scale_for_each_row_of_b(m, n, k, tile):
    a, b = act_quant(draw(k, m, spread=1).T, tile), act_quant(draw(k, n, spread=1).T, tile)
    out = fp8_gemm(*a, *b, tile)
    torch.testing.assert_close(out, fp8.fp8_gemm(*a, *b, tile), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fp8_gemm(*a, *b, tile, tiling=Tiling(32, 64, 4, 2)), out, rtol=1e-5, atol=1e-4)


def test_scales_enter_at_each_promotion():
    a, b = draw(9, 128), draw(6, 128)
    a[:, :32] *= 1000  # the first tile's scale is far from the others', so one scale at the end is wrong
    operands = *act_quant(a, 32), *weight_quant(b, 32)
    assert relative(fp8_gemm(*operands, 32), a @ b.T) < 0.06
    assert (
        same_bits([fp8_gemm(*operands, 32)], [fp8.fp8_gemm(*operands, 32)])
        or relative(fp8_gemm(*operands, 32), fp8.fp8_gemm(*operands, 32)) < 1e-6
    )


def test_turned_weights_serve_the_input_gradient():
    grad, w = act_quant(draw(11, 72), 32), weight_quant(draw(72, 40), 32)
    expected = fp8.fp8_gemm(*grad, w[0].T, w[1].T, 32)
    torch.testing.assert_close(fp8_gemm(*grad, *turned(*w), 32), expected, rtol=1e-5, atol=1e-5)


LOADS = torch.tensor([5, 0, 70, 0, 1, 33, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouped_product_and_its_gradients_with_empty_experts(dtype):
    x, w = draw(109, 40).to(dtype).requires_grad_(), draw(7, 24, 40).to(dtype).requires_grad_()
    ends, grad = LOADS.cumsum(0).int(), draw(109, 24).to(dtype)
    y, expected = grouped_linear(x, w, ends), moe.grouped_linear(x, w, ends)
    assert relative(y, expected) < 3e-3
    ours, theirs = (torch.autograd.grad(out, (x, w), grad) for out in (y, expected))
    assert relative(ours[0], theirs[0]) < 3e-3 and relative(ours[1], theirs[1]) < 1e-6


def test_grouped_fp8_product_equals_one_product_an_expert():
    a, b, ends = act_quant(draw(109, 72), 32), weight_quant(draw(7, 50, 72), 32), LOADS.cumsum(0).int()
    out = grouped_fp8_gemm(*a, *b, ends, 32, torch.float32)
    for i, (end, load) in enumerate(zip(ends.tolist(), LOADS.tolist(), strict=True)):
        rows = slice(end - load, end)
        expected = fp8.fp8_gemm(a[0][rows], a[1][rows], b[0][i], b[1][i], 32)
        torch.testing.assert_close(out[rows], expected, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.sampled_from([32, 128]))
def test_rows_move_apart_until_each_segment_starts_a_tile(loads, tile):
    ends = torch.tensor(loads).cumsum(0).int()
    places, tile_ends = start_tiles(ends, sum(loads), tile)
    starts, first = 0, 0
    for load, tile_end in zip(loads, tile_ends.tolist(), strict=True):
        assert places[starts : starts + load].tolist() == list(range(first * tile, first * tile + load))
        assert tile_end == first + -(-load // tile)
        starts, first = starts + load, tile_end
    assert first <= sum(loads) // tile + len(loads)


@pytest.mark.parametrize("loads", [LOADS.tolist(), [0, 0], [64], [1, 130]])
@pytest.mark.parametrize("fmt", [None, "ue8m0"])
def test_weight_gradients_of_all_experts_in_one_launch_have_the_bits_of_single_ones(loads, fmt):
    ends = torch.tensor(loads).cumsum(0).int()
    grad, x = draw(sum(loads), 40, spread=2).bfloat16(), draw(sum(loads), 72, spread=2)
    together = layers.segment_gradients(grad, x, ends, 64, fmt)
    assert torch.equal(together, layers.segment_gradients_reference(grad, x, ends, 64, fmt, None))
    expected = [fp8.wgrad(g, t, 64, fmt, fp8.fp8_gemm) for g, t in zip(grad.split(loads), x.split(loads), strict=True)]
    assert (together - torch.stack(expected)).norm() <= 1e-6 * torch.stack(expected).norm()  # sums in another order


def test_wrong_ends_are_refused_on_a_cpu_and_reach_no_other_memory_anywhere(monkeypatch):
    a, b, tall = act_quant(draw(9, 64), 32), weight_quant(draw(2, 24, 64), 32), act_quant(draw(40, 64), 32)
    calls = {9: lambda ends: grouped_fp8_gemm(*a, *b, ends, 32), 2: lambda ends: grouped_fp8_wgrad(*a, *tall, ends, 32)}
    wrong, falling = torch.tensor([1, 99], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32)
    for last, call in calls.items():
        for ends in (wrong, falling, -wrong):
            with pytest.raises(ValueError, match=f"ends .* must rise, from 0 or more to {last} or less"):
                call(ends)
    expected = [call(torch.tensor([1, last], dtype=torch.int32)) for last, call in calls.items()]
    monkeypatch.setattr(grouped, "check_ends", lambda *args: None)  # on a GPU the ends cannot be looked at
    assert same_bits([call(wrong) for call in calls.values()], expected)
    for call in calls.values():
        assert call(falling)[0].isfinite().all() and call(-wrong).shape[1:]


# Layers


def gradients(layer, x, grad):
    inputs = [x, *layer.parameters()]
    y = layer(x)
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("options", [{}, {"scale_fmt": "ue8m0", "cache_format": "e5m6"}])
def test_linear_layer_with_kernels_equals_the_twin(options):
    layer, x, grad = fp8.FP8Linear(72, 40, 32, **options), draw(2, 9, 72).requires_grad_(), draw(2, 9, 40)
    expected = gradients(layer, x, grad)
    ours = gradients(use_kernels(layer, interpret=True), x, grad)
    assert type(layer) is KernelLinear and max(map(relative, ours, expected)) < 1e-6


def small_moe():
    options = dict(hidden_size=64, moe_intermediate_size=32, n_routed_experts=8, n_group=2, topk_group=2)
    layer = moe.MoE(ModelConfig.preset("nano", num_experts_per_tok=3, **options))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer


@pytest.mark.parametrize("tile", [32, 64])  # the expert is 32 wide: a whole tile, and half of one
def test_fp8_experts_with_kernels_equal_the_twin(tile):
    layer, x, grad = fp8.to_fp8(small_moe(), tile), draw(5, 64).requires_grad_(), draw(5, 64)
    expected = gradients(layer, x, grad)
    ours = gradients(use_kernels(layer, interpret=True), x, grad)
    assert type(layer.experts) is KernelFP8Experts and type(layer.shared_experts) is KernelSwiGLU
    assert max(map(relative, ours[:2] + ours[-5:], expected[:2] + expected[-5:])) < 1e-5


def test_bfloat16_experts_with_kernels_equal_the_twin():
    layer, x, grad = small_moe().bfloat16(), draw(5, 64).bfloat16().requires_grad_(), draw(5, 64).bfloat16()
    expected = gradients(layer, x, grad)
    ours = gradients(use_kernels(layer, interpret=True), x, grad)
    assert type(layer.experts) is KernelExperts and max(map(relative, ours, expected)) < 1e-2


def test_results_do_not_depend_on_the_default_dtype():
    """DeepSeek's own demo sets it to bfloat16; scales are float32 all the same."""
    gate_up, w = draw(5, 128), draw(24, 64)

    def run():
        a, b = swiglu_quant(gate_up, tile=32), weight_quant(w, 32)
        return *a, *b, *act_quant(gate_up, 32), fp8_gemm(*a, *b, 32)

    expected = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert same_bits(run(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_on_a_cpu_the_twins_stay(monkeypatch):
    layer, x, grad = fp8.to_fp8(small_moe(), 32), draw(5, 64).requires_grad_(), draw(5, 64)
    expected = gradients(layer, x, grad)
    monkeypatch.setattr(layers, "act_quant", None)
    assert same_bits(gradients(use_kernels(layer), x, grad), expected)


def test_switching_refuses_what_has_nothing_to_switch():
    with pytest.raises(ValueError, match="Linear has neither FP8 layers nor experts"):
        use_kernels(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="tile=48"):
        use_kernels(fp8.FP8Linear(96, 96, tile=48))


# Refusals

A, SA = fp8.act_quant(torch.ones(4, 64), 32)
B, SB = fp8.weight_quant(torch.ones(6, 64), 32)
ENDS = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: act_quant(torch.ones(4, dtype=torch.int32)), r"x is \(4,\) of torch.int32; floats"),
        (lambda: act_quant(torch.ones(4, 4), tile=100), "tile=100.* 32, 64 or 128"),
        (lambda: act_quant(torch.ones(4, 4), scale_fmt="e8"), "scale_fmt='e8'"),
        (lambda: weight_quant(torch.ones(4)), r"w is \(4,\) of torch.float32; floats of two"),
        (lambda: weight_dequant(B, SB, 128), r"scale is \(1, 2\) .*; \(1, 1\) of float32 needed"),
        (lambda: weight_dequant(B.float(), SB, 32), r"q is \(6, 64\) torch.float32"),
        (lambda: swiglu_quant(torch.ones(4, 8), torch.ones(4)), r"weights are \(4,\); one a row, \(4, 1\)"),
        (lambda: swiglu_quant(torch.ones(4, 7)), r"gate_up is \(4, 7\).* \(N, 2F\)"),
        (lambda: swiglu_quant(torch.ones(8, 4).T), r"gate_up \(4, 8\) has strides \(1, 4\)"),
        (lambda: fp8_gemm(A.float(), SA, B, SB, 32), r"a is \(4, 64\) of torch.float32; .* float8_e4m3fn needed"),
        (lambda: fp8_gemm(A, SA, B[:, :32], SB, 32), r"b is \(6, 32\) .*; \(any, 64\) of float8_e4m3fn needed"),
        (lambda: fp8_gemm(A, SA.T, B, SB, 32), r"a_scale is \(2, 4\) .*; \(4, 2\) of float32 needed"),
        (lambda: fp8_gemm(A, SA, B, SB[:, :1], 32), r"b_scale is \(1, 1\) .*; \(1, 2\)"),
        (lambda: fp8_gemm(A, SA.double(), B, SB, 32), "a_scale is .*float64; .* of float32"),
        (lambda: fp8_gemm(B.T, SA, B.T, SB, 32), r"a \(64, 6\) has strides \(1, 64\): the last dimension must be"),
        (lambda: fp8_gemm(*fp8.act_quant(torch.ones(2, 100)), B, SB), r"a \(2, 100\) has strides .* multiple of 16"),
        (lambda: grouped_gemm(torch.ones(4, 8), torch.ones(2, 8, 8), ENDS), r"x is \(4, 8\) of .*; bfloat16 or"),
        (lambda: grouped_gemm(A.half(), torch.ones(2, 8, 64).half(), ENDS.long()), "ends is .*int64; .* of int32"),
        (lambda: grouped_fp8_wgrad(A, SA, B, SA, ENDS, 32), r"b_scale is \(4, 2\) .*; \(6, 2\) of float32"),
        (lambda: grouped_fp8_wgrad(A, SA, B, B, ENDS.long(), 32), "b_scale is .*float8_e4m3fn"),
        (lambda: grouped_fp8_wgrad(A, SA, A, SA, ENDS.long(), 32), "tile_ends is .*int64; .* of int32"),
        (lambda: grouped_fp8_gemm(A, SA, B[None], SB, ENDS[:1], 32), r"weight_scale is \(1, 2\).*; \(1, 1, 2\)"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
