"""Part of dsv3_mini; its chapter follows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.baseline import Block, Cache
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import RMSNorm


class SharedHead(nn.Module):
    """The MTP module's own final norm in front of the main model's head: (B, T, D) -> (B, T, V)."""

    def __init__(self, config: ModelConfig, head: nn.Linear):
        super().__init__()
        self.norm, self.head = RMSNorm(config.hidden_size, config.rms_norm_eps), head

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.norm(h))


class MTPLayer(Block):
    """One multi-token prediction module (equations 21-23), stored as an extra layer of the checkpoint.

    It joins the hidden state of position i with the embedding of token i + k, runs one block, and predicts token
    i + k + 1. Embedding and output head are the main model's own tensors.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: nn.Module,
        feed_forward: nn.Module,
        embed_tokens: nn.Embedding,
        lm_head: nn.Linear,
    ):
        super().__init__(config, attention, feed_forward)
        self.embed_tokens = embed_tokens
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config, lm_head)

    def forward(self, h: Tensor, next_ids: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None) -> Tensor:
        """h: (B, T, D) of positions i; next_ids: (B, T) tokens i + k -> (B, T, D), before `shared_head`.

        The published matrix takes the embedding first, though equation 21 prints the hidden state first.
        """
        joined = torch.cat((self.enorm(self.embed_tokens(next_ids)), self.hnorm(h)), dim=-1)  # (B, T, 2D)
        return super().forward(self.eh_proj(joined), rope, cache)


def mtp_losses(layers: list[MTPLayer], h: Tensor, windows: Tensor, rope: Callable) -> list[Tensor]:
    """L^k of every depth (equation 24).  h: (B, T, D) of the main model; windows: (B, T + 1) tokens t_0 .. t_T.

    Depth k sees positions 0 .. T-1-k: state i and token i + k predict token i + k + 1. As printed, the sum over
    T - k terms is divided by T. rope(start, length) gives the table; positions stay those of i.
    """
    losses, n_tokens = [], h.shape[1]
    for k, layer in enumerate(layers, start=1):
        h = layer(h[:, : n_tokens - k], windows[:, k:n_tokens], rope(0, n_tokens - k))  # (B, T-k, D)
        logits = layer.shared_head(h)
        total = F.cross_entropy(logits.flatten(0, 1), windows[:, k + 1 :].flatten(), reduction="sum")
        losses.append(total / (h.shape[0] * n_tokens))
        h = layer.shared_head.norm(h)
    return losses
