"""What DeepSeek-V3 holds, remembers, computes and costs, counted from its published config alone.

Generated from chapters/00_the_bill.ipynb; edit the chapter, not this file.
"""

from dataclasses import dataclass

from dsv3_mini.config import ModelConfig

# Where do 671 billion parameters sit?


def attention_parameters(c: ModelConfig) -> int:
    """Parameters of one MLA layer (equations 1-11), the norms on its two latents included."""
    heads, latent = c.num_attention_heads, c.kv_lora_rank
    queries = c.hidden_size * heads * c.qk_head_dim
    if c.q_lora_rank is not None:
        queries = c.q_lora_rank * (c.hidden_size + 1 + heads * c.qk_head_dim)
    keys_values = c.hidden_size * (latent + c.qk_rope_head_dim) + latent
    keys_values += latent * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return queries + keys_values + heads * c.v_head_dim * c.hidden_size


@dataclass(frozen=True)
class ParameterCount:
    """Exact parameter counts: `total` and `activated` (for one token) of the main model, `mtp` beside it.

    by_component: {name: (stored, activated)}. `mtp` leaves out the embedding and head that the module shares.
    """

    by_component: dict[str, tuple[int, int]]
    mtp: int

    @property
    def total(self) -> int:
        """What must lie in memory."""
        return sum(stored for stored, _ in self.by_component.values())

    @property
    def activated(self) -> int:
        """What one token meets, embedding and output head included."""
        return sum(activated for _, activated in self.by_component.values())


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count every parameter from the config alone, routing biases included (they are stored, though not trained)."""
    c = config
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    gate = c.n_routed_experts * (c.hidden_size + (c.topk_method == "noaux_tc"))
    norms = 2 * c.hidden_size
    moe = c.n_moe_layers
    table = c.vocab_size * c.hidden_size
    counts = {
        "embedding": (table, table),
        "attention": (c.num_hidden_layers * attention_parameters(c),) * 2,
        "dense feed-forward": (c.first_k_dense_replace * 3 * c.hidden_size * c.intermediate_size,) * 2,
        "routed experts": (moe * c.n_routed_experts * expert, moe * c.num_experts_per_tok * expert),
        "shared experts": (moe * c.n_shared_experts * expert,) * 2,
        "gates": (moe * gate,) * 2,
        "norms": (c.num_hidden_layers * norms + c.hidden_size,) * 2,
        "output head": (table, table),
    }
    block = attention_parameters(c) + norms + (c.n_routed_experts + c.n_shared_experts) * expert + gate
    module = block + 2 * c.hidden_size * c.hidden_size + 3 * c.hidden_size
    return ParameterCount(counts, c.num_nextn_predict_layers * module)


# How much must it remember for each token?


def kv_cache_bytes_per_token(config: ModelConfig, attention: str = "mla", bytes_per_element: int = 2) -> int:
    """Bytes that one more token adds to the cache of all layers.

    "mla": the latent and the shared rotary key. "mha": what the same heads cost if keys (nope + rope wide) and values
    were cached. "gqa" and "mqa": 8 and 1 key-value heads, v_head_dim wide.
    """
    c = config
    elements = {
        "mla": c.kv_lora_rank + c.qk_rope_head_dim,
        "mha": c.num_attention_heads * (c.qk_head_dim + c.v_head_dim),
        "gqa": 2 * 8 * c.v_head_dim,
        "mqa": 2 * c.v_head_dim,
    }
    if attention not in elements:
        raise ValueError(f"unknown attention {attention!r}; choose one of {', '.join(elements)}")
    if not bytes_per_element > 0:
        raise ValueError(f"bytes_per_element={bytes_per_element} must be positive")
    return c.num_hidden_layers * elements[attention] * bytes_per_element


# How much must it compute?


def flops_per_token(config: ModelConfig, context: int, training: bool = False) -> float:
    """FLOPs of one token with `context` positions of causal text: 2 per activated weight, plus the attention core.

    The embedding is a lookup and costs nothing. A causal token looks at context / 2 positions on average. Training is
    three forwards: one, and two for the gradients of inputs and weights. The MTP module is not counted.
    Raises ValueError for a negative context.
    """
    if not context >= 0:
        raise ValueError(f"context={context} must be 0 or more")
    c = config
    weights = count_parameters(c).activated - c.vocab_size * c.hidden_size
    core = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * context / 2 * c.num_hidden_layers
    return 2 * (weights + core) * (3 if training else 1)


# What did it cost?


def training_gpu_hours(flops: float, peak_flops_per_second: float, utilisation: float) -> float:
    """GPU-hours for `flops` at a share `utilisation` of the peak. Raises ValueError for a share not in (0, 1]."""
    if not (flops >= 0 and peak_flops_per_second > 0):
        raise ValueError(f"{flops=} must be 0 or more and {peak_flops_per_second=} positive")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation:.3g} must lie above 0 and at most 1")
    return flops / (peak_flops_per_second * utilisation) / 3600


def training_cost(gpu_hours: float, dollars_per_hour: float) -> float:
    """Rent in dollars. Raises ValueError for negative hours or prices."""
    if not (gpu_hours >= 0 and dollars_per_hour >= 0):
        raise ValueError(f"gpu_hours={gpu_hours} and dollars_per_hour={dollars_per_hour} must be 0 or more")
    return gpu_hours * dollars_per_hour
