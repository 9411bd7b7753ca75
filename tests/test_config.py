import json

import pytest
from transformers import DeepseekV3Config

from dsv3_mini.config import PRESETS, ModelConfig


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_round_trip_through_its_file(name, tmp_path):
    config = ModelConfig.preset(name)
    config.save_pretrained(tmp_path)
    assert ModelConfig.from_pretrained(tmp_path) == config == ModelConfig.from_dict(config.to_dict())


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    config = ModelConfig.preset("v3", num_hidden_layers=7, num_nextn_predict_layers=2)
    theirs = DeepseekV3Config.from_dict(config.to_dict())
    theirs.save_pretrained(tmp_path)
    back = ModelConfig.from_pretrained(tmp_path)
    for name in ("hidden_size", "num_hidden_layers", "num_nextn_predict_layers", "rope_theta", "topk_group"):
        assert getattr(back, name) == getattr(config, name)
    assert back.rope_scaling.items() >= config.rope_scaling.items()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_group": 3}, "n_group=3"),
        ({"topk_group": 9}, "topk_group=9"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"hidden_size": "128"}, "hidden_size='128'"),
        ({"hidden_size": 1.5}, "hidden_size=1.5"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
        ({"q_lora_rank": -1}, "q_lora_rank=-1"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1"),
        ({"first_k_dense_replace": 9}, "first_k_dense_replace=9"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7"),
        ({"scoring_func": "tanh"}, "scoring_func='tanh'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": 4}, "rope_scaling=4"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling="),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
    ],
)
def test_a_contradiction_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match="ModelConfig") as caught:
        ModelConfig.preset("nano", **change)
    assert named in str(caught.value)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="nano, mini, v2-lite, v3"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', '{"model_type": "deepseek_v3", "n_group": 7}'])
def test_a_bad_file_is_one_error_that_names_it(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_saved_config_is_the_published_form(tmp_path):
    ModelConfig.preset("v3").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["DeepseekV3ForCausalLM"] and written["model_type"] == "deepseek_v3"
    assert written["rope_scaling"]["factor"] == 40 and written["quantization_config"]["weight_block_size"] == [128, 128]
