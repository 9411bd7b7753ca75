"""The weights prepared once for decoding, and a latent cache in one piece for each layer.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.baseline import Cache
from dsv3_mini.decode_layers import Attend, MTPStep, Places, UnitNorm, plan_block
from dsv3_mini.model import DeepSeekV3

# Where does the time of one token go?


def widened(model: DeepSeekV3) -> DeepSeekV3:
    """The model in float32, or as it is where it already has that or more."""
    dtype = torch.promote_types(model.lm_head.weight.dtype, torch.float32)
    return model if model.lm_head.weight.dtype == dtype else copy.deepcopy(model).to(dtype)


class DecodePlan:
    """A DeepSeekV3 with its weights laid out for decoding: prepared once, used for any number of texts.

    dtype: float32, or float64 where the model has it. It reads the model's weights as they are now: after a training
    step, make a new one. n_tokens: only the first tokens may be written (a tokenizer smaller than the model's table).
    attend: an attention kernel of your own, say for a GPU, in place of torch's products. attend(q_latent, q_pe, cache,
    lengths) -> (B, T, H, C) gets contiguous queries (B, T, H, C) and (B, T, H, rope) that already carry the softmax
    scale, the whole cache (B, capacity, C + rope), latents first, and lengths (B,) int32: query t of row i sees
    positions 0 .. lengths[i] - T + t, and no other.
    """

    @torch.no_grad()
    def __init__(self, model: DeepSeekV3, n_tokens: int | None = None, attend: Attend | None = None):
        self.model = model = widened(model)
        self.config, self.dtype, self.device = model.config, model.lm_head.weight.dtype, model.lm_head.weight.device
        blocks, self.norm = list(model.model.layers)[: self.config.num_hidden_layers], model.model.norm
        self.attend, self.layers = attend, [plan_block(block, self.dtype, attend) for block in blocks]
        self.mtp = [MTPStep(layer, self.dtype, attend) for layer in model.mtp_layers]
        self.unit, self.embedding = UnitNorm(self.norm, self.dtype), model.model.embed_tokens.weight.detach()
        self.head = model.lm_head.weight.detach()[:n_tokens].T.contiguous()  # (D, V)

    def decoder(self, batch: int, capacity: int, n_mtp: int = 0) -> "Decoder":
        """Room for the texts of a batch, see `Decoder`."""
        return Decoder(self, batch, capacity, n_mtp)


def places_of_one(cos: Tensor, sin: Tensor, start: int, n_heads: int, only_last: bool) -> Places:
    """Places of one row's new tokens, from position `start` on; cos and sin are theirs, (T, rope)."""
    length, mask = len(cos), None
    if length > 1 and not only_last:
        mask = cos.new_full((length, start + length), -math.inf).triu_(start + 1)
        mask = mask.repeat_interleave(n_heads, 0).unsqueeze(0)
    of_q = [part[-1:, None] if only_last else part[:, None] for part in (cos, sin)]
    return Places(cos, sin, *of_q, start, None, None, start + length, mask, only_last)


def places_of_many(cos: Tensor, sin: Tensor, starts: Sequence[int], length: int, n_heads: int) -> Places:
    """Places of `length` new tokens in each row, row i from starts[i] on; cos and sin cover the cache, (S, rope)."""
    device, end = cos.device, max(starts) + length
    rows, offsets = torch.arange(len(starts), device=device), torch.arange(length, device=device)
    positions = torch.tensor(starts, device=device)[:, None] + offsets
    unseen = torch.arange(end, device=device) > positions[..., None]  # (B, T, end)
    mask = torch.zeros(unseen.shape, dtype=cos.dtype, device=device).masked_fill_(unseen, -math.inf)
    mask = mask.repeat_interleave(n_heads, 1)
    cos, sin = cos[positions.flatten()], sin[positions.flatten()]
    return Places(cos, sin, cos[:, None], sin[:, None], starts[0], rows[:, None], positions, end, mask)


class TextCaches:
    """The latent caches of B texts, a tensor (B, capacity, C + rope) for each layer, and prompts read into them.

    capacity: positions a row can hold; n_mtp: MTP layers that keep a cache too.
    """

    def __init__(self, plan: DecodePlan, batch: int, capacity: int, n_mtp: int = 0):
        c, n_layers = plan.config, len(plan.layers) + n_mtp
        self.plan, self.capacity, self.parts = plan, capacity, [c.kv_lora_rank, c.qk_rope_head_dim]
        shape, options = (batch, capacity, sum(self.parts)), {"dtype": plan.dtype, "device": plan.device}
        self.caches = [torch.zeros(shape, **options) for _ in range(n_layers)]

    def check(self, starts: Sequence[int], length: int) -> int:
        """Where the longest row ends with its new tokens. ValueError before the first position or beyond the last."""
        if min(starts) < 0:
            raise ValueError(f"starts={list(starts)} must be 0 or more")
        if (end := max(starts) + length) > self.capacity:
            raise ValueError(f"{end} positions do not fit the cache of {self.capacity}")
        return end

    def prefill(self, ids: Tensor) -> Tensor:
        """Whole prompts (B, T) from position 0, through the model itself -> normed hidden states (B, T, D).

        Rows may be filled up at their end with any token: what follows a row's last token is overwritten later.
        """
        return self.plan.model.model(ids, [self.as_cache(cache) for cache in self.caches[: len(self.plan.layers)]])

    def mtp_prefill(self, depth: int, h: Tensor, ids: Tensor) -> Tensor:
        """`prefill` for an MTP layer: states and the tokens that follow them -> normed states, (B, T, D)."""
        layer, cache = self.plan.model.mtp_layers[depth], self.as_cache(self.caches[len(self.plan.layers) + depth])
        return layer.shared_head.norm(layer(h, ids, self.plan.model.model.rope(0, ids.shape[1]), cache))

    def as_cache(self, tensor: Tensor) -> Cache:
        """The same memory as the cache that chapter 03's attention writes, empty."""
        cache = Cache((1, 0))
        cache.tensors = list(tensor.split(self.parts, dim=-1))
        return cache

    @property
    def n_bytes(self) -> int:
        """Memory of all caches, filled or not."""
        return sum(cache.nbytes for cache in self.caches)


class Decoder(TextCaches):
    """The steps that write B texts. Where a step begins is an argument, so forgetting is free."""

    def __init__(self, plan: DecodePlan, batch: int, capacity: int, n_mtp: int = 0):
        super().__init__(plan, batch, capacity, n_mtp)
        table = plan.model.model.rope(0, capacity)
        self.cos, self.sin = (part.to(plan.dtype).repeat_interleave(2, dim=-1) for part in table)

    def places(self, starts: Sequence[int], length: int, only_last: bool = False) -> Places:
        """Positions starts[i] .. starts[i] + length - 1 of each row."""
        end, n_heads = self.check(starts, length), self.plan.config.num_attention_heads
        if len(starts) == 1:
            at = places_of_one(self.cos[starts[0] : end], self.sin[starts[0] : end], starts[0], n_heads, only_last)
        else:
            at = places_of_many(self.cos, self.sin, starts, length, n_heads)
        if self.plan.attend is None:
            return at
        lengths = [start + length for start in starts]
        return at._replace(lengths=torch.tensor(lengths, dtype=torch.int32, device=self.cos.device))

    def step(self, ids: Tensor, starts: Sequence[int]) -> Tensor:
        """New tokens (B, T), row i from position starts[i] on -> normed hidden states (B, T, D)."""
        plan, at = self.plan, self.places(starts, ids.shape[1])
        x = F.embedding(ids.flatten(), plan.embedding)  # (B * T, D)
        for (attention, mlp), cache in zip(plan.layers, self.caches):  # noqa: B905 (MTP caches follow)
            x = mlp(attention(x, cache, at))
        return (plan.unit(x) * plan.unit.gain).view(*ids.shape, -1)

    def mtp_step(self, depth: int, h: Tensor, ids: Tensor, starts: Sequence[int], only_last: bool = False) -> Tensor:
        """States (B, T, D) from position starts[i] on, and the tokens (B, T) that follow them -> (B, T, D).

        only_last: of one row, the last state alone, (1, 1, D); the others just enter the cache.
        """
        cache = self.caches[len(self.plan.layers) + depth]
        at = self.places(starts, ids.shape[1], only_last)
        return self.plan.mtp[depth](h.flatten(0, 1), ids.flatten(), cache, at).view(len(h), -1, h.shape[-1])

    def logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return h @ self.plan.head
