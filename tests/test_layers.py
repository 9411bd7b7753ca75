"""Norm, gated layer and rotary positions against formulas, transformers and each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import (
    RMSNorm,
    SwiGLU,
    apply_rope,
    config_frequencies,
    rope_amplitude,
    rope_frequencies,
    rope_table,
    softmax_scale,
    yarn_frequencies,
    yarn_mscale,
)

V3 = ModelConfig.preset("v3")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
quick = settings(deadline=None, max_examples=40)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotate_half(x, rope):
    """The other layout: channels i and i + dim/2 make a pair."""
    cos, sin = (table[:, None] for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def scores(turn, q, k, rope):
    return torch.einsum("bthd,bshd->bhts", turn(q, rope), turn(k, rope))


def evens_then_odds(dim):
    return torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rmsnorm_equals_the_formula_in_double_precision(dtype, size):
    norm = RMSNorm(37, eps=1e-4)
    norm.weight.data = normal(37, seed=1)
    x = (size * normal(3, 5, 37)).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-4).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_swiglu_equals_a_loop_over_hidden_units():
    layer, x = SwiGLU(5, 7).double(), normal(5, dtype=torch.float64)
    out = torch.zeros(5, dtype=torch.float64)
    for unit in range(7):
        gate, up = layer.gate_proj.weight[unit] @ x, layer.up_proj.weight[unit] @ x
        out = out + layer.down_proj.weight[:, unit] * (gate / (1 + torch.exp(-gate)) * up)
    torch.testing.assert_close(layer(x), out)


def test_apply_rope_equals_multiplication_by_complex_phases():
    x, rope = normal(2, 7, 3, 10), rope_table(torch.arange(4, 11), rope_frequencies(10))
    phases = torch.exp(1j * torch.arange(4, 11)[:, None, None] * 10000.0 ** (-torch.arange(0, 10, 2) / 10))
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (5, 2))) * phases).flatten(-2)
    torch.testing.assert_close(apply_rope(x, rope), expected.float(), rtol=1e-5, atol=1e-5)


@quick
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(1, 16), st.integers(0, 9))
def test_rope_scores_depend_on_the_distance_alone(m, n, shift, pairs, seed):
    q, k = normal(2, 1, 1, 1, 2 * pairs, seed=seed, dtype=torch.float64)
    frequencies = rope_frequencies(2 * pairs).double()

    def product(m, n):
        turned_q = apply_rope(q, rope_table(torch.tensor([m]), frequencies))
        return (turned_q * apply_rope(k, rope_table(torch.tensor([n]), frequencies))).sum()

    torch.testing.assert_close(product(m, n), product(m + shift, n + shift), rtol=1e-9, atol=1e-9)


def test_rope_keeps_lengths_and_starts_unturned():
    x, rope = normal(1, 9, 2, 6), rope_table(torch.arange(9), rope_frequencies(6))
    torch.testing.assert_close(apply_rope(x, rope).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(apply_rope(x, rope)[:, 0], x[:, 0])


def test_both_layouts_give_the_same_scores_when_channels_are_reordered():
    q, k, order = normal(1, 31, 2, 24, seed=1), normal(1, 31, 2, 24, seed=2), evens_then_odds(24)
    rope = rope_table(torch.arange(31), rope_frequencies(24))
    torch.testing.assert_close(rotate_half(q[..., order], rope), apply_rope(q, rope)[..., order])
    halves = scores(rotate_half, q[..., order], k[..., order], rope)
    torch.testing.assert_close(halves, scores(apply_rope, q, k, rope), rtol=1e-5, atol=1e-4)


def test_trap_rotate_half_on_interleaved_channels_is_not_what_apply_rope_does():
    q, k, rope = normal(1, 31, 1, 64), normal(1, 31, 1, 64, seed=1), rope_table(torch.arange(31), rope_frequencies(64))
    wrong, right = scores(rotate_half, q, k, rope), scores(apply_rope, q, k, rope)
    torch.testing.assert_close(wrong.diagonal(0, 2, 3), right.diagonal(0, 2, 3), rtol=1e-5, atol=1e-4)
    assert (wrong - right).abs().max() > 5


def test_apply_rope_equals_transformers_interleaved_rotation():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave as theirs

    q, k = normal(2, 13, 3, 16, seed=1), normal(2, 13, 1, 16, seed=2)
    cos, sin = rope = rope_table(torch.arange(13), rope_frequencies(16))
    tables = (torch.cat((table, table), -1)[None] for table in (cos, sin))
    their_q, their_k = theirs(q.transpose(1, 2), k.transpose(1, 2), *tables)
    order = evens_then_odds(16)
    torch.testing.assert_close(their_q.transpose(1, 2), apply_rope(q, rope)[..., order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(their_k.transpose(1, 2), apply_rope(k, rope)[..., order], rtol=1e-5, atol=1e-5)


def test_apply_rope_takes_slices_at_odd_places_and_returns_their_gradient():
    wide, rope = normal(2, 5, 3, 11).requires_grad_(), rope_table(torch.arange(5), rope_frequencies(6))
    a, b = wide[..., 3:9:2], wide[..., 4:9:2]  # the pairs of channels 3 .. 8
    cos, sin = (table.unsqueeze(1) for table in rope)
    expected = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    results = apply_rope(wide[..., 3:9], rope), expected
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(out.pow(3).sum(), wide) for out in results), rtol=1e-4, atol=1e-4)


def test_apply_rope_turns_float64_in_float64():
    x, frequencies = normal(1, 5, 1, 8, dtype=torch.float64), rope_frequencies(8).double()
    turned = apply_rope(x, rope_table(torch.arange(5), frequencies))
    back = apply_rope(turned, rope_table(-torch.arange(5), frequencies))
    torch.testing.assert_close(back, x, rtol=1e-14, atol=1e-14)


def test_apply_rope_turns_bfloat16_in_float32_and_returns_bfloat16():
    x, rope = normal(1, 5, 1, 8).bfloat16(), rope_table(torch.arange(900, 905), rope_frequencies(8))
    assert apply_rope(x, rope).dtype == torch.bfloat16
    assert torch.equal(apply_rope(x, rope), apply_rope(x.float(), rope).bfloat16())


def test_yarn_frequencies_of_v3_keep_fast_pairs_and_slow_the_rest():
    ratio = config_frequencies(V3, 64) / rope_frequencies(64)
    assert (ratio[:11] == 1).all()
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40))
    published = {11: 0.925, 12: 0.850, 14: 0.700, 16: 0.550, 18: 0.400, 20: 0.250, 22: 0.100, 23: 0.025}
    for i, expected in published.items():
        assert ratio[i].item() == pytest.approx(expected, abs=5e-7)


def test_trap_yarn_ramp_is_linear_in_the_index_and_not_in_turns():
    ratio = config_frequencies(V3, 64) / rope_frequencies(64)
    turns = 4096 * rope_frequencies(64) / (2 * math.pi)
    keep = ((turns - 1) / 31).clamp(0, 1)
    paper = keep + (1 - keep) / 40
    assert (ratio / paper)[20].item() == pytest.approx(4.28, abs=0.01)
    assert (ratio[10:24].diff() < -0.07).all() and ratio[10:24].diff().std() < 1e-6


@quick
@given(
    st.integers(2, 32),
    st.sampled_from([1e3, 1e4, 5e5]),
    st.floats(1.5, 64),
    st.integers(64, 8192),
    st.sampled_from([(32, 1), (16, 2), (8, 1)]),
)
def test_yarn_equals_transformers(pairs, theta, factor, original, betas):
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fast, slow = betas
    yarn = dict(factor=factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow)
    rope = dict(yarn, rope_type="yarn", rope_theta=theta, mscale=1.0, mscale_all_dim=1.0)
    config = DeepseekV3Config(qk_rope_head_dim=2 * pairs, rope_parameters=rope, max_position_embeddings=10**6)
    theirs, amplitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = yarn_frequencies(2 * pairs, theta, factor, original, fast, slow)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert amplitude == pytest.approx(1.0)


def test_temperature_is_squared_on_scores_and_absent_from_clock_hands():
    assert yarn_mscale(40) == pytest.approx(1.368888, abs=5e-7)
    assert yarn_mscale(40) ** 2 == pytest.approx(1.873854, abs=5e-7)
    assert softmax_scale(V3) == pytest.approx(0.1352338, abs=5e-8)
    assert softmax_scale(ModelConfig.preset("v2-lite")) == pytest.approx(0.1147214, abs=5e-8)
    assert rope_amplitude(V3) == rope_amplitude(ModelConfig.preset("v2-lite")) == 1.0


def test_softmax_scale_equals_that_of_transformers():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    rope = dict(V3.rope_scaling, rope_type="yarn", rope_theta=10000.0, mscale=0.8, mscale_all_dim=0.8)
    del rope["type"]
    sizes = dict(hidden_size=24, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None)
    theirs = DeepseekV3Attention(DeepseekV3Config(**sizes, rope_parameters=rope), layer_idx=0)
    ours = V3.replace(rope_scaling=dict(V3.rope_scaling, mscale=0.8, mscale_all_dim=0.8))
    assert softmax_scale(ours) == pytest.approx(theirs.scaling, rel=1e-6)


def test_without_stretching_nothing_is_scaled():
    config = V3.replace(rope_scaling=None)
    assert yarn_mscale(1.0) == rope_amplitude(config) == 1.0
    assert softmax_scale(config) == pytest.approx(192**-0.5)
    assert softmax_scale(config, head_dim=16) == pytest.approx(0.25)
    assert torch.equal(config_frequencies(config, 12), rope_frequencies(12, 10000.0))


def test_tables_are_real_even_where_models_are_built_on_the_meta_device():
    with torch.device("meta"):
        tables = rope_frequencies(8), config_frequencies(V3, 8)
    assert all(table.device.type == "cpu" for table in tables)


@pytest.mark.parametrize("dim", [0, -2, 7])
def test_odd_or_empty_rotary_width_is_refused(dim):
    with pytest.raises(ValueError, match=f"dim={dim} must be even and positive"):
        rope_frequencies(dim)


@pytest.mark.parametrize("theta", [0.0, -10000.0, float("nan")])
def test_a_base_without_powers_is_refused(theta):
    with pytest.raises(ValueError, match="theta="):
        rope_frequencies(8, theta)
    with pytest.raises(ValueError, match="theta=1.0 must exceed 1"):
        yarn_frequencies(8, 1.0, 4, 64)


def test_yarn_refuses_a_factor_or_a_length_that_is_not_positive():
    with pytest.raises(ValueError, match="factor=0 and original_max_position_embeddings=64 must be positive"):
        yarn_frequencies(8, 10000.0, 0, 64)


@pytest.mark.parametrize("positions, dim", [(1, 8), (6, 8), (5, 6)])
def test_a_rope_table_of_another_length_or_width_is_refused(positions, dim):
    with pytest.raises(ValueError, match="does not fit x"):
        apply_rope(normal(1, 5, 2, 8), rope_table(torch.arange(positions), rope_frequencies(dim)))
