"""The report's schedules as functions of the share of tokens spent, and the options that repeat a run.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from dsv3_mini.accounting import count_parameters
from dsv3_mini.config import ModelConfig

# What does a run need to be repeated?


@dataclass(frozen=True)
class TrainOptions:
    """What a run needs to be repeated. Rates, factors and fractions are the report's; the sizes are ours."""

    preset: str = "nano"
    model: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that differ from the preset
    # text
    data: str = "stdlib"  # comma-separated: stdlib, installed packages, folders of text
    max_bytes: int | None = None  # of each source
    fim_rate: float = 0.1
    split_rate: float = 0.1
    # size of the run
    steps: int = 800
    batch_size: int = 8  # sequences, after the ramp
    seq_len: int = 128
    seed: int = 0
    # optimisation
    learning_rate: float = 2e-3  # at its peak
    embedding_std: float = 0.4  # of the embedding's start; 0 draws it like every other matrix
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3  # lambda, until the learning rate starts to fall
    gamma: float = 0.01  # speed of the bias update
    alpha: float = 1e-4  # factor of the sequence-wise balance loss
    ema_horizon: float = 0.05  # memory of the weight average, as a share of the steps
    dtype: str = "float32"  # of matrix products; master weights, moments and the gate stay float32
    recompute: bool = False
    device: str = "cpu"
    # bookkeeping
    checkpoint_every: int = 100
    validate_every: int = 100

    def __post_init__(self):
        whole = {"steps": 0, "batch_size": 1, "seq_len": 1, "checkpoint_every": 1, "validate_every": 1}
        for name, least in whole.items():
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
        for name in ("learning_rate", "embedding_std", "weight_decay", "clip", "mtp_weight", "gamma", "alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("fim_rate", "split_rate", "ema_horizon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is not one of 'float32', 'bfloat16'")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes={self.max_bytes} must be 1 or more")

    def config(self) -> ModelConfig:
        """The model's, initialised as its width asks; ValueError if it cannot be trained with these options."""
        width = ModelConfig.preset(self.preset, **self.model).hidden_size
        config = ModelConfig.preset(self.preset, **{"initializer_range": scaled_init(width), **self.model})
        if self.seq_len > config.max_position_embeddings:
            raise ValueError(f"seq_len={self.seq_len} exceeds max_position_embeddings={config.max_position_embeddings}")
        if not self.mtp_weight and config.num_nextn_predict_layers:
            raise ValueError("mtp_weight=0 would train no MTP module; model={'num_nextn_predict_layers': 0} has none")
        if (total := count_parameters(config).total) > 10**9:
            raise ValueError(f"preset {self.preset!r} has {total:,} parameters; train takes nano or mini")
        return config


def check_same_options(options: TrainOptions, stored: TrainOptions) -> None:
    """A resumed run keeps its own options; ValueError names those that differ."""
    names = [f.name for f in fields(options) if getattr(options, f.name) != getattr(stored, f.name)]
    if names:
        wanted = ", ".join(f"{name}={getattr(stored, name)!r}" for name in names)
        raise ValueError(f"the run was started with {wanted}; a resumed run keeps its own options")


def scaled_init(hidden_size: int) -> float:
    """The report's 0.006 at width 7168, grown so that a matrix does to a vector's length what it does there."""
    return round(0.006 * math.sqrt(7168 / hidden_size), 4)


DECAY_START = 10 / 14.8  # the learning rate starts to fall, lambda drops (shares of 14.8T tokens)


DECAY_END = 14.3 / 14.8  # first plateau, the biases are frozen


LAST_PLATEAU = 14.633 / 14.8


RAMP_END = 0.469 / 14.8  # the batch has its full size


def learning_rate_factor(fraction: float) -> float:
    """Share of the peak learning rate when `fraction` of the tokens is spent; the warm-up is left out (section 4.2)."""
    if fraction < DECAY_START:
        return 1.0
    if fraction < DECAY_END:
        return 0.55 + 0.45 * math.cos(math.pi * (fraction - DECAY_START) / (DECAY_END - DECAY_START))
    return 0.1 if fraction < LAST_PLATEAU else 7.3 / 220


def warmup_steps(steps: int) -> int:
    """The report's 2K of about 240K steps, but 20 at least, AdamW's memory of squares, and a tenth at most."""
    return min(max(round(steps * 2 / 240), 20), max(1, steps // 10))


def sequences_before(step: int, steps: int, batch_size: int) -> int:
    """Sequences that steps 0 .. step - 1 take: the batch grows linearly in tokens from a fifth to its full size.

    The report gives the ends of the ramp, 3072 and 15360 sequences, and its length, not its shape. A batch of fewer
    than 5 sequences has no ramp.
    """
    if batch_size < 5:
        return step * batch_size
    total = steps * batch_size / (1 + RAMP_END * (math.log(5) / 0.8 - 1))
    ramp = RAMP_END * total  # sequences in the ramp; d sequences / d step = batch grows with the sequences seen
    ramp_steps = ramp * math.log(5) / (0.8 * batch_size)
    if step < ramp_steps:
        return math.floor(ramp / 4 * math.expm1(0.8 * batch_size * step / ramp))
    return math.floor(ramp + batch_size * (step - ramp_steps))


class Settings(NamedTuple):
    """What the schedules say about one step."""

    fraction: float  # of the tokens, spent before the step
    learning_rate: float
    mtp_weight: float  # lambda
    gamma: float
    batch_size: int


def settings_at(step: int, options: TrainOptions) -> Settings:
    """The report's schedules at a step, as functions of the share of the token budget that is spent."""
    first, end, total = (
        sequences_before(n, options.steps, options.batch_size) for n in (step, step + 1, options.steps)
    )
    fraction = first / total
    warm = min(1.0, (step + 1) / warmup_steps(options.steps))
    return Settings(
        fraction=fraction,
        learning_rate=options.learning_rate * warm * learning_rate_factor(fraction),
        mtp_weight=options.mtp_weight * (1.0 if fraction < DECAY_START else 1 / 3),
        gamma=options.gamma if fraction < DECAY_END else 0.0,
        batch_size=end - first,
    )
