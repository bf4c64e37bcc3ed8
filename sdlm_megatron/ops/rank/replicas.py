"""Data-parallel ranks hold the same weights, bit for bit: a difference is a broken device or a defect, never noise."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from sdlm_megatron.errors import ReplicaError
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.groups import Groups

PIECE = 1 << 24
"""Elements that are looked at together: int64 takes 4 times the memory of bf16."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(engine: Engine, hosts: list[str], step: int) -> None:
    """Compares the weights over data parallelism, and their fp32 masters where these are replicated too.

    All processes call it. Raises ReplicaError on all of them, naming parameters, ranks and hosts; `hosts` is by rank.
    """
    engine.gather_weights()
    groups = engine.groups
    named = list(_replicated(engine))
    mine = torch.stack([checksum(tensor) for _, tensor in named])
    group = groups.collection.dp_cp
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    sums = torch.stack(everyone).cpu()
    differing = _differing([name for name, _ in named], sums, dist.get_process_group_ranks(group))
    found = sorted({text for texts in groups.gather(differing) for text in texts})
    if found:
        raise _error(found, hosts, step, groups)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 scalar on the device: a sum over the bits of all elements, weighted by their places, modulo 2**64."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    for start, piece in enumerate(bits.split(PIECE)):
        places = torch.arange(len(piece), device=tensor.device, dtype=torch.int64) + start * PIECE
        total += (piece.long() * (places * 2 + 1) * 0x1E3779B97F4A7C15).sum()  # odd weights: no bit is lost
    return total


def _replicated(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    masters = not engine.config.parallel.distributed_optimizer
    for chunk, module in enumerate(engine.modules):
        for name, parameter in module.named_parameters():
            full = f"chunk {chunk}: {name}" if len(engine.modules) > 1 else name
            yield full, parameter
            master: Any = getattr(parameter, "main_param", None)
            if masters and master is not None:
                yield f"fp32 master of {full}", master


def _differing(names: list[str], sums: torch.Tensor, ranks: list[int]) -> list[tuple[tuple[int, ...], str]]:
    """The ranks of this data-parallel group in the minority, with the parameter; `sums` is (ranks, parameters)."""
    found = []
    for name, column in zip(names, sums.T.tolist(), strict=True):
        if len(set(column)) > 1:
            most = max(set(column), key=column.count)
            odd = tuple(rank for rank, value in zip(ranks, column, strict=True) if value != most)
            majority = column.count(most) * 2 > len(column)
            found.append((odd if majority else tuple(ranks), name))
    return found


def _error(found: list[tuple[tuple[int, ...], str]], hosts: list[str], step: int, groups: Groups) -> ReplicaError:
    names = [name for _, name in found]
    ranks = sorted({rank for odd, _ in found for rank in odd})
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ReplicaError(
        f"before step {step}: data-parallel ranks do not hold the same weights any more: {shown}",
        ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
        + (" differ from the others" if groups.dp_size > 2 else " differ from each other"),
        "start again from the last checkpoint without these hosts: memory or a device of theirs may be broken",
        ranks,
    )
