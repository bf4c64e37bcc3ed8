"""The bytes of a source's files: type, decompression, encoding, lines of limited length, and a stamp of the content."""

import codecs
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import xxhash

from sdlm_megatron.errors import DataError, UnfitError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
COLUMNAR = (".parquet", ".arrow")
MOST_LINE = 64 << 20
"""Bytes of the longest line, list element or cell that is read, about 16 million tokens."""
PIECE, PIECES = 1 << 16, 64  # of a file's content, for its stamp
_BUFFER = 1 << 20


class FileType(NamedTuple):
    """Type of a file by its name: suffix of its content and of its compression, in lower case; "" if there is none."""

    content: str
    compression: str


def file_type(file: Path) -> FileType:
    """The type of a file; `rows.JSONL.gz` is (".jsonl", ".gz")."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return FileType(suffixes[-1] if suffixes else "", compression)


def is_columnar(file: Path) -> bool:
    """Whether a file is a Parquet or Arrow file, perhaps compressed once more."""
    return file_type(file).content in COLUMNAR


def is_streamed(file: Path, encoding: str) -> bool:
    """Whether the rows of a text file can be read from its start only: it is compressed, or not UTF-8."""
    return bool(file_type(file).compression or encoding_of(file, encoding))


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Converts errors of reading, decompressing and decoding to DataError with the name of the file."""
    try:
        yield
    except UnicodeError as error:
        what = f"the file is not {getattr(error, 'encoding', 'valid text')}: {getattr(error, 'reason', error)}"
        raise UnfitError(what, str(file), "set `encoding` of the source, or convert the file to UTF-8") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        if file_type(file).compression:
            what = f"the file is not {file_type(file).compression}, or damaged: {reason}"
            raise DataError(what, str(file), "download or compress it again") from None
        raise DataError(f"the file cannot be read: {reason}", str(file), "check `path`") from None


def open_decompressed(file: Path) -> BinaryIO:
    """The content of a file, decompressed as it is read."""
    name = COMPRESSIONS.get(file_type(file).compression)
    if name is None:
        return open(file, "rb", buffering=_BUFFER)
    if not file.stat().st_size:
        raise EOFError("it is empty")
    if name == "xz":  # not in pyarrow
        return cast(BinaryIO, lzma.open(file))
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression=name), _BUFFER)


def open_utf8(file: Path, encoding: str = "") -> BinaryIO:
    """The content of a text file, decompressed and converted to UTF-8 as it is read; `encoding` as for encoding_of."""
    other = encoding_of(file, encoding)
    content = open_decompressed(file)
    return io.BufferedReader(_Converted(content, other), _BUFFER) if other else content


def encoding_of(file: Path, declared: str = "") -> str:
    """Encoding of a text file: the declared one, or that of its byte order mark, or UTF-16 if every other of its first
    bytes is 0; "" for UTF-8."""
    if declared:
        name = codecs.lookup(declared).name
        return "" if name in ("utf-8", "utf-8-sig", "ascii") else name
    with reading(file), open_decompressed(file) as content:
        start = content.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    zeros = [i for i, byte in enumerate(start) if not byte]
    return "utf-16-le" if zeros == [1, 3] else "utf-16-be" if zeros == [0, 2] else ""


class _Converted(io.RawIOBase):
    """Bytes of a file in another encoding, as UTF-8. Raises UnicodeError where they are invalid."""

    def __init__(self, content: BinaryIO, encoding: str) -> None:
        self._content, self._rest = content, b""
        # A lone surrogate is passed on: only its row is rejected.
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass" if "utf" in encoding else "strict")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._content.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = self._content.read(_BUFFER)
            self._rest = self._decoder.decode(block, not block).encode("utf-8", "surrogatepass")
            if not block:
                break
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def limited_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one longer than MOST_LINE only the beginning is kept."""
    while line := read_line(file)[0]:
        yield line


def read_line(file: BinaryIO) -> tuple[bytes, int]:
    """The next line, with its line break, and its bytes in the file.

    The first MOST_LINE + 1 bytes of a longer line, whose rest is skipped: one line could fill the memory.
    """
    line = file.readline(MOST_LINE + 1)
    size, rest = len(line), line
    while len(rest) > MOST_LINE and not rest.endswith(b"\n"):
        rest = file.readline(MOST_LINE + 1)
        size += len(rest)
    return line, size


def skip(file: BinaryIO, count: int) -> None:
    """Moves forward by `count` bytes."""
    if file.seekable():
        file.seek(count, io.SEEK_CUR)
        return
    while count > 0 and (block := file.read(min(count, _BUFFER))):
        count -= len(block)


def stamp(file: Path) -> str:
    """Size of a file and a digest of PIECES pieces of PIECE bytes, evenly spaced, the first and the last included (a
    file of up to 4 MiB is covered completely). A new date does not change it."""
    with reading(file):
        state = file.stat()
        return (
            f"{state.st_size} {_digest(str(file), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)}"
        )


@lru_cache(maxsize=4096)
def _digest(file: str, size: int, *_: int) -> str:
    last = max(0, size - PIECE)
    count = min(PIECES, -(-size // PIECE))
    digest = xxhash.xxh3_64()
    with open(file, "rb", buffering=0) as content:
        for i in range(count):
            content.seek(last * i // max(1, count - 1))
            digest.update(content.read(PIECE))
    return digest.hexdigest()
