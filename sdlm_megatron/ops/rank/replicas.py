"""Check that data-parallel ranks hold the same weights, bit for bit. A difference is a broken device or a defect."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from sdlm_megatron.errors import ReplicaError
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.groups import Groups

CHUNK = 1 << 24  # elements per chunk: int64 takes four times the memory of bf16
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(engine: Engine, hosts: list[str], step: int) -> None:
    """Compares weights over data parallelism, and their fp32 masters where these are replicated too.

    Called by all processes; `hosts` is indexed by rank.

    Raises:
        ReplicaError: on all processes, with the differing parameters, ranks and hosts.
    """
    engine.gather_weights()
    groups = engine.groups
    named = list(_replicated(engine))
    local_sums = torch.stack([checksum(tensor) for _, tensor in named])
    group = groups.collection.dp_cp
    gathered = [torch.empty_like(local_sums) for _ in range(group.size())]
    dist.all_gather(gathered, local_sums, group=group)
    sums = torch.stack(gathered).cpu()
    differing = _differing([name for name, _ in named], sums, dist.get_process_group_ranks(group))
    differences = sorted({(tuple(ranks), name) for part in groups.gather(differing) for ranks, name in part})
    if differences:
        raise _error(differences, hosts, step, groups)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 scalar on the device: a sum over the bits of all elements, weighted by their positions, modulo 2**64."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    for start, chunk in enumerate(bits.split(CHUNK)):
        positions = torch.arange(len(chunk), device=tensor.device, dtype=torch.int64) + start * CHUNK
        # Odd weights are invertible modulo 2**64: a change of one element always changes the sum.
        total += (chunk.long() * (positions * 2 + 1) * 0x1E3779B97F4A7C15).sum()
    return total


def _replicated(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    # a distributed optimizer has each master once: there is nothing to compare
    masters = not engine.config.parallel.distributed_optimizer
    for chunk, module in enumerate(engine.modules):
        for name, parameter in module.named_parameters():
            full = f"chunk {chunk}: {name}" if len(engine.modules) > 1 else name
            yield full, parameter
            master: Any = getattr(parameter, "main_param", None)
            if masters and master is not None:
                yield f"fp32 master of {full}", master


def _differing(names: list[str], sums: torch.Tensor, ranks: list[int]) -> list[tuple[tuple[int, ...], str]]:
    """Minority of the ranks of this data-parallel group for each parameter that differs; all ranks without a majority.

    Args:
        names: parameters.
        sums: checksums (ranks, parameters).
        ranks: global ranks.
    """
    differing = []
    for name, column in zip(names, sums.T.tolist(), strict=True):
        if len(set(column)) > 1:
            most = max(set(column), key=column.count)
            minority = tuple(rank for rank, value in zip(ranks, column, strict=True) if value != most)
            majority = column.count(most) * 2 > len(column)
            differing.append((minority if majority else tuple(ranks), name))
    return differing


def _error(differences: list[tuple[tuple[int, ...], str]], hosts: list[str], step: int, groups: Groups) -> ReplicaError:
    names = [name for _, name in differences]
    ranks = sorted({rank for minority, _ in differences for rank in minority})
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ReplicaError(
        f"before step {step}: data-parallel ranks hold different weights: {shown}",
        ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
        + (" differ from the others" if groups.dp_cp_size > 2 else " differ from each other"),
        "restart from the last checkpoint without these hosts: their memory or a device may be broken",
        ranks,
    )
