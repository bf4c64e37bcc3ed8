"""Megatron-Core on machines without a GPU: torch.cuda calls with an equivalent on the CPU are redirected to it.

Megatron-Core allocates on "cuda" and uses streams and device numbers even where it does not need them. With `install`
the same code runs on a CPU over gloo. It must run before megatron is imported. Where a GPU is present it only hides
packages that do not work; it never changes `torch.cuda.is_available`.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sdlm_megatron.config.hardware import cpu_reason, gpu_available
from sdlm_megatron.model.packages import find_packages

_installed = False
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_FIRST_STEPS, _GROWTH = 3, 1.25
"""After the first 3 steps, the optimizer state and the usual shapes are allocated. 25 % above that is tolerated, for
rows of other shapes."""


class _CudaToCpu(TorchFunctionMode):
    """Replaces `device="cuda…"` by the CPU in every torch call of this thread."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if (isinstance(device, int) and not isinstance(device, bool)) or (
            device is not None and torch.device(device).type == "cuda"
        ):  # an integer device is a CUDA device
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **kwargs)
        # Megatron-Core's optimizers accept only parameters of type "torch.cuda.…"
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class _NoOp:
    """Stand-in for a stream or an event: work on a CPU is already ordered."""

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
    """Redirects CUDA calls to the CPU if there is no GPU. Returns whether the redirect is active.

    Raises:
        ConfigError: there is a GPU, which torch cannot use.
    """
    global _installed
    if not gpu_available():
        cpu_reason()
    find_packages()
    if torch.cuda.is_available() or _installed:
        return _installed
    _installed = True
    _CudaToCpu().__enter__()
    no_op = _NoOp()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream = cuda.Event = _NoOp
    cuda.current_stream = cuda.default_stream = lambda *a, **k: no_op
    cuda.stream = lambda *a, **k: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    # weights are initialized from this generator: without a seed, no two runs would start from the same ones
    cuda.manual_seed = torch.default_generator.manual_seed
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *a, **k: None)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *a, **k: None
    # advice about CUDA_DEVICE_MAX_CONNECTIONS, which applies to GPUs only
    warnings.filterwarnings("ignore", message="When using sequence parallelism it is recommended to set")
    _keep_freed_memory()
    with _without_compile():
        _redirect_megatron_rng()
        _skip_own_copies()
    return True


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory, as CUDA's caching allocator does."""
    # By default glibc returns every large block to the system when it is freed, and the kernel maps and clears the
    # next one page by page: 40 % of a bf16 step with a large vocabulary (docs/benchmarks.md).
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


class HeapLimit:
    """Returns freed memory to the system when the process retains too much of it (see `_keep_freed_memory`)."""

    # Sometimes small blocks occupy the holes that a step's large blocks left, and the heap grows at every step: by
    # 0.5 GB per step in one run, until the system killed it.

    def __init__(self, resident: Callable[[], int]) -> None:
        self._resident, self._steps, self._limit = resident, 0, 0.0
        self._measured = _FIRST_STEPS  # step whose memory determines the limit

    def after_step(self) -> None:
        """Call after each step."""
        self._steps += 1
        if self._steps == self._measured:
            self._limit = max(self._limit, _GROWTH * self._resident())
        elif self._steps > self._measured and self._resident() > self._limit:
            _trim()
            # What the next step takes again is needed; with a lower limit, every step would map and clear it again.
            self._measured = self._steps + 1


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    """Disables torch.compile while Megatron-Core is imported: it compiles GPU fusions then, which takes 3 seconds."""
    torch_compile = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = torch_compile


def _skip_own_copies() -> None:
    """Makes collectives of Megatron-Core's buffers do nothing where the only rank would receive what it sends."""
    # In each step gloo would copy all gradients and weights twice, 14 % of the time (docs/benchmarks.md).
    import megatron.core.distributed.param_and_grad_buffer as buffers

    def skipping(collective: Callable) -> Callable:
        def call(output: torch.Tensor, source: torch.Tensor, *, group: Any, async_op: bool, **kwargs: Any) -> Any:
            # an asynchronous one has to return something to wait for
            if group.size() == 1 and not async_op and output.data_ptr() == source.data_ptr():
                return None
            return collective(output, source, group=group, async_op=async_op, **kwargs)

        return call

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, skipping(getattr(buffers, name)))


def _redirect_megatron_rng() -> None:
    """Replaces Megatron-Core's own references to the CUDA random number generator by the CPU's."""
    import megatron.core.tensor_parallel.random as mcore_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
