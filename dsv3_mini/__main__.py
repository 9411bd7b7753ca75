"""The command line: python -m dsv3_mini cost | train | generate | bench | experiment (each with --help)."""

import argparse
import json
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
    parser.add_argument("--preset", default="nano", help="nano or mini")
    parser.add_argument("--data", help="a folder of text; the default is the standard library")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/nano", help="folder of the log, the checkpoints and the model")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its own options")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.set_defaults(run=train)


def train(options: argparse.Namespace) -> None:
    """Train or resume; the folder then opens with `generate` and with transformers."""
    from dsv3_mini.train import TrainOptions
    from dsv3_mini.train import train as run_training

    names = ("preset", "data", "steps", "seed", "checkpoint_every", "batch_size", "seq_len", "learning_rate")
    run_training(TrainOptions(**{name: getattr(options, name) for name in names}), options.out, options.resume)
    print(f"wrote {options.out}: config.json, model.safetensors, tokenizer.json, log.jsonl")


def add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="continue a prompt, streaming")
    parser.add_argument("prompt")
    parser.add_argument("--checkpoint", required=True, help="a folder that train wrote")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--speculative", action="store_true", help="draft with the MTP layer")
    parser.set_defaults(run=generate)


def generate(options: argparse.Namespace) -> None:
    """Print the prompt and its continuation, piece by piece as whole characters appear."""
    import torch

    from dsv3_mini.generate import generate as run_generation
    from dsv3_mini.generate import load_tokenizer
    from dsv3_mini.model import DeepSeekV3

    if not options.prompt:
        raise ValueError("the prompt is empty; at least one character is needed")
    tokenizer = load_tokenizer(options.checkpoint)
    model = DeepSeekV3.from_pretrained(options.checkpoint)
    ids, shown = tokenizer.encode(options.prompt).ids, options.prompt
    print(shown, end="", flush=True)

    def on_token(new: list[int]) -> None:
        nonlocal shown
        ids.append(new[0])
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    names = ("max_new_tokens", "temperature", "top_p", "seed", "speculative")
    settings = {name: getattr(options, name) for name in names}
    result = run_generation(model, torch.tensor([list(ids)]), on_token=on_token, **settings)
    count = result.tokens.shape[1]
    drafts = f", {result.accepted} of {result.drafted} drafts accepted" if options.speculative else ""
    print(f"\n[{count} tokens, {count / max(result.seconds, 1e-9):.0f} tokens/s{drafts}]", file=sys.stderr)


def add_bench(commands) -> None:
    parser = commands.add_parser("bench", help="training step and greedy decoding against transformers, same weights")
    parser.add_argument("--preset", default="nano", help="nano or mini")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side is measured, in turn")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.set_defaults(run=bench)


def bench(options: argparse.Namespace) -> None:
    """Print tokens a second and their ratio."""
    from dsv3_mini.bench import compare_with_transformers

    figures = compare_with_transformers(options.preset, options.rounds)
    for name, row in figures["measured"].items():
        ours, theirs = f"ours {row['ours']:8.0f}", f"transformers {row['transformers']:8.0f}"
        print(f"{name:22} {ours}  {theirs} tokens/s  ratio {row['ratio']:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def add_experiment(commands) -> None:
    parser = commands.add_parser("experiment", help="a logged comparison that a chapter draws")
    parser.add_argument("name", help="attention, balance, gamma or fp8")
    parser.add_argument("--out", default="assets/runs", help="folder of NAME.json")
    parser.set_defaults(run=experiment)


def experiment(options: argparse.Namespace) -> None:
    """Run all variants and seeds, a line each."""
    from dsv3_mini.experiments import run_experiment

    def show(run: dict) -> None:
        print(
            f"{run['variant']:10} seed {run['seed']}: validation loss {run['valid_loss']:.4f}, {run['seconds']:.0f} s"
        )

    print("wrote", run_experiment(options.name, options.out, show))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a bad request is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_mini", description="DeepSeek-V3 on a laptop.")
    commands = parser.add_subparsers(required=True, metavar="cost | train | generate | bench | experiment")
    for add in (add_cost, add_train, add_generate, add_bench, add_experiment):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
