"""Logged comparisons: what a file of runs holds, and that variants differ in what they say and nothing else."""

import json

import pytest
import torch

import dsv3_mini.ablations as ablations
import dsv3_mini.experiments as experiments
import dsv3_mini.step_speed as step_speed
from dsv3_mini.__main__ import main
from dsv3_mini.accounting import count_parameters
from dsv3_mini.config import ModelConfig
from dsv3_mini.recipe import sequences_before


def recorded(monkeypatch, runs):
    """The options of every run that a generator asks for, without training."""
    asked = []
    monkeypatch.setattr(
        ablations, "recipe_run", lambda variant, seed, **changes: asked.append((variant, seed, changes))
    )
    list(runs(seeds=2))
    return asked


def test_unknown_experiment_is_one_line(tmp_path, capsys):
    assert main(["experiment", "luck", "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "unknown experiment 'luck'; choose one of attention" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("runs", [ablations.nano_runs, ablations.mini_runs, ablations.plain_runs])
def test_a_run_that_is_not_there_is_named_with_the_command_that_makes_it(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*run.json: `python -m dsv3_mini train --out .*none` makes"):
        list(runs(str(tmp_path / "none")))


def test_log_holds_machine_versions_and_every_run_or_does_not_appear(tmp_path, monkeypatch):
    def two():
        yield {"variant": "a", "seed": 0}
        yield {"variant": "b", "seed": 0}

    def broken():
        yield {"variant": "a", "seed": 0}
        raise FloatingPointError("loss nan")

    monkeypatch.setattr(experiments, "EXPERIMENTS", {"two": two, "broken": broken})
    logged = json.loads(experiments.run_experiment("two", tmp_path).read_text())
    assert [run["variant"] for run in logged["runs"]] == ["a", "b"]
    assert logged["versions"]["torch"] == torch.__version__ and set(logged["machine"]) >= {"system", "threads"}
    with pytest.raises(FloatingPointError):
        experiments.run_experiment("broken", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["two.json"]


def test_a_run_is_measured_on_text_it_has_not_read(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.py").write_text("".join(f"def f{i}(x):\n    return x * {j * i}\n" for j in range(40)))
    small = {"steps": 3, "data": str(tmp_path), "batch_size": 5, "seq_len": 32, "fim_rate": 0.5}
    run = ablations.recipe_run("x", 3, **small)
    assert run["seed"] == 3 and run["options"]["fim_rate"] == 0.5 and run["n_activated"] < run["n_parameters"]
    assert 0 <= run["infill"] <= 1 and 0 <= run["accuracy"] < 1 and 1 < run["valid_bits_per_byte"] < 8
    assert run["tokens"] == sequences_before(3, 3, 5) * 32


def test_dense_models_match_the_mixture_they_are_compared_with(monkeypatch):
    asked = {variant: changes["model"] for variant, _, changes in recorded(monkeypatch, ablations.dense_runs)}
    counts = {name: count_parameters(ModelConfig.preset("nano", **model)) for name, model in asked.items()}
    mixture = counts["experts"]
    gates = sum(mixture.by_component["gates"])  # the only part that a dense model lacks
    assert abs(counts["dense, equal activated"].total - mixture.activated) <= gates
    assert abs(counts["dense, equal total"].total - mixture.total) <= gates


@pytest.mark.parametrize("name", ["mtp_runs", "fim_runs", "gate_runs", "dense_runs", "speed_of_bias_runs"])
def test_variants_share_seeds_and_differ(monkeypatch, name):
    asked = recorded(monkeypatch, getattr(ablations, name))
    variants = [{v: str(c) for v, s, c in asked if s == seed} for seed in (0, 1)]
    assert variants[0] == variants[1] and len(set(variants[0].values())) == len(variants[0]) > 1


def test_both_sides_of_the_speed_test_start_from_the_same_loss():
    from dsv3_mini.bench import transformers_twin
    from dsv3_mini.losses import training_losses
    from dsv3_mini.model import DeepSeekV3

    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig.preset("nano", num_nextn_predict_layers=0, initializer_range=0.1))
    windows, twin = torch.randint(5, 1024, (2, 18)), transformers_twin(model)
    theirs = twin(windows[:, :-1], labels=windows[:, :-1], shift_labels=windows[:, 1:].contiguous()).loss
    torch.testing.assert_close(training_losses(model, windows, False, False)[0]["loss"], theirs)
    before = [p.detach().clone() for p in (*model.parameters(), *twin.parameters())]
    for side, net in ((step_speed.our_step, model), (step_speed.their_step, twin)):
        assert side(net, windows, torch.float32)() == 34
    after = [*model.parameters(), *twin.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 0.9 * len(after)
