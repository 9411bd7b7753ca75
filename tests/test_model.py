"""The whole model against transformers, against itself with a cache, and against the published counts and names."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_mini.accounting import count_parameters
from dsv3_mini.checkpoint import published_state
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import MoE, record_routing

ODD = dict(
    vocab_size=97,
    hidden_size=60,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    q_lora_rank=28,
    kv_lora_rank=20,
    qk_nope_head_dim=14,
    qk_rope_head_dim=6,
    v_head_dim=10,
    intermediate_size=44,
    moe_intermediate_size=20,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    max_position_embeddings=128,
    num_nextn_predict_layers=0,
    initializer_range=0.15,
)
YARN = {"type": "yarn", "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
FAMILY = {
    "as published": {},
    "no q_lora": {"q_lora_rank": None},
    "yarn": {"rope_scaling": {**YARN, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn with unequal mscales": {"rope_scaling": {**YARN, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "one group": {"n_group": 1, "topk_group": 1},
    "all groups kept": {"topk_group": 4},
    "all dense": {"first_k_dense_replace": 3},
    "all experts": {"first_k_dense_replace": 0},
    "two shared experts": {"n_shared_experts": 2},
    "weights not normalised": {"norm_topk_prob": False},
    "one expert, one head": {
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
    "two shared experts, yarn, groups, no q_lora": {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "first_k_dense_replace": 2,
        "rope_scaling": {**YARN, "factor": 3.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "wide values": {"v_head_dim": 26, "routed_scaling_factor": 1.0, "rope_theta": 500.0},
}


def odd_model(seed=0, **changes):
    """A model of odd sizes, with routing biases away from zero and of both signs."""
    torch.manual_seed(seed)
    model = DeepSeekV3(ModelConfig.preset("nano", **{**ODD, **changes}))
    for _, bias in model.named_buffers():
        bias.uniform_(-0.4, 0.4)
    return model


def transformers_twin(model):
    twin = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(model.config.to_dict())).float().eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def ids_of(model, length=31, seed=1):
    return torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_same_function(model, twin, ids):
    """Logits, loss gradients of every parameter: 2e-5 relative."""
    logits, wanted = model(ids[:, :-1]), twin(ids[:, :-1]).logits
    assert distance(logits, wanted) < 2e-5
    for output in (logits, wanted):
        F.cross_entropy(output.flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(twin.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if theirs[name].grad.abs().max() > 0 or parameter.grad.abs().max() > 0:
            assert distance(parameter.grad, theirs[name].grad) < 2e-5, name


@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY.keys())
def test_logits_and_gradients_equal_transformers(changes):
    model = odd_model(**changes)
    assert_same_function(model, transformers_twin(model), ids_of(model))


@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY.keys())
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000], ids=["one file", "shards"])
def test_logits_and_gradients_equal_transformers_after_a_round_trip(tmp_path, max_shard_bytes, changes):
    model = odd_model(**changes)
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    assert_same_function(DeepSeekV3.from_pretrained(tmp_path), transformers_twin(model), ids_of(model))


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000], ids=["one file", "shards"])
def test_transformers_reads_the_same_function_from_our_folder(tmp_path, max_shard_bytes, dtype, depth):
    odd_model(num_nextn_predict_layers=depth).save_pretrained(tmp_path, dtype, max_shard_bytes=max_shard_bytes)
    twin = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = DeepSeekV3.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(model.mtp_layers) == depth
    model.model.layers, model.config = model.model.layers[:3], model.config.replace(num_nextn_predict_layers=0)
    assert_same_function(model, twin, ids_of(model))


V2_FAMILY = {
    "v2-lite": {},
    "v2 with query compression and groups": {
        "q_lora_rank": 28,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
}


@pytest.mark.parametrize("changes", V2_FAMILY.values(), ids=V2_FAMILY.keys())
def test_softmax_models_equal_transformers_deepseek_v2(changes):
    lite = {"rope_scaling": None, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"}
    sizes = {**ODD, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "qk_rope_head_dim": 8}
    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig.preset("v2-lite", **{**sizes, **lite, **changes}))
    twin = DeepseekV2ForCausalLM(DeepseekV2Config.from_dict(model.config.to_dict())).float().eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    assert distance(model(ids_of(model)), twin(ids_of(model)).logits) < 2e-5


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_cached_logits_equal_a_full_forward_at_any_cuts(cuts, batch, seed):
    model, length = odd_model(seed), sum(cuts)
    ids = torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        caches = model.new_caches(batch, length)
        pieces = torch.cat([model(piece, caches) for piece in ids.split(cuts, dim=1)], 1)
        assert distance(pieces, model(ids)) < 2e-5


def test_later_tokens_do_not_change_earlier_logits():
    model, ids = odd_model(), ids_of(odd_model())
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 1) % 97
    assert distance(model(other)[:, :20], model(ids)[:, :20]) < 2e-5


def test_parity_sees_rotated_halves_but_not_at_the_first_token(monkeypatch):
    def rotate_halves(x, rope):
        cos, sin = (torch.cat((table, table), -1)[:, None] for table in rope)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    model = odd_model()
    wanted = transformers_twin(model)(ids_of(model)).logits
    monkeypatch.setattr("dsv3_mini.mla.apply_rope", rotate_halves)
    wrong = model(ids_of(model))
    assert distance(wrong[:, 0], wanted[:, 0]) < 2e-5 < 1e-3 < distance(wrong, wanted)


def test_parity_sees_a_residual_added_twice(monkeypatch):
    model, forward = odd_model(), MoE.forward
    wanted = transformers_twin(model)(ids_of(model)).logits
    monkeypatch.setattr(MoE, "forward", lambda self, x: x + forward(self, x))
    assert distance(model(ids_of(model)), wanted) > 1e-2


@pytest.fixture(scope="module")
def giant():
    with torch.device("meta"):
        return DeepSeekV3(ModelConfig.preset("v3"))


def layer_names(i, moe):
    """Published names and shapes of one layer, as the release lists them."""
    attention = {"q_a_proj": (1536, 7168), "q_a_layernorm": (1536,), "q_b_proj": (24576, 1536), "o_proj": (7168, 16384)}
    attention |= {"kv_a_proj_with_mqa": (576, 7168), "kv_a_layernorm": (512,), "kv_b_proj": (32768, 512)}
    mlp = {("gate_proj", "up_proj"): lambda w: (w, 7168), ("down_proj",): lambda w: (7168, w)}
    shapes = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    shapes |= {f"{name}_layernorm.weight": (7168,) for name in ("input", "post_attention")}
    experts = [("mlp.shared_experts", 2048), *((f"mlp.experts.{e}", 2048) for e in range(256))]
    for stem, width in experts if moe else [("mlp", 18432)]:
        shapes |= {f"{stem}.{name}.weight": shape(width) for names, shape in mlp.items() for name in names}
    if moe:
        shapes |= {"mlp.gate.weight": (256, 7168), "mlp.gate.e_score_correction_bias": (256,)}
    return {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}


def test_names_and_shapes_are_those_of_the_published_checkpoint(giant):
    wanted = {"model.embed_tokens.weight": (129280, 7168), "model.norm.weight": (7168,)}
    wanted |= {"lm_head.weight": (129280, 7168)}
    for i in range(62):
        wanted |= layer_names(i, moe=i >= 3)
    extra = {"embed_tokens": (129280, 7168), "enorm": (7168,), "hnorm": (7168,), "eh_proj": (7168, 14336)}
    extra |= {"shared_head.norm": (7168,), "shared_head.head": (129280, 7168)}
    wanted |= {f"model.layers.61.{name}.weight": shape for name, shape in extra.items()}
    assert {name: tuple(x.shape) for name, x in published_state(giant.state_dict()).items()} == wanted


def test_published_files_have_91991_tensors_and_688574839360_bytes(giant):
    tensors, n_bytes = 0, 0
    for name, x in published_state(giant.state_dict()).items():
        float8 = name.endswith(("_proj.weight", "_with_mqa.weight")) and "eh_proj" not in name
        width = 1 if float8 else 4 if name.endswith("e_score_correction_bias") else 2
        scales = -(-x.shape[0] // 128) * -(-x.shape[1] // 128) if float8 else 0
        tensors, n_bytes = tensors + 1 + float8, n_bytes + width * x.numel() + 4 * scales
    assert (tensors, n_bytes) == (91_991, 688_574_839_360)


def test_stored_numbers_are_684489845504_and_agree_with_the_bill(giant):
    count = count_parameters(giant.config)
    assert sum(x.numel() for x in giant.state_dict().values()) == 684_489_845_504
    assert count.total + count.mtp + 2 * 129280 * 7168 == 684_489_845_504
    assert count.total == 671_026_419_200
    trained = sum(p.numel() for p in giant.parameters())  # shared embedding and head once, routing biases not at all
    assert trained == count.total + count.mtp - 59 * 256


@pytest.mark.parametrize("preset", ["nano", "mini", "v2-lite"])
def test_small_presets_agree_with_the_bill(preset):
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig.preset(preset))
    count = count_parameters(model.config)
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert sum(p.numel() for p in model.parameters()) + biases == count.total + count.mtp


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_prediction_modules_follow_the_main_layers_and_share_embedding_and_head(depth):
    model = odd_model(num_nextn_predict_layers=depth)
    assert len(model.mtp_layers) == depth and len(model.model.layers) == 3 + depth
    for layer in model.mtp_layers:
        assert layer.embed_tokens is model.model.embed_tokens and layer.shared_head.head is model.lm_head
    assert len(model.new_caches(1, 5)) == 3 and len(model.new_caches(1, 5, mtp=True)) == 3 + depth


def test_prediction_modules_do_not_change_the_logits():
    model, plain = odd_model(num_nextn_predict_layers=2), odd_model()
    plain.load_state_dict({n: x for n, x in model.state_dict().items() if n in plain.state_dict()})
    assert torch.equal(model(ids_of(model)), plain(ids_of(model)))


def test_matrices_start_with_initializer_range_and_gains_at_one():
    model = DeepSeekV3(ModelConfig.preset("mini"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert abs(parameter.std().item() / 0.006 - 1) < 0.1, name


def test_routing_biases_stay_float32_in_a_bfloat16_model():
    model = odd_model().bfloat16()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {bias.dtype for _, bias in model.named_buffers()} == {torch.float32}


def test_every_expert_layer_routes_once_in_a_forward_pass():
    model = odd_model(num_nextn_predict_layers=1)
    with record_routing(model) as routings:
        model(ids_of(model))
    assert len(routings) == 2  # layers 1 and 2; the prediction module waits for its own call
