"""Schedules are data: checked against DeepSeek's counts, torch's orders, the published formulas, and invariants."""

from types import SimpleNamespace

import pytest
import torch.distributed.pipelining.schedules as torch_schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.dualpipe import plan_transfers
from dsv3_mini.overlap import chunk_costs, chunk_tasks, run_streams
from dsv3_mini.schedule import (
    Chunk,
    Schedule,
    bubble,
    dualpipe_schedule,
    dualpipev_schedule,
    gpipe_schedule,
    one_f_one_b_schedule,
    result_of,
    simulate,
    source_of,
    zb1p_schedule,
)

ONE_WAY = {"gpipe": gpipe_schedule, "1f1b": one_f_one_b_schedule, "zb1p": zb1p_schedule}
MAKERS = {**ONE_WAY, "dualpipe": dualpipe_schedule, "dualpipev": dualpipev_schedule}
KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


@st.composite
def schedules(draw):
    """Any of the five, even ranks 2 to 16, any allowed count of micro-batches; and what each direction must hold."""
    name, n_ranks = draw(st.sampled_from(sorted(MAKERS))), draw(st.integers(1, 8)) * 2
    if name in ONE_WAY:
        n = draw(st.integers(1, 40))
        return ONE_WAY[name](n_ranks, n), {0: n}
    if name == "dualpipe":
        n = 2 * draw(st.integers(n_ranks, n_ranks + 12))
        return dualpipe_schedule(n_ranks, n), {0: n // 2, 1: n // 2}
    n = draw(st.integers(2 * n_ranks, 2 * n_ranks + 12))
    return dualpipev_schedule(n_ranks, n), {0: n, 1: n}


def chunks_of(ops):
    return [chunk for op in ops for chunk in op]


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_every_chunk_runs_exactly_once_on_every_rank(case):
    schedule, expected = case
    wanted = {(d, i) for d, n in expected.items() for i in range(n)}
    for ops in schedule:
        done = {kind: sorted(c[1:] for c in chunks_of(ops) if c.kind == kind) for kind in "FBIW"}
        assert done["F"] == sorted(done["B"] + done["I"]) == sorted(wanted)
        assert done["I"] == done["W"]


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_weight_parts_follow_their_input_parts_and_backwards_their_forwards(case):
    for ops in case[0]:
        place = {chunk: k for k, chunk in enumerate(chunks_of(ops))}
        for chunk, k in place.items():
            if chunk.kind == "W":
                assert place[chunk._replace(kind="I")] < k
            elif chunk.kind in "BI":
                assert place[chunk._replace(kind="F")] < k


@settings(max_examples=40, deadline=None)
@given(schedules(), st.sampled_from([(1, 2, 1, 3), (1, 2, 1, 2), (3, 5, 1, 7), (2, 7, 3, 9)]), st.sampled_from([0, 1]))
def test_no_op_starts_before_its_inputs_whatever_the_costs(case, times, latency):
    schedule, n_ranks = case[0], len(case[0])
    result = simulate(schedule, *times, latency=latency)
    ends = {(span.rank, result_of(chunk)): span.end for span in result.spans for chunk in span.op}
    assert len(result.spans) == sum(len(ops) for ops in schedule)  # no deadlock
    for span in result.spans:
        for source in (source_of(chunk, span.rank, n_ranks, schedule.folded) for chunk in span.op):
            assert source is None or span.start >= ends[source] + latency * (source[0] != span.rank)


def finishes_with_blocking_sends(batches):
    """Replay with rendezvous: a batch ends only when the other end of each of its transfers has been posted."""
    at, posted = [0] * len(batches), {(rank, move) for rank, plan in enumerate(batches) for move in plan[0]}
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(batches):
            needed = {(move.target if move.source == rank else move.source, move) for move in plan[at[rank]]}
            if at[rank] < len(plan) - 1 and needed <= posted:
                at[rank], moved = at[rank] + 1, True
                posted |= {(rank, move) for move in plan[at[rank]]}
    return all(k == len(plan) - 1 for k, plan in zip(at, batches, strict=True))


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_batches_never_deadlock_even_when_every_send_blocks(case):
    assert finishes_with_blocking_sends(plan_transfers(case[0]))


def test_receiving_only_what_the_next_op_needs_would_deadlock():
    schedule = dualpipe_schedule(4, 8)
    batches = plan_transfers(schedule)
    for rank, plan in enumerate(batches):
        coming = {move.payload: move for batch in plan for move in batch if move.target == rank}
        plan[:] = [[move for move in batch if move.source == rank] for batch in plan]
        for batch, op in zip(plan, schedule[rank], strict=False):
            sources = [source_of(chunk, rank, 4, False) for chunk in op]
            batch += [coming[source[1]] for source in sources if source and source[0] != rank]
    assert not finishes_with_blocking_sends(batches)


@settings(max_examples=30, deadline=None)
@given(schedules())
def test_transfers_are_posted_after_they_are_made_and_before_they_are_used(case):
    schedule, n_ranks = case[0], len(case[0])
    for rank, plan in enumerate(plan_transfers(schedule)):
        came, made = set(), set()
        for op, batch in zip([*schedule[rank], ()], plan, strict=True):
            assert {move.payload for move in batch if move.source == rank} <= made
            came |= {(move.source, move.payload) for move in batch if move.target == rank}
            sources = [source_of(chunk, rank, n_ranks, schedule.folded) for chunk in op]
            assert {source for source in sources if source and source[0] != rank} <= came
            made |= {result_of(chunk) for chunk in op}


@settings(max_examples=30, deadline=None)
@given(schedules())
def test_both_ends_of_a_link_post_messages_in_the_same_order(case):
    """NCCL has no tags: between two ranks, the k-th send meets the k-th receive."""
    order = [[move for batch in plan for move in batch] for plan in plan_transfers(case[0])]
    for rank, moves in enumerate(order):
        for peer in {move.target for move in moves if move.source == rank}:
            link = [move for move in moves if move[:2] == (rank, peer)]
            assert link == [move for move in order[peer] if move[:2] == (rank, peer)]


def test_dualpipe_of_the_published_figure_has_66_columns_and_idles_6():
    result = simulate(dualpipe_schedule(8, 20))
    assert (result.makespan, result.idle, result.peak_activations) == (66, [6] * 8, [9] * 8)


def test_sixteen_ranks_idle_45_15_and_14():
    idle = [simulate(make(16, 40)).idle for make in (one_f_one_b_schedule, zb1p_schedule, dualpipe_schedule)]
    assert idle == [[45] * 16, [15] * 16, [14] * 16]


@pytest.mark.parametrize("n", [20, 22, 40, 120])
def test_bubble_and_memory_do_not_depend_on_the_number_of_micro_batches(n):
    result = simulate(dualpipe_schedule(8, n))
    assert set(result.idle) == {6} and set(result.peak_activations) == {8 + 1}


def test_activations_kept_are_those_of_the_published_table():
    peaks = {name: simulate(make(8, 20)).peak_activations for name, make in MAKERS.items() if name != "dualpipev"}
    assert peaks["gpipe"] == [20] * 8 and peaks["1f1b"] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert peaks["zb1p"] == [8] * 8 and peaks["dualpipe"] == [9] * 8


STEPS = [(6, 1, 3, 3, 3, 1, 3, 1), (4, 2, 2, 4, 2, 2, 2, 2), (2, 3, 1, 5, 1, 3, 1, 3), (0, 4, 0, 6, 0, 4, 0, 4)]


@pytest.mark.parametrize(("rank", "counts"), list(enumerate(STEPS)))
def test_ranks_have_the_counts_of_the_eight_steps(rank, counts):
    one, two, three, four, five, six, seven, eight = counts
    ops = dualpipe_schedule(8, 20)[rank]
    kinds = [chunk.kind for chunk in chunks_of(ops)]
    assert kinds.count("F") == one + 2 * two + three + 2 * four + five == 20
    assert kinds.count("W") == three + seven + eight == kinds.count("I")
    assert sum(len(op) == 2 for op in ops) == 2 * four + five - (rank == 3)  # middle ranks leave one pair apart


def test_rank_3_runs_the_published_sequence():
    text = " ".join("".join(f"{c.kind}{c.direction}" for c in op) for op in dualpipe_schedule(8, 20)[3])
    start = "F0 F1 " * 4 + "F0 B1 F1B0 " + "F0B1 F1B0 " * 5
    assert text == start + "B1 B0 B1 B0 I1 I0 I1 I0 W1 W0 W1 W0"


def test_dualpipe_is_not_1f1b_in_disguise():
    schedule = dualpipe_schedule(4, 12)
    assert schedule[0][0] == (Chunk("F", 0, 0),) and schedule[-1][0] == (Chunk("F", 1, 0),)
    assert any(len(op) == 2 for ops in schedule for op in ops)
    spans = simulate(schedule).spans
    assert {span.rank for span in spans if span.start == 0} == {0, 3}
    pairs = [op for ops in schedule for op in ops if len(op) == 2]
    assert all(f.kind == "F" and b.kind == "B" and f.direction != b.direction for f, b in pairs)


@pytest.mark.parametrize(("n_ranks", "n"), [(1, 2), (2, 5), (4, 10), (5, 13), (8, 20)])
def test_dualpipev_is_the_order_of_torch(n_ranks, n):
    settings_ = SimpleNamespace(pp_group_size=n_ranks, _n_microbatches=n)
    calculate = torch_schedules.ScheduleDualPipeV._calculate_single_rank_operations
    for rank, ours in enumerate(dualpipev_schedule(n_ranks, n)):
        actions = [action.sub_actions or (action,) for action in calculate(settings_, rank)]
        assert ours == [tuple(chunk_of(part, n_ranks) for part in parts) for parts in actions]


def chunk_of(action, n_ranks):
    return Chunk(KINDS[action.computation_type.name], int(action.stage_index >= n_ranks), action.microbatch_index)


@pytest.mark.parametrize(("make", "split"), [(one_f_one_b_schedule, False), (zb1p_schedule, True)])
@pytest.mark.parametrize(("n_ranks", "n"), [(2, 2), (4, 7), (5, 11)])
def test_one_way_schedules_are_the_order_of_torch(make, split, n_ranks, n):
    for rank, ours in enumerate(make(n_ranks, n)):
        ahead = n_ranks - 1 - rank
        args = 1, n_ranks, ahead, n - ahead, ahead, rank, lambda _: 0, lambda _: 0, rank, split
        actions = [action for action in torch_schedules._get_1f1b_rank_ops(*args) if action]
        assert ours == [(chunk_of(action, n_ranks),) for action in actions]


def test_dualpipev_is_the_upper_half_of_dualpipe():
    assert list(dualpipev_schedule(4, 10)) == dualpipe_schedule(8, 20)[:4]
    result = simulate(dualpipev_schedule(4, 10))
    assert (result.makespan, result.idle, result.peak_activations) == (66, [6] * 4, [9] * 4)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p", "dualpipe"])
@pytest.mark.parametrize("n_ranks", [2, 6, 16])
def test_simulated_bubble_is_the_published_formula_where_it_is_exact(name, n_ranks):
    assert set(simulate(MAKERS[name](n_ranks, 40), F=2, B=4, W=2).idle) == {bubble(name, n_ranks, F=2, B=4, W=2)}


@pytest.mark.parametrize("W", [0.25, 0.5, 0.75])
def test_b_in_the_formulas_is_the_full_backward(W):
    """The Zero Bubble paper's B is the input part alone: (p - 1)(F + B - W) there is (p - 1)(F + B - 2W) here."""
    full, part = 1.5, 1.5 - W
    idle = simulate(zb1p_schedule(8, 20), F=1, B=full, W=W).idle
    assert idle == pytest.approx([bubble("zb1p", 8, 1, full, W)] * 8)
    assert idle == pytest.approx([7 * (1 + part - W)] * 8)
    assert bubble("zb1p", 8, 1, part, W) < bubble("zb1p", 8, 1, full, W)  # the two meanings mixed: too good


def test_dualpipe_formula_is_only_an_estimate_for_other_costs():
    times = dict(F=1, B=2, W=0.7, overlapped=2.6)
    idle = simulate(dualpipe_schedule(8, 20), **times).idle
    assert bubble("dualpipe", 8, **times) == pytest.approx(7.5)
    assert (min(idle), max(idle)) == pytest.approx((5.8, 6.6))


def test_latency_counts_between_ranks_only():
    assert simulate(gpipe_schedule(3, 1), latency=10).makespan == 3 * (1 + 2) + 4 * 10
    assert simulate(dualpipev_schedule(1, 2), latency=10) == simulate(dualpipev_schedule(1, 2))


def test_a_schedule_that_waits_in_a_circle_is_refused():
    stuck = Schedule([[(Chunk("B", 0, 0),), (Chunk("F", 0, 0),)], [(Chunk("F", 0, 0),), (Chunk("B", 0, 0),)]])
    with pytest.raises(ValueError, match="rank 0 for the inputs of .*rank 1 for the inputs"):
        simulate(stuck)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 4.0])
def test_a_pair_hides_all_travel_from_one_to_one_on(ratio):
    costs = chunk_costs(ratio / 4, 0.25, ratio / 4, 0.25)
    assert costs.overlapped == pytest.approx(3 * costs.W)
    assert costs.F + costs.B == pytest.approx(3 * costs.W + 1)


def test_streams_run_one_task_at_a_time_and_in_order():
    tasks = chunk_tasks(0.3, 0.5, 0.2, 0.4)
    spans = run_streams(tasks)
    for stream in ("compute", "network"):
        mine = sorted(spans[name] for name in tasks if tasks[name][0] == stream)
        assert all(a[1] <= b[0] + 1e-12 for a, b in zip(mine, mine[1:], strict=False))
    assert all(spans[name][0] >= spans[b][1] for name, (_, _, before) in tasks.items() for b in before)
    assert max(end for _, end in spans.values()) >= 2 * (0.5 + 0.4)


@pytest.mark.parametrize(
    ("make", "n_ranks", "n", "words"),
    [
        (dualpipe_schedule, 3, 12, "n_ranks=3"),
        (dualpipe_schedule, 4, 6, "n_chunks=6"),
        (dualpipe_schedule, 4, 9, "even"),
        (dualpipev_schedule, 4, 7, "8 or more"),
        (gpipe_schedule, 0, 1, "n_ranks=0"),
        (zb1p_schedule, 2, 0, "n_chunks=0"),
    ],
)
def test_impossible_counts_are_refused(make, n_ranks, n, words):
    with pytest.raises(ValueError, match=words):
        make(n_ranks, n)


def test_impossible_costs_and_methods_are_refused():
    with pytest.raises(ValueError, match="negative"):
        simulate(gpipe_schedule(2, 2), B=1, W=2)
    for time in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite"):
            simulate(gpipe_schedule(2, 2), latency=time)
    with pytest.raises(ValueError, match="dispatch=-1"):
        chunk_costs(1, -1, 1, 1)
    with pytest.raises(ValueError, match="choose one of gpipe"):
        bubble("dualpipes", 8)
    with pytest.raises(ValueError, match="n_ranks=3 must be .* even for DualPipe"):
        bubble("dualpipe", 3)


F0, B0 = Chunk("F", 0, 0), Chunk("B", 0, 0)


@pytest.mark.parametrize("op", [(Chunk("X", 0, 0),), (B0, F0), (F0, B0, F0), ()])
def test_an_op_that_is_neither_a_chunk_nor_a_pair_is_named(op):
    with pytest.raises(ValueError, match="rank 1: .* is neither one chunk"):
        simulate(Schedule([[(F0,)], [op]]))
    with pytest.raises(ValueError, match="no ranks"):
        simulate(Schedule([]))
