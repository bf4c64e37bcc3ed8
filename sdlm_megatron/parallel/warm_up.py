"""What is done once before step 1, so that its time is a step's time and what cannot run fails early."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.model.attention.choice import Heads
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.parallel.groups import Groups


def warm_up(batches: Sequence[MicroBatch], heads: Heads, optimizer: MegatronOptimizer, groups: Groups) -> str:
    """Runs attention over the rows of a step, and each group's first communication; says what it did.

    Compiled kernels and cuDNN's plans depend on the shapes of the rows, NCCL connects a group when it is first used.
    Neither weights nor the states of the random number generators change. All processes call it.
    """
    started = time.perf_counter()
    devices = [groups.device] if groups.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # a fused kernel may advance the generator, though nothing is dropped
        rows = [b.attention for b in batches if isinstance(b.attention, RowAttention)]
        for row in rows:
            attend(row, batches[0].tokens.shape[1], heads, groups.device)
    if devices:
        torch.cuda.synchronize()
    attended = time.perf_counter()
    connected = connect(optimizer, groups)
    if devices:
        torch.cuda.synchronize()
    done = time.perf_counter()
    return (
        f"warm-up: attention forward and backward over {len(rows)} rows {attended - started:.1f} s, "
        f"first communication of {connected} groups {done - attended:.1f} s"
    )


def attend(row: RowAttention, length: int, heads: Heads, device: torch.device) -> None:
    """Forward and backward over one row, with q, k and v laid out in memory as the layers hand them over.

    v is a part of the QKV projection's output, q and k are new tensors after RoPE: a compiled kernel made for other
    strides would be compiled again in step 1.
    """
    groups = heads.heads // heads.kv_heads
    mixed = torch.zeros(
        length, 1, heads.kv_heads, (groups + 2) * heads.dim, dtype=heads.dtype, device=device, requires_grad=True
    )
    query, key, value = mixed.split([groups * heads.dim, heads.dim, heads.dim], dim=3)
    query = query.reshape(length, 1, heads.heads, heads.dim) * 1.0
    key = key * 1.0
    out = row(query[:, 0], key[:, 0], value[:, 0], heads.dim**-0.5)
    out.reshape(length, 1, -1).backward(torch.zeros(length, 1, heads.heads * heads.dim, dtype=out.dtype, device=device))


def connect(optimizer: MegatronOptimizer, groups: Groups) -> int:
    """One small all-reduce in each group that a step uses; returns how many of them have more than one member."""
    found = groups.collection
    # The same order everywhere, so that no two processes wait for each other in different groups.
    used = [dist.group.WORLD, found.tp, found.pp, found.dp_cp, found.embd, optimizer.get_grad_stats_parallel_group()]
    connected = 0
    for i, group in enumerate(used):
        # a process outside of a group has None or a number for it
        if isinstance(group, dist.ProcessGroup) and group.size() > 1 and group not in used[:i]:
            dist.all_reduce(torch.zeros(1, device=groups.device), group=group)
            connected += 1
    return connected
