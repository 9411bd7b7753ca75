"""How a trained model is measured: against counts, compressors, the parser, and with gaps."""

import math
import random
from collections import Counter

import pytest
import torch

from dsv3_mini.baseline import LanguageModel, next_token_loss
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import train_tokenizer
from dsv3_mini.evaluate import (
    NGrams,
    complete_statements,
    compressed_bits_per_byte,
    continue_ids,
    function_heads,
    gaps,
    infill_exact_match,
    is_python,
    next_token_accuracy,
    valid_share,
    validation_loss,
)
from dsv3_mini.model import DeepSeekV3


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
    ],
)
def test_completion_ends_where_the_function_does(text, kept):
    assert complete_statements(text, finished=False) == kept


def test_validity_needs_a_body_and_a_parse_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    assert is_python(f"def f():\n    open({str(marker)!r}, 'w')\n") and not marker.exists()
    assert not is_python("def f():\n    return (\n") and not is_python("def f():\n") and not is_python("def f():\n\0\n")
    assert not is_python("def f(): pass\n")
    heads = function_heads(["import os\n\ndef f(x):\n    pass\n", "x = 1\n", "def g():\n  1\n"], 5)
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

    def fake(model, ids, new_tokens):
        asked.append(ids)
        return [9, 8, 1][:new_tokens]

    monkeypatch.setattr(module, "continue_ids", fake)
    found = [([5, 6], [9, 8], [7]), ([5], [9], [7]), ([5], [8], [7])]
    assert infill_exact_match(None, found) == pytest.approx(1 / 3)  # the second goes on past its gap
    assert asked[0] == [0, 3, 5, 6, 2, 7, 4]
    assert infill_exact_match(None, found, see_suffix=False) == pytest.approx(2 / 3) and asked[3] == [0, 5, 6]


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
