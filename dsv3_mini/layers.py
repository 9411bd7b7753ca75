"""The small layers: RMSNorm, SwiGLU, and rotary positions with the frequencies of YaRN.

Generated from chapters/02_baseline.ipynb; edit the chapter, not this file.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig

# What keeps the numbers in range?


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale every channel: x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)), (..., hidden_size) -> (..., hidden_size)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# How does attention know where a token is?


def rope_frequencies(dim: int, theta: float = 10000.0) -> Tensor:
    """Radians per position of each of the dim/2 pairs: theta^(-2i/dim), (dim/2,) float32 on the CPU."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} must be even and positive: RoPE turns pairs")
    if not theta > 0:
        raise ValueError(f"theta={theta} must be positive")
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def rope_table(positions: Tensor, frequencies: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position and pair: two tensors (T, dim/2), `amplitude` long."""
    angles = positions[:, None] * frequencies  # (T, dim/2)
    return angles.cos() * amplitude, angles.sin() * amplitude


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each neighbouring pair (x[2i], x[2i+1]) by its position's angle, in float32 at least.

    x: (B, T, H, dim); rope: cosines and sines (T, dim/2). The interleaved layout of the published weights: a pair is
    one complex number, times e^(i angle).
    """
    if rope[0].shape != (x.shape[1], x.shape[-1] // 2):
        raise ValueError(f"rope table {tuple(rope[0].shape)} does not fit x {tuple(x.shape)}: (T, dim/2) is needed")
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (B, T, H, dim/2)
    turned = pairs * torch.complex(*rope).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


# What happens beyond the trained length?


def yarn_frequencies(
    dim: int,
    theta: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
) -> Tensor:
    """RoPE frequencies stretched by YaRN as DeepSeek's code does it, (dim/2,) float32 (report section 4.3).

    Pairs that turn more than `beta_fast` times in the original length keep their frequency, pairs that turn less
    than `beta_slow` times are slowed by `factor`, and a ramp, linear in the pair's index, joins them.
    """
    if factor <= 0 or original_max_position_embeddings <= 0:
        raise ValueError(f"{factor=} and {original_max_position_embeddings=} must be positive")
    if not theta > 1:
        raise ValueError(f"theta={theta} must exceed 1: YaRN counts pairs by its logarithm")

    def pair_that_turns(times):
        return dim * math.log(original_max_position_embeddings / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)  # (dim/2,)
    frequencies = rope_frequencies(dim, theta)
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature 0.1 * mscale * ln(factor) + 1; 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig, head_dim: int | None = None) -> float:
    """What the attention scores are multiplied by: head_dim^-1/2 and, with YaRN, the temperature squared.

    head_dim: the width of one query; None for MLA's, qk_nope_head_dim + qk_rope_head_dim.
    """
    yarn = config.rope_scaling or {"factor": 1.0}
    temperature = yarn_mscale(yarn["factor"], yarn.get("mscale_all_dim", 0.0))
    return (head_dim or config.qk_head_dim) ** -0.5 * temperature**2


def rope_amplitude(config: ModelConfig) -> float:
    """The factor on cos and sin: 1 for DeepSeek, whose mscale and mscale_all_dim are equal and cancel."""
    yarn = config.rope_scaling or {"factor": 1.0}
    of_hands, of_scores = yarn.get("mscale", 1.0), yarn.get("mscale_all_dim", 0.0)
    return yarn_mscale(yarn["factor"], of_hands) / yarn_mscale(yarn["factor"], of_scores)


def config_frequencies(config: ModelConfig, dim: int) -> Tensor:
    """The frequencies that `config` asks for, plain or YaRN, for rotary width `dim`: (dim/2,) float32."""
    if not (yarn := config.rope_scaling):
        return rope_frequencies(dim, config.rope_theta)
    betas = {name: yarn[name] for name in ("beta_fast", "beta_slow") if name in yarn}
    original = yarn["original_max_position_embeddings"]
    return yarn_frequencies(dim, config.rope_theta, yarn["factor"], original, **betas)
