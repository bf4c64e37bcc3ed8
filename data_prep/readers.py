"""Input units: sources split so that any process can read any part, and the rows of a unit."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import orjson

from data_prep.build_config import SourceConfig
from data_prep.columnar import ColumnarTable, as_bytes, open_hub, open_table
from data_prep.csv_files import count_csv, csv_records
from data_prep.forms import NOT_UTF8, InputRow, Unreadable, check_schema
from data_prep.input_bytes import (
    MOST_LINE,
    file_type,
    is_columnar,
    is_streamed,
    open_utf8,
    read_line,
    reading,
    skip,
    stamp,
)
from data_prep.json_files import json_elements, read_elements
from data_prep.sources import files
from sdlm_megatron.errors import DataError

LINES, ROWS = "lines", "rows"
END = 1 << 62  # `stop` of a unit of lines whose size is not known, because it is compressed
_ZEROS, _LONG = bytes(ord("0") if chr(c).isdecimal() else c for c in range(256)), b"0" * 19
"""Table that makes every digit a zero; the digits of -2^63 - 1."""
COMPRESSED_TO = 3  # typical bytes of text per byte of a compressed file, for estimates


@dataclass(frozen=True)
class InputUnit:
    """A range of rows of one file or hub dataset."""

    source: int  # index in the list of sources
    file: str
    """The file. For a hub dataset: its file in the cache of `datasets`, so that not every process queries the hub; or
    the dataset's name if the split is a part of one (`train[:10%]`)."""
    kind: str
    """LINES: start and stop are byte offsets, and a line belongs to the unit in which it begins. ROWS: row numbers."""
    start: int
    stop: int
    stamp: str  # of the content: of the file, as `input_bytes.stamp` says, or the fingerprint of the hub dataset
    streamed: bool = False
    """Whether the file is compressed or not UTF-8; then it is one unit, and offsets are those of its decoded text."""
    first_byte: int = 0  # of the elements of a JSON list, in its decoded text
    last_byte: int = 0  # offset behind them; 0: not a JSON list

    def estimated_rows(self, line_bytes: float = 2500) -> int:
        """Rows of the unit; for lines, whose number is not known before they are read, from their mean length."""
        if self.kind != LINES:
            return self.stop - self.start
        size = COMPRESSED_TO * int(self.stamp.split()[0]) if self.stop == END else self.stop - self.start
        return max(1, round(size / line_bytes))


def plan_units(sources: list[SourceConfig], *, unit_rows: int = 8192, unit_bytes: int = 32 << 20) -> list[InputUnit]:
    """Splits sources into units, in the order of their rows.

    Fast: columnar files are opened, lines are neither parsed nor (without `limit`) counted; only a .json file that
    contains one list is read completely.

    Args:
        unit_rows: approximate rows per unit of a columnar file: at most twice as many, split at row groups where
            possible; a larger row group is split into at most 16 units.
        unit_bytes: bytes per unit of lines.

    Raises:
        DataError: a source is missing, of another type than its name says, or lacks columns of its format.
    """
    units: list[InputUnit] = []
    for number, source in enumerate(sources):
        hub = _open_hub(source) if source.hub else None
        if hub and not hub.files:
            where = f"{source.hub}, split {source.split}"
            units += _plan_table(number, source, source.hub, hub, where, unit_rows, source.limit)[0]
            continue
        left = source.limit
        for file in hub.files if hub else files(source):
            if is_columnar(file):
                table = open_table(file)
                new, rows = _plan_table(number, source, str(file), table, str(file), unit_rows, left)
            else:
                new, rows = _plan_text(number, source, file, unit_bytes, left)
            units += new
            if source.limit and (left := left - rows) <= 0:
                break
    return units


def _plan_text(
    number: int, source: SourceConfig, file: Path, unit_bytes: int, limit: int
) -> tuple[list[InputUnit], int]:
    """Units of a file of text, and their rows (of lines counted only with a limit, otherwise 0)."""
    mark, streamed = stamp(file), is_streamed(file, source.encoding)
    if file_type(file).content == ".csv":
        rows = min(count_csv(file, source.encoding, mark), limit or END)
        return [InputUnit(number, str(file), ROWS, 0, rows, mark, streamed)] if rows else [], rows
    if (elements := json_elements(file, source.encoding, mark)) is None:
        return _plan_lines(number, source, file, unit_bytes, limit)
    rows = min(elements.rows, limit or END)
    pieces = [elements.pieces[0]]
    for row, at in elements.pieces[1:]:
        if at - pieces[-1][1] >= unit_bytes and row < rows and not streamed:
            pieces.append((row, at))
    ends = [(row, at - 1) for row, at in pieces[1:]] + [(rows, elements.stop)]  # without the comma
    units = [
        InputUnit(number, str(file), ROWS, row, stop, mark, streamed, at, end)
        for (row, at), (stop, end) in zip(pieces, ends, strict=True)
        if row < stop
    ]
    return units, rows


def _open_hub(source: SourceConfig) -> ColumnarTable:
    return open_hub(source.hub, source.subset, source.split, source.revision)


def _plan_table(
    number: int, source: SourceConfig, file: str, table: ColumnarTable, where: str, unit_rows: int, limit: int
) -> tuple[list[InputUnit], int]:
    """Units of a columnar file, and their rows."""
    check_schema(table.schema, source, where)
    rows = min(table.rows, limit or END)
    mark = table.stamp or stamp(Path(file))
    units, start = [], 0
    for edge in [*(cut for cut in table.cuts[1:] if cut < rows), rows]:
        size = edge - start
        if size >= unit_rows or (edge == rows and size):
            # A large row group is split as well, although each unit then decodes the rows before it in the group.
            pieces = min(-(-size // (2 * unit_rows)), 16)
            bounds = [start + size * i // pieces for i in range(pieces + 1)]
            units += [InputUnit(number, file, ROWS, a, b, mark) for a, b in pairwise(bounds)]
            start = edge
    return units, rows


def _plan_lines(
    number: int, source: SourceConfig, file: Path, unit_bytes: int, limit: int
) -> tuple[list[InputUnit], int]:
    """Units of a file of lines, and their rows (counted only with a limit, otherwise 0)."""
    mark, streamed, rows = stamp(file), is_streamed(file, source.encoding), 0
    size = END if streamed else int(mark.split()[0])
    if limit:
        size = 0
        with reading(file), open_utf8(file, source.encoding) as lines:
            while line := (read := read_line(lines))[0]:
                size += read[1]
                rows += not line.isspace()
                if rows == limit:
                    break
    if streamed:
        return [InputUnit(number, str(file), LINES, 0, size, mark, True)] if size else [], rows
    starts = range(0, size, unit_bytes)
    return [InputUnit(number, str(file), LINES, at, min(at + unit_bytes, size), mark) for at in starts], rows


def of_table(unit: InputUnit, source: SourceConfig) -> bool:
    """Whether a unit is a part of a columnar file or hub dataset."""
    return unit.file == source.hub or is_columnar(Path(unit.file))


def read_unit(unit: InputUnit, source: SourceConfig) -> Iterator[InputRow]:
    """The rows of a unit, in order.

    A line that is not JSON, or a row that cannot be decoded, is returned as an `Unreadable`; blank lines are skipped.

    Raises:
        DataError: the file is damaged or was changed after it was planned.
    """
    if source.hub and unit.file == source.hub:
        table = _open_hub(source)
        _check_stamp(unit, table.stamp)
        yield from _table_rows(unit, table)
        return
    file = Path(unit.file)
    _check_stamp(unit, stamp(file))
    if unit.kind == LINES:
        yield from _line_rows(unit, source.encoding)
    elif file_type(file).content == ".csv":
        yield from _csv_rows(unit, source.encoding)
    elif unit.last_byte:
        with reading(file), open_utf8(file, source.encoding) as content:
            elements = read_elements(content, unit.first_byte, unit.last_byte, file)
            for place in range(unit.start, unit.stop):
                yield InputRow(place, _parse(next(elements, b""), "row"))
    else:
        yield from _table_rows(unit, open_table(file))


def _check_stamp(unit: InputUnit, now: str) -> None:
    if now != unit.stamp:
        raise DataError("the source changed after the build began", unit.file, "start a new build in another folder")


def _line_rows(unit: InputUnit, encoding: str) -> Iterator[InputRow]:
    # Not through `datasets`: its reader requires one schema for all lines and fails completely on an invalid line.
    with reading(Path(unit.file)), open_utf8(Path(unit.file), encoding) as lines:
        at = max(unit.start - 1, 0)  # one byte earlier: if it is a line break, a line begins at unit.start
        skip(lines, at)
        if unit.start:
            at += read_line(lines)[1]  # the rest of a line of the previous unit, or its line break
        place = 0
        while at < unit.stop:
            line, size = read_line(lines)
            if not line and unit.stop == END:
                break
            if not line:
                raise DataError("the file ends early: it changed while it was read", unit.file, "start again")
            at += size
            place += 1
            if not line.isspace():
                yield InputRow(place, _parse(line))


def _csv_rows(unit: InputUnit, encoding: str) -> Iterator[InputRow]:
    records = csv_records(Path(unit.file), encoding)
    header = next(records)
    for place, record in enumerate(islice(records, unit.stop)):
        row: Any = dict(zip(header, record, strict=False))
        if len(record) != len(header):
            row = Unreadable("the row does not have one cell per column", ",".join(record))
        yield InputRow(place, row)


def _parse(line: bytes, kind: str = "line") -> Any:
    if len(line) > MOST_LINE:
        start = line[:1000].decode("utf-8", "backslashreplace")
        return Unreadable(f"the {kind} has more than {MOST_LINE:,} bytes", start)
    # orjson makes a float of an integer beyond 64 bits, and a regular expression takes longer than both parsers
    if _LONG not in line.translate(_ZEROS):
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass  # orjson is stricter than `json` (NaN, lone surrogates), which decides
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        what = NOT_UTF8 if isinstance(error, UnicodeDecodeError) else "is not JSON"
        return Unreadable(f"the {kind} {what}: {error}", line.decode("utf-8", errors="backslashreplace").rstrip())


def count_lines(unit: InputUnit) -> int:
    """Number of lines that begin in a unit of lines, including blank ones; 0 if no unit of the file follows."""
    if unit.streamed:
        return 0
    with open(unit.file, "rb") as file:
        file.seek(max(unit.start - 1, 0))
        left, breaks = unit.stop - 1 - max(unit.start - 1, 0), 0
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            breaks += block.count(b"\n")
            left -= len(block)
    return breaks + (unit.start == 0 and unit.stop > 0)


def _table_rows(unit: InputUnit, table: ColumnarTable) -> Iterator[InputRow]:
    place = unit.start
    for batch in table.batches(unit.start, unit.stop):
        yield from map(InputRow, range(place, place + batch.num_rows), _contents(batch))
        place += batch.num_rows


def _contents(batch: Any) -> list[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a date out of range
        if batch.num_rows == 1:
            reason = f"the row cannot be decoded: {error}"
            return [Unreadable(reason, str({name: _raw(batch.column(name)) for name in batch.schema.names}))]
    # One row of the batch is invalid: decode row by row, so that only that one is rejected.
    return [_contents(batch.slice(i, 1))[0] for i in range(batch.num_rows)]


def _raw(column: Any) -> Any:
    """The single value of a column; text that cannot be decoded as bytes."""
    try:
        return column.to_pylist()[0]
    except (ValueError, OverflowError):
        return column.view(as_bytes(column.type)).to_pylist()[0]


def where(unit: InputUnit, place: int, lines_before: int) -> str:
    """Position of a row for messages: "FILE, line N" (from 1) or "FILE, row N" (from 0).

    `place` is `InputRow.place`; `lines_before` is the number of lines of the file in the units before this one.
    """
    return f"{unit.file}, line {lines_before + place}" if unit.kind == LINES else f"{unit.file}, row {place}"


def where_in_file(unit: InputUnit, place: int) -> str:
    """The same; counts the lines before the unit, which takes a pass over them."""
    return where(unit, place, count_lines(replace(unit, start=0, stop=unit.start)) if unit.kind == LINES else 0)
