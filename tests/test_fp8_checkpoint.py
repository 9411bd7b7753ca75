"""The published FP8 layout: what is quantised, what is not, and that others read the same numbers in it."""

import json
from math import prod

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsv3_mini.checkpoint import INDEX, Reader
from dsv3_mini.config import ModelConfig
from dsv3_mini.fp8 import FP8Linear, runs_in_fp8, to_fp8, weight_dequant, weight_quant
from dsv3_mini.fp8_checkpoint import stored_tensors
from dsv3_mini.model import DeepSeekV3

FLOAT8 = torch.float8_e4m3fn


def nano(**changes):
    torch.manual_seed(0)
    return DeepSeekV3(ModelConfig.preset("nano", **{"num_hidden_layers": 2, "initializer_range": 0.05, **changes}))


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_scales_multiply_and_the_rest_is_bfloat16(tmp_path):
    model = nano(hidden_size=136)
    model.save_pretrained(tmp_path, FLOAT8)
    stored = load_file(tmp_path / "model.safetensors")
    opened = DeepSeekV3.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name in (n for n in stored if not n.endswith("_scale_inv")):
        fp8 = f"{name}_scale_inv" in stored
        assert fp8 == runs_in_fp8(name.removesuffix(".weight")) == (stored[name].dtype == FLOAT8)
        if fp8 and "experts." not in name:
            assert torch.equal(opened[name], weight_dequant(stored[name], stored[f"{name}_scale_inv"]))
            assert relative(opened[name], model.state_dict()[name]) < 0.03
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert stored["model.layers.2.eh_proj.weight"].dtype == stored["lm_head.weight"].dtype == torch.bfloat16


def test_config_says_what_the_release_says(tmp_path):
    nano().save_pretrained(tmp_path, FLOAT8)
    fields = json.loads((tmp_path / "config.json").read_text())
    published = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert fields["quantization_config"] == published and fields["torch_dtype"] == "bfloat16"


def test_576_rows_are_stored_with_five_rows_of_scales():
    w = 0.1 * torch.randn(576, 261, generator=torch.Generator().manual_seed(0))
    q, scale = stored_tensors("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", w, FLOAT8).values()
    assert q.shape == w.shape and scale.shape == (5, 3) and scale.dtype == torch.float32
    assert scale[4, 2] == w[512:, 256:].abs().max() / 448 and relative(weight_dequant(q, scale), w) < 0.03


def test_experts_and_the_prediction_module_are_stored_one_by_one_in_shards(tmp_path):
    model = nano()
    model.save_pretrained(tmp_path, FLOAT8, max_shard_bytes=200_000)
    reader, layers = Reader(tmp_path), model.model.layers
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for layer in (1, 2):  # the last of two layers, and the module
        name = f"model.layers.{layer}.mlp.experts.3.down_proj.weight"
        assert reader.raw(name).dtype == FLOAT8
        assert relative(reader.read(name, torch.float32), layers[layer].mlp.experts.down_proj[3]) < 0.03


def test_shards_keep_the_limit_and_hold_a_weight_beside_its_scales(tmp_path):
    nano().save_pretrained(tmp_path, FLOAT8, max_shard_bytes=300_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = {file: load_file(tmp_path / file) for file in set(index["weight_map"].values())}
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in shards.items()}
    assert sum(sizes.values()) == index["metadata"]["total_size"] and max(sizes.values()) <= 300_000
    for name, file in index["weight_map"].items():
        assert name in shards[file]
        assert not name.endswith("_scale_inv") or name.removesuffix("_scale_inv") in shards[file]


def test_bytes_are_those_of_the_formula(tmp_path):
    """m n + 4 ceil(m/128) ceil(n/128) for a projection, two bytes a number for the rest, four for a routing bias."""
    model = nano(hidden_size=136)
    model.save_pretrained(tmp_path, FLOAT8)
    stored = load_file(tmp_path / "model.safetensors")
    expected = 0
    for name in (n for n in stored if not n.endswith("_scale_inv")):
        blocks = prod(-(-n // 128) for n in stored[name].shape)
        fp8 = "_proj" in name and "eh_proj" not in name
        n = stored[name].numel()
        expected += n + 4 * blocks if fp8 else n * (4 if name.endswith("bias") else 2)
    assert sum(t.nbytes for t in stored.values()) == expected


def test_written_again_loses_nothing(tmp_path):
    nano().save_pretrained(tmp_path / "once", FLOAT8)
    first = DeepSeekV3.from_pretrained(tmp_path / "once", dtype=torch.float32)
    to_fp8(first).save_pretrained(tmp_path / "twice", FLOAT8)
    second = DeepSeekV3.from_pretrained(tmp_path / "twice", dtype=torch.float32)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_transformers_agrees_on_dequantised_weights(tmp_path, dtype, tolerance):
    nano(hidden_size=136, first_k_dense_replace=2).save_pretrained(tmp_path / "fp8", FLOAT8)
    opened = DeepSeekV3.from_pretrained(tmp_path / "fp8", dtype=dtype)
    opened.save_pretrained(tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    ids = torch.arange(50).view(2, 25)
    with torch.no_grad():
        assert opened(ids).dtype == dtype and relative(opened(ids), theirs(ids).logits) < tolerance


def test_an_opened_checkpoint_runs_in_fp8_on_the_numbers_that_were_stored(tmp_path):
    nano().save_pretrained(tmp_path, FLOAT8)
    stored = load_file(tmp_path / "model.safetensors")
    model = to_fp8(DeepSeekV3.from_pretrained(tmp_path, dtype=torch.float32))
    projections = [(name, m) for name, m in model.named_modules() if isinstance(m, FP8Linear)]
    assert len(projections) > 20 and model(torch.arange(20).view(2, 10)).isfinite().all()
    for name, module in projections:
        assert torch.equal(weight_quant(module.weight)[0].float(), stored[f"{name}.weight"].float()), name


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = nano()
    model.save_pretrained(tmp_path, FLOAT8)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("dsv3_mini.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path, FLOAT8, max_shard_bytes=200_000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_float8_is_for_saving_only(tmp_path):
    nano().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float8_e4m3fn must be None or a floating type"):
        DeepSeekV3.from_pretrained(tmp_path, FLOAT8)
