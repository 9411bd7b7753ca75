"""Advantages, the clipped objective and the loop that uses them, against loops, closed forms and cheats."""

import copy
import itertools
import json
import math
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dsv3_mini.grpo as grpo
import dsv3_mini.grpo_runs as grpo_runs
from dsv3_mini.__main__ import main
from dsv3_mini.code_reward_runs import Writing, describe_bodies
from dsv3_mini.code_rewards import any_python, heads_of, no_trifles, read_body
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import token_ids, train_tokenizer
from dsv3_mini.generate import generate
from dsv3_mini.grpo import (
    GRPO,
    GRPOOptions,
    Rollouts,
    clipped_gain,
    group_advantages,
    grpo_loss,
    grpo_loss_printed,
    grpo_loss_reference,
    kl_estimate,
    pass_at_k,
    roll_out,
    token_logprobs,
)
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.rewards import RewardModel, by_rule, preference_loss, preference_pairs, train_reward_model

SMALL = dict(vocab_size=23, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_nextn_predict_layers=0)
NARROW = dict(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
FFN = dict(intermediate_size=40, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2)
PROMPTS = [[0, 5, 9], [0, 7], [0, 11, 4, 6, 8]]
rewards_of_groups = st.lists(st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5), min_size=1, max_size=4).map(
    torch.tensor
)


class Question(NamedTuple):
    prompt: list[int]


def policy(seed=0, std=0.3, **changes):
    torch.manual_seed(seed)
    sizes = {**SMALL, **NARROW, **FFN, "n_group": 1, "topk_group": 1, "initializer_range": std, **changes}
    return DeepSeekV3(ModelConfig.preset("nano", **sizes))


def numbers(seed=0, n=5, t=7):
    """logp, old, ref, advantages, mask of odd sizes, ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    logp, old, ref = (-torch.rand(n, t, generator=g, dtype=torch.float64) * 2 for _ in range(3))
    mask = torch.arange(t) >= torch.randint(t - 1, (n, 1), generator=g)
    mask &= torch.arange(t) < t - torch.tensor([0, 1, 0, 2, 0])[:n, None]
    mask[:, t // 2 + 1] = True
    return logp.requires_grad_(), old, ref, torch.randn(n, generator=g, dtype=torch.float64), mask


def gradient(loss_fn, logp, *rest, **options):
    return torch.autograd.grad(loss_fn(logp, *rest, **options), logp)[0]


# log-probabilities


def test_logprobs_are_those_of_the_next_token():
    model, ids = policy(), torch.randint(23, (3, 9))
    found = token_logprobs(model, ids)
    for n, t in itertools.product(range(3), range(8)):
        p = model(ids[n : n + 1, : t + 1])[0, -1].softmax(-1)
        assert found[n, t].item() == pytest.approx(p[ids[n, t + 1]].log().item(), abs=1e-4)


def test_logprobs_sum_to_the_probability_of_whole_outputs():
    model, prompt = policy(), [0, 5]
    rows = [[*prompt, a, b] for a in range(23) for b in range(23)]
    total = token_logprobs(model, torch.tensor(rows))[:, 1:].sum(-1).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-4)


def test_logprobs_have_the_gradient_of_cross_entropy():
    model, ids = policy(), torch.randint(23, (2, 6))
    token_logprobs(model, ids).sum().backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, -model.lm_head.weight.grad)


# rollouts


def test_mask_shows_written_tokens_and_only_them():
    rollouts = Rollouts.of([[3, 4, 5], [6]], [[7, 1], [8, 9, 2, 1]])
    assert rollouts.ids.tolist() == [[3, 4, 5, 7, 1], [6, 8, 9, 2, 1]]
    assert [rollouts.ids[n, 1:][rollouts.mask[n]].tolist() for n in range(2)] == rollouts.outputs


def test_filling_changes_no_loss():
    model, (prompts, outputs) = policy(), (PROMPTS, [[3, 1], [4, 6, 2, 1], [9]])
    short = Rollouts.of(prompts, outputs)
    longer = Rollouts(nn.functional.pad(short.ids, (0, 4), value=17), nn.functional.pad(short.mask, (0, 4)), outputs)
    a = torch.tensor([1.0, -2.0, 0.5])
    losses = []
    for r in (short, longer):
        logp = token_logprobs(model, r.ids)
        losses.append(grpo_loss(logp, logp.detach() - 0.1, logp.detach() + 0.2, a, r.mask).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_rollouts_are_groups_of_samples_from_the_policy():
    model, source = policy(), random.Random(4)
    rollouts = roll_out(model, PROMPTS, 2, 6, seed=4)
    seeds = [source.getrandbits(48) for _ in range(6)]
    rows = [prompt for prompt in PROMPTS for _ in range(2)]
    expected = generate(model, rows, 6, temperature=1.0, seed=seeds)
    assert rollouts.outputs == [r[:n].tolist() for r, n in zip(expected.tokens, expected.lengths, strict=True)]
    assert (
        roll_out(model, PROMPTS, 2, 6, seed=4).outputs == rollouts.outputs != roll_out(model, PROMPTS, 2, 6, 5).outputs
    )


# advantages


@settings(deadline=None)
@given(rewards_of_groups, st.floats(0.1, 10), st.floats(-5, 5))
def test_advantages_sum_to_zero_and_know_neither_scale_nor_shift(rewards, scale, shift):
    rewards = rewards.double().round(decimals=2)
    a = group_advantages(rewards)
    assert a.sum(-1).abs().max() < 1e-6 and a.isfinite().all()
    torch.testing.assert_close(group_advantages(rewards * scale + shift), a, rtol=1e-4, atol=1e-4)


def test_advantages_have_unit_deviation_within_each_group():
    rewards = torch.tensor([[1.0, 0, 0, 0, 0], [3, -1, 4, 1, -5]])
    a = group_advantages(rewards)
    assert a.square().mean(-1).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(group_advantages(rewards, divide_by_std=False)[0], torch.tensor([0.8] + 4 * [-0.2]))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e-8, 12345.6])
def test_equal_rewards_give_zero_advantage_and_no_nan(value):
    assert group_advantages(torch.full((2, 7), value)).tolist() == [[0.0] * 7] * 2


# KL


@settings(deadline=None)
@given(st.lists(st.floats(-20, 0), min_size=3, max_size=3), st.lists(st.floats(-20, 0), min_size=3, max_size=3))
def test_kl_estimate_is_never_negative(logp, ref):
    assert (kl_estimate(torch.tensor(logp).double(), torch.tensor(ref).double()) >= 0).all()


def test_kl_estimate_averages_to_the_divergence_under_the_policy():
    logp, ref = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    assert (logp.exp() * kl_estimate(logp, ref)).sum().item() == pytest.approx(exact.item())


def test_gradient_of_the_kl_estimate_is_that_of_the_other_divergence():
    ref = torch.randn(9, dtype=torch.float64).log_softmax(-1)
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    logp = x.log_softmax(-1)
    (of_estimate,) = torch.autograd.grad((logp.detach().exp() * kl_estimate(logp, ref)).sum(), x, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), x)
    torch.testing.assert_close(of_estimate, forward)


# the objective


@pytest.mark.parametrize(("clip", "beta"), [(0.2, 0.04), (0.05, 1.0), (10.0, 0.001), (math.inf, 0.0)])
def test_loss_and_gradient_equal_the_loop(clip, beta):
    case = numbers()
    options = dict(clip=clip, beta=beta)
    torch.testing.assert_close(grpo_loss(*case, **options), grpo_loss_reference(*case, **options))
    torch.testing.assert_close(gradient(grpo_loss, *case, **options), gradient(grpo_loss_reference, *case, **options))


def test_printed_loss_has_one_ratio_and_one_kl_an_output():
    logp, old, ref, a, mask = numbers(1)
    total = 0.0
    for n in range(len(logp)):
        p, p_old, p_ref = (torch.exp(sum(x[n, t] for t in range(7) if mask[n, t])) for x in (logp, old, ref))
        ratio, to_ref = p / p_old, p_ref / p
        total = total + min(ratio * a[n], ratio.clamp(0.8, 1.2) * a[n]) - 0.04 * (to_ref - to_ref.log() - 1)
    torch.testing.assert_close(grpo_loss_printed(logp, old, ref, a, mask), -total / len(logp))
    expected = torch.autograd.grad(-total / len(logp), logp)[0]
    torch.testing.assert_close(gradient(grpo_loss_printed, logp, old, ref, a, mask), expected)


def test_both_losses_are_one_for_outputs_of_one_token():
    logp, old, ref, a, _ = numbers()
    mask = torch.zeros(5, 7, dtype=torch.bool).scatter_(1, torch.tensor([[0], [3], [6], [2], [1]]), True)
    torch.testing.assert_close(grpo_loss(logp, old, ref, a, mask), grpo_loss_printed(logp, old, ref, a, mask))


def test_first_gradient_is_the_policy_gradient_with_a_baseline():
    logp, _, ref, a, mask = numbers(2)
    plain = -(a[:, None] * logp * mask).sum(-1) / mask.sum(-1)
    expected = torch.autograd.grad(plain.mean(), logp)[0]
    torch.testing.assert_close(gradient(grpo_loss, logp, logp.detach(), ref, a, mask, beta=0.0), expected)
    plain = torch.autograd.grad(-((logp * mask).sum(-1) * a).mean(), logp)[0]
    torch.testing.assert_close(gradient(grpo_loss_printed, logp, logp.detach(), ref, a, mask, beta=0.0), plain)


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"), [(1, 1.3, 0), (1, 0.5, 1), (1, 1.1, 1), (-1, 0.7, 0), (-1, 1.5, 1), (-1, 0.9, 1)]
)
def test_clip_stops_only_those_who_went_far_enough(advantage, ratio, moves):
    x = torch.tensor(float(ratio), requires_grad=True)
    clipped_gain(x, torch.tensor(float(advantage)), 0.2).backward()
    assert x.grad.item() == moves * advantage


def test_tokens_outside_the_mask_move_nothing_even_if_impossible():
    logp, old, ref, a, mask = numbers()
    blocked = logp.detach().masked_fill(~mask, -math.inf).requires_grad_()
    for loss_fn in (grpo_loss, grpo_loss_printed):
        torch.testing.assert_close(loss_fn(blocked, old, ref, a, mask), loss_fn(logp, old, ref, a, mask))


# the loop


def likes(token):
    return by_rule(lambda question, output: float(token in output))


def trainer(judge, seed=0, **options):
    sizes = {"group_size": 5, "max_new_tokens": 3, "learning_rate": 1e-2, **options}
    return GRPO(policy(seed), judge, GRPOOptions(**sizes), seed=seed)


def test_training_raises_what_is_rewarded():
    run = trainer(likes(17), beta=0.0)
    logs = [run.step([Question(p) for p in PROMPTS]) for _ in range(25)]
    assert sum(x["reward"] for x in logs[-5:]) / 5 > 0.9 > 0.5 > sum(x["reward"] for x in logs[:3]) / 3
    assert logs[0]["kl"] < 1e-6 < logs[-1]["kl"] and logs[-1]["entropy"] < logs[0]["entropy"]


def test_the_reference_is_frozen_and_a_copy():
    run = trainer(by_rule(lambda question, output: output[0]))
    before = copy.deepcopy(run.reference.state_dict())
    run.step([Question(p) for p in PROMPTS])
    assert all(torch.equal(x, run.reference.state_dict()[name]) for name, x in before.items())
    assert any(not torch.equal(x, run.policy.state_dict()[name]) for name, x in before.items())


def test_the_old_policy_is_the_one_that_sampled_not_the_reference(monkeypatch):
    run, seen = trainer(likes(17), n_updates=3, clip=0.5), []
    run.reference = policy(1)
    monkeypatch.setattr(grpo, "grpo_loss", lambda *a: seen.append(a[:3]) or grpo_loss(*a))
    before = copy.deepcopy(run.policy)
    rollouts = roll_out(run.policy, PROMPTS, 2, 3, 0)
    run.update(rollouts, torch.tensor([1.0, -1, 1, -1, 0.5, -0.5]))
    expected = token_logprobs(before, rollouts.ids)
    assert len(seen) == 3 and torch.equal(seen[0][0], seen[0][1])  # the first ratio is exactly 1
    for _, old, ref in seen:
        torch.testing.assert_close(old, expected)
        assert (ref - old).abs().max() > 0.1


def test_groups_that_agree_move_nothing_without_the_kl_term():
    run = trainer(by_rule(lambda question, output: 0.3), beta=0.0)
    before = copy.deepcopy(run.policy.state_dict())
    assert run.step([Question(p) for p in PROMPTS])["equal_groups"] == 1.0
    assert all(torch.equal(x, run.policy.state_dict()[name]) for name, x in before.items())


def test_runs_repeat_from_their_seed():
    logs = []
    for seed in (3, 3, 4):
        run = trainer(likes(5), seed=0)
        run.seeds = random.Random(seed)
        log = [run.step([Question(p) for p in PROMPTS]) for _ in range(2)]
        logs.append([{k: v for k, v in x.items() if k != "seconds"} for x in log])
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("wrong", [{"group_size": 1}, {"n_updates": 0}, {"clip": 0.0}, {"beta": -1.0}])
def test_options_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        GRPOOptions(**wrong)


@pytest.mark.parametrize(("c", "k"), [(0, 3), (2, 1), (2, 3), (5, 2), (7, 7), (1, 7)])
def test_pass_at_k_counts_the_sets_of_k_tries_with_a_hit(c, k):
    tries = [True] * c + [False] * (7 - c)
    sets = list(itertools.combinations(tries, k))
    expected = sum(map(any, sets)) / len(sets)
    assert pass_at_k(torch.tensor([tries]), k).item() == pytest.approx(expected)


# rewards


def test_reward_model_reads_the_last_written_token_and_not_the_filling():
    model = RewardModel(policy())
    nn.init.normal_(model.head.weight)
    rollouts = Rollouts.of(PROMPTS, [[3, 1], [4, 6, 2, 1], [9]])
    for n, (prompt, output) in enumerate(zip(PROMPTS, rollouts.outputs, strict=True)):
        alone = model(Rollouts.of([prompt], [output]))
        assert model(rollouts)[n].item() == pytest.approx(alone.item(), abs=1e-5)


def test_preference_loss_is_bradley_terry():
    r = torch.tensor([1.0, -0.5, 2.0, 0.0], requires_grad=True)
    preference_loss(r[:2], r[2:]).backward()
    p = torch.tensor([1 / (1 + math.exp(1)), 1 / (1 + math.exp(0.5))])  # chance that the chosen one wins
    torch.testing.assert_close(r.grad, torch.cat((p - 1, 1 - p)) / 2)


def test_pairs_take_a_better_and_a_worse_output_of_one_question():
    rewards = torch.tensor([[0.0, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 0]])
    chosen, rejected = preference_pairs(rewards, seed=3)
    assert (chosen // 3).tolist() == (rejected // 3).tolist() == [0, 2]
    flat = rewards.flatten()
    assert (flat[chosen] > flat[rejected]).all()
    nothing = preference_pairs(rewards[[1, 3]])
    assert [len(x) for x in nothing] == [0, 0]
    with pytest.raises(ValueError, match="no pair of outputs"):
        train_reward_model(RewardModel(policy()), Rollouts.of(PROMPTS, [[1]] * 3), nothing, 1)


def test_reward_model_learns_what_was_preferred():
    rollouts = roll_out(policy(), PROMPTS * 20, 4, 3, 0)
    wanted = torch.tensor([float(output[0] > 11) for output in rollouts.outputs])
    pairs, model = preference_pairs(wanted.view(60, 4), seed=1), RewardModel(policy())
    assert torch.equal(model(rollouts), torch.zeros(240))
    losses = train_reward_model(model, rollouts, pairs, 60)
    scores = model(rollouts)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.4
    assert scores[wanted == 1].mean() > scores[wanted == 0].mean() + 0.5


# functions, read and never run


@pytest.mark.parametrize(
    ("code", "parses", "statements", "reads", "trivial"),
    [
        ("def f(x):\n    return\n", True, 1, False, True),
        ("def f(x):\n    pass\n    ...\n    'text'\n", True, 0, False, True),
        ("def f(x):\n    y = x + 1\n    return y\n", True, 2, True, False),
        ("def f(x):\n    y = 1\n    y = 1\n    y = 1\n", True, 1, False, True),
        ("def f(x, *, k=1):\n    if k:\n        g(2)\n    return 3\n", True, 3, True, False),
        ("def f(x):\n    x = 1\n    return 2\n", True, 2, False, False),
        ("def f(x:\n    return\n", False, 0, False, False),
    ],
)
def test_a_body_is_judged_by_what_it_does(code, parses, statements, reads, trivial):
    body = read_body(code)
    assert (body.parses, body.statements, body.reads_parameter, body.trivial) == (parses, statements, reads, trivial)


def test_judged_code_is_never_run(tmp_path):
    file = tmp_path / "ran"
    body = read_body(f"def f(x=open({str(file)!r}, 'w')):\n    a = open({str(file)!r}, 'w')\n    return x\n")
    assert body.parses and not file.exists()


def test_what_the_cheap_rule_pays_the_other_does_not():
    cheap, useful = read_body("def f(x):\n    return x\n"), read_body("def f(x):\n    y = g(x)\n    return y\n")
    assert any_python(cheap) == any_python(useful) == no_trifles(useful) == 1.0
    assert no_trifles(cheap) == any_python(read_body("def f(x:\n    return\n")) == 0.0


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n\nclass A:\n    pass\n"] * 9, 300)


def written(tokenizer, text):
    return token_ids(tokenizer, [text])[0]


def test_writing_stops_where_the_function_is_left(tokenizer):
    writing = Writing(tokenizer)
    for text, left in (("    return x\n", False), ("    return x\n\n    y", False), ("    return x\n\nclass", True)):
        assert writing.left(0, written(tokenizer, text)) == left


def test_bodies_are_judged_up_to_the_line_that_leaves(tokenizer):
    (head,) = heads_of(tokenizer, ["def f(x):\n"])
    texts = ["    y = x\n    return y\n\nclass ((", "    y = (x\n    return y\n\nclass A", "    pass\nb"]
    rollouts = Rollouts.of([head.prompt] * 3, [written(tokenizer, text) for text in texts])
    bodies = Writing(tokenizer).bodies([head] * 3, rollouts)
    assert [body.parses for body in bodies] == [True, False, True]
    assert describe_bodies(bodies)["trivial"] == pytest.approx(1 / 3, abs=1e-4)


# the logged runs


def test_runs_hold_every_variant_mistake_and_leash(monkeypatch):
    monkeypatch.setattr(grpo_runs, "is_correct", lambda tokenizer, problem, output: len(output) % 2 == 0)
    sizes = dict(
        outputs=16, max_new_tokens=4, n_test=2, tries=2, n_preferences=24, judge_steps=2, steps_against_model=1
    )
    plan, start = grpo_runs.Plan(2, **sizes), policy(std=0.1, vocab_size=264)
    runs = dict(grpo_runs.seed_runs(start, plan, seed=0))
    learned = {f"learned reward, beta {beta:g}" for beta in grpo_runs.BETAS}
    assert set(runs) == {"fine-tuned", *grpo_runs.VARIANTS, *grpo_runs.MISTAKES, *learned}
    assert all(len(run["curve"]) == (1 if name in learned else 2) for name, run in runs.items() if "curve" in run)
    assert all(0 <= run["results"]["correct"] <= 1 and len(run["pass_at_k"]) == 2 for run in runs.values())
    json.dumps(runs, allow_nan=False)


def test_mistakes_are_the_mistakes_they_are_named_after():
    model, ids = policy(), torch.randint(23, (2, 6))
    found = grpo_runs.Unshifted.logprobs(None, model, ids)
    assert found[0, 0].item() == pytest.approx(model(ids[:, 1:])[0, 0].log_softmax(-1)[ids[0, 1]].item(), abs=1e-5)
    logp, old, ref, a, mask = numbers()
    run = grpo_runs.ReferenceAsOld(policy(), None, GRPOOptions())
    torch.testing.assert_close(run.loss(logp, old, ref, a, mask), grpo_loss(logp, ref, ref, a, mask))


def test_experiments_are_known_to_the_command(tmp_path, capsys):
    assert main(["experiment", "luck", "--out", str(tmp_path / "runs")]) == 2
    assert "grpo, code_reward" in capsys.readouterr().err


@pytest.mark.parametrize("rewards", [[1.0], [1.0, float("nan")], [[1.0, 0.0]]], ids=["too few", "no number", "a row"])
def test_a_judge_that_gives_no_number_an_output_is_refused_before_any_update(rewards):
    model = policy()
    before = [p.clone() for p in model.parameters()]
    run = GRPO(model, lambda *_: torch.tensor(rewards), GRPOOptions(group_size=2, max_new_tokens=3))
    with pytest.raises(ValueError, match="2 finite numbers are needed"):
        run.step([Question([3, 4])])
    assert all(map(torch.equal, before, model.parameters()))
