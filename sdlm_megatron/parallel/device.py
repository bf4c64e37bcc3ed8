"""Device side of a step: warm-up before the first one, timing without host waits, memory in use."""

import resource
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.model.attention.choice import Heads
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.parallel.groups import Groups


class StepClock:
    """Durations of named stretches of a step, by marks in the device's queue (on a CPU: by wall-clock time).

    On a GPU, a stretch is the time the device takes from one mark to the next, including any wait for the host.

    The passes up to the gradient reduction show which process is slow: most waiting for each other comes after them.
    But tensor and pipeline ranks wait inside them, so a slow one makes its whole model copy look slow, and with
    overlap_param_gather data-parallel ranks wait in the first micro-batch's forward pass: the rest shows a slow one.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Starts the stretch `name`, which ends at the next mark; an empty name is not counted."""
        if not self._cuda:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def read(self) -> dict[str, float]:
        """Seconds by name since the previous call, summed over steps. Waits for the device."""
        marks, self._marks = self._marks, []
        seconds: dict[str, float] = {}
        for (name, begin), (_, end) in pairwise(marks):
            if name:
                seconds[name] = seconds.get(name, 0.0) + self._between(begin, end)
        return seconds

    def last(self, name: str) -> Callable[[], float]:
        """A function that returns the seconds of the newest stretch `name`; calling it waits for the device."""
        at = next(i for i in range(len(self._marks) - 2, -1, -1) if self._marks[i][0] == name)
        begin, end = self._marks[at][1], self._marks[at + 1][1]
        return lambda: self._between(begin, end)

    def _between(self, begin: Any, end: Any) -> float:
        if not self._cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def warm_up(batches: Sequence[MicroBatch], heads: Heads, optimizer: MegatronOptimizer, groups: Groups) -> str:
    """Warms up attention kernels and NCCL before step 1; all processes call it. Returns a line for the log.

    Compiled kernels and cuDNN's plans depend on the shapes of the rows, and NCCL connects a group on first use. Doing
    both here makes the timing of step 1 representative and unsupported kernels fail early. Neither weights nor the
    states of random number generators change.
    """
    started = time.perf_counter()
    devices = [groups.device] if groups.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # a fused kernel may advance the generator even without dropout
        rows = [b.attention for b in batches if isinstance(b.attention, RowAttention)]
        for row in rows:
            attend_once(row, batches[0].tokens.shape[1], heads, groups.device)
    if devices:
        torch.cuda.synchronize()
    attended = time.perf_counter()
    connected = _connect(optimizer, groups)
    if devices:
        torch.cuda.synchronize()
    done = time.perf_counter()
    return (
        f"warm-up: attention forward and backward over {len(rows)} rows {attended - started:.1f} s, "
        f"first communication of {connected} groups {done - attended:.1f} s"
    )


def attend_once(row: RowAttention, length: int, heads: Heads, device: torch.device) -> None:
    """Forward and backward over one row, with q, k and v in the memory layout that the layers produce."""
    # In a layer, v is a view of the QKV projection's output, while q and k are new tensors after RoPE. A kernel that
    # was compiled for other strides would be compiled again in step 1.
    groups = heads.heads // heads.kv_heads
    mixed = torch.zeros(
        length, 1, heads.kv_heads, (groups + 2) * heads.dim, dtype=heads.dtype, device=device, requires_grad=True
    )
    query, key, value = mixed.split([groups * heads.dim, heads.dim, heads.dim], dim=3)
    query = query.reshape(length, 1, heads.heads, heads.dim) * 1.0
    key = key * 1.0
    out = row(query[:, 0], key[:, 0], value[:, 0], heads.dim**-0.5)
    out.reshape(length, 1, -1).backward(torch.zeros(length, 1, heads.heads * heads.dim, dtype=out.dtype, device=device))


def _connect(optimizer: MegatronOptimizer, groups: Groups) -> int:
    """A small all-reduce in each group that a step uses; returns the number of groups with more than one member."""
    collection = groups.collection
    # in the same order on all processes, or two of them could wait for each other in different groups
    used = [dist.group.WORLD, collection.tp, collection.pp, collection.cp, collection.dp_cp, collection.embd]
    used.append(optimizer.get_grad_stats_parallel_group())
    connected = 0
    for i, group in enumerate(used):
        # a process outside of a group has None or an integer for it
        if isinstance(group, dist.ProcessGroup) and group.size() > 1 and group not in used[:i]:
            dist.all_reduce(torch.zeros(1, device=groups.device), group=group)
            connected += 1
    return connected


def device_memory_gb(device: torch.device) -> float:
    """Memory of this process now, GB: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def device_peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process, GB: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux reports KiB
