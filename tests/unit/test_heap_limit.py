"""Heap limit: freed memory that the allocator retains is returned above the limit."""

import sys

import pytest

from sdlm_megatron.parallel import cpu
from tests.helpers import run_python

SCRIPT = """
import psutil, torch
from sdlm_megatron.parallel.cpu import HeapLimit, _keep_freed_memory

_keep_freed_memory()
resident = lambda: psutil.Process().memory_info().rss
limit = HeapLimit(resident)
for step in range(3):
    limit.after_step()
before = resident()
assert before > 60e6
blocks = [torch.ones(2**18) for _ in range(400)]  # 1 MB each
kept = blocks[::20]  # small leftovers between the holes, to the end of the heap
del blocks
after_free = resident()
limit.after_step()
given_back = resident()
print(before, after_free, given_back)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_above_the_limit_is_returned() -> None:
    done = run_python("-c", SCRIPT)
    before, after_free, given_back = map(int, done.stdout.split())
    assert after_free - before > 300e6  # freed, and retained by the allocator
    assert given_back - before < 100e6


@pytest.mark.parametrize(
    ("growth", "most_trims", "most_memory"),
    [
        pytest.param(0.0, 1, 6.0, id="steps need more than the first ones"),
        pytest.param(0.5, 10, 8.0, id="the heap grows at every step"),
    ],
)
def test_memory_that_each_step_needs_is_not_returned_at_each_step(
    monkeypatch, growth: float, most_trims: int, most_memory: float
) -> None:
    memory, kept, needed = 4.0, 0.0, 5.5  # GB: resident, freed but retained, in use during a step after the first ones
    highest, trims = 0.0, 0

    def trim() -> None:
        nonlocal memory, kept, trims
        memory, kept, trims = 3.0, 0.0, trims + 1

    monkeypatch.setattr(cpu, "_trim", trim)
    limit = cpu.HeapLimit(lambda: memory)
    for step in range(1, 41):
        if step > 3:
            memory = needed + kept
            kept += growth
        highest = max(highest, memory)
        limit.after_step()
    assert 1 <= trims <= most_trims
    assert highest <= most_memory
