"""The published config.json of DeepSeek-V3 as one frozen dataclass that refuses what contradicts itself.

Generated from chapters/00_the_bill.ipynb; edit the chapter, not this file.
"""

import json
import math
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from dsv3_mini.presets import PRESETS, V2_ABSENT, published_spelling

# How does a file become a config?


@dataclass(frozen=True)
class ModelConfig:
    """The published `config.json` of DeepSeek-V3, field for field; the defaults are the 671B model's.

    Letters used for shapes in the whole book: B batch, T query positions, S cached positions, D hidden_size,
    H num_attention_heads, C kv_lora_rank, N = B*T tokens, E n_routed_experts, K num_experts_per_tok,
    F moe_intermediate_size, G n_group, V vocab_size.

    Raises ValueError at construction for a wrong type, a number out of range or fields that contradict each other.
    """

    # vocabulary and depth
    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1
    tie_word_embeddings: bool = False
    # attention
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None  # None: as many as there are heads, which is all that MLA knows
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
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    torch_dtype: str | None = "bfloat16"
    quantization_config: dict[str, Any] | None = None
    use_cache: bool = True
    # kept from the published file, without effect here
    model_type: str = "deepseek_v3"
    architectures: tuple[str, ...] = ("DeepseekV3ForCausalLM",)
    auto_map: dict[str, Any] | None = None
    transformers_version: str | None = None
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    pretraining_tp: int = 1

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if problems := find_problems(self):
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
        return cls(**{**deepcopy(PRESETS[name]), **changes})

    @classmethod
    def from_dict(cls, published: dict[str, Any]) -> "ModelConfig":
        """Read a published config in either spelling; what shapes nothing here (`pad_token_id`, …) is left aside."""
        if not isinstance(published, dict):
            raise ValueError(f"a config is a dict of fields, not {type(published).__name__}")
        if published.get("model_type") not in CHOICES["model_type"]:
            raise ValueError(f"model_type={published.get('model_type')!r}; a deepseek_v3 config is needed")
        absent = V2_ABSENT if published["model_type"] == "deepseek_v2" else {}
        values, known = {**absent, **published_spelling(published)}, {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The published form: `rope_theta` beside `rope_scaling`; optional fields that are None stay out."""
        optional = ("auto_map", "transformers_version", "quantization_config", "torch_dtype")
        return {name: value for name, value in asdict(self).items() if value is not None or name not in optional}

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "ModelConfig":
        """Read `config.json`, or the one in a folder. Raises FileNotFoundError or ValueError, naming the file."""
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no config.json at {file}")
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `config.json` into `folder` (made if missing), whole or not at all. ValueError if it is a file."""
        file = Path(folder) / "config.json"
        if file.parent.exists() and not file.parent.is_dir():
            raise ValueError(f"{file.parent} is a file; a folder is needed")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".json.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        partial.replace(file)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated again; the key-value heads follow the heads."""
        if "num_attention_heads" in changes:
            changes.setdefault("num_key_value_heads", None)
        return replace(self, **changes)


# Which configs cannot be?


KINDS = {
    **{int: "an integer", float: "a number", bool: "true or false", str: "a string"},
    **{dict: "a dict", tuple: "a list", NoneType: "None"},
}


def has_kind(value: Any, kind: type) -> bool:
    """isinstance as JSON means it: a bool is no number, an integer is a number too."""
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def find_wrong_types(c: ModelConfig) -> Iterator[str]:
    """A sentence for each field whose value is not of its declared type."""
    for field in fields(c):
        declared = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        kinds = [get_origin(kind) or kind for kind in declared]
        if not any(has_kind(value := getattr(c, field.name), kind) for kind in kinds):
            yield f"{field.name}={value!r} must be {' or '.join(KINDS[kind] for kind in kinds)}"


POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts"),
    *("num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings", "ep_size", "pretraining_tp"),
    *("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor"),
)


NOT_NEGATIVE = ("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace", "aux_loss_alpha")


CHOICES = {
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("noaux_tc", "greedy", "group_limited_greedy"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "model_type": ("deepseek_v3", "deepseek_v2"),
    "torch_dtype": ("bfloat16", "float16", "float32", "float64", None),
}


def find_wrong_values(c: ModelConfig) -> Iterator[str]:
    """A sentence for each number out of its range and each name that this book does not know."""
    for name in POSITIVE + (("q_lora_rank",) if c.q_lora_rank is not None else ()):
        if not 0 < getattr(c, name) < math.inf:
            yield f"{name}={getattr(c, name)} must be positive and finite"
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(c, name) < math.inf:
            yield f"{name}={getattr(c, name)} must be 0 or more, and finite"
    for name, allowed in CHOICES.items():
        if getattr(c, name) not in allowed:
            yield f"{name}={getattr(c, name)!r} is not one of {', '.join(map(repr, allowed))}"
    if not all(isinstance(name, str) for name in c.architectures):
        yield f"architectures={c.architectures!r} must be a list of names"


def find_contradictions(c: ModelConfig) -> Iterator[str]:
    """A sentence for each set of fields that cannot hold together."""
    if c.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim={c.qk_rope_head_dim} must be even: RoPE turns pairs"
    if c.num_key_value_heads != c.num_attention_heads:
        yield f"num_key_value_heads={c.num_key_value_heads} must be num_attention_heads={c.num_attention_heads} in MLA"
    if c.first_k_dense_replace > c.num_hidden_layers:
        yield f"first_k_dense_replace={c.first_k_dense_replace} must lie in 0..num_hidden_layers={c.num_hidden_layers}"
    for name in ("bos_token_id", "eos_token_id"):
        if (value := getattr(c, name)) is not None and not 0 <= value < c.vocab_size:
            yield f"{name}={value} must be None or lie in 0..{c.vocab_size - 1}, the vocabulary"
    size, rest = divmod(c.n_routed_experts, c.n_group)
    if rest:
        yield f"n_routed_experts={c.n_routed_experts} must be a multiple of n_group={c.n_group}"
    elif c.topk_group > c.n_group:
        yield f"topk_group={c.topk_group} must be at most n_group={c.n_group}"
    elif c.num_experts_per_tok > c.topk_group * size:
        kept = f"{c.topk_group * size} experts in the topk_group={c.topk_group} kept groups"
        yield f"num_experts_per_tok={c.num_experts_per_tok} exceeds the {kept}"
    elif c.topk_method == "noaux_tc" and c.n_group > 1 and size < 2:
        yield f"n_group={c.n_group} leaves one expert a group; a group is scored by its best two"


YARN_LEAST = {
    **{"factor": 1, "original_max_position_embeddings": 1},
    **{"beta_fast": 0, "beta_slow": 0, "mscale": 0, "mscale_all_dim": 0},
}


def find_yarn_problems(yarn: dict[str, Any]) -> Iterator[str]:
    """A sentence for each thing wrong in `rope_scaling`: the type, a key, a number."""
    if yarn.get("type") != "yarn":
        yield f"rope_scaling={yarn!r} must be None or have the type 'yarn'"
        return
    for name in list(YARN_LEAST)[:2]:
        if name not in yarn:
            yield f"rope_scaling={yarn!r} needs {name!r}"
    for name, value in yarn.items():
        if name not in YARN_LEAST and name != "type" and value is not None:
            yield f"rope_scaling[{name!r}]={value!r} is not known; known are {', '.join(YARN_LEAST)}"
        elif name in YARN_LEAST:
            kind = int if name == "original_max_position_embeddings" else float
            if not has_kind(value, kind) or not YARN_LEAST[name] <= value < math.inf:
                yield f"rope_scaling[{name!r}]={value!r} must be {KINDS[kind]}, {YARN_LEAST[name]} or more, and finite"


FP8_NEEDS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def find_dict_problems(c: ModelConfig) -> Iterator[str]:
    """A sentence for each thing wrong in `rope_scaling` and `quantization_config`."""
    yarn, fp8 = c.rope_scaling, c.quantization_config
    if yarn is not None:
        wrong = list(find_yarn_problems(yarn))
        yield from wrong
        fast, slow = yarn.get("beta_fast", 32), yarn.get("beta_slow", 1)
        if not wrong and not fast > slow > 0:
            yield f"rope_scaling['beta_fast']={fast} must exceed rope_scaling['beta_slow']={slow}, and both 0"
    if fp8 is not None:
        if any(name not in fp8 or fp8[name] != needed for name, needed in FP8_NEEDS.items()):
            yield f"quantization_config={fp8!r} must be None or hold {FP8_NEEDS}"
        if fp8.get("activation_scheme", "dynamic") != "dynamic" or fp8.get("scale_fmt") not in (None, "ue8m0"):
            yield f"quantization_config={fp8!r} must have 'dynamic' activations and, if any, the scale_fmt 'ue8m0'"


def find_problems(c: ModelConfig) -> list[str]:
    """Everything wrong with a config, one sentence each: types first, since the later checks rely on them."""
    for check in (find_wrong_types, find_wrong_values, find_contradictions, find_dict_problems):
        if problems := list(check(c)):
            return problems
    return []
