"""Stretched clocks, loss by position and needles, against transformers, closed forms and models that cheat."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dsv3_mini.long_context_runs as long_context_runs
from dsv3_mini.__main__ import main
from dsv3_mini.baseline import next_token_loss
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import token_ids, train_tokenizer
from dsv3_mini.layers import rope_frequencies, rope_table
from dsv3_mini.long_context import (
    attention_entropy,
    attention_weights,
    cut,
    extend,
    final_learning_rate,
    interpolated_frequencies,
    long_windows,
    ntk_frequencies,
    position_losses,
    record_attention,
    stretch,
    yarn_scaling,
)
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.needle import Haystack, ask, hide_needle, lessons, needle_map, needle_words, teach
from dsv3_mini.peer import transformers_twin

SMALL = dict(vocab_size=700, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=4096)
COLOURS, THINGS = ("red", "blue", "cold", "warm", "dark", "soft"), ("bird", "lake", "tree", "moon", "road")
WORDS = [colour + thing for colour in COLOURS for thing in THINGS]
TEXTS = ["def f(x):\n    return x\n" + " ".join(WORDS[i:] + WORDS[:i]) * 4 + "\n" for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 700)


def build(**changes):
    torch.manual_seed(0)
    return DeepSeekV3(ModelConfig.preset("nano", **{**SMALL, "initializer_range": 0.15, **changes}))


def ids(*shape, seed=0):
    return torch.randint(5, 700, shape, generator=torch.Generator().manual_seed(seed))


def test_losses_by_position_average_to_the_mean_loss():
    model, windows = build(), ids(3, 38)
    losses = position_losses(model, windows)
    assert losses.shape == (3, 37)
    torch.testing.assert_close(losses.mean(), next_token_loss(model, windows).detach())


def test_pieces_predict_every_token_once_and_forget_what_stood_before():
    model, windows = build(), ids(2, 31)
    pieces = cut(windows, 10)
    assert pieces.shape == (6, 11) and torch.equal(pieces[:, 1:].flatten(), windows[:, 1:].flatten())
    alone = position_losses(model, windows[1:, 10:21])
    torch.testing.assert_close(position_losses(model, pieces)[4:5], alone)
    with pytest.raises(ValueError, match="length=7"):
        cut(windows, 7)


def test_a_window_lies_inside_one_text_and_a_corpus_of_short_texts_is_refused(tokenizer):
    texts = [word * 40 for word in WORDS[:9]] + ["short"]
    windows = long_windows(tokenizer, texts, 21, 100, seed=3)
    assert windows.shape == (9, 22)
    assert all(any(tokenizer.decode(w.tolist()).strip() in text for text in texts) for w in windows)
    assert torch.equal(windows[:4], long_windows(tokenizer, texts, 21, 4, seed=3))
    with pytest.raises(ValueError, match="none of 10 texts has length=5000"):
        long_windows(tokenizer, texts, 5000, 2)


def test_recorded_weights_reproduce_the_attention_layer():
    model, text = build(rope_scaling=yarn_scaling(20, 256)), ids(1, 19)
    with record_attention(model) as found:
        model(text)
    assert len(found) == 2 and not model.model.layers[0].self_attn._forward_pre_hooks
    attention, x, rope = found[1]
    weights = attention_weights(attention, x, rope, torch.tensor([0, 7, 18]))
    v = attention.kv_b_proj(attention.latents(x, rope)[0])[0].unflatten(-1, (3, -1))[..., attention.nope_dim :]
    out = attention.o_proj(torch.einsum("hps,shv->phv", weights, v).flatten(1))
    torch.testing.assert_close(out, attention(x, rope)[0, [0, 7, 18]], rtol=1e-4, atol=1e-5)


def test_entropy_lies_between_none_and_that_of_equal_weights():
    model, positions = build(), torch.tensor([0, 1, 5, 22])
    entropy = attention_entropy(model, ids(23), positions)
    assert entropy.shape == (2, 3, 4) and (entropy[..., 0] == 0).all() and (entropy[..., 1:] > 0).all()
    assert (entropy <= (positions + 1).log() + 1e-5).all()
    for layer in model.model.layers:
        layer.self_attn.scale = 1e-9
    torch.testing.assert_close(attention_entropy(model, ids(23), positions)[1, 2], (positions + 1).log())


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.floats(1, 100))
def test_interpolation_gives_a_position_the_angles_of_a_nearer_one(pairs, factor):
    positions = torch.tensor([0.0, 3.0, 251.0])
    slow = rope_table(positions * factor, interpolated_frequencies(2 * pairs, 1e4, factor))
    for a, b in zip(slow, rope_table(positions, rope_frequencies(2 * pairs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.floats(1, 100))
def test_another_base_keeps_the_fastest_clock_and_slows_the_slowest_by_the_factor(pairs, factor):
    ratio = rope_frequencies(2 * pairs) / ntk_frequencies(2 * pairs, 1e4, factor)
    assert ratio[0] == 1 and math.isclose(ratio[-1].item(), factor, rel_tol=1e-3)
    assert (ratio.diff() > -1e-4).all()


def test_trap_the_ramp_keeps_fast_clocks_and_slows_slow_ones():
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = stretch(build(qk_rope_head_dim=32), "yarn", 20, 256)
    left = model.model.frequencies / rope_frequencies(32)
    ramp = (torch.arange(16) / 7).clamp(max=1)  # pair 0 turns 32 times in 256 tokens, pair 7 no more than once
    torch.testing.assert_close(left, 1 - ramp * 19 / 20)
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config.from_dict(model.config.to_dict()), "cpu")
    torch.testing.assert_close(model.model.frequencies, theirs)


def test_trap_the_temperature_enters_the_scores_once_as_in_transformers():
    model, text = stretch(build(), "yarn", 20, 256), ids(2, 67)
    wanted = (32 + 16) ** -0.5 * (0.1 * math.log(20) + 1) ** 2
    assert all(math.isclose(layer.self_attn.scale, wanted) for layer in model.model.layers)
    assert math.isclose(rope_table(torch.arange(1.0), torch.ones(1), model.model.rope_amplitude)[0].item(), 1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(text), transformers_twin(model)(text).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("absorb", [False, True])
def test_trap_cached_decoding_of_a_stretched_model_keeps_its_clocks_and_temperature(absorb, monkeypatch):
    model, text = stretch(build(), "yarn", 20, 16), ids(1, 53)
    monkeypatch.setattr("dsv3_mini.mla.absorbing_is_cheaper", lambda *sizes: absorb)
    with torch.no_grad():
        caches, expected = model.new_caches(1, 53), model(text)
        parts = [model(part, caches) for part in text.split([30, 1, 1, 7, 14], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rope", "interpolation", "ntk", "yarn frequencies", "yarn"])
def test_stretching_changes_clocks_and_scale_and_no_weight(method):
    model, text = build(), ids(1, 40)
    stretched, same = stretch(model, method, 20, 256), stretch(model, method, 1, 256)
    assert all(a is b for a, b in zip(model.parameters(), stretched.parameters(), strict=True))
    torch.testing.assert_close(same(text), model(text))
    assert torch.equal(stretched(text), model(text)) == (method == "rope")
    assert (stretched.model.layers[0].self_attn.scale > model.model.layers[0].self_attn.scale) == (method == "yarn")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: long_windows(None, ["text"], 0, 1), "length=0, count=1"),
        (lambda: long_windows(None, ["text"], 8, 0), "length=8, count=0"),
        (lambda: cut(torch.zeros(2, 9), 0), r"windows \(2, 9\), .* length=0"),
        (lambda: cut(torch.zeros(9), 4), r"windows \(9,\), .* length=4"),
        (lambda: position_losses(None, torch.zeros(9)), r"windows are \(9,\); \(n, T \+ 1\)"),
        (lambda: position_losses(None, torch.zeros(0, 9)), r"windows are \(0, 9\)"),
        (lambda: ntk_frequencies(2, 1e4, 4), "dim=2; .* 4 or more"),
        (lambda: extend(None, torch.zeros(2, 9), 0, 1e-3), r"windows are \(2, 9\) and batch_size=0"),
        (lambda: ask(None, []), "no haystack"),
    ],
)
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_stretching_twice_or_by_an_unknown_method_is_refused():
    model = build()
    with pytest.raises(ValueError, match="stretched already"):
        stretch(stretch(model, "yarn", 20, 256), "yarn", 2, 256)
    for method, factor in (("longer", 2), ("yarn", 0.5)):
        with pytest.raises(ValueError, match="rope, interpolation, ntk, yarn"):
            stretch(model, method, factor, 256)


def test_a_saved_yarn_model_opens_stretched(tmp_path):
    model, text = stretch(build(), "yarn", 20, 256), ids(1, 30)
    model.save_pretrained(tmp_path)
    opened = DeepSeekV3.from_pretrained(tmp_path)
    assert opened.config.max_position_embeddings == 5120
    torch.testing.assert_close(opened(text), model(text))


def test_extension_moves_the_weights_at_the_final_rate_and_freezes_the_biases():
    assert math.isclose(final_learning_rate(2.2e-4), 7.3e-6)
    model = build(initializer_range=0.05)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost = extend(model, ids(6, 18), 2, learning_rate=1e-4, warmup=0)
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in model.state_dict().items()}
    assert all(moved[name] == 0 for name in moved if name.endswith("bias"))
    matrices = [name for name in moved if name.endswith("_proj.weight")]
    assert all(0 < moved[name] < 3.2e-4 for name in matrices)  # three steps of AdamW, one rate each at most
    assert cost["tokens"] == 6 * 17 and len(cost["losses"]) == 3 and cost["seconds"] >= 0


@settings(deadline=None, max_examples=60)
@given(st.integers(24, 90), st.floats(0, 1), st.integers(0, 9))
def test_a_haystack_has_its_length_its_needle_at_the_depth_and_its_answer_once(length, depth, seed):
    tokenizer = train_tokenizer(TEXTS, 700)
    hay = ids(90, seed=seed)
    stack = hide_needle(tokenizer, hay, length, depth, needle_words(tokenizer, True), seed, n_decoys=2)
    question, end = token_ids(tokenizer, ["\n# secret:", "\n"])
    found, size = stack.ids.tolist(), len(question) + 1 + len(end)
    at, room = found.index(stack.answer), length - size - len(question)
    assert len(found) == length and found.count(stack.answer) == 1 and not set(stack.decoys) & {*found}
    assert found[at - len(question) : at] == question == found[-len(question) :]
    assert abs((at - len(question)) - depth * room) <= 0.5
    rest = found[: at - len(question)] + found[at + 1 + len(end) : -len(question)]
    assert rest == hay[:room].tolist()


def test_a_needle_longer_than_the_haystack_is_one_clear_line(tokenizer):
    words = needle_words(tokenizer, True)
    with pytest.raises(ValueError, match=r"a needle of \d+ tokens and its question of \d+ exceed length=9"):
        hide_needle(tokenizer, ids(50), 9, 0.5, words, 0)
    with pytest.raises(ValueError, match="there are 5"):
        hide_needle(tokenizer, ids(5), 60, 0.5, words, 0)
    with pytest.raises(ValueError, match="0..1"):
        hide_needle(tokenizer, ids(50), 40, 1.5, words, 0)
    with pytest.raises(ValueError, match="9 decoys"):
        hide_needle(tokenizer, ids(50), 40, 0.5, words[:4], 0)


class Reader(nn.Module):
    """Stands for a model: its state marks, at the end of a text, every token that the text holds."""

    def __init__(self, strength):
        super().__init__()
        self.model = lambda text: F.one_hot(text, 700).amax(1, keepdim=True).float() * strength
        self.lm_head = nn.Identity()


def test_one_that_looks_back_has_the_whole_share_and_one_that_does_not_a_tenth(tokenizer):
    words = needle_words(tokenizer, True) + needle_words(tokenizer, False)
    stacks = [hide_needle(tokenizer, ids(80, seed=s), 60, 0.3, words, s) for s in range(4)]
    assert all(score["share"] > 0.999 for score in ask(Reader(20.0), stacks))
    assert all(score == {"exact": 0.0, "share": 0.1} for score in ask(Reader(0.0), stacks))
    last = Haystack(torch.full((7,), 9), answer=9, decoys=[8])
    assert ask(Reader(5.0), [last])[0]["exact"] == 1.0


def test_the_map_asks_every_length_and_depth(tokenizer):
    words = needle_words(tokenizer, True) + needle_words(tokenizer, False)
    found = needle_map(Reader(20.0), tokenizer, ids(3, 90), [30, 50, 90], [0.0, 1.0], words, seed=1)
    assert torch.tensor(found["share"]).shape == (3, 2) and min(min(row) for row in found["share"]) > 0.999


def test_lessons_are_short_and_keep_some_words_for_the_test(tokenizer):
    taught, asked = (needle_words(tokenizer, held_out) for held_out in (False, True))
    assert taught and asked and not set(taught) & set(asked)
    generator, lengths = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        stacks = lessons(tokenizer, ids(4, 200), 70, taught, 128, generator)
        assert {stack.answer for stack in stacks} <= set(taught)
        lengths |= {len(stack.ids) for stack in stacks}
    assert min(lengths) >= 32 and max(lengths) <= 70 and len(lengths) > 5


def test_lessons_are_learned(tokenizer):
    losses = teach(build(initializer_range=0.05), tokenizer, ids(4, 200), 40, 30, learning_rate=5e-3, n_tokens=256)
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5]) - 5


def test_the_experiment_runs_every_stage_and_describes_itself(tmp_path, tokenizer):
    text, model = tmp_path / "text", build(initializer_range=0.05, vocab_size=tokenizer.get_vocab_size())
    text.mkdir()
    for i in range(40):
        (text / f"{i}.py").write_text("".join(f"def f{i}(x):\n    return {j * i} - x\n" for j in range(40)))
    model.save_pretrained(tmp_path / "mini")
    (tmp_path / "mini/tokenizer.json").write_text(tokenizer.to_str())
    options = {"data": str(text), "max_bytes": None, "learning_rate": 1e-3}
    (tmp_path / "mini/run.json").write_text(json.dumps({"options": options, "corpus": {"sha256": "another"}}))
    sizes = dict(trained=64, factor=5.0, phases=(128, 256), steps=1, tokens_per_step=256, teach_steps=1)
    plan = long_context_runs.Plan(**sizes, n_windows=1, n_needles=1, dtype="float32")
    runs = list(long_context_runs.long_context_runs(tmp_path / "mini", seeds=1, plan=plan))
    names = [run["variant"] for run in runs]
    assert names[:6] == ["cut", *long_context_runs.UNTUNED] and len(set(names)) == len(names) == 16
    assert all(len(run["position_loss"]) == 4 for run in runs if "needle" not in run["variant"])
    assert all(run["same_text"] is False and run["config"] and run["seconds"] >= 0 for run in runs)
    assert [run["phase"]["batch"] for run in runs if "phase" in run] == [2, 1, 2, 1, 2]


def test_the_experiment_is_known_to_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_context_runs, "long_context_runs", lambda: [{"variant": "cut", "seed": 0, "seconds": 1.0}])
    assert main(["experiment", "long_context", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "long_context.json").read_text())["runs"][0]["variant"] == "cut"
    assert main(["experiment", "luck", "--out", str(tmp_path)]) == 2 and "long_context" in capsys.readouterr().err
