"""Time, memory and the split of a step by part. Needs torch only, so that it also runs beside the reference's model."""

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

LINEAR, ATTENTION, HEAD = "linear layers", "attention", "head and loss"
SMALL = "norms, RoPE, activations, embedding"
BUFFERS = "gradient buffers"
OPTIMIZER, OTHER = "optimizer", "other"
PARTS = (LINEAR, ATTENTION, HEAD, SMALL, BUFFERS, OTHER, OPTIMIZER)
_RANGE = "part: "
_BACKWARD = "autograd::engine::evaluate_function: "


class LiveTensors(TorchDispatchMode):
    """Peak bytes of the tensors that operations made, for devices whose allocator does not count."""

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
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most memory that `function` held at once on top of what was there."""
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
    """Seconds by the clock and of this process's CPU time that `function` takes, work queued on a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock, cpu = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - cpu


def matmul_flops(dtype: torch.dtype, device: torch.device, runs: int = 5) -> float:
    """FLOP/s of the fastest of some large matrix products: what the linear layers could reach here."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device)[0] for _ in range(runs))


class Ranges:
    """Marks which part of a step a module or a function belongs to, while a profile is taken.

    The innermost mark counts. `split` gives backward operations to the part whose forward operation they belong to.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def module(self, module: torch.nn.Module, part: str) -> None:
        """The forward pass of `module` is `part`."""
        open_ranges: list[record_function] = []

        def enter(*_: object) -> None:
            open_ranges.append(record_function(_RANGE + part))
            open_ranges[-1].__enter__()

        def leave(*_: object) -> None:
            open_ranges.pop().__exit__(None, None, None)

        self._undo += [module.register_forward_pre_hook(enter).remove, module.register_forward_hook(leave).remove]

    def function(self, owner: Any, name: str, part: str) -> None:
        """Calls of `owner.name` are `part`."""
        original, own = getattr(owner, name), name in vars(owner)

        def marked(*args: Any, **kwargs: Any) -> Any:
            with record_function(_RANGE + part):
                return original(*args, **kwargs)

        setattr(owner, name, marked)
        self._undo.append(lambda: setattr(owner, name, original) if own else delattr(owner, name))

    def remove(self) -> None:
        """Takes all marks away."""
        while self._undo:
            self._undo.pop()()

    def split(self, step: Callable[[], object], device: torch.device) -> dict[str, float]:
        """Seconds of each part in one profiled call of `step`, then all marks are taken away.

        On a CPU the parts add up to the call; on a GPU they are kernel times, and OTHER has the time without a kernel.
        """
        cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        try:
            with profile(activities=activities) as found, record_function(_RANGE + OTHER):
                clock, _ = timed(step, device)
        finally:
            self.remove()
        parts = by_part(found.events() or (), cuda=cuda)
        if cuda:
            parts[OTHER] += max(0.0, clock - sum(parts.values()))
        return parts


def by_part(events: Iterable[FunctionEvent], *, cuda: bool) -> dict[str, float]:
    """Seconds of each part: own times of a profile's events, summed by the part they belong to."""
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    forward: dict[int, FunctionEvent] = {}
    for e in sorted(on_host, key=lambda e: e.time_range.start):
        if e.sequence_nr >= 0 and not _in_backward(e):
            forward[e.sequence_nr] = e  # the last operation with a number is the one that made the backward node
    parts = dict.fromkeys(PARTS, 0.0)
    for e in on_host:
        own = e.self_device_time_total if cuda else e.self_cpu_time_total
        parts[_part(e, forward)] += own / 1e6
    return parts


def _in_backward(event: FunctionEvent) -> bool:
    """True for an operation of the backward pass; one that a recomputation runs again is marked and is not one."""
    at: FunctionEvent | None = event
    while at is not None and not at.name.startswith(_RANGE):
        if at.name.startswith(_BACKWARD):
            return True
        at = at.cpu_parent
    return False


def _part(event: FunctionEvent, forward: dict[int, FunctionEvent]) -> str:
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith(_RANGE):
            return at.name.removeprefix(_RANGE)
        if at.name.startswith(_BACKWARD):
            if "AccumulateGrad" in at.name:
                return BUFFERS
            origin = forward.get(at.sequence_nr)
            return OTHER if origin is None else _part(origin, forward)
        at = at.cpu_parent
    return OTHER
