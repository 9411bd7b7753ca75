"""Attention over chosen positions and the indexer that chooses, against dense attention, loops and transformers."""

import copy

import pytest
import torch

from dsv3_mini.baseline import causal_mask
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import apply_rope, rope_frequencies, rope_table
from dsv3_mini.long_context import attention_weights, record_attention
from dsv3_mini.mla import attend_absorbed
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.sparse_attention import (
    LightningIndexer,
    attend_chosen,
    choose_positions,
    indexer_loss,
    make_sparse,
    score_by_attention,
    score_by_recency,
    train_indexers,
    turn_halves,
)

SMALL = dict(vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, initializer_range=0.2)
SHAPES = (2, 7, 3, 5), (2, 7, 3, 4), (2, 7, 6), (2, 7, 4), (3, 5 + 2, 6)  # q_nope, q_pe, c_kv, k_pe, kv_b


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in SHAPES]


def build():
    torch.manual_seed(0)
    return DeepSeekV3(ModelConfig.preset("nano", **SMALL))


def ids(*shape, seed=0):
    return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(seed))


def causal_scores(scores):
    return scores.masked_fill(~causal_mask(scores.shape[-1], scores.shape[-1]), float("-inf"))


def test_choosing_every_position_is_dense_attention_with_its_gradients():
    inputs, scores = tensors(), causal_scores(torch.randn(2, 7, 7))
    outs = attend_chosen(*inputs, 0.3, *choose_positions(scores, 9)), attend_absorbed(*inputs, 0.3)
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(out.pow(3).sum(), inputs) for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_a_query_reads_what_was_chosen_and_nothing_else():
    q_nope, q_pe, c_kv, k_pe, kv_b = tensors()
    chosen, seen = choose_positions(causal_scores(torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(1))), 3)
    out = attend_chosen(q_nope, q_pe, c_kv, k_pe, kv_b, 0.3, chosen, seen)
    for b in range(2):
        for t in range(7):
            keep = chosen[b, t][seen[b, t]]
            one = q_nope[b, None, t, None], q_pe[b, None, t, None], c_kv[b, None, keep], k_pe[b, None, keep]
            torch.testing.assert_close(out[b, t], attend_absorbed(*one, kv_b, 0.3)[0, 0])


def test_early_queries_see_only_what_came_before():
    scores = causal_scores(torch.randn(1, 7, 7))
    chosen, seen = choose_positions(scores, 4)
    assert seen.sum(-1).tolist() == [[1, 2, 3, 4, 4, 4, 4]]
    assert (chosen[seen] <= torch.arange(7)[None, :, None].expand_as(chosen)[seen]).all()


@pytest.mark.parametrize("k", [1, 4, 11])
def test_indexer_chooses_what_transformers_chooses(k):
    v32 = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    config = ModelConfig.preset("nano", **SMALL)
    sizes = dict(index_n_heads=5, index_head_dim=24, index_topk=k, rope_scaling=None)
    theirs = v32.DeepseekV32Indexer(v32.DeepseekV32Config.from_dict({**config.to_dict(), **sizes}), 0)
    ours = LightningIndexer(config, 5, 24)
    ours.load_state_dict(theirs.state_dict())
    x, c_q, mask = torch.randn(2, 13, 48), torch.randn(2, 13, 96), causal_scores(torch.zeros(2, 13, 13))
    frequencies = rope_frequencies(16)
    angles = torch.outer(torch.arange(13.0), frequencies).repeat(1, 2)[None]
    with torch.no_grad():
        wanted = theirs(x, c_q, (angles.cos(), angles.sin()), mask, None)
        scores = ours(x, c_q, rope_table(torch.arange(13), frequencies), torch.arange(13))
    for a, b in zip(scores[:, k:].topk(k).indices.flatten(0, 1), wanted[:, k:].flatten(0, 1), strict=True):
        assert set(a.tolist()) == set(b.tolist())


def test_the_indexers_rotary_pairs_are_halves():
    x, rope = torch.randn(1, 5, 2, 8), rope_table(torch.arange(5), rope_frequencies(8))
    angle = torch.outer(torch.arange(5.0), rope_frequencies(8))[None, :, None]
    a, b = x.chunk(2, -1)
    wanted = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
    torch.testing.assert_close(turn_halves(x, rope), wanted)
    assert not torch.allclose(turn_halves(x, rope), apply_rope(x, rope))


def test_divergence_is_zero_for_the_attention_itself_and_positive_elsewhere():
    target = causal_scores(torch.randn(1, 6, 6)).softmax(-1)
    assert indexer_loss(target.log(), target).abs() < 1e-6
    assert indexer_loss(causal_scores(torch.randn(1, 6, 6)), target) > 0.01


def test_training_indexers_lowers_the_divergence_and_leaves_the_model_alone():
    model, windows = build(), ids(1, 33).repeat(6, 1)
    before = copy.deepcopy(model.state_dict())
    indexers, losses = train_indexers(model, windows, draws=12, n_queries=16)
    assert len(indexers) == 2 and sum(losses[-12:]) < 0.5 * sum(losses[:12])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scorer", [score_by_recency, score_by_attention])
def test_a_sparse_model_with_room_for_all_is_the_model(scorer):
    model, text = build(), ids(1, 21)
    sparse = make_sparse(copy.deepcopy(model), [scorer] * 2, 21)
    with torch.no_grad():
        torch.testing.assert_close(sparse(text), model(text), rtol=1e-4, atol=1e-4)
        few = make_sparse(copy.deepcopy(model), [scorer] * 2, 3)(text)
    torch.testing.assert_close(few[:, :3], model(text)[:, :3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(few[:, -1], model(text)[:, -1], atol=1e-3)


def test_choosing_by_attention_holds_the_most_that_k_positions_can():
    model, text = build(), ids(1, 21)
    with torch.no_grad(), record_attention(model) as found:
        model.model(text)
    for attention, x, rope in found:
        weights = attention_weights(attention, x, rope, torch.arange(21)).mean(0)  # (T, T)
        chosen, seen = choose_positions(score_by_attention(attention, x, rope, torch.arange(21)), 3)
        held = (weights.gather(1, chosen[0]) * seen[0]).sum(1)
        torch.testing.assert_close(held, weights.topk(3).values.sum(1))


def test_what_is_not_built_is_refused():
    sparse = make_sparse(build(), [score_by_recency] * 2, 4)
    with pytest.raises(ValueError, match="SparseMLA reads whole texts"):
        sparse.model(ids(1, 3), sparse.new_caches(1, 8))
    with pytest.raises(ValueError, match="q_lora_rank=None"):
        LightningIndexer(ModelConfig.preset("nano", q_lora_rank=None))
