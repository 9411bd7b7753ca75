import pytest
import torch

from dsv3_mini.accounting import (
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    training_cost,
    training_gpu_hours,
)
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3

V3 = ModelConfig.preset("v3")


def test_v3_has_the_published_counts():
    count = count_parameters(V3)
    assert (count.total, count.activated, count.mtp) == (671_026_419_200, 37_552_297_472, 11_610_068_224)


def test_v2_lite_has_the_published_counts():
    count = count_parameters(ModelConfig.preset("v2-lite"))
    assert (count.total, count.activated, count.mtp) == (15_706_484_224, 2_661_150_208, 0)


@pytest.mark.parametrize("change", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2}, {"first_k_dense_replace": 4}])
def test_closed_form_equals_the_built_model(change):
    config = ModelConfig.preset("nano", **change)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    count = count_parameters(config)
    assert count.total + count.mtp == sum(p.numel() for p in model.parameters()) + biases


def test_cache_bytes_are_the_published_ones():
    sizes = {name: kv_cache_bytes_per_token(V3, name) for name in ("mla", "mha", "gqa", "mqa")}
    assert sizes == {"mla": 70_272, "mha": 4_997_120, "gqa": 249_856, "mqa": 31_232}
    with pytest.raises(ValueError, match="linear"):
        kv_cache_bytes_per_token(V3, "linear")


def test_training_flops_are_the_published_ones():
    assert flops_per_token(V3, 4096, training=True) / 1e9 == pytest.approx(250.46, abs=0.01)
    assert flops_per_token(V3, 0) == 2 * 36_625_618_432


def test_a_token_of_latent_costs_as_much_as_two_and_a_quarter_heads():
    assert kv_cache_bytes_per_token(V3) == 2.25 * kv_cache_bytes_per_token(V3, "mqa")
    assert kv_cache_bytes_per_token(V3, bytes_per_element=1) == 35_136


def test_the_published_speed_gives_the_published_hours():
    flops = flops_per_token(V3, 4096, training=True) * 1e12
    assert training_gpu_hours(flops, 989e12, 0.3908) == pytest.approx(180_000, rel=1e-3)
    for utilisation in (0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="utilisation"):
            training_gpu_hours(flops, 989e12, utilisation)


def test_cost_of_the_reported_hours():
    assert training_cost(2_788_000, 2.0) == 5_576_000
    with pytest.raises(ValueError, match="-1"):
        training_cost(-1, 2.0)
    with pytest.raises(ValueError, match="utilisation"):
        training_gpu_hours(1e20, 1e15, 1.5)


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda: kv_cache_bytes_per_token(V3, bytes_per_element=0), "bytes_per_element=0"),
        (lambda: flops_per_token(V3, -1), "context=-1"),
        (lambda: flops_per_token(V3, float("nan")), "context=nan"),
        (lambda: training_gpu_hours(1e20, 0, 0.4), "peak_flops_per_second=0"),
        (lambda: training_gpu_hours(-1.0, 1e15, 0.4), "flops=-1.0"),
        (lambda: training_cost(float("nan"), 2.0), "gpu_hours=nan"),
    ],
)
def test_impossible_quantities_are_named(ask, named):
    with pytest.raises(ValueError, match=named):
        ask()
