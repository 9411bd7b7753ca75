"""Cached decoding, sampling, and speculative decoding that writes exactly what plain decoding would.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_mini.model import DeepSeekV3

# Why two phases?


@dataclass
class Generation:
    """New tokens (B, max_new_tokens or fewer), how many were drafted and accepted, and the seconds it took."""

    tokens: Tensor
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0


def check_request(model: DeepSeekV3, input_ids: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse what cannot be generated, before any work."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"the prompt has shape {tuple(input_ids.shape)}; (batch, at least one token) is needed")
    if int(input_ids.max()) >= model.config.vocab_size or int(input_ids.min()) < 0:
        raise ValueError(f"the prompt holds token {int(input_ids.max())}; vocab_size is {model.config.vocab_size}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    if (needed := input_ids.shape[1] + max_new_tokens) > (limit := model.config.max_position_embeddings):
        raise ValueError(f"prompt and new tokens take {needed} positions; max_position_embeddings is {limit}")


# How is a token chosen?


def next_distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution to draw from, (..., V): one-hot at temperature 0, else a softmax cut to top_p."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # the token that crosses top_p stays
        probabilities = torch.zeros_like(ordered).scatter_(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row: (B, V) -> (B, 1)."""
    if generator is None:
        return probabilities.argmax(-1, keepdim=True)
    return torch.multinomial(probabilities, 1, generator=generator)


def decode_plain(model, input_ids, max_new_tokens, temperature, top_p, generator, on_token) -> Generation:
    """Prefill the prompt, then one token at a time."""
    caches = model.new_caches(len(input_ids), input_ids.shape[1] + max_new_tokens)
    ids, new = input_ids, []
    while len(new) < max_new_tokens:
        h = model.model(ids, caches)[:, -1]  # (B, D)
        ids = draw(next_distribution(model.lm_head(h), temperature, top_p), generator)  # (B, 1)
        new.append(ids)
        on_token(ids[:, 0].tolist())
        if len(input_ids) == 1 and ids.item() == model.config.eos_token_id:
            break
    return Generation(torch.cat(new, dim=1) if new else input_ids[:, :0])


# How can a draft be checked without changing the text?


def accept_draft(draft: Tensor, p: Tensor, q: Tensor, generator: torch.Generator | None) -> tuple[bool, Tensor]:
    """Speculative sampling's rule: keep the draft with chance min(1, p/q), else draw from what p has more than q.

    draft: (1, 1), drawn from q; p, q: (1, V). The token returned is distributed as p, whatever q is.
    """
    ratio = (p.gather(-1, draft) / q.gather(-1, draft)).item()
    threshold = 0.5 if generator is None else torch.rand(1, generator=generator).item()
    if threshold < ratio:
        return True, draft
    return False, draw((p - q).clamp(min=0) / (p - q).clamp(min=0).sum(), generator)


def decode_speculative(model, input_ids, max_new_tokens, temperature, top_p, generator, on_token) -> Generation:
    """Draft token i + 2 with the MTP layer while token i + 1 is fresh, then let the main model judge both at once."""
    caches = model.new_caches(1, input_ids.shape[1] + max_new_tokens + 2)
    mtp = model.mtp_layers[0]
    mtp_cache = mtp.self_attn.new_cache(1, input_ids.shape[1] + max_new_tokens + 2)
    result, new = Generation(input_ids[:, :0]), []

    def emit(token):
        """Deliver a token; False when the text is complete."""
        new.append(token)
        on_token([token.item()])
        return len(new) < max_new_tokens and token.item() != model.config.eos_token_id

    h = model.model(input_ids, caches)  # (1, T, D)
    token = draw(next_distribution(model.lm_head(h[:, -1]), temperature, top_p), generator)
    known = torch.cat((input_ids[:, 1:], token), dim=1)  # (1, T): the token after each state of h
    running = max_new_tokens > 0 and emit(token)
    while running:
        rope = model.model.rope(mtp_cache.length, known.shape[1])
        q = next_distribution(mtp.shared_head(mtp(h, known, rope, mtp_cache)[:, -1]), temperature, top_p)
        draft = draw(q, generator)
        h = model.model(torch.cat((token, draft), dim=1), caches)  # (1, 2, D)
        p = next_distribution(model.lm_head(h), temperature, top_p)  # (1, 2, V)
        accepted, token = accept_draft(draft, p[:, 0], q, generator)
        result.drafted, result.accepted = result.drafted + 1, result.accepted + accepted
        running, known = emit(token), token
        if not accepted:
            h = h[:, :1]
            for cache in caches:
                cache.truncate(cache.length - 1)
        elif running:
            token = draw(p[:, 1], generator)
            running, known = emit(token), torch.cat((draft, token), dim=1)
    result.tokens = torch.cat(new, dim=1) if new else input_ids[:, :0]
    return result


@torch.inference_mode()
def generate(
    model: DeepSeekV3,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    speculative: bool = False,
    on_token: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Continue (B, T) prompts of equal length by up to `max_new_tokens`; a single prompt stops at the end token.

    temperature 0 is greedy. speculative: draft with the MTP layer and verify two tokens at a time (one prompt). The
    text is what plain decoding gives: the same tokens when greedy, the same distribution when sampling.
    on_token receives the new ids of each row as they come. Raises ValueError for a request that cannot be served.
    """
    check_request(model, input_ids, max_new_tokens, temperature, top_p)
    if speculative and (not model.mtp_layers or len(input_ids) != 1):
        found = f"{len(model.mtp_layers)} MTP layers and {len(input_ids)} prompts"
        raise ValueError(f"speculative decoding needs an MTP layer and one prompt; here are {found}")
    generator = None
    if temperature > 0:
        generator = torch.Generator(device=input_ids.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
    started = time.perf_counter()
    decode = decode_speculative if speculative else decode_plain
    result = decode(model, input_ids, max_new_tokens, temperature, top_p, generator, on_token or (lambda ids: None))
    result.seconds = time.perf_counter() - started
    return result


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer.json of a checkpoint folder; FileNotFoundError or ValueError if it is missing or torn."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
