"""Whether this machine computes in bf16 at all: a CPU without instructions for it is many times slower than in fp32."""

import time
from functools import cache

import torch

_ROWS, _SIZE = 128, 512
"""Of the layer that is timed: some milliseconds in fp32."""
_TOLERATED = 1.5
"""bf16 takes half of the memory: it need not be faster to be worth it."""


@cache
def bf16_cost() -> float:
    """CPU time of a linear layer's forward and backward in bf16 over that in fp32, on one core. 0 with a GPU.

    Below 1 where the CPU has instructions for bf16, 10 to 20 with AVX2 alone: torch then has loops of its own.
    """
    if torch.cuda.is_available():
        return 0.0
    best: dict[torch.dtype, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other on a busy machine
    try:
        for _ in range(4):  # in turn: a slow moment of the machine meets both; the first is a warm-up too
            for dtype in (torch.float32, torch.bfloat16):
                best[dtype] = min(_seconds(dtype), best.get(dtype, float("inf")))
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] / best[torch.float32]


def _seconds(dtype: torch.dtype) -> float:
    rows = torch.ones(_ROWS, _SIZE, dtype=dtype, requires_grad=True)
    weight = torch.ones(_SIZE, _SIZE, dtype=dtype, requires_grad=True)
    gradient = torch.ones(_ROWS, _SIZE, dtype=dtype)
    started = time.process_time()
    torch.nn.functional.linear(rows, weight).backward(gradient)
    return time.process_time() - started


def slow_bf16() -> str | None:
    """What to tell where bf16 is slower than fp32; None elsewhere."""
    cost = bf16_cost()
    return f"this CPU takes {cost:.0f} times as long in bf16 as in fp32" if cost > _TOLERATED else None


def best_precision() -> str:
    """train.precision for a job of this machine: bf16, or fp32 where bf16 is slow."""
    return "fp32" if slow_bf16() else "bf16"
