"""Named configurations, and the spellings in which published files write the same fields.

Generated from chapters/00_the_bill.ipynb; edit the chapter, not this file.
"""

from typing import Any

# How does a file become a config?


ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "dtype": "torch_dtype",
    "num_local_experts": "n_routed_experts",
}


V2_ABSENT = {"num_nextn_predict_layers": 0, "scoring_func": "softmax"}


def read_rope(name: str, rope: Any) -> dict[str, Any]:
    """`rope_theta`, where it is given, and `rope_scaling` from one spelling; the type "default" means no scaling."""
    if not isinstance(rope, dict):
        raise ValueError(f"{name}={rope!r} must be a dict or null")
    kind = rope.get("type", rope.get("rope_type"))
    if rope.get("rope_type", kind) != kind:
        raise ValueError(f"{name} has type={kind!r} and rope_type={rope['rope_type']!r}")
    scaling = {key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")}
    plain = kind == "default" or (kind is None and not scaling)
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return {**theta, "rope_scaling": None if plain else {"type": kind, **scaling}}


def published_spelling(published: dict[str, Any]) -> dict[str, Any]:
    """A file's fields under their published names. Raises ValueError where two spellings disagree."""
    values = dict(published)
    for alias, name in ALIASES.items():
        new, old = published.get(alias), published.get(name)
        if new is not None and old not in (None, new):
            raise ValueError(f"{alias}={new!r} contradicts {name}={old!r}")
        values |= {} if new is None else {name: new}
    rope = {"rope_theta": published["rope_theta"]} if "rope_theta" in published else {}
    for spelling in ("rope_scaling", "rope_parameters"):
        if published.get(spelling) is not None:
            for name, value in read_rope(spelling, published[spelling]).items():
                if rope.setdefault(name, value) != value:
                    raise ValueError(f"{spelling} says {name}={value!r}, elsewhere it is {rope[name]!r}")
    if published.get("rope_interleave", True) is not True:
        raise ValueError(
            f"rope_interleave={published['rope_interleave']!r}: DeepSeek's weights pair neighbouring channels"
        )
    names = values.pop("architectures", None)
    if names is not None:
        values["architectures"] = tuple(names) if isinstance(names, list) else names
    return values | rope


YARN_40 = {
    **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


SMALL = {"first_k_dense_replace": 1, "initializer_range": 0.006, "torch_dtype": "float32"}


PRESETS = {
    "nano": {
        **dict(SMALL, vocab_size=1024, hidden_size=128, num_hidden_layers=4, max_position_embeddings=1024),
        **dict(num_attention_heads=4, q_lora_rank=96, kv_lora_rank=64),
        **dict(qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
        **dict(intermediate_size=320, moe_intermediate_size=64),
        **dict(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2),
    },
    "mini": {
        **dict(SMALL, vocab_size=4096, hidden_size=256, num_hidden_layers=6, max_position_embeddings=4096),
        **dict(num_attention_heads=8, q_lora_rank=192, kv_lora_rank=128),
        **dict(qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
        **dict(intermediate_size=160, moe_intermediate_size=32),
        **dict(n_routed_experts=32, num_experts_per_tok=4, n_group=8, topk_group=2),
    },
    "v2-lite": {
        **dict(model_type="deepseek_v2", architectures=("DeepseekV2ForCausalLM",)),
        **dict(vocab_size=102400, bos_token_id=100000, eos_token_id=100001),
        **dict(hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None),
        **dict(intermediate_size=10944, moe_intermediate_size=1408, first_k_dense_replace=1),
        **dict(n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1),
        **dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0),
        **dict(rope_scaling={**YARN_40, "mscale": 0.707, "mscale_all_dim": 0.707}, num_nextn_predict_layers=0),
    },
    "v3": {"rope_scaling": YARN_40, "quantization_config": FP8},
}
