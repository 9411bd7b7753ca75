"""Multi-head Latent Attention: one function in every form, equal to transformers' own, and its traps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from dsv3_mini.accounting import attention_parameters, kv_cache_bytes_per_token
from dsv3_mini.baseline import LanguageModel
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import apply_rope, config_frequencies, rope_amplitude, rope_table
from dsv3_mini.mla import MLA, absorbing_is_cheaper, attend_absorbed, attend_expanded_reference

EXACT = dict(rtol=1e-10, atol=1e-10)
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
CONFIGS = {
    "query latent": dict(),
    "no query latent": dict(q_lora_rank=None),
    "yarn": dict(rope_scaling=YARN),
    "yarn of v2": dict(q_lora_rank=None, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "wide values": dict(v_head_dim=40, qk_nope_head_dim=6, num_attention_heads=5),
}


def small_config(**changes):
    odd = dict(hidden_size=44, num_attention_heads=3, q_lora_rank=18, kv_lora_rank=22, v_head_dim=10)
    return ModelConfig.preset("nano", **{**odd, "qk_nope_head_dim": 14, "qk_rope_head_dim": 6, **changes})


def table(config, start, stop):
    frequencies = config_frequencies(config, config.qk_rope_head_dim)
    return rope_table(torch.arange(start, stop), frequencies, rope_amplitude(config))


def layer_and_input(batch=2, length=13, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = small_config(**changes)
    layer = MLA(config).to(dtype)
    torch.nn.init.normal_(layer.kv_a_layernorm.weight, 1, 0.2)  # a gain of one would hide where the norm stands
    return config, layer, torch.randn(batch, length, config.hidden_size, dtype=dtype, requires_grad=True)


def forward_in_pieces(layer, config, x, cache, ends, **options):
    starts = [0, *ends[:-1]]
    pairs = list(zip(starts, ends, strict=True))
    return torch.cat([layer(x[:, i:j], table(config, i, j), cache, **options) for i, j in pairs], dim=1)


class GrowingCache:
    """Concatenates instead of overwriting, so that gradients can flow through many steps."""

    stored = None

    def append(self, *new):
        old = self.stored or [part[:, :0] for part in new]
        self.stored = [torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)]
        return self.stored


def gradients(layer, x, out):
    return torch.autograd.grad(out.pow(2).sum(), [x, *layer.parameters()])


def transformers_attention(config, layer):
    """The same layer and its rotary tables in transformers, with our weights."""
    new_names = dict(rope_theta=config.rope_theta, rope_type="default")
    if yarn := config.rope_scaling:
        new_names |= {("rope_type" if key == "type" else key): value for key, value in yarn.items()}
    fields = {k: v for k, v in config.to_dict().items() if k not in ("rope_scaling", "rope_theta", "architectures")}
    fields["num_key_value_heads"] = config.num_attention_heads
    theirs = DeepseekV3Config(**fields, rope_parameters=new_names, attn_implementation="eager")
    module = DeepseekV3Attention(theirs, layer_idx=0).to(layer.o_proj.weight.dtype)
    module.load_state_dict(layer.state_dict())
    return module, DeepseekV3RotaryEmbedding(theirs)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_mla_equals_transformers_in_outputs_and_gradients(name, absorb):
    config, layer, x = layer_and_input(dtype=torch.float32, **CONFIGS[name])
    theirs, rotary = transformers_attention(config, layer)
    mask = torch.full((13, 13), float("-inf")).triu(1)[None, None]
    expected, _ = theirs(x, rotary(x, torch.arange(13)[None]), mask)
    out = layer(x, table(config, 0, 13), absorb=absorb)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    leaves = [x, *(theirs.get_parameter(name) for name, _ in layer.named_parameters())]
    wanted = torch.autograd.grad(expected.pow(2).sum(), leaves)
    torch.testing.assert_close(gradients(layer, x, out), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_forms_agree_in_outputs_and_gradients(name):
    config, layer, x = layer_and_input(**CONFIGS[name])
    expanded = layer(x, table(config, 0, 13))
    expected = gradients(layer, x, expanded)
    ends = [5, 6, 7, 13]
    others = [layer(x, table(config, 0, 13), absorb=True)]
    others += [forward_in_pieces(layer, config, x, GrowingCache(), ends, absorb=a) for a in (None, False, True)]
    for out in others:
        torch.testing.assert_close(out, expanded, **EXACT)
        torch.testing.assert_close(gradients(layer, x, out), expected, **EXACT)


def test_absorbed_attention_equals_the_head_by_head_reference():
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 4, 3, 7), (2, 4, 3, 6), (2, 9, 11), (2, 9, 6), (3, 7 + 5, 11)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    outputs = [attend(*tensors, scale=0.3) for attend in (attend_expanded_reference, attend_absorbed)]
    torch.testing.assert_close(*outputs, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(o.pow(3).sum(), tensors) for o in outputs), **EXACT)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([None, True, False]))
def test_cached_equals_uncached_for_any_batch_lengths_and_chunks(batch, chunks, absorb):
    length = sum(chunks)
    config, layer, x = layer_and_input(batch, length, rope_scaling=YARN)
    ends = torch.tensor(chunks).cumsum(0).tolist()
    with torch.no_grad():
        out = forward_in_pieces(layer, config, x, layer.new_cache(batch, length + 2), ends, absorb=absorb)
        torch.testing.assert_close(out, layer(x, table(config, 0, length)), **EXACT)


@pytest.mark.parametrize("absorb", [None, True, False])
def test_bfloat16_autocast_trains_and_decodes(absorb):
    config, layer, x = layer_and_input(dtype=torch.float32)
    exact = layer(x, table(config, 0, 13))
    expected = gradients(layer, x, exact)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, table(config, 0, 13), absorb=absorb)
        with torch.no_grad():
            cached = forward_in_pieces(layer, config, x, layer.new_cache(2, 13), [6, 12, 13], absorb=absorb)
    assert out.dtype == cached.dtype == torch.bfloat16
    results = [out, cached, *gradients(layer, x, out)]
    for result, wanted in zip(results, [exact, exact, *expected], strict=True):
        assert (result - wanted).norm() < 0.05 * wanted.norm()


def test_prompt_then_single_tokens_through_a_whole_model_equals_one_pass():
    torch.manual_seed(0)
    model = LanguageModel(small_config(vocab_size=31, num_hidden_layers=2, rope_scaling=YARN), attention=MLA).double()
    ids = torch.randint(31, (2, 12))
    with torch.no_grad():
        caches = model.new_caches(2, 12)
        pieces = [model(ids[:, :7], caches), *(model(ids[:, i : i + 1], caches) for i in range(7, 12))]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), **EXACT)


def test_a_truncated_cache_continues_as_if_the_rest_had_never_been():
    config, layer, x = layer_and_input()
    cache = layer.new_cache(2, 13)
    with torch.no_grad():
        layer(x.flip(1), table(config, 0, 13), cache)
        cache.truncate(0)
        out = forward_in_pieces(layer, config, x, cache, [8, 13])
        torch.testing.assert_close(out, layer(x, table(config, 0, 13)), **EXACT)


def test_future_tokens_change_nothing_in_either_form():
    config, layer, x = layer_and_input()
    changed = torch.cat((x[:, :9], torch.randn_like(x[:, 9:])), 1)
    for absorb in (False, True):
        before, after = (layer(inputs, table(config, 0, 13), absorb=absorb)[:, :9] for inputs in (x, changed))
        torch.testing.assert_close(before, after, **EXACT)


def test_cache_bytes_follow_the_formula_and_not_the_heads():
    for heads in (3, 9):
        config, layer, _ = layer_and_input(num_attention_heads=heads, num_hidden_layers=1)
        assert layer.new_cache(2, 13).n_bytes == 2 * 13 * kv_cache_bytes_per_token(config, "mla", 8) == 2 * 13 * 28 * 8


def test_cache_refuses_more_positions_than_it_holds():
    config, layer, x = layer_and_input()
    with pytest.raises(ValueError, match="13 are needed"):
        layer(x.detach(), table(config, 0, 13), layer.new_cache(2, 12))


def test_parameters_of_the_published_layer_are_counted_and_named():
    with torch.device("meta"):
        layer = MLA(v3 := ModelConfig.preset("v3"))
    assert sum(p.numel() for p in layer.parameters()) == attention_parameters(v3) == 187_107_328
    assert tuple(layer.kv_b_proj.weight.shape) == (32768, 512)
    assert tuple(layer.kv_a_proj_with_mqa.weight.shape) == (576, 7168)


def test_absorbing_rule_equals_a_count_of_multiplications():
    c = ModelConfig.preset("v3")
    both, r, d_c = c.qk_nope_head_dim + c.v_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
    pairs = (1, 2), (1, 4096), (163, 4096), (164, 4096), (170, 10**6), (171, 10**6), (256, 256)
    for t, s in pairs:
        expanded = s * d_c * both + t * s * (both + r)
        absorbed = t * d_c * both + t * s * (2 * d_c + r)
        assert absorbing_is_cheaper(c, t, s) == (absorbed < expanded)


# The traps: each test fails when its error is made.


def test_trap_decoding_uses_the_scale_of_training():
    """The absorbed key is C + rope wide, the trained scale is that of nope + rope, times YaRN's temperature."""
    config, layer, x = layer_and_input(rope_scaling=YARN)
    temperature = 0.1 * torch.tensor(8.0, dtype=torch.float64).log() + 1
    assert layer.scale == pytest.approx((20**-0.5 * temperature**2).item(), rel=1e-12)
    with torch.no_grad():
        decoded = forward_in_pieces(layer, config, x, layer.new_cache(2, 13), list(range(1, 14)))
        torch.testing.assert_close(decoded, layer(x, table(config, 0, 13)), **EXACT)


def test_trap_both_score_terms_share_one_scale():
    """One query over two positions, so the softmax is a sigmoid of the scaled difference of full scores."""
    torch.manual_seed(2)
    q, q_pe, c, k_pe = (torch.randn(s).double() for s in ((1, 1, 1, 3), (1, 1, 1, 4), (1, 2, 5), (1, 2, 4)))
    kv_b = torch.randn(1, 3 + 2, 5).double()
    keys = torch.cat((c[0] @ kv_b[0, :3].T, k_pe[0]), -1)
    weight = torch.sigmoid((keys[1] - keys[0]) @ torch.cat((q, q_pe), -1).flatten() * 0.4)
    values = c[0] @ kv_b[0, 3:].T
    expected = values[0] * (1 - weight) + values[1] * weight
    for attend in (attend_expanded_reference, attend_absorbed):
        torch.testing.assert_close(attend(q, q_pe, c, k_pe, kv_b, 0.4).flatten(), expected, **EXACT)


def test_trap_positional_key_comes_from_the_hidden_state():
    """Cleared latent rows, or a changed norm, must leave k_pe alone; it is a rotated linear map of x."""
    config, layer, x = layer_and_input()
    w_kr = layer.kv_a_proj_with_mqa.weight[config.kv_lora_rank :]
    expected = apply_rope((x @ w_kr.T).unsqueeze(2), table(config, 0, 13)).squeeze(2)
    with torch.no_grad():
        layer.kv_a_proj_with_mqa.weight[: config.kv_lora_rank] = 0
    c_kv, k_pe = layer.latents(x, table(config, 0, 13))
    assert not c_kv.any()
    torch.testing.assert_close(k_pe, expected, **EXACT)
    torch.testing.assert_close(layer.latents(2 * x, table(config, 0, 13))[1], 2 * expected, **EXACT)  # no norm


def test_trap_all_heads_share_one_positional_key():
    config, layer, x = layer_and_input()
    latent, k_pe = layer.latents(x, table(config, 0, 13))
    assert latent.shape == (2, 13, 22) and k_pe.shape == (2, 13, 6)
    assert [tuple(t.shape) for t in layer.new_cache(2, 5).tensors] == [(2, 5, 22), (2, 5, 6)]
    assert tuple(layer.kv_a_proj_with_mqa.weight.shape) == (22 + 6, 44)


def test_trap_kv_b_rows_lie_head_by_head():
    """With W^UK of every head zero, scores see position alone; with W^UV of one head zero, that head is silent."""
    config, layer, x = layer_and_input()
    with torch.no_grad():
        layer.kv_b_proj.weight[24 + 14 : 48] = 0  # head 1 of (14 key + 10 value) rows: its values
    for attend in (layer.attend_expanded, layer.attend_absorbed):
        heads = attend(*layer.queries(x, table(config, 0, 13)), *layer.latents(x, table(config, 0, 13)))
        assert not heads[:, :, 1].any() and heads[:, :, 0].any() and heads[:, :, 2].any()


def test_trap_the_cache_holds_values_and_not_just_shapes():
    """What is stored is the normed latent and the turned key of each position, exactly."""
    config, layer, x = layer_and_input()
    cache = layer.new_cache(2, 13)
    with torch.no_grad():
        forward_in_pieces(layer, config, x, cache, [4, 5, 13])
        torch.testing.assert_close(cache.tensors, list(layer.latents(x, table(config, 0, 13))), **EXACT)
    down = (x @ layer.kv_a_proj_with_mqa.weight[:22].T).detach()
    normed = down / (down.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.kv_a_layernorm.weight
    torch.testing.assert_close(cache.tensors[0], normed.detach(), **EXACT)
