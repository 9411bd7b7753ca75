"""The published layout: round trips, transformers in both directions, FP8, damaged folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dsv3_mini.checkpoint as checkpoint
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3

IDS = torch.arange(11)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DeepSeekV3(ModelConfig.preset("nano", initializer_range=0.05))


@pytest.mark.parametrize("limit", [5 * 10**9, 300_000])
def test_a_round_trip_gives_the_same_logits(model, tmp_path, limit):
    model.save_pretrained(tmp_path, max_shard_bytes=limit)
    again = DeepSeekV3.from_pretrained(tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert again.model.layers[4].embed_tokens is again.model.embed_tokens


def test_experts_are_stored_one_by_one_under_the_published_names(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    expert = stored["model.layers.2.mlp.experts.7.up_proj.weight"]
    assert torch.equal(expert, model.model.layers[2].mlp.experts.gate_up_proj[7, 64:])
    for name in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"):
        assert f"model.layers.4.{name}.weight" in stored


def test_bfloat16_keeps_routing_biases_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = DeepSeekV3.from_pretrained(tmp_path)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert again.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_transformers_opens_ours_and_we_open_what_it_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.allclose(theirs(IDS).logits, model(IDS), atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = DeepSeekV3.from_pretrained(tmp_path / "theirs")
    assert torch.equal(back(IDS), model(IDS)) and not back.mtp_layers


def test_a_float8_weight_is_multiplied_by_its_scale_not_divided(tmp_path):
    weight = torch.randn(576, 200) * torch.logspace(-3, 3, 576)[:, None]
    scale = torch.stack([block.abs().amax() for block in weight.split(128)])[:, None].expand(5, 2) / 448
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:576, :200]
    save_file(
        {"w": (weight / spread).to(torch.float8_e4m3fn), "w_scale_inv": scale.contiguous()},
        tmp_path / "model.safetensors",
    )
    read = checkpoint.Reader(tmp_path).read("w")
    assert ((read - weight).abs() <= 0.0626 * weight.abs() + spread * 2**-10).all()


def damage(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("lm_head.weight"), "lacks 1 tensors: lm_head.weight"),
        (lambda t: t.update(stranger=torch.zeros(1)), "unexpected 1 tensors: stranger"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), "model.norm.weight has shape"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(model, tmp_path, change, named):
    model.save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=named):
        DeepSeekV3.from_pretrained(tmp_path)


def test_a_torn_file_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.safetensors is not a whole"):
        DeepSeekV3.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=300_000)
    first = sorted(set(json.loads((tmp_path / checkpoint.INDEX).read_text())["weight_map"].values()))[0]
    (tmp_path / first).unlink()
    with pytest.raises(FileNotFoundError, match=first):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no-such-folder", "./nobody/nothing", "nobody/nothing"])
def test_what_is_neither_folder_nor_reachable_hub_id_is_one_error(name):
    with pytest.raises(FileNotFoundError, match="nothing|no-such-folder"):
        DeepSeekV3.from_pretrained(name)


def test_a_failed_save_leaves_the_old_checkpoint_and_no_partial_file(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="space"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_single_file_replaces_shards_and_shards_a_single_file(model, tmp_path):
    for limit in (300_000, 5 * 10**9, 300_000):
        model.save_pretrained(tmp_path, max_shard_bytes=limit)
        assert torch.equal(DeepSeekV3.from_pretrained(tmp_path)(IDS), model(IDS))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(model, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out is a file"):
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
