"""Columnar files (Parquet, Arrow as `datasets` writes it) and hub datasets: schema, number of rows, and any
stretch of rows, without a copy of the whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from sdlm_megatron.errors import DataError

BATCH = 256
"""Most rows of a batch."""
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class Table:
    """An open columnar file or dataset."""

    schema: Any
    """pyarrow.Schema."""
    rows: int
    cuts: list[int]
    """Ascending row numbers from 0 at which reading may begin without decoding what lies before."""
    batches: Callable[[int, int], Iterator[Any]]
    """(start, stop) -> pyarrow.RecordBatch of at most BATCH rows, together exactly rows start to stop; raises
    DataError when the file turns out to be damaged or short."""
    stamp: str = ""
    """Of a hub dataset: its fingerprint."""
    files: tuple[Path, ...] = ()
    """Of a hub dataset: the Arrow files that hold just its rows, in order; none if it is only a part of them."""


def open_table(file: Path) -> Table:
    """Opens a .parquet or .arrow file (stream or file form); DataError when it is none."""
    with _naming(file):
        return _parquet(file) if file.suffix == ".parquet" else _arrow(file)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of pyarrow as DataError with the file's name."""
    import pyarrow

    kind = "Parquet" if file.suffix == ".parquet" else "Arrow"
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"the file is not {kind}, or damaged: {reason}", str(file), "get the file again") from None


def _parquet(file: Path) -> Table:
    import pyarrow.parquet

    # buffers instead of whole columns of a row group, which may be as large as the file
    options = {"pre_buffer": False, "buffer_size": 1 << 18, "page_checksum_verification": True}
    content = pyarrow.parquet.ParquetFile(file, **options)
    metadata = content.metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    edges = [0, *accumulate(sizes)]
    if edges[-1] != metadata.num_rows or min(sizes, default=0) < 0:
        raise ValueError(f"its parts hold {edges[-1]} rows, its footer says {metadata.num_rows}")

    def batches(start: int, stop: int) -> Iterator[Any]:
        groups = [i for i in range(len(sizes)) if edges[i] < stop and edges[i + 1] > start]
        if not groups:
            return
        found = content.iter_batches(batch_size=BATCH, row_groups=groups, use_threads=False)
        yield from _cut(file, found, edges[groups[0]], start, stop)

    return Table(content.schema_arrow, metadata.num_rows, edges[:-1] or [0], batches)


def _arrow(file: Path) -> Table:
    import pyarrow.ipc

    def open_file() -> tuple[Any, Iterator[Any]]:
        """Schema and batches; the pages of a batch are read from the disk when they are used."""
        source = pyarrow.memory_map(str(file))
        if source.read(6) == b"ARROW1":
            content = pyarrow.ipc.open_file(source)
            return content.schema, (content.get_batch(i) for i in range(content.num_record_batches))
        source.seek(max(0, source.size() - len(_STREAM_END)))
        if source.read() != _STREAM_END:  # without it a file cut off between two batches would read well
            raise ValueError("it has no end mark, so it was cut off or is still being written")
        source.seek(0)
        content = pyarrow.ipc.open_stream(source)
        return content.schema, _stream(content, source)

    schema, found = open_file()
    edges = [0, *accumulate(batch.num_rows for batch in found)]
    return Table(schema, edges[-1], edges[:-1] or [0], lambda start, stop: _cut(file, open_file()[1], 0, start, stop))


def _stream(content: Any, source: Any) -> Iterator[Any]:
    yield from content
    if source.tell() != source.size():
        raise ValueError(f"it has an end mark at byte {source.tell()}, before its end")


def _cut(file: Path, batches: Iterator[Any], at: int, start: int, stop: int) -> Iterator[Any]:
    """Rows start to stop of `batches`, whose first row has number `at`."""
    while at < stop:
        with _naming(file):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"it ends at row {at}, rows to {stop} were expected")
            first, last = max(start - at, 0), min(stop - at, batch.num_rows)
            pieces = [batch.slice(i, min(BATCH, last - i)) for i in range(first, last, BATCH)]
            if file.suffix != ".parquet":
                _check_buffers(pieces)
        at += batch.num_rows
        yield from pieces


def _check_buffers(batches: list[Any]) -> None:
    """Of Arrow files, which are used as they lie on the disk: a wrong offset would crash. Text that is no UTF-8 is
    left to whoever decodes the row."""
    for batch in batches:
        for column in batch.columns:
            column.view(as_bytes(column.type)).validate(full=True)


def as_bytes(kind: Any) -> Any:
    """The Arrow type with bytes where it has text, and numbers where it has dates: what any content can be viewed
    as."""
    import pyarrow
    import pyarrow.types as types

    if types.is_struct(kind):
        return pyarrow.struct([(field.name, as_bytes(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(as_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(as_bytes(kind.value_type))
    if types.is_timestamp(kind) or types.is_date64(kind):
        return pyarrow.int64()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    return pyarrow.binary() if types.is_string(kind) else kind


@cache
def open_hub(hub: str, subset: str, split: str, revision: str) -> Table:
    """A dataset through `datasets.load_dataset`, kept open in this process. DataError when it cannot be loaded.

    Args:
        hub: its name.
        subset: its configuration, or "".
        split: which split.
        revision: commit, tag or branch, or "" for the newest.
    """
    import datasets

    try:
        found = datasets.load_dataset(hub, subset or None, split=split, revision=revision or None)
    except Exception as error:  # the library raises many kinds: no network, no such set, no such split
        raise DataError(
            f"the dataset cannot be loaded: {error}",
            f"{hub}, subset {subset or '(default)'}, split {split}",
            "check the names and the network, or download the files and use `path`",
        ) from error
    arrow = found.with_format("arrow")

    def batches(start: int, stop: int) -> Iterator[Any]:
        for i in range(start, stop, BATCH):
            yield from arrow[i : min(i + BATCH, stop)].to_batches()

    cuts = list(range(0, len(found), BATCH)) or [0]
    files = tuple(Path(entry["filename"]) for entry in found.cache_files)
    if sum(open_table(file).rows for file in files) != len(found):  # split: train[:10%]
        files = ()
    return Table(found.features.arrow_schema, len(found), cuts, batches, found._fingerprint, files)
