"""Claims that logged runs can answer.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

import json
import math
import statistics

from dsv3_mini.accounting import flops_per_token
from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger import Bound, Effect, Finding, Logs, Number, flat

# What do the logs say?


def attention_order(logs: Logs) -> list[Finding]:
    """Claim 3: MLA ≥ MHA > GQA > MQA."""
    pairs = ("mla", "mha"), ("mha", "gqa"), ("gqa", "mqa")
    return [Effect(f"loss, {a} - {b}", logs.difference("attention", a, b, "valid_loss"), -1) for a, b in pairs]


def mean_violation(run: dict) -> float:
    """MaxVio on held-out text, mean of the layers."""
    return statistics.fmean(run["held_out_max_violation"])


def balancing(logs: Logs) -> list[Finding]:
    """Claim 6: a bias balances better than a loss, at no cost."""
    violation = logs.difference("balance", "bias", "auxiliary", mean_violation)
    loss = logs.difference("balance", "bias", "auxiliary", "valid_loss")
    return [
        Effect("MaxVio, bias - none", logs.difference("balance", "bias", "none", mean_violation), -1),
        Effect("MaxVio, bias - loss", violation, -1, 0.04 - 0.72),
        Effect("loss, bias - loss", loss, -1, math.log(9.50 / 9.56)),
    ]


def bias_speed(logs: Logs) -> list[Finding]:
    """Claim 7: the bias has a right speed."""
    return [
        Effect("MaxVio, too slow - right", logs.difference("gamma", "0.0001", "0.01", mean_violation), +1),
        Effect("MaxVio, too fast - right", logs.difference("gamma", "0.1", "0.01", mean_violation), +1),
    ]


def balance_scope(logs: Logs) -> list[Finding]:
    """Claim 9: balance over batches is enough."""
    return [
        Effect("loss, sequence - bias", logs.difference("balance", "sequence", "bias", "valid_loss"), +1, 0.005),
        Effect("loss, sequence - batch", logs.difference("balance", "sequence", "auxiliary", "valid_loss"), +1, 0.005),
    ]


def specialised(logs: Logs) -> list[Finding]:
    """Claim 10: free experts specialise more."""

    def information(run: dict) -> float:
        return statistics.fmean(run["specialisation"])

    gained = logs.difference("balance", "bias", "auxiliary", information)
    return [Effect("information, bias - loss (nats)", gained, +1)]


def first_layer(logs: Logs) -> list[Finding]:
    """Claim 12: the first layer balances slowest, so it is dense."""

    def excess(run: dict) -> float:
        """Mean MaxVio in training of layer 0, over that of the layers behind it."""
        layers = list(zip(*(violations for _, violations in run["max_violation"]), strict=True))
        means = [statistics.fmean(layer) for layer in layers]
        return means[0] - statistics.fmean(means[1:])

    values = logs.values("balance", "bias, no dense layer", excess)
    return [Effect("MaxVio, layer 0 - later layers", list(values.values()), +1)]


def dropped(logs: Logs) -> list[Finding]:
    """Claim 13: with balance, no token need be dropped."""

    def share(run: dict) -> float:
        """Choices beyond a capacity of one mean load an expert, held-out text, mean of the layers."""
        shares = []
        for table in run["load_by_domain"]:
            load = [sum(row) for row in table]
            mean = sum(load) / len(load)
            shares.append(sum(max(0.0, x - mean) for x in load) / sum(load))
        return statistics.fmean(shares)

    return [Effect("share dropped, bias - none", logs.difference("balance", "bias", "none", share), -1)]


def gate_function(logs: Logs) -> list[Finding]:
    """Claim 14: sigmoid affinities suit the bias better."""
    loss = logs.difference("gate", "softmax", "sigmoid", "valid_loss")
    return [Effect("loss, softmax - sigmoid", loss, +1, math.log(9.599 / 9.50))]


def prediction_module(logs: Logs) -> list[Finding]:
    """Claim 15: MTP helps on tasks, not on bits per byte."""
    bits = logs.difference("mtp", "with MTP", "without", "valid_bits_per_byte")
    return [
        flat("change of bits per byte", bits, 0.001),
        Effect("accuracy, with - without", logs.difference("mtp", "with MTP", "without", "accuracy"), +1),
    ]


def speculation(logs: Logs) -> list[Finding]:
    """Claim 16: a drafted token speeds decoding up."""
    measured = logs("decoding")["measured"]["greedy decoding at 64"]
    return [
        Number("tokens a step", 1 + measured["acceptance"], 1.875, 0.03, baseline=1.0),
        Number("speed, drafts / plain", measured["speculative"] / measured["ours"], 1.8, 0.1, baseline=1.0),
    ]


def fp8_loss(logs: Logs) -> list[Finding]:
    """Claim 17: FP8 training costs next to nothing."""

    def end(run: dict) -> float:
        return statistics.fmean(run["losses"][-50:])

    def gaps(variant: str, control: str) -> list[float]:
        return [abs(gap) / end(logs("fp8")["runs"][0]) for gap in logs.difference("fp8", variant, control, end)]

    noise = max(gaps("nudged", "fp32"))
    return [Bound("relative gap of the loss", gaps("fp8", "bf16"), 0.0025, noise=noise)]


def long_context(logs: Logs) -> list[Finding]:
    """Claim 29: a short tuning reads 16 times further."""

    def result(name: str):
        return lambda run: run["results"][name]

    found = logs.difference("long_context", "needle, extended", "needle, rope", result("4096"))
    loss = logs.difference("long_context", "yarn, tuned to 4096", "rope", result("last quarter"))
    return [
        Effect("needles found at 16 times the length", found, +1, 1.0),
        Effect("loss there, extended - not", loss, -1),
    ]


def temperature(logs: Logs) -> list[Finding]:
    """Claim 30: the temperature of YaRN matters."""

    def entropy(run: dict) -> float:
        return statistics.fmean(layer[-1] for layer in run["entropy"])  # at the longest distance

    sharper = logs.difference("long_context", "yarn", "yarn frequencies", entropy)
    loss = logs.difference("long_context", "yarn", "yarn frequencies", lambda run: run["results"]["loss"])
    return [Effect("entropy, with - without (nats)", sharper, -1), Effect("loss, with - without", loss, -1)]


def infilling(logs: Logs) -> list[Finding]:
    """Claim 31: filling gaps costs the loss nothing."""
    loss = logs.difference("fim", "0.1", "0", "valid_loss")
    return [
        flat("change of the loss (nats)", loss, 0.02),
        Effect("gaps filled, with - without", logs.difference("fim", "0.1", "0", "infill"), +1),
    ]


def stability(logs: Logs) -> list[Finding]:
    """Claim 38: no irrecoverable spike, no rollback."""
    small = logs("nano")["runs"][0]["log"]
    file = logs.folder.parent / "checkpoints/mini/log.jsonl"
    large = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Bound("loss spikes in two whole runs", [count_spikes([e["loss"] for e in log]) for log in (small, large)], 0)
    ]


def count_spikes(losses: list[float], window: int = 50, deviations: float = 6.0) -> int:
    """Steps whose loss lies more than some deviations above the mean of the window before, after the warm-up."""
    spikes = 0
    for step in range(2 * window, len(losses)):
        before = losses[step - window : step]
        spikes += losses[step] > statistics.fmean(before) + deviations * statistics.stdev(before)
    return spikes


def dense_models(logs: Logs) -> list[Finding]:
    """Claim 39: a mixture beats a dense model of equal FLOPs."""
    ours = flops_per_token(ModelConfig.preset("v3"), 4096, training=True)
    loss = logs.difference("dense", "dense, equal activated", "experts", "valid_loss")
    return [
        Number("FLOPs a token, 405B dense / V3", 2448e9 / ours, 9.8),
        Effect("loss, dense of equal FLOPs - experts", loss, +1),
    ]


def two_sizes(logs: Logs) -> list[Finding]:
    """Claim 40: ablations agree at two sizes."""
    small = logs.difference("ledger", "small, with MTP", "small, without", "accuracy")
    large = logs.difference("mtp", "with MTP", "without", "accuracy")
    return [Effect("MTP's accuracy, small model", small, +1), Effect("MTP's accuracy, nano", large, +1)]


def rewarded(logs: Logs) -> list[Finding]:
    """Claim 32: group-relative rewards need no critic."""
    gained = logs.difference("grpo", "GRPO", "fine-tuned", lambda run: run["results"]["correct"])
    return [Effect("share correct, GRPO - SFT", gained, +1)]


def distilled(logs: Logs) -> list[Finding]:
    """Claim 33: distilled reasoning: more right, longer."""

    def result(name: str):
        return lambda run: run["results"][name]

    pair = "post_training", "distilled", "short answers"
    return [
        Effect("accuracy, distilled - short answers", logs.difference(*pair, result("accuracy")), +1),
        Effect("length, distilled - short answers", logs.difference(*pair, result("length")), +1),
    ]


def skill_and_facts(logs: Logs) -> list[Finding]:
    """Claim 41: post-training lifts skill more than facts."""

    def gain(name: str) -> list[float]:
        return logs.difference("post_training", "distilled", "short answers", lambda run: run["results"][name])

    pairs = zip(gain("accuracy"), gain("recall"), strict=True)
    return [Effect("gain in sums - gain in facts", [sums - facts for sums, facts in pairs], +1)]


def phase_shares(logs: Logs) -> list[Finding]:
    """Claim 42: pre-training costs most, answers least."""
    spent = [seconds_by_phase(run["phases"]) for run in logs("whole_system")["runs"]]
    reported = {"pre-training": 2664 / 2788, "context extension": 119 / 2788, "post-training": 5 / 2788}
    return [
        Number(
            f"share of {name}", statistics.fmean(s[name] / sum(s.values()) for s in spent), share, 0.02, baseline=1 / 3
        )
        for name, share in reported.items()
    ]


def seconds_by_phase(phases: dict[str, dict]) -> dict[str, float]:
    """Processor seconds of the report's three phases in a whole run."""
    names = {"pre-training": "pre-training", "context extension": "context", "post-training": "post-training"}
    return {name: phases[phase]["processor"] for name, phase in names.items()}
