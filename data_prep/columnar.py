"""Columnar files (Parquet, Arrow as written by `datasets`) and hub datasets: schema, number of rows, and access to any
range of rows without loading the whole."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir
from typing import Any

from data_prep.input_bytes import file_type, open_decompressed, reading
from sdlm_megatron.errors import DataError

# Maximum rows per batch. Rows may be a megabyte each, so larger batches would need too much memory.
BATCH = 256
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # end-of-stream marker of Arrow's stream format


@dataclass(frozen=True)
class ColumnarTable:
    """An open columnar file or hub dataset."""

    schema: Any  # pyarrow.Schema
    rows: int
    cuts: list[int]  # ascending row numbers, from 0, at which reading can begin without decoding earlier rows
    batches: Callable[[int, int], Iterator[Any]]
    """(start, stop) -> pyarrow.RecordBatch objects of at most BATCH rows, in total exactly rows [start, stop); raises
    DataError if the file is damaged or too short."""
    stamp: str = ""  # fingerprint of a hub dataset; otherwise empty
    files: tuple[Path, ...] = ()
    """Files that contain exactly the rows of a hub dataset, in order; empty if it is a part of them. Without schema:
    files as downloaded, whose rows `datasets` refuses."""
    temporary: Any = None  # decompressed copy of the file, which exists as long as this object


def open_table(file: Path) -> ColumnarTable:
    """Opens a .parquet or .arrow file (stream or file format); DataError if it is neither. These need access to any
    byte: a compressed one is decompressed into the folder for temporary files."""
    if not file_type(file).compression:
        return _open(file, file)
    temporary = NamedTemporaryFile(suffix=file_type(file).content)  # noqa: SIM115 (closed with the table)
    with reading(file), open_decompressed(file) as content:
        try:
            shutil.copyfileobj(content, temporary, 1 << 20)
            temporary.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            fix = "free some space, or set TMPDIR to a folder on another disk"
            raise DataError(f"the disk is full: {file} is decompressed to it", gettempdir(), fix) from None
    return replace(_open(Path(temporary.name), file), temporary=temporary)


def _open(path: Path, named: Path) -> ColumnarTable:
    with _as_data_error(named):
        return _parquet(path, named) if file_type(path).content == ".parquet" else _arrow(path, named)


@contextmanager
def _as_data_error(file: Path) -> Iterator[None]:
    """Converts errors of pyarrow to DataError with the name of the file."""
    import pyarrow

    kind = "Parquet" if file_type(file).content == ".parquet" else "Arrow"
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"the file is not {kind}, or damaged: {reason}", str(file), "download it again") from None


def _parquet(path: Path, file: Path) -> ColumnarTable:
    import pyarrow.parquet

    # Small buffers instead of whole column chunks: a row group may be as large as the file.
    options = {"pre_buffer": False, "buffer_size": 1 << 18, "page_checksum_verification": True}
    content = pyarrow.parquet.ParquetFile(path, **options)
    metadata = content.metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    edges = [0, *accumulate(sizes)]
    if edges[-1] != metadata.num_rows or min(sizes, default=0) < 0:
        raise ValueError(f"its row groups have {edges[-1]} rows, its footer says {metadata.num_rows}")

    def batches(start: int, stop: int) -> Iterator[Any]:
        groups = [i for i in range(len(sizes)) if edges[i] < stop and edges[i + 1] > start]
        if not groups:
            return
        decoded = content.iter_batches(batch_size=BATCH, row_groups=groups, use_threads=False)
        yield from _cut(file, decoded, edges[groups[0]], start, stop)

    return ColumnarTable(content.schema_arrow, metadata.num_rows, edges[:-1] or [0], batches)


def _arrow(path: Path, file: Path) -> ColumnarTable:
    import pyarrow.ipc

    def open_file() -> tuple[Any, Iterator[Any]]:
        """Schema and batches; a batch is read from disk when its pages are accessed."""
        source = pyarrow.memory_map(str(path))
        if source.read(6) == b"ARROW1":
            content = pyarrow.ipc.open_file(source)
            return content.schema, (content.get_batch(i) for i in range(content.num_record_batches))
        source.seek(max(0, source.size() - len(_STREAM_END)))
        # A file truncated between two batches would otherwise read without an error.
        if source.read() != _STREAM_END:
            raise ValueError("it has no end marker, so it is truncated or still being written")
        source.seek(0)
        content = pyarrow.ipc.open_stream(source)
        return content.schema, _stream(content, source)

    schema, stored = open_file()
    edges = [0, *accumulate(batch.num_rows for batch in stored)]

    def batches(start: int, stop: int) -> Iterator[Any]:
        return _cut(file, open_file()[1], 0, start, stop)

    return ColumnarTable(schema, edges[-1], edges[:-1] or [0], batches)


def _stream(content: Any, source: Any) -> Iterator[Any]:
    yield from content
    if source.tell() != source.size():
        raise ValueError(f"it has an end marker at byte {source.tell()}, before its end")


def _cut(file: Path, batches: Iterator[Any], at: int, start: int, stop: int) -> Iterator[Any]:
    """Rows [start, stop) of `batches`, whose first row has number `at`."""
    while at < stop:
        with _as_data_error(file):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"it ends at row {at}, expected rows up to {stop}")
            first, last = max(start - at, 0), min(stop - at, batch.num_rows)
            pieces = [batch.slice(i, min(BATCH, last - i)) for i in range(first, last, BATCH)]
            if file_type(file).content != ".parquet":
                _check_buffers(pieces)
        at += batch.num_rows
        yield from pieces


def _check_buffers(batches: list[Any]) -> None:
    """Validates offsets of Arrow buffers, which are used directly from disk: an invalid one would crash the process.
    Invalid UTF-8 is reported later, when the row is decoded."""
    for batch in batches:
        for column in batch.columns:
            column.view(as_bytes(column.type)).validate(full=True)


def as_bytes(kind: Any) -> Any:
    """The Arrow type with bytes instead of text and integers instead of dates, as which any content can be viewed."""
    import pyarrow
    import pyarrow.types as types

    if types.is_struct(kind):
        return pyarrow.struct([(field.name, as_bytes(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(as_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(as_bytes(kind.value_type))
    # Dates out of Python's range cannot be converted; their integers can.
    if types.is_timestamp(kind) or types.is_date64(kind):
        return pyarrow.int64()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    return pyarrow.binary() if types.is_string(kind) else kind


@cache
def open_hub(hub: str, subset: str, split: str, revision: str) -> ColumnarTable:
    """A dataset loaded with `datasets.load_dataset`, kept open in this process; raises DataError if that fails. An
    empty `subset` or `revision` selects the default."""
    import datasets

    try:
        dataset = datasets.load_dataset(hub, subset or None, split=split, revision=revision or None)
    except Exception as error:  # many types: no network, no such dataset, no such split
        if files := _downloaded(hub, subset, split, revision, error):
            return ColumnarTable(None, 0, [], lambda start, stop: iter(()), files=files)
        raise DataError(
            f"the dataset cannot be loaded: {error}",
            f"{hub}, subset {subset or '(default)'}, split {split}",
            "check the names and the network, or download the files and set `path`",
        ) from error
    arrow = dataset.with_format("arrow")

    def batches(start: int, stop: int) -> Iterator[Any]:
        for i in range(start, stop, BATCH):
            yield from arrow[i : min(i + BATCH, stop)].to_batches()

    # Without its own files (a part of a split), the dataset is read through its index, from any row.
    cuts = list(range(0, len(dataset), BATCH)) or [0]
    files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)
    if sum(open_table(file).rows for file in files) != len(dataset):  # a part of a split, such as train[:10%]
        files = ()
    return ColumnarTable(dataset.features.arrow_schema, len(dataset), cuts, batches, dataset._fingerprint, files)


def _downloaded(hub: str, subset: str, split: str, revision: str, error: Exception) -> tuple[Path, ...]:
    """The files of a dataset whose rows `datasets` refuses because their fields differ; none for other errors."""
    import datasets
    from datasets.utils.file_utils import cached_path

    if not isinstance(error, datasets.exceptions.DatasetGenerationError):
        return ()
    builder = datasets.load_dataset_builder(hub, subset or None, revision=revision or None)
    names: list[str] = list((builder.config.data_files or {}).get(split, ()))
    if not names or any(file_type(Path(name)).content not in (".jsonl", ".ndjson", ".json", ".csv") for name in names):
        return ()
    # In the cache of the hub, because `datasets` downloads before it reads.
    return tuple(Path(cached_path(name)) for name in names)
