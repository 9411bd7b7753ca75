"""Attention, caches and the swappable model against loops, transformers' Llama and themselves."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.baseline import (
    Attention,
    Block,
    Cache,
    LanguageModel,
    attend_by_products,
    attention_reference,
    causal_attention,
    causal_mask,
    dense_feed_forward,
    fastest,
    fit,
    initialise,
    next_token_loss,
)
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import rope_frequencies, rope_table

quick = settings(deadline=None, max_examples=25)
TINY = ModelConfig.preset(
    "nano",
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    v_head_dim=10,
    intermediate_size=22,
    initializer_range=0.2,
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ids(batch, length, seed=0):
    return torch.randint(TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_model(n_kv_heads=None, seed=0, config=TINY):
    torch.manual_seed(seed)
    return LanguageModel(config, attention=partial(Attention, n_kv_heads=n_kv_heads))


class OneBatch:
    """The same windows at every step."""

    def batch(self, step):
        return ids(4, 12)


def test_the_stopwatch_takes_turns_and_keeps_the_best(monkeypatch):
    calls, clock = [], iter([0, 5, 10, 12, 20, 21, 30, 39])  # a takes 5, b 2, a 1, b 9
    monkeypatch.setattr("dsv3_mini.baseline.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    best = fastest({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b"] and best == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="rounds=0"):
        fastest({}, rounds=0)


def test_reference_equals_a_loop_over_positions():
    q, k, v = normal(2, 3, 2, 5), normal(2, 7, 2, 5, seed=1), normal(2, 7, 2, 3, seed=2)
    out = attention_reference(q, k, v, 0.3)
    for b, t, h in ((b, t, h) for b in range(2) for t in range(3) for h in range(2)):
        seen = slice(0, 7 - 3 + t + 1)
        weights = (k[b, seen, h] @ q[b, t, h] * 0.3).softmax(-1)
        torch.testing.assert_close(out[b, t, h], weights @ v[b, seen, h])


@pytest.mark.parametrize("n_queries, n_keys", [(9, 9), (4, 9), (1, 9), (1, 1)])
@pytest.mark.parametrize("v_dim", [3, 6, 8])
def test_fused_attention_equals_the_reference_with_gradients(n_queries, n_keys, v_dim):
    q, k, v = normal(2, n_queries, 3, 6), normal(2, n_keys, 3, 6, seed=1), normal(2, n_keys, 3, v_dim, seed=2)
    upstream, results = normal(2, n_queries, 3, v_dim, seed=3), []
    for attend in (attention_reference, causal_attention):
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out = attend(*inputs, 0.4)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_fused_attention_equals_the_reference_in_other_types(dtype, tolerance):
    shapes = (2, 9, 3, 6), (2, 9, 3, 6), (2, 9, 3, 5)
    wide = [normal(*shape, seed=seed, dtype=torch.float64).to(dtype).double() for seed, shape in enumerate(shapes)]
    upstream, results = normal(2, 9, 3, 5, seed=3, dtype=torch.float64), []
    for attend, kind in ((attention_reference, torch.float64), (causal_attention, dtype)):
        inputs = [tensor.to(kind).requires_grad_() for tensor in wide]
        out = attend(*inputs, 0.4)
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(kind))])
    for slow, fast in zip(*results, strict=True):
        assert fast.dtype == dtype
        torch.testing.assert_close(fast.double(), slow, rtol=tolerance, atol=tolerance)


def test_attention_by_products_equals_the_reference_with_gradients_and_serves_short_bfloat16():
    q, k, v = normal(2, 9, 3, 6), normal(2, 9, 3, 6, seed=1), normal(2, 9, 3, 5, seed=2)
    upstream, results = normal(2, 9, 3, 5, seed=3), []

    def by_products(*tensors):
        return attend_by_products(*(tensor.transpose(1, 2) for tensor in tensors), 0.4).transpose(1, 2)

    for attend in (lambda *tensors: attention_reference(*tensors, 0.4), by_products):
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out = attend(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    half = [tensor.bfloat16() for tensor in (q, k, v)]
    assert torch.equal(causal_attention(*half, 0.4), by_products(*half))
    assert not torch.equal(causal_attention(q, k, v, 0.4), by_products(q, k, v))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
def test_grouped_heads_equal_a_loop_over_heads(n_kv_heads):
    q, k, v = normal(2, 5, 6, 4), normal(2, 5, n_kv_heads, 4, seed=1), normal(2, 5, n_kv_heads, 4, seed=2)
    out = causal_attention(q, k, v, 0.5)
    for head in range(6):
        shared = head // (6 // n_kv_heads)
        one = attention_reference(q[:, :, [head]], k[:, :, [shared]], v[:, :, [shared]], 0.5)
        torch.testing.assert_close(out[:, :, [head]], one, rtol=1e-5, atol=1e-5)


def test_mask_leans_on_the_last_key():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    with pytest.raises(ValueError, match="5 queries need as many keys, there are 4"):
        causal_mask(5, 4)


@pytest.mark.parametrize("attend", [attention_reference, causal_attention])
def test_trap_masking_with_zero_instead_of_minus_infinity_leaks_the_future(attend):
    q, k, v = (normal(1, 7, 2, 4, seed=seed) for seed in range(3))
    k2, v2 = (torch.cat((tensor[:, :-1], torch.full_like(tensor[:, -1:], 9.0)), 1) for tensor in (k, v))
    assert torch.equal(attend(q, k, v, 0.5)[:, :-1], attend(q, k2, v2, 0.5)[:, :-1])
    torch.testing.assert_close(attend(q, k, v, 0.5)[:, 0], v[:, 0])


def test_no_logit_of_the_model_sees_a_later_token():
    model, text = tiny_model(), ids(2, 15)
    changed = text.clone()
    changed[:, 9] = (changed[:, 9] + 1) % TINY.vocab_size
    difference = (model(text) - model(changed)).abs().amax((0, 2))
    assert difference[:9].max() == 0 and difference[9:].min() > 0


@quick
@given(st.integers(1, 3), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.sampled_from([1, 2, 6]))
def test_cached_logits_equal_uncached_ones(batch, lengths, n_kv_heads):
    model, text = tiny_model(n_kv_heads), ids(batch, sum(lengths))
    caches = model.new_caches(batch, sum(lengths) + 1)
    with torch.no_grad():
        pieces = torch.cat([model(part, caches) for part in text.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(text), rtol=1e-5, atol=1e-5)
    assert all(cache.length == sum(lengths) for cache in caches)


@torch.no_grad()
def test_truncated_cache_continues_as_if_nothing_had_followed():
    model, text = tiny_model(2), ids(1, 12)
    caches = model.new_caches(1, 20)
    model(torch.cat((text[:, :8], ids(1, 5, seed=9)), 1), caches)
    for cache in caches:
        cache.truncate(8)
    torch.testing.assert_close(model(text[:, 8:], caches), model(text)[:, 8:], rtol=1e-5, atol=1e-5)


def test_cache_counts_its_bytes():
    cache = Attention(TINY, n_kv_heads=2).new_cache(batch=3, capacity=7)
    assert cache.n_bytes == 2 * 3 * 7 * 2 * 10 * 4


@pytest.mark.parametrize("shape", [(2, 5, 4), (1, 4, 4), (3, 1, 4)])
def test_cache_refuses_too_many_positions_and_another_batch(shape):
    cache = Cache((2, 4, 4))
    with pytest.raises(ValueError, match="cache holds 2 x 4"):
        cache.append(torch.zeros(shape))
    assert cache.length == 0
    with pytest.raises(ValueError, match="length=-1"):
        cache.truncate(-1)


@pytest.mark.parametrize("n_kv_heads", [1, 6])
def test_bfloat16_autocast_trains_and_decodes(n_kv_heads):
    model, text = tiny_model(n_kv_heads), ids(2, 13)
    exact = next_token_loss(model, text)
    expected = torch.autograd.grad(exact, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model, text)
        with torch.no_grad():
            caches, whole = model.new_caches(2, 13), model(text)
            pieces = torch.cat([model(part, caches) for part in text.split((7, 5, 1), dim=1)], dim=1)
    assert loss.dtype == torch.float32 and whole.dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    assert all(
        (a - b).norm() < 0.05 * b.norm()
        for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True)
    )
    assert (pieces - whole).norm() < 0.01 * whole.norm()


@torch.no_grad()
def test_a_cache_of_another_type_returns_the_type_it_was_given():
    model, text = tiny_model(2), ids(2, 9)
    caches = [Cache(*(t.shape for t in cache.tensors), dtype=torch.bfloat16) for cache in model.new_caches(2, 9)]
    out, whole = torch.cat([model(part, caches) for part in text.split((5, 4), dim=1)], dim=1), model(text)
    assert out.dtype == torch.float32 and caches[0].tensors[0].dtype == torch.bfloat16
    assert 0 < (out - whole).norm() < 0.01 * whole.norm()


def rows_for_rotate_half(weight, head_dim):
    """Reorder each head's rows: even channels first, then odd ones."""
    rows = weight.unflatten(0, (-1, head_dim))
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1).flatten(0, 1)


def llama_like(model, n_kv_heads):
    """transformers' Llama with the weights of `model`, whose layout it does not share."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {name: getattr(TINY, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": TINY.rope_theta}
    extra = dict(num_key_value_heads=n_kv_heads, head_dim=TINY.v_head_dim, rms_norm_eps=TINY.rms_norm_eps)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **extra, rope_parameters=rope, tie_word_embeddings=False)).eval()
    llama.load_state_dict(model.state_dict())
    return llama


@pytest.mark.parametrize("n_kv_heads", [1, 3, 6])
@torch.no_grad()
def test_model_equals_transformers_llama_once_its_rows_are_reordered(n_kv_heads):
    model, text = tiny_model(n_kv_heads), ids(2, 17)
    llama = llama_like(model, n_kv_heads)
    assert (llama(text).logits - model(text)).abs().max() > 0.1  # the trap: interleaved weights in rotate-half code
    for layer in llama.model.layers:
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            proj.weight.copy_(rows_for_rotate_half(proj.weight, TINY.v_head_dim))
    torch.testing.assert_close(llama(text).logits, model(text), rtol=2e-5, atol=2e-5)


def test_block_adds_each_part_to_its_input_once():
    x = normal(1, 3, 24)
    block = Block(TINY, Attention(TINY), dense_feed_forward(TINY, 0))
    block.self_attn.forward = lambda x, rope, cache: torch.ones_like(x)
    block.mlp.forward = lambda x: 10 * torch.ones_like(x)
    torch.testing.assert_close(block(x, None), x + 11)


def test_parts_can_be_swapped_and_know_their_layer():
    seen = []

    def feed_forward(config, layer_idx):
        seen.append(layer_idx)
        return torch.nn.Identity()

    model = LanguageModel(TINY, feed_forward=feed_forward)
    assert seen == [0, 1] and model(ids(1, 3)).shape == (1, 3, 37)


def test_angles_stay_exact_when_the_model_is_cast_to_bfloat16():
    model = tiny_model().model
    exact = model.rope(1000, 3)
    cast = model.bfloat16().rope(1000, 3)
    assert all(torch.equal(a, b) for a, b in zip(exact, cast, strict=True))


def test_model_built_on_the_meta_device_has_real_angles_after_loading():
    model = tiny_model()
    with torch.device("meta"):
        empty = LanguageModel(TINY)
    empty.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(empty(ids(1, 9)), model(ids(1, 9)))


def test_yarn_of_the_config_reaches_the_table_and_the_scale():
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    model = tiny_model(config=TINY.replace(rope_scaling=yarn))
    plain = rope_table(torch.arange(90), rope_frequencies(10))
    assert not torch.equal(model.model.rope(0, 90)[0], plain[0])
    assert model.model.layers[0].self_attn.scale > 10**-0.5


def test_matrices_are_drawn_and_gains_stay_one():
    model = torch.nn.ModuleDict({"wide": torch.nn.Linear(300, 200, bias=False), "norm": torch.nn.RMSNorm(5)})
    initialise(model, std=0.006)
    assert model["wide"].weight.std().item() == pytest.approx(0.006, rel=0.02)
    assert (model["norm"].weight == 1).all()


def test_loss_is_the_mean_surprise_of_the_next_token():
    model, windows = tiny_model(), ids(2, 8)
    by_loop = [-F.log_softmax(model(row[None, :t])[0, -1], -1)[row[t]] for row in windows for t in range(1, 8)]
    torch.testing.assert_close(next_token_loss(model, windows), torch.stack(by_loop).mean(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="windows of 1 tokens leave nothing to predict"):
        next_token_loss(model, windows[:, :1])


def test_fit_reduces_the_loss_and_reports_every_step():
    model, seen = tiny_model(), []
    losses = fit(model, OneBatch(), 60, after_step=lambda step, loss: seen.append((step, loss)), progress=False)
    assert losses[-1] < 0.5 * losses[0]
    assert seen == list(enumerate(losses))
    assert next_token_loss(model, ids(4, 12)).item() < losses[-1] + 0.1


def test_fit_cools_down_to_a_learning_rate_of_zero():
    model, weights = tiny_model(), []
    keep = lambda step, loss: weights.append(model.lm_head.weight.detach().clone())  # noqa: E731
    fit(model, OneBatch(), 12, warmup=0, cooldown=8, weight_decay=0.0, after_step=keep, progress=False)
    moved = [(after - before).norm().item() for before, after in zip(weights, weights[1:], strict=False)]
    assert moved[-1] < 0.4 * moved[4] and min(moved) > 0


def test_fit_uses_the_loss_it_is_given_and_warms_up():
    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    fit(model, OneBatch(), 1, learning_rate=1.0, warmup=1000, progress=False, weight_decay=0.0)
    assert 0 < (model.lm_head.weight - before).abs().max() < 1.1e-3
    losses = fit(model, OneBatch(), 1, loss_fn=lambda model, windows: model(windows).sum() * 0 + 7, progress=False)
    assert losses == [7.0]


def test_fit_for_no_steps_changes_nothing():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fit(model, OneBatch(), 0, warmup=0, progress=False) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "bad", [{"steps": -1}, {"steps": 1, "warmup": -2}, {"steps": 1, "cooldown": -1}, {"steps": 1, "learning_rate": 0.0}]
)
def test_fit_refuses_bad_numbers_before_it_trains(bad):
    with pytest.raises(ValueError, match="must be 0 or more, learning_rate="):
        fit(None, None, progress=False, **bad)


@pytest.mark.parametrize("n_kv_heads", [0, -1, 4, 12])
def test_heads_that_do_not_divide_are_refused(n_kv_heads):
    with pytest.raises(ValueError, match=f"n_kv_heads={n_kv_heads} must divide num_attention_heads=6"):
        Attention(TINY, n_kv_heads=n_kv_heads)


def test_odd_heads_missing_caches_and_a_bare_sequence_are_refused():
    with pytest.raises(ValueError, match="dim=9 must be even"):
        LanguageModel(TINY.replace(v_head_dim=9))
    model = tiny_model()
    with pytest.raises(ValueError, match="1 caches for 2 layers"):
        model(ids(1, 3), model.new_caches(1, 3)[:1])
    with pytest.raises(ValueError, match=r"input_ids of shape \(3,\) must be \(B, T\)"):
        model(ids(1, 3)[0])
