"""The whole model against transformers: logits, gradients, cached decoding."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FAMILY = {
    "nano": {},
    "no query compression": {"q_lora_rank": None},
    "YaRN": {"rope_scaling": YARN, "max_position_embeddings": 128},
    "one group, two shared": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "unnormalised": {"norm_topk_prob": False},
    "all dense": {"first_k_dense_replace": 4},
    "all experts": {"first_k_dense_replace": 0},
    "odd sizes": {
        "hidden_size": 60,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "v_head_dim": 20,
        "vocab_size": 97,
    },
}


def pair(change, seed=0):
    """Our model and transformers', same weights, biases drawn from both signs."""
    torch.manual_seed(seed)
    config = ModelConfig.preset("nano", num_nextn_predict_layers=0, initializer_range=0.05, **change)
    ours, theirs = DeepSeekV3(config), DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(config.to_dict())).float()
    for name, buffer in ours.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.3, 0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randint(config.vocab_size, (2, 37))


@pytest.mark.parametrize("change", FAMILY.values(), ids=FAMILY)
def test_logits_and_gradients_agree_with_transformers(change):
    ours, theirs, ids = pair(change)
    logits, expected = ours(ids), theirs(ids).logits
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    for out in (logits, expected):
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = wanted[name].grad.abs().max() + 1e-8
        assert (parameter.grad - wanted[name].grad).abs().max() <= 2e-5 * scale + 1e-9, name


@pytest.mark.parametrize("change", FAMILY.values(), ids=FAMILY)
def test_cached_decoding_gives_the_logits_of_the_full_pass(change):
    ours, _, ids = pair(change, seed=1)
    with torch.no_grad():
        caches = ours.new_caches(2, 37)
        pieces = [ours(piece, caches) for piece in ids.split([17, 1, 1, 5, 13], dim=1)]
        assert torch.allclose(torch.cat(pieces, 1), ours(ids), atol=2e-5)


def test_mtp_layers_change_no_logit_of_the_main_model():
    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig.preset("nano", num_nextn_predict_layers=2))
    plain = DeepSeekV3(ModelConfig.preset("nano", num_nextn_predict_layers=0))
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    ids = torch.randint(1024, (1, 9))
    assert torch.equal(model(ids), plain(ids))
    assert model.mtp_layers[0].embed_tokens is model.model.embed_tokens


def test_v3_on_the_meta_device_has_the_stored_count():
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig.preset("v3"))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 684_489_845_504
