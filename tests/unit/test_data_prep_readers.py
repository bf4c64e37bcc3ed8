"""Readers: rows do not depend on the unit size, lines are counted, damaged files are reported."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_prep import input_bytes, readers
from data_prep.build_config import SourceConfig
from data_prep.forms import FormReader, InputRow, Unreadable
from data_prep.readers import LINES, ROWS, InputUnit, count_lines, plan_units, read_unit, where
from data_prep.sources import count
from sdlm_megatron.errors import DataError
from tests.fixtures.hub_sets import sciriff, tulu

pytestmark = pytest.mark.usefixtures("datasets_cache")
READERS = {name: FormReader(SourceConfig(format=name)) for name in ("messages", "query_response")}


def row(i: int) -> dict[str, Any]:
    return {"query": f"q{i}", "response": "é🙂" * (i % 7), "n": i, "meta": {"x": ["a", None], "y": i / 3}}


def source_of(path: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(name="s", format="query_response", path=str(path), **settings)


def read_all(source: SourceConfig, **sizes: int) -> list[InputRow]:
    return [input_row for unit in plan_units([source], **sizes) for input_row in read_unit(unit, source)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"".join(json.dumps(value).encode() + b"\n" for value in rows))
    return path


def write_parquet(path: Path, rows: list[Any], **settings: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return path


def write_arrow(path: Path, rows: list[Any], form: Callable[..., Any] = pyarrow.ipc.new_stream) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, form(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


# -------------------------------------------------------------------------------------------- lines
LINE_FILES = {
    "usual": b'{"a": 1}\n{"a": 2}\n{"a": 3}\n',
    "no break at the end": b'{"a": 1}\n{"a": 2}',
    "blank lines": b'\n\n{"a": 1}\n \t\r\n\n{"a": 2}\n\n\n',
    "only blank lines": b"\n \n\n",
    "CRLF and a byte order mark": b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n',
    "other line separators inside": '{"a": "\u2028\x85\x0b"}\r{"a": 2}\n{"a": 3}\n'.encode(),
    "one long line": b'{"a": "' + b"x" * 300 + b'"}',
    "empty": b"",
}


@pytest.mark.parametrize("name", LINE_FILES)
@pytest.mark.parametrize("unit_bytes", [1, 2, 5, 9, 64, 1 << 20])
def test_lines_do_not_depend_on_where_units_are_cut(name: str, unit_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE_FILES[name])
    source = source_of(path)
    before, read_rows = 0, []
    for unit in plan_units([source], unit_bytes=unit_bytes):
        assert unit.kind == LINES
        assert unit.stop - unit.start <= unit_bytes
        read_rows += [(where(unit, got.place, before), got.content) for got in read_unit(unit, source)]
        before += count_lines(unit)
    lines = LINE_FILES[name].split(b"\n")
    expected = [(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    assert [place for place, _ in read_rows] == [place for place, _ in expected]
    assert before == len(lines) - (not lines[-1])
    for (_, content), (_, line) in zip(read_rows, expected, strict=True):
        if not isinstance(content, Unreadable):
            assert content == json.loads(line)
    bad = sum(isinstance(content, Unreadable) for _, content in read_rows)
    assert bad == (name == "other line separators inside"), "two objects on one line"


JUDGED = [
    b'{"a": NaN, "b": -Infinity}',
    b'{"a": "\\ud800"}',
    b'{"a": "\xed\xa0\x80"}',
    b'{"a": "\x00"}',
    b'{"a": "\\u0000"}',
    b'{"a": 1, "a": 2}',
    b'{"a": 1e400}',
    b'{"a": 18446744073709551615, "b": -9223372036854775808}',
    b'{"a": 18446744073709551616}',
    b'{"a": {"arguments": {"n": [100000000000000000000, -9223372036854775809]}}}',
    b'{"a": 0.1, "b": 1E5, "c": -0.0, "d": 5e-324}',
    b'{"a": 01}',
    b'{"a": "\xff\xfe"}',
    b'{"a": "tab\there"}',
    b"{'a': 1}",
    b'{"a": 1,}',
    b'{"a": 1} x',
    b"[" * 100_000,
    b"[" * 2000 + b"]" * 2000,
    b'"text"',
    b"null",
    b"nul",
    b'\xef\xbb\xbf{"a": 1}',
    b'{"a": "\\ud83d\\ude42"}',
]


@pytest.mark.parametrize("line", JUDGED, ids=range(len(JUDGED)))
def test_line_is_read_like_json_loads(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n")
    [input_row] = read_all(source_of(path))
    try:
        expected = json.loads(line)
    except (ValueError, RecursionError) as error:
        assert isinstance(input_row.content, Unreadable)
        what = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        assert input_row.content.reason == f"the line is not {what}: {error}"
        assert input_row.content.line == line.decode(errors="backslashreplace").rstrip()
    else:
        assert repr(input_row.content) == repr(expected)  # repr: NaN is not equal to itself


@pytest.mark.parametrize("limit", [1, 3, 4, 9])
def test_limit_counts_rows_and_not_lines(limit: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"n": 0}\n\n{"n": 1}\n\n{"n": 2}\n\n')
    write_lines(tmp_path / "b.jsonl", [{"n": 3}, {"n": 4}])
    assert count(source_of(tmp_path, limit=limit)) == min(limit, 5)
    read_rows = read_all(source_of(tmp_path, limit=limit), unit_bytes=4)
    assert [got.content["n"] for got in read_rows] == list(range(min(limit, 5)))


# ------------------------------------------------------------------------------------------ columns
TABLES: dict[str, Callable[[Path, list[Any]], Path]] = {
    "small row groups.parquet": lambda path, rows: write_parquet(path, rows, row_group_size=5),
    "one row group.parquet": write_parquet,
    "stream.arrow": write_arrow,
    "file.arrow": lambda path, rows: write_arrow(path, rows, pyarrow.ipc.new_file),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("unit_rows", [1, 4, 7, 13, 8192])
@pytest.mark.parametrize("limit", [0, 1, 23, 99])
def test_columns_do_not_depend_on_where_units_are_cut(kind: str, unit_rows: int, limit: int, tmp_path: Path) -> None:
    rows = [row(i) for i in range(40)]
    source = source_of(TABLES[kind](tmp_path / kind, rows), limit=limit)
    units = plan_units([source], unit_rows=unit_rows)
    expected = rows[:limit] if limit else rows
    assert units[0].start == 0
    assert units[-1].stop == len(expected)
    assert all(earlier.stop == later.start for earlier, later in pairwise(units))
    assert all(unit.stop - unit.start <= max(2 * unit_rows, 40 / 16 + 1) for unit in units)
    read_rows = [got for unit in units for got in read_unit(unit, source)]
    assert [got.content for got in read_rows] == expected
    assert [got.place for got in read_rows] == list(range(len(expected)))
    assert where(units[-1], read_rows[-1].place, 0) == f"{source.path}, row {len(expected) - 1}"


def test_large_batches_are_read_in_parts(tmp_path: Path) -> None:
    rows = [{"query": str(i), "response": ""} for i in range(5000)]
    source = source_of(write_parquet(tmp_path / "rows.parquet", rows))
    assert [got.content for got in read_all(source, unit_rows=2000)] == rows


def test_other_columns_may_be_of_any_type(tmp_path: Path) -> None:
    n = 20
    table = pyarrow.table(
        {
            "query": pyarrow.array(["a", "b"] * 10).dictionary_encode(),
            "response": pyarrow.array([f"é{i}" for i in range(n)], pyarrow.large_string()),
            "view": pyarrow.array(["x" * i for i in range(n)], pyarrow.string_view()),
            "bytes": pyarrow.array([b"\xff", None] * 10),
            "when": pyarrow.array([datetime(2020, 1, 1), None] * 10),
            "map": pyarrow.array([[("k", 1)]] * n, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "vector": pyarrow.array([[1.0, 2.0]] * n, pyarrow.list_(pyarrow.float32(), 2)),
            "price": pyarrow.array([Decimal("1.50")] * n),
            "nothing": pyarrow.nulls(n),
            "deep": pyarrow.array([[{"a": [{"b": None}, {"b": "é"}]}, None], None] * 10),
        }
    )
    paths = [tmp_path / name for name in ("rows.parquet", "stream.arrow", "zstd.arrow", "file.arrow")]
    pyarrow.parquet.write_table(table, paths[0])
    for path, form, compression in (
        (paths[1], pyarrow.ipc.new_stream, None),
        (paths[2], pyarrow.ipc.new_stream, "zstd"),
        (paths[3], pyarrow.ipc.new_file, None),
    ):
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with pyarrow.OSFile(str(path), "wb") as file, form(file, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=7)
    for path in paths:
        assert [got.content for got in read_all(source_of(path), unit_rows=3)] == table.to_pylist()


def test_empty_columnar_file_has_no_units(tmp_path: Path) -> None:
    schema = pyarrow.schema([("query", pyarrow.string()), ("response", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "rows.parquet")
    assert plan_units([source_of(tmp_path / "rows.parquet")]) == []


def test_rows_with_null_columns_are_rejected(tmp_path: Path) -> None:
    rows = [row(0), {**row(1), "query": None}, {**row(2), "response": None}]
    read_rows = read_all(source_of(write_parquet(tmp_path / "rows.parquet", rows)))
    assert [got.content for got in read_rows] == rows
    READERS["query_response"].read(read_rows[0].content)
    for got, field in zip(read_rows[1:], ("query", "response"), strict=True):
        with pytest.raises(DataError, match="NoneType") as error:
            READERS["query_response"].read(got.content)
        assert error.value.where == field


def test_undecodable_row_does_not_affect_others(tmp_path: Path) -> None:
    good, bad = b"fine \xc3\xa9", b"bro\xffken"
    turns = [[{"role": b"user", "content": text}] for text in (good, bad, good)]
    kind = pyarrow.list_(pyarrow.struct([("role", pyarrow.binary()), ("content", pyarrow.binary())]))
    text = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    # a reader without validation would return these bytes as text
    column = pyarrow.array(turns, kind)
    names = ["role", "content"]
    values = [pyarrow.Array.from_buffers(pyarrow.string(), 3, column.values.field(i).buffers()) for i in range(2)]
    column = pyarrow.ListArray.from_arrays(column.offsets, pyarrow.StructArray.from_arrays(values, names), text)
    days = pyarrow.array([0, 10**16, 0], pyarrow.timestamp("ms"))  # a year outside Python's range
    table = pyarrow.table({"messages": column, "n": [0, 1, 2], "when": days})
    for path in (tmp_path / "rows.parquet", tmp_path / "rows.arrow"):
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        read_rows = read_all(SourceConfig(name="s", path=str(path)))
        assert [READERS["messages"].read(read_rows[i].content) for i in (0, 2)] == [[("user", "fine é", True)]] * 2
        assert isinstance(read_rows[1].content, Unreadable)
        assert "bro\\xffken" in read_rows[1].content.line
        assert "'n': 1" in read_rows[1].content.line
        with pytest.raises(DataError, match="cannot be decoded"):
            READERS["messages"].read(read_rows[1].content)


# -------------------------------------------------------------------------------------------- units
def test_units_survive_json_and_know_their_source(tmp_path: Path) -> None:
    sources = [
        source_of(write_lines(tmp_path / "a.jsonl", [row(0)])),
        source_of(write_parquet(tmp_path / "b.parquet", [row(1), row(2)])),
        SourceConfig(name="h", format="input_output", path=str(sciriff(tmp_path).folder), subset="4096"),
    ]
    units = plan_units(sources)
    assert [(unit.source, unit.kind) for unit in units] == [(0, LINES), (1, ROWS), (2, ROWS)]
    again = [InputUnit(**json.loads(json.dumps(asdict(unit)))) for unit in units]
    assert again == units == plan_units(sources)
    assert [got.content["n"] for unit in again[:2] for got in read_unit(unit, sources[unit.source])] == [0, 1, 2]


def test_hub_dataset_is_read_from_its_cache_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_set = tulu(tmp_path)
    source = SourceConfig(name="s", hub=str(a_set.folder), limit=5)
    units = plan_units([source], unit_rows=2)
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert [got.content for unit in units for got in read_unit(unit, source)] == a_set.rows[:5]
    assert {Path(unit.file).suffix for unit in units} == {".arrow"}


def test_split_of_a_hub_dataset_is_read_in_units(tmp_path: Path) -> None:
    a_set = tulu(tmp_path)
    source = SourceConfig(name="s", hub=str(a_set.folder), split="train[1:5]", limit=3)
    units = plan_units([source], unit_rows=2)
    assert [got.content for unit in units for got in read_unit(unit, source)] == a_set.rows[1:4]
    assert where(units[-1], 2, 0) == f"{source.hub}, row 2"
    stale = InputUnit(**{**asdict(units[0]), "stamp": "another"})
    with pytest.raises(DataError, match="changed"):
        list(read_unit(stale, source))


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet", "rows.json"])
def test_file_changed_after_planning_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    write = {".jsonl": write_lines, ".parquet": write_parquet}.get(path.suffix)
    if write:
        write(path, [row(0)])
    else:
        path.write_text(json.dumps([row(0)]))
    source = source_of(path)
    [unit] = plan_units([source])
    os.utime(path, ns=(1, 1))
    assert len(list(read_unit(unit, source))) == 1, "a new date is not a change"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="changed") as error:
        list(read_unit(unit, source))
    assert error.value.where == str(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(read_unit(unit, source))


def test_planning_of_line_files_reads_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.truncate(40 << 30)  # sparse file of 40 GB
    units = plan_units([source_of(path)])
    assert len(units) == 40 * 32
    path.unlink()


# -------------------------------------------------------------------------------------------- damage
def mutate(rng: random.Random, content: bytes) -> bytes:
    """Truncates, flips, removes or inserts bytes."""
    data, at = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at : at + rng.choice((1, 1, 4, 50))]
    else:
        data[at:at] = rng.randbytes(rng.choice((1, 4, 30)))
    return bytes(data)


DAMAGED: dict[str, Callable[[Path, list[Any]], Path]] = {
    **TABLES,
    "plain.parquet": lambda path, rows: write_parquet(path, rows, compression="none", use_dictionary=False),
    "checksums.parquet": lambda path, rows: write_parquet(path, rows, write_page_checksum=True),
    "rows.jsonl": write_lines,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_do_not_lose_rows_silently(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    rows = [row(i) for i in range(40)]
    whole = DAMAGED[kind](path, rows).read_bytes()
    source, outcomes = source_of(path), []
    for seed in range(60):
        path.write_bytes(mutate(random.Random(f"{kind} {seed}"), whole))
        try:
            read_rows = read_all(source, unit_rows=8, unit_bytes=500)
        except DataError as error:
            assert str(path) in error.where
            outcomes.append("named")
            continue
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        assert len(read_rows) == (len(lines) if path.suffix == ".jsonl" else len(rows)), seed
        for got in read_rows:
            try:
                READERS["query_response"].read(got.content)
            except DataError as error:
                assert error.what
        outcomes.append("read")
    expected = {"rows.jsonl": {"read"}, "checksums.parquet": {"named"}}.get(kind, {"named", "read"})
    assert set(outcomes) == expected, "the mutations must produce every expected outcome"


def test_contradictory_parquet_footer_raises(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [row(i) for i in range(40)])
    whole, messages = path.read_bytes(), []
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in range(footer, len(whole) - 8):
        if whole[at] == 2 * 40:  # encoding of the number in the footer
            path.write_bytes(whole[:at] + bytes([2 * 39]) + whole[at + 1 :])
            try:
                assert len(read_all(source_of(path))) == 40
            except DataError as error:
                messages.append(error.what)
    assert any("row groups have 40 rows, its footer says 39" in what for what in messages)
    assert any("row groups have 39 rows, its footer says 40" in what for what in messages)


def test_stream_truncated_between_batches_raises(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "rows.arrow", [row(i) for i in range(40)])
    content = path.read_bytes()
    marks = [i for i in range(len(content)) if content.startswith(b"\xff\xff\xff\xff", i)]
    assert len(marks) >= 8, "schema, six batches and end marker"
    for at in marks[1:]:
        path.write_bytes(content[:at])
        with pytest.raises(DataError, match="no end mark"):
            plan_units([source_of(path)])
        path.write_bytes(content[:at] + content[marks[-1] :] * 2)
        if at != marks[-1]:
            with pytest.raises(DataError, match="before its end"):
                plan_units([source_of(path)])


@pytest.mark.parametrize("unit_bytes", [7, 40, 10_000])
def test_too_long_line_is_one_rejected_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    """Only its beginning is held in memory; the lines around it are read."""
    monkeypatch.setattr(readers, "MOST_LINE", 30)
    monkeypatch.setattr(input_bytes, "MOST_LINE", 30)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 500 + b'"}\n{"c": 2}\n' + b"y" * 31)
    source = SourceConfig(name="s", path=str(file), format="messages")
    rows = [row.content for unit in plan_units([source], unit_bytes=unit_bytes) for row in read_unit(unit, source)]
    assert rows[0] == {"a": 1} and rows[2] == {"c": 2} and len(rows) == 4
    assert {row.reason for row in rows[1::2]} == {"the line has more than 30 bytes"}
    limited = plan_units([replace(source, limit=2)], unit_bytes=10_000)
    assert limited[0].stop == 9 + 510
