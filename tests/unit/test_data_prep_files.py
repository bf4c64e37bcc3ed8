"""Files: every type compressed and in capitals, big JSON lists, encodings, folders, globs, changed and hub files."""

import bz2
import codecs
import errno
import gzip
import json
import lzma
import os
import random
import tracemalloc
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from unittest.mock import Mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_prep import build, csv_files, input_bytes, json_files, readers
from data_prep.build_config import SourceConfig
from data_prep.forms import FormReader, Unreadable
from data_prep.input_bytes import stamp
from data_prep.readers import of_table, plan_units, read_unit, where
from data_prep.sources import count, expand, files, unread_files
from sdlm_megatron.errors import DataError
from tests.byte_tokenizer import write_folder

ROWS = [{"query": f'q{i} é "quoted", {{x}}\n\\', "response": f"a{i} 🙂"} for i in range(7)]


def source_of(path: Any, **settings: Any) -> SourceConfig:
    return SourceConfig(**{"name": "s", "format": "query_response", "path": str(path), **settings})


def contents(source: SourceConfig, **sizes: int) -> list[Any]:
    return [row.content for unit in plan_units([source], **sizes) for row in read_unit(unit, source)]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


def table(form: str) -> bytes:
    rows, sink = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    if form == ".parquet":
        pyarrow.parquet.write_table(rows, sink)
    else:
        with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=2)
    return bytes(sink.getvalue())


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "query,response\r\n" + "".join('"{}","{}"\r\n'.format(*(t.replace('"', '""') for t in r.values())) for r in ROWS)
CONTENTS = {
    ".jsonl": LINES.encode(),
    ".ndjson": LINES.encode(),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": CSV.encode(),
    ".parquet": table(".parquet"),
    ".arrow": table(".arrow"),
}
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_type_compressed_and_in_capitals(kind: str, compression: str, tmp_path: Path) -> None:
    for name in (f"rows{kind}{compression}", f"ROWS{kind}{compression}".upper()):
        path = tmp_path / name
        path.write_bytes(COMPRESS[compression](CONTENTS[kind]))
        source = source_of(path)
        assert contents(source, unit_bytes=50, unit_rows=2) == ROWS
        assert contents(replace(source, limit=3), unit_bytes=50, unit_rows=2) == ROWS[:3]
        assert (count(source), count(replace(source, limit=3))) == (7, 3)


@pytest.mark.parametrize("compression", list(COMPRESS)[1:])
def test_damaged_compressed_files_are_named(compression: str, tmp_path: Path) -> None:
    path, whole = tmp_path / f"rows.jsonl{compression}", COMPRESS[compression](LINES.encode() * 50)
    for content in (whole[: len(whole) // 2], whole[:-1], b"", LINES.encode()):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not .*, or damaged") as error:
            contents(source_of(path))
        assert error.value.where == str(path)
    path.write_bytes(whole + whole)  # two members
    assert len(contents(source_of(path))) == 700


def test_a_full_disk_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet.gz"
    path.write_bytes(gzip.compress(table(".parquet")))
    for code in (errno.ENOSPC, errno.EDQUOT):
        full = Mock(flush=Mock(side_effect=OSError(code, "full")))
        monkeypatch.setattr("data_prep.columnar.NamedTemporaryFile", Mock(return_value=full))
        with pytest.raises(DataError, match="the disk is full: .*rows.parquet.gz") as error:
            contents(source_of(path))
        assert error.value.where == gettempdir() and "TMPDIR" in error.value.fix


def test_rows_of_compressed_lines_have_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'\n{"a": 1}\n\nbad\n'))
    [unit] = plan_units([source_of(path)])
    assert [where(unit, row.place, 0) for row in read_unit(unit, source_of(path))] == [
        f"{path}, line 2",
        f"{path}, line 4",
    ]


# ------------------------------------------------------------------------------------------ JSON
PIECES = [
    '"',
    "\\",
    '\\"',
    "\\\\",
    '\\\\"',
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    " ",
    "\n",
    "é",
    "\u2028",
    "\\u005b",
    "x",
    "1",
]


def random_value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(6 if depth < 3 else 4)
    if kind == 0:
        return chance.choice([None, True, 0, -1.5, 10**12])
    if kind < 4:
        return "".join(chance.choices(PIECES, k=chance.randrange(12)))
    values = [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return values if kind == 4 else {f"{i}{chance.choice(PIECES)}": value for i, value in enumerate(values)}


def elements_of(path: Path, unit_bytes: int = 1) -> list[Any]:
    source = source_of(path)
    units = plan_units([source], unit_bytes=unit_bytes)
    assert all(unit.last_byte and first.stop == unit.start for first, unit in pairwise(units))
    rows = [row for unit in units for row in read_unit(unit, source)]
    assert [row.place for row in rows] == list(range(len(rows)))
    return [row.content for row in rows]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
def test_elements_of_a_list_are_those_of_json(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "BLOCK", block)
    chance, path = random.Random(block), tmp_path / "rows.json"
    for i in range(60):
        values = [random_value(chance) for _ in range(chance.randrange(6))]
        text = json.dumps(values, ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, 0, 3]))
        path.write_text(chance.choice(["", "\n ", "\ufeff"]) + text + chance.choice(["", "\n", " \r\n\t"]))
        os.utime(path, ns=(i, i))
        assert elements_of(path) == values, text
        # broken text is an error, or has a row that cannot be read
        at = chance.randrange(len(text))
        broken = text[:at] + chance.choice(PIECES) * chance.randrange(2) + text[at + chance.randrange(3) :]
        path.write_text(broken)
        os.utime(path, ns=(i, 1000 + i))
        try:
            expected = json.loads(broken)
        except ValueError:
            expected = None
        try:
            read_rows = contents(source_of(path))
        except DataError:
            assert not isinstance(expected, list), broken
            continue
        if isinstance(expected, list):
            assert read_rows in (expected, [expected]), broken
        elif expected is None:
            assert any(isinstance(value, Unreadable) for value in read_rows), broken


@pytest.mark.parametrize("unit_bytes", [1, 1000, 5000, 1 << 20])
def test_a_list_is_shared_between_units(unit_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "BLOCK", 100)
    path, rows = tmp_path / "rows.json", ROWS * 40
    path.write_text(json.dumps(rows))
    units = plan_units([source_of(path)], unit_bytes=unit_bytes)
    assert (len(units) > 1) == (unit_bytes < path.stat().st_size)
    assert contents(source_of(path), unit_bytes=unit_bytes) == rows
    assert contents(source_of(path, limit=100), unit_bytes=unit_bytes) == rows[:100]


def test_a_list_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"query": "q", "response": "x" * 1000}] * 40_000))
    assert path.stat().st_size > 40e6
    tracemalloc.start()
    units = plan_units([source_of(path)], unit_bytes=4 << 20)
    assert sum(1 for unit in units for _ in read_unit(unit, source_of(path))) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(units) > 5
    assert peak < 12 << 20


def test_a_huge_element_is_one_rejected_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_files, readers, input_bytes, csv_files):
        monkeypatch.setattr(module, "MOST_LINE", 30)
    monkeypatch.setattr(json_files, "BLOCK", 16)
    for compression, compress in COMPRESS.items():
        path = tmp_path / f"rows.json{compression}"
        path.write_bytes(compress(b'[{"a": 1}, {"b": "' + b"x," * 5000 + b'"}, {"c": 2}]'))
        first, huge, last = contents(source_of(path))
        assert (first, last) == ({"a": 1}, {"c": 2})
        assert huge.reason == "the row has more than 30 bytes" and len(huge.line) == 31
        (tmp_path / f"cell.csv{compression}").write_bytes(compress(b"query,response\na," + b"x" * 5000 + b"\n"))
        with pytest.raises(DataError, match="more than 30 bytes"):
            count(source_of(tmp_path / f"cell.csv{compression}"))


TURN = '{"role": "user", "content": "q"}'
JSON_TEXTS: list[tuple[str, Any]] = [
    ('{"data": [{"query": 1}, {"query": 2}]}', [{"query": 1}, {"query": 2}]),
    ('{\n "rows" :\n [\n{"query": 1}\n]\n}\n', [{"query": 1}]),
    (f'{{"data": [[{TURN}]]}}', [[json.loads(TURN)]]),
    ('{"data": []}', []),
    (f'{{"messages": [{TURN}]}}', [{"messages": [json.loads(TURN)]}]),
    (f'{{"dialog": [{TURN}]}}', [{"dialog": [json.loads(TURN)]}]),
    ('{"texts": ["a", "b"]}', [{"texts": ["a", "b"]}]),
    ('{"messages": [],\n "id": 3}', [{"messages": [], "id": 3}]),
    ('{"data": [{"query": 1}],\n "version": 3}', [{"data": [{"query": 1}], "version": 3}]),
    ('{\n "query": "a",\n "meta": {"x": 1}\n}', [{"query": "a", "meta": {"x": 1}}]),
    ('{"tags": ["a"], "query": 1}\n{"tags": [], "query": 2}', [{"tags": ["a"], "query": 1}, {"tags": [], "query": 2}]),
    ('{"data": [1]}\n{"data": [2]}', [{"data": [1]}, {"data": [2]}]),
    (f"[{TURN}]\n[{TURN}]\n", [[json.loads(TURN)]] * 2),
    ("\ufeff[1, 2]", [1, 2]),
    ("[ ]", []),
    ("[]", []),
    ('{"query": "a"}', [{"query": "a"}]),
    ('\n{"query": {}}\n{"query": {}}\n', [{"query": {}}] * 2),
    ('null\n{"query": "b"}\n', [None, {"query": "b"}]),
    ('[1]\n{"query": "b"}\n', [[1], {"query": "b"}]),
    ('[\n {"query": "a"},\n\n {"query": "b"}\n]\n', [{"query": "a"}, {"query": "b"}]),
]


@pytest.mark.parametrize(("text", "rows"), JSON_TEXTS)
@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_in_an_object_or_over_lines(text: str, rows: list[Any], name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix.replace(".json", "")](text.encode()))
    source = source_of(tmp_path / name)
    assert contents(source) == rows
    assert count(source) == len(rows)
    if name == "x.json":  # no description of ShareGPT files either
        assert expand([replace(source, format="sharegpt")]) == [replace(source, format="sharegpt")]


def test_a_row_of_a_json_file_that_cannot_be_read_is_one_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"query": \n{"query": "b"}\n')
    bad, good = contents(source_of(tmp_path / "x.json"))
    assert isinstance(bad, Unreadable) and good == {"query": "b"} and count(source_of(tmp_path / "x.json")) == 2


@pytest.mark.parametrize(
    "text", ["[1, 2", "[1}", "[1]]", "[1]\n\n]", "{", '{"a": {"b": 1}}', "", '{"a": 1}}\n3', "[\n1]\n2"]
)
def test_text_that_is_not_rows_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match="the file (is not JSON|contains one value)|unreadable") as error:
        if any(isinstance(value, Unreadable) for value in contents(source_of(tmp_path / "x.json"))):
            raise DataError("unreadable", str(tmp_path / "x.json"))
    assert error.value.where == str(tmp_path / "x.json")


def test_jsonl_with_one_value_over_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[:2], indent=2))
    assert contents(source_of(path)) == ROWS[:2]
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert contents(source_of(path)) == ROWS[:1]
    path.write_text('{\n{"a": 1}\n')
    assert [isinstance(row, Unreadable) for row in contents(source_of(path))] == [True, False]


# ----------------------------------------------------------------------------------- encodings, CSV
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030"])
def test_other_encodings(kind: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_bytes(CONTENTS[kind].decode().encode(encoding))
    declared = encoding if encoding == "gb18030" else ""
    assert contents(source_of(path, encoding=declared), unit_bytes=100) == ROWS
    assert contents(source_of(path, encoding=encoding, limit=4), unit_bytes=100) == ROWS[:4]
    path.with_suffix(f"{kind}.xz").write_bytes(lzma.compress(path.read_bytes()))
    assert contents(source_of(path.with_suffix(f"{kind}.xz"), encoding=declared)) == ROWS


def test_invalid_text_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(codecs.BOM_UTF16_LE + '{"a": "\ud800"}\n{"b": 1}\n'.encode("utf-16-le", "surrogatepass"))
    assert contents(source_of(path)) == [{"a": "\ud800"}, {"b": 1}]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="the file is not utf-16") as error:
        contents(source_of(path))
    assert "encoding" in error.value.fix


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'query,response\n"a, ""b""\n\nc",\n\nonly one\nx,y,z\n"\xff",b')
    rows = contents(source_of(path))
    assert rows[0] == {"query": 'a, "b"\n\nc', "response": ""}
    assert [row.line for row in rows[1:3]] == ["only one", "x,y,z"]
    assert rows[3] == {"query": "\udcff", "response": "b"}
    for content, what in (
        (b"", "no line with the names"),
        (b"a,a\n1,2", "two columns are named 'a'"),
        (b"a,\n1,2", "a column has no name"),
        (b"a;b\n1;2", "not separated by commas"),
        (b'a,b\n"x,y\nz', "unexpected end of data"),
        (b'a,b\n"x"y,z', "expected after"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=what) as error:
            contents(source_of(path))
        assert str(path) in error.value.where


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({"": None, "0": 0, " 1": 1, "true": True, "FALSE": False, "no": "no"}, {"columns": {"weight": "flag"}}),
        ({"": None, "True": True, "false": False, "1": 1}, {"columns": {"label": "flag"}, "preference": "chosen"}),
    ],
)
def test_flags_in_csv_are_those_of_json(values: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("query,response,flag\n" + "".join(f"q,a,{text}\n" for text in values))
    rows = [{"query": "q", "response": "a", "flag": value} for value in values.values()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcomes = []
    for name in ("rows.csv", "rows.jsonl"):
        source = source_of(tmp_path / name, **settings)
        outcomes.append([])
        for row in contents(source):
            try:
                outcomes[-1].append(FormReader(source).read(row))
            except DataError as error:
                outcomes[-1].append(error.what)
    assert outcomes[0] == outcomes[1] and len({str(outcome) for outcome in outcomes[0]}) == 3


# ------------------------------------------------------------------------------------------ folders
def test_folders_globs_and_several_paths(tmp_path: Path) -> None:
    names = ("b.jsonl", "sub/A.JSONL.gz", "sub/deep/c.csv", "notes.txt", "sub/old.zip", ".cache/x.jsonl", "README.md")
    for i, name in enumerate(names):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"query,response\n{i},a\n" if ".csv" in name else json.dumps({"query": str(i), "response": "a"}) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    folder = source_of(tmp_path / "set")
    assert [row["query"] for row in contents(folder)] == ["0", "1", "2"]
    assert [str(file.relative_to(tmp_path / "set")) for file in unread_files(folder)] == ["notes.txt", "sub/old.zip"]
    assert [row["query"] for row in contents(source_of(tmp_path / "set/**/*.[cj]s*"))] == ["0", "2"]
    assert [row["query"] for row in contents(source_of(tmp_path / "set/s*"))] == ["1", "2"]
    several = source_of("", paths=[str(tmp_path / "set/sub/deep"), str(tmp_path / "set/b.jsonl")])
    assert [row["query"] for row in contents(several)] == ["2", "0"]
    assert (count(several), unread_files(several)) == (2, [])
    several.paths.append(str(tmp_path / "set/*.jsonl"))
    with pytest.raises(DataError, match="a file is named twice"):
        files(several)
    with pytest.raises(DataError, match="no file matches"):
        files(source_of(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match="unsupported file type"):
        files(source_of(tmp_path / "set/*"))
    (tmp_path / "x[1].jsonl").write_text("{}\n")
    assert len(files(source_of(tmp_path / "x[1].jsonl"))) == 1


def test_other_splits_of_a_folder_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "rows.jsonl").write_text(f'{{"query": "{split}", "response": "a"}}\n')
    assert [row["query"] for row in contents(source_of(tmp_path))] == ["train"]
    assert unread_files(source_of(tmp_path)) == [tmp_path / "test/rows.jsonl"]


def test_stamp_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for size in (0, 1, 65_536, 65_537, 5_000_000):
        content = bytearray(random.Random(size).randbytes(size))
        path.write_bytes(content)
        before = stamp(path)
        os.utime(path, ns=(1, 1))
        assert stamp(path) == before
        for at in {0, size - 1} if size else ():
            content[at] ^= 1
            path.write_bytes(content)
            assert stamp(path) != before
            content[at] ^= 1


def test_hub_rows_with_unequal_fields_are_read(tmp_path: Path, datasets_cache: None) -> None:
    tools = [{"name": "f", "default": None}]
    rows = [{"query": "q", "response": "a"}, {"query": "q", "response": "a", "meta": {"x": 1}, "tools": tools}]
    folder = tmp_path / "set"
    folder.mkdir()
    for i, name in enumerate(("train-0", "train-1", "test")):
        (folder / f"{name}.jsonl").write_text(json.dumps(rows[i % 2]) + "\n" if i else json.dumps(rows[0]) + "\n")
    source = source_of("", hub=str(folder))
    try:
        datasets.load_dataset(str(folder), split="train")
    except datasets.exceptions.DatasetGenerationError:
        assert contents(source) == rows
        assert count(source) == 2
        units = plan_units([source])
        assert [Path(unit.file).name for unit in units] == ["train-0.jsonl", "train-1.jsonl"]
        form = FormReader(source, columnar=of_table(units[1], source))  # a null in a line is no missing key
        assert '"default": null' in form.read(rows[1])[0].text
    else:
        pytest.fail("`datasets` reads these rows: the test needs others")


def test_a_build_has_the_same_bytes_from_every_kind_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [
        [{"role": "user", "content": f'q{i}, "x" {{'}, {"role": "assistant", "content": f"answer {i} \\ é"}]
        for i in range(60)
    ]
    rows = [{"messages": row} for row in turns]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    nulls = [{"messages": [{**turn, "from": None, "value": None} for turn in row]} for row in turns]
    (tmp_path / "mixed/sub").mkdir(parents=True)
    (tmp_path / "lines.jsonl").write_bytes(lines)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "LINES.JSONL.GZ").write_bytes(gzip.compress(lines))
    (tmp_path / "utf16.jsonl").write_bytes(lines.decode().encode("utf-16"))
    (tmp_path / "wrapped.json.xz").write_bytes(lzma.compress(json.dumps({"data": rows}).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nulls), tmp_path / "nulls.parquet")
    (tmp_path / "mixed/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "mixed/b.json").write_text(json.dumps(rows[20:40]))
    (tmp_path / "mixed/notes.txt").write_text("x")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[40:]), tmp_path / "mixed/sub/c.parquet")
    monkeypatch.setattr(build, "plan_units", partial(plan_units, unit_bytes=700))
    monkeypatch.setattr(json_files, "BLOCK", 256)
    tokenizer, content = str(write_folder(tmp_path / "base")), {}
    names = ("lines.jsonl", "list.json", "LINES.JSONL.GZ", "utf16.jsonl", "wrapped.json.xz", "nulls.parquet", "mixed")
    for name in names:
        out = tmp_path / f"out-{name}"
        build.main(["--input", str(tmp_path / name), "--tokenizer", tokenizer, "--out", str(out), "--workers", "1"])
        content[name] = [file.read_bytes() for file in sorted(out.glob("*.bin"))]
    assert all(content[name] == content["lines.jsonl"] for name in names)
    assert f"not read: {tmp_path / 'mixed/notes.txt'}" in " ".join(capsys.readouterr().out.split())
