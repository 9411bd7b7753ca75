"""A plain decoder made of parts that can be swapped, its cache, and the training loop of the whole book.

Generated from chapters/02_baseline.ipynb; edit the chapter, not this file.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import RMSNorm, SwiGLU, apply_rope, config_frequencies, rope_amplitude, rope_table, softmax_scale


def fastest(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the quickest of `rounds` calls of each form; the forms are called in turn."""
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    best = dict.fromkeys(forms, math.inf)
    for _ in range(rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


# Who may look at whom, and what must be kept?


def causal_mask(n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """(T, S) boolean, True where the query may look; the last query sits at the last key."""
    if n_queries > n_keys:
        raise ValueError(f"{n_queries} queries need as many keys, there are {n_keys}")
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v with minus infinity above the diagonal.

    q: (B, T, H, Dk), k: (B, S, H, Dk), v: (B, S, H, Dv) -> (B, T, H, Dv). The T queries are the last T positions.
    """
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    scores = scores.masked_fill(~causal_mask(q.shape[1], k.shape[1], q.device), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attention_reference` as two batched products: q, k (B, H, T, Dk), v (B, H, T, Dv) -> (B, H, T, Dv)."""
    above = torch.full(2 * q.shape[-2:-1], float("-inf"), dtype=q.dtype, device=q.device).triu(1)  # (T, T)
    scores = torch.baddbmm(above, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)  # (B*H, T, T)
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attention_reference` by torch's fused kernel; fewer key heads than query heads are shared out in order."""
    n_queries, n_keys, v_dim = q.shape[1], k.shape[1], v.shape[-1]
    short = 1 < n_queries == n_keys <= 512 and q.shape[2] == k.shape[2]
    if short and q.is_cpu and q.dtype == torch.bfloat16:
        return attend_by_products(*(tensor.transpose(1, 2) for tensor in (q, k, v)), scale).transpose(1, 2)
    if v_dim < k.shape[-1] and n_queries > 1:  # unequal widths take torch's slow path on CPU
        v = F.pad(v, (0, k.shape[-1] - v_dim))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, ...)
    mask = None if n_queries in (1, n_keys) else causal_mask(n_queries, n_keys, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=n_queries == n_keys, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)[..., :v_dim]


class Cache:
    """Preallocated tensors that fill along dim 1 as tokens arrive: keys and values, or MLA's latents.

    shapes: one (B, capacity, ...) per tensor. Raises ValueError when more positions arrive than it holds.
    """

    def __init__(self, *shapes: Sequence[int], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        self.tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.length = 0

    def append(self, *new: Tensor) -> list[Tensor]:
        """Store (B, T, ...) each, return everything stored so far, (B, S, ...) each, in the dtype of the new."""
        (batch, capacity), end = self.tensors[0].shape[:2], self.length + new[0].shape[1]
        if new[0].shape[0] != batch or end > capacity:
            raise ValueError(
                f"cache holds {batch} x {capacity} (batch x positions), {new[0].shape[0]} x {end} are needed"
            )
        for tensor, values in zip(self.tensors, new, strict=True):
            tensor[:, self.length : end] = values
        self.length = end
        return [tensor[:, :end].type_as(values) for tensor, values in zip(self.tensors, new, strict=True)]

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if length < 0:
            raise ValueError(f"length={length} must be 0 or more")
        self.length = min(self.length, length)

    @property
    def n_bytes(self) -> int:
        """Memory taken, whether filled or not."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Attention(nn.Module):
    """Multi-head attention with RoPE; fewer `n_kv_heads` make it grouped-query, one makes it multi-query.

    forward: (B, T, D) and the rope table of its T positions -> (B, T, D). Heads are `v_head_dim` wide.
    """

    def __init__(self, config: ModelConfig, n_kv_heads: int | None = None):
        super().__init__()
        self.n_heads, self.head_dim = config.num_attention_heads, config.v_head_dim
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={n_kv_heads} must divide num_attention_heads={self.n_heads}")
        self.rope_dim, self.scale = self.head_dim, softmax_scale(config, self.head_dim)
        self.q_proj = nn.Linear(config.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, rope), apply_rope(k, rope)  # (B, T, H, head_dim), (B, T, n_kv_heads, head_dim)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, S, n_kv_heads, head_dim)
        return self.o_proj(causal_attention(q, k, v, self.scale).flatten(2))

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `capacity` positions."""
        shape, weight = (batch, capacity, self.n_kv_heads, self.head_dim), self.k_proj.weight
        return Cache(shape, shape, dtype=weight.dtype, device=weight.device)


# How do the parts become a language model?


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, attention: nn.Module, feed_forward: nn.Module):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def dense_feed_forward(config: ModelConfig, layer_idx: int) -> SwiGLU:
    """The same SwiGLU in every layer."""
    return SwiGLU(config.hidden_size, config.intermediate_size)


class Transformer(nn.Module):
    """Embedding, blocks, final norm: token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: ModelConfig, attention: Callable, feed_forward: Callable):
        super().__init__()
        self.n_layers = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, attention(config), feed_forward(config, layer_idx)) for layer_idx in range(self.n_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Not a buffer: a model cast to bfloat16 would round its angles, one built on the meta device would lose them.
        self.frequencies = config_frequencies(config, self.layers[0].self_attn.rope_dim)  # (rope_dim/2,)
        self.rope_amplitude = rope_amplitude(config)

    def rope(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions start .. start + length - 1."""
        device = self.norm.weight.device
        positions = torch.arange(start, start + length, device=device)
        return rope_table(positions, self.frequencies.to(device), self.rope_amplitude)

    def forward(self, input_ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} must be (B, T): a batch of sequences")
        if caches is not None and len(caches) < self.n_layers:
            raise ValueError(f"{len(caches)} caches for {self.n_layers} layers")
        x = self.embed_tokens(input_ids)  # (B, T, D)
        rope = self.rope(caches[0].length if caches else 0, input_ids.shape[1])
        for layer_idx in range(self.n_layers):
            x = self.layers[layer_idx](x, rope, caches[layer_idx] if caches else None)
        return self.norm(x)


def initialise(module: nn.Module, std: float) -> None:
    """Draw every matrix from a normal distribution of deviation `std`; gains of norms stay at one."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)


class LanguageModel(nn.Module):
    """A decoder whose attention and feed-forward parts can be swapped: (B, T) token ids -> (B, T, V) logits.

    attention: config -> module;  feed_forward: (config, layer_idx) -> module.
    """

    def __init__(
        self, config: ModelConfig, attention: Callable = Attention, feed_forward: Callable = dense_feed_forward
    ):
        super().__init__()
        self.config = config
        self.model = Transformer(config, attention, feed_forward)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialise(self, config.initializer_range)

    def forward(self, input_ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        return self.lm_head(self.model(input_ids, caches))

    def new_caches(self, batch: int, capacity: int) -> list[Cache]:
        """One empty cache a layer."""
        return [layer.self_attn.new_cache(batch, capacity) for layer in self.model.layers]


# Does it learn, and how far is it from perfect?


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each token given the ones before it; windows: (B, T + 1) token ids."""
    if windows.shape[1] < 2:
        raise ValueError(f"windows of {windows.shape[1]} tokens leave nothing to predict; 2 are needed")
    logits = model(windows[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def fit(
    model: nn.Module,
    batches,
    steps: int,
    *,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    warmup: int = 20,
    cooldown: int = 0,
    loss_fn: Callable = next_token_loss,
    after_step: Callable | None = None,
    progress: bool = True,
) -> list[float]:
    """Train with AdamW and clipping at norm 1; return the loss of every step.

    The learning rate rises over the first `warmup` steps and falls to zero over the last `cooldown`.
    batches.batch(step) gives the windows of a step; after_step(step, loss) is called when the weights have moved.
    """
    if min(steps, warmup, cooldown) < 0 or learning_rate <= 0:
        raise ValueError(f"{steps=}, {warmup=} and {cooldown=} must be 0 or more, {learning_rate=} positive")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, cooldown))
    )
    losses, bar = [], tqdm(range(steps), disable=not progress, unit="step")
    for step in bar:
        loss = loss_fn(model, batches.batch(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if after_step:
            after_step(step, losses[-1])
    return losses
