"""The executor: every schedule on real processes against one process, and what happens when a rank fails."""

import copy
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dsv3_mini.balance import sequence_balance_loss
from dsv3_mini.baseline import LanguageModel
from dsv3_mini.config import ModelConfig
from dsv3_mini.dualpipe import Mailbox, Pipeline, StageRunner, run_schedule
from dsv3_mini.fp8 import FP8Linear
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import record_routing
from dsv3_mini.mtp import mtp_losses
from dsv3_mini.schedule import (
    Chunk,
    Schedule,
    dualpipe_schedule,
    dualpipev_schedule,
    gpipe_schedule,
    one_f_one_b_schedule,
    simulate,
    zb1p_schedule,
)
from dsv3_mini.stages import Stage, WeightGradStore, defer_weight_gradients, split_into_stages, stages_of_rank
from dsv3_mini.workers import Workers

MAKERS = [gpipe_schedule, one_f_one_b_schedule, zb1p_schedule, dualpipe_schedule, dualpipev_schedule]
SIZES = dict(
    hidden_size=20, num_attention_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4,
    v_head_dim=6, intermediate_size=28, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=3,
    vocab_size=37,
)  # fmt: skip


def small_model(n_layers, dtype=torch.float64):
    torch.manual_seed(3)
    return DeepSeekV3(ModelConfig.preset("nano", num_hidden_layers=n_layers, initializer_range=0.1, **SIZES)).to(dtype)


def tokens(n, batch=2, length=8):
    return torch.randint(37, (n, batch, length), generator=torch.Generator().manual_seed(5))


def one_process(model, windows, alpha=0.0):
    """Losses and gradients of the whole model, micro-batch by micro-batch; it knows nothing of stages."""
    losses = []
    for text in windows:
        with record_routing(model) as routings:
            h = model.model(text[:, :-1])
            loss = F.cross_entropy(model.lm_head(h).flatten(0, 1), text[:, 1:].flatten())
            if mtp := mtp_losses(getattr(model, "mtp_layers", []), h, text, model.model.rope):
                loss = loss + 0.3 * torch.stack(mtp).mean()
        balance = sum(sequence_balance_loss(r.scores, 3, len(text)) for r in routings)
        ((loss + alpha * balance) / len(windows)).backward()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the workers have: with more, the reference sums in another order and its last bits differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two():
    with Workers(2) as workers:
        yield workers


@pytest.fixture(scope="module")
def four():
    with Workers(4) as workers:
        yield workers


def check_step(model, windows, schedule, workers, alpha=0.0):
    losses, gradients = one_process(copy.deepcopy(model), windows, alpha)
    run = run_schedule(model, windows, schedule, workers, alpha=alpha)
    assert torch.equal(run.losses, losses)
    assert run.gradients.keys() == gradients.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(run.gradients[name], grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    return run, gradients


@pytest.mark.parametrize("make", MAKERS)
def test_two_processes_give_the_losses_and_gradients_of_one(make, two):
    check_step(small_model(5), tokens(6), make(2, 6), two)


@pytest.mark.parametrize("make", MAKERS)
def test_four_processes_give_the_losses_and_gradients_of_one(make, four):
    schedule = make(4, 10)
    run, _ = check_step(small_model(8), tokens(10, batch=1), schedule, four)
    for rank, ops in enumerate(schedule):
        assert [span.op for span in run.spans if span.rank == rank] == list(ops)
    assert run.peak_live == simulate(schedule).peak_activations


def test_float32_losses_are_bitwise_equal_too(two):
    model, windows = small_model(4, torch.float32), tokens(4)
    losses, gradients = one_process(copy.deepcopy(model), windows)
    run = run_schedule(model, windows, dualpipe_schedule(2, 4), two)
    assert torch.equal(run.losses, losses)
    torch.testing.assert_close(run.gradients, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [zb1p_schedule, dualpipe_schedule])
def test_balance_losses_start_in_every_stage(make, two):
    """Far larger than V3's 1e-4, so that a gate without its term would show in every layer."""
    model, windows = small_model(4), tokens(4)
    run, _ = check_step(model, windows, make(2, 4), two, alpha=0.5)
    plain = run_schedule(model, windows, make(2, 4), two).gradients
    gates = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert len(gates) == 4 and all((run.gradients[name] - plain[name]).abs().max() > 1e-4 for name in gates)


def test_a_plain_language_model_runs_too(two):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.preset("nano", num_hidden_layers=3, **SIZES)).double()
    check_step(model, tokens(5), one_f_one_b_schedule(2, 5), two)


def test_payloads_are_the_activations_not_zeros(two):
    """Zeros between stages give plausible losses and leave the first stage without a gradient of its own."""
    model, windows = small_model(2), tokens(4)
    run, gradients = check_step(model, windows, dualpipe_schedule(2, 4), two)
    first, last = split_into_stages(model, 2)
    with torch.no_grad():
        from_zeros = torch.stack([last(torch.zeros_like(first(None, text)), text) for text in windows])
    assert not torch.isclose(run.losses, from_zeros, rtol=1e-4).any()
    assert all(gradients[name].abs().max() > 1e-6 for name in gradients if name.startswith("model.layers.0.self_attn"))


def test_dualpipe_adds_the_gradients_of_both_copies(two):
    model, windows = small_model(2), tokens(4)
    whole = run_schedule(model, windows, dualpipe_schedule(2, 4), two).gradients
    halves = [run_schedule(model, part, one_f_one_b_schedule(2, 2), two).gradients for part in windows.split(2)]
    for name, grad in whole.items():
        torch.testing.assert_close(grad, (halves[0][name] + halves[1][name]) / 2, rtol=1e-10, atol=1e-12)


def test_ranks_without_first_or_last_stage_never_get_the_tokens():
    sent = []
    recorder = SimpleNamespace(run=lambda function, arguments: sent.extend(arguments) or [])
    with pytest.raises(ValueError):  # nothing ran, so there are no results to put together
        run_schedule(small_model(4), tokens(8), dualpipe_schedule(4, 8), recorder)
    assert [bool(windows.any()) for _, _, windows, _ in sent] == [True, False, False, True]


def test_stages_hold_every_layer_once_under_its_own_name():
    model = small_model(7)
    stages = split_into_stages(model, 3)
    assert [list(stage.layer_idx) for stage in stages] == [[0, 1, 2], [3, 4], [5, 6]]
    names = {name for stage in stages for name in stage.state_dict()}
    assert names == set(model.state_dict())
    assert "model.embed_tokens.weight" in stages[0].state_dict().keys() & stages[2].state_dict().keys()


def test_dualpipe_ranks_hold_mirrored_stages_and_the_ends_share_the_embedding():
    stages = split_into_stages(small_model(4), 4)
    held = [stages_of_rank(stages, dualpipe_schedule(4, 8), rank) for rank in range(4)]
    assert [[stages.index(stage) for stage in pair] for pair in held] == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert held[0][0].model.embed_tokens.weight is held[0][1].model.embed_tokens.weight
    folded = [stages_of_rank(stages, dualpipev_schedule(2, 4), rank) for rank in range(2)]
    assert [[stages.index(stage) for stage in pair] for pair in folded] == [[0, 3], [1, 2]]


def test_weight_gradients_wait_for_w():
    stage, x = split_into_stages(small_model(4), 2)[0], tokens(1)[0]
    plain, split, store = copy.deepcopy(stage), copy.deepcopy(stage), WeightGradStore()
    defer_weight_gradients(split, store)
    store.deferring = True
    for part in (plain, split):
        part(None, x).pow(2).sum().backward()
    store.flush((0, 0))
    late = {name for name, p in split.named_parameters() if p.grad is None}
    products = {name for name, p in split.named_parameters() if p.dim() > 1} - {"model.embed_tokens.weight"}
    assert late == {name for name in products if not name.endswith("mlp.gate.weight")}
    assert any(name.endswith("experts.down_proj") for name in late)
    store.pop((0, 0))
    torch.testing.assert_close([p.grad for p in split.parameters()], [p.grad for p in plain.parameters()])


def test_store_is_first_in_first_out():
    store, done = WeightGradStore(), []
    store.deferring = True
    for i in range(2):
        store.put(lambda i=i: done.append(i))
        store.flush((0, i))
    with pytest.raises(ValueError, match=r"W of \(0, 1\) is due"):
        store.pop((0, 1))
    store.pop((0, 0))
    assert done == [0]


def test_layers_with_a_product_of_their_own_are_not_deferred():
    layer = nn.Sequential(FP8Linear(32, 32))
    with pytest.raises(ValueError, match="0 is FP8Linear; a pipeline defers the products of plain layers only"):
        defer_weight_gradients(layer, WeightGradStore())


def test_activations_are_freed_when_they_are_sent():
    """After a forward only the graph is kept; the output tensor is the caller's alone."""
    stage, windows = split_into_stages(small_model(2), 2)[0], tokens(1)
    runner = StageRunner([stage], WeightGradStore(), windows, 1)
    out = runner.run(Chunk("F", 0, 0), None)
    (saved,) = runner.saved.values()
    assert not any(torch.is_tensor(part) for part in saved) and not out.requires_grad


class ViewStage(Stage):
    """Returns a part of a larger tensor, which lives as long as the part does."""

    def forward(self, x, windows):
        return super().forward(x, windows).repeat(1, 1, 2)[..., : self.hidden_size]


class WideStage(Stage):
    def forward(self, x, windows):
        return super().forward(x, windows).repeat(1, 1, 2)


class DyingStage(Stage):
    """Kills its own process in the third forward."""

    def forward(self, x, windows):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, windows)


def step_with(stages, schedule, windows):
    Pipeline(stages, schedule).step(windows)


def failing_step(n_ranks, damaged, kind, windows=None):
    """The message of a step in which one rank's stage is of another kind; all processes must be gone at once."""
    stages = split_into_stages(small_model(n_ranks), n_ranks)
    stages[damaged].__class__ = kind
    windows, schedule = windows or [tokens(6)] * n_ranks, one_f_one_b_schedule(n_ranks, 6)
    started, workers = time.monotonic(), Workers(n_ranks, timeout=30)
    arguments = [([stage], schedule, text) for stage, text in zip(stages, windows, strict=True)]
    with pytest.raises(RuntimeError) as caught:
        workers.run(step_with, arguments)
    assert time.monotonic() - started < 60 and not any(process.is_alive() for process in workers.processes)
    return str(caught.value)


def test_a_killed_rank_is_named_and_takes_all_with_it():
    assert failing_step(2, 1, DyingStage).startswith("rank 1 failed: the process ended with exit code -9")


def test_a_stage_that_returns_a_view_is_refused():
    message = failing_step(2, 0, ViewStage)
    assert message.startswith("rank 0 failed: ValueError") and "returned a view" in message


def test_a_stage_of_another_width_is_refused():
    message = failing_step(2, 0, WideStage)
    assert message.startswith("rank 0 failed: ValueError") and "(2, 7, 40)" in message and "(2, 7, 20)" in message


def test_windows_of_different_shapes_are_refused():
    message = failing_step(2, 0, Stage, [tokens(6), tokens(6, batch=3)])
    assert "windows on rank 1 have shape [6, 3, 8], on rank 0 [6, 2, 8]" in message


def sleep_long(seconds):
    time.sleep(seconds)


def test_a_rank_that_gives_no_answer_is_named_when_time_is_up():
    workers = Workers(2)
    workers.run(thread_count, [(), ()])  # both are up
    workers.timeout, started = 2, time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 gave no answer within 2 s"):
        workers.run(sleep_long, [(0,), (60,)])
    assert time.monotonic() - started < 20 and not any(process.is_alive() for process in workers.processes)


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_worker_outlives_a_parent_that_is_killed():
    """Not even one that is busy: it would not notice a closed pipe for a long time."""
    code = "import os, pickle, time; from dsv3_mini.workers import Workers; w = Workers(2); "
    code += "print(*w.run(os.getpid, [(), ()]), flush=True); "
    code += "[pipe.send_bytes(pickle.dumps((time.sleep, (60,)))) for pipe in w.pipes]; "
    code += "time.sleep(0.3); os.kill(os.getpid(), 9)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pids, deadline = [int(pid) for pid in run.stdout.split()], time.monotonic() + 10
    while any(map(exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(exists, pids))


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match=f"port {taken.getsockname()[1]} of 127.0.0.1 is in use"):
            Workers(2, port=taken.getsockname()[1])


def listening():
    """Local addresses on which this process listens, from the kernel's table."""
    mine = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    rows = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}").readlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs /proc")
def test_all_processes_listen_on_the_loopback_only(two):
    addresses = set().union(listening(), *two.run(listening, [(), ()]))
    assert "0100007F" in addresses and addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_a_worker_that_died_between_two_steps_is_named():
    with Workers(2) as workers:
        workers.run(listening, [(), ()])
        workers.processes[0].kill()
        workers.processes[0].join()
        with pytest.raises(RuntimeError, match="rank 0 failed: the process ended with exit code -9"):
            workers.run(listening, [(), ()])


def gloo_interface():
    return os.environ["GLOO_SOCKET_IFNAME"]


def test_gloo_is_told_to_use_the_loopback_interface(two):
    assert all(name.startswith("lo") for name in two.run(gloo_interface, [(), ()]))


def thread_count():
    return torch.get_num_threads(), dist.get_rank()


def test_each_worker_is_one_rank_with_one_thread(two):
    assert two.run(thread_count, [(), ()]) == [(1, 0), (1, 1)]


def test_wrong_counts_are_refused_before_anything_runs(two):
    with pytest.raises(ValueError, match="3 stages, but the schedule runs 2 on 2 ranks"):
        stages_of_rank(split_into_stages(small_model(3), 3), one_f_one_b_schedule(2, 2), 0)
    with pytest.raises(ValueError, match=r"n_stages=5 must lie in 1..3"):
        split_into_stages(small_model(3), 5)
    with pytest.raises(ValueError, match="3 tuples of arguments for 2 ranks"):
        two.run(thread_count, [()] * 3)
    with pytest.raises(ValueError, match="n_ranks=0"):
        Workers(0)
    with pytest.raises(ValueError, match="port=65536 must lie in 1..65535"):
        Workers(1, port=2**16)


def test_a_payload_of_another_dtype_is_refused():
    mail = Mailbox(Schedule([[], []]), 0, None, lambda: torch.empty(2, 3))
    with pytest.raises(ValueError, match="torch.float64; .*torch.float32 is needed"):
        mail.put(Chunk("F", 0, 0), torch.zeros(2, 3, dtype=torch.float64))
