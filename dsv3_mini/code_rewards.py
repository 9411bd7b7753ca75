"""Rules for a function body that a model wrote, which read it and never run it.

Generated from chapters/14_post_training.ipynb; edit the chapter, not this file.
"""

import ast
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer

from dsv3_mini.data import BOS, token_ids
from dsv3_mini.evaluate import is_python

# What does a policy make of a bad rule?


class Head(NamedTuple):
    """The first line of a function, and its token ids as a prompt."""

    prompt: list[int]
    text: str


def heads_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Head]:
    """Prompts of first lines, which end in a line break."""
    return [Head([BOS, *ids], text) for ids, text in zip(token_ids(tokenizer, texts), texts, strict=True)]


@dataclass(frozen=True)
class Body:
    """What can be said of a function without running it.

    parses: it is Python; statements: different statements that do something (no `pass`, no text that stands alone);
    reads_parameter: one of them reads a parameter.
    """

    parses: bool
    statements: int = 0
    reads_parameter: bool = False

    @property
    def trivial(self) -> bool:
        """It parses, and does at most one thing."""
        return self.parses and self.statements < 2


def is_idle(node: ast.stmt) -> bool:
    """`pass`, a docstring, or another constant that stands alone."""
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def read_body(code: str) -> Body:
    """Look at the first function in `code`. Nothing is ever executed."""
    if not is_python(code):
        return Body(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(textwrap.dedent(code))
    function = next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)
    if function is None:
        return Body(False)
    inner = [node for part in function.body for node in ast.walk(part)]
    doing = {ast.dump(node) for node in inner if isinstance(node, ast.stmt) and not is_idle(node)}
    arguments = function.args
    parameters = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    read = {node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return Body(True, len(doing), bool(parameters & read))


def any_python(body: Body) -> float:
    """1 for whatever parses."""
    return float(body.parses)


def no_trifles(body: Body) -> float:
    """1 for a body that parses and does at least two different things."""
    return float(body.parses and not body.trivial)
