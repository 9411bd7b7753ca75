"""How a trained model is measured: against counts, compressors, the parser, and with gaps."""

import math
import random
from collections import Counter

import pytest
import torch

from dsv3_mini.baseline import LanguageModel, next_token_loss
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, Corpus, encode, pack, train_tokenizer
from dsv3_mini.dataset import Dataset
from dsv3_mini.evaluate import (
    complete_statements,
    compressed_bits_per_byte,
    continue_ids,
    continue_together,
    evaluate,
    function_heads,
    gaps,
    infill_exact_match,
    is_python,
    next_token_accuracy,
    ngram_writer,
    valid_share,
    validation_loss,
    would_write,
    write_together,
    writer,
)
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.ngrams import NGrams, first_choices


def tiny(cls):
    torch.manual_seed(0)
    return cls(ModelConfig.preset("nano", vocab_size=300, hidden_size=16, num_hidden_layers=2, initializer_range=0.3))


def test_ngrams_follow_the_discounted_recursion():
    windows = torch.randint(0, 7, (5, 11), generator=torch.Generator().manual_seed(0))
    model, rows = NGrams(windows, 7, order=3), windows.tolist()

    def chance(context, word):
        if context is None:
            return 1 / 7
        n = len(context) + 1
        grams = Counter(tuple(row[i : i + n]) for row in rows for i in range(12 - n))
        after = {gram[-1]: count for gram, count in grams.items() if gram[:-1] == context}
        lower = chance(context[1:] if context else None, word)
        if not after:
            return lower
        return (max(after.get(word, 0) - 0.75, 0) + 0.75 * len(after) * lower) / sum(after.values())

    found = model.log_probabilities(windows[:2])
    for row, nats in zip(rows, found.tolist(), strict=False):
        wanted = [math.log(chance(tuple(row[max(0, i - 2) : i]), row[i])) for i in range(1, 11)]
        assert nats == pytest.approx(wanted, rel=1e-4)


def test_ngram_chances_sum_to_one_after_seen_and_unseen_contexts():
    train = torch.randint(0, 5, (3, 9), generator=torch.Generator().manual_seed(1))
    model = NGrams(train, 5, order=4)
    for context in ([0, 1, 2], [4, 4, 4], [3, 3, 0]):
        windows = torch.tensor([[*context, word] for word in range(5)])
        assert model.log_probabilities(windows)[:, -1].exp().sum() == pytest.approx(1, rel=1e-5)


def test_a_vocabulary_too_large_for_ngrams_is_refused():
    with pytest.raises(ValueError, match="10000\\^5 exceeds 64 bits"):
        NGrams(torch.zeros(1, 9, dtype=torch.long), 10000)


def test_windows_shorter_than_the_ngrams_are_refused():
    windows = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="windows of 3 tokens hold no 4-grams"):
        NGrams(windows, 7, order=5)
    with pytest.raises(ValueError, match="windows of 2 tokens hold no 3-grams"):
        NGrams(windows, 7, order=3).log_probabilities(windows[:, :2])


def test_validation_loss_weighs_the_short_last_batch_by_its_size():
    model, windows = tiny(LanguageModel), torch.randint(5, 300, (7, 9))
    assert validation_loss(model, windows, 3, 7) == pytest.approx(next_token_loss(model, windows).item(), rel=1e-5)


def test_accuracy_counts_first_choices():
    model, windows = tiny(LanguageModel), torch.randint(5, 300, (5, 9))
    windows[1:3, 1:] = model(windows[1:3, :-1]).argmax(-1)  # not their own continuation, so only position 1 must hit
    choice = model(windows[:, :-1]).argmax(-1)
    wanted = sum(choice[i, j] == windows[i, j + 1] for i in range(5) for j in range(8)) / 40
    assert wanted > 0 and next_token_accuracy(model, windows, 2) == pytest.approx(float(wanted))


def test_compressors_find_repetition_but_not_in_noise():
    noise = "".join(random.Random(0).choices("0123456789abcdef", k=4000))
    assert compressed_bits_per_byte(["spam " * 800])["gzip"] < 0.2
    assert 4 <= compressed_bits_per_byte([noise])["xz"] < 5


@pytest.mark.parametrize(
    "text, kept",
    [
        ("def f():\n    return 1\nprint(2)\n", "def f():\n    return 1\n"),
        ("def f():\n    a = 1\n\n    b = (", "def f():\n    a = 1\n\n"),
        ("def f():\n    a = 1\n# note\ndef g", "def f():\n    a = 1\n# note\n"),
        ('def f():\n    """a\nb\n    """\n    c\nd\n\n', 'def f():\n    """a\nb\n    """\n    c\n'),
        ('def f():\n    """a\nb\nc\n', 'def f():\n    """a\n'),
    ],
)
def test_completion_ends_where_the_function_does(text, kept):
    assert complete_statements(text, finished=False) == kept


def test_validity_needs_a_body_and_a_parse_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    assert is_python(f"def f():\n    open({str(marker)!r}, 'w')\n") and not marker.exists()
    assert not is_python("def f():\n    return (\n") and not is_python("def f():\n") and not is_python("def f():\n\0\n")
    assert not is_python("def f(): pass\n")
    heads = function_heads(["import os\n\ndef f(x):\n    pass\n", "x = 1\n", "def g():\n  1\ndef f(x):\n"], 5)
    assert heads == ["def f(x):\n", "def g():\n"]
    assert valid_share(lambda head: "    return 1\n    x" if "f" in head[4:6] else "    )\n\n", heads) == 0.5


def test_gaps_put_together_are_the_text():
    tokenizer, texts = train_tokenizer(["abc " * 50], 261), [f"{i} " * 60 for i in range(5)]
    found = gaps(tokenizer, ["too short", *texts], 7, 20)
    assert len(found) == 7 and all(1 <= len(middle) <= 4 for _, middle, _ in found)
    for text, (prefix, middle, suffix) in zip(texts + texts, found, strict=False):
        assert len(prefix + middle + suffix) == 20 and tokenizer.decode(prefix + middle + suffix) in text


def test_infill_asks_in_the_trained_order_and_wants_the_end(monkeypatch):
    import dsv3_mini.evaluate as module

    asked = []

    def fake(model, prompts, answers):
        asked.extend(zip(prompts, answers, strict=True))
        return [True, False, False]

    monkeypatch.setattr(module, "would_write", fake)
    found = [([5, 6], [9, 8], [7]), ([5], [9], [7]), ([5], [8], [7])]
    assert infill_exact_match(None, found) == pytest.approx(1 / 3)
    assert asked[0] == ([BOS, FIM_BEGIN, 5, 6, FIM_HOLE, 7, FIM_END], [9, 8, EOS])
    infill_exact_match(None, found, see_suffix=False)
    assert asked[4] == ([BOS, 5], [9])
    infill_exact_match(None, found, must_end=False)
    assert asked[6] == (asked[0][0], [9, 8])


def test_asking_whether_it_would_write_equals_writing():
    model, prompts = tiny(DeepSeekV3), [[0, 7, 8, 9], [0, 9], [0, 30, 7, 8, 11, 12], [0, 5], [0, 44, 5]]
    answers = [continue_ids(model, ids, n) for ids, n in zip(prompts, (3, 1, 4, 2, 2), strict=True)]
    answers[1], answers[3] = [(answers[1][0] + 1) % 300], [answers[3][0], (answers[3][1] + 1) % 300]
    written = [continue_ids(model, p, len(a)) == a for p, a in zip(prompts, answers, strict=True)]
    assert written == [True, False, True, False, True] == would_write(model, prompts, answers, 2)


def test_infill_runs_on_a_model():
    assert 0 <= infill_exact_match(tiny(DeepSeekV3), [([7, 8], [9], [10])]) <= 1


def test_continuing_is_greedy_decoding_of_the_uncached_model_and_a_seeded_draw():
    model, ids = tiny(DeepSeekV3), [7, 8, 9]
    for _ in range(6):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    new = continue_ids(model, [7, 8, 9], 6)
    assert new == ids[3 : 3 + len(new)] and (len(new) == 6 or new[-1] == model.config.eos_token_id)
    draws = [continue_ids(model, [7, 8, 9], 6, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("ids, temperature", [([], 0.0), ([5], -1.0)])
def test_nothing_to_continue_and_a_negative_temperature_are_refused(ids, temperature):
    with pytest.raises(ValueError, match=f"{len(ids)} ids and temperature={temperature}"):
        continue_ids(tiny(DeepSeekV3), ids, 2, temperature)


@pytest.mark.parametrize("cls", [DeepSeekV3, LanguageModel])
def test_continuing_together_is_continuing_alone_up_to_the_end_token(cls):
    model, prompts = tiny(cls), [[0, 7, 8, 9], [0, 9], [0, 30, 7, 8, 11, 12, 13]]
    alone = [continue_ids(model, ids, 9) for ids in prompts]
    assert continue_together(model, prompts, 9) == alone
    model.config = model.config.replace(eos_token_id=alone[0][4])
    shorter = [continue_ids(model, ids, 9) for ids in prompts]
    assert continue_together(model, prompts, 9) == shorter and len(shorter[0]) <= 5


def test_first_choices_are_the_commonest_followers_of_the_longest_known_context():
    windows = torch.randint(0, 4, (6, 12), generator=torch.Generator().manual_seed(2))
    rows = windows[:4].tolist()
    found = first_choices(NGrams(windows[:4], 4, order=3), windows).tolist()
    for row, choices in zip(windows.tolist(), found, strict=True):
        for i in range(1, 12):
            for n in (2, 1, 0):  # tokens of context
                context = row[i - n : i]
                after = Counter(r[j] for r in rows for j in range(n, 12) if r[j - n : j] == context)
                if i >= n and after:
                    break
            assert choices[i - 1] == max(after, key=lambda token: (after[token], token))


def test_evaluation_at_once_equals_evaluation_one_by_one():
    texts = [f"def f{i}(a, b):\n    return a + {i} * b\n\n\nprint(f{i}({i}, 2))\n" * 6 for i in range(9)]
    tokenizer = train_tokenizer(texts, 290)
    train, valid = (pack(encode(tokenizer, part), 24) for part in (texts[:6], texts[6:]))
    data = Dataset(tokenizer, train, valid, 2.0, Corpus("x", texts[:6], texts[6:], ""))
    model, heads = tiny(DeepSeekV3), function_heads(texts[6:], 3)
    results = evaluate(model, data, n_heads=3, n_gaps=7)
    alone = {head: writer(model, tokenizer)(head) for head in heads}
    assert write_together(model, tokenizer, heads) == alone
    five, holes = NGrams(train, 300, 5), gaps(tokenizer, texts[6:], 7, valid.shape[1] // 2)
    hits = [continue_ids(model, [BOS, *prefix], len(middle)) == middle for prefix, middle, _ in holes]
    assert results["gap filled"]["model, left to right"] == sum(hits) / 7
    assert results["body parses"]["5-gram"] == valid_share(ngram_writer(five, tokenizer), heads)
    assert results["bits per byte"]["model"] > results["bits per byte"]["unigram"] > results["bits per byte"]["5-gram"]
    assert results["next token"]["5-gram"] > results["next token"]["unigram"] and len(results["gap filled"]) == 4


def test_text_without_functions_or_room_for_gaps_is_refused():
    texts = ["Nothing here is a function. " * 9 for _ in range(3)]
    tokenizer = train_tokenizer(texts, 290)
    windows = pack(encode(tokenizer, texts), 24)
    data = Dataset(tokenizer, windows, windows, 2.0, Corpus("prose", texts, texts, ""))
    with pytest.raises(ValueError, match="prose has 0 function heads and 3 texts"):
        evaluate(tiny(DeepSeekV3), data, n_gaps=3)
