"""The trainer: schedules, losses, resume, and what it does when something goes wrong."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dsv3_mini.__main__ import main
from dsv3_mini.ablations import plain_model
from dsv3_mini.accounting import count_parameters
from dsv3_mini.baseline import LanguageModel
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from dsv3_mini.dataset import Stream, arrange, read_sources
from dsv3_mini.losses import head_loss, training_losses
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.mtp import mtp_losses
from dsv3_mini.recipe import TrainOptions, learning_rate_factor, sequences_before, settings_at, warmup_steps
from dsv3_mini.recompute import activation_bytes, recompute_activations
from dsv3_mini.resume import Snapshot, read_log, write_whole
from dsv3_mini.train import load_run, make_optimizer, save_run, start_run, train, train_step

TINY = dict(
    vocab_size=300, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=10, kv_lora_rank=8,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6, intermediate_size=20, moe_intermediate_size=8,
    n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=2,
)  # fmt: skip


@pytest.fixture
def text(tmp_path):
    """A folder with a little text in several files."""
    folder, words = tmp_path / "text", random.Random(0)
    folder.mkdir()
    for i in range(8):
        lines = (f"def f{words.randrange(99)}(x):\n    return x + {words.randrange(999)}\n" for _ in range(30))
        (folder / f"{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def options(text):
    return TrainOptions(
        model=TINY, data=str(text), steps=11, batch_size=6, seq_len=13, checkpoint_every=4, validate_every=5
    )


def tiny_model(**changes):
    torch.manual_seed(0)
    return DeepSeekV3(ModelConfig.preset("nano", **{**TINY, "initializer_range": 0.1, **changes}))


def comparable_log(folder):
    """Log lines without the speed, which no two runs share."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]


# schedules


def test_learning_rate_has_the_knots_of_the_report():
    at = {10.0: 2.2e-4, 12.15: 1.21e-4, 14.3: 2.2e-5, 14.5: 2.2e-5, 14.7: 7.3e-6}
    for trillions, rate in at.items():
        assert 2.2e-4 * learning_rate_factor(trillions / 14.8) == pytest.approx(rate, rel=1e-3)


def test_lambda_drops_at_ten_trillion_and_the_biases_freeze_at_fourteen_point_three():
    options = TrainOptions(steps=14_800, batch_size=4)
    weights = [settings_at(step, options).mtp_weight for step in (9_999, 10_000, 14_799)]
    gammas = [settings_at(step, options).gamma for step in (0, 14_299, 14_300)]
    assert weights == pytest.approx([0.3, 0.1, 0.1]) and gammas == [0.01, 0.01, 0.0]


def test_warm_up_is_linear_and_ends_at_the_peak():
    options = TrainOptions(steps=6000, learning_rate=0.01)
    assert warmup_steps(6000) == 50 and warmup_steps(400) == 20 and warmup_steps(7) == 1
    assert [settings_at(step, options).learning_rate for step in (0, 24, 49, 50)] == pytest.approx(
        [0.0002, 0.005, 0.01, 0.01]
    )


@pytest.mark.parametrize("steps, batch_size", [(1, 7), (13, 5), (400, 16), (333, 3), (3000, 61)])
def test_batch_grows_from_a_fifth_and_every_sequence_is_counted_once(steps, batch_size):
    options = TrainOptions(steps=steps, batch_size=batch_size)
    sizes = [settings_at(step, options).batch_size for step in range(steps)]
    assert sum(sizes) == sequences_before(steps, steps, batch_size) and min(sizes) >= 1
    assert sizes[-1] in (batch_size, batch_size - 1) or steps == 1
    if steps == 3000:
        half = next(step for step, size in enumerate(sizes) if size >= 0.6 * batch_size)
        share = sum(sizes[:half]) / sum(sizes)
        assert sizes[0] in (12, 13) and share == pytest.approx(0.469 / 14.8 / 2, rel=0.05)


# data


def test_stream_is_a_function_of_seed_and_position():
    windows = torch.arange(7)[:, None]
    stream, other = Stream(windows, 3), Stream(windows, 3)
    whole = stream.take(0, 21)[:, 0]
    assert torch.equal(torch.cat([other.take(n, 3) for n in (0, 3, 6, 9, 12, 15, 18)])[:, 0], whole)
    assert all(sorted(whole[i : i + 7].tolist()) == list(range(7)) for i in (0, 7, 14))
    assert not torch.equal(Stream(windows, 4).take(0, 7)[:, 0], whole[:7]) and not torch.equal(whole[7:14], whole[:7])


def test_arranged_pieces_hold_every_token_once():
    documents = [list(range(10, 10 + n)) for n in (23, 1, 8)]
    plain, moved = arrange(documents, 6, 0.0, 0), arrange(documents, 6, 1.0, 0)
    assert plain == [[BOS, *ids, EOS] for ids in documents]
    assert [t for ids in plain for t in sorted(ids) if t >= 10] == [t for ids in moved for t in sorted(ids) if t >= 10]
    assert moved[0].count(EOS) == moved[0].count(BOS) == 5 and moved[0][1:3] == [BOS, FIM_BEGIN]
    assert moved[0].count(FIM_BEGIN) == moved[0].count(FIM_HOLE) == moved[0].count(FIM_END) == 4


def test_sources_are_named_not_pathed(text):
    corpus = read_sources(f"safetensors,{text}")
    assert corpus.name == "safetensors+text" and not set(corpus.train) & set(corpus.valid)
    with pytest.raises(FileNotFoundError, match="no_such_package"):
        read_sources("no_such_package")


def test_what_one_source_trains_on_no_other_validates(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(12):
            (tmp_path / name / f"{name}{i}.txt").write_text(f"text {i}")
    alone, both = [read_sources(str(tmp_path / name)) for name in "ab"], read_sources(f"{tmp_path}/a,{tmp_path}/b")
    assert set(alone[0].train) & set(alone[1].valid)
    assert not set(both.train) & set(both.valid) and len(both.train) == len(set(both.train))


# losses


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_head_loss_equals_cross_entropy_in_value_and_gradients(rows):
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(7, 31, bias=False), torch.randint(31, (3, 5))
    h = torch.randn(3, 5, 7, requires_grad=True)
    wanted = F.cross_entropy(head(h).flatten(0, 1), labels.flatten(), reduction="sum")
    found = head_loss(h, head, labels, torch.float32, rows)
    for a, b in zip(*(torch.autograd.grad(2.5 * loss, (h, head.weight)) for loss in (wanted, found)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(wanted, found)


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_training_losses_are_those_of_the_chapters(depths):
    model, windows = tiny_model(num_nextn_predict_layers=depths), torch.randint(5, 300, (3, 12))
    losses, routings = training_losses(model, windows)
    h = model.model(windows[:, :-1])
    main = F.cross_entropy(model.lm_head(h).flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(losses["loss"], main)
    assert len(routings) == 1 + depths and set(losses) == {"loss", "balance"} | ({"mtp"} if depths else set())
    if depths:
        wanted = torch.stack(mtp_losses(model.mtp_layers, h, windows, model.model.rope)).mean()
        torch.testing.assert_close(losses["mtp"], wanted)


def test_bfloat16_products_keep_float32_weights_and_gradients(options):
    model, windows = tiny_model(), torch.randint(5, 300, (4, 14))
    exact, _ = training_losses(model, windows)
    products = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, y: products.append(y.dtype))
    losses, _ = training_losses(model, windows, dtype=torch.bfloat16)
    assert products == [torch.bfloat16]
    (losses["loss"] + losses["mtp"] + losses["balance"]).backward()
    assert losses["loss"].dtype == torch.float32 and losses["loss"] != exact["loss"]
    torch.testing.assert_close(losses["loss"], exact["loss"], rtol=0.01, atol=0)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_matrices_decay_norms_do_not():
    model = tiny_model()
    decayed, free = ({id(p) for p in group["params"]} for group in make_optimizer(model, TrainOptions()).param_groups)
    for name, parameter in model.named_parameters():
        assert (id(parameter) in free) == ("norm" in name), name
    assert len(decayed) + len(free) == len(list(model.parameters()))


# recomputation


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}])
def test_recomputation_changes_memory_not_gradients(changes):
    model, windows = tiny_model(**changes), torch.randint(5, 300, (4, 14))
    gradients, sizes = [], []
    for recompute in (False, True):

        def forward():
            return sum(training_losses(model, windows)[0].values())

        if recompute:
            with recompute_activations(model):
                sizes.append(activation_bytes(forward))
                loss = forward()
        else:
            sizes.append(activation_bytes(forward))
            loss = forward()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert sizes[1] < 0.9 * sizes[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert "forward" not in model.model.norm.__dict__


def test_recomputation_counts_no_token_twice(options, tmp_path):
    loads = {}
    for recompute in (False, True):
        run = start_run(TrainOptions(**{**options.__dict__, "recompute": recompute}), tmp_path / "run")
        seen, step = [], run.balancer.step
        run.balancer.step = lambda run=run, seen=seen, step=step: (seen.extend(run.balancer.loads), step())[1]
        train_step(run)
        loads[recompute] = torch.stack(seen)
    batch = settings_at(0, options).batch_size
    assert torch.equal(loads[True], loads[False])
    assert loads[True].sum(1).tolist() == [batch * 13 * 2, batch * 12 * 2]


# a run and its checkpoint


@pytest.mark.parametrize("wanted, found", [(0.4, 0.4), (0.0, 0.006 * (7168 / 24) ** 0.5)])
def test_start_keeps_the_products_of_width_and_the_embedding_audible(options, tmp_path, wanted, found):
    model = start_run(TrainOptions(**{**options.__dict__, "embedding_std": wanted}), tmp_path / "run").model
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(found, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(0.006 * (7168 / 24) ** 0.5, rel=0.05)
    assert model.mtp_layers[0].embed_tokens.weight is model.model.embed_tokens.weight


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(options, tmp_path):
    train(options, tmp_path / "whole", progress=False)
    run = start_run(options, tmp_path / "broken")
    run.out.mkdir()
    for _ in range(5):
        train_step(run)
    save_run(run)
    train_step(run)  # lost with the process
    train(None, tmp_path / "broken", resume=True, progress=False)
    states = [load_file(tmp_path / name / "resume.safetensors") for name in ("whole", "broken")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert comparable_log(tmp_path / "whole")[5:] == comparable_log(tmp_path / "broken")


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(options, tmp_path):
    options = TrainOptions(**{**options.__dict__, "steps": 40, "checkpoint_every": 3})
    train(options, tmp_path / "whole", progress=False)
    code = "import sys, json; from dsv3_mini.train import *; train({}, sys.argv[1], sys.argv[2] == 'resume', False)"
    code = code.format(f"TrainOptions(**{options.__dict__!r})")
    log, killed = tmp_path / "broken/log.jsonl", 0
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: sums in another order end in other last bits
    for wait_for in (5, 23):
        mode = "resume" if (tmp_path / "broken/resume.safetensors").exists() else "start"
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "broken"), mode], env=one_thread)
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < wait_for):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2
    train(None, tmp_path / "broken", resume=True, progress=False)
    states = [load_file(tmp_path / name / "resume.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert comparable_log(tmp_path / "whole") == comparable_log(tmp_path / "broken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_between_two_steps(options, tmp_path, monkeypatch, number):
    import dsv3_mini.train as module

    def step_and_signal(run, step=train_step):
        if run.step == 2:
            os.kill(os.getpid(), number)
        return step(run)

    monkeypatch.setattr(module, "train_step", step_and_signal)
    with pytest.raises(KeyboardInterrupt):
        train(options, tmp_path / "run", progress=False)
    assert Snapshot.load(tmp_path / "run").step == len(comparable_log(tmp_path / "run")) == 3


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(options, tmp_path, monkeypatch):
    import dsv3_mini.train as module

    def poison(run, step=train_step):
        if run.step == 5:
            run.model.lm_head.weight.data[7, 3] = float("nan")
        return step(run)

    monkeypatch.setattr(module, "train_step", poison)
    with pytest.raises(FloatingPointError, match="step 6: loss nan"):
        train(options, tmp_path / "run", progress=False)
    snapshot = Snapshot.load(tmp_path / "run")
    assert snapshot.step == 4 and all(t.isfinite().all() for t in snapshot.tensors.values() if t.is_floating_point())


def test_step_that_is_not_finite_changes_nothing(options, tmp_path):
    run = start_run(options, tmp_path / "run")
    train_step(run)
    run.model.model.norm.weight.data[0] = float("inf")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(FloatingPointError):
        train_step(run)
    assert run.step == 1 and run.balancer.loads is None
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_full_disk_is_named_and_the_old_checkpoint_survives(options, tmp_path):
    import resource

    run = start_run(options, tmp_path / "run")
    run.out.mkdir()
    save_run(run)
    train_step(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="resume.safetensors could not be written.*untouched"):
            save_run(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Snapshot.load(run.out).step == 0 and os.listdir(run.out) == ["resume.safetensors"]


def test_half_a_write_leaves_the_old_file(tmp_path):
    def write(path):
        path.write_text("ne")
        raise OSError("no space left on device")

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="file could not be written .no space left.*; the one before it is untouched"):
        write_whole(tmp_path / "file", write)
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_torn_checkpoint_is_named(options, tmp_path, size):
    run = start_run(options, tmp_path / "run")
    run.out.mkdir()
    save_run(run)
    file = run.out / "resume.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="resume.safetensors is not a whole checkpoint"):
        load_run(run.out)


def test_average_is_the_mean_at_first_and_is_validated_as_such(options, tmp_path):
    run = start_run(TrainOptions(**{**options.__dict__, "ema_horizon": 1.0}), tmp_path / "run")
    weights = []
    for _ in range(3):
        train_step(run)
        weights.append(run.model.model.norm.weight.detach().clone())
    torch.testing.assert_close(run.average.values["model.norm.weight"], torch.stack(weights).mean(0))
    before, ids = run.model.state_dict(), torch.randint(5, 300, (2, 9))
    before = {name: tensor.clone() for name, tensor in before.items()}
    plain = run.model(ids)
    with run.average.in_place():
        assert not torch.allclose(run.model(ids), plain)
        assert torch.equal(run.model.mtp_layers[0].embed_tokens.weight, run.average.values["model.embed_tokens.weight"])
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


def test_transformers_opens_the_folder_and_writes_the_same_text(options, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsv3_mini.generate import generate

    model = train(options, tmp_path / "run", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = tokenizer("def f12(x):\n", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run").generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(theirs[:, ids.shape[1] :], generate(model, ids, 9).tokens)
    assert tokenizer.decode(ids[0]) == "def f12(x):\n" and tokenizer.eos_token_id == EOS


@pytest.mark.parametrize("name, value", [("steps", 2.5), ("batch_size", 0), ("seq_len", "64")])
def test_counts_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number"):
        TrainOptions(**{name: value})


def test_an_mtp_module_that_nothing_trains_is_refused(options):
    with pytest.raises(ValueError, match="mtp_weight=0 would train no MTP module"):
        TrainOptions(**{**options.__dict__, "mtp_weight": 0.0}).config()


def test_another_model_is_trained_by_the_same_recipe_and_resumes(options, tmp_path):
    options = TrainOptions(**{**options.__dict__, "mtp_weight": 0.0, "model": TINY | plain_model(options.config())})
    whole, broken = (start_run(options, tmp_path, build=LanguageModel) for _ in range(2))
    losses = [train_step(whole)["loss"] for _ in range(4)]
    broken.out.mkdir(exist_ok=True)
    train_step(broken)
    save_run(broken)
    resumed = load_run(tmp_path, options, LanguageModel)
    assert [train_step(resumed)["loss"] for _ in range(3)] == losses[1:]
    wanted, found = count_parameters(tiny_model().config).activated, sum(p.numel() for p in whole.model.parameters())
    assert abs(found - wanted) <= 1.5 * TINY["hidden_size"] * TINY["num_hidden_layers"]
    assert type(resumed.model) is LanguageModel


# the committed model

MINI = Path(__file__).parent.parent / "assets/checkpoints/mini"


@pytest.mark.parametrize("prompt", ["def read_lines(path):\n", "import os\n\nclass "])
def test_transformers_opens_the_committed_model_and_writes_the_same_text(prompt):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsv3_mini.generate import generate

    tokenizer = AutoTokenizer.from_pretrained(MINI)
    twin = AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    theirs = twin.generate(ids, max_new_tokens=40, do_sample=False)[:, ids.shape[1] :]
    ours = generate(DeepSeekV3.from_pretrained(MINI, dtype=torch.float32), ids, 40).tokens
    assert tokenizer.decode(ours[0]) == tokenizer.decode(theirs[0]) and len(set(ours[0].tolist())) > 5


def test_committed_model_is_small_and_its_log_is_that_of_its_run():
    assert sum(file.stat().st_size for file in MINI.iterdir()) <= 25e6
    described, log = json.loads((MINI / "run.json").read_text()), read_log(MINI)
    options = TrainOptions(**described["options"])
    assert [entry["step"] for entry in log] == list(range(1, options.steps + 1))
    sequences = [sequences_before(step, options.steps, options.batch_size) for step in range(1, options.steps + 1)]
    assert [entry["tokens"] for entry in log] == [n * options.seq_len for n in sequences]
    rates = [float(f"{settings_at(step, options).learning_rate:.4g}") for step in range(options.steps)]
    assert [entry["learning_rate"] for entry in log] == rates and described["tokens"] == log[-1]["tokens"]
    config = ModelConfig.from_pretrained(MINI)
    assert config.replace(torch_dtype=options.config().torch_dtype) == options.config()


# the command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "-3"], "steps=-3"),
        (["--preset", "giant"], "unknown preset 'giant'"),
        (["--preset", "v3"], "671,026,419,200 parameters"),
        (["--seq-len", "1025"], "max_position_embeddings=1024"),
        (["--batch-size", "100000"], "exceeds the"),
        (["--dtype", "float8"], "dtype='float8'"),
        (["--device", "mars"], "device='mars' cannot be used here"),
        (["--learning-rate", "nan"], "learning_rate=nan"),
        (["--data", "no/such/folder"], "no folder at no/such/folder"),
        (["--data", "EMPTY"], "0 usable files"),
        (["--data", "EMPTY,"], "names an empty source"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_request_is_one_line_and_writes_nothing(text, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    arguments = [a.replace("EMPTY", str(tmp_path / "empty")) for a in arguments]
    defaults = [] if "--data" in arguments else ["--data", str(text)]
    assert main(["train", "--out", str(tmp_path / "run"), *defaults, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_output_that_is_a_file_is_refused_and_kept(text, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert main(["train", "--out", str(tmp_path / "run"), "--data", str(text)]) == 2
    assert "is a file" in capsys.readouterr().err and (tmp_path / "run").read_text() == "mine"


def test_a_run_is_not_overwritten_and_not_resumed_with_other_options_or_text(options, text, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    train(options, tmp_path / "run", progress=False)
    log = (tmp_path / "run/log.jsonl").read_text()
    assert main(["train", *out, "--data", str(text)]) == 2 and "already holds a run" in capsys.readouterr().err
    assert main(["train", *out, "--resume", "--steps", "99"]) == 2 and "steps=11" in capsys.readouterr().err
    (text / "0.py").write_text("changed = True\n" * 40)
    assert main(["train", *out, "--resume"]) == 2 and "has changed" in capsys.readouterr().err
    assert (tmp_path / "run/log.jsonl").read_text() == log


def test_no_steps_give_the_model_as_it_was_drawn(text, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run"), "--data", str(text), "--steps", "0"]) == 0
    assert "untrained" in capsys.readouterr().out and comparable_log(tmp_path / "run") == []
    assert json.loads((tmp_path / "run/run.json").read_text())["tokens"] == 0


def test_train_and_generate_from_the_command_line(text, tmp_path, capsys):
    out = str(tmp_path / "run")
    size = ["--steps", "2", "--batch-size", "2", "--seq-len", "16", "--recompute", "--save-dtype", "bfloat16"]
    assert main(["train", "--out", out, "--data", str(text), *size]) == 0
    assert "bits/byte" in capsys.readouterr().out and len(comparable_log(tmp_path / "run")) == 2
    assert load_file(tmp_path / "run/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert main(["generate", "--checkpoint", out, "def f", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("def f")
    assert math.isfinite(comparable_log(tmp_path / "run")[-1]["valid_bits_per_byte"])
    described = json.loads((tmp_path / "run/run.json").read_text())
    assert described["options"]["steps"] == 2 and described["tokens"] == 64 and described["seconds"] > 0
