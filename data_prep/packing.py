"""Best-fit packing of whole documents into rows of a fixed length, over a window of documents."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Rows kept open between windows, the emptiest ones; the limit bounds memory.
_CARRIED = 1024


@dataclass(frozen=True)
class ClosedRows:
    """Closed rows. Documents are numbered in the order of arrival."""

    documents: np.ndarray  # int64 (documents,): document numbers row by row, ascending within a row
    counts: np.ndarray  # int64 (rows,): number of documents per row
    cut: np.ndarray  # int64 (documents,): tokens removed from each document to make it fit


class BestFit:
    """Incremental best-fit packing, one window of documents at a time.

    The documents of a window are placed longest first, each into the row where it leaves the least room. Equal lengths
    are placed together, so the cost grows with the number of distinct lengths. Memory: one window and the documents of
    the open rows.
    """

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self._rooms = [row_length]  # distinct free lengths of open rows, ascending; the last is a new row
        self._rows: list[list[int]] = [[] for _ in range(row_length)]  # free length -> open rows
        self._next_row = self._n_documents = 0
        self._open = np.empty((3, 0), dtype=np.int64)  # (document, row, cut) of the documents in open rows

    def add(self, lengths: np.ndarray, spare: np.ndarray | None = None) -> ClosedRows:
        """Packs the next window of documents and returns the rows closed by it.

        Args:
            lengths: int (n,), all in 1..row_length.
            spare: int (n,): tokens that may be removed from each document to avoid opening another row; it is then
                placed into the emptiest open row. None: documents are never cut.
        """
        if not len(lengths):
            return self._emit(np.empty((3, 0), dtype=np.int64), [])
        if not (lengths.min() >= 1 and lengths.max() <= self.row_length):
            raise ValueError(f"lengths {lengths.min()}..{lengths.max()} do not fit into rows of {self.row_length}")
        # Longest first, as in best-fit decreasing; stable, so that the result depends on the input alone.
        order = np.argsort(-lengths, kind="stable")
        placed = np.zeros((3, len(lengths)), dtype=np.int64)
        placed[0] = np.arange(self._n_documents, self._n_documents + len(lengths))
        placed[1:, order] = self._place(lengths[order], None if spare is None else spare[order])
        self._n_documents += len(lengths)
        return self._emit(placed, self._open_rows(_CARRIED))

    def finish(self) -> ClosedRows:
        """Closes the remaining rows and returns them."""
        return self._emit(np.empty((3, 0), dtype=np.int64), [])

    def _place(self, sizes: np.ndarray, spare: np.ndarray | None) -> tuple[list[int], np.ndarray]:
        """Row and cut of each document; `sizes` are in descending order."""
        rooms, rows, full = self._rooms, self._rows, self.row_length
        starts = np.flatnonzero(np.diff(sizes, prepend=0))
        counts = np.diff(starts, append=len(sizes)).tolist()
        least = int(sizes[-1])  # rows with less room cannot take any document of this window
        placed: list[int] = []
        cut = np.zeros(len(sizes), dtype=np.int64)
        for size, left in zip(sizes[starts].tolist(), counts, strict=True):
            while left:
                at = bisect_left(rooms, size)
                # Only a document that would open a new row is cut, and only to fit the emptiest open row.
                cuts = spare is not None and at == len(rooms) - 1 > 0 and rooms[-2] >= size - spare[len(placed)]
                if cuts:
                    at -= 1
                    cut[len(placed)] = size - rooms[at]
                room = rooms[at]
                # A row takes as many of the equal documents as fit before the next row is used.
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
                placed += taken * each
                left -= len(taken) * each
                after = room - each * size
                if after >= least:  # otherwise the row is full and no longer tracked
                    if not rows[after]:
                        insort(rooms, after)
                    rows[after] += taken
        return placed, cut

    def _open_rows(self, limit: int) -> list[int]:
        """Closes all but the `limit` emptiest rows (approximately) and returns the rows that remain open."""
        kept: list[int] = []
        first = len(self._rooms) - 1
        while first and len(kept) < limit:
            first -= 1
            kept += self._rows[self._rooms[first]]
        for room in self._rooms[:first]:
            self._rows[room] = []
        del self._rooms[:first]
        return kept

    def _emit(self, placed: np.ndarray, still_open: Sequence[int]) -> ClosedRows:
        pending = np.concatenate([self._open, placed], axis=1)
        base = int(pending[1].min(initial=self._next_row))
        stays = np.zeros(self._next_row - base, dtype=bool)
        stays[np.array(still_open, dtype=np.int64) - base] = True
        is_open = stays[pending[1] - base]
        self._open = pending[:, is_open]
        documents, rows, cut = pending[:, ~is_open]
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows - base)
        return ClosedRows(documents[order], counts[counts > 0], cut[order])
