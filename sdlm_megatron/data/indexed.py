"""Megatron-Core's indexed dataset format (`.bin` + `.idx`) for int32, in numpy.

Own implementation of a foreign format because importing torch and Megatron would add ten seconds to the start of
every data tool. A test compares both directions with megatron.core.datasets.IndexedDataset.

    .bin    the integers, one sequence after another
    .idx    b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, sequences u64, documents u64,
            lengths i32[sequences], byte offsets i64[sequences], document starts i64[documents]
"""

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sdlm_megatron.files import named

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INT32 = 4  # Megatron-Core's dtype code of int32


class IndexedWriter:
    """Appends int32 sequences, each as its own document. Memory: 4 bytes per sequence."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._bin = open(prefix + ".bin", "wb")  # noqa: SIM115 - closed by finish
        self._hash = hashlib.sha256()
        self._lengths = array("i")  # 4 bytes per sequence, where a list of int would need 36

    def add(self, ints: np.ndarray, lengths: Sequence[int]) -> None:
        """Appends consecutive sequences of the given lengths, concatenated in `ints`."""
        data = np.ascontiguousarray(ints, dtype=np.int32).data.cast("B") if len(ints) else b""
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.extend(lengths)

    def finish(self) -> dict[str, dict[str, int | str]]:
        """Closes the data, writes the index, and syncs both to disk; returns {file name: {bytes, sha256}}."""
        lengths = np.array(self._lengths, dtype=np.int32)
        offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(np.int32).itemsize
        index = _HEADER.pack(_MAGIC, 1, _INT32, len(lengths), len(lengths) + 1) + b"".join(
            part.tobytes() for part in (lengths, offsets, np.arange(len(lengths) + 1, dtype=np.int64))
        )
        size = self._bin.tell()
        _close(self._bin)
        with open(self._prefix + ".idx", "wb") as file:
            file.write(index)
            _close(file)
        name = Path(self._prefix).name
        return {
            f"{name}.bin": {"bytes": size, "sha256": self._hash.hexdigest()},
            f"{name}.idx": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        }

    def abort(self) -> None:
        """Closes the data without writing an index."""
        self._bin.close()


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class IndexedReader:
    """Memory-mapped access to sequences by number; the cost of opening does not grow with the data.

    Args:
        prefix: path without suffix.
        longest: most integers of a sequence; a longer one is refused before it is read.

    Raises:
        ValueError: the files are not a complete int32 dataset of this format.
    """

    def __init__(self, prefix: str, longest: int = 2**31 - 1) -> None:
        self._longest = longest
        index = Path(prefix + ".idx")
        with named(index), open(index, "rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise ValueError(f"the index is truncated after {len(head)} bytes")
        magic, version, code, sequences, documents = _HEADER.unpack(head)
        if magic != _MAGIC or version != 1 or code != _INT32:
            raise ValueError(f"not an int32 indexed dataset: header {magic!r}, version {version}, dtype code {code}")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if index.stat().st_size != expected:
            raise ValueError(f"the index has {index.stat().st_size} bytes, {sequences} rows need {expected}")
        bytes_map = np.memmap(index, dtype=np.uint8, mode="r", offset=_HEADER.size)
        self.lengths = bytes_map[: 4 * sequences].view(np.int32)
        """int32 (sequences,)."""
        self.offsets = bytes_map[4 * sequences : 12 * sequences].view(np.int64)
        """int64 (sequences,), in bytes."""
        # A truncated data file would otherwise fail only when its last rows are read.
        size = os.path.getsize(prefix + ".bin")
        if sequences and size != int(self.offsets[-1]) + 4 * int(self.lengths[-1]):
            raise ValueError(f"the data file has {size} bytes, which does not match its index")
        self.integers = np.memmap(prefix + ".bin", dtype=np.int32, mode="r") if size else np.empty(0, np.int32)
        """int32: those of all sequences."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        """A copy of sequence `number`, int32. Raises ValueError if the index leads out of the data."""
        offset, length = int(self.offsets[number]), int(self.lengths[number])
        if offset < 0 or offset % 4 or not 0 <= length <= min(self._longest, len(self.integers) - offset // 4):
            raise ValueError(f"its index has offset {offset} and length {length}; at most {self._longest} fit")
        return np.array(self.integers[offset // 4 : offset // 4 + length])
