"""The claims of the report that a small reproduction can test, and the rule that judges what was measured.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

# What counts as reproduced?


VERDICTS = ("reproduced", "same direction", "inside the noise", "not seen", "not testable here")


@dataclass(frozen=True)
class Number:
    """A computed value against the report's. Within `tolerance` (relative) it is reproduced.

    baseline: what the value would be without the effect; a value on the report's side of it has the same direction.
    """

    what: str
    value: float
    reported: float
    tolerance: float = 0.005
    baseline: float | None = None

    @property
    def verdict(self) -> str:
        if abs(self.value - self.reported) <= self.tolerance * abs(self.reported):
            return "reproduced"
        same_side = self.baseline is not None and (self.value - self.baseline) * (self.reported - self.baseline) > 0
        return "same direction" if same_side else "not seen"

    @property
    def measured(self) -> str:
        return f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.4g}"


@dataclass(frozen=True)
class Effect:
    """Paired differences between two variants, one a seed, whose sign (and size, where known) the report predicts."""

    what: str
    differences: Sequence[float]
    sign: int
    reported: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def noise(self) -> float:
        """Two standard errors; nan for one run."""
        n = len(self.differences)
        return 2 * statistics.stdev(self.differences) / math.sqrt(n) if n > 1 else math.nan

    @property
    def verdict(self) -> str:
        if abs(self.mean) <= self.noise:
            return "inside the noise"
        if self.mean * self.sign <= 0:
            return "not seen"
        comparable = self.reported is None or 0.5 <= self.mean / self.reported <= 2
        return "reproduced" if comparable and not math.isnan(self.noise) else "same direction"

    @property
    def measured(self) -> str:
        noise = "one run" if math.isnan(self.noise) else f"± {self.noise:.2g}"
        return f"{self.mean:+.3g} {noise}"


@dataclass(frozen=True)
class Bound:
    """Values, one a run, none of which may exceed a limit; or, at_least, fall below it.

    noise: the largest value of a control in which nothing was changed; below it no run can keep a smaller limit.
    """

    what: str
    values: Sequence[float]
    limit: float
    at_least: bool = False
    noise: float = 0.0

    @property
    def verdict(self) -> str:
        kept = sum((value >= self.limit) if self.at_least else (value <= self.limit) for value in self.values)
        unclear = kept or max(self.values) <= self.noise
        return "reproduced" if kept == len(self.values) else "inside the noise" if unclear else "not seen"

    @property
    def measured(self) -> str:
        worst, promise = (min, "at least") if self.at_least else (max, "at most")
        return f"{worst(self.values):.3g}, {promise} {self.limit:g} wanted"


def flat(what: str, differences: list[float], limit: float) -> Bound:
    """The promise that a change leaves a number as it is; below the noise of its own seeds nothing can be told."""
    effect = Effect(what, differences, +1)
    return Bound(what, [abs(effect.mean)], limit, noise=effect.noise)


Finding = Number | Effect | Bound


def weakest(findings: Sequence[Finding]) -> str:
    """The verdict of a claim that rests on all of these."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index)


class Logs:
    """The logged runs of a folder, read when asked for."""

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.read = Path(folder), {}

    def __call__(self, name: str) -> dict:
        """A whole log, by name; FileNotFoundError says how to make it."""
        if name not in self.read:
            file = self.folder / f"{name}.json"
            if not file.is_file():
                raise FileNotFoundError(f"no {file}; `python -m dsv3_mini experiment {name}` writes it")
            self.read[name] = json.loads(file.read_text(encoding="utf-8"))
        return self.read[name]

    def values(self, name: str, variant: str, value: Callable[[dict], float] | str) -> dict[int, float]:
        """One number of each run of a variant, by seed; value: a key of the run, or a function of it."""
        get = value if callable(value) else lambda run: run[value]
        found = {run["seed"]: get(run) for run in self(name)["runs"] if run["variant"] == variant}
        if not found:
            raise ValueError(f"{name}.json has no run of variant {variant!r}")
        return found

    def difference(self, name: str, variant: str, control: str, value: Callable[[dict], float] | str) -> list[float]:
        """variant - control of the same seed, for every seed that has both."""
        ours, theirs = (self.values(name, which, value) for which in (variant, control))
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


@dataclass(frozen=True)
class Claim:
    """One claim: its number in the list, the report's section, its words and number, the chapter that shows it.

    measure: findings from the logs; None where nothing here can test it, and `why` says so.
    """

    number: int
    section: str
    text: str
    reported: str
    chapter: int
    measure: Callable[[Logs], list[Finding]] | None = None
    why: str = ""


@dataclass(frozen=True)
class Row:
    """A claim and what was found."""

    claim: Claim
    findings: list[Finding]
    verdict: str


def judge(claims: Sequence[Claim], logs: Logs) -> list[Row]:
    """Measure every claim that can be measured."""
    rows = []
    for claim in claims:
        findings = claim.measure(logs) if claim.measure else []
        rows.append(Row(claim, findings, weakest(findings) if findings else "not testable here"))
    return rows


COLOURS = ("#009E73", "#56B4E9", "#E69F00", "#D55E00", "#7F7F7F")  # of the verdicts, in their order


def to_html(rows: Sequence[Row]) -> str:
    """The ledger as a table: claim, the report's number, every finding, the chapter, the verdict."""
    lines = [
        "<table><tr><th>#</th><th>claim</th><th>report</th><th>measured here</th><th>ch.</th><th>verdict</th></tr>"
    ]
    for row in rows:
        claim, colour = row.claim, COLOURS[VERDICTS.index(row.verdict)]
        found = "<br>".join(f"{escape(f.what)}: <b>{escape(f.measured)}</b>" for f in row.findings) or escape(claim.why)
        cells = (str(claim.number), escape(claim.text), escape(claim.reported), found, f"{claim.chapter:02d}")
        body = "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells)
        lines.append(f'<tr>{body}<td style="text-align:left;color:{colour}"><b>{row.verdict}</b></td></tr>')
    return "\n".join([*lines, "</table>"])
