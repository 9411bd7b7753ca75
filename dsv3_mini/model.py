"""DeepSeek-V3 put together, and the published checkpoint layout: read, written, and refused when it is damaged.

Generated from chapters/10_full_model.ipynb; edit the chapter, not this file.
"""

import json
import os
import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from dsv3_mini.baseline import Cache, Transformer, initialise
from dsv3_mini.checkpoint import check_dtype, find_folder, load_weights, locate_tensors, save_weights
from dsv3_mini.config import ModelConfig
from dsv3_mini.mla import MLA
from dsv3_mini.moe import moe_feed_forward
from dsv3_mini.mtp import MTPLayer
from dsv3_mini.presets import FP8

# How do the parts become one model?


class DeepSeekV3(nn.Module):
    """The whole model: MLA, DeepSeekMoE, multi-token prediction; parameters named as in the published checkpoint.

    model(input_ids): (B, T) token ids -> (B, T, V) logits of the main model.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Transformer(config, MLA, moe_feed_forward)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for depth in range(config.num_nextn_predict_layers):
            feed_forward = moe_feed_forward(config, config.num_hidden_layers + depth)
            layer = MTPLayer(config, MLA(config), feed_forward, self.model.embed_tokens, self.lm_head)
            self.model.layers.append(layer)
        initialise(self, config.initializer_range)

    @property
    def mtp_layers(self) -> list[MTPLayer]:
        """The multi-token prediction modules, which the checkpoint numbers after the main layers."""
        return list(self.model.layers)[self.config.num_hidden_layers :]

    def forward(self, input_ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        return self.lm_head(self.model(input_ids, caches))

    def new_caches(self, batch: int, capacity: int, mtp: bool = False) -> list[Cache]:
        """One empty latent cache for each main layer, and for each MTP layer where asked."""
        layers = list(self.model.layers) if mtp else list(self.model.layers)[: self.config.num_hidden_layers]
        return [layer.self_attn.new_cache(batch, capacity) for layer in layers]

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | os.PathLike, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> "DeepSeekV3":
        """Open the published layout, from a folder or the Hugging Face hub.

        dtype: None keeps the stored one; float8 weights are dequantised, and `to_fp8` can run them in FP8 again. A
        folder without the MTP layers that its config promises (transformers writes such) opens without them. Errors
        name the file or the tensor.
        """
        folder = find_folder(folder_or_hub_id)
        config, ignore = match_mtp(ModelConfig.from_pretrained(folder), locate_tensors(folder))
        with torch.device("meta"):
            model = cls(config)
        state = load_weights(model.state_dict(keep_vars=True), folder, dtype, ignore, device)
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None, **options) -> None:
        """Write config.json and the weights in the published layout; options as in `save_weights`.

        dtype: torch.bfloat16 or torch.float32, None for the model's own; torch.float8_e4m3fn as the release.
        """
        check_dtype(dtype, saving=True)
        dtype, float8 = dtype or self.lm_head.weight.dtype, dtype == torch.float8_e4m3fn
        plain = torch.bfloat16 if float8 else dtype
        changes = {"torch_dtype": str(plain).removeprefix("torch."), "quantization_config": FP8 if float8 else None}
        config = json.dumps(self.config.replace(**changes).to_dict(), indent=2) + "\n"
        save_weights(self.state_dict(), folder, dtype, documents={"config.json": config}, **options)


# What is in the FP8 files?


def match_mtp(config: ModelConfig, held: Collection[str]) -> tuple[ModelConfig, tuple[str, ...]]:
    """Fit a config to the MTP layers that a folder holds: (config, name prefixes of layers to leave aside).

    Without any of the promised layers the model opens without them; those that a config of depth 0 does not ask for
    are left aside. Half of the promised layers is an error for `load_weights` to name.
    """
    first, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    promised = tuple(f"model.layers.{first + k}." for k in range(depth))
    if any(name.startswith(promised) for name in held):
        return config, ()
    modules = (re.fullmatch(r"(model\.layers\.(\d+)\.)eh_proj\.weight", name) for name in held)
    return config.replace(num_nextn_predict_layers=0), tuple(m[1] for m in modules if m and int(m[2]) >= first)
