"""Documents into rows of a fixed length: best fit over a window, so that rows are full and documents stay
whole."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def order(seed: int, epoch: int, n: int, purpose: str) -> np.ndarray:
    """A permutation of n things, int64 (n,): a pure function of (seed, epoch, purpose)."""
    key = np.random.SeedSequence([seed, epoch, *purpose.encode()])
    return np.random.Generator(np.random.Philox(key)).permutation(n)


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int, window: int) -> list[list[int]]:
    """Packs documents into rows.

    The documents are taken `window` at a time, longest first; each goes to the row in which it leaves the
    least room. Rows stay open from window to window; of more than `window` open rows the fullest are closed.

    Args:
        lengths: expanded length of each document, all in 1..row_length.
        row_length: tokens of a row.
        window: documents looked at together, >= 1.

    Returns:
        The document numbers (indices into `lengths`) of each row; every document is in exactly one row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= row_length):
        raise ValueError(f"document lengths {sizes.min()}..{sizes.max()} do not fit into rows of {row_length}")
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row number), ascending
    for start in range(0, len(sizes), window):
        chunk = sizes[start : start + window]
        for offset in np.argsort(-chunk, kind="stable"):
            size, document = int(chunk[offset]), start + int(offset)
            at = bisect_left(open_rows, (size, -1))
            if at < len(open_rows):
                room, row = open_rows.pop(at)
            else:
                room, row = row_length, len(rows)
                rows.append([])
            rows[row].append(document)
            if room > size:
                insort(open_rows, (room - size, row))
        del open_rows[: max(0, len(open_rows) - window)]
    return rows
