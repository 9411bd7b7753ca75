"""Multi-token prediction: an extra layer that guesses the token after next, and what it is worth.

Generated from chapters/06_multi_token_prediction.ipynb; edit the chapter, not this file.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.baseline import Block, Cache
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import RMSNorm

# Which token meets which?


def depth_tokens(windows: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The tokens that depth k is given and must predict: t_{i+k} and t_{i+k+1} for i = 0 .. T-1-k, (B, T-k) each.

    windows: (B, T + 1) tokens t_0 .. t_T. Depth 0 is the main model. ValueError if no position is left.
    """
    if not 0 <= depth < windows.shape[1] - 1:
        raise ValueError(f"depth={depth} needs windows of at least {max(depth, 0) + 2} tokens, not {windows.shape[1]}")
    return windows[:, depth:-1], windows[:, depth + 1 :]


# Why give the module the next token?


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
        ValueError unless every state has its token.
        """
        if h.shape[:2] != next_ids.shape:
            raise ValueError(
                f"states of (B, T) = {tuple(h.shape[:2])} need as many tokens, not {tuple(next_ids.shape)}"
            )
        joined = torch.cat((self.enorm(self.embed_tokens(next_ids)), self.hnorm(h)), dim=-1)  # (B, T, 2D)
        return super().forward(self.eh_proj(joined), rope, cache)


# How is it trained?


def mtp_losses_reference(layers: Sequence[MTPLayer], h: Tensor, windows: Tensor, rope: Callable) -> list[Tensor]:
    """Equations 21-24 one position at a time, each from its own prefix alone; arguments as in `mtp_losses`."""
    losses, n_tokens = [], h.shape[1]
    for k, layer in enumerate(layers, start=1):
        nats, states = torch.zeros(()), []
        for i in range(n_tokens - k):
            h_k = layer(h[:, : i + 1], windows[:, k : i + k + 1], rope(0, i + 1))[:, -1]  # (B, D)
            log_p = layer.shared_head(h_k).log_softmax(-1)  # (B, V)
            nats = nats - log_p.gather(1, windows[:, i + k + 1, None]).mean()
            states.append(layer.shared_head.norm(h_k))
        losses.append(nats / n_tokens)
        h = torch.stack(states, dim=1)  # (B, T-k, D)
    return losses


def mtp_losses(layers: Sequence[MTPLayer], h: Tensor, windows: Tensor, rope: Callable) -> list[Tensor]:
    """L^k of every depth (equation 24).  h: (B, T, D) of the main model; windows: (B, T + 1) tokens t_0 .. t_T.

    Depth k sees positions 0 .. T-1-k: state i and token i + k predict token i + k + 1. As printed, the sum over
    T - k terms is divided by T. rope(start, length) gives the table; positions stay those of i.
    """
    losses, n_tokens = [], h.shape[1]
    if windows.shape[1] != n_tokens + 1:
        raise ValueError(f"{n_tokens} states need windows of {n_tokens + 1} tokens, not {windows.shape[1]}")
    for k, layer in enumerate(layers, start=1):
        given, label = depth_tokens(windows, k)  # (B, T-k)
        h = layer.shared_head.norm(layer(h[:, : n_tokens - k], given, rope(0, n_tokens - k)))  # (B, T-k, D)
        logits = layer.shared_head.head(h)  # (B, T-k, V)
        nats = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum")
        losses.append(nats / (len(h) * n_tokens))
    return losses


# How often is the second token right?


def second_token_logits(layer: MTPLayer, h: Tensor, windows: Tensor, rope: Callable) -> tuple[Tensor, Tensor]:
    """Two opinions on token i + 2, both knowing t_0 .. t_{i+1}: the module's draft and the main model's, one step on.

    h: (B, T, D) of the main model; windows: (B, T + 1) -> logits (B, T-1, V) each, for i = 0 .. T-2.
    """
    given, _ = depth_tokens(windows, 1)
    draft = layer.shared_head(layer(h[:, :-1], given, rope(0, given.shape[1])))
    return draft, layer.shared_head.head(h[:, 1:])
