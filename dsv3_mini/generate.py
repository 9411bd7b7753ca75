"""Text from a trained model: prompts of unequal length, sampling, and drafts that speed it up without changing it.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.decode import DecodePlan, Decoder
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.sampling import Sampler

# How is a token chosen, and a draft checked?


def check_request(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    """Refuse what cannot be generated, before any work: ValueError naming what is wrong and what would do."""
    if not prompts or not all(prompts):
        raise ValueError("a prompt holds no token; at least one is needed")
    if strange := [i for row in prompts for i in row if not 0 <= i < config.vocab_size]:
        raise ValueError(f"the prompt holds token {strange[0]}; tokens lie in 0..{config.vocab_size - 1}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    if (needed := max(map(len, prompts)) + max_new_tokens) > (limit := config.max_position_embeddings):
        raise ValueError(f"prompt and new tokens take {needed} positions; max_position_embeddings is {limit}")


class Event(NamedTuple):
    """One token of a row: written by the main model, an accepted draft, or a draft that was rejected."""

    row: int
    token: int
    kind: str  # "model", "accepted" or "rejected"


class Texts:
    """The rows as they grow, and which of them are complete.

    stop: token ids that end a row; stop_when: (row, new ids) -> True ends it as well.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int], stop_when):
        self.ids, self.new = [list(row) for row in prompts], [[] for _ in prompts]
        self.left, self.stop, self.stop_when = [max_new_tokens] * len(prompts), set(stop), stop_when

    @property
    def running(self) -> bool:
        return any(self.left)

    def write(self, row: int, token: int, kind: str) -> Iterator[Event]:
        """Add a token to a row that is not complete."""
        if self.left[row]:
            self.ids[row].append(token)
            self.new[row].append(token)
            stopped = token in self.stop or (self.stop_when is not None and self.stop_when(row, self.new[row]))
            self.left[row] = 0 if stopped else self.left[row] - 1
            yield Event(row, token, kind)

    def window(self, starts: Sequence[int], length: int, drafts: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Tokens starts[i] .. starts[i] + length - 1 of each row and its drafts, 0 beyond their end: (B, length)."""
        rows = zip(self.ids, starts, drafts or [()] * len(starts), strict=True)
        cut = [[*ids[start : start + length], *more][:length] for ids, start, more in rows]
        return torch.tensor([row + [0] * (length - len(row)) for row in cut])


def pick(h: Tensor, places: Sequence[int]) -> Tensor:
    """One state of each row: (B, T, D) and B indices -> (B, D)."""
    return h[:, places[0]] if len(h) == 1 else h[torch.arange(len(h)), list(places)]


def decode_plain(decoder: Decoder, texts: Texts, sampler: Sampler) -> Iterator[Event]:
    """Prefill the prompts, then one token a row and step."""
    device, lengths = decoder.plan.device, [len(ids) for ids in texts.ids]
    h = decoder.prefill(texts.window([0] * len(lengths), max(lengths)).to(device))  # (B, T, D)
    h = pick(h, [length - 1 for length in lengths])  # (B, D)
    while texts.running:
        tokens, _ = sampler.choose(decoder.logits(h))
        for row, token in enumerate(tokens):
            yield from texts.write(row, token, "model")
        if texts.running:
            starts = [len(ids) - 1 for ids in texts.ids]
            h = decoder.step(texts.window(starts, 1).to(device), starts)[:, 0]


class Drafter:
    """Guesses one or two tokens beyond each text with the MTP layers, from verified states alone.

    A second guess comes from the second MTP layer, or where there is one, from its own state and first guess.
    """

    def __init__(self, decoder: Decoder, n_drafts: int):
        self.decoder, self.n_drafts, self.n_layers = decoder, n_drafts, min(n_drafts, len(decoder.plan.mtp))
        self.starts: list[list[int]] | None = None  # first position that each MTP layer has not verified
        self.carried: Tensor | None = None  # (B, 1, D): the first layer's last state, the second layer's first input

    def run(self, depth: int, h: Tensor, ids: Tensor, starts: list[int]) -> Tensor:
        ids = ids.to(self.decoder.plan.device)
        if self.starts is None:
            return self.decoder.mtp_prefill(depth, h, ids)
        only_last = len(h) == 1 and self.n_layers == 1  # the newest state is all that a draft needs
        return self.decoder.mtp_step(depth, h, ids, starts, only_last)

    def draft(self, texts: Texts, h: Tensor, sampler: Sampler) -> tuple[list[list[int]], list[Tensor | None]]:
        """The main model's new states (B, T, D), from the first unverified position on -> each row's drafts, and
        for each depth the distributions (B, V) they were drawn from."""
        last = [len(ids) - 2 for ids in texts.ids]  # position of the newest state
        starts = self.starts or [[0] * len(h)] * self.n_layers
        new = self.run(0, h, texts.window([s + 1 for s in starts[0]], h.shape[1]), starts[0])
        newest = [end - start for end, start in zip(last, starts[0], strict=True)]
        state = new[:, -1] if len(h) == 1 else pick(new, newest)  # (B, D)
        tokens, q = sampler.choose(self.decoder.logits(state))
        drafts, qs = [[token] for token in tokens], [q]
        if self.n_drafts == 2:
            state = self.second(texts, new, state, drafts, starts, last)
            tokens, q = sampler.choose(self.decoder.logits(state))
            drafts, qs = [[*row, token] for row, token in zip(drafts, tokens, strict=True)], [*qs, q]
        # Layer k read token i + k for state i: its entries up to the last known token are verified, later ones are not.
        self.starts = [[end + 1 - k for end in last] for k in range(self.n_layers)]
        return drafts, qs

    def second(self, texts: Texts, new: Tensor, state: Tensor, drafts, starts, last) -> Tensor:
        """The state (B, D) that the second draft is read from."""
        if self.n_layers == 1:  # the same layer, one position on; the entry is overwritten by the verified one
            ids = torch.tensor(drafts, device=new.device)
            return self.decoder.mtp_step(0, state.unsqueeze(1), ids, [end + 1 for end in last])[:, 0]
        h = new if self.carried is None else torch.cat((self.carried, new), dim=1)
        ids = texts.window([s + 2 for s in starts[1]], h.shape[1], drafts)
        h = self.run(1, h, ids, starts[1])
        self.carried = state.unsqueeze(1)
        return pick(h, [end - start for end, start in zip(last, starts[1], strict=True)])


def decode_speculative(decoder: Decoder, texts: Texts, sampler: Sampler, n_drafts: int) -> Iterator[Event]:
    """Prefill; then draft, let the main model judge all drafts in one step, keep what stands."""
    device, lengths, drafter = decoder.plan.device, [len(ids) for ids in texts.ids], Drafter(decoder, n_drafts)
    rows = range(len(lengths))
    h = decoder.prefill(texts.window([0] * len(lengths), max(lengths)).to(device))  # (B, T, D)
    tokens, _ = sampler.choose(decoder.logits(pick(h, [length - 1 for length in lengths])))
    for row in rows:
        yield from texts.write(row, tokens[row], "model")
    while texts.running:
        drafts, q = drafter.draft(texts, h, sampler)
        starts = [len(ids) - 1 for ids in texts.ids]
        h = decoder.step(texts.window(starts, n_drafts + 1, drafts).to(device), starts)  # (B, n_drafts + 1, D)
        targets = sampler.targets(decoder.logits(h))
        for row in rows:
            if not texts.left[row]:
                continue
            of_row = [None if distribution is None else distribution[row] for distribution in q]
            kept, token = sampler.verify(row, drafts[row], targets[row], of_row)
            for draft in drafts[row][:kept]:
                yield from texts.write(row, draft, "accepted")
            if kept < n_drafts and texts.left[row]:
                yield Event(row, drafts[row][kept], "rejected")
            yield from texts.write(row, token, "model")
        h = h[:, : max(len(ids) - 1 - start for ids, start in zip(texts.ids, starts, strict=True))]


class Plan(Protocol):
    """What `stream` needs of a model prepared for decoding, such as `DecodePlan`."""

    config: ModelConfig
    device: torch.device
    mtp: Sequence

    def decoder(self, batch: int, capacity: int, n_mtp: int = 0) -> Decoder: ...


@torch.inference_mode()
def stream(
    model: DeepSeekV3 | Plan,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int | None] | None = None,
    n_drafts: int = 0,
    stop: Collection[int] = (),
    stop_when: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[Event]:
    """Continue prompts (lists of token ids, of any lengths) and yield each token as soon as it is certain.

    The iterator can be dropped at any time, which is all that a stop button needs. seeds: one for each row; a row's
    text depends on its own prompt and seed only. n_drafts: 0, or 1 or 2 drafts a step from the MTP layers.
    stop, stop_when: as in `Texts`. ValueError for a request that cannot be served, when the first token is asked for.
    """
    config, prompts = model.config, [list(row) for row in prompts]
    check_request(config, prompts, max_new_tokens, temperature, top_p)
    if n_drafts not in (0, 1, 2):
        raise ValueError(f"{n_drafts} drafts a step; 0, 1 or 2 are possible")
    if strange := [token for token in stop if not 0 <= token < config.vocab_size]:
        raise ValueError(f"stop token {strange[0]} does not exist; tokens lie in 0..{config.vocab_size - 1}")
    plan = DecodePlan(model) if isinstance(model, DeepSeekV3) else model
    if n_drafts and not plan.mtp:
        raise ValueError("speculative decoding drafts with an MTP layer, and this model has none")
    capacity = max(map(len, prompts)) + max_new_tokens + n_drafts
    decoder = plan.decoder(len(prompts), capacity, min(n_drafts, len(plan.mtp)))
    sampler = Sampler(temperature, top_p, [None] * len(prompts) if seeds is None else seeds)
    texts = Texts(prompts, max_new_tokens, stop, stop_when)
    if n_drafts:
        yield from decode_speculative(decoder, texts, sampler, n_drafts)
    else:
        yield from decode_plain(decoder, texts, sampler)


@dataclass
class Generation:
    """New tokens (B, longest row), how many were drafted and accepted, and the seconds it took.

    lengths: new tokens of each row; a row that ended early is filled up with its last token.
    """

    tokens: Tensor
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)


def generate(
    model: DeepSeekV3 | Plan,
    input_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    speculative: bool | int = False,
    on_token: Callable[[list[int | None]], None] | None = None,
    stop: Collection[int] | None = None,
) -> Generation:
    """Continue prompts, (B, T) token ids or lists of unequal lengths, by up to `max_new_tokens`.

    temperature 0 is greedy. seed: one for each row, or a number to which the row's index is added. speculative: draft
    one token a step with the MTP layer, or two. The text is what plain decoding gives: the same tokens when greedy
    (to rounding, see the chapter), the same distribution when sampling. on_token receives the new id of one row, and
    None for the others, as it comes. stop: ids that end a row, the config's end token if not given.
    Raises ValueError for a request that cannot be served.
    """
    prompts = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(row) for row in input_ids]
    if isinstance(input_ids, Tensor) and input_ids.dim() != 2:
        raise ValueError(f"the prompt has shape {tuple(input_ids.shape)}; (batch, tokens) is needed")
    eos = model.config.eos_token_id
    settings = {"temperature": temperature, "top_p": top_p, "seeds": row_seeds(seed, len(prompts))}
    settings |= {"n_drafts": int(speculative), "stop": ([] if eos is None else [eos]) if stop is None else stop}
    started, new, counts = time.perf_counter(), [[] for _ in prompts], {"accepted": 0, "rejected": 0, "model": 0}
    for event in stream(model, prompts, max_new_tokens, **settings):
        counts[event.kind] += 1
        if event.kind != "rejected":
            new[event.row].append(event.token)
            if on_token:
                on_token([event.token if row == event.row else None for row in range(len(new))])
    lengths = [len(row) for row in new]
    tokens = [row + row[-1:] * (max(lengths) - len(row)) for row in new]
    result = Generation(torch.tensor(tokens, dtype=torch.long).reshape(len(new), max(lengths)), lengths=lengths)
    result.drafted, result.accepted = counts["accepted"] + counts["rejected"], counts["accepted"]
    result.seconds = time.perf_counter() - started
    return result


def row_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int | None]:
    """One seed for each row."""
    if seed is None:
        return [None] * batch
    seeds = [seed + row for row in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} prompts")
    return seeds


# How does text come out whole?


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer.json of a checkpoint folder; FileNotFoundError or ValueError if it is missing or torn."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
