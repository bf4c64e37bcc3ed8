"""Time, memory, the parts of a step, and the result tables of the benchmarks.

Importing it needs neither Megatron nor transformers, so the process that runs the reference's model uses it too.
"""

import ctypes
import json
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from sdlm_megatron.training.trace import summarize


class LiveTensors(TorchDispatchMode):
    """Peak bytes of the tensors created inside it, for devices whose allocator keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        # Views share a storage, which must be counted once.
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            # The finalizer runs when Python drops the storage, which is when the allocator frees it.
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call on top of what was allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveTensors() as live:
        function()
    return live.peak


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a call, including the GPU work that it queues."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock, cpu = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - cpu


def median_ms(function: Callable[[], object], runs: int, device: torch.device) -> float:
    """Median wall time of `runs` calls after three warm-up calls."""
    return 1e3 * statistics.median([timed(function, device)[0] for _ in range(runs + 3)][3:])


def matmul_flops(dtype: torch.dtype, device: torch.device, runs: int = 5) -> float:
    """FLOP/s of the fastest of `runs` large matrix products: an upper bound for the linear layers on this machine."""
    # Large enough to reach the peak of the device, small enough to take under a second.
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device)[0] for _ in range(runs))


def rehearsal() -> bool:
    """Whether this process runs on a CUDA library that computes nothing, so that no figure means anything."""
    return hasattr(ctypes.CDLL(None), "nullgpu_reset")  # dev/nullgpu/runtime.c


def host_seconds(step: Callable[[], object], device: torch.device) -> float:
    """CPU seconds in which the host queues a call, without waiting for the GPU's results."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.process_time()
    step()
    return time.process_time() - started


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
"""Beginnings of the names of the calls that start a kernel."""


def parts_of(step: Callable[[], object], device: torch.device) -> tuple[dict[str, float], int]:
    """Seconds of each part of one profiled step, as sdlm_megatron.training.trace attributes them; launched kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    # summarize() looks for the steps that torch.profiler names ProfilerStep#N when it has a schedule.
    with profile(activities=activities) as profiler, record_function("ProfilerStep#1"):
        timed(step, device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    launches = sum(str(event.get("name", "")).startswith(LAUNCHES) for event in events)
    return {part: ms / 1e3 for part, ms in summarize(events).parts.items()}, launches


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints an aligned Markdown table, ready to be pasted into docs/benchmarks.md."""
    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |", flush=True)
