"""Expert parallelism on real processes: outputs and gradients of one process, unequal splits, empty ranks, traffic."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dsv3_mini.baseline import LanguageModel
from dsv3_mini.config import ModelConfig
from dsv3_mini.expert_parallel import (
    count_copies,
    distinct_nodes,
    expert_parallel_reference,
    pack_fp8,
    run_rank,
    spread_experts,
    unpack_fp8,
)
from dsv3_mini.fp8 import act_dequant, act_quant
from dsv3_mini.journeys import in_turns, time_journeys
from dsv3_mini.mla import MLA
from dsv3_mini.moe import MoE, group_limited_topk, moe_feed_forward
from dsv3_mini.workers import Workers

TOLERANCE = {torch.float64: dict(rtol=1e-12, atol=1e-12), torch.float32: dict(rtol=1e-4, atol=1e-5)}


@pytest.fixture(scope="module")
def groups():
    """Groups of two and of four processes, kept for all tests of this file."""
    with Workers(2, timeout=20) as two, Workers(4, timeout=20) as four:
        yield {2: two, 4: four}


def whole_layer(dtype=torch.float64, favour=(), **changes):
    odd = dict(hidden_size=20, n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1)
    config = ModelConfig.preset("nano", **{**odd, "moe_intermediate_size": 12, "initializer_range": 0.3, **changes})
    torch.manual_seed(0)
    moe = MoE(config).to(dtype)
    moe.gate.e_score_correction_bias[list(favour)] = 10.0
    return moe


def one_process(moe, xs, upstreams):
    """Output and gradients of all tokens together."""
    x = torch.cat(xs).requires_grad_()
    output = moe(x)
    output.backward(torch.cat(upstreams))
    return {"output": output.detach(), "x": x.grad, **{name: weight.grad for name, weight in moe.named_parameters()}}


def compare(groups, moe, sizes, shape):
    """Run every rank's tokens in a process of its own; outputs and gradients must be those of one process."""
    dtype = moe.experts.down_proj.dtype
    xs, upstreams = ([torch.randn(n, 20, dtype=dtype) for n in sizes] for _ in range(2))
    ranks = groups[len(sizes)].run(run_rank, [(moe, x, u, shape) for x, u in zip(xs, upstreams, strict=True)])
    expected = one_process(moe, xs, upstreams)
    for name, value in expected.items():
        split = name in ("output", "x") or name.startswith("experts.")
        got = torch.cat([rank[name] for rank in ranks]) if split else ranks[-1][name]
        torch.testing.assert_close(got, value, **TOLERANCE[dtype], msg=lambda text, name=name: f"{name}: {text}")
    return ranks


@pytest.mark.parametrize("sizes, shape", [((7, 5), (2,)), ((7, 0, 9, 3), (4,)), ((6, 2, 11, 5), (2, 2))])
def test_outputs_and_gradients_equal_one_process(groups, sizes, shape):
    ranks = compare(groups, whole_layer(), sizes, shape)
    assert ranks[0]["gate.weight"].abs().sum() > 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_ranks_whose_experts_nobody_chose_get_gradient_zero(groups, dtype, shape):
    ranks = compare(groups, whole_layer(dtype, favour=(0, 2, 3)), (5, 4, 3, 2), shape)
    assert not any(ranks[2]["experts.down_proj"].flatten()) and not any(ranks[3]["experts.gate_up_proj"].flatten())


def test_gate_weights_keep_their_gradient_when_nothing_else_reaches_the_gate(groups):
    moe = whole_layer(norm_topk_prob=False, n_shared_experts=0)
    ranks = compare(groups, moe, (9, 4), (2,))
    assert moe.gate.weight.grad.norm() > 0.1 and ranks[0]["gate.weight"].norm() > 0.1


def test_unequal_splits_are_told_before_rows_are_sent(groups):
    ranks = compare(groups, whole_layer(favour=(6, 7)), (2, 13), (2,))
    assert ranks[0]["copies"][0][1] == 2 and ranks[1]["copies"][0][1] == 13  # all want rank 1


def test_copies_sent_over_two_levels_are_the_copies_counted(groups):
    moe, sizes = whole_layer(num_experts_per_tok=5), (6, 2, 11, 5)
    torch.manual_seed(3)
    xs = [torch.randn(n, 20, dtype=torch.float64) for n in sizes]
    ranks = groups[4].run(run_rank, [(moe, x, x, (2, 2)) for x in xs])
    slow = sum(rank["copies"][0][1 - home // 2] for home, rank in enumerate(ranks))
    fast = sum(rank["copies"][1][1 - home % 2] for home, rank in enumerate(ranks))
    home = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    counted = count_copies(moe.gate(torch.cat(xs)).indices, home, 8, 2, 4)
    assert (slow, fast) == tuple(int(copies.sum()) for copies in counted) and slow <= sum(sizes)


class Rounded(torch.autograd.Function):
    """Rounded to FP8 tiles forward, and its gradient backward, each where a lower bound of the tiles is given."""

    @staticmethod
    def forward(ctx, x, forth, back):
        ctx.back = back
        return x.clone() if forth is None else act_dequant(*act_quant(x, 128, "ue8m0", min_amax=forth)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return Rounded.forward(ctx, grad, ctx.back, None), None, None


@pytest.mark.parametrize("sizes, shape, width", [((7, 5), (2,), 20), ((0, 9), (2,), 200), ((6, 2, 0, 5), (2, 2), 136)])
def test_fp8_dispatch_rounds_tokens_out_and_gradients_of_answers_out_and_nothing_else(groups, sizes, shape, width):
    """Equal to one process whose experts see rounded tokens and get rounded gradients, tiny ones included."""
    moe = whole_layer(hidden_size=width)
    xs, upstreams = ([f * torch.randn(n, width, dtype=torch.float64) for n in sizes] for f in (1.0, 1e-7))
    ranks = groups[len(sizes)].run(run_rank, [(moe, x, u, shape, True) for x, u in zip(xs, upstreams, strict=True)])
    x = torch.cat(xs).requires_grad_()
    routed = moe.experts(Rounded.apply(x, 1e-4, None), moe.gate(x))
    output = Rounded.apply(routed, None, 1e-30) + moe.shared_experts(x)
    output.backward(torch.cat(upstreams))
    for name, value in {"output": output.detach(), "x": x.grad, "gate.weight": moe.gate.weight.grad}.items():
        got = ranks[-1][name] if name == "gate.weight" else torch.cat([rank[name] for rank in ranks])
        assert (got - value).norm() < 1e-6 * value.norm(), name
    assert 0.005 < (output - moe(x)).norm() / moe(x).norm() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n, width", [(5, 300), (0, 128), (3, 20)])
def test_a_packed_letter_is_tiles_exponents_and_untouched_weights(dtype, n, width):
    letters = torch.randn(n, width + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    letters[:1, 5] = 1e4
    payload = pack_fp8(letters, width)
    assert payload.dtype == torch.uint8 and payload.shape == (n, width + -(-width // 128) + 3 * dtype.itemsize)
    back = unpack_fp8(payload, width, dtype)
    tiles = act_dequant(*act_quant(letters[:, :width], scale_fmt="ue8m0")).to(dtype)
    assert back.dtype == dtype and torch.equal(back, torch.cat([tiles, letters[:, width:]], dim=1))
    assert torch.equal(unpack_fp8(pack_fp8(back, width), width, dtype), back)  # forwarding loses nothing


def stretches(name, count, log):
    for i in range(count):
        log.append(f"{name}{i}")
        yield
    return name


def test_journeys_take_turns_and_keep_their_order():
    log = []
    assert in_turns([stretches("a", 3, log), stretches("b", 1, log), stretches("c", 2, log)]) == ["a", "b", "c"]
    assert log == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_micro_batches_in_turns_give_the_hidden_states_of_the_whole_model(groups):
    torch.manual_seed(0)
    config = ModelConfig.preset("nano", num_hidden_layers=3, hidden_size=20, initializer_range=0.2, vocab_size=50)
    model = LanguageModel(config, MLA, moe_feed_forward).double()
    parts = [torch.randint(50, (n, 7)) for n in (4, 2)]
    answers = groups[2].run(time_journeys, [(model, part, 1) for part in parts])
    for (h, seconds), part in zip(answers, parts, strict=True):
        torch.testing.assert_close(h, model.model(part), rtol=1e-10, atol=1e-12)
        assert len(seconds) == 1 and min(seconds[0]) > 0


def test_experts_that_do_not_spread_evenly_are_refused(groups):
    moe, x = whole_layer(n_routed_experts=6), torch.randn(3, 20, dtype=torch.float64)
    with Workers(4) as four, pytest.raises(RuntimeError, match="n_routed_experts=6 do not spread evenly over 4 ranks"):
        four.run(run_rank, [(moe, x, x, (4,))] * 4)


def test_a_spread_model_sends_in_the_form_that_was_asked_for():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.preset("nano", num_hidden_layers=3), MLA, moe_feed_forward)
    ids, dense = torch.randint(1024, (2, 9)), model.model.layers[0].mlp
    exact = model(ids)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        spread_experts(model, init_device_mesh("cpu", (1,)), fp8_dispatch=True)
        rounded = model(ids)
    finally:
        dist.destroy_process_group()
    assert model.model.layers[0].mlp is dense and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1 * exact.abs().max().item())


def test_reference_of_all_ranks_in_one_process_equals_the_layer():
    moe, xs = whole_layer(n_shared_experts=0), [torch.randn(n, 20, dtype=torch.float64) for n in (5, 0, 8, 1)]
    experts = moe.experts
    outs = expert_parallel_reference(xs, [moe.gate(x) for x in xs], experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(torch.cat(outs), moe(torch.cat(xs)), rtol=1e-12, atol=1e-12)


def copies_one_by_one(indices, home, n_experts, n_nodes, n_gpus, deduplicate):
    """Slow and fast copies of one token, with sets."""
    per_node, gpus = n_gpus // n_nodes, [i // (n_experts // n_gpus) for i in indices]
    if not deduplicate:
        away = [gpu for gpu in gpus if gpu // per_node != home // per_node]
        return len(away), sum(gpu != home and gpu // per_node == home // per_node for gpu in gpus)
    nodes = {gpu // per_node for gpu in gpus}
    entries = {node * per_node + home % per_node for node in nodes}
    return len(nodes - {home // per_node}), len(set(gpus) - entries)


@pytest.mark.parametrize("deduplicate", [True, False])
def test_copies_equal_a_count_with_sets(deduplicate):
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(50, 24, generator=generator).topk(7).indices
    home = torch.randint(12, (50,), generator=generator)
    slow, fast = count_copies(indices, home, 24, 3, 12, deduplicate)
    expected = [
        copies_one_by_one(i, h, 24, 3, 12, deduplicate) for i, h in zip(indices.tolist(), home.tolist(), strict=True)
    ]
    assert list(zip(slow.tolist(), fast.tolist(), strict=True)) == expected


def test_experts_that_do_not_divide_over_nodes_or_gpus_are_refused():
    indices, home = torch.tensor([[0, 11]]), torch.tensor([0])
    with pytest.raises(ValueError, match="n_experts=12 must be a multiple of n_nodes=5"):
        distinct_nodes(indices, 12, 5)
    with pytest.raises(ValueError, match="n_experts=12 must be a multiple of n_gpus=4, and n_gpus=4 of n_nodes=3"):
        count_copies(indices, home, 12, 3, 4)


def test_free_routing_visits_the_expected_nodes_and_limited_routing_at_most_four():
    scores = torch.rand(20000, 256, generator=torch.Generator().manual_seed(0))
    free, limited = (distinct_nodes(group_limited_topk(scores, 8, *g), 256, 8).float() for g in ((1, 1), (8, 4)))
    assert abs(free.mean() - 5.29) < 0.02 and limited.max() == 4
