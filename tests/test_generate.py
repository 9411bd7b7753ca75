"""Decoding: the plan against the model, sampling, drafts that change nothing, and text that comes out whole."""

import copy
import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dsv3_mini.accounting import kv_cache_bytes_per_token
from dsv3_mini.compiled import CompiledPlan, routing_rules
from dsv3_mini.completion import Completer, TextStream
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import BOS, FIM_BEGIN, FIM_END, FIM_HOLE, train_tokenizer
from dsv3_mini.decode import DecodePlan
from dsv3_mini.decode_layers import choose_experts
from dsv3_mini.decode_loops import choose
from dsv3_mini.generate import generate, load_tokenizer, stream
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import group_limited_topk
from dsv3_mini.sampling import accept_draft, draw, next_distribution

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.5}
SHAPES = dict(vocab_size=23, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, kv_lora_rank=12)
SHAPES |= dict(q_lora_rank=20, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=10, moe_intermediate_size=12)
SHAPES |= dict(n_shared_experts=2, initializer_range=0.3, max_position_embeddings=100, eos_token_id=None)
VARIANTS = {
    "plain": {},
    "no query compression": {"q_lora_rank": None},
    "yarn, no shared expert": {"rope_scaling": YARN, "n_shared_experts": 0},
    "softmax gate": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "all dense": {"first_k_dense_replace": 3},
}


def build(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    model = DeepSeekV3(ModelConfig.preset("nano", **(SHAPES | changes))).to(dtype).eval().requires_grad_(False)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif "bias" in name:
            tensor.normal_(std=0.1)
    return model


cached_build = functools.cache(build)


@pytest.fixture(scope="module")
def model():
    return build()


PLANS = pytest.mark.parametrize("plan_type", [DecodePlan, CompiledPlan])


@pytest.fixture(scope="module", params=[DecodePlan, CompiledPlan])
def plan(model, request):
    return request.param(model)


def uncached(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
prompts_drawn = st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=12), min_size=1, max_size=3)


# The plan


@PLANS
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_plan_computes_the_models_logits_for_rows_of_unequal_length(plan_type, changes):
    model, ids = build(**changes), torch.randint(23, (3, 14), generator=torch.Generator().manual_seed(1))
    decoder, starts, expected = plan_type(model).decoder(3, 14), [9, 2, 11], model(ids)
    decoder.prefill(ids)
    new = torch.stack([ids[i, start : start + 3] for i, start in enumerate(starts)])
    logits = decoder.logits(decoder.step(new, starts))
    for i, start in enumerate(starts):
        torch.testing.assert_close(logits[i], expected[i, start : start + 3], rtol=1e-9, atol=1e-9)


@PLANS
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_plan_in_float32_stays_close_and_widens_bfloat16(plan_type, dtype, atol):
    model, ids = build(dtype, initializer_range=0.1), torch.randint(23, (1, 20))
    decoder = plan_type(model).decoder(1, 20)
    decoder.prefill(ids[:, :15])
    logits = torch.cat([decoder.logits(decoder.step(ids[:, i : i + 1], [i])) for i in range(15, 20)], dim=1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, copy.deepcopy(model).float()(ids)[:, 15:], rtol=0, atol=atol)


def attend_by_loops(q_latent, q_pe, cache, lengths):
    """What `DecodePlan(attend=)` asks for, a query and a head at a time."""
    z, n_new, c = torch.empty_like(q_latent), q_latent.shape[1], q_latent.shape[-1]
    for i, t, h in itertools.product(*map(range, q_latent.shape[:3])):
        seen = cache[i, : lengths[i].item() - n_new + t + 1]
        share = (seen[:, :c] @ q_latent[i, t, h] + seen[:, c:] @ q_pe[i, t, h]).softmax(0)
        z[i, t, h] = share @ seen[:, :c]
    return z


@pytest.mark.parametrize("n_rows", [1, 3])
def test_an_attention_of_your_own_gets_all_it_needs(model, plan, n_rows):
    own, ids = DecodePlan(model, attend=attend_by_loops), torch.randint(23, (n_rows, 14))
    starts, found = [9, 2, 11][:n_rows], []
    for each in (plan, own):
        decoder = each.decoder(n_rows, 19, n_mtp=1)
        for cache in decoder.caches:
            cache.fill_(7.0)  # behind its end a cache may hold anything
        decoder.prefill(ids)
        new = torch.stack([ids[i, start : start + 3] for i, start in enumerate(starts)])
        h = decoder.step(new, starts)
        found.append((h, decoder.mtp_step(0, h, new, starts)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert generate(own, PROMPTS, 9, speculative=2).tokens.equal(generate(plan, PROMPTS, 9).tokens)


@pytest.mark.parametrize("top_two", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (3, 2), (4, 3), (6, 4)])
def test_experts_chosen_in_lists_and_loops_are_those_chosen_in_tensors(groups, top_two):
    scores = torch.rand(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.3
    expected = group_limited_topk(scores, 5, *groups, top_two).tolist()
    assert [choose_experts(row, 5, *groups, top_two) for row in scores.tolist()] == expected
    rules = routing_rules(ModelConfig.preset("nano"))._replace(top_k=5, top_two=top_two)
    rules = rules._replace(n_group=groups[0], topk_group=groups[1])
    assert [choose(row, rules).tolist() for row in scores.numpy()] == expected


def test_mtp_step_computes_the_modules_states(model, plan):
    ids = torch.randint(23, (1, 12))
    h, layer, rope = model.model(ids), model.mtp_layers[0], model.model.rope(0, 11)
    expected = layer.shared_head.norm(layer(h[:, :-1], ids[:, 1:], rope))
    decoder = plan.decoder(1, 12, n_mtp=1)
    decoder.mtp_prefill(0, h[:, :8], ids[:, 1:9])
    torch.testing.assert_close(decoder.mtp_step(0, h[:, 8:11], ids[:, 9:], [8]), expected[:, 8:], rtol=1e-9, atol=1e-9)


def test_mtp_step_of_the_last_state_alone_fills_the_cache_all_the_same(model, plan):
    h, ids, found = model.model(torch.randint(23, (1, 9))), torch.randint(23, (1, 9)), []
    for only_last in (False, True):
        decoder = plan.decoder(1, 12, n_mtp=1)
        first = decoder.mtp_step(0, h[:, :5], ids[:, :5], [0], only_last)
        found.append((decoder.caches[-1], first[:, -1:], decoder.mtp_step(0, h[:, 5:], ids[:, 5:], [5])))
    assert first.shape == (1, 1, 36)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_step_forgets_what_stood_behind_it(model, plan):
    ids = torch.randint(23, (1, 10))
    decoder = plan.decoder(1, 10)
    decoder.prefill(ids.roll(1))  # nine wrong positions, then the right ones over them
    steps = [decoder.step(ids[:, i : i + 1], [i]) for i in range(10)]
    torch.testing.assert_close(decoder.logits(torch.cat(steps, 1)), model(ids), rtol=1e-9, atol=1e-9)


def test_cache_bytes_equal_the_formula_and_its_capacity_is_kept(model, plan):
    decoder = plan.decoder(batch=2, capacity=7)
    assert decoder.n_bytes == 2 * 7 * kv_cache_bytes_per_token(model.config, bytes_per_element=8)
    with pytest.raises(ValueError, match="8 positions do not fit the cache of 7"):
        decoder.step(torch.zeros(2, 2, dtype=torch.long), [1, 6])
    with pytest.raises(ValueError, match=r"starts=\[-1, 2\] must be 0 or more"):
        decoder.step(torch.zeros(2, 2, dtype=torch.long), [-1, 2])


# Greedy text


@settings(max_examples=12, deadline=None)
@given(prompts=prompts_drawn, n_drafts=st.integers(1, 2), n=st.integers(1, 14))
@PLANS
@pytest.mark.parametrize("n_mtp", [1, 2])
def test_drafts_never_change_greedy_text(plan_type, n_mtp, prompts, n_drafts, n):
    model = cached_build(num_nextn_predict_layers=n_mtp, num_hidden_layers=1)
    fast = generate(plan_type(model), prompts, n, speculative=n_drafts)
    assert fast.tokens.tolist() == [uncached(model, prompt, n) for prompt in prompts]


def test_batch_writes_what_each_prompt_gets_alone(model, plan):
    assert generate(plan, PROMPTS, 20).tokens.tolist() == [uncached(model, prompt, 20) for prompt in PROMPTS]


@settings(max_examples=8, deadline=None)
@given(prompt=st.lists(st.integers(0, 22), min_size=1, max_size=12), n_drafts=st.integers(1, 2))
def test_in_float32_only_a_near_tie_may_part_plain_and_speculative_text(prompt, n_drafts):
    model = cached_build(torch.float32, initializer_range=0.1)
    plain, fast = (generate(model, [prompt], 30, speculative=n).tokens[0].tolist() for n in (0, n_drafts))
    if plain != fast:
        first = next(i for i in range(30) if plain[i] != fast[i])
        best = model(torch.tensor([prompt + plain[:first]]))[0, -1].topk(2).values
        assert best[0] - best[1] < 1e-4


def test_transformers_writes_the_same_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(torch.float32, qk_nope_head_dim=8, eos_token_id=1)
    model.save_pretrained(tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = twin.generate(
        torch.tensor([[3, 4, 5]]), max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate(model, [[3, 4, 5]], 25, speculative=True, stop=()).tokens.tolist() == theirs[:, 3:].tolist()


def test_transformers_own_mtp_decoding_needs_as_many_steps(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    model, calls = build(torch.float32, qk_nope_head_dim=8, vocab_size=6, seed=3), []
    model.save_pretrained(tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    twin._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]  # it looks for layer 61, as in V3
    twin.model.register_forward_hook(lambda *_: calls.append(1))
    options = dict(do_sample=False, use_mtp=True, pad_token_id=0, eos_token_id=None)
    theirs = twin.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=41, **options)[0, 3:].tolist()
    ours = generate(model, [[3, 4, 5]], 41, speculative=True)
    assert theirs == ours.tokens[0].tolist() and 0 < ours.accepted < ours.drafted
    assert abs(len(calls) - 1 - ours.drafted) <= 1


@pytest.mark.parametrize("n_mtp, n_drafts", [(1, 1), (2, 2)])
def test_drafts_come_from_verified_states(n_mtp, n_drafts):
    """Each draft is what the module says when it reads the finished text from the start."""
    model = build(num_nextn_predict_layers=n_mtp, seed=2, vocab_size=5)
    events = list(stream(model, [[3, 1, 2]], 70, n_drafts=n_drafts))
    ids, judged, pending = [3, 1, 2], [0, 0], []
    for event in events:
        pending.append(event)
        if event.kind != "model":
            continue
        for depth, draft in enumerate([e for e in pending if e.kind != "model"], start=1):
            h, text = model.model(torch.tensor([ids])), torch.tensor([ids + [e.token for e in pending[: depth - 1]]])
            for k, layer in enumerate(model.mtp_layers[:depth], start=1):
                h = h[:, : len(ids) - 1]
                given_ids = text[:, k : k + h.shape[1]]
                h = layer.shared_head.norm(layer(h, given_ids, model.model.rope(0, h.shape[1])))
            assert draft.token == model.lm_head(h)[0, -1].argmax().item()
            judged[depth - 1] += 1
        ids += [e.token for e in pending if e.kind != "rejected"]
        pending = []
    assert judged[0] > 10 and (n_drafts == 1 or judged[1] > 3)
    assert min(sum(event.kind == kind for event in events) for kind in ("accepted", "rejected")) > 3


def test_tokens_per_verify_step_are_one_plus_the_acceptance(plan):
    result = generate(plan, [[3, 4, 5]], 41, speculative=True)
    n_written = 40  # after the first, which prefill gives
    assert result.drafted in (n_written - result.accepted, n_written - result.accepted + 1)
    assert 0 < result.accepted < result.drafted


# Sampled text


def chi_square_limit(free):
    return free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.parametrize("n_drafts, top_p, n", [(0, 0.8, 4000), (1, 1.0, 20000), (2, 0.8, 4000)])
def test_sampled_texts_have_the_models_distribution(n_drafts, top_p, n):
    tiny = dict(vocab_size=4, hidden_size=12, num_hidden_layers=1, n_routed_experts=2, num_experts_per_tok=1)
    model = build(torch.float32, seed=2, **tiny, n_group=1, topk_group=1, n_shared_experts=1, initializer_range=0.25)
    texts, prompt = torch.cartesian_prod(*[torch.arange(4)] * 3), torch.tensor([[2, 3]])
    p = next_distribution(model(torch.cat((prompt.expand(64, -1), texts), 1))[:, 1:-1], 1.3, top_p)
    expected = n * p.gather(2, texts.unsqueeze(2)).prod(1)[:, 0]
    options = dict(temperature=1.3, top_p=top_p, seed=0, speculative=n_drafts)
    result = generate(model, prompt.expand(n, -1), 3, **options)
    observed, kept = torch.bincount(result.tokens @ torch.tensor([16, 4, 1]), minlength=64), expected > 5
    assert observed[expected == 0].sum() == 0 and kept.sum() > 8
    assert n_drafts == 0 or 0.1 < result.accepted / result.drafted < 0.95
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < chi_square_limit(int(kept.sum()) - 1)


def test_a_rows_text_depends_on_its_own_prompt_and_seed_only(plan):
    options = dict(temperature=1.0, top_p=0.9, speculative=True)
    together = generate(plan, PROMPTS, 15, seed=[5, 6, 7], **options).tokens
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(generate(plan, [PROMPTS[row]], 15, seed=seed, **options).tokens[0], together[row])
    assert torch.equal(generate(plan, PROMPTS, 15, seed=5, **options).tokens, together)


def test_rejection_rule_returns_p_exactly():
    """Summed over a fine grid of random numbers instead of drawn."""
    p, q = torch.tensor([0.5, 0.25, 0.15, 0.1]), torch.tensor([0.2, 0.5, 0.3, 0.0])

    class Grid(random.Random):
        def random(self):
            return next(self.values)

    out, n = torch.zeros(4), 60
    for draft in range(3):
        for i in range(n * n):
            source = Grid()
            source.values = iter(((i // n + 0.5) / n, (i % n + 0.5) / n))
            out[accept_draft(draft, p, q, source)[1]] += q[draft] / n**2
    torch.testing.assert_close(out, p, rtol=0, atol=0.01)


def test_draw_never_gives_a_token_of_no_weight():
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])
    assert [draw(weights, u) for u in (0.0, 0.5, 2 / 3 + 1e-9, 1 - 1e-12)] == [1, 1, 3, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert torch.allclose(next_distribution(logits, 1.0, 0.7), torch.tensor([0.625, 0.375, 0, 0]))
    assert torch.allclose(next_distribution(logits, 1.0, 0.5), torch.tensor([1.0, 0, 0, 0]))
    assert next_distribution(logits, 0.0, 1.0).tolist() == [1, 0, 0, 0]


# Ends


def test_stop_tokens_end_each_row_on_its_own(model, plan):
    full = [uncached(model, prompt, 12) for prompt in PROMPTS]
    stop = full[0][4]
    for n_drafts in (0, 1, 2):
        result = generate(plan, PROMPTS, 12, stop=[stop], speculative=n_drafts)
        cut = [row[: row.index(stop) + 1] if stop in row else row for row in full]
        assert [row[:n] for row, n in zip(result.tokens.tolist(), result.lengths, strict=True)] == cut


def test_callback_sees_every_token_in_order(plan):
    seen = [[], [], []]

    def on_token(ids):
        for row, token in enumerate(ids):
            seen[row] += [] if token is None else [token]

    result = generate(plan, PROMPTS, 9, speculative=True, on_token=on_token)
    assert seen == result.tokens.tolist()
    assert generate(plan, PROMPTS, 0).tokens.shape == (3, 0)


def test_dropping_the_stream_stops_the_work(plan):
    events = stream(plan, [[3]], 50)
    assert next(events).kind == "model"
    events.close()
    assert list(events) == [] and not torch.is_inference_mode_enabled()


BAD = {
    "holds no token": dict(input_ids=[[3], []]),
    "at least one is needed": dict(input_ids=torch.zeros(1, 0, dtype=torch.long)),
    "tokens lie in 0..22": dict(input_ids=[[3, 23]]),
    "stop token 99 does not exist": dict(stop=[99]),
    "top_p=0 must be above 0": dict(top_p=0),
    "temperature=-1 must be 0": dict(temperature=-1),
    "temperature=nan must be 0": dict(temperature=float("nan")),
    "max_new_tokens=-1 must be 0": dict(max_new_tokens=-1),
    "take 101 positions; max_position_embeddings is 100": dict(max_new_tokens=98),
    "3 drafts a step; 0, 1 or 2": dict(speculative=3),
    "2 seeds for 1 prompts": dict(seed=[1, 2]),
    "has shape (3,)": dict(input_ids=torch.tensor([1, 2, 3])),
}


@pytest.mark.parametrize("message, request_", BAD.items(), ids=BAD)
def test_bad_request_is_one_clear_line(plan, message, request_):
    with pytest.raises(ValueError) as error:
        generate(plan, **({"input_ids": [[1, 2, 3]], "max_new_tokens": 4} | request_))
    assert message in str(error.value)


def test_compiled_loops_copy_no_expert(model):
    mlp, (_, arrays) = model.model.layers[2].mlp, CompiledPlan(model).layers[2]
    for array, tensor in ((arrays.gate_up, mlp.experts.gate_up_proj), (arrays.down, mlp.experts.down_proj)):
        assert np.shares_memory(array, tensor.numpy())


def test_compiled_loops_refuse_a_model_that_is_not_on_the_cpu():
    with pytest.raises(ValueError, match="not on meta; a DecodePlan runs there"):
        CompiledPlan(DeepSeekV3(ModelConfig.preset("nano", **SHAPES)).to("meta"))


@pytest.mark.parametrize("shape", [(1, 2, 36), (1, 3, 35), (2, 3, 36), (3, 36)])
def test_compiled_loops_refuse_states_that_do_not_fit(model, shape):
    """Machine code would read beyond their end."""
    decoder, ids = CompiledPlan(model).decoder(1, 9, n_mtp=1), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"hidden states are .* is needed"):
        decoder.mtp_step(0, torch.zeros(shape, dtype=torch.float64), ids, [0])
    for wrong in (torch.zeros(1, 1, 35, dtype=torch.float64), torch.zeros(1, 1, 36)):
        with pytest.raises(ValueError, match=r"hidden states are .* is needed"):
            decoder.logits(wrong)


def test_speculation_needs_an_mtp_layer():
    with pytest.raises(ValueError, match="this model has none"):
        generate(build(num_nextn_predict_layers=0), [[3]], 4, speculative=True)


# Text


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n" * 20], 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    out = tmp_path_factory.mktemp("checkpoint")
    build(torch.float32, vocab_size=300, eos_token_id=1, seed=2).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    return out


@given(text=st.text(), cuts=st.lists(st.integers(1, 4), max_size=30))
def test_streamed_bytes_give_whole_characters_and_lose_nothing(text, cuts):
    data, tokens = text.encode(), []
    for cut in cuts:
        tokens.append(data[:cut])
        data = data[cut:]
    out = TextStream([*tokens, data])
    parts = [out.feed(i) for i in range(len(tokens) + 1)] + [out.finish()]
    assert "".join(parts) == text


@given(text=st.text("ab\n", max_size=20), stop=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2))
def test_stop_strings_never_show_and_end_the_text_at_the_first(text, stop):
    out = TextStream([character.encode() for character in text], stop)
    parts = [out.feed(i) for i in range(len(text))]
    shown = "".join(parts) if out.stopped else "".join(parts) + out.finish()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    prefix = text[: min(ends)] if ends else text
    found = [prefix.find(s) for s in stop if s in prefix]
    assert shown == (prefix[: min(found)] if found else text) and out.stopped == bool(found)


def test_completion_streams_what_it_returns(folder):
    completer = Completer.from_pretrained(folder)
    plain = completer.complete("def f(", 20)
    pieces = list(completer.stream("def f(", 20, n_drafts=2))
    assert plain == "".join(piece.text for piece in pieces if piece.kind != "rejected")
    assert {piece.kind for piece in pieces} >= {"model", "rejected"}


def test_a_gap_is_asked_for_as_training_wrote_it(folder):
    completer = Completer.from_pretrained(folder)
    before, after = (completer.prompt_ids(text) for text in ("def f(", "return x"))
    assert completer.prompt_ids("def f(", "return x") == [BOS, FIM_BEGIN, *before, FIM_HOLE, *after, FIM_END]


@PLANS
def test_tokens_without_a_name_are_never_written(plan_type, tokenizer):
    size = tokenizer.get_vocab_size()
    completer = Completer(build(torch.float32, vocab_size=size + 200), tokenizer, plan_type)
    assert completer.plan.decoder(1, 1).logits(torch.zeros(1, 1, 36)).shape == (1, 1, size)


def test_tokenizer_of_another_checkpoint_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the model 23: they belong to different checkpoints"):
        Completer(build(), tokenizer)


def test_tokenizer_without_gap_tokens_cannot_fill_gaps():
    completer = Completer(build(), Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}, [])))
    with pytest.raises(ValueError, match="which filling a gap needs"):
        completer.prompt_ids("a", "b")


def test_missing_or_torn_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


# The command line


def run(capsys, *arguments):
    from dsv3_mini.__main__ import main

    code = main(["generate", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command_streams_text_and_drafts_do_not_change_it(folder, capsys):
    plain = run(capsys, "--checkpoint", folder, "def f(", "--max-new-tokens", 12)
    fast = run(capsys, "--checkpoint", folder, "def f(", "--max-new-tokens", 12, "--speculative", "--drafts", 2)
    loops = run(capsys, "--checkpoint", folder, "def f(", "--max-new-tokens", 12, "--compiled")
    assert plain[0] == fast[0] == 0 and plain[1] == fast[1] == loops[1] and plain[1].startswith("def f(")
    assert "12 tokens" in plain[2] and "drafts accepted" in fast[2]


def test_command_fills_a_gap_and_shows_both_sides(folder, capsys):
    code, out, _ = run(capsys, "--checkpoint", folder, "def f(", "--suffix", "return x", "--max-new-tokens", 5)
    assert code == 0 and out.startswith("def f(") and out.endswith("return x\n")


@pytest.mark.parametrize("extra", [["--top-p", 0], ["--temperature", -1], ["--max-new-tokens", 500], [""]])
def test_command_refuses_in_one_line_with_code_2(folder, capsys, extra):
    prompt = [] if extra == [""] else ["def f("]
    code, out, err = run(capsys, "--checkpoint", folder, *prompt, *extra)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
