"""What DeepSeek-V3 holds, remembers, computes and costs, counted from its published config alone.

Generated from chapters/00_the_bill.ipynb; edit the chapter, not this file.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

# What is in the published config?


@dataclass(frozen=True)
class ModelConfig:
    """The published `config.json` of DeepSeek-V3, field for field; the defaults are the 671B model's.

    Letters used for shapes in the whole book: B batch, T query positions, S cached positions, D hidden_size,
    H num_attention_heads, C kv_lora_rank, N = B*T tokens, E n_routed_experts, K num_experts_per_tok,
    F moe_intermediate_size, G n_group, V vocab_size.
    """

    # vocabulary and depth
    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1
    tie_word_embeddings: bool = False
    # attention
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    # feed-forward and experts
    hidden_act: str = "silu"
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    ep_size: int = 1
    # routing
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    # positions
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    # normalisation and initialisation
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    # tokens and storage
    bos_token_id: int = 0
    eos_token_id: int = 1
    torch_dtype: str = "bfloat16"
    quantization_config: dict[str, Any] | None = None
    use_cache: bool = True
    # kept from the published file, without effect here
    model_type: str = "deepseek_v3"
    architectures: tuple[str, ...] = ("DeepseekV3ForCausalLM",)
    auto_map: dict[str, str] | None = None
    transformers_version: str | None = None
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    pretraining_tp: int = 1

    def __post_init__(self):
        if problems := list(find_problems(self)):
            raise ValueError("ModelConfig: " + "; ".join(problems))

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key: the content part and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def n_moe_layers(self) -> int:
        """Layers of the main model whose feed-forward part is a mixture of experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def is_moe(self, layer_idx: int) -> bool:
        """True from layer `first_k_dense_replace` on; MTP layers, which follow the main ones, included."""
        return layer_idx >= self.first_k_dense_replace

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """A named configuration: "nano", "mini", "v2-lite" or "v3", with `changes` applied."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, published: dict[str, Any]) -> "ModelConfig":
        """Read a published config; fields that do not shape the model (`auto_map`, …) are left aside."""
        if not isinstance(published, dict):
            raise ValueError(f"a config is a dict of fields, not {type(published).__name__}")
        if published.get("model_type") not in ("deepseek_v3", "deepseek_v2"):
            raise ValueError(f"model_type={published.get('model_type')!r}; a deepseek_v3 config is needed")
        values = {**published, **read_new_spelling(published)}
        known = {field.name for field in fields(cls)}
        values["architectures"] = tuple(values.get("architectures") or cls.architectures)
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The published form: `rope_theta` beside `rope_scaling`; optional fields that are None stay out."""
        optional = ("auto_map", "transformers_version", "quantization_config")
        return {name: value for name, value in asdict(self).items() if value is not None or name not in optional}

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "ModelConfig":
        """Read `config.json`, or the one in a folder. Raises FileNotFoundError or ValueError, naming the file."""
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no config.json at {file}")
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `config.json` into `folder` (made if missing), whole or not at all."""
        file = Path(folder) / "config.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".json.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        partial.replace(file)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)


FRACTIONAL = ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor")


POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts"),
    *("num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings", *FRACTIONAL),
)


COUNTS = ("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace")


CHOICES = {
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("noaux_tc", "greedy", "group_limited_greedy"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
}


YARN_NEEDS = {"factor", "original_max_position_embeddings"}


FP8_NEEDS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def find_problems(c: ModelConfig) -> Iterator[str]:
    """Yield one sentence for each contradiction, naming the field, its value and what would do."""
    for name in POSITIVE:
        value, kinds = getattr(c, name), (int, float) if name in FRACTIONAL else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            yield f"{name}={value!r} must be a positive {'number' if name in FRACTIONAL else 'integer'}"
            return
    for name in COUNTS:
        if isinstance(value := getattr(c, name), bool) or not isinstance(value, int) or value < 0:
            yield f"{name}={value!r} must be an integer, 0 or more"
            return
    for name, allowed in CHOICES.items():
        if getattr(c, name) not in allowed:
            yield f"{name}={getattr(c, name)!r} is not one of {', '.join(map(repr, allowed))}"
    if c.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim={c.qk_rope_head_dim} must be even: RoPE turns pairs"
    if c.q_lora_rank is not None and (not isinstance(c.q_lora_rank, int) or c.q_lora_rank <= 0):
        yield f"q_lora_rank={c.q_lora_rank} must be positive, or None for no query compression"
    if c.first_k_dense_replace > c.num_hidden_layers:
        yield f"first_k_dense_replace={c.first_k_dense_replace} must lie in 0..num_hidden_layers={c.num_hidden_layers}"
    yield from find_routing_problems(c)
    yield from find_storage_problems(c)


def find_storage_problems(c: ModelConfig) -> Iterator[str]:
    """The part of `find_problems` about position scaling and quantisation."""
    yarn = c.rope_scaling
    if yarn is not None and not (isinstance(yarn, dict) and yarn.get("type") == "yarn" and yarn.keys() >= YARN_NEEDS):
        yield f"rope_scaling={yarn!r} must be None or a dict of type 'yarn' with {' and '.join(sorted(YARN_NEEDS))}"
    fp8 = c.quantization_config
    if fp8 is not None and not (isinstance(fp8, dict) and fp8.items() >= FP8_NEEDS.items()):
        yield f"quantization_config={fp8!r} must be None or hold {FP8_NEEDS}"


def find_routing_problems(c: ModelConfig) -> Iterator[str]:
    """The part of `find_problems` about groups and experts."""
    if c.n_routed_experts % c.n_group:
        yield f"n_routed_experts={c.n_routed_experts} must be a multiple of n_group={c.n_group}"
        return
    group_size = c.n_routed_experts // c.n_group
    if c.topk_group > c.n_group:
        yield f"topk_group={c.topk_group} must be at most n_group={c.n_group}"
    elif c.num_experts_per_tok > c.topk_group * group_size:
        yield (
            f"num_experts_per_tok={c.num_experts_per_tok} exceeds the {c.topk_group * group_size} experts "
            f"in the topk_group={c.topk_group} kept groups"
        )
    if c.topk_method == "noaux_tc" and c.n_group > 1 and group_size < 2:
        yield f"n_group={c.n_group} leaves one expert a group; a group is scored by its best two"


ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "dtype": "torch_dtype",
    "num_local_experts": "n_routed_experts",
}


def read_new_spelling(published: dict[str, Any]) -> dict[str, Any]:
    """What newer files call differently, under the published names; `rope_parameters` holds theta and scaling."""
    values = {name: published[alias] for alias, name in ALIASES.items() if alias in published}
    if rope := published.get("rope_parameters"):
        scaling = {("type" if key == "rope_type" else key): v for key, v in rope.items() if key != "rope_theta"}
        values["rope_theta"] = rope.get("rope_theta", 10000.0)
        values["rope_scaling"] = None if scaling.get("type", "default") == "default" else scaling
    return values


YARN_40 = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


SMALL = {"topk_method": "noaux_tc", "first_k_dense_replace": 1, "initializer_range": 0.006, "torch_dtype": "float32"}


PRESETS = {
    "nano": dict(
        SMALL,
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=320,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        max_position_embeddings=1024,
    ),
    "mini": dict(
        SMALL,
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=160,
        moe_intermediate_size=32,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=8,
        topk_group=2,
        max_position_embeddings=4096,
    ),
    "v2-lite": dict(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        rope_scaling={**YARN_40, "mscale": 0.707, "mscale_all_dim": 0.707},
        num_nextn_predict_layers=0,
        bos_token_id=100000,
        eos_token_id=100001,
    ),
    "v3": dict(rope_scaling=YARN_40, quantization_config=FP8),
}
