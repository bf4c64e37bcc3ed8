"""Sources cut into units that any process can read in any order, and the rows of a unit."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from data_prep.build_config import SourceConfig
from data_prep.columnar import Table, as_bytes, open_hub, open_table
from data_prep.sources import InputRow, Unreadable, check_schema, files, is_lines, read_json_list
from sdlm_megatron.errors import DataError

LINES, ROWS = "lines", "rows"


@dataclass(frozen=True)
class Unit:
    """A stretch of rows of one file or hub dataset."""

    source: int
    """Index in the list of sources."""
    file: str
    """The file. Of a hub dataset: the file in the cache of `datasets`, so that many processes do not all ask the
    hub; or, if the split is a part of one (`train[:10%]`), the dataset's name."""
    kind: str
    """"lines": start and stop are bytes, and a line belongs to the unit in which it begins. "rows": they are row
    numbers."""
    start: int
    stop: int
    stamp: str
    """Size and time of change of the file, or the fingerprint of the hub dataset."""


def plan(sources: list[SourceConfig], *, unit_rows: int = 8192, unit_bytes: int = 32 << 20) -> list[Unit]:
    """Cuts sources into units, in the order of their rows.

    Cheap: columnar files are opened, lines are neither parsed nor (without `limit`) counted; only a .json file
    that is one list is read whole.

    Args:
        sources: as `sources.expand` returns them.
        unit_rows: about the rows of a unit of a columnar file: up to twice as many, cut where its row groups
            are; a row group larger than that is cut into at most 16.
        unit_bytes: bytes of a unit of lines.

    Raises:
        DataError: a source cannot be used: no such file, not the kind it seems to be, other columns than its
            format has.
    """
    units: list[Unit] = []
    for number, source in enumerate(sources):
        hub = _open_hub(source) if source.hub else None
        if hub and not hub.files:
            where = f"{source.hub}, split {source.split}"
            units += _plan_table(number, source, source.hub, hub, where, unit_rows, source.limit)[0]
            continue
        left = source.limit
        for file in hub.files if hub else files(source):
            if file.suffix in (".parquet", ".arrow"):
                table = open_table(file)
                found, rows = _plan_table(number, source, str(file), table, str(file), unit_rows, left)
            elif is_lines(file):
                found, rows = _plan_lines(number, file, unit_bytes, left)
            else:
                rows = _limited(len(read_json_list(file)), left)
                found = [Unit(number, str(file), ROWS, 0, rows, _stamp(file))]
            units += found
            if source.limit and (left := left - rows) <= 0:
                break
    return units


def _limited(rows: int, limit: int) -> int:
    return min(rows, limit) if limit else rows


def _stamp(file: Path) -> str:
    try:
        state = file.stat()
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", str(file)) from None
    return f"{state.st_size} {state.st_mtime_ns}"


def _open_hub(source: SourceConfig) -> Table:
    return open_hub(source.hub, source.subset, source.split, source.revision)


def _plan_table(
    number: int, source: SourceConfig, file: str, table: Table, where: str, unit_rows: int, limit: int
) -> tuple[list[Unit], int]:
    """Units of a columnar file, and the rows in them."""
    check_schema(table.schema, source.format, where)
    rows = _limited(table.rows, limit)
    stamp = table.stamp or _stamp(Path(file))
    units, start = [], 0
    for edge in [*(cut for cut in table.cuts[1:] if cut < rows), rows]:
        size = edge - start
        if size >= unit_rows or (edge == rows and size):
            # a large row group is cut all the same, but each piece has to decode those before it
            pieces = min(-(-size // (2 * unit_rows)), 16)
            bounds = [start + size * i // pieces for i in range(pieces + 1)]
            units += [Unit(number, file, ROWS, a, b, stamp) for a, b in pairwise(bounds)]
            start = edge
    return units, rows


def _plan_lines(number: int, file: Path, unit_bytes: int, limit: int) -> tuple[list[Unit], int]:
    """Units of a file of lines; and the rows in them, counted only if there is a limit."""
    stamp = _stamp(file)
    size, rows = int(stamp.split()[0]), 0
    if limit:
        size = 0
        with open(file, "rb") as lines:
            for line in lines:
                size += len(line)
                rows += not line.isspace()
                if rows == limit:
                    break
    starts = range(0, size, unit_bytes)
    return [Unit(number, str(file), LINES, at, min(at + unit_bytes, size), stamp) for at in starts], rows


def read_unit(unit: Unit, source: SourceConfig) -> Iterator[InputRow]:
    """The rows of a unit, in order. A line that is no JSON, and a row that cannot be decoded, is a row too: an
    `Unreadable`; blank lines are not.

    In content that `conversation` does not look at, a whole number beyond 64 bits may appear as a float.

    Raises:
        DataError: the file is damaged, or another than when it was planned.
    """
    if source.hub and unit.file == source.hub:
        table = _open_hub(source)
        _check_stamp(unit, table.stamp)
        yield from _table_rows(unit, table)
        return
    file = Path(unit.file)
    _check_stamp(unit, _stamp(file))
    if unit.kind == LINES:
        yield from _line_rows(unit)
    elif file.suffix == ".json":
        for i, row in enumerate(read_json_list(file)[unit.start : unit.stop], unit.start):
            yield InputRow(i, row)
    else:
        yield from _table_rows(unit, open_table(file))


def _check_stamp(unit: Unit, stamp: str) -> None:
    if stamp != unit.stamp:
        raise DataError("the source changed after the build began", unit.file, "start the build anew in another folder")


def _line_rows(unit: Unit) -> Iterator[InputRow]:
    # Not through `datasets`: its reader wants one schema for all lines and fails as a whole on a bad one.
    with open(unit.file, "rb", buffering=1 << 20) as lines:
        at = max(unit.start - 1, 0)
        lines.seek(at)
        if unit.start:
            at += len(lines.readline())  # the rest of a line of the unit before, or its line break
        place = 0
        while at < unit.stop:
            line = lines.readline()
            if not line:
                raise DataError("the file ends early: it changed while it was read", unit.file)
            at += len(line)
            place += 1
            if not line.isspace():
                yield InputRow(place, _parse(line))


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass  # it is stricter than `json`, which has the last word
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        return Unreadable(f"the line is not JSON: {error}", line.decode("utf-8", errors="backslashreplace").rstrip())


def count_lines(unit: Unit) -> int:
    """How many lines of the file begin in a unit of lines, blank ones too."""
    with open(unit.file, "rb") as file:
        file.seek(max(unit.start - 1, 0))
        left, breaks = unit.stop - 1 - max(unit.start - 1, 0), 0
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            breaks += block.count(b"\n")
            left -= len(block)
    return breaks + (unit.start == 0 and unit.stop > 0)


def _table_rows(unit: Unit, table: Table) -> Iterator[InputRow]:
    place = unit.start
    for batch in table.batches(unit.start, unit.stop):
        yield from map(InputRow, range(place, place + batch.num_rows), _contents(batch))
        place += batch.num_rows


def _contents(batch: Any) -> list[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date out of range
        if batch.num_rows == 1:
            reason = f"the row cannot be decoded: {error}"
            return [Unreadable(reason, str({name: _raw(batch.column(name)) for name in batch.schema.names}))]
    return [_contents(batch.slice(i, 1))[0] for i in range(batch.num_rows)]


def _raw(column: Any) -> Any:
    """The one value of a column; text that cannot be decoded as bytes."""
    try:
        return column.to_pylist()[0]
    except (ValueError, OverflowError):
        return column.view(as_bytes(column.type)).to_pylist()[0]


def where(unit: Unit, place: int, lines_before: int) -> str:
    """A row's place for messages: "FILE, line N" (from 1) or "FILE, row N" (from 0).

    Args:
        unit: the row's unit.
        place: `InputRow.place`.
        lines_before: lines of the file before a unit of lines: the sum of `count_lines` of its earlier units.
    """
    return f"{unit.file}, line {lines_before + place}" if unit.kind == LINES else f"{unit.file}, row {place}"
