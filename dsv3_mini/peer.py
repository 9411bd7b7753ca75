"""The same weights in transformers, and a clock that treats both sides alike.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import time
from collections.abc import Callable

from torch import nn

from dsv3_mini.model import DeepSeekV3

# How were the comparisons run?


def transformers_twin(model: DeepSeekV3) -> nn.Module:
    """transformers' DeepseekV3ForCausalLM with the same weights; ValueError says how to get the library."""
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError as error:
        raise ValueError("transformers is the peer, which is missing: pip install transformers") from error
    twin = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict({**model.config.to_dict(), "torch_dtype": "float32"}))
    state = model.state_dict()
    twin.load_state_dict({name: state[name] for name in twin.state_dict()})
    return twin.eval()


def time_in_turn(sides: dict[str, Callable[[], tuple[int, float] | int]], rounds: int) -> dict[str, float]:
    """Tokens a second of each side, the median of `rounds` measured in turn after one warm-up.

    A side does its work and returns its token count, or tokens and seconds where not all of its time counts.
    """
    if rounds < 1:
        raise ValueError(f"{rounds=} must be 1 or more")
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            result = work()
            tokens, seconds = result if isinstance(result, tuple) else (result, time.perf_counter() - started)
            if round_:
                speeds[name].append(tokens / seconds)
    return {name: sorted(values)[len(values) // 2] for name, values in speeds.items()}
