"""The rule that judges claims, and the claims: every verdict follows from a log or a function and turns with it."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_mini import evidence
from dsv3_mini.claims import CLAIMS
from dsv3_mini.evidence import count_spikes
from dsv3_mini.ledger import VERDICTS, Bound, Effect, Logs, Number, flat, judge, to_html, weakest

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "assets/runs"
BY_NUMBER = {claim.number: claim for claim in CLAIMS}
MIRRORED = (7, 10, 13, 29, 32, 33, 39, 41)  # they rest on differences between variants
TOLD = {
    "reproduced": [1, 2, 4, 5, 7, 8, 10, 11, 13, *range(18, 20), *range(21, 30), 32, 33, 34, 35, 37, 38, 39, 41],
    "same direction": [20, 42],
    "inside the noise": [6, 17, 30, 31, 40],
    "not seen": [3, 9, 12, 14, 15, 16],
    "not testable here": [36],
}
FROM_LOGS = [claim for claim in CLAIMS if claim.measure and claim.measure.__module__ == evidence.__name__]


@pytest.fixture(scope="module")
def rows():
    return {row.claim.number: row for row in judge(CLAIMS, Logs(RUNS))}


def test_there_are_forty_two_claims_each_shown_by_a_chapter():
    assert [claim.number for claim in CLAIMS] == list(range(1, 43))
    assert all(list((ROOT / "chapters").glob(f"{claim.chapter:02d}_*.ipynb")) for claim in CLAIMS)
    assert all(claim.measure or claim.why for claim in CLAIMS)


def test_a_number_is_reproduced_within_its_tolerance_or_lies_on_the_right_side():
    assert Number("", 1.004, 1.0).verdict == "reproduced" and Number("", 1.006, 1.0).verdict == "not seen"
    assert Number("", 1.2, 1.8, baseline=1.0).verdict == "same direction"
    assert Number("", 0.9, 1.8, baseline=1.0).verdict == "not seen"


@pytest.mark.parametrize(
    ("differences", "reported", "verdict"),
    [
        ((-0.30, -0.31, -0.32), None, "reproduced"),
        ((-0.30, -0.31, -0.32), -0.2, "reproduced"),
        ((-0.30, -0.31, -0.32), -0.1, "same direction"),
        ((-0.30, 0.31, -0.32), None, "inside the noise"),
        ((0.30, 0.31, 0.32), None, "not seen"),
        ((-0.30,), None, "same direction"),
        ((0.0, 0.0, 0.0), None, "inside the noise"),
    ],
)
def test_an_effect_is_judged_by_sign_size_and_noise(differences, reported, verdict):
    assert Effect("", differences, -1, reported).verdict == verdict


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=6), st.sampled_from([-1, 1]), st.floats(0.1, 9))
def test_mirrored_differences_with_a_mirrored_sign_have_the_same_verdict(differences, sign, size):
    mirrored = Effect("", [-x for x in differences], -sign, -sign * size)
    assert Effect("", differences, sign, sign * size).verdict == mirrored.verdict


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=6))
def test_no_effect_and_its_opposite_are_both_confirmed(differences):
    confirmed = [Effect("", differences, sign).verdict == "reproduced" for sign in (-1, 1)]
    assert not all(confirmed)


def test_noise_is_two_standard_errors():
    assert Effect("", (1.0, 2.0, 3.0), 1).noise == pytest.approx(2 / math.sqrt(3))


def test_a_promise_is_kept_by_all_by_some_or_lies_below_the_noise():
    assert Bound("", (0.1, 0.2), 0.2).verdict == "reproduced" and Bound("", (0.3, 0.3), 0.2).verdict == "not seen"
    assert Bound("", (0.1, 0.3), 0.2).verdict == "inside the noise"
    assert Bound("", (0.3, 0.3), 0.2, noise=0.4).verdict == "inside the noise"
    assert Bound("", (3.0,), 2.0, at_least=True).verdict == "reproduced"
    assert flat("", [0.1, 0.11, 0.09], 0.01).verdict == "not seen"


def test_a_claim_is_as_good_as_its_weakest_finding():
    good, poor = Number("", 1.0, 1.0), Number("", 0.0, 1.0)
    assert weakest([good, good]) == "reproduced" and weakest([good, poor, good]) == "not seen"


def test_a_missing_log_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m dsv3_mini experiment balance"):
        Logs(tmp_path)("balance")
    with pytest.raises(ValueError, match="no run of variant 'magic'"):
        Logs(RUNS).values("balance", "magic", "valid_loss")


@pytest.mark.parametrize("claim", FROM_LOGS, ids=lambda claim: str(claim.number))
def test_evidence_cannot_be_had_without_its_log(claim, tmp_path):
    with pytest.raises(FileNotFoundError):
        claim.measure(Logs(tmp_path))


class Mirror(Logs):
    """The logs with every difference between two variants turned round."""

    def difference(self, *arguments):
        return [-x for x in super().difference(*arguments)]


@pytest.mark.parametrize("number", MIRRORED)
def test_a_verdict_turns_when_its_log_changes_sign(number, rows):
    assert rows[number].verdict in VERDICTS[:2]
    (mirrored,) = judge([BY_NUMBER[number]], Mirror(RUNS))
    assert mirrored.verdict == "not seen"


def test_verdicts_are_those_that_the_chapter_tells(rows):
    found = {verdict: [n for n, row in rows.items() if row.verdict == verdict] for verdict in VERDICTS}
    assert found == TOLD


def test_the_table_holds_every_claim_and_escapes_its_text(rows):
    table = to_html(list(rows.values()))
    assert table.count("<tr>") == 43 and "MLA ≥ MHA &gt; GQA &gt; MQA" in table


def test_spikes_are_counted_and_slow_rises_are_not():
    losses = [5 - n / 100 + (0.05 if n % 2 else 0.0) for n in range(300)]
    assert count_spikes(losses) == 0
    losses[200] += 2.0
    assert count_spikes(losses) == 1
