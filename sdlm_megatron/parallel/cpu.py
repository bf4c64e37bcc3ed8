"""Megatron-Core on a machine without a GPU: torch.cuda calls that have a CPU meaning are redirected.

Megatron-Core allocates on "cuda" and asks for streams and device numbers whether or not it needs them. `install`
gives those calls their CPU meaning, so that the same code runs over gloo. It must run before megatron is imported,
does nothing where a GPU is present (but hide packages that do not work), and never changes `torch.cuda.is_available`.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sdlm_megatron.model.packages import find_packages

_installed = False
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_FIRST_STEPS, _GROWTH = 3, 1.25
"""After so many steps the optimizer's state and all usual shapes were there; growth beyond is rows of other shapes."""


class _CudaToCpu(TorchFunctionMode):
    """Rewrites `device="cuda…"` to the CPU in every torch call of this thread."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if (isinstance(device, int) and not isinstance(device, bool)) or (
            device is not None and torch.device(device).type == "cuda"
        ):  # a device number always means cuda
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):  # optimizers compare this string
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class _Nothing:
    """Stands for a stream or an event: everything on a CPU is already ordered."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def install() -> bool:
    """Redirects CUDA calls to the CPU if there is no GPU. Returns True where the redirect is in force."""
    global _installed
    find_packages()
    if torch.cuda.is_available() or _installed:
        return _installed
    _installed = True
    _CudaToCpu().__enter__()
    nothing = _Nothing()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream = cuda.Event = _Nothing
    cuda.current_stream = cuda.default_stream = lambda *a, **k: nothing
    cuda.stream = lambda *a, **k: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    for name in ("synchronize", "set_device", "manual_seed", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *a, **k: None)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *a, **k: None
    # advice about CUDA's queues; on a GPU it stays visible
    warnings.filterwarnings("ignore", message="When using sequence parallelism it is recommended to set")
    _keep_freed_memory()
    with _without_compile():
        _redirect_megatron_rng()
    return True


def _keep_freed_memory() -> None:
    """Tensors in memory that the process has already, as a GPU's allocator does it.

    glibc gives every large block back to the system when it is freed, and the next one of that size is mapped and
    cleared anew, page by page: 40 % of a bf16 step with a large vocabulary (docs/benchmarks.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


class HeapLimit:
    """Gives freed memory back after all, when the process keeps too much of it.

    Now and then a step's large blocks find their holes taken by small ones and are made anew at every step: 0.5 GB
    a step was seen, until the system killed the run.
    """

    def __init__(self, resident: Callable[[], int]) -> None:
        self._resident, self._steps, self._limit = resident, 0, 0.0

    def after_step(self) -> None:
        """Call after each step."""
        self._steps += 1
        if self._steps == _FIRST_STEPS:
            self._limit = _GROWTH * self._resident()
        elif self._steps > _FIRST_STEPS and self._resident() > self._limit:
            _trim()
            self._limit = max(self._limit, _GROWTH * self._resident())


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    """Megatron-Core compiles small fusions for the GPU as it is imported: three seconds that a CPU has no use for."""
    torch_compile = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = torch_compile


def _redirect_megatron_rng() -> None:
    """Megatron-Core keeps its own references to the CUDA generator; give it the CPU's."""
    import megatron.core.tensor_parallel.random as mcore_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
