"""The bench measures what it says, on the same weights, and writes it whole or not at all."""

import json
import time

import pytest
import torch
from tokenizers import Tokenizer

from dsv3_mini.bench import (
    bench_prompt,
    bytes_per_token,
    compare_with_transformers,
    decoding_only,
    decoding_sides,
    open_model,
    time_in_turn,
    transformers_twin,
)
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import python_corpus, train_tokenizer
from dsv3_mini.decode import DecodePlan
from dsv3_mini.generate import generate
from dsv3_mini.model import DeepSeekV3


def test_sides_are_measured_in_turn_after_a_warm_up_and_the_median_counts():
    calls, seconds = [], iter((9, 9, 1, 2, 5, 2, 1, 2))
    sides = {name: (lambda name=name: (calls.append(name), (10, next(seconds)))[1]) for name in ("a", "b")}
    assert time_in_turn(sides, rounds=3) == {"a": 10.0, "b": 5.0}
    assert calls == ["a", "b"] * 4


def test_the_clock_starts_after_prefill():
    def write(n, note):
        time.sleep(0.3)
        for _ in range(n):
            time.sleep(0.002)
            note([5])

    tokens, seconds = decoding_only(write, 20)()
    assert tokens == 20 and 0.03 < seconds < 0.25


def test_twin_computes_the_same_logits():
    model = open_model("nano", None)
    ids = torch.randint(5, 1024, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(transformers_twin(model)(ids).logits, model(ids), rtol=2e-5, atol=2e-5)


def test_both_sides_write_the_tokens_asked_for(monkeypatch):
    model, counts = DeepSeekV3(ModelConfig.preset("nano", num_hidden_layers=1)), []
    monkeypatch.setattr("dsv3_mini.bench.generate", lambda *a, **k: counts.append(generate(*a, **k).tokens.shape[1]))
    sides = decoding_sides(model, torch.tensor([[5, 6, 7]]), 4)
    measured = [side() for side in sides.values()]
    assert [tokens for tokens, _ in measured] == [4] * 5 and counts == [7] * 4
    assert all(0 < seconds < 5 for _, seconds in measured)


def test_bytes_of_a_step_count_chosen_experts_only():
    config = ModelConfig.preset("nano", num_nextn_predict_layers=0, q_lora_rank=None, first_k_dense_replace=0)
    config = config.replace(num_hidden_layers=1)
    found = bytes_per_token(DecodePlan(DeepSeekV3(config)), context=10)
    d, h, c, n, r, v, f = 128, 4, 64, 32, 16, 32, 64
    attention = d * (h * (n + 2 * r) + c + 2 * r) + h * c * (n + v) + h * v * d
    experts = 16 * d + (4 + 1) * 3 * f * d
    assert found == {"weights": 4 * (attention + experts + 1024 * d), "cache": 4 * 10 * (c + r)}


def test_a_checkpoint_is_measured_on_text_it_has_not_read_and_with_drafts(tmp_path, monkeypatch):
    corpus = python_corpus(200_000)
    monkeypatch.setattr("dsv3_mini.bench.python_corpus", lambda max_bytes: corpus)
    monkeypatch.setattr("dsv3_mini.bench.training_sides", lambda config: {"ours": lambda: 1, "transformers": lambda: 1})
    train_tokenizer(corpus.train, 1024).save(str(tmp_path / "tokenizer.json"))
    config = ModelConfig.preset("nano", num_hidden_layers=1)
    DeepSeekV3(config).save_pretrained(tmp_path)
    ids = bench_prompt(config, tmp_path, 50)
    text = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(ids[0].tolist())
    assert ids.shape == (1, 50) and "\n".join(corpus.valid).startswith(text[:-1])
    found = compare_with_transformers(checkpoint=tmp_path, rounds=1, new_tokens=5, contexts=(50,))["measured"]
    row = found["greedy decoding at 50"]
    assert 0 <= row["acceptance"] <= 1 and row["ratio"] == row["ours"] / row["transformers"]
    for side in ("speculative", "compiled", "compiled speculative"):
        assert row[f"{side.replace(' ', '_')}_ratio"] == row[side] / row["transformers"]


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    from dsv3_mini.__main__ import main

    arguments = [
        "bench",
        "--rounds",
        "1",
        "--new-tokens",
        "3",
        "--contexts",
        "5",
        "9",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert main(arguments) == 0
    written, table = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert list(written["measured"]) == ["training step", "greedy decoding at 5", "greedy decoding at 9"]
    assert written["config"]["hidden_size"] == 128 and written["versions"]["threads"] >= 1 and table.count("\n") == 4


@pytest.mark.parametrize(
    "extra", [["--rounds", "0"], ["--contexts", "2000"], ["--preset", "huge"], ["--checkpoint", "no"]]
)
def test_bad_bench_is_one_line_with_code_2(capsys, extra):
    from dsv3_mini.__main__ import main

    assert main(["bench", *extra]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_json_into_a_missing_folder_is_refused_before_any_work(tmp_path):
    from dsv3_mini.__main__ import main

    started = time.perf_counter()
    assert main(["bench", "--json", str(tmp_path / "no" / "a.json")]) == 2 and time.perf_counter() - started < 5


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="rounds=0"):
        compare_with_transformers(rounds=0)
