"""Instruments of a rank on the null GPU: launches and waits, host time, and a lower bound of the GPU's time.

The bound is made of memory traffic and FLOPs, operator by operator. Seen are torch's operators; TransformerEngine's and
Triton's kernels are not, and attention counts as nothing.
"""

import ctypes
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdlm_megatron.planner.assumptions import Assumptions, device_of

LOOP = 1_000_000
"""Rounds of the Python loop that host time is compared with."""
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
"""Matrix products: place of their first factor among the arguments."""
_FILLS = {"zero_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like", "fill_", "arange"}
_GATHERS = {"index", "index_select", "embedding", "gather"}
_MOVES_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "set_", "detach"}
_TF32 = 0.068  # share of the bf16 peak that fp32 products reach without TF32


class NullDevice:
    """Counters of the null GPU in this process (runtime.c)."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        for name in ("launches", "products", "copies", "waits", "pinned"):
            getattr(library, f"nullgpu_{name}").restype = ctypes.c_long
        self._library = library
        self._type = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

    def __getattr__(self, name: str) -> int:
        return getattr(self._library, f"nullgpu_{name}")()

    def reset(self) -> None:
        self._library.nullgpu_reset()

    def write_kernels(self, path: Path) -> None:
        """Launches of each kernel since the last reset, one line each."""
        self._library.nullgpu_write_kernels(str(path).encode())

    @contextmanager
    def named_waits(self) -> Iterator[Counter]:
        """Counts the calls in which the host waits for the device, by call and the lines that made it."""
        facts: Counter = Counter()

        def note(call: bytes) -> None:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            places = [f"{_short(f.filename)}:{f.lineno} {f.name}" for f in reversed(frames)]
            facts[f"{call.decode()} in {' < '.join(places[:4])}"] += 1

        hook = self._type(note)
        self._library.nullgpu_set_wait_hook(hook)
        try:
            yield facts
        finally:
            self._library.nullgpu_set_wait_hook(None)


def _short(file: str) -> str:
    return file.partition("/site-packages/")[2] or os.path.relpath(file)


def loop_seconds() -> float:
    """CPU seconds of a loop of LOOP additions in Python, the unit of host time."""
    started, total = time.process_time(), 0
    for i in range(LOOP):
        total += i
    return time.process_time() - started


class Roof(TorchDispatchMode):
    """Seconds, bytes and FLOPs of the operators that run inside, by name and dtype."""

    def __init__(self) -> None:
        super().__init__()
        assumed = Assumptions()
        device = device_of("h100", assumed)
        self._bandwidth = device.bandwidth * assumed.memory_efficiency
        self._flops, self._overhead = device.peak * assumed.gemm_efficiency, assumed.kernel_overhead_us * 1e-6
        self.count: Counter[str] = Counter()
        self.bytes: Any = Counter()
        self.seconds: Any = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        both = (tree_leaves((args, kwargs)), tree_leaves(out))
        before, after = ([x for x in leaves if isinstance(x, torch.Tensor) and x.is_cuda] for leaves in both)
        views = {x.untyped_storage()._cdata for x in before}
        if space != "aten" or name in _MOVES_NOTHING or not (before or after) or "flash" in name:
            return out
        if after and not func._schema.is_mutable and all(x.untyped_storage()._cdata in views for x in after):
            return out  # a view
        moved, flops, peak = float(_bytes(name, before, after)), 0.0, self._flops
        if name in _PRODUCTS:
            a, b = before[_PRODUCTS[name] : _PRODUCTS[name] + 2]
            flops = 2.0 * a.numel() * b.shape[-1]
            peak *= _TF32 if a.dtype is torch.float32 else 1
        key = f"{name} {str((before or after)[0].dtype).removeprefix('torch.')}"
        self.count[key] += 1
        self.bytes[key] += moved
        self.seconds[key] += max(moved / self._bandwidth, flops / peak, self._overhead)
        return out

    def facts(self, most: int = 12) -> dict[str, Any]:
        """Total in seconds, number of operators, and the most expensive ones: seconds, number, bytes."""
        top = {k: [s, self.count[k], self.bytes[k]] for k, s in self.seconds.most_common(most)}
        return {"seconds": self.seconds.total(), "operators": self.count.total(), "most": top}


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; what is expanded counts once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


def _bytes(name: str, before: list[torch.Tensor], after: list[torch.Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    if name in _FILLS:
        return sum(map(_size, after or before[:1]))
    if name in _GATHERS:
        return 2 * sum(map(_size, after))
    if name in ("index_put_", "index_put"):
        return 2 * _size(before[-1])
    if name == "copy_":
        return sum(map(_size, before[:2]))
    return sum(map(_size, before)) + sum(map(_size, after))
