"""The bill of a training run before it starts: parameters, bytes, FLOPs, and seconds at a machine's own rate.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

from dataclasses import dataclass

import torch

from dsv3_mini.accounting import count_parameters, flops_per_token, kv_cache_bytes_per_token
from dsv3_mini.checkpoint import published_state
from dsv3_mini.config import ModelConfig
from dsv3_mini.fp8 import runs_in_fp8
from dsv3_mini.model import DeepSeekV3

# What will it cost?


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """`flops_per_token` in training, with the MTP modules: for each a mixture layer, its joining matrix, the head."""
    deeper = config.replace(num_hidden_layers=config.num_hidden_layers + 1)
    main = flops_per_token(config, context, training=True)
    layer = flops_per_token(deeper, context, training=True) - main
    joined = 6 * (2 * config.hidden_size**2 + config.vocab_size * config.hidden_size)
    return main + config.num_nextn_predict_layers * (layer + joined)


def fp8_checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors in the published FP8 layout: a float32 scale for each 128 x 128 block, BF16 for the rest."""
    with torch.device("meta"):
        state = published_state(DeepSeekV3(config).state_dict())
    total = 0
    for name, tensor in state.items():
        if name.endswith(".weight") and runs_in_fp8(name.removesuffix(".weight")):
            rows, columns = tensor.shape
            total += tensor.numel() + 4 * -(-rows // 128) * -(-columns // 128)
        else:
            total += tensor.numel() * (4 if name.endswith("e_score_correction_bias") else 2)
    return total


@dataclass(frozen=True)
class Bill:
    """What a run will hold, store and compute; `seconds` if it did nothing but multiply matrices at `rate`."""

    parameters: int
    activated: int
    checkpoint_bytes: int
    cache_bytes_per_token: int
    tokens: int
    training_flops: float
    seconds: float


def make_bill(config: ModelConfig, tokens: int, context: int, rate: float) -> Bill:
    """Price a training run from its config. rate: FLOP/s of a plain matrix product on the machine."""
    count = count_parameters(config)
    flops = tokens * training_flops_per_token(config, context)
    return Bill(
        parameters=count.total + count.mtp,
        activated=count.activated,
        checkpoint_bytes=fp8_checkpoint_bytes(config),
        cache_bytes_per_token=kv_cache_bytes_per_token(config, bytes_per_element=4),
        tokens=tokens,
        training_flops=flops,
        seconds=flops / rate,
    )
