import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.data import BOS, EOS
from dsv3_mini.verifiable import (
    PAGES,
    Problem,
    draw_sum,
    exercise_book,
    exercise_tokenizer,
    is_correct,
    is_held_out,
    score,
    steps_on_clock,
    sum_on_clock,
    sums,
    town_facts,
    towns,
    write_page,
)

TOKENIZER = exercise_tokenizer()
PROBLEM = Problem("3 + 4 + 4", "1", [BOS])


def written(text, end=True):
    return TOKENIZER.encode(text).ids + [EOS] * end


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=7))
def test_steps_are_true_and_end_in_the_answer(terms):
    question = " + ".join(map(str, terms))
    first, *rest = steps_on_clock(question).split("+")
    total = int(first)
    for term, step in zip(terms[1:], rest, strict=True):
        assert step == f"{term}={(total + term) % 5}"
        total = int(step[-1])
    assert first == str(terms[0]) and sum_on_clock(question) == str(total) == str(sum(terms) % 5)


@pytest.mark.parametrize(
    "text, right",
    [
        *[("[1]", True), ("3+4=2+4=1[1]", True), ("[2]", False), ("1", False), ("", False)],
        *[("[0][1]", False), ("[1] or so", False), ("[ 1]", False), ("[[1]]", False), ("[1", False)],
    ],
)
def test_rule_wants_one_box_at_the_end(text, right):
    assert is_correct(TOKENIZER, PROBLEM, written(text)) == right


def test_an_answer_that_does_not_end_is_wrong():
    assert not is_correct(TOKENIZER, PROBLEM, written("[1]", end=False))
    assert is_correct(TOKENIZER, PROBLEM, [*written("[1]"), EOS, EOS])


def test_score_counts_right_ones_and_tokens():
    completions = [written("[1]"), written("3+4=2[2]")]
    assert score(TOKENIZER, [PROBLEM, PROBLEM], completions) == (0.5, (4 + 9) / 2)


def test_held_out_questions_are_on_no_page_and_in_no_lesson():
    generator = torch.Generator().manual_seed(3)
    book = "\n".join(exercise_book(300, town_facts(7, generator), generator)).splitlines()
    assert not [line for line in book if line.count(" + ") and is_held_out(line.split(":")[0])]
    assert all(is_held_out(p.question) for p in sums(TOKENIZER, 30, generator, held_out=True))
    assert not any(is_held_out(p.question) for p in sums(TOKENIZER, 30, generator))


def test_about_a_quarter_is_held_out_whatever_the_answer():
    questions = [f"{a} + {b} + {c} + {d}" for a in range(5) for b in range(5) for c in range(5) for d in range(5)]
    held_out = [q for q in questions if is_held_out(q)]
    counts = [sum(sum_on_clock(q) == str(answer) for q in held_out) for answer in range(5)]
    assert 0.2 < len(held_out) / len(questions) < 0.3 and min(counts) > 20


def test_first_towns_are_written_about_more_often():
    generator = torch.Generator().manual_seed(0)
    facts = town_facts(20, generator)
    text = "\n".join(write_page("facts", facts, generator) for _ in range(200))
    counts = [text.count(f"{town}:[{land}]") for town, land in facts.items()]
    assert sum(counts) == 1200 and sum(counts[:5]) > 2.5 * sum(counts[-5:]) and min(counts) > 0


def test_all_kinds_of_pages_are_made_of_what_the_rule_accepts():
    generator = torch.Generator().manual_seed(1)
    facts = town_facts(5, generator)
    for kind in PAGES:
        for line in write_page(kind, facts, generator).splitlines():
            question, _, answer = line.partition(":")
            expected = facts.get(question) or (sum_on_clock(question) if answer else "")
            assert not answer or is_correct(TOKENIZER, Problem(question, expected, []), written(answer))


def test_problems_repeat_with_their_generator_and_are_ready_to_be_answered():
    first, second = (sums(TOKENIZER, 5, torch.Generator().manual_seed(8), "check", n_terms=3) for _ in range(2))
    assert first == second and {p.question.count("+") for p in first} == {2}
    assert all(p.prompt[0] == BOS and p.prompt[-1] == 262 for p in first)
    assert [p.answer for p in towns(TOKENIZER, {"ba": "K"})] == ["K"]


def test_more_towns_than_names_are_refused():
    with pytest.raises(ValueError, match="n_towns=71 exceeds the 70 names"):
        town_facts(71, torch.Generator())


def test_draws_pairs_from_the_whole_table():
    generator = torch.Generator().manual_seed(0)
    assert len({draw_sum(2, generator) for _ in range(400)}) == 25
