"""Who stands where among many processes, and what each of them holds.

Generated from chapters/11_pretraining.ipynb; edit the chapter, not this file.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer

from dsv3_mini.balance import BiasBalancer
from dsv3_mini.config import ModelConfig
from dsv3_mini.dataset import Stream
from dsv3_mini.dualpipe import Pipeline
from dsv3_mini.expert_parallel import spread_experts
from dsv3_mini.launch import from_first
from dsv3_mini.losses import head_loss
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import Routing
from dsv3_mini.mtp import depth_tokens
from dsv3_mini.recipe import Settings, TrainOptions
from dsv3_mini.resume import unique_tensors
from dsv3_mini.schedule import dualpipe_schedule, one_f_one_b_schedule
from dsv3_mini.stages import Stage, split_into_stages, stages_of_rank
from dsv3_mini.train import Run, WeightAverage, make_optimizer

# And on several machines?


class Grid:
    """Where this process stands among P x R x E processes, and which others hold the same weights.

    mesh: dimensions pipeline (P stages), data (R replicas), experts (E ranks that share the routed experts); the last
    one counts fastest, so those that talk most are neighbours. share: which of the n_shares parts of a batch this rank
    reads. dense: the group of all ranks that hold this rank's stages; routed: those of them that hold its experts too.
    """

    def __init__(self, config: ModelConfig, pipeline: int, experts: int, device: str = "cpu"):
        world = dist.get_world_size()
        from_first(lambda: check_fit(config, pipeline, experts, world))
        ranks = torch.arange(world).view(pipeline, -1, experts)
        self.mesh = init_device_mesh(device, tuple(ranks.shape), mesh_dim_names=("pipeline", "data", "experts"))
        self.stage, data, expert = self.mesh.get_coordinate()
        self.n_experts, self.n_shares, self.share = experts, world // pipeline, data * experts + expert
        pairs = [sorted({p, pipeline - 1 - p}) for p in range((pipeline + 1) // 2)]  # the two ranks of a DualPipe stage
        self.dense, _ = dist.new_subgroups_by_enumeration([ranks[pair].flatten().tolist() for pair in pairs])
        same_experts = [ranks[pair, :, e].flatten().tolist() for pair in pairs for e in range(experts)]
        self.routed, _ = dist.new_subgroups_by_enumeration(same_experts)


def check_fit(config: ModelConfig, pipeline: int, experts: int, world: int) -> None:
    """ValueError, naming both options and the world size, unless the processes can be arranged so."""
    depth, n_experts = config.num_hidden_layers, config.n_routed_experts
    lengths = [p for p in range(1, depth + 1) if p == 1 or p % 2 == 0]
    if pipeline in lengths and experts > 0 and n_experts % experts == 0 and world % (pipeline * experts) == 0:
        return
    raise ValueError(
        f"--pipeline {pipeline} and --experts {experts} do not fit a world size of {world}: {depth} layers allow a "
        f"pipeline of {', '.join(map(str, lengths))}, {n_experts} experts spread over a divisor of {n_experts}, and "
        "the world size must be a multiple of their product (torchrun --nproc-per-node)"
    )


def deal(windows: Tensor, n_chunks: int, n_shares: int, share: int) -> Tensor:
    """One share of a batch (n, T + 1) as micro-batches (n_chunks, B, T + 1), filled up with sequences of -1."""
    size = -(-len(windows) // (n_chunks * n_shares))
    places = windows.new_full((size * n_chunks * n_shares, windows.shape[1]), -1)
    places[: len(windows)] = windows
    return places.view(size, n_chunks, n_shares, -1)[:, :, share].transpose(0, 1).contiguous()


class TrainingStage(Stage):
    """A stage that trains by this chapter's recipe; sequences of -1 pass through it and count nowhere.

    parts: what this rank adds to the batch's loss, MTP loss and balance loss, unweighted, since `begin`.
    """

    def begin(self, options: TrainOptions, settings: Settings, n_chunks: int) -> None:
        """Before a step: a sequence weighs 1 / batch in the loss, and the pipeline averages over its micro-batches."""
        self.mtp_weight, self.n_chunks = settings.mtp_weight, n_chunks
        self.weight, self.dtype = 1 / settings.batch_size, getattr(torch, options.dtype)
        self.parts = torch.zeros(3, dtype=torch.float64, device=options.device)

    def forward(self, x: Tensor | None, windows: Tensor) -> Tensor:
        self.real = windows[:, 0] >= 0
        with torch.autocast(windows.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = super().forward(x, windows.clamp(min=0))
        self.routings = [keep_sequences(routing, self.real) for routing in self.routings]
        self.balancer.observe(self.routings)
        return out

    def loss(self, h: Tensor, windows: Tensor) -> Tensor:
        """`training_losses` of the real sequences; h (B, T, D) after the norm."""
        real, scale = self.real, self.weight / h.shape[1]
        loss = head_loss(h[real], self.lm_head, windows[real, 1:], self.dtype) * scale
        depths = []
        for k, i in enumerate(self.mtp_idx, start=1):
            layer, (given, label) = self.model.layers[str(i)], depth_tokens(windows, k)  # (B, T-k)
            h = layer.shared_head.norm(layer(h[:, : given.shape[1]], given, self.rope(0, given.shape[1])))
            depths.append(head_loss(h[real], self.lm_head, label[real], self.dtype) * scale)
        mtp = torch.stack(depths).mean() if depths else torch.zeros_like(loss)
        self.parts[:2] += torch.stack((loss, mtp)).detach()
        return (loss + self.mtp_weight * mtp) * self.n_chunks

    def balance_loss(self, n_sequences: int) -> Tensor | None:
        """That of the real sequences, weighed like their other losses."""
        n_real = int(self.real.sum())
        mean = super().balance_loss(n_real) if n_real else None
        if mean is None:
            return None
        loss = mean * n_real * self.weight
        self.parts[2] += loss.detach() / self.alpha
        return loss * self.n_chunks


def keep_sequences(routing: Routing, real: Tensor) -> Routing:
    """The routing of the tokens whose sequences are real; real: (B,) bool, B sequences of equal length."""
    mask = real.repeat_interleave(len(routing.indices) // len(real))
    return Routing(*(part[mask] for part in routing))


def shard_moments(parameters: dict[str, nn.Parameter], options: TrainOptions, group) -> ZeroRedundancyOptimizer:
    """The recipe's AdamW, each tensor's moments on one rank of the group that holds the tensor (ZeRO-1)."""
    plain = make_optimizer(nn.ParameterList(parameters.values()), options)
    groups = [{key: g[key] for key in ("params", "weight_decay")} for g in plain.param_groups]
    settings = {key: plain.defaults[key] for key in ("lr", "betas", "fused")}
    optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, process_group=group, **settings)
    for p in owned(optimizer):
        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.optim.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def owned(optimizer: ZeroRedundancyOptimizer) -> list[nn.Parameter]:
    """The parameters whose moments are on this rank."""
    return [p for group in optimizer.optim.param_groups for p in group["params"]]


@dataclass
class Member:
    """One process of a run: its place, its stages, and everything that its next step reads or changes.

    dense, routed: its parameters by name, apart by the groups of `grid` that hold copies; optimizers: one for each.
    run: on rank 0, which reads the text and publishes, the run without weights; None elsewhere.
    """

    options: TrainOptions
    out: Path
    grid: Grid
    run: Run | None
    stream: Stream
    valid: Tensor
    bytes_per_token: float
    pipeline: Pipeline
    step: int = 0
    stages: list[TrainingStage] = field(init=False)
    dense: dict[str, nn.Parameter] = field(init=False)
    routed: dict[str, nn.Parameter] = field(init=False)
    optimizers: list[ZeroRedundancyOptimizer] = field(init=False)
    average: WeightAverage = field(init=False)

    def __post_init__(self):
        named = sorted(self.pipeline.parameters.items())
        self.dense = {name: p for name, p in named if ".experts." not in name}
        self.routed = {name: p for name, p in named if ".experts." in name}
        self.optimizers = [shard_moments(part, self.options, group) for part, group in self.copies()]
        self.stages = sorted(self.pipeline.stages, key=lambda stage: stage.layer_idx.start)
        for stage in self.stages:
            stage.balancer = BiasBalancer(stage, self.options.gamma, self.grid.dense)
        self.average = WeightAverage(nn.ModuleList(self.stages), self.options.ema_horizon * self.options.steps)

    def copies(self) -> list[tuple[dict[str, nn.Parameter], dist.ProcessGroup]]:
        """This rank's parameters with the group of all ranks that hold the same tensors."""
        pairs = ((self.dense, self.grid.dense), (self.routed, self.grid.routed))
        return [(parameters, group) for parameters, group in pairs if parameters]


def assemble(
    config: ModelConfig, make: Callable[[], Run], out: str | os.PathLike, pipeline: int, experts: int, device: str
) -> Member:
    """This process's part of the run that `make` gives on rank 0, which reads the text and draws the weights.

    config, device: of that run. Errors of rank 0 are raised on every rank.
    """
    grid, runs = Grid(config, pipeline, experts, device), []

    def start():
        runs.append(make())
        return runs[0].options, runs[0].data.train, runs[0].data.valid, runs[0].data.bytes_per_token

    options, train, valid, bytes_per_token = from_first(start)
    model = runs[0].model if runs else DeepSeekV3(config).to(device)
    for tensor in unique_tensors(model).values():
        dist.broadcast(tensor.detach(), src=0)
    if experts > 1:
        spread_experts(model, grid.mesh["experts"])
    schedule = dualpipe_schedule(pipeline, 2 * pipeline) if pipeline > 1 else one_f_one_b_schedule(1, 1)
    stages = split_into_stages(model, pipeline, options.mtp_weight, options.alpha, TrainingStage)
    mine = Pipeline(stages_of_rank(stages, schedule, grid.stage), schedule, grid.mesh.get_group("pipeline"))
    stream = Stream(train, options.seed)
    if runs:  # drawn to be sent out: from here on rank 0 holds its own stages like all others
        runs[0].model = runs[0].optimizer = runs[0].balancer = runs[0].average = None
    return Member(options, Path(out), grid, runs[0] if runs else None, stream, valid, bytes_per_token, mine)
