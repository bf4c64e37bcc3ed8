"""Training order of the rows: a pure function of (seed, epoch), independent of the parallel layout.

Rows are numbered 0, 1, 2, … over the whole run. `locate` maps a number to an epoch and a row of its file; a step takes
the documents of the next `rows_per_step` rows, in micro-batches that cut.py packs anew. The position of a run is
therefore one integer: the rows consumed.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from sdlm_megatron.diffusion.layout import mix64

_MASK64 = (1 << 64) - 1


def shuffled(index: int, n: int, *, seed: int, epoch: int) -> int:
    """Image of one index under the permutation of `shuffled_many`."""
    return int(shuffled_many(np.array([index]), n, seed=seed, epoch=epoch)[0])


def shuffled_many(indices: np.ndarray, n: int, *, seed: int, epoch: int, purpose: str = "") -> np.ndarray:
    """Images of `indices` under a pseudo-random permutation of range(n): int64 (len(indices),).

    A six-round Feistel network over the next even power of two at least n, applied repeatedly until the value is below
    n (cycle walking). O(1) memory: a stored permutation would cost 8 bytes per row on every rank. `purpose` selects an
    independent permutation for the same (seed, epoch).
    """
    # Two halves of equal width, as a balanced Feistel network requires.
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    state = mix64(mix64(np.uint64(seed & _MASK64)) ^ np.uint64(epoch))
    if purpose:
        state = mix64(state ^ np.uint64(zlib.crc32(purpose.encode())))
    keys = [mix64(state ^ np.uint64(r)) for r in range(6)]
    result = np.asarray(indices).astype(np.uint64)
    walking = np.arange(len(result))
    # The domain is at most four times n, so four rounds are enough on average.
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
    """Position of a row of the run: epoch (may exceed the prepared epochs) and row in that epoch's file."""

    epoch: int
    row: int


def locate(number: int, rows: Callable[[int], int], *, seed: int) -> Location:
    """Epoch and file row of row `number` of the run; `rows(epoch)` returns the rows of an epoch."""
    epoch = 0
    while number >= rows(epoch):
        number -= rows(epoch)
        epoch += 1
    return Location(epoch, shuffled(number, rows(epoch), seed=seed, epoch=epoch))


def locate_many(
    numbers: np.ndarray, rows: Callable[[int], int], *, seed: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """`locate` for ascending row numbers of the run, int64 (n,): for each of their epochs, the epoch, the numbers and
    their file rows."""
    epoch = before = 0
    while len(numbers):
        count = rows(epoch)
        inside = numbers[numbers < before + count]
        if len(inside):
            yield epoch, inside, shuffled_many(inside - before, count, seed=seed, epoch=epoch)
        numbers = numbers[len(inside) :]
        epoch, before = epoch + 1, before + count
