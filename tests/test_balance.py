"""Load balance: counts, MaxVio, the two losses, and the bias that only steers the choice."""

import math
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsv3_mini.balance import (
    BiasBalancer,
    auxiliary_loss,
    expert_load,
    max_violation,
    sequence_balance_loss,
    sequence_balance_loss_reference,
    specialisation,
    update_bias,
)
from dsv3_mini.baseline import LanguageModel
from dsv3_mini.config import ModelConfig
from dsv3_mini.moe import Gate, MoE, Routing, group_limited_topk, moe_feed_forward, record_routing
from dsv3_mini.workers import Workers

EXACT = dict(rtol=1e-12, atol=1e-12)


def small_config(**changes):
    odd = dict(hidden_size=28, n_routed_experts=12, num_experts_per_tok=3, n_group=3, topk_group=2)
    return ModelConfig.preset("nano", **{**odd, "initializer_range": 0.3, **changes})


class Layers(nn.Module):
    """Mixture layers with residuals, recomputed in backward when `again`."""

    def __init__(self, n_layers=3, again=False, **changes):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.again = nn.ModuleList(MoE(small_config(**changes)) for _ in range(n_layers)), again

    def forward(self, x):
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.again else layer(x))
        return x


def random_routing(n_tokens=21, n_experts=11, top_k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_tokens, n_experts, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = logits.sigmoid()
    indices = (scores.detach() + torch.linspace(0, 0.4, n_experts)).topk(top_k).indices  # a bias steered the choice
    return logits, Routing(indices, scores.gather(1, indices), scores)


def router_loads(steps, gamma, skew=1.0, zero_mean=False):
    """Loads of a router with favourites whose bias is updated after every step: (steps, 9), and the last bias."""
    generator, bias, loads = torch.Generator().manual_seed(0), torch.zeros(9), []
    for _ in range(steps):
        scores = (skew * torch.linspace(-1, 1, 9) + torch.randn(700, 9, generator=generator)).sigmoid()
        loads.append(expert_load((scores + bias).topk(2).indices, 9))
        update_bias(bias, loads[-1], gamma, zero_mean)
    return torch.stack(loads), bias


# Counting


def test_load_counts_every_choice_of_an_expert():
    assert expert_load(torch.tensor([[0, 2], [2, 1], [2, 0]]), 5).tolist() == [2, 1, 3, 0, 0]


@given(n=st.integers(1, 40), n_experts=st.integers(2, 17), data=st.data())
@settings(max_examples=50, deadline=None)
def test_loads_sum_to_tokens_times_choices(n, n_experts, data):
    top_k = data.draw(st.integers(1, n_experts))
    scores = torch.rand(n, n_experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    load = expert_load(scores.topk(top_k).indices, n_experts)
    assert load.shape == (n_experts,) and load.sum() == n * top_k and load.max() <= n
    assert -1e-9 <= max_violation(load) <= n_experts / top_k - 1 + 1e-9


def test_max_violation_is_zero_when_balanced_and_largest_when_all_take_the_same():
    assert max_violation(torch.tensor([7, 7, 7])) == 0
    assert max_violation(torch.tensor([30, 30, 0, 0, 0])) == pytest.approx(5 / 2 - 1)
    assert max_violation(torch.tensor([5, 2, 1])) == pytest.approx((5 - 8 / 3) / (8 / 3))


def test_specialisation_is_zero_when_domains_agree_and_log_of_their_number_when_they_share_nothing():
    assert specialisation(torch.tensor([[3, 6], [1, 2], [0, 0]])) == pytest.approx(0, abs=1e-12)
    assert specialisation(torch.tensor([[5, 0, 0], [0, 7, 0], [2, 0, 0], [0, 0, 7]])) == pytest.approx(math.log(3))


# The losses


def test_auxiliary_loss_is_the_double_sum_with_gradients():
    logits, routing = random_routing()
    f = [(routing.indices == i).sum().item() * 11 / (21 * 4) for i in range(11)]
    expected = sum(f[i] * sum(s[i] / s.sum() for s in routing.scores) / 21 for i in range(11))
    torch.testing.assert_close(auxiliary_loss(routing), expected, **EXACT)
    pair = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (auxiliary_loss(routing), expected)]
    torch.testing.assert_close(*pair, **EXACT)


def test_auxiliary_loss_pushes_the_affinity_of_busy_experts_down():
    logits = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([0, 0, 0, 0, 1, 2])[:, None]
    scores = logits.sigmoid()
    auxiliary_loss(Routing(indices, scores.gather(1, indices), scores)).backward()
    total = logits.grad.sum(0)
    assert total[0] > 0 > total[3] and total[3] < total[1]


@pytest.mark.parametrize("shape", [(1, 13, 7, 3), (3, 7, 11, 4), (5, 1, 6, 6), (4, 9, 5, 1)])
def test_sequence_loss_equals_the_printed_sums_with_gradients(shape):
    n_sequences, length, n_experts, top_k = shape
    logits, routing = random_routing(n_sequences * length, n_experts, top_k)
    pair = [
        loss(routing.scores, top_k, n_sequences) for loss in (sequence_balance_loss, sequence_balance_loss_reference)
    ]
    torch.testing.assert_close(*pair, **EXACT)
    torch.testing.assert_close(*[torch.autograd.grad(v, logits, retain_graph=True)[0] for v in pair], **EXACT)


def test_sequence_loss_of_the_worked_example_is_two_over_one_point_four():
    chosen = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    scores = torch.full((8, 4), 0.2, dtype=torch.float64).scatter_(1, chosen[:, None], 0.8)
    assert sequence_balance_loss(scores, 1, 2).item() == pytest.approx(2 / 1.4)


@pytest.mark.parametrize("loss", [sequence_balance_loss, sequence_balance_loss_reference])
def test_sequence_loss_is_exactly_one_for_uniform_routing(loss):
    assert loss(torch.full((15, 8), 0.25), 2, 3).item() == 1
    every_expert_once = torch.eye(8).roll(1, 0)  # sharp choices, each expert one token
    assert loss(every_expert_once, 1, 1).item() == 1


def test_flattened_batch_hides_what_the_sequence_loss_is_for():
    scores = torch.full((8, 4), 0.2).scatter_(1, torch.tensor([[0], [1], [0], [1], [2], [3], [2], [3]]), 0.8)
    assert sequence_balance_loss(scores, 1, 1).item() == pytest.approx(1)
    assert sequence_balance_loss(scores, 1, 2).item() > 1.4


def test_sequence_loss_is_the_mean_over_sequences():
    _, routing = random_routing(3 * 7)
    alone = [sequence_balance_loss(part, 4, 1) for part in routing.scores.chunk(3)]
    torch.testing.assert_close(sequence_balance_loss(routing.scores, 4, 3), sum(alone) / 3, **EXACT)


def test_sequence_loss_normalises_sigmoid_scores_and_takes_no_softmax():
    _, routing = random_routing(1 * 9)
    f = torch.zeros(9, 11).scatter_(1, routing.scores.topk(4).indices, 1.0).sum(0).double() * 11 / (4 * 9)
    right = (f * (routing.scores / routing.scores.sum(1, keepdim=True)).mean(0)).sum()
    wrong = (f * routing.scores.softmax(-1).mean(0)).sum()
    value = sequence_balance_loss(routing.scores, 4, 1)
    torch.testing.assert_close(value, right, **EXACT)
    assert abs(value - wrong) > 0.01


def test_sequence_loss_counts_the_unbiased_choice():
    torch.manual_seed(0)
    gate, x = Gate(small_config(n_group=1, topk_group=1)), torch.randn(40, 28)
    values = []
    for offset in (0.0, 5.0):
        gate.e_score_correction_bias[7] = offset  # sends every token to expert 7
        routing = gate(x)
        values.append((sequence_balance_loss(routing.scores, 3, 4).item(), auxiliary_loss(routing).item()))
    assert values[0][0] == values[1][0] and values[0][1] != values[1][1]


# The bias


def test_bias_update_moves_overloaded_down_and_underloaded_up_by_gamma():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    update_bias(bias, torch.tensor([9, 4, 2, 1]), 0.125)
    assert bias.tolist() == [0.375, 0.5, 0.625, 0.625]


def test_bias_update_is_exact_for_loads_beyond_float32():
    bias, load = torch.zeros(3), torch.tensor([2**25, 2**25 + 1, 2**25 - 1])
    update_bias(bias, load, 1.0)
    assert bias.tolist() == [0, -1, 1]


def test_bias_update_balances_a_router_with_favourites():
    loads, _ = router_loads(300, gamma=0.01)
    assert max_violation(loads[0]) > 1 and max_violation(loads[-50:].sum(0)) < 0.1


def test_zero_mean_update_chooses_the_same_and_does_not_drift():
    (plain, drifted), (centred, bias) = (router_loads(120, 2**-7, 3.0, zero_mean) for zero_mean in (False, True))
    assert drifted.mean().abs() > 0.02 and bias.mean().abs() < 1e-6
    assert (plain - centred).abs().max() <= 2  # near-ties may round the other way
    torch.testing.assert_close(drifted - drifted.mean(), bias, rtol=0, atol=1e-5)


@given(offset=st.integers(-8, 8), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_common_offset_of_the_bias_changes_no_choice(offset, seed):
    scores = torch.randint(0, 2**20, (17, 12), generator=torch.Generator().manual_seed(seed)) / 2**20
    moved = scores.double() + offset / 2
    for groups, kept in ((1, 1), (3, 2), (4, 2)):
        pair = [group_limited_topk(s, 3, groups, kept).sort().values for s in (scores.double(), moved)]
        assert torch.equal(*pair)


# Counting once


def biases_of(model):
    return torch.stack([layer.gate.e_score_correction_bias.clone() for layer in model.layers])


def test_balancer_over_micro_batches_equals_one_big_batch():
    results = []
    for parts in (1, 3):
        model, x = Layers().double(), torch.randn(6, 5, 28, generator=torch.Generator().manual_seed(1)).double()
        balancer = BiasBalancer(model, gamma=0.25)
        for part in x.chunk(parts):
            with record_routing(model) as routings:
                model(part)
            balancer.observe(routings)
        results.append((balancer.step(), biases_of(model)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().max() == 0.25


def test_balancer_forgets_the_counts_of_the_last_step():
    model, x = Layers(), torch.randn(2, 9, 28)
    balancer = BiasBalancer(model, gamma=0.0)
    for batch in (x[:1], x):
        with record_routing(model) as routings:
            model(batch)
        balancer.observe(routings)
        assert [load.sum().item() for load in balancer.loads] == [batch.shape[0] * 9 * 3] * 3
        assert balancer.step() == [max_violation(expert_load(r.indices, 12)) for r in routings]


def test_recomputation_is_not_counted_when_the_recorder_closes_before_backward():
    loads = []
    for again in (False, True):
        model, x = Layers(again=again), torch.randn(2, 9, 28, generator=torch.Generator().manual_seed(1))
        balancer = BiasBalancer(model)
        with record_routing(model) as routings:
            loss = model(x).square().mean()
        loss.backward()
        balancer.observe(routings)
        loads.append(torch.stack(balancer.loads))
    assert torch.equal(*loads) and loads[1].sum(1).tolist() == [2 * 9 * 3] * 3


def test_recomputation_recorded_in_backward_is_refused():
    model = Layers(again=True)
    with record_routing(model) as routings:
        model(torch.randn(2, 9, 28)).square().mean().backward()
    assert len(routings) == 6
    with pytest.raises(ValueError, match="6 routings for 3 gates"):
        BiasBalancer(model).observe(routings)


def test_bias_update_leaves_gate_weights_gradients_and_combine_weights_untouched():
    model, x = Layers(n_layers=1, n_group=1, topk_group=1), torch.randn(40, 28)
    gate, before = model.layers[0].gate, {name: p.detach().clone() for name, p in model.named_parameters()}
    first, balancer = gate(x), BiasBalancer(model, gamma=0.02)
    balancer.observe([first])
    balancer.step()
    second = gate(x)
    assert gate.e_score_correction_bias.abs().max() > 0 and not gate.e_score_correction_bias.requires_grad
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    same = (first.indices.sort().values == second.indices.sort().values).all(1)
    assert same.any() and not same.all() and torch.equal(first.scores, second.scores)
    weights = [torch.zeros(40, 12).scatter_(1, r.indices, r.weights.detach()) for r in (first, second)]
    torch.testing.assert_close(weights[0][same], weights[1][same])


def test_balancer_counts_every_mixture_layer_of_a_language_model_in_order():
    torch.manual_seed(0)
    config = ModelConfig.preset("nano", vocab_size=64, num_hidden_layers=4, initializer_range=0.3)
    model = LanguageModel(config, feed_forward=moe_feed_forward)
    balancer = BiasBalancer(model, gamma=0.5)
    with record_routing(model) as routings:
        model(torch.randint(64, (3, 11)))
    balancer.observe(routings)
    balancer.step()
    for layer, routing in zip(model.model.layers[1:], routings, strict=True):
        load = expert_load(routing.indices, 16)
        assert torch.equal(layer.mlp.gate.e_score_correction_bias, 0.5 * (load.float().mean() - load).sign())


def balance_on_rank(rank):
    """One of two processes that see different tokens: the violation, the bias it ends with, the messages it sent."""
    model = Layers(n_layers=2)
    balancer = BiasBalancer(model, gamma=0.5, group=dist.group.WORLD)
    loads = torch.tensor([[9, 1, 1, 1], [1, 5, 3, 3]]).repeat_interleave(3, dim=1)
    balancer.loads = [loads[rank], loads[rank].flip(0)]  # the second layer sees the mirror image
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as message:
        violation = balancer.step()
    return violation, biases_of(model), message.call_count


def test_processes_that_share_a_batch_add_their_counts_in_one_message_before_the_sign():
    with Workers(2) as workers:
        (violation, bias, messages), (_, other, _) = workers.run(balance_on_rank, [(0,), (1,)])
    assert torch.equal(bias, other) and violation == [pytest.approx(10 / 6 - 1)] * 2 and messages == 1
    assert bias[0].tolist() == bias[1].flip(0).tolist() == [-0.5] * 3 + [0.0] * 3 + [0.5] * 6


# Errors


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="21 tokens do not make n_sequences=4"):
        sequence_balance_loss(torch.rand(21, 6), 2, 4)
    with pytest.raises(ValueError, match="n_sequences=0"):
        sequence_balance_loss(torch.rand(21, 6), 2, 0)
    with pytest.raises(ValueError, match="top_k=7 of 6 experts"):
        sequence_balance_loss(torch.rand(21, 6), 7, 3)
    with pytest.raises(ValueError, match=r"not 0 in \(4, 2\)"):
        specialisation(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="expert 6 was chosen, but n_experts=5"):
        expert_load(torch.tensor([[0, 6]]), 5)
    with pytest.raises(ValueError, match="counts no choice"):
        max_violation(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"bias of shape \(4,\) and a load of shape \(1,\)"):
        update_bias(torch.zeros(4), torch.tensor([3]), 0.1)


@pytest.mark.parametrize("gamma", [-0.001, float("nan")])
def test_negative_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match="must be 0 or more"):
        BiasBalancer(Layers(n_layers=1), gamma=gamma)


def test_balancer_refuses_gates_without_bias_and_a_step_without_counts():
    v2 = dict(topk_method="greedy", scoring_func="softmax", n_group=1, topk_group=1)
    with pytest.raises(ValueError, match="noaux_tc"):
        BiasBalancer(Layers(n_layers=1, **v2))
    with pytest.raises(ValueError, match="no forward pass was observed"):
        BiasBalancer(Layers(n_layers=1)).step()
    counting = BiasBalancer(Layers(n_layers=1, **v2), gamma=0.0)
    with record_routing(nn.ModuleList(counting.gates)) as routings:
        counting.gates[0](torch.randn(7, 28))
    counting.observe(routings)
    assert len(counting.step()) == 1
