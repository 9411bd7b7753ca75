"""Text in, text out: whole characters, stop strings, gaps to fill.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import codecs
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from dsv3_mini.data import BOS, FIM_BEGIN, FIM_END, FIM_HOLE, SPECIAL_TOKENS, token_bytes, token_ids
from dsv3_mini.decode import DecodePlan
from dsv3_mini.generate import Plan, load_tokenizer, stream
from dsv3_mini.model import DeepSeekV3

# How does text come out whole?


class TextStream:
    """Turns tokens into text that never has to be taken back: whole characters, and nothing of a stop string.

    feed(token) gives the text that is now certain; `stopped` turns True when a stop string is complete.
    """

    def __init__(self, tokens: Sequence[bytes], stop: Sequence[str] = ()):
        self.tokens, self.stop, self.stopped = tokens, [text for text in stop if text], False
        self.decoder, self.held = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""

    def feed(self, token: int) -> str:
        return self.release(self.decoder.decode(self.tokens[token]))

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        text = self.release(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def release(self, new: str) -> str:
        """Everything up to a stop string, or up to what may become one."""
        if self.stopped:
            return ""
        self.held += new
        if found := [place for text in self.stop if (place := self.held.find(text)) >= 0]:
            self.stopped, text, self.held = True, self.held[: min(found)], ""
            return text
        keep = max((n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text


class Piece(NamedTuple):
    """Text that a token adds, and where the token came from."""

    text: str
    kind: str  # "model", "accepted" (a draft that stood), "rejected" (one that fell); "end": text held back until then


class Completer:
    """A model with its tokenizer, ready to write. plan_type: `DecodePlan`, or `CompiledPlan` for long texts on a CPU.

    ValueError when the tokenizer names tokens that the model lacks.
    """

    def __init__(self, model: DeepSeekV3, tokenizer: Tokenizer, plan_type: type[Plan] = DecodePlan):
        size, rows = tokenizer.get_vocab_size(), model.config.vocab_size
        if size > rows:
            raise ValueError(
                f"the tokenizer has {size} tokens and the model {rows}: they belong to different checkpoints"
            )
        self.tokenizer, self.tokens, self.plan = tokenizer, token_bytes(tokenizer), plan_type(model, size)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, plan_type: type[Plan] = DecodePlan) -> "Completer":
        """Open a checkpoint folder with its tokenizer.json."""
        tokenizer = load_tokenizer(folder)
        return cls(DeepSeekV3.from_pretrained(folder), tokenizer, plan_type)

    def prompt_ids(self, prompt: str, suffix: str | None = None) -> list[int]:
        """Token ids of a prompt; with a suffix, of the gap between both in the order that training used (PSM)."""
        if suffix is None:
            return token_ids(self.tokenizer, [prompt])[0]
        for i in (FIM_BEGIN, FIM_HOLE, FIM_END):
            if self.tokenizer.id_to_token(i) != SPECIAL_TOKENS[i]:
                raise ValueError(f"the tokenizer has no {SPECIAL_TOKENS[i]}, which filling a gap needs")
        before, after = token_ids(self.tokenizer, [prompt, suffix])
        return [BOS, FIM_BEGIN, *before, FIM_HOLE, *after, FIM_END]

    def stream(
        self, prompt: str, max_new_tokens: int, *, suffix: str | None = None, stop: Sequence[str] = (), **settings
    ) -> Iterator[Piece]:
        """Continue a prompt, or fill the gap before `suffix`, piece by piece.

        stop: strings that end the text and are not part of it. settings: temperature, top_p, seeds and n_drafts as
        in `dsv3_mini.generate.stream`.
        """
        text, eos = TextStream(self.tokens, stop), self.plan.config.eos_token_id
        prompts, ends = [self.prompt_ids(prompt, suffix)], [] if eos is None else [eos]
        for event in stream(self.plan, prompts, max_new_tokens, stop=ends, **settings):
            if event.kind == "rejected":
                yield Piece(self.tokens[event.token].decode("utf-8", errors="replace"), event.kind)
            else:
                yield Piece(text.feed(event.token), event.kind)
                if text.stopped:
                    return
        yield Piece(text.finish(), "end")

    def complete(self, prompt: str, max_new_tokens: int, **settings) -> str:
        """The whole new text at once; arguments as in `stream`."""
        return "".join(p.text for p in self.stream(prompt, max_new_tokens, **settings) if p.kind != "rejected")
