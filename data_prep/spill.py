"""Rendered documents kept in a file between rendering and packing, so that memory does not grow with the
data."""

from array import array
from pathlib import Path
from types import TracebackType

import numpy as np


class Spill:
    """Clean tokens and anchors of documents: appended once, then read in any order.

    A document costs 4 bytes a token and an anchor on disk, and 28 bytes in memory.

    Args:
        path: file to create; removed on exit.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._ints: np.ndarray | None = None
        self._offsets = array("q", [0])
        self._clean_lens = array("i")
        self._n_blocks = array("i")
        self._numbers = array("q")

    def __enter__(self) -> "Spill":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ints = None
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, input_ids: np.ndarray, anchors: np.ndarray, n_blocks: int) -> None:
        """Appends a document: its number, ids int32 (L,), anchors int32 (R,) and how many blocks it gets."""
        ints = np.concatenate([input_ids, anchors]).astype(np.int32)
        self._file.write(ints.tobytes())
        self._offsets.append(self._offsets[-1] + len(ints))
        self._clean_lens.append(len(input_ids))
        self._n_blocks.append(n_blocks)
        self._numbers.append(number)

    def lengths(self, block_size: int) -> np.ndarray:
        """int64 (n,): tokens of each document with its blocks."""
        clean = np.array(self._clean_lens, dtype=np.int64)
        return clean + np.array(self._n_blocks, dtype=np.int64) * block_size

    def read(self, i: int) -> tuple[int, np.ndarray, np.ndarray, int]:
        """The i-th document: number, ids, anchors, blocks. Ends the appending."""
        if self._ints is None:
            self._file.close()
            self._ints = np.memmap(self._path, dtype=np.int32, mode="r")
        ints = self._ints[self._offsets[i] : self._offsets[i + 1]]
        return self._numbers[i], ints[: self._clean_lens[i]], ints[self._clean_lens[i] :], self._n_blocks[i]
