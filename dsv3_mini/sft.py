"""Supervised fine-tuning: conversations as tokens, a loss on the answers, packed samples that do not see each other.

Generated from chapters/14_post_training.ipynb; edit the chapter, not this file.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from dsv3_mini.baseline import causal_mask
from dsv3_mini.data import BOS, EOS, Batches, token_ids
from dsv3_mini.generate import generate
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.recipe import TrainOptions
from dsv3_mini.train import make_optimizer

# What is a conversation to the model?


class Sample(NamedTuple):
    """A conversation as tokens, and which of them the assistant writes."""

    ids: list[int]
    mask: list[bool]


def chat(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> Sample:
    """DeepSeek's template: bos system <User>question<Assistant>answer eos, the mask True on answers and their eos.

    messages: {"role": "system" | "user" | "assistant", "content": text}. After a question the assistant's turn is left
    open, as a prompt. What a text holds stays text: it cannot forge a turn. ValueError for roles in another order.
    """
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != [("user", "assistant")[n % 2] for n in range(len(turns))]:
        raise ValueError(f"roles {roles}: an optional system message is needed, then user and assistant in turn")
    user, assistant = (tokenizer.token_to_id(token) for token in ("<｜User｜>", "<｜Assistant｜>"))
    if user is None or assistant is None:
        raise ValueError("the tokenizer lacks <｜User｜> or <｜Assistant｜>; tokenizer.add_special_tokens can add them")
    opening, ids, mask = {"system": [], "user": [user], "assistant": [assistant]}, [BOS], [False]
    for message, role in zip(messages, roles, strict=True):
        start = opening[role]
        words = token_ids(tokenizer, [message["content"]])[0] + [EOS] * (role == "assistant")
        ids += start + words
        mask += [False] * len(start) + [role == "assistant"] * len(words)
    if roles[-1] == "user":
        ids, mask = [*ids, assistant], [*mask, False]
    return Sample(ids, mask)


def exchange(tokenizer: Tokenizer, question: str, answer: str | None = None, system: str = "") -> Sample:
    """The conversation of one question: with its answer to learn from, or open to be answered."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return chat(tokenizer, messages)


def complete(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """What the model answers to each prompt, its eos included where it comes."""
    found = generate(model, prompts, max_new_tokens, temperature=temperature, seed=seed)
    return [row[:length] for row, length in zip(found.tokens.tolist(), found.lengths, strict=True)]


def masked_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean nats of the marked tokens, each given those before it: logits (B, T, V), ids and mask (B, T + 1).

    Logit i judges token i + 1, so token and mask are shifted together. ValueError if nothing is marked.
    """
    marked = mask[:, 1:].bool()
    if not marked.any():
        raise ValueError("the mask marks no token: there is nothing to learn from")
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[marked].to(wide), ids[:, 1:][marked])


def pack_samples(samples: Sequence[Sample], seq_len: int) -> Tensor:
    """Whole samples, side by side, in windows of seq_len + 1 tokens: (n, 3, seq_len + 1) of ids, mask and owner.

    owner numbers the samples of a window from 0 and is -1 where eos fills it up. Each sample goes to the first window
    with room. ValueError for a sample longer than a window.
    """
    windows: list[list[Sample]] = []
    for sample in samples:
        if len(sample.ids) > seq_len + 1:
            raise ValueError(f"a sample of {len(sample.ids)} tokens exceeds the window of seq_len + 1 = {seq_len + 1}")
        room = (w for w in windows if sum(len(s.ids) for s in w) + len(sample.ids) <= seq_len + 1)
        if (window := next(room, None)) is None:
            windows.append(window := [])
        window.append(sample)
    packed = torch.tensor([EOS, 0, -1]).repeat(len(windows), seq_len + 1, 1).mT.contiguous()
    for rows, window in zip(packed, windows, strict=True):
        start = 0
        for n, (ids, mask) in enumerate(window):
            rows[:, start : start + len(ids)] = torch.tensor([ids, mask, [n] * len(ids)])
            start += len(ids)
    return packed


def sample_mask(owner: Tensor) -> Tensor:
    """Who may look at whom: at what came before in the same sample. owner (B, T) -> (B, 1, T, T), True to look."""
    same = owner[:, :, None] == owner[:, None, :]
    return (same & causal_mask(owner.shape[1], owner.shape[1], owner.device)).unsqueeze(1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Chapter 02's attention under a mask (B, 1, T, T) of its own: q, k (B, T, H, Dk), v (B, T, H, Dv) -> like v."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


@contextmanager
def sample_masking(model: DeepSeekV3, owner: Tensor) -> Iterator[None]:
    """Inside the `with`, the main layers read windows whose samples, told apart by owner (B, T), are alone."""
    layers = [layer.self_attn for layer in list(model.model.layers)[: model.config.num_hidden_layers]]
    cores, core = [layer.core for layer in layers], partial(masked_attention, mask=sample_mask(owner))
    for layer in layers:
        layer.core = core
    try:
        yield
    finally:
        for layer, before in zip(layers, cores, strict=True):
            layer.core = before


def sft_loss(model: DeepSeekV3, windows: Tensor) -> Tensor:
    """`masked_loss` of packed windows (B, 3, T + 1), every sample by itself."""
    ids, mask, owner = windows.unbind(1)
    with sample_masking(model, owner[:, :-1]):
        logits = model(ids[:, :-1])
    return masked_loss(logits, ids, mask)


# What does fine-tuning change?


def cosine_rate(fraction: float, peak: float, final: float) -> float:
    """Half a cosine from peak to final, when `fraction` of the steps is done (section 5.1)."""
    return final + (peak - final) * (1 + math.cos(math.pi * fraction)) / 2


def fine_tune(
    model: DeepSeekV3,
    windows: Tensor,
    epochs: int = 2,
    batch_size: int = 8,
    peak: float = 3e-3,
    final: float = 6e-4,
    seed: int = 0,
) -> list[float]:
    """Supervised fine-tuning on packed windows (n, 3, T + 1), in place: the loss of every step.

    The rates are ours, their ratio is the report's (5e-6 to 1e-6), as are the two epochs. Routing biases stay. Fewer
    windows than batch_size make one batch.
    """
    if windows.dim() != 3 or windows.shape[1] != 3 or not len(windows):
        raise ValueError(
            f"windows have shape {tuple(windows.shape)}; (n, 3, T + 1), as `pack_samples` makes them, n >= 1"
        )
    optimizer, losses = make_optimizer(model, TrainOptions()), []
    batches = Batches(windows, min(batch_size, len(windows)), seed)
    steps = epochs * len(batches)
    for step in range(steps):
        loss = sft_loss(model, batches.batch(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step / steps, peak, final)
        optimizer.step()
        losses.append(loss.item())
    return losses
