"""Reading beyond the trained length: what breaks, slower clocks as the cure, and a short tuning on long text.

Generated from chapters/12_long_context.ipynb; edit the chapter, not this file.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from dsv3_mini.baseline import causal_mask
from dsv3_mini.data import BOS, token_ids
from dsv3_mini.layers import rope_frequencies
from dsv3_mini.losses import training_losses
from dsv3_mini.mla import MLA
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.recipe import LAST_PLATEAU, TrainOptions, learning_rate_factor
from dsv3_mini.train import make_optimizer

# What does a model do past its trained length?


def long_windows(tokenizer: Tokenizer, texts: Sequence[str], length: int, count: int, seed: int = 0) -> Tensor:
    """Up to `count` windows (n, length + 1) of one text each, from a place drawn from `seed`, as is their order.

    ValueError if no text has so many tokens.
    """
    if length < 1 or count < 1:
        raise ValueError(f"{length=}, {count=}; windows of one token or more, and one of them or more, can be drawn")
    generator, windows = torch.Generator().manual_seed(seed), []
    for i in torch.randperm(len(texts), generator=generator).tolist():
        if len(windows) == count:
            break
        ids = [BOS, *token_ids(tokenizer, [texts[i]])[0]] if len(texts[i]) >= length else []
        if len(ids) > length:
            start = torch.randint(len(ids) - length, (), generator=generator).item()
            windows.append(ids[start : start + length + 1])
    if not windows:
        raise ValueError(f"none of {len(texts)} texts has length={length} tokens")
    return torch.tensor(windows)


@torch.no_grad()
def position_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Nats of each token given all before it in its window: (n, T + 1) token ids -> (n, T)."""
    if windows.dim() != 2 or not len(windows) or windows.shape[1] < 2:
        raise ValueError(f"windows are {tuple(windows.shape)}; (n, T + 1) with one text and two tokens or more needed")
    return torch.stack([F.cross_entropy(model(w[None, :-1])[0].float(), w[1:], reduction="none") for w in windows])


def cut(windows: Tensor, length: int) -> Tensor:
    """Windows (n, T + 1) as pieces (n * T / length, length + 1), each without what stood before it."""
    if windows.dim() != 2 or length < 1 or (windows.shape[1] - 1) % length:
        raise ValueError(f"windows {tuple(windows.shape)}, (n, T + 1), do not divide into pieces of {length=}")
    return windows.unfold(1, length + 1, length).flatten(0, 1)


# What goes wrong inside?


@contextmanager
def record_attention(model: DeepSeekV3) -> Iterator[list[tuple[MLA, Tensor, tuple]]]:
    """Inside the `with`, each main layer's attention adds (itself, its input (B, T, D), its rope table) to the list."""
    found = []

    def hook(attention, arguments):
        found.append((attention, *arguments[:2]))

    layers = list(model.model.layers)[: model.config.num_hidden_layers]
    handles = [layer.self_attn.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_weights(attention: MLA, x: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    """What the queries at `positions` (P,) of one sequence x (1, T, D) look at: softmax weights (H, P, T)."""
    q_nope, q_pe = (part[0, positions] for part in attention.queries(x, rope))  # (P, H, ...)
    c_kv, k_pe = (part[0] for part in attention.latents(x, rope))  # (T, C), (T, rope)
    k_nope = attention.kv_b_proj(c_kv).unflatten(-1, (attention.n_heads, -1))[..., : attention.nope_dim]  # (T, H, nope)
    scores = torch.einsum("phn,shn->hps", q_nope, k_nope) + torch.einsum("phr,sr->hps", q_pe, k_pe)
    visible = causal_mask(x.shape[1], x.shape[1], x.device)[positions]
    return (scores * attention.scale).masked_fill(~visible, float("-inf")).softmax(-1)


@torch.no_grad()
def attention_entropy(model: DeepSeekV3, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Entropy, in nats, of the weights of every layer and head at `positions` (P,) of one text (T,): (layers, H, P)."""
    with record_attention(model) as found:
        model.model(input_ids[None])
    weights = (attention_weights(attention, x, rope, positions) for attention, x, rope in found)
    return torch.stack([-torch.xlogy(w, w).sum(-1) for w in weights])


# Which clocks may be slowed?


def interpolated_frequencies(dim: int, theta: float, factor: float) -> Tensor:
    """Every clock slowed alike, theta_i / s: position interpolation, (dim/2,)."""
    return rope_frequencies(dim, theta) / factor


def ntk_frequencies(dim: int, theta: float, factor: float) -> Tensor:
    """Another base, b * s^(dim / (dim - 2)): the fastest clock keeps its speed, the slowest is s times slower."""
    if dim < 4:
        raise ValueError(f"{dim=}; a fastest and a slowest clock, so 4 or more, needed")
    return rope_frequencies(dim, theta * factor ** (dim / (dim - 2)))


def yarn_scaling(factor: float, original: int, temperature: bool = True) -> dict:
    """V3's `rope_scaling` for another factor and trained length; temperature=False leaves the scores as they are."""
    mscale = float(temperature)
    lengths = {"factor": factor, "original_max_position_embeddings": original}
    return {"type": "yarn", **lengths, "beta_fast": 32, "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale}


def stretch(model: DeepSeekV3, method: str, factor: float, original: int) -> DeepSeekV3:
    """The same weights, shared, read with slower clocks: "rope" (as they were), "interpolation", "ntk", "yarn" or
    "yarn frequencies" (YaRN without its temperature).

    factor: s; original: the trained length. Raises ValueError for another method, a factor below 1, and for a model
    that is stretched already.
    """
    config = model.config
    if config.rope_scaling is not None:
        raise ValueError(f"the model is stretched already: rope_scaling={config.rope_scaling}")
    if not 1 <= factor < float("inf") or method not in ("rope", "interpolation", "ntk", "yarn", "yarn frequencies"):
        raise ValueError(
            f"{method=} with {factor=}: rope, interpolation, ntk, yarn, yarn frequencies; factor 1 or more"
        )
    if method.startswith("yarn"):
        scaling = yarn_scaling(factor, original, temperature=method == "yarn")
        config = config.replace(rope_scaling=scaling, max_position_embeddings=int(factor * original))
    with torch.device("meta"):
        stretched = DeepSeekV3(config)
    stretched.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    dim, theta = config.qk_rope_head_dim, config.rope_theta
    if method == "interpolation":
        stretched.model.frequencies = interpolated_frequencies(dim, theta, factor)
    elif method == "ntk":
        stretched.model.frequencies = ntk_frequencies(dim, theta, factor)
    return stretched


# How little tuning is enough?


def final_learning_rate(peak: float) -> float:
    """The last plateau of the report's schedule, at which it extends the context: 7.3e-6 of 2.2e-4."""
    return peak * learning_rate_factor(LAST_PLATEAU)


def extend(
    model: DeepSeekV3,
    windows: Tensor,
    batch_size: int,
    learning_rate: float,
    end_rate: float | None = None,
    dtype: torch.dtype = torch.float32,
    warmup: int = 3,
) -> dict:
    """Tune on windows (n, T + 1), batch by batch in their order. Changes the model.

    The rate rises over `warmup` steps and stays, as in the report, or falls to `end_rate` over the last half. The loss
    is that of the end of pre-training: MTP at lambda = 0.1, balance loss at alpha = 1e-4, biases frozen (gamma = 0).
    Returns tokens, seconds and the main head's loss of every step.
    """
    if batch_size < 1 or windows.dim() != 2 or not len(windows):
        raise ValueError(f"windows are {tuple(windows.shape)} and {batch_size=}; (n, T + 1) and 1 or more needed")
    optimizer, losses, started = make_optimizer(model, TrainOptions()), [], time.perf_counter()
    batches, end_rate = windows.split(batch_size), learning_rate if end_rate is None else end_rate
    for step, batch in enumerate(batches):
        parts, _ = training_losses(model, batch, mtp=bool(model.mtp_layers), dtype=dtype)
        factors = {"loss": 1.0, "mtp": 0.1, "balance": 1e-4}
        optimizer.zero_grad()
        sum(factors[name] * loss for name, loss in parts.items()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        fallen = max(0.0, 2 * (step + 1) / len(batches) - 1)
        for group in optimizer.param_groups:
            group["lr"] = (learning_rate + (end_rate - learning_rate) * fallen) * min(1.0, (step + 1) / (warmup + 1))
        optimizer.step()
        losses.append(round(parts["loss"].item(), 4))
    n_tokens = windows[:, 1:].numel()
    return {"tokens": n_tokens, "seconds": round(time.perf_counter() - started, 1), "losses": losses}
