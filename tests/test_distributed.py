"""The trainer on several processes: the run of one process, resumed on other numbers of them, and its failures."""

import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import dsv3_mini.distributed as module
from dsv3_mini.__main__ import main
from dsv3_mini.config import ModelConfig
from dsv3_mini.distributed import run_rank, train_together
from dsv3_mini.grid import assemble, check_fit, deal
from dsv3_mini.launch import joined
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.recipe import TrainOptions, sequences_before, settings_at
from dsv3_mini.sharded import last_checkpoint
from dsv3_mini.train import start_run, total_loss, train
from dsv3_mini.workers import Workers

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    vocab_size=300, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, q_lora_rank=10, kv_lora_rank=8,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6, intermediate_size=20, moe_intermediate_size=8,
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def groups():
    """Groups of two and of four processes, kept for all tests of this file."""
    with Workers(4, preload=("dsv3_mini.distributed", "torch._dynamo")) as four, Workers(2) as two:
        yield {2: two, 4: four}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a little text in several files."""
    folder, words = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(8):
        lines = (f"def f{words.randrange(99)}(x):\n    return x + {words.randrange(999)}\n" for _ in range(30))
        (folder / f"{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def options(text):
    """Batches of 1 to 6 sequences, fewer than four ranks have micro-batches; every gradient is clipped."""
    sizes = dict(steps=12, batch_size=6, seq_len=13, checkpoint_every=5, validate_every=5)
    return TrainOptions(model=TINY, data=str(text), alpha=0.01, clip=0.5, **sizes)


@pytest.fixture(scope="module")
def one(options, tmp_path_factory):
    """The run of one process."""
    train(options, out := tmp_path_factory.mktemp("one") / "run", progress=False)
    return out


def read(out):
    """Log without the speed, and the published weights."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    entries = [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in entries]
    return entries, load_file(out / "model.safetensors")


def check_equal(out, one):
    """Every number of the log within 2e-5, every weight within 2e-5, routing biases exactly."""
    (log, weights), (wanted_log, wanted) = read(out), read(one)
    assert [list(entry) for entry in log] == [list(entry) for entry in wanted_log]
    assert [list(e.values()) for e in log] == [pytest.approx(list(e.values()), abs=2e-5) for e in wanted_log]
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        exact = name.endswith("e_score_correction_bias")
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0 if exact else 2e-5, msg=name)


# equal to one process


def test_losses_and_weights_are_those_of_one_process(groups, options, one, tmp_path):
    ranks = groups[4].run(run_rank, [(options, tmp_path, 2, 2, False, False)] * 4)
    check_equal(tmp_path, one)
    whole = DeepSeekV3.from_pretrained(tmp_path)
    assert sum(rank["moments"] for rank in ranks) == 2 * sum(p.nbytes for p in whole.parameters())
    assert len({(rank["pipeline"], rank["data"], rank["experts"]) for rank in ranks}) == 4
    files = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "run.json"}
    assert files | {"model.safetensors", "log.jsonl", "checkpoints"} == set(os.listdir(tmp_path))


def gradient_on_rank(options, out, pipeline, experts):
    """One gradient on this rank: what it read, the loads of all gates, the losses, its norm and its gradients."""
    member = assemble(options.config(), lambda: start_run(options, out), out, pipeline, experts, "cpu")
    settings, read = settings_at(11, options), []
    member.step, replay = 11, member.pipeline.replay
    member.pipeline.replay = lambda windows: read.append(windows) or replay(windows)
    losses, norm = module.distributed_gradient(member, settings)
    loads = [load for stage in member.stages for load in stage.balancer.loads or []]
    for load in loads:
        dist.all_reduce(load, group=member.grid.dense)
    return read[0], loads, losses, norm, {name: p.grad for name, p in member.pipeline.parameters.items()}


def weights_alive(options, out):
    """Bytes of all parameters in this process once a run is assembled, and of those that are its stages'."""
    member = assemble(options.config(), lambda: start_run(options, out), out, 2, 2, "cpu")
    gc.collect()
    alive = sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.nn.Parameter))
    return alive, sum(p.nbytes for p in member.pipeline.parameters.values())


def test_no_rank_keeps_weights_that_are_not_its_own(groups, options, tmp_path):
    for alive, own in groups[4].run(weights_alive, [(options, tmp_path)] * 4):
        assert alive == own > 0


@pytest.fixture(scope="module")
def reference(options, tmp_path_factory):
    """Losses, norm and clipped gradient of the twelfth batch in one process."""
    run, settings = start_run(options, tmp_path_factory.mktemp("reference")), settings_at(11, options)
    first = sequences_before(11, options.steps, options.batch_size)
    total, losses = total_loss(run, run.stream.take(first, settings.batch_size), settings)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), options.clip)
    return losses, norm, {name: p.grad for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("n, pipeline, experts", [(2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 4, 1), (4, 1, 4)])
def test_losses_and_clipped_gradients_are_those_of_one_process(
    n, pipeline, experts, groups, options, reference, tmp_path
):
    wanted_losses, wanted_norm, wanted = reference
    for rank, result in enumerate(groups[n].run(gradient_on_rank, [(options, tmp_path, pipeline, experts)] * n)):
        _, _, losses, norm, gradients = result
        assert {k: v.item() for k, v in losses.items()} == pytest.approx(
            {k: v.item() for k, v in wanted_losses.items()}
        )
        assert norm.item() == pytest.approx(wanted_norm.item()) and norm > 2 * options.clip
        for name, gradient in gradients.items():
            part = wanted[name].chunk(experts)[rank % experts] if ".experts." in name else wanted[name]
            torch.testing.assert_close(gradient, part, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_products_send_tokens_and_answers_too(groups, options, reference, tmp_path):
    ranks = groups[2].run(gradient_on_rank, [(replace(options, dtype="bfloat16"), tmp_path, 1, 2)] * 2)
    for name, value in ranks[0][2].items():
        assert value.item() == pytest.approx(reference[0][name].item(), rel=0.01)
    assert ranks[0][2]["loss"] != reference[0]["loss"] and all(g.dtype == torch.float32 for g in ranks[0][4].values())


@pytest.fixture(scope="module")
def gradients(groups, options, tmp_path_factory):
    return groups[4].run(gradient_on_rank, [(options, tmp_path_factory.mktemp("gradient"), 2, 2)] * 4)


def test_every_sequence_is_read_by_one_share_and_by_both_ranks_of_a_pipeline(gradients, options):
    shares = [read for read, *_ in gradients]  # ranks are numbered pipeline first, experts last
    assert torch.equal(shares[0], shares[2]) and torch.equal(shares[1], shares[3])
    rows = [tuple(row) for share in shares[:2] for row in share.flatten(0, 1).tolist() if row[0] >= 0]
    assert len(rows) == len(set(rows)) == settings_at(11, options).batch_size


def test_every_choice_of_a_token_is_counted_once_over_all_ranks(gradients, options):
    """Neither twice, where two ranks hold a stage, nor for the sequences that only fill up a micro-batch."""
    n, k = settings_at(11, options).batch_size, TINY["num_experts_per_tok"]
    for _, loads, *_ in gradients:
        assert [load.sum().item() for load in loads] == [n * 13 * k] * 3 + [n * 12 * k]


@pytest.mark.parametrize("n", [1, 5, 8, 19])
def test_dealt_micro_batches_hold_every_sequence_once(n):
    windows = torch.arange(n)[:, None].expand(n, 4)
    parts = [deal(windows, 4, 3, share) for share in range(3)]
    assert {part.shape for part in parts} == {(4, -(-n // 12), 4)}
    assert sorted(i for part in parts for i in part[..., 0].flatten().tolist() if i >= 0) == list(range(n))
    assert max((part >= 0).any(-1).sum() for part in parts) - min((part >= 0).any(-1).sum() for part in parts) <= 1


# checkpoints


def train_and_signal(options, out, pipeline, experts, resume, step):
    """Train, and let one rank be asked to stop before a step; "stopped" once all have."""
    original = module.distributed_step

    def step_and_signal(member):
        if member.step == step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(member)

    module.distributed_step = step_and_signal
    try:
        train_together(options, out, pipeline, experts, resume, progress=False)
    except KeyboardInterrupt:
        return "stopped"
    finally:
        module.distributed_step = original


def test_a_run_moves_from_four_processes_to_two_and_to_one(groups, options, one, tmp_path, capsys):
    stopped = groups[4].run(train_and_signal, [(options, tmp_path, 2, 2, False, 6)] * 4)
    assert stopped == ["stopped"] * 4 and last_checkpoint(tmp_path / "checkpoints").name == "step-00000007"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 7
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 8, "loss": 1.0}\n{"st')  # of a step that no checkpoint knows
    assert groups[2].run(train_and_signal, [(None, tmp_path, 1, 2, True, 9)] * 2) == ["stopped"] * 2
    assert main(["train", "--out", str(tmp_path), "--resume"]) == 0 and "bits/byte" in capsys.readouterr().out
    check_equal(tmp_path, one)


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk_is_named_and_the_checkpoint_before_it_survives(options, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with joined():
        member = assemble(options.config(), lambda: start_run(options, tmp_path), tmp_path, 1, 1, "cpu")
        module.save_member(member)
        member.step = 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(
                OSError, match="step-00000003 could not be written by rank 0 .*the one before it is whole"
            ):
                module.save_member(member)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000000"]


def test_a_step_that_is_not_finite_changes_nothing(options, tmp_path):
    with joined():
        member = assemble(options.config(), lambda: start_run(options, tmp_path), tmp_path, 1, 1, "cpu")
        module.distributed_step(member)
        member.stages[0].model.norm.weight.data[0] = float("inf")
        before = {name: tensor.clone() for name, tensor in member.stages[0].state_dict().items()}
        with pytest.raises(FloatingPointError, match="step 2: loss nan"):
            module.distributed_step(member)
    assert member.step == 1 and member.stages[0].balancer.loads is None
    assert all(torch.equal(before[name], tensor) for name, tensor in member.stages[0].state_dict().items())


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    for name in ("step-00000005", "step-00000010.partial"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path).name == "step-00000005" and last_checkpoint(tmp_path / "none") is None


# refusals


@pytest.mark.parametrize("pipeline, experts, world", [(3, 1, 6), (6, 1, 6), (2, 3, 6), (2, 2, 6), (0, 1, 4), (1, 0, 4)])
def test_a_world_that_does_not_fit_is_refused(pipeline, experts, world):
    message = f"--pipeline {pipeline} and --experts {experts} do not fit a world size of {world}: .* 1, 2, 4"
    with pytest.raises(ValueError, match=message):
        check_fit(ModelConfig.preset("nano", **TINY), pipeline, experts, world)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pipeline", "2", "--experts", "2"], "--pipeline 2 and --experts 2 do not fit a world size of 1"),
        (["--pipeline", "2", "--steps", "-3"], "steps=-3"),
        (["--experts", "2", "--resume"], "nothing to resume"),
        (["--experts", "2", "--recompute"], "recompute=True is for one process"),
    ],
)
def test_a_bad_request_is_one_line_and_writes_nothing(arguments, message, text, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run"), "--data", str(text), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


def test_an_error_of_the_rank_that_reads_is_raised_on_all(groups, options, one):
    with Workers(2) as two, pytest.raises(RuntimeError, match="already holds a run"):
        two.run(run_rank, [(options, one, 1, 1, False, False)] * 2)


# torchrun


def children(pid):
    """Processes that a process has started, by /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_killed_rank_is_named_once_all_end_and_the_run_goes_on_from_the_last_checkpoint(options, text, tmp_path):
    """The whole command line, killed with signal 9 in the middle of its steps, and finished by one process."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    out, log = tmp_path / "run", tmp_path / "run/log.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    sizes = "--steps 70 --batch-size 4 --seq-len 16 --checkpoint-every 4 --validate-every 70".split()
    command = [*torchrun, "-m", "dsv3_mini", "train", "--pipeline", "2", "--data", str(text), "--out", str(out), *sizes]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 6):
            time.sleep(0.05)
        ranks = sorted(children(process.pid))
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        process.wait(timeout=60)
    said = (tmp_path / "output").read_text()
    messages = [line for line in said.splitlines() if "error: " in line]
    assert time.monotonic() - killed < 60 and not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
    assert len(messages) == 1 and "rank 1 failed: its process ended without a word" in messages[0], said
    step = int(last_checkpoint(out / "checkpoints").name[5:])
    assert 4 <= step < 70 and step % 4 == 0 and len(log.read_text().splitlines()) >= step
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 71))
