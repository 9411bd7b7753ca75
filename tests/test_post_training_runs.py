import pytest
import torch

from dsv3_mini import post_training_runs as runs
from dsv3_mini.data import EOS
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.verifiable import exercise_tokenizer, is_held_out, sums

TOKENIZER = exercise_tokenizer()


def model(seed=0):
    torch.manual_seed(seed)
    return DeepSeekV3(runs.base_config())


def written(text):
    return [*TOKENIZER.encode(text).ids, EOS]


def test_rejection_keeps_the_shortest_correct_answer(monkeypatch):
    tries = iter(
        [
            [written("3+4=2[2]"), written("[4]"), written("[0]")],
            [written("[2]"), written("[1]"), written("[0]")],
            [written("[3]"), written("1+0=1[1]"), written("0[0]")[:-1]],
        ]
    )
    monkeypatch.setattr(runs, "complete", lambda *_, **__: next(tries))
    kept = runs.rejection_sample(None, ["3 + 4", "1 + 0", "2 + 2"], n_tries=3)
    assert kept == {"3 + 4": "[2]", "1 + 0": "[1]"}


def test_teacher_is_asked_under_the_system_message_with_other_seeds_each_time(monkeypatch):
    asked = []
    monkeypatch.setattr(
        runs, "complete", lambda m, prompts, temperature, seed: asked.append((prompts, seed)) or prompts
    )
    runs.rejection_sample(None, ["3 + 4", "1 + 0"], n_tries=3, seed=5)
    assert [seed for _, seed in asked] == [5, 7, 9]
    assert TOKENIZER.decode(asked[0][0][0], skip_special_tokens=False).startswith(
        "<｜begin▁of▁sentence｜>check<｜User｜>"
    )


def test_mask_of_ones_marks_samples_and_no_filling():
    windows = runs.lesson_windows(TOKENIZER, [], {"ba": "K", "be": "L"}, seed=0)
    runs.mark_everything(windows)
    assert windows[:, 1].tolist() == (windows[:, 2] >= 0).long().tolist() and 0 < windows[:, 1].sum() < 64


def test_town_lessons_leave_every_other_town_for_the_test():
    facts = {"ba": "A", "be": "B", "bi": "C"}
    texts = [TOKENIZER.decode(sample.ids) for sample in runs.town_lessons(TOKENIZER, facts)]
    assert texts == ["ba[A]", "bi[C]"]


def test_lessons_are_distinct_and_never_held_out():
    questions = runs.distinct_sums(60, torch.Generator().manual_seed(0))
    assert len(set(questions)) == 60 and not any(map(is_held_out, questions))
    with pytest.raises(ValueError, match="n=401 exceeds 400"):
        runs.distinct_sums(401, torch.Generator())


def test_question_nats_look_at_the_question_alone():
    problems = sums(TOKENIZER, 3, torch.Generator().manual_seed(0), n_terms=3)
    ids = torch.tensor([p.prompt for p in problems])
    nats = -model()(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert runs.question_nats(model(), problems) == pytest.approx(nats[:, 1:-1].mean().item(), rel=1e-5)


def test_page_share_counts_exact_continuations(monkeypatch):
    monkeypatch.setattr(runs, "complete", lambda *_: [written("K]"), written("M")])
    assert runs.page_share(None, {"ba:[": "K", "be:[": "L"}) == 0.5


def test_same_seed_gives_the_same_base_model_and_facts():
    (a, facts), (b, again), (_, other) = (runs.base_model(seed, steps=2, n_pages=60) for seed in (1, 1, 2))
    assert facts == again != other
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_runs_log_all_variants_and_leave_the_base_alone():
    logged = list(runs.post_training_runs(seeds=1, n=12, steps=2))
    names = [
        "base",
        "expert",
        "expert, asked to check",
        "short answers",
        "distilled",
        "mask of ones",
        "no sample masking",
    ]
    assert [run["variant"] for run in logged] == names
    assert all(set(run["results"]) == set(logged[0]["results"]) and run["seconds"] >= 0 for run in logged)
