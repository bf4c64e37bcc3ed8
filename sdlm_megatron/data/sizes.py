"""Sizes of all documents of an epoch in one small file. Every rank cuts its steps from them (cut.py), and reads only
the rows of its own documents.

The file is an indexed dataset, epochN.sizes.bin and .idx, with three integers for each document of a row: clean tokens,
blocks, and the mean start of the blocks, rounded down.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlm_megatron.data.indexed import IndexedReader, IndexedWriter

CLEAN, BLOCKS, START = range(3)
"""Columns of EpochSizes.table."""


@dataclass(frozen=True)
class EpochSizes:
    """Sizes of the documents of an epoch, in file order."""

    table: np.ndarray
    """int32 (docs, 3), see the columns."""
    first: np.ndarray
    """int64 (rows + 1,): documents before each row."""


def sizes_prefix(folder: Path, epoch: int) -> str:
    """Path, without suffix, of the sizes of an epoch."""
    return str(folder / f"epoch{epoch}.sizes")


def scan_layouts(parts: Iterable[IndexedReader]) -> EpochSizes:
    """The sizes from the layouts of an epoch's parts: [crc32, docs, doc_ids…, clean_lens…, n_blocks…, starts…] per row.

    Raises:
        ValueError: a layout contradicts itself.
    """
    tables, counts = [np.empty((0, 3), dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    for reader in parts:
        ints, lengths, at = reader.integers, reader.lengths.astype(np.int64), reader.offsets // 4
        if len(lengths) and lengths.min() < 2:
            raise ValueError("a layout has less than two numbers")
        docs = ints[at + 1].astype(np.int64)
        if (docs < 0).any() or (2 + 3 * docs > lengths).any():
            raise ValueError("a layout has a wrong number of documents")
        before = np.concatenate([[0], np.cumsum(docs)])
        in_row = np.arange(before[-1]) - np.repeat(before[:-1], docs)
        clean_at = np.repeat(at + 2 + docs, docs) + in_row
        clean, blocks = ints[clean_at], ints[clean_at + np.repeat(docs, docs)].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(blocks)])
        if (blocks < 0).any() or (np.diff(ends[before]) != lengths - 2 - 3 * docs).any():
            raise ValueError("a layout has a wrong number of block starts")
        begin = np.repeat(at + 2 + 3 * docs, docs) + ends[:-1] - np.repeat(ends[before[:-1]], docs)
        sums = np.concatenate([[0], np.cumsum(ints, dtype=np.int64)])
        mean = (sums[begin + blocks] - sums[begin]) // np.maximum(blocks, 1)
        tables.append(np.stack([clean, blocks, mean], axis=1).astype(np.int32))
        counts.append(docs)
    return EpochSizes(np.concatenate(tables), np.cumsum(np.concatenate(counts)))


def write_sizes(prefix: str, sizes: EpochSizes) -> dict[str, dict[str, int | str]]:
    """Writes the file; returns {file name: {bytes, sha256}}."""
    writer = IndexedWriter(prefix)
    writer.add(sizes.table.reshape(-1), (3 * np.diff(sizes.first)).tolist())
    return writer.finish()


def read_sizes(prefix: str, rows: int) -> EpochSizes:
    """Reads the file of `rows` rows, memory-mapped. Raises ValueError or OSError if it is damaged."""
    reader = IndexedReader(prefix)
    lengths = reader.lengths.astype(np.int64)
    if len(lengths) != rows or (lengths % 3).any() or lengths.sum() != len(reader.integers):
        raise ValueError(f"it does not hold the documents of {rows} rows")
    return EpochSizes(reader.integers.reshape(-1, 3), np.concatenate([[0], np.cumsum(lengths // 3)]))
