"""The bill of a run against files and closed forms, and the run itself: whole folders, one plan, every seam."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dsv3_mini.whole_system as whole_system
from dsv3_mini.__main__ import main
from dsv3_mini.bill import fp8_checkpoint_bytes, make_bill, training_flops_per_token
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.phases import Plan
from dsv3_mini.resume import unique_tensors
from dsv3_mini.whole_system import run_phase, run_system

SIZES = dict(vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=24)
SIZES |= dict(kv_lora_rank=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
TINY = Plan(model=SIZES, max_bytes=120_000, steps=2, batch_size=4, seq_len=24, pipeline=1, experts=1, new_tokens=5)
TINY = replace(TINY, extend_steps=1, extend_batch=2, redundant=4, lessons=48, rewarded_steps=1)


def test_the_bill_of_v3_is_that_of_the_published_files():
    v3 = ModelConfig.preset("v3")
    assert fp8_checkpoint_bytes(v3) == 688_574_839_360
    assert training_flops_per_token(v3, 4096) == pytest.approx(260.6e9, rel=1e-3)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_bill_is_what_the_files_hold(tmp_path, depth):
    config = ModelConfig.preset("nano", **SIZES, num_nextn_predict_layers=depth)
    model = DeepSeekV3(config)
    model.save_pretrained(tmp_path, torch.float8_e4m3fn)
    bill = make_bill(config, tokens=1000, context=24, rate=1e9)
    assert bill.checkpoint_bytes == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert bill.parameters == sum(t.numel() for t in unique_tensors(model).values())
    assert bill.seconds == 1000 * training_flops_per_token(config, 24) / 1e9


def fake(monkeypatch, **phases):
    monkeypatch.setattr(whole_system, "PHASES", phases)


def test_a_phase_that_fails_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def breaks(plan, folder, out):
        (out / "half").write_text("half")
        raise FloatingPointError("loss nan")

    fake(monkeypatch, one=breaks)
    with pytest.raises(FloatingPointError):
        run_phase("one", TINY, tmp_path)
    assert not (tmp_path / "one").exists()
    fake(monkeypatch, one=lambda plan, folder, out: {"found": [file.name for file in out.iterdir()]})
    assert run_phase("one", TINY, tmp_path)["found"] == [] and not (tmp_path / "one.partial").exists()


def test_a_stopped_run_goes_on_and_finished_phases_are_only_read(tmp_path, monkeypatch):
    calls = []
    fake(monkeypatch, **{name: lambda plan, folder, out, name=name: calls.append(name) or {} for name in ("a", "b")})
    run_system(TINY, tmp_path / "run")
    (tmp_path / "run/b").rename(tmp_path / "moved")
    run_system(TINY, tmp_path / "run")
    assert calls == ["a", "b", "b"]


def test_a_folder_of_another_plan_is_refused_by_name(tmp_path, monkeypatch):
    fake(monkeypatch, one=lambda plan, folder, out: {})
    run_system(TINY, tmp_path / "run")
    with pytest.raises(ValueError, match="begun with steps=2, factor=4.0; continue"):
        run_system(replace(TINY, steps=3, factor=2.0), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="files of something else"):
        run_system(TINY, tmp_path / "other")


def test_processor_seconds_of_other_processes_are_added(tmp_path, monkeypatch):
    fake(monkeypatch, one=lambda plan, folder, out: {"ranks": [{"processor": 30.0}, {"processor": 12.5}]})
    entry = run_phase("one", TINY, tmp_path)
    assert 42.5 <= entry["processor"] < 44 and entry["seconds"] < 5


def test_the_command_line_knows_this_chapters_experiments(tmp_path, capsys):
    assert main(["experiment", "luck", "--out", str(tmp_path)]) == 2
    assert "ledger, sparse_attention, whole_system" in capsys.readouterr().err


def test_the_whole_run_in_small(tmp_path, monkeypatch):
    fake(monkeypatch, **{name: phase for name, phase in whole_system.PHASES.items() if name != "kernels"})
    results = run_system(TINY, tmp_path / "run")
    bill = make_bill(TINY.options().config(), TINY.tokens, TINY.seq_len, 1e9)
    assert results["pre-training"]["tokens"] == bill.tokens and results["checkpoint"]["bytes"] == bill.checkpoint_bytes
    assert results["serving"]["cache_bytes_per_token"] == bill.cache_bytes_per_token
    assert results["checkpoint"]["transformers_distance"] < 1e-5 < results["checkpoint"]["fp8_distance"] < 0.1
    assert 1 <= results["placement"]["placed"] <= results["placement"]["in_order"]
    assert len(results["context"]["losses"]) == TINY.extend_steps
    served = DeepSeekV3.from_pretrained(tmp_path / "run" / "post-training")
    assert served.config.rope_scaling["factor"] == 4.0 and len(served.mtp_layers) == 1
    assert set(json.loads((tmp_path / "run/serving/text.json").read_text())) == {"prompt", "context", "post-training"}
    assert set(results["post-training"]["right"]) == {"base", "sft", "grpo"}
