"""Speed of bf16 on this machine: a CPU without bf16 instructions is many times slower than in fp32."""

import time
from functools import cache

import torch

_ROWS, _SIZE = 128, 512
"""Rows and width of the timed layer; a few milliseconds in fp32."""
_TOLERATED = 1.5
"""Ratio up to which bf16 is accepted: it halves the memory, so it need not be faster."""


@cache
def bf16_cost() -> float:
    """CPU time of a linear layer's forward and backward pass in bf16, relative to fp32, on one core. 0 with a GPU.

    Below 1 with bf16 instructions (AMX, AVX512-BF16), 10 to 20 with AVX2 only, where torch uses a generic loop.
    """
    if torch.cuda.is_available():
        return 0.0
    best: dict[torch.dtype, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads wait for each other
    try:
        for _ in range(4):  # alternating, so that a slow moment affects both; the first round is the warm-up
            for dtype in (torch.float32, torch.bfloat16):
                best[dtype] = min(_seconds(dtype), best.get(dtype, float("inf")))
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] / best[torch.float32]


def _seconds(dtype: torch.dtype) -> float:
    rows = torch.ones(_ROWS, _SIZE, dtype=dtype, requires_grad=True)
    weight = torch.ones(_SIZE, _SIZE, dtype=dtype, requires_grad=True)
    gradient = torch.ones(_ROWS, _SIZE, dtype=dtype)
    started = time.process_time()  # CPU time: other processes of a busy machine do not count
    torch.nn.functional.linear(rows, weight).backward(gradient)
    return time.process_time() - started


def slow_bf16() -> str | None:
    """A sentence for the user if bf16 is slower than fp32 here, else None."""
    cost = bf16_cost()
    return f"this CPU takes {cost:.0f} times as long in bf16 as in fp32" if cost > _TOLERATED else None


def best_precision() -> str:
    """Value of train.precision for this machine: bf16, or fp32 where bf16 is slow."""
    return "fp32" if slow_bf16() else "bf16"
