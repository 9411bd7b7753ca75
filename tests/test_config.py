import json
import math

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config

from dsv3_mini.config import PRESETS, ModelConfig

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
NANO = ModelConfig.preset("nano")

V3_FILE = {  # the published config.json, field for field
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE_FILE = V3_FILE | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
del V2_LITE_FILE["quantization_config"], V2_LITE_FILE["num_nextn_predict_layers"], V2_LITE_FILE["ep_size"]


def same_model(a, b):
    """Equal but for what leaves the model as it is."""
    free = dict(auto_map=None, transformers_version=None, architectures=("Any",))
    return a.replace(**free) == b.replace(**free)


def test_the_published_v3_file_is_the_preset():
    assert same_model(ModelConfig.from_dict(V3_FILE), ModelConfig.preset("v3"))
    assert json.loads(json.dumps(ModelConfig.from_dict(V3_FILE).to_dict())).items() >= V3_FILE.items()


def test_the_published_v2_lite_file_is_the_preset_and_has_no_mtp_layer():
    config = ModelConfig.from_dict(V2_LITE_FILE)
    assert same_model(config, ModelConfig.preset("v2-lite"))
    assert config.num_nextn_predict_layers == 0


def test_the_v31_file_with_its_scale_format_opens():
    v31 = V3_FILE | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}
    assert ModelConfig.from_dict(v31).quantization_config["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_round_trip_through_its_file(name, tmp_path):
    config = ModelConfig.preset(name)
    config.save_pretrained(tmp_path)
    assert ModelConfig.from_pretrained(tmp_path) == config == ModelConfig.from_dict(config.to_dict())


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(scaling, tmp_path):
    config = ModelConfig.preset("v3", num_hidden_layers=7, num_nextn_predict_layers=2, rope_scaling=scaling)
    theirs = DeepseekV3Config.from_dict(config.to_dict())
    theirs.save_pretrained(tmp_path)
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())
    assert same_model(ModelConfig.from_pretrained(tmp_path), config)


def test_transformers_default_config_opens(tmp_path):
    DeepseekV3Config().save_pretrained(tmp_path)
    saved, unsaved = ModelConfig.from_pretrained(tmp_path), ModelConfig.from_dict(DeepseekV3Config().to_dict())
    assert saved.rope_scaling is None
    assert same_model(unsaved, saved)


def test_what_transformers_writes_for_v2_opens_as_v2(tmp_path):
    config = ModelConfig.preset("v2-lite")
    DeepseekV2Config.from_dict(config.to_dict()).save_pretrained(tmp_path)
    back = ModelConfig.from_pretrained(tmp_path)
    assert same_model(back, config)


def test_both_spellings_of_rope_say_the_same():
    new = {k: v for k, v in V3_FILE.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {("rope_type" if k == "type" else k): v for k, v in YARN.items()} | {"rope_theta": 10000.0}
    halfway = V3_FILE | {"rope_scaling": YARN | {"rope_type": "yarn"}}
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(halfway) == ModelConfig.from_dict(V3_FILE)
    both = V3_FILE | {"rope_parameters": new["rope_parameters"]}
    assert ModelConfig.from_dict(both) == ModelConfig.from_dict(V3_FILE)


def test_theta_beside_rope_parameters_is_read():
    beside = {k: v for k, v in V3_FILE.items() if k != "rope_scaling"} | {"rope_theta": 500, "rope_parameters": {}}
    assert ModelConfig.from_dict(beside).rope_theta == 500 and ModelConfig.from_dict(beside).rope_scaling is None


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_parameters says rope_scaling="),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters says rope_scaling=None"),
        ({"rope_parameters": YARN | {"rope_theta": 5}}, "rope_parameters says rope_theta=5, elsewhere it is 10000"),
        ({"rope_parameters": [4]}, "rope_parameters=\\[4\\]"),
        ({"rope_scaling": YARN | {"rope_type": "linear"}}, "rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3'"),
        ({"rope_scaling": {"factor": 40}}, "rope_scaling="),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"num_mtp_layers": 2}, "num_mtp_layers=2 contradicts num_nextn_predict_layers=1"),
        ({"dtype": "float32"}, "dtype='float32' contradicts torch_dtype='bfloat16'"),
        ({"architectures": "DeepseekV3ForCausalLM"}, "architectures="),
        ({"model_type": "deepseek"}, "model_type='deepseek'"),
        ({"hidden_size": None}, "hidden_size=None"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_by_name(extra, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict(V3_FILE | extra)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_group": 3}, "n_group=3"),
        ({"topk_group": 9}, "topk_group=9"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"n_group": 16, "topk_group": 16}, "n_group=16"),
        ({"hidden_size": "128"}, "hidden_size='128'"),
        ({"hidden_size": 1.5}, "hidden_size=1.5"),
        ({"hidden_size": -128}, "hidden_size=-128"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
        ({"q_lora_rank": -1}, "q_lora_rank=-1"),
        ({"q_lora_rank": True}, "q_lora_rank=True"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1"),
        ({"first_k_dense_replace": 9}, "first_k_dense_replace=9"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"num_key_value_heads": "4"}, "num_key_value_heads='4'"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob='false'"),
        ({"use_cache": None}, "use_cache=None"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"eos_token_id": 1024}, "eos_token_id=1024"),
        ({"eos_token_id": [1, 2]}, "eos_token_id=[1, 2]"),
        ({"bos_token_id": -1}, "bos_token_id=-1"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan"),
        ({"rope_theta": math.inf}, "rope_theta=inf"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        ({"aux_loss_alpha": -0.1}, "aux_loss_alpha=-0.1"),
        ({"torch_dtype": "bf16"}, "torch_dtype='bf16'"),
        ({"scoring_func": "tanh"}, "scoring_func='tanh'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"topk_method": None}, "topk_method=None"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"architectures": ("A", 1)}, "architectures=('A', 1)"),
        ({"rope_scaling": 4}, "rope_scaling=4"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling="),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling['factor']=0"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling['factor']=0.5"),
        ({"rope_scaling": YARN | {"factor": "40"}}, "rope_scaling['factor']='40'"),
        ({"rope_scaling": YARN | {"factor": math.nan}}, "rope_scaling['factor']=nan"),
        ({"rope_scaling": YARN | {"factor": None}}, "rope_scaling['factor']=None"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 4096.5}}, "4096.5"),
        ({"rope_scaling": YARN | {"beta_fast": 1}}, "rope_scaling['beta_fast']=1"),
        ({"rope_scaling": YARN | {"beta_slow": 0}}, "rope_scaling['beta_slow']=0"),
        ({"rope_scaling": YARN | {"mscale_all_dim": -1}}, "rope_scaling['mscale_all_dim']=-1"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "rope_scaling['attention_factor']=2.0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, "weight_block_size"),
        ({"quantization_config": FP8 | {"scale_fmt": "e4m3"}}, "scale_fmt"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contradiction_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match="^ModelConfig: ") as caught:
        ModelConfig.preset("nano", **change)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ValueError, match="hidden_size=0.*n_group=-1.*hidden_act='gelu'"):
        NANO.replace(hidden_size=0, n_group=-1, hidden_act="gelu")


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="nano, mini, v2-lite, v3"):
        ModelConfig.preset("huge")


def test_key_value_heads_follow_the_heads():
    assert NANO.replace(num_attention_heads=6).num_key_value_heads == 6
    assert ModelConfig.preset("v3", num_attention_heads=6).num_key_value_heads == 6
    assert ModelConfig.from_dict(V3_FILE | {"num_key_value_heads": None}).num_key_value_heads == 128


def test_changing_a_config_in_place_leaves_the_preset_alone():
    ModelConfig.preset("v3").rope_scaling["factor"] = 1
    assert ModelConfig.preset("v3").rope_scaling["factor"] == 40


def test_mtp_layers_are_mixture_layers():
    assert [ModelConfig.preset("v3").is_moe(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert ModelConfig.preset("v3").n_moe_layers == 58 and ModelConfig.preset("v3").qk_head_dim == 192


@pytest.mark.parametrize("name", ["nano", "mini", "v3"])
def test_dense_layers_are_as_wide_as_what_a_token_visits(name):
    c = ModelConfig.preset(name)
    assert c.intermediate_size == (c.num_experts_per_tok + c.n_shared_experts) * c.moe_intermediate_size


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", "\xff", '{"model_type": "llama"}', '{"model_type": "deepseek_v3", "n_group": 7}']
)
def test_a_bad_file_is_one_error_that_names_it(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file"):
        NANO.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
