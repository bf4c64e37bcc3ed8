"""Documents into rows of a fixed length: best fit over a window, so that rows are full and documents stay
whole."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CARRIED = 1024
"""Rows with room that stay open from one window to the next: the emptiest ones."""


@dataclass(frozen=True)
class PackedRows:
    """Rows that are closed. Documents are numbered in the order in which they came."""

    documents: np.ndarray
    """int64 (documents,): row after row, in each row ascending."""
    counts: np.ndarray
    """int64 (rows,): documents of each row."""
    cut: np.ndarray
    """int64 (documents,): tokens by which a document was cut down to fit."""


class BestFit:
    """Packs documents as they come, a window at a time.

    The documents of a window are taken longest first; each goes to the row in which it leaves the least room. Equal
    lengths are placed together, so the work is that of the different lengths. Memory: a window, and the documents of
    the open rows.

    Args:
        row_length: tokens S of a row.
    """

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self._rooms = [row_length]  # rooms that open rows have, ascending; the last stands for a new row
        self._rows: list[list[int]] = [[] for _ in range(row_length)]  # room -> its open rows
        self._next_row = self._n_documents = 0
        self._held = np.empty((3, 0), dtype=np.int64)  # document, row, cut of the documents in open rows

    def add(self, lengths: np.ndarray, spare: np.ndarray | None = None) -> PackedRows:
        """Packs the next window of documents; returns the rows that are closed.

        Args:
            lengths: int (n,), all in 1..row_length.
            spare: int (n,): tokens by which each may be cut down rather than open another row; the row it then goes
                to is the emptiest. None: no document is cut.
        """
        if not len(lengths):
            return self._emit(np.empty((3, 0), dtype=np.int64), [])
        if not (lengths.min() >= 1 and lengths.max() <= self.row_length):
            raise ValueError(f"lengths {lengths.min()}..{lengths.max()} do not fit into rows of {self.row_length}")
        order = np.argsort(-lengths, kind="stable")
        placed = np.zeros((3, len(lengths)), dtype=np.int64)
        placed[0] = np.arange(self._n_documents, self._n_documents + len(lengths))
        placed[1:, order] = self._place(lengths[order], None if spare is None else spare[order])
        self._n_documents += len(lengths)
        return self._emit(placed, self._open_rows(_CARRIED))

    def finish(self) -> PackedRows:
        """Closes the rows that are left."""
        return self._emit(np.empty((3, 0), dtype=np.int64), [])

    def _place(self, sizes: np.ndarray, spare: np.ndarray | None) -> tuple[list[int], np.ndarray]:
        """Row and cut of each document; `sizes` descend."""
        rooms, rows, full = self._rooms, self._rows, self.row_length
        starts = np.flatnonzero(np.diff(sizes, prepend=0))
        counts = np.diff(starts, append=len(sizes)).tolist()
        least = int(sizes[-1])  # rows with less room are of no use in this window
        found: list[int] = []
        cut = np.zeros(len(sizes), dtype=np.int64)
        for size, left in zip(sizes[starts].tolist(), counts, strict=True):
            while left:
                at = bisect_left(rooms, size)
                cuts = spare is not None and at == len(rooms) - 1 > 0 and rooms[-2] >= size - spare[len(found)]
                if cuts:
                    at -= 1
                    cut[len(found)] = size - rooms[at]
                room = rooms[at]
                # of equal documents a row takes as many as fit before the next row is touched
                each = min(left, room // size) or 1
                n = left if each == 1 and not cuts else 1
                if room == full:
                    taken = list(range(self._next_row, self._next_row + n))
                    self._next_row += n
                else:
                    taken = rows[room][-n:]
                    del rows[room][-n:]
                    if not rows[room]:
                        del rooms[at]
                found += taken * each
                left -= len(taken) * each
                after = room - each * size
                if after >= least:
                    if not rows[after]:
                        insort(rooms, after)
                    rows[after] += taken
        return found, cut

    def _open_rows(self, limit: int) -> list[int]:
        """The rows that stay open: the emptiest ones; closes the others."""
        kept: list[int] = []
        first = len(self._rooms) - 1
        while first and len(kept) < limit:
            first -= 1
            kept += self._rows[self._rooms[first]]
        for room in self._rooms[:first]:
            self._rows[room] = []
        del self._rooms[:first]
        return kept

    def _emit(self, placed: np.ndarray, still_open: Sequence[int]) -> PackedRows:
        held = np.concatenate([self._held, placed], axis=1)
        base = int(held[1].min(initial=self._next_row))
        stays = np.zeros(self._next_row - base, dtype=bool)
        stays[np.array(still_open, dtype=np.int64) - base] = True
        is_open = stays[held[1] - base]
        self._held = held[:, is_open]
        documents, rows, cut = held[:, ~is_open]
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows - base)
        return PackedRows(documents[order], counts[counts > 0], cut[order])


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int, window: int) -> list[list[int]]:
    """`BestFit` of documents that are all there: the document numbers of each row; every document is in one row."""
    sizes = np.asarray(lengths, dtype=np.int64)
    packer = BestFit(row_length)
    packed = [packer.add(sizes[at : at + window]) for at in range(0, len(sizes), window)]
    rows = []
    for part in [*packed, packer.finish()]:
        rows += np.split(part.documents, np.cumsum(part.counts)[:-1]) if len(part.counts) else []
    return [row.tolist() for row in rows]
