"""Placing experts and their replicas on GPUs so that all carry alike: packing, replication, two policies.

Generated from chapters/09_expert_parallel.ipynb; edit the chapter, not this file.
"""

import torch
from torch import Tensor

# Who waits for whom?


def balanced_packing(weights: Tensor, n_packs: int) -> Tensor:
    """Pack n items into packs of n / n_packs: heaviest first, each into the lightest pack with room.

    weights: (n,) -> (n_packs, n / n_packs) numbers of the items. One item a pack: all stay where they are.
    """
    n = len(weights)
    if n_packs < 1 or n % n_packs:
        raise ValueError(f"{n} items do not make {n_packs} packs of equal size")
    size = n // n_packs
    if size == 1:
        return torch.arange(n).unsqueeze(1)
    packs, total = [[] for _ in range(n_packs)], [0.0] * n_packs
    for item in weights.argsort(descending=True, stable=True).tolist():
        lightest = min((p for p in range(n_packs) if len(packs[p]) < size), key=total.__getitem__)
        packs[lightest].append(item)
        total[lightest] += weights[item].item()
    return torch.tensor(packs)


def replicate_experts(load: Tensor, n_replicas: int) -> tuple[Tensor, Tensor]:
    """Give each further replica to the expert whose replicas carry most: (E,) -> experts (R,), counts (E,)."""
    if n_replicas < len(load):
        raise ValueError(f"{n_replicas=} leaves some of {len(load)} experts without a place")
    replicas, count = list(range(len(load))), torch.ones(len(load), dtype=torch.long)
    while len(replicas) < n_replicas:
        busiest = int((load / count).argmax())
        replicas.append(busiest)
        count[busiest] += 1
    return torch.tensor(replicas), count


def place_layer(load: Tensor, n_replicas: int, n_groups: int, n_nodes: int, n_gpus: int) -> Tensor:
    """Hierarchical placement of one layer: groups to nodes, replicas within a node, replicas to its GPUs.

    load: (E,) -> (n_replicas,) the expert in each place; GPU g has places g * n_replicas / n_gpus and on.
    """
    experts, places = torch.arange(len(load)).view(n_groups, -1), []
    for groups in balanced_packing(load.view(n_groups, -1).sum(-1), n_nodes):
        members = experts[groups].flatten()  # (E / n_nodes,)
        replicas, count = replicate_experts(load[members], n_replicas // n_nodes)
        share = (load[members] / count)[replicas]
        places.append(members[replicas[balanced_packing(share, n_gpus // n_nodes).flatten()]])
    return torch.cat(places)


def invert_placement(physical_to_logical: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """(L, R) -> each expert's places, rising, padded with -1 (L, E, most replicas), and how many (L, E)."""
    count = torch.stack([torch.bincount(row, minlength=n_experts) for row in physical_to_logical])
    places = torch.full((*count.shape, int(count.max())), -1)
    for layer, row in enumerate(physical_to_logical):
        for expert in range(n_experts):
            places[layer, expert, : count[layer, expert]] = (row == expert).nonzero().flatten()
    return places, count


def rebalance_experts(
    load: Tensor, n_replicas: int, n_groups: int, n_nodes: int, n_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which expert stands in which place, so that the GPUs carry alike (DeepSeek's EPLB; report section 3.4).

    load: (L, E) choices that fell on each expert -> physical_to_logical (L, R), logical_to_physical (L, E, X) padded
    with -1, replica_count (L, E). Hierarchical if n_nodes divides n_groups: a group stays on one node. Else global.
    ValueError if sizes do not divide, or a load is negative or not finite.
    """
    check_sizes(load, n_replicas, n_groups, n_nodes, n_gpus)
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    layers = [place_layer(layer, n_replicas, n_groups, n_nodes, n_gpus) for layer in load.cpu().float()]
    return (physical := torch.stack(layers), *invert_placement(physical, load.shape[1]))


def check_sizes(load: Tensor, n_replicas: int, n_groups: int, n_nodes: int, n_gpus: int) -> None:
    """Refuse what cannot be placed, naming the number and what would do."""
    if load.ndim != 2 or not load.numel() or not (torch.isfinite(load) & (load >= 0)).all():
        raise ValueError(f"load {tuple(load.shape)} must be (layers, experts), finite and not negative")
    if min(n_groups, n_nodes, n_gpus) < 1:
        raise ValueError(f"{n_groups=}, {n_nodes=} and {n_gpus=} must be 1 or more")
    n_experts = load.shape[1]
    if n_replicas < n_experts:
        raise ValueError(f"{n_replicas=} leaves some of {n_experts} experts without a place")
    wholes = (("n_replicas", n_replicas, "n_gpus", n_gpus), ("n_gpus", n_gpus, "n_nodes", n_nodes))
    for name, whole, part_name, part in (*wholes, ("n_experts", n_experts, "n_groups", n_groups)):
        if whole % part:
            raise ValueError(f"{name}={whole} must be a multiple of {part_name}={part}")


def gpu_load(load: Tensor, physical_to_logical: Tensor, n_gpus: int) -> Tensor:
    """What each GPU carries when the replicas of an expert share its load alike: (L, E), (L, R) -> (L, n_gpus)."""
    count = invert_placement(physical_to_logical, load.shape[1])[1]
    return (load / count).gather(1, physical_to_logical).unflatten(1, (n_gpus, -1)).sum(-1)


def peak_over_mean(carried: Tensor) -> Tensor:
    """Largest over mean load of the GPUs, 1 at best: (L, n_gpus) -> (L,). All others wait for the largest."""
    return carried.amax(1) / carried.mean(1)


# What do real routers need?


def choose_replicas(indices: Tensor, logical_to_physical: Tensor, replica_count: Tensor) -> Tensor:
    """Send the choices of each expert to its replicas in turn: (N, K), one layer's (E, X) and (E,) -> places (N, K)."""
    expert, order = indices.flatten().sort(stable=True)
    start = torch.searchsorted(expert, expert)  # where the run of this expert begins
    turn = (torch.arange(len(expert)) - start) % replica_count[expert]
    places = torch.empty_like(expert).scatter_(0, order, logical_to_physical[expert, turn])
    return places.view_as(indices)
