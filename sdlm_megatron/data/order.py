"""The order in which rows are trained: a pure function of (seed, epoch), whatever the parallel layout.

Rows are numbered 0, 1, 2, … over the whole run. `locate` maps such a number to an epoch and a row of the file; a
step takes the next `rows_per_step` numbers. The position of a run is therefore one integer, the rows consumed.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdlm_megatron.diffusion.layout import mix64

_MASK64 = (1 << 64) - 1


def _mix(value: int) -> int:
    """splitmix64's finaliser: a 64-bit integer hash (Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def shuffled(index: int, n: int, *, seed: int, epoch: int) -> int:
    """Image of `index` under a pseudo-random permutation of range(n), in O(1) time and memory.

    A Feistel network over the next even power of two, walked until the value falls below n. A stored permutation
    would cost 8 bytes a row on every rank.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = [_mix(_mix(_mix(seed & _MASK64) ^ epoch) ^ r) for r in range(6)]
    while True:
        left, right = index >> half, index & low
        for key in keys:
            left, right = right, left ^ (_mix(key ^ right) & low)
        index = (left << half) | right
        if index < n:
            return index


def shuffled_many(indices: np.ndarray, n: int, *, seed: int, epoch: int, purpose: str = "") -> np.ndarray:
    """`shuffled` of many indices at once, int64 (len(indices),).

    `purpose` gives the things of one (seed, epoch) permutations of their own; "" is the one of `shuffled`.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    state = mix64(mix64(np.uint64(seed & _MASK64)) ^ np.uint64(epoch))
    if purpose:
        state = mix64(state ^ np.uint64(zlib.crc32(purpose.encode())))
    keys = [mix64(state ^ np.uint64(r)) for r in range(6)]
    result = np.asarray(indices).astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        value = result[walking]
        left, right = value >> half, value & low
        for key in keys:
            left, right = right, left ^ (mix64(key ^ right) & low)
        result[walking] = (left << half) | right
        walking = walking[result[walking] >= n]
    return result.astype(np.int64)


@dataclass(frozen=True)
class Location:
    """Where a row of the run lies: epoch (may exceed the prepared epochs) and row in that epoch's file."""

    epoch: int
    row: int


def locate(number: int, rows: Callable[[int], int], *, seed: int) -> Location:
    """Epoch and file row of the run's row `number`; `rows(epoch)` gives the rows of an epoch."""
    epoch = 0
    while number >= rows(epoch):
        number -= rows(epoch)
        epoch += 1
    return Location(epoch, shuffled(number, rows(epoch), seed=seed, epoch=epoch))


def micro_batches(rows_per_step: int, dp_size: int, multiple: int) -> int:
    """Micro-batches of a step on each data-parallel rank: enough for its rows, and a multiple of `multiple`."""
    return -(-rows_per_step // (dp_size * multiple)) * multiple


def step_rows(
    consumed: int, rows_per_step: int, total: int, *, dp_rank: int, dp_size: int, multiple: int = 1
) -> list[int | None]:
    """Row numbers of one step for one data-parallel rank, in micro-batch order; None = an empty row.

    Row consumed + m*dp_size + dp_rank is micro-batch m of rank dp_rank. Every rank gets the same number of
    micro-batches, a multiple of `multiple`; where rows_per_step does not divide so, or the data ends, empty rows
    (padding only, no target) fill up, which leaves the loss of the step exactly the same.
    """
    last = min(consumed + rows_per_step, total)
    steps = range(micro_batches(rows_per_step, dp_size, multiple))
    numbers = (consumed + m * dp_size + dp_rank for m in steps)
    return [n if n < last else None for n in numbers]
