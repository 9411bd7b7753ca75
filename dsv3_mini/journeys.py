"""Two micro-batches in turns: one computes while the other's tokens travel.

Generated from chapters/09_expert_parallel.ipynb; edit the chapter, not this file.
"""

import time
from collections import deque
from collections.abc import Generator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dsv3_mini.expert_parallel import ExpertParallelMoE, Hop, spread_experts

# Can the journey be hidden?


def in_turns(journeys: Sequence[Generator]) -> list:
    """Drive generators, one stretch of each in turn, until all have arrived; what they return, in their order."""
    arrived, waiting = [None] * len(journeys), deque(enumerate(journeys))
    while waiting:
        i, journey = waiting.popleft()
        try:
            next(journey)
            waiting.append((i, journey))
        except StopIteration as end:
            arrived[i] = end.value
    return arrived


def travel(tensors: Sequence[Tensor], send: list[int], receive: list[int], group: dist.ProcessGroup) -> Generator:
    """`exchange` of several tensors without gradients; yields once, while they are on their way."""
    outs = [x.new_empty(sum(receive), *x.shape[1:]) for x in tensors]
    pairs = zip(outs, tensors, strict=True)
    works = [dist.all_to_all_single(out, x, receive, send, group=group, async_op=True) for out, x in pairs]
    yield
    for work in works:
        work.wait()
    return outs


def moe_journey(moe: ExpertParallelMoE, x: Tensor) -> Generator:
    """`ExpertParallelMoE.forward` on a mesh of one dimension, which yields after dispatch and after combine."""
    tokens, level = x.flatten(0, -2), moe.levels[0]
    routing = moe.gate(tokens)
    hop = Hop(level.wanted(routing.indices), level.group)
    letters = [part[hop.row] for part in (tokens, routing.weights, routing.indices)]
    letters = yield from travel(letters, hop.send, hop.receive, hop.group)
    (answers,) = yield from travel([moe.compute(*letters)], hop.receive, hop.send, hop.group)
    y = tokens.new_zeros(tokens.shape).index_add(0, hop.row, answers.type_as(tokens)).view_as(x)
    return y + moe.shared_experts(x) if hasattr(moe, "shared_experts") else y


def model_journey(transformer: nn.Module, ids: Tensor) -> Generator:
    """`Transformer.forward` whose mixtures are spread: (B, T) -> (B, T, D)."""
    x, rope = transformer.embed_tokens(ids), transformer.rope(0, ids.shape[1])
    for layer in transformer.layers:
        x = x + layer.self_attn(layer.input_layernorm(x), rope)
        h = layer.post_attention_layernorm(x)
        x = x + ((yield from moe_journey(layer.mlp, h)) if isinstance(layer.mlp, ExpertParallelMoE) else layer.mlp(h))
    return transformer.norm(x)


@torch.inference_mode()
def time_journeys(model: nn.Module, ids: Tensor, rounds: int) -> tuple[Tensor, list[tuple[float, float]]]:
    """On one rank: hidden states of ids (B, T), two micro-batches in turns; seconds (one by one, in turns) a round."""
    spread_experts(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    halves, seconds = ids.chunk(2), []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        one_by_one = [in_turns([model_journey(model.model, half)])[0] for half in halves]
        between = time.perf_counter()
        together = in_turns([model_journey(model.model, half) for half in halves])
        seconds.append((between - start, time.perf_counter() - between))
        assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))
    return torch.cat(together), seconds
