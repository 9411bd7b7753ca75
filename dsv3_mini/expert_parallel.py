"""Experts spread over many processes: tokens travel to them and back, over as few slow links as possible.

Generated from chapters/09_expert_parallel.ipynb; edit the chapter, not this file.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3_mini.config import ModelConfig
from dsv3_mini.fp8 import act_dequant, act_quant
from dsv3_mini.layers import SwiGLU
from dsv3_mini.moe import Experts, Gate, MoE, Routing, experts_reference

# Why must tokens travel?


def expert_parallel_reference(
    xs: list[Tensor], routings: list[Routing], gate_up_proj: Tensor, down_proj: Tensor
) -> list[Tensor]:
    """Every rank of an expert-parallel layer in one process, one pair of sender and owner after the other.

    xs[r]: (N_r, D) tokens of rank r; weights stacked over all E experts, of which each rank owns an equal run.
    """
    width, outs = len(down_proj) // len(xs), [torch.zeros_like(x) for x in xs]
    for sender, (x, routing) in enumerate(zip(xs, routings, strict=True)):
        for owner in range(len(xs)):
            mine = slice(owner * width, (owner + 1) * width)
            token, slot = (routing.indices // width == owner).nonzero(as_tuple=True)
            letter = Routing(routing.indices[token, slot, None] - mine.start, routing.weights[token, slot, None], None)
            answer = experts_reference(x[token], letter, gate_up_proj[mine], down_proj[mine])
            outs[sender] = outs[sender].index_add(0, token, answer)
    return outs


# How does a message get there, and its gradient back?


def exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all without a gradient: the next send[r] rows of x go to rank r, receive[r] rows come from it."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


class AllToAll(torch.autograd.Function):
    """`exchange` with a gradient, which takes the same way back: what was received is sent, and the other way round.

    forth, back: in which form rows travel, and their gradients.
    """

    @staticmethod
    def forward(ctx, x, send, receive, group, forth, back):
        ctx.back, ctx.way = back, (receive, send, group)
        return forth(x, send, receive, group)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient, *ctx.way), None, None, None, None, None


class Hop:
    """Copies of this rank's rows on their way to other ranks, and the sum of the answers on the way back.

    wanted: (N, ranks of the group) bool, True where a row is needed. Each row goes at most once to each rank.
    """

    def __init__(self, wanted: Tensor, group: dist.ProcessGroup):
        rank, self.row = wanted.T.nonzero(as_tuple=True)  # (copies,), ordered by rank
        send = torch.bincount(rank, minlength=wanted.shape[1])
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=group)  # each rank tells the others how much will come
        self.n_rows, self.group = len(wanted), group
        self.send, self.receive = send.tolist(), receive.tolist()

    def dispatch(self, x: Tensor, out: Callable = exchange) -> Tensor:
        """(N, ...) -> the rows that other ranks sent here, rank after rank. out: in which form they travel."""
        return AllToAll.apply(x[self.row], self.send, self.receive, self.group, out, exchange)

    def combine(self, y: Tensor, out: Callable = exchange) -> Tensor:
        """One answer (received, D) for each row that came -> (N, D), the sum of the answers to each row sent.

        out: in which form the gradients of the answers travel, which go out again as the rows did.
        """
        answers = AllToAll.apply(y, self.receive, self.send, self.group, exchange, out)
        return y.new_zeros(self.n_rows, *y.shape[1:]).index_add(0, self.row, answers)


class Level(NamedTuple):
    """One level of machines, as this rank sees it: `group` place p holds experts first + p * width and on."""

    group: dist.ProcessGroup
    first: int
    width: int

    def wanted(self, indices: Tensor) -> Tensor:
        """Which places of the level hold an expert that a token chose: (N, K) -> (N, places) bool."""
        n_places = dist.get_world_size(self.group)
        place = (indices - self.first).div(self.width, rounding_mode="floor")
        place = place.where((place >= 0) & (place < n_places), n_places)  # experts elsewhere: a column to drop
        wanted = torch.zeros(len(indices), n_places + 1, dtype=torch.bool, device=indices.device)
        return wanted.scatter_(1, place, True)[:, :-1]


def levels_of(mesh: DeviceMesh, n_experts: int) -> tuple[list[Level], int, int]:
    """The levels of a mesh from outside in, then the first expert of this rank and how many it holds."""
    if n_experts % mesh.size():
        raise ValueError(f"n_routed_experts={n_experts} do not spread evenly over {mesh.size()} ranks")
    levels, first, width = [], 0, n_experts
    for dim in range(mesh.ndim):
        width //= mesh.size(dim)
        levels.append(Level(mesh.get_group(dim), first, width))
        first += mesh.get_local_rank(dim) * width
    return levels, first, width


class ExpertParallelMoE(nn.Module):
    """`MoE` with its routed experts spread over a mesh; the gate and the shared experts stand on every rank.

    mesh (n_ranks,): tokens go straight to the owners of their experts. mesh (n_nodes, n_gpus): first once to each
    node, to the rank with the sender's own number in it, and from there to the owners (section 3.2.2).
    fp8_dispatch: what goes out, tokens and the gradients of their answers, travels as `pack_fp8` writes it; what
    returns, answers and the gradients of the tokens, keeps its dtype, and rounding counts as the identity.
    forward: this rank's tokens (..., D) -> (..., D). Every rank must call it, also one without tokens.
    """

    def __init__(self, config: ModelConfig, mesh: DeviceMesh, fp8_dispatch: bool = False):
        super().__init__()
        self.fp8_dispatch = fp8_dispatch
        self.mesh, (self.levels, self.first, width) = mesh, levels_of(mesh, config.n_routed_experts)
        self.gate = Gate(config)
        self.experts = Experts(config.replace(n_routed_experts=width, n_group=1, topk_group=1, num_experts_per_tok=1))
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    @classmethod
    def from_moe(cls, moe: MoE, mesh: DeviceMesh, fp8_dispatch: bool = False) -> "ExpertParallelMoE":
        """This rank's part of a whole layer, in its dtype and on its device."""
        part = cls(moe.gate.config, mesh, fp8_dispatch).to(moe.experts.down_proj)
        state, width = moe.state_dict(), len(part.experts.down_proj)
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            state[name] = state[name][part.first : part.first + width]
        part.load_state_dict(state)
        return part

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, D)
        routing = self.gate(tokens)
        rows, weights, indices, hops = tokens, routing.weights, routing.indices, []
        for level in self.levels:
            hops.append(Hop(level.wanted(indices), level.group))
            rows, weights, indices = self.send(hops[-1], rows, weights, indices)
        y = self.compute(rows, weights, indices)
        for hop in reversed(hops):
            y = hop.combine(y, self.form(y, min_amax=1e-30))
        self.copies = [hop.send for hop in hops]  # of the last call, for those who count traffic
        return y.view_as(x) + self.shared_experts(x) if hasattr(self, "shared_experts") else y.view_as(x)

    def send(self, hop: Hop, rows: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A token travels with its K gate weights, in one message that has one gradient, and its experts' numbers."""
        letters = hop.dispatch(torch.cat([rows, weights], dim=1), self.form(rows))  # (M, D + K)
        return *letters.split([rows.shape[1], weights.shape[1]], dim=1), hop.dispatch(indices)

    def form(self, rows: Tensor, **options) -> Callable:
        """In which form rows (M, D) go out."""
        return partial(exchange_fp8, width=rows.shape[1], **options) if self.fp8_dispatch else exchange

    def compute(self, rows: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """The weighted sum of this rank's experts for each row that came: (M, D), (M, K), (M, K) -> (M, D)."""
        local = indices - self.first
        row, slot = ((local >= 0) & (local < len(self.experts.down_proj))).nonzero(as_tuple=True)
        y = self.experts(rows[row], Routing(local[row, slot, None], weights[row, slot, None], None))
        return y.new_zeros(rows.shape).index_add(0, row, y)


def sum_replicated_gradients(moe: ExpertParallelMoE) -> None:
    """Add up, over all ranks, the gradients of what every rank holds: gate and shared experts, not the routed ones."""
    local = {id(weight) for weight in moe.experts.parameters()}
    for weight in (weight for weight in moe.parameters() if id(weight) not in local):
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # all ranks must take part
        for dim in range(moe.mesh.ndim):
            dist.all_reduce(weight.grad, group=moe.mesh.get_group(dim))


def run_rank(
    moe: MoE, x: Tensor, upstream: Tensor, shape: tuple[int, ...], fp8_dispatch: bool = False
) -> dict[str, Tensor | list]:
    """Forward and backward of one rank's tokens x (N, D); to be called in all processes of a torch.distributed group.

    moe: the whole layer, the same everywhere; upstream: (N, D) gradient of the output; shape: of the mesh.
    """
    part = ExpertParallelMoE.from_moe(moe, init_device_mesh("cpu", shape), fp8_dispatch)
    x = x.clone().requires_grad_()
    output = part(x)
    output.backward(upstream)
    sum_replicated_gradients(part)
    gradients = {name: weight.grad for name, weight in part.named_parameters()}
    return {"output": output.detach(), "x": x.grad, "copies": part.copies, **gradients}


def spread_experts(model: nn.Module, mesh: DeviceMesh, fp8_dispatch: bool = False) -> None:
    """Put this rank's `ExpertParallelMoE` in the place of every MoE in a model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MoE):
                setattr(module, name, ExpertParallelMoE.from_moe(child, mesh, fp8_dispatch))


# Which wires does a token use?


def distinct_nodes(indices: Tensor, n_experts: int, n_nodes: int) -> Tensor:
    """On how many nodes each token's experts stand: (N, K) -> (N,). Node m holds the m-th equal run of experts."""
    if n_experts % n_nodes:
        raise ValueError(f"{n_experts=} must be a multiple of {n_nodes=}")
    chosen = torch.zeros(len(indices), n_nodes, dtype=torch.bool)
    return chosen.scatter_(1, indices // (n_experts // n_nodes), True).sum(1)


def count_copies(
    indices: Tensor, home: Tensor, n_experts: int, n_nodes: int, n_gpus: int, deduplicate: bool = True
) -> tuple[Tensor, Tensor]:
    """Copies of each token on slow links between nodes and on fast links within one: (N, K) -> (N,), (N,).

    home: (N,) the GPU on which a token starts. Plain: one copy a chosen expert, straight to its GPU. Deduplicated: one
    a node, to the GPU with home's number in it, then one to each further GPU that has an expert of the token.
    """
    if n_experts % n_gpus or n_gpus % n_nodes:
        raise ValueError(f"{n_experts=} must be a multiple of {n_gpus=}, and {n_gpus=} of {n_nodes=}")
    per_node, gpu = n_gpus // n_nodes, indices // (n_experts // n_gpus)
    if not deduplicate:
        away = gpu // per_node != home[:, None] // per_node
        return away.sum(1), (~away & (gpu != home[:, None])).sum(1)
    wanted = torch.zeros(len(indices), n_gpus, dtype=torch.bool).scatter_(1, gpu, True)
    by_node = wanted.unflatten(1, (n_nodes, per_node))  # (N, nodes, GPUs)
    visited, token = by_node.any(-1), torch.arange(len(indices))
    slow = visited.sum(1) - visited[token, home // per_node].int()
    return slow, wanted.sum(1) - by_node[token, :, home % per_node].sum(1)


def pack_fp8(letters: Tensor, width: int, min_amax: float = 1e-4) -> Tensor:
    """(M, width + K) -> bytes (M, *): E4M3 values, a scale for each 128 of them as its exponent, K numbers as they are.

    Quantised as by `act_quant(..., scale_fmt="ue8m0")` (report section 3.3.3); the last tile may be short.
    """
    q, scale = act_quant(letters[:, :width], scale_fmt="ue8m0", min_amax=min_amax)
    parts = q, scale.to(torch.float8_e8m0fnu), letters[:, width:].contiguous()
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1)


def unpack_fp8(payload: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """What `pack_fp8` wrote, dequantised to `dtype`, the one that was packed: bytes (M, *) -> (M, width + K)."""
    scales = width + -(-width // 128)
    q, scale = payload[:, :width].view(torch.float8_e4m3fn), payload[:, width:scales].view(torch.float8_e8m0fnu)
    rest = payload.new_empty(len(payload), (payload.shape[1] - scales) // dtype.itemsize, dtype=dtype)
    rest.view(torch.uint8).copy_(payload[:, scales:])  # copied: a view as wider numbers would have to be aligned
    return torch.cat([act_dequant(q, scale.float()).to(dtype), rest], dim=1)


def exchange_fp8(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, width: int, min_amax: float = 1e-4
) -> Tensor:
    """`exchange` whose first `width` columns travel in FP8."""
    return unpack_fp8(exchange(pack_fp8(x, width, min_amax), send, receive, group), width, x.dtype)
