"""The command line as a stranger uses it: what it prints, what it writes, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsv3_mini.__main__ import main
from dsv3_mini.model import DeepSeekV3

ROOT = Path(__file__).resolve().parent.parent
POEM = "def greet(name):\n    return 'hello ' + name\n\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"part_{i}.py").write_text(POEM * 20 + f"x_{i} = {i * 7919}\n" * 60)
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "nano"
    assert main([*train_on(text), "--steps", "6", "--checkpoint-every", "3", "--out", str(out)]) == 0
    return out


def train_on(folder):
    return ["train", "--data", str(folder), "--batch-size", "4", "--seq-len", "32"]


def refusal(arguments, capsys):
    """The one line that a bad request gets."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_cost_prints_the_published_bill(capsys):
    assert main(["cost"]) == 0
    printed = capsys.readouterr().out
    for figure in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "70,272", "250.46"):
        assert figure in printed


def test_train_writes_a_log_and_a_folder_that_opens_here_and_in_transformers(trained):
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 7))
    assert {"loss", "tokens", "tokens_per_second"} <= log[-1].keys() and "valid_bits_per_byte" in log[-1]
    ids = torch.tensor([AutoTokenizer.from_pretrained(trained)("def greet(")["input_ids"]])
    theirs, ours = AutoModelForCausalLM.from_pretrained(trained), DeepSeekV3.from_pretrained(trained)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_generate_prints_the_prompt_and_a_continuation(trained, capsys):
    command = ["generate", "--checkpoint", str(trained), "--max-new-tokens", "12", "def greet("]
    assert main(command) == 0
    plain = capsys.readouterr()
    assert plain.out.startswith("def greet(") and "12 tokens" in plain.err
    assert main([*command, "--speculative"]) == 0
    assert capsys.readouterr().out == plain.out


def test_training_can_be_resumed_only_where_something_was_trained(trained, text, tmp_path, capsys):
    assert "resume" in refusal([*train_on(text), "--out", tmp_path, "--resume"], capsys)
    assert "already holds a run" in refusal([*train_on(text), "--out", trained], capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--preset", "giant"], "giant"),
        (["--steps", "-1"], "steps"),
        (["--batch-size", "0"], "batch_size"),
        (["--batch-size", "100000"], "batch_size"),
        (["--seq-len", "0"], "seq_len"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--checkpoint-every", "0"], "checkpoint_every"),
        (["--data", "nowhere"], "nowhere"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_train_refuses_in_one_line_and_writes_nothing(arguments, named, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert named in refusal([*train_on(text), "--out", out, *arguments], capsys)
    assert not out.exists() or not list(out.iterdir())


def test_train_refuses_an_output_that_is_a_file_and_a_corpus_that_is_empty(text, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "file" in refusal([*train_on(text), "--out", file], capsys) and file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal([*train_on(tmp_path / "empty"), "--out", tmp_path / "out"], capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--checkpoint", "nowhere", "hello"], "nowhere"),
        (["--checkpoint", "TRAINED", ""], "prompt"),
        (["--checkpoint", "TRAINED", "--max-new-tokens", "-3", "hello"], "max_new_tokens"),
        (["--checkpoint", "TRAINED", "--max-new-tokens", "5000", "hello"], "max_position_embeddings"),
        (["--checkpoint", "TRAINED", "--temperature", "-1", "hello"], "temperature"),
        (["--checkpoint", "TRAINED", "--top-p", "0", "hello"], "top_p"),
    ],
    ids=lambda value: "-".join(value[2:]).strip("-") if isinstance(value, list) else "",
)
def test_generate_refuses_in_one_line(arguments, named, trained, capsys):
    assert named in refusal(["generate", *(str(trained) if a == "TRAINED" else a for a in arguments)], capsys)


def test_a_torn_checkpoint_is_named(trained, tmp_path, capsys):
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / file).write_bytes((trained / file).read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    assert "model.safetensors" in refusal(["generate", "--checkpoint", tmp_path, "hello"], capsys)


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "deepseek_v3", "n_group": 3}'])
def test_cost_names_a_malformed_or_contradictory_config(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    assert "config.json" in refusal(["cost", "--config", tmp_path], capsys)


def test_experiment_and_bench_refuse_what_they_do_not_know(tmp_path, capsys):
    assert "alchemy" in refusal(["experiment", "alchemy", "--out", tmp_path], capsys)
    assert "rounds" in refusal(["bench", "--rounds", "0"], capsys)
    assert "giant" in refusal(["bench", "--preset", "giant"], capsys)


def test_the_process_ends_with_code_2_and_no_traceback():
    command = [sys.executable, "-m", "dsv3_mini", "train", "--steps", "-1", "--out", "never-made"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2 and "Traceback" not in run.stderr and not (ROOT / "never-made").exists()


def test_public_names_are_functions_and_classes_whatever_was_imported_first():
    code = "import dsv3_mini.generate, dsv3_mini.schedule; from dsv3_mini import *; import dsv3_mini as d"
    code += "; print(all(map(callable, (getattr(d, n) for n in d.__all__))), generate.__module__, callable(simulate))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "True dsv3_mini.generate True\n", run.stderr
