"""The kernels' benchmark without a GPU: its contests are right, its checks bite, and it refuses in one line."""

from itertools import count

import pytest
import torch

from dsv3_mini.__main__ import main
from dsv3_mini.config import ModelConfig
from dsv3_mini.kernels import bench
from dsv3_mini.kernels.bench import Contest, benchmark, line, measure, relative_error
from dsv3_mini.kernels.contests import contests_of, products

ONE = torch.ones(3)


def refuse():
    raise RuntimeError("no such call here\nand more")


def contest(**changes):
    fields = dict(kernel="k", shape="s", expected=lambda: ONE, tolerance=0.0, n_bytes=8e6)
    fields |= dict(ours={"taught": lambda: ONE, "other": lambda: ONE}, peers={"copy": lambda: ONE, "library": refuse})
    return Contest(**{**fields, **changes})


def test_sides_are_timed_in_turn_and_the_median_counts():
    ticks = count(1)
    result = measure(contest(), lambda run: next(ticks), rounds=3)
    assert result["ms"] == {"taught": 13, "other": 14, "copy": 15} and result["best"] == "taught"
    assert result["missing"] == {"library": "no such call here"}
    assert result["against"] == {"copy": 15 / 13} and result["gb_per_s"] == 8 / 13
    assert "1.15x copy" in line(result)


def test_a_wrong_kernel_is_not_timed():
    for wrong in (ONE + 0.1, ONE * torch.nan):
        with pytest.raises(FloatingPointError, match="k s, taught: relative error"):
            measure(contest(ours={"taught": lambda wrong=wrong: wrong}), lambda run: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="no such call"):
        measure(contest(ours={"taught": refuse}), lambda run: 1)


def test_errors_are_relative_over_all_results():
    assert relative_error((ONE, 2 * ONE), (ONE, ONE)) == pytest.approx(0.5**0.5)


def test_contests_of_a_small_model_hold_their_own_in_the_interpreter():
    sizes = dict(hidden_size=64, moe_intermediate_size=32, intermediate_size=96)
    experts = dict(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    config = ModelConfig.preset("nano", **sizes, **experts)
    contests = list(contests_of(config, "tiny", 24, torch.device("cpu")))
    assert len(contests) == 5 + 2 * len(products(config)) + 6 + 1
    for one in contests:
        taught = {name: run for name, run in list(one.ours.items())[:1]}
        result = measure(one._replace(ours=taught), lambda run: 1.0, rounds=1)
        assert result["error"] <= one.tolerance and (one.n_bytes > 0 or one.kernel == "training_step")


def test_without_a_gpu_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # even where there is one
    assert main(["bench", "--kernels"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --kernels times Triton kernels on an NVIDIA GPU, and torch finds none on this machine"
    ]
    with pytest.raises(ValueError, match="torch finds none"):
        benchmark()


def test_figures_are_written_whole_with_what_they_depend_on(tmp_path, monkeypatch):
    told = {"is_available": True, "get_device_capability": (9, 0), "get_device_name": "NVIDIA H200"}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(bench, "all_contests", lambda device: iter([contest(), contest(kernel="other")]))
    monkeypatch.setattr(bench, "device_clock", lambda run, flush: 1.0)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: ONE)
    monkeypatch.chdir(tmp_path)
    assert benchmark(show=lambda text: None).as_posix() == "assets/benchmarks/nvidia_h200.json"
    document = bench.read_benchmarks(tmp_path / "assets/benchmarks")["NVIDIA H200"]
    assert [result["kernel"] for result in document["results"]] == ["k", "other"]
    assert {"torch", "triton", "cuda"} <= document["versions"].keys()
    with pytest.raises(ValueError, match="replace the whole"):
        benchmark(only="other")
