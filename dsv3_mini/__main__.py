"""The command line: python -m dsv3_mini cost | train | generate | bench | experiment (each with --help)."""

import argparse
import os
import sys
from pathlib import Path


def add_cost(commands) -> None:
    parser = commands.add_parser("cost", help="parameters, cache, FLOPs, hours and dollars of a config")
    parser.add_argument("--preset", default="v3", help="nano, mini, v2-lite or v3")
    parser.add_argument("--config", help="a config.json or a folder with one, instead of a preset")
    parser.add_argument("--tokens", type=float, default=14.8e12, help="training tokens")
    parser.add_argument("--context", type=int, default=4096, help="training context")
    parser.add_argument("--tflops", type=float, default=386.0, help="sustained TFLOP/s of one GPU")
    parser.add_argument("--dollars", type=float, default=2.0, help="price of a GPU-hour")
    parser.set_defaults(run=cost)


def cost(options: argparse.Namespace) -> None:
    """Print the bill of chapter 00."""
    from dsv3_mini.accounting import count_parameters, flops_per_token, kv_cache_bytes_per_token, training_cost
    from dsv3_mini.config import ModelConfig

    if min(options.tokens, options.context, options.tflops) <= 0:
        raise ValueError("--tokens, --context and --tflops must be positive")
    config = ModelConfig.from_pretrained(options.config) if options.config else ModelConfig.preset(options.preset)
    count = count_parameters(config)
    flops = flops_per_token(config, options.context, training=True)
    hours = flops * options.tokens / (options.tflops * 1e12) / 3600
    print(f"parameters        {count.total:,} stored, {count.activated:,} activated, MTP {count.mtp:,}")
    print(f"cache             {kv_cache_bytes_per_token(config):,} bytes a token")
    print(f"training          {flops / 1e9:,.2f} GFLOP a token at context {options.context}")
    print(f"{options.tokens:.3g} tokens    {hours:,.0f} GPU-hours, ${training_cost(hours, options.dollars):,.0f}")


def add_train(commands) -> None:
    parser = commands.add_parser("train", help="train a model on real text, on this machine")
    parser.add_argument("--out", default="runs/nano", help="folder of the log, the checkpoints and the model")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its own options")
    parser.add_argument("--save-dtype", choices=("float32", "bfloat16"), default="float32", help="of the final weights")
    parser.set_defaults(run=train)
    several = parser.add_argument_group("several processes (torchrun --nproc-per-node 4 -m dsv3_mini train ...)")
    several.add_argument("--pipeline", type=int, default=1, help="stages of DualPipe: 1 or an even number")
    several.add_argument("--experts", type=int, default=1, help="processes that share the routed experts of a stage")
    options = parser.add_argument_group("what a resumed run keeps")
    for name, kind, text in (
        ("preset", str, "nano or mini (nano)"),
        ("data", str, "comma-separated: stdlib, installed packages by name, folders of text (stdlib)"),
        ("max-bytes", int, "read at most so much of each"),
        ("steps", int, "updates of the weights (800)"),
        ("batch-size", int, "sequences a step, after the ramp (8)"),
        ("seq-len", int, "tokens a sequence (128)"),
        ("learning-rate", float, "at its peak (0.002)"),
        ("gamma", float, "speed of the routing biases (0.01)"),
        ("dtype", str, "of matrix products: float32 or bfloat16 (float32)"),
        ("device", str, "cpu or cuda (cpu)"),
        ("seed", int, "of weights and data order (0)"),
        ("checkpoint-every", int, "steps (100)"),
        ("validate-every", int, "steps (100)"),
    ):
        options.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
    options.add_argument("--recompute", action="store_true", default=argparse.SUPPRESS, help="norms, up-projections")


def train(options: argparse.Namespace) -> None:
    """Train or resume; the folder then opens with `generate` and with transformers."""
    from dataclasses import fields, replace

    import torch

    from dsv3_mini.recipe import TrainOptions
    from dsv3_mini.resume import Snapshot
    from dsv3_mini.train import show_result
    from dsv3_mini.train import train as run_training

    given = {f.name: getattr(options, f.name) for f in fields(TrainOptions) if hasattr(options, f.name)}
    many = torch.distributed.is_torchelastic_launched() or (options.pipeline, options.experts) != (1, 1)
    if many or options.resume and (Path(options.out) / "checkpoints").is_dir():
        return train_on_all(options, given)
    stored = Snapshot.load(Path(options.out)).options if options.resume else TrainOptions()
    model = run_training(
        replace(stored, **given), options.out, options.resume, save_dtype=getattr(torch, options.save_dtype)
    )
    print(show_result(model, options.out))


def train_on_all(options: argparse.Namespace, given: dict) -> None:
    """Train or resume on the processes that torchrun started, or alone what they began; rank 0 prints."""
    from dataclasses import replace

    import torch

    from dsv3_mini.distributed import train_together
    from dsv3_mini.launch import from_first, joined
    from dsv3_mini.recipe import TrainOptions
    from dsv3_mini.sharded import read_document
    from dsv3_mini.train import show_result

    def wanted() -> TrainOptions:
        stored = read_document(Path(options.out) / "checkpoints")["options"] if options.resume else {}
        return replace(TrainOptions(**stored), **given)

    with joined(given.get("device", "cpu")):
        grid, dtype = (options.pipeline, options.experts), getattr(torch, options.save_dtype)
        member = train_together(from_first(wanted), options.out, *grid, options.resume, save_dtype=dtype)
        if member.run:
            print(show_result(member.run.model, options.out))


def add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="continue a prompt or fill a gap, streaming")
    parser.add_argument("prompt")
    parser.add_argument("--checkpoint", required=True, help="a folder that train wrote")
    parser.add_argument("--suffix", help="what stands after a gap; the model fills what is between prompt and suffix")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="a string that ends the text; may be repeated")
    parser.add_argument("--speculative", action="store_true", help="draft with the MTP layer")
    parser.add_argument("--drafts", type=int, choices=(1, 2), default=1, help="drafts a step with --speculative")
    parser.add_argument("--compiled", action="store_true", help="decode in compiled loops: for long texts on a CPU")
    parser.set_defaults(run=generate)


def generate(options: argparse.Namespace) -> None:
    """Print the prompt and what follows, piece by piece as whole characters appear."""
    import time

    from dsv3_mini.completion import Completer
    from dsv3_mini.decode import DecodePlan

    if not options.prompt and options.suffix is None:
        raise ValueError("the prompt is empty; at least one character is needed")
    plan_type = DecodePlan
    if options.compiled:
        from dsv3_mini.compiled import CompiledPlan as plan_type
    completer, started, counts = Completer.from_pretrained(options.checkpoint, plan_type), time.perf_counter(), {}
    settings = {name: getattr(options, name) for name in ("suffix", "stop", "temperature", "top_p")}
    settings |= {"seeds": [options.seed], "n_drafts": options.drafts if options.speculative else 0}
    pieces = completer.stream(options.prompt, options.max_new_tokens, **settings)
    shown = [options.prompt]  # printed with the first piece, so that a refused request prints nothing
    for piece in pieces:
        counts[piece.kind] = counts.get(piece.kind, 0) + 1
        if piece.kind != "rejected":
            print(*shown, piece.text, sep="", end="", flush=True)
            shown = []
    print(*shown, options.suffix or "", sep="")
    accepted, rejected = counts.get("accepted", 0), counts.get("rejected", 0)
    count, seconds = counts.get("model", 0) + accepted, time.perf_counter() - started
    drafts = f", {accepted} of {accepted + rejected} drafts accepted" if options.speculative else ""
    print(f"[{count} tokens, {count / seconds:.0f} tokens/s{drafts}]", file=sys.stderr)


def add_bench(commands) -> None:
    parser = commands.add_parser("bench", help="training step and greedy decoding against transformers, same weights")
    parser.add_argument("--preset", default="nano", help="nano or mini, with random weights")
    parser.add_argument("--checkpoint", help="a trained folder instead; speculative decoding is measured too")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side is measured, in turn")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded after the first")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64], help="prompt lengths")
    parser.add_argument(
        "--kernels", action="store_true", help="instead: each Triton kernel against a library, on a GPU"
    )
    parser.add_argument("--only", default="", help="with --kernels: those whose name contains this")
    parser.add_argument("--json", help="also write the figures to this file (--kernels: not to assets/benchmarks)")
    parser.set_defaults(run=bench)


def bench(options: argparse.Namespace) -> None:
    """Print tokens a second and their ratio."""
    if options.kernels:
        return bench_kernels(options)
    from dsv3_mini.bench import compare_with_transformers
    from dsv3_mini.checkpoint import write_json

    names = ("preset", "rounds", "new_tokens", "checkpoint", "contexts")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(options.json).parent} to write {options.json} into")
    figures = compare_with_transformers(**{name: getattr(options, name) for name in names})
    sides = {"ours": "ratio", "speculative": "speculative_ratio"}
    sides |= {"compiled": "compiled_ratio", "compiled speculative": "compiled_speculative_ratio"}
    print(f"{'tokens/s':26}{'transformers':>14}" + "".join(f"{side:>22}" for side in sides))
    for name, row in figures["measured"].items():
        cells = (f"{row[s]:13.0f}{row[ratio]:8.2f}x" if s in row else f"{'':22}" for s, ratio in sides.items())
        print(f"{name:26}{row['transformers']:14.0f}{''.join(cells)}".rstrip())
    if options.json:
        write_json(Path(options.json), figures)


def bench_kernels(options: argparse.Namespace) -> None:
    """Print a line a kernel and size; needs a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--kernels times Triton kernels on an NVIDIA GPU, and torch finds none on this machine")
    from dsv3_mini.kernels.bench import benchmark

    print("wrote", benchmark(Path(options.json) if options.json else None, only=options.only))


def add_experiment(commands) -> None:
    parser = commands.add_parser("experiment", help="a logged comparison that a chapter draws")
    names = "attention, balance, gamma, fp8, mtp, dense, fim, gate, bias_speed, nano, mini, plain, training_speed"
    later = "long_context, post_training, grpo, code_reward, ledger, sparse_attention"
    parser.add_argument("name", help=f"{names}, {later} or whole_system")
    parser.add_argument("--out", default="assets/runs", help="folder of NAME.json")
    parser.set_defaults(run=experiment)


def experiment(options: argparse.Namespace) -> None:
    """Run all variants and seeds, a line each."""
    from dsv3_mini.code_reward_runs import code_reward_runs
    from dsv3_mini.experiments import run_experiment
    from dsv3_mini.grpo_runs import grpo_runs
    from dsv3_mini.ledger_runs import ledger_runs
    from dsv3_mini.long_context_runs import long_context_runs
    from dsv3_mini.post_training_runs import post_training_runs
    from dsv3_mini.sparse_runs import sparse_attention_runs
    from dsv3_mini.whole_system import whole_system_runs

    def show(run: dict) -> None:
        result = {name: run[name] for name in ("valid_loss", "ratio", "results") if name in run}
        print(f"{run['variant']:24} seed {run['seed']}: {result}, {run['seconds']:.0f} s", flush=True)

    later = {"long_context": long_context_runs, "post_training": post_training_runs, "grpo": grpo_runs}
    later |= {"code_reward": code_reward_runs, "ledger": ledger_runs}
    later |= {"sparse_attention": sparse_attention_runs, "whole_system": whole_system_runs}
    print("wrote", run_experiment(options.name, options.out, show, later))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a bad request is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_mini", description="DeepSeek-V3 on a laptop.")
    commands = parser.add_subparsers(required=True, metavar="cost | train | generate | bench | experiment")
    for add in (add_cost, add_train, add_generate, add_bench, add_experiment):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
