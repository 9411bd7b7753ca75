"""Expert routing: equal to transformers' own and to a loop, exact about who is chosen, and its traps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from dsv3_mini.baseline import LanguageModel
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import SwiGLU
from dsv3_mini.moe import (
    Experts,
    Gate,
    MoE,
    Routing,
    experts_reference,
    group_limited_topk,
    grouped_linear,
    moe_feed_forward,
    pad_blocks,
    record_routing,
    sort_by_expert,
    visit_experts,
)

EXACT = dict(rtol=1e-10, atol=1e-10)
CONFIGS = {
    "groups": dict(),
    "no groups": dict(n_group=1, topk_group=1),
    "one group kept": dict(n_group=3, topk_group=1, num_experts_per_tok=3),
    "all groups kept": dict(n_group=5, topk_group=5, num_experts_per_tok=5),
    "unnormalised": dict(norm_topk_prob=False, routed_scaling_factor=1.3),
    "two shared experts": dict(n_shared_experts=2),
    "every expert": dict(num_experts_per_tok=15, n_group=1, topk_group=1),
    "aligned widths": dict(hidden_size=48, moe_intermediate_size=16),
}
V2 = dict(scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=16.0)


def odd_config(**changes):
    odd = dict(hidden_size=45, moe_intermediate_size=7, n_routed_experts=15, n_group=5, topk_group=2)
    return ModelConfig.preset("nano", **{**odd, "num_experts_per_tok": 4, "initializer_range": 0.3, **changes})


def layer_and_input(dtype=torch.float64, n_tokens=26, **changes):
    """A layer whose biases have both signs, and n_tokens inputs that want a gradient."""
    torch.manual_seed(0)
    config = odd_config(**changes)
    layer = MoE(config).to(dtype)
    if config.topk_method == "noaux_tc":
        layer.gate.e_score_correction_bias.uniform_(-0.7, 0.3)
    return layer, torch.randn(n_tokens, config.hidden_size, dtype=dtype, requires_grad=True)


def gradients(layer, x, out):
    return torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])


def weights_of(experts):
    return experts.gate_up_proj, experts.down_proj


def transformers_moe(layer):
    config = DeepseekV3Config.from_dict({**layer.gate.config.to_dict(), "torch_dtype": "float32"})
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config)
    theirs.load_state_dict(layer.state_dict())
    return theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_equals_transformers_in_outputs_and_gradients(name):
    layer, x = layer_and_input(torch.float32, **CONFIGS[name])
    theirs = transformers_moe(layer)
    out, expected = layer(x), theirs(x.unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    leaves = [x, *(theirs.get_parameter(name) for name, _ in layer.named_parameters())]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(gradients(layer, x, out), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_gate_equals_the_router_of_v2(method):
    layer, x = layer_and_input(torch.float32, topk_method=method, **V2)
    options = {
        k: v for k, v in layer.gate.config.to_dict().items() if k.startswith(("n_", "num_experts", "topk", "routed"))
    }
    theirs = DeepseekV2TopkRouter(DeepseekV2Config(hidden_size=45, num_attention_heads=5, **options))
    theirs.load_state_dict(layer.gate.state_dict())
    _, weights, indices = theirs(x)
    ours = layer.gate(x)
    order, other = ours.indices.argsort(), indices.argsort()
    assert torch.equal(ours.indices.gather(1, order), indices.gather(1, other))
    torch.testing.assert_close(ours.weights.gather(1, order), weights.gather(1, other))
    assert not hasattr(layer.gate, "e_score_correction_bias")


@pytest.mark.parametrize("name", CONFIGS)
def test_sorted_and_visiting_forms_equal_the_loop_in_outputs_and_gradients(name):
    layer, x = layer_and_input(**CONFIGS[name])
    routing, shared = layer.gate(x), layer.shared_experts(x)
    expected = experts_reference(x, routing, *weights_of(layer.experts))
    wanted = gradients(layer, x, expected + shared)
    for form in (layer.experts, lambda x, r: visit_experts(x, r, *weights_of(layer.experts))):
        routing = layer.gate(x)
        out = form(x, routing)
        torch.testing.assert_close(out, expected, **EXACT)
        torch.testing.assert_close(gradients(layer, x, out + layer.shared_experts(x)), wanted, **EXACT)


def test_gate_weights_have_the_gradient_of_finite_differences():
    layer, x = layer_and_input(n_tokens=3)
    assert torch.autograd.gradcheck(lambda x: layer.gate(x).weights, x)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("n_tokens, visited", [(1, True), (2, True), (3, False)])
def test_few_tokens_take_the_short_way_to_the_same_result(n_tokens, visited, monkeypatch):
    layer, x = layer_and_input(n_tokens=n_tokens, n_routed_experts=40)
    calls = []
    monkeypatch.setattr("dsv3_mini.moe.visit_experts", lambda *a: calls.append(1) or visit_experts(*a))
    routing = layer.gate(x)
    out = layer.experts(x, routing)
    assert bool(calls) == visited
    torch.testing.assert_close(out, experts_reference(x, routing, *weights_of(layer.experts)), **EXACT)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_token_gets_k_distinct_experts_in_the_kept_groups(data):
    n_group, size = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 7))
    topk_group = data.draw(st.integers(1, n_group))
    top_k = data.draw(st.integers(1, topk_group * size))
    scores = torch.randn(9, n_group * size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 10**6))))
    indices = group_limited_topk(scores, top_k, n_group, topk_group)
    assert indices.shape == (9, top_k)
    for chosen in indices.tolist():
        assert len(set(chosen)) == top_k and len({i // size for i in chosen}) <= topk_group


@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (3, 2)])
def test_the_choice_takes_any_leading_shape(n_group, topk_group):
    scores = torch.rand(2, 5, 12, generator=torch.Generator().manual_seed(0))
    flat = group_limited_topk(scores.flatten(0, 1), 3, n_group, topk_group)
    assert torch.equal(group_limited_topk(scores, 3, n_group, topk_group), flat.view(2, 5, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_sorting_drops_nothing_and_ends_count_the_choices(n_tokens, top_k, spare, seed):
    n_experts, generator = top_k + spare, torch.Generator().manual_seed(seed)
    indices = torch.rand(n_tokens, n_experts, generator=generator).argsort(1)[:, :top_k]
    order, ends = sort_by_expert(indices, n_experts)
    assert order.sort().values.tolist() == list(range(n_tokens * top_k)) and ends.dtype == torch.int32
    for i, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        assert (indices.flatten()[order[start:end]] == i).all()
    assert ends[-1] == n_tokens * top_k


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 4), st.sampled_from([1, 3, 8]), st.integers(0, 10**6))
def test_padded_blocks_hold_every_choice_once_in_its_experts_block(n_tokens, top_k, multiple, seed):
    indices = torch.rand(n_tokens, 6, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :top_k]
    choice, row, ends = pad_blocks(*sort_by_expert(indices, 6), multiple)
    sizes = ends.diff(prepend=torch.zeros(1, dtype=torch.int32))
    wanted = -(-torch.bincount(indices.flatten(), minlength=6) // multiple) * multiple
    assert sizes.tolist() == wanted.tolist() and len(choice) == wanted.sum()
    assert choice[row].tolist() == list(range(n_tokens * top_k))
    assert torch.equal(torch.arange(6).repeat_interleave(sizes)[row], indices.flatten())


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_experts_equal_the_loop_with_gradients(autocast):
    layer, x = layer_and_input(torch.float32, hidden_size=48, moe_intermediate_size=16, n_tokens=37)
    wide = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, *weights_of(layer.experts))]
    kind = torch.float32 if autocast else torch.bfloat16
    narrow = [tensor.detach().to(kind).requires_grad_() for tensor in wide]
    routing, experts = layer.gate(narrow[0].detach().float()), layer.experts
    routing = routing._replace(weights=routing.weights.to(kind))
    experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(tensor) for tensor in narrow[1:])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = experts(narrow[0], routing)
    expected = experts_reference(wide[0], routing._replace(weights=routing.weights.double()), *wide[1:])
    slow = [expected, *torch.autograd.grad(expected.sum(), wide)]
    fast = [out, *torch.autograd.grad(out.sum(), [narrow[0], experts.gate_up_proj, experts.down_proj])]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-2 * b.abs().max().item())
    assert out.dtype == torch.bfloat16


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6))
def test_a_token_does_not_notice_its_neighbours(n_tokens, seed):
    """Permuted tokens give permuted outputs, and each alone gives what it gave in company."""
    layer, _ = layer_and_input(n_tokens=1)
    generator = torch.Generator().manual_seed(seed)
    x, order = torch.randn(n_tokens, 45, generator=generator).double(), torch.randperm(n_tokens, generator=generator)
    with torch.no_grad():
        out = layer(x)
        torch.testing.assert_close(layer(x[order]), out[order], **EXACT)
        torch.testing.assert_close(torch.cat([layer(row) for row in x.split(1)]), out, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_experts_cost_nothing_and_get_a_zero_gradient(dtype):
    layer, x = layer_and_input(dtype, hidden_size=48, moe_intermediate_size=16)
    layer.gate.e_score_correction_bias[:] = torch.tensor([9.0] * 4 + [0.0] * 11)  # needs two groups of three
    routing = layer.gate(x)
    assert set(routing.indices.flatten().tolist()) == {0, 1, 2, 3}
    out = layer.experts(x, routing)
    torch.testing.assert_close(out, experts_reference(x, routing, *weights_of(layer.experts)))
    out.sum().backward()
    used = [bool(grad.any()) for grad in layer.experts.down_proj.grad]
    assert used == [True] * 4 + [False] * 11


def test_grouped_linear_multiplies_each_block_by_its_matrix_whatever_the_widths():
    for d_in, d_out, dtype in ((48, 16, torch.float32), (45, 7, torch.float32), (5, 3, torch.float64)):
        x, weight = torch.randn(11, d_in).to(dtype), torch.randn(4, d_out, d_in).to(dtype)
        ends = torch.tensor([3, 3, 10, 11], dtype=torch.int32)
        expected = torch.cat([x[:3] @ weight[0].T, x[3:10] @ weight[2].T, x[10:] @ weight[3].T])
        torch.testing.assert_close(grouped_linear(x, weight, ends), expected)


@pytest.mark.parametrize("n_tokens", [1, 50])
@pytest.mark.parametrize("sizes", [dict(hidden_size=48, moe_intermediate_size=16), dict()])
def test_autocast_computes_in_bfloat16_and_leaves_gradients_in_float32(sizes, n_tokens):
    layer, x = layer_and_input(torch.float32, n_tokens, **sizes, n_routed_experts=20)
    exact = layer(x)
    wanted = gradients(layer, x, exact)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert ((out.float() - exact).norm() / exact.norm()) < 0.01
    for got, want in zip(gradients(layer, x, out.float()), wanted, strict=True):
        assert got.dtype == torch.float32 and (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("n_tokens", [1, 50])
@pytest.mark.parametrize("sizes", [dict(hidden_size=48, moe_intermediate_size=16), dict()])
def test_a_bfloat16_model_computes_in_bfloat16_near_the_float32_one(sizes, n_tokens):
    layer, x = layer_and_input(torch.float32, n_tokens, **sizes, n_routed_experts=20)
    layer.bfloat16().float()  # weights that bfloat16 can hold, so that only the arithmetic differs
    x = x.detach().bfloat16().float().requires_grad_()
    exact = layer(x)
    wanted = gradients(layer, x, exact)
    layer.bfloat16()
    short = x.detach().bfloat16().requires_grad_()
    out = layer(short)
    assert out.dtype == torch.bfloat16 and (out.float() - exact).norm() < 0.01 * exact.norm()
    for got, want in zip(gradients(layer, short, out), wanted, strict=True):
        assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.03 * want.norm()


def test_autocast_does_not_touch_a_float64_layer():
    layer, x = layer_and_input(hidden_size=48, moe_intermediate_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer.experts(x, layer.gate(x))
    torch.testing.assert_close(out, layer.experts(x, layer.gate(x)), **EXACT)


def test_gate_chooses_in_float32_under_autocast_and_for_a_bfloat16_input():
    layer, x = layer_and_input(torch.float32, n_tokens=3000)
    expected = layer.gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.gate(x)
    assert torch.equal(inside.indices, expected.indices) and torch.equal(inside.scores, expected.scores)
    rounded = x.detach().bfloat16()
    assert torch.equal(layer.gate(rounded).scores, layer.gate(rounded.float()).scores)
    assert layer.gate(rounded).weights.dtype == torch.bfloat16


def test_bias_keeps_every_bit_when_the_model_is_cast_or_moved():
    gate = Gate(odd_config())
    bias = gate.e_score_correction_bias.uniform_(2.0, 2.1).clone()
    for cast in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        gate.to(cast)
        assert gate.weight.dtype == cast and gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, bias)
    assert torch.equal(gate.state_dict()["e_score_correction_bias"], bias)
    with torch.device("meta"):
        empty = Gate(odd_config()).to(torch.bfloat16)
    assert empty.to_empty(device="cpu").e_score_correction_bias.dtype == torch.float32


def test_layer_takes_any_leading_shape_and_works_without_shared_experts():
    layer, x = layer_and_input(n_tokens=30)
    torch.testing.assert_close(layer(x.view(2, 3, 5, 45)), layer(x).view(2, 3, 5, 45), **EXACT)
    alone, x = layer_and_input(n_shared_experts=0)
    assert not hasattr(alone, "shared_experts")
    torch.testing.assert_close(alone(x), alone.experts(x, alone.gate(x)), **EXACT)


def test_dense_layers_come_first_and_prediction_layers_are_mixtures():
    config = odd_config(first_k_dense_replace=2, num_hidden_layers=3)
    kinds = [type(moe_feed_forward(config, layer_idx)) for layer_idx in range(5)]
    assert kinds == [SwiGLU, SwiGLU, MoE, MoE, MoE]
    assert moe_feed_forward(config, 0).up_proj.out_features == config.intermediate_size


# Recording


def small_model():
    torch.manual_seed(0)
    config = odd_config(hidden_size=48, num_hidden_layers=3, vocab_size=31)
    return LanguageModel(config, feed_forward=moe_feed_forward), torch.randint(31, (2, 7))


def test_records_come_in_the_order_of_the_layers():
    model, ids = small_model()
    model.model.layers[1].mlp.gate.e_score_correction_bias[:3] = 9.0  # layer 1 loves group 0, layer 2 group 4
    model.model.layers[2].mlp.gate.e_score_correction_bias[12:] = 9.0
    with record_routing(model) as records:
        model(ids)
    assert len(records) == 2 and all(r.indices.shape == (14, 4) and r.scores.shape == (14, 15) for r in records)
    assert all((row[..., :3].sort().values < 3).all() for row in [records[0].indices])
    assert (records[1].indices[:, :3] >= 12).all()


def test_recorders_nest_and_stop_when_closed():
    model, ids = small_model()
    with record_routing(model) as outer:
        model(ids)
        with record_routing(model) as inner:
            model(ids)
        model(ids)
    model(ids)
    assert (len(outer), len(inner)) == (6, 2)
    assert inner[0] is outer[2]


def test_a_recorder_is_taken_down_when_the_forward_pass_fails():
    model, ids = small_model()
    with pytest.raises(IndexError), record_routing(model) as records:
        model(ids + 31)
    model(ids)
    assert records == []
    assert not any(module._forward_hooks for module in model.modules())


# Errors


@pytest.mark.parametrize("top_k, n_group, topk_group", [(3, 5, 2), (7, 4, 2), (2, 12, 2), (13, 1, 1), (2, 3, 4)])
def test_a_choice_that_cannot_be_made_is_refused(top_k, n_group, topk_group):
    """Uneven groups, too few experts in the kept groups, groups without a best two, too few experts, too few groups."""
    with pytest.raises(ValueError, match=f"{top_k=} of 12 experts"):
        group_limited_topk(torch.rand(2, 12), top_k, n_group, topk_group)


# The traps: each test fails when its error is made.


def test_trap_bias_changes_choice_not_weight():
    layer, x = layer_and_input(n_group=1, topk_group=1)
    layer.gate.e_score_correction_bias.zero_()
    before = layer.gate(x)
    layer.gate.e_score_correction_bias[6] = 10.0
    after = layer.gate(x)
    assert (before.indices != 6).all(1).any() and (after.indices == 6).any(1).all()
    assert torch.equal(before.scores, after.scores)
    plain = before.scores.gather(1, after.indices)
    torch.testing.assert_close(after.weights, 2.5 * plain / plain.sum(1, keepdim=True), **EXACT)


def test_trap_removed_groups_get_minus_infinity_and_not_zero():
    biased = torch.tensor([[-0.1, -0.2, -0.3, -0.4, -0.9, -0.9, -0.8, -0.8]])
    assert group_limited_topk(biased, 2, 2, 1).tolist() == [[0, 1]]
    scores = torch.rand(200, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for shift in (-3.0, -0.9, 0.0, 5.0):
        assert torch.equal(group_limited_topk(scores + shift, 5, 6, 3), group_limited_topk(scores, 5, 6, 3))


def test_trap_a_group_is_worth_its_best_two_experts():
    """Group 0 has one star, group 1 two good experts, group 2 three middling ones."""
    scores = torch.tensor([[0.9, 0.1, 0.0, 0.6, 0.6, 0.0, 0.58, 0.58, 0.58]])
    assert group_limited_topk(scores, 2, 3, 1).sort().values.tolist() == [[3, 4]]
    assert group_limited_topk(scores, 2, 3, 1, top_two=False).sort().values.tolist() == [[0, 1]]


def test_trap_the_layer_adds_no_residual():
    layer, x = layer_and_input()
    torch.nn.init.zeros_(layer.experts.down_proj)
    torch.nn.init.zeros_(layer.shared_experts.down_proj.weight)
    assert not layer(x).any()


def test_trap_weights_sum_to_the_routed_scaling_factor():
    layer, x = layer_and_input()
    torch.testing.assert_close(layer.gate(x).weights.sum(1), torch.full((26,), 2.5).double(), **EXACT)
    raw, x = layer_and_input(norm_topk_prob=False)
    routing = raw.gate(x)
    torch.testing.assert_close(routing.weights, 2.5 * routing.scores.gather(1, routing.indices), **EXACT)


def test_trap_the_factor_scales_routed_experts_only():
    layer, x = layer_and_input()
    routed = layer(x) - layer.shared_experts(x)
    layer.gate.config = layer.gate.config.replace(routed_scaling_factor=5.0)
    torch.testing.assert_close(layer(x), 2 * routed + layer.shared_experts(x), **EXACT)


def test_trap_affinities_are_independent_sigmoids():
    layer, x = layer_and_input()
    before = layer.gate(x).scores
    with torch.no_grad():
        layer.gate.weight[4] += 1.0
    after = layer.gate(x).scores
    others = torch.arange(15) != 4
    assert torch.equal(before[:, others], after[:, others]) and not torch.equal(before[:, 4], after[:, 4])


def test_trap_no_gradient_flows_through_the_choice():
    """Only chosen affinities move; the gate rows of experts that no token chose stay still."""
    layer, x = layer_and_input(n_tokens=5)
    routing = layer.gate(x)
    (grad,) = torch.autograd.grad((routing.weights * torch.randn(5, 4).double()).sum(), layer.gate.weight)
    chosen = torch.zeros(15, dtype=torch.bool)
    chosen[routing.indices.flatten()] = True
    assert not chosen.all() and (grad.abs().amax(1) > 0).tolist() == chosen.tolist()
    assert isinstance(routing, Routing) and not routing.indices.requires_grad
    assert isinstance(layer.experts, Experts)
