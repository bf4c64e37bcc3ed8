"""Heap limit: freed memory that the allocator retains is returned above the limit."""

import sys

import pytest

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
