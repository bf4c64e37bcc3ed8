"""Cutting a step: the documents of its rows are packed anew, into rows of one length for all ranks' micro-batches.

Documents do not see each other, so how they share rows changes neither the loss of a step nor its gradients. The rows
of a dataset say which documents a step has. Their number seldom divides by ranks and micro-batches; longer rows, of a
length chosen once for the run, make it divide without empty ones. All ranks compute the same cut from the documents'
sizes alone, in a few milliseconds.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SPARE = 256
"""1/256 of the row length stays free, so that steps which were not among the sampled ones fit, too."""
_LEVEL = 1.02
"""Rows are filled up to this multiple of their mean where that is possible."""


@dataclass(frozen=True)
class StepDocuments:
    """The documents of a step; int64 arrays (docs,)."""

    rows: np.ndarray
    """Number of the row of the run that each document comes from."""
    index: np.ndarray
    """Index of the document in that row."""
    tokens: np.ndarray
    """Clean and block tokens."""
    pairs: np.ndarray
    """Visible (query, key) pairs, nearly: those of the mean start for all blocks."""


@dataclass(frozen=True)
class StepGrid:
    """Rows of a step: `micro_batches` on each of `ranks` data-parallel ranks."""

    ranks: int
    micro_batches: int
    multiple: int
    """The number of micro-batches is a multiple of it."""
    row_length: int
    """Tokens of each row, at least those of the dataset's rows."""
    whole_rows: bool = False
    """The dataset's rows stay as they are: the loss is a mean over rows."""


def cut(docs: StepDocuments, grid: StepGrid) -> tuple[np.ndarray, int]:
    """Divides the documents of a step over the rows of a grid; a pure function.

    Rows have at most `grid.row_length` tokens, and none is empty if there are as many documents. The sums of visible
    pairs are nearly equal over ranks, and as far as documents allow over rows.

    Returns:
        Row of each document, int64 (docs,): m * ranks + r for micro-batch m of rank r; and the number of micro-batches.
        It is that of the grid, or more for a step whose documents fill its rows too badly.
    """
    count = grid.micro_batches
    while (bins := _fit(docs, count * grid.ranks, grid)) is None:
        count += grid.multiple
    if not grid.whole_rows:
        _fill_empty(bins, count * grid.ranks)
    pairs = np.bincount(bins, docs.pairs, count * grid.ranks).astype(np.int64)
    return _deal(pairs, grid.ranks)[bins], count


def _fit(docs: StepDocuments, rows: int, grid: StepGrid) -> np.ndarray | None:
    """Row of each document, from 0; None if they do not fit."""
    if not grid.whole_rows:
        level = int(_LEVEL * docs.tokens.sum()) // rows
        # rows that are filled alike, if possible
        for length in (min(max(level, int(docs.tokens.max(initial=1))), grid.row_length), grid.row_length):
            if (bins := best_fit(docs.tokens, length, rows)) is not None:
                return bins
    numbers, own = np.unique(docs.rows, return_inverse=True)
    return own if len(numbers) <= rows else None  # rows of the dataset fit


def best_fit(tokens: np.ndarray, row_length: int, rows: int) -> np.ndarray | None:
    """Row of each document, int64 (docs,); None if more than `rows` rows are needed.

    The longest document first, each into the row where it leaves the least room.
    """
    bins, sizes, opened = np.empty(len(tokens), dtype=np.int64), tokens.tolist(), 0
    rooms: list[tuple[int, int]] = []
    for document in np.argsort(-tokens, kind="stable").tolist():
        size = sizes[document]
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        elif opened < rows and size <= row_length:
            room, row, opened = row_length, opened, opened + 1
        else:
            return None
        bins[document] = row
        insort(rooms, (room - size, row))
    return bins


def _fill_empty(bins: np.ndarray, rows: int) -> None:
    """Gives each empty row a document of the row with most, in place."""
    counts = np.bincount(bins, minlength=rows)
    for empty in np.flatnonzero(counts == 0).tolist():
        if counts.max(initial=0) < 2:
            return  # fewer documents than rows
        moved = np.flatnonzero(bins == counts.argmax())[-1]
        counts[bins[moved]], counts[empty], bins[moved] = counts[bins[moved]] - 1, 1, empty


def _deal(pairs: np.ndarray, ranks: int) -> np.ndarray:
    """New number of each row, m * ranks + r: each rank gets as many rows, with about the same sum of visible pairs."""
    # in rounds of one row per rank, the row with most pairs to the rank with fewest so far
    order, sums = np.argsort(-pairs, kind="stable"), np.zeros(ranks, dtype=np.int64)
    owned = np.empty((len(pairs) // ranks, ranks), dtype=np.int64)
    for round_, rows in enumerate(order.reshape(-1, ranks)):
        poorest = np.argsort(sums, kind="stable")
        owned[round_, poorest] = rows
        sums[poorest] += pairs[rows]
    owned_pairs = pairs[owned]
    for _ in range(4 * ranks):  # swaps of a row between the rank with most pairs and another
        rich = int(sums.argmax())
        gain = owned_pairs[:, rich][:, None, None] - owned_pairs[None]  # (own row, other row, other rank)
        most = np.maximum(sums[rich] - gain, sums + gain)
        most[:, :, rich] = sums[rich]
        own, row, other = np.unravel_index(int(most.argmin()), most.shape)
        if most[own, row, other] >= sums[rich]:
            break
        sums[rich], sums[other] = sums[rich] - gain[own, row, other], sums[other] + gain[own, row, other]
        for table in (owned, owned_pairs):
            table[own, rich], table[row, other] = table[row, other], table[own, rich]
    numbers = np.empty(len(pairs), dtype=np.int64)
    numbers[owned.reshape(-1)] = np.arange(len(pairs))
    return numbers


def choose_grid(
    steps: Sequence[StepDocuments],
    rows_per_step: int,
    row_length: int,
    *,
    ranks: int,
    multiple: int,
    unit: int,
    micro_batches: int = 0,
    whole_rows: bool = False,
) -> StepGrid:
    """The grid of a run: of the numbers of micro-batches next to `rows_per_step` / `ranks`, the one with fewer tokens.

    Args:
        steps: a sample of the run's steps.
        rows_per_step: rows of the dataset in a step.
        row_length: of the dataset.
        ranks: data-parallel ranks.
        multiple: the number of micro-batches must be a multiple of it.
        unit: row lengths beyond the dataset's are multiples of it.
        micro_batches: this number instead; 0: chosen.
        whole_rows: see StepGrid.
    """
    below = rows_per_step // (ranks * multiple) * multiple
    above = -(-rows_per_step // (ranks * multiple)) * multiple
    counts = [above] if whole_rows else [micro_batches] if micro_batches else sorted({below or multiple, above})
    grids = []
    for count in counts:
        length, rows = row_length, count * ranks
        if rows < rows_per_step:
            mean = max(int(step.tokens.sum()) for step in steps) / rows
            length = max(row_length, -(-int(mean) // unit) * unit)
            while any(best_fit(step.tokens, length - length // _SPARE, rows) is None for step in steps):
                length += unit
        grids.append(StepGrid(ranks, count, multiple, length, whole_rows))
    return min(grids, key=lambda grid: grid.micro_batches * grid.row_length)
