"""Placing experts: packing, replication, the two policies, and the maps between experts and places."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.config import ModelConfig
from dsv3_mini.eplb import (
    balanced_packing,
    choose_replicas,
    gpu_load,
    invert_placement,
    peak_over_mean,
    rebalance_experts,
    replicate_experts,
)
from dsv3_mini.moe import Experts, Routing

LOAD = torch.tensor(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@st.composite
def placements(draw):
    """Loads of 1 to 3 layers and sizes that divide, with hierarchical and global cases among them."""
    n_nodes, gpus_per_node, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n_groups, n_gpus = draw(st.integers(1, 6)), n_nodes * gpus_per_node
    n_experts = n_groups * per_group
    n_replicas = n_gpus * draw(st.integers(-(-n_experts // n_gpus), -(-n_experts // n_gpus) + 2))
    loads = st.lists(st.integers(0, 500), min_size=n_experts, max_size=n_experts)
    load = torch.tensor(draw(st.lists(loads, min_size=1, max_size=3)))
    return load, n_replicas, n_groups, n_nodes, n_gpus


def test_published_example_is_reproduced():
    assert rebalance_experts(LOAD, 16, 4, 2, 8)[0].tolist() == PUBLISHED


@pytest.mark.parametrize("n_groups, peaks", [(4, [1.208, 1.242]), (1, [1.073, 1.190])])
def test_published_example_has_the_known_peaks(n_groups, peaks):
    placed = rebalance_experts(LOAD, 16, n_groups, 2, 8)[0]
    assert peak_over_mean(gpu_load(LOAD, placed, 8)).tolist() == pytest.approx(peaks, abs=5e-4)


def test_packing_puts_the_next_heaviest_into_the_lightest_pack_with_room():
    assert balanced_packing(torch.tensor([1.0, 8, 5, 4, 3, 2]), 2).tolist() == [[1, 4, 0], [2, 3, 5]]
    assert balanced_packing(torch.tensor([9.0, 1, 1, 1]), 2).tolist() == [[0, 3], [1, 2]]


def test_single_items_stay_where_they_are():
    assert balanced_packing(torch.tensor([1.0, 3, 2]), 3).tolist() == [[0], [1], [2]]


def test_replicas_go_where_one_carries_most():
    replicas, count = replicate_experts(torch.tensor([30.0, 100, 45]), 6)
    assert replicas.tolist() == [0, 1, 2, 1, 1, 2] and count.tolist() == [1, 3, 2]


@given(placements())
@settings(max_examples=60, deadline=None)
def test_every_expert_has_a_place_and_counts_add_up(case):
    load, n_replicas, *sizes = case
    physical, _, count = rebalance_experts(load, n_replicas, *sizes)
    assert (count >= 1).all() and (count.sum(1) == n_replicas).all()
    for layer in range(len(load)):
        assert torch.equal(physical[layer].bincount(minlength=load.shape[1]), count[layer])


@given(placements())
@settings(max_examples=60, deadline=None)
def test_maps_are_inverse_of_each_other(case):
    physical, logical, count = rebalance_experts(*case)
    for layer, expert in ((i, e) for i in range(count.shape[0]) for e in range(count.shape[1])):
        places = logical[layer, expert, : count[layer, expert]]
        assert (physical[layer, places] == expert).all() and len(places.unique()) == count[layer, expert]
        assert (logical[layer, expert, count[layer, expert] :] == -1).all()


@given(placements())
@settings(max_examples=60, deadline=None)
def test_groups_stay_on_their_node_when_nodes_divide_groups(case):
    load, n_replicas, n_groups, n_nodes, n_gpus = case
    physical = rebalance_experts(*case)[0]
    if n_groups % n_nodes == 0:
        group = physical.unflatten(1, (n_nodes, -1)) // (load.shape[1] // n_groups)
        for layer in group:
            homes = [set(node.tolist()) for node in layer]
            assert sum(map(len, homes)) == n_groups == len(set.union(*homes))


@given(placements())
@settings(max_examples=40, deadline=None)
def test_gpus_carry_the_whole_load(case):
    load, n_gpus = case[0], case[-1]
    carried = gpu_load(load, rebalance_experts(*case)[0], n_gpus)
    torch.testing.assert_close(carried.sum(1), load.sum(1).float())


def test_redundancy_lowers_the_peak():
    load = (torch.randn(9, 24, generator=torch.Generator().manual_seed(0)) * 1.2).exp()
    peaks = [peak_over_mean(gpu_load(load, rebalance_experts(load, 24 + r, 1, 1, 6)[0], 6)).mean() for r in (0, 6, 12)]
    assert peaks[0] > 1.05 * peaks[1] and peaks[1] > peaks[2] >= 1


def test_replicas_take_turns_and_the_output_stays():
    torch.manual_seed(0)
    config = ModelConfig.preset(
        "nano", hidden_size=12, n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1
    )
    experts, x = Experts(config).double(), torch.randn(31, 12, dtype=torch.float64)
    indices = torch.randn(31, 6).add(torch.tensor([2.0, 1, 0, 0, 0, 0])).topk(2).indices
    placed, where, count = rebalance_experts(indices.flatten().bincount(minlength=6)[None], 10, 1, 1, 5)
    places, weights = choose_replicas(indices, where[0], count[0]), torch.rand(31, 2, dtype=torch.float64)
    expected = experts(x, Routing(indices, weights, None))
    experts.gate_up_proj.data, experts.down_proj.data = experts.gate_up_proj[placed[0]], experts.down_proj[placed[0]]
    torch.testing.assert_close(experts(x, Routing(places, weights, None)), expected, rtol=1e-12, atol=1e-12)
    used = places.flatten().bincount(minlength=10)
    assert all(used[w[:c]].max() - used[w[:c]].min() <= 1 for w, c in zip(where[0], count[0], strict=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_replicas=15), "n_replicas=15 must be a multiple of n_gpus=8"),
        (dict(n_replicas=8), "n_replicas=8 leaves some of 12 experts"),
        (dict(n_nodes=3), "n_gpus=8 must be a multiple of n_nodes=3"),
        (dict(n_groups=5), "n_experts=12 must be a multiple of n_groups=5"),
        (dict(n_groups=0), "n_groups=0"),
        (dict(load=LOAD[0]), "must be \\(layers, experts\\)"),
        (dict(load=-LOAD), "not negative"),
        (dict(load=LOAD[:0]), "\\(0, 12\\) must be"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(**{**dict(load=LOAD, n_replicas=16, n_groups=4, n_nodes=2, n_gpus=8), **changes})


def test_packs_and_replicas_that_cannot_be_are_refused():
    for n_packs in (0, 3):
        with pytest.raises(ValueError, match=f"4 items do not make {n_packs} packs"):
            balanced_packing(torch.ones(4), n_packs)
    with pytest.raises(ValueError, match="n_replicas=3 leaves some of 4 experts"):
        replicate_experts(torch.ones(4), 3)


def test_places_of_an_expert_are_padded_with_minus_one():
    places, count = invert_placement(torch.tensor([[2, 0, 1, 0]]), 3)
    assert places.tolist() == [[[1, 3], [2, -1], [0, -1]]] and count.tolist() == [[2, 1, 1]]
