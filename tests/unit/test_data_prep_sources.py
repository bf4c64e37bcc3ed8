"""Sources: every row form, every kind of file, and rows that cannot be read."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.config import SourceConfig
from data_prep.sources import conversation, count, expand, read
from sdlm_megatron.errors import DataError

EXPECTED = [("user", "q"), ("assistant", "a")]
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
FORMS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "source": "x",
    },
    "sharegpt": SHAREGPT,
    "query_response": {"query": "q", "response": "a"},
    "instruction_output": {"instruction": "q", "output": "a", "seq_id": 3},
    "input_output": {"input": "q", "output": "a", "metadata": {"task": "t"}, "_instance_id": "i"},
}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "hub"])
def test_every_form_from_every_kind_of_file(
    form: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [FORMS[form]] * 3
    path = tmp_path / f"rows.{kind}"
    source = SourceConfig(name="s", format=form, path=str(path))
    if kind == "jsonl":
        jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        source = SourceConfig(name="s", format=form, hub="owner/set", subset="all")
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert [source] == expand([source])
    assert count(source) == 3
    found = list(read(source))
    assert [conversation(row, form) for row in found] == [EXPECTED] * 3
    assert [(row.source, row.row) for row in found] == [("s", 0), ("s", 1), ("s", 2)]


def test_folder_is_read_by_name_and_limit_counts_over_its_files(tmp_path: Path) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", [{"query": name, "response": str(i)} for i in range(2)])
    (tmp_path / "readme.txt").write_text("no rows")
    source = SourceConfig(name="s", format="query_response", path=str(tmp_path), limit=3)
    assert count(source) == 3
    assert [row.content["query"] for row in read(source)] == ["a", "a", "b"]
    assert [row.row for row in read(source)] == [0, 1, 2]


def test_lines_that_cannot_be_read_are_rows_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(FORMS["query_response"]).encode()
    path.write_bytes(good + b'\n\n{"query": \n\xff\xfe\n' + b"[" * 100_000 + b"\n[1]\n" + good)
    source = SourceConfig(name="s", format="query_response", path=str(path))
    rows = list(read(source))
    assert len(rows) == count(source) == 6
    assert rows[1].where.endswith("line 3"), "a blank line is no row, but it is a line"
    assert conversation(rows[0], "query_response") == conversation(rows[5], "query_response") == EXPECTED
    for row in rows[1:5]:
        with pytest.raises(DataError):
            conversation(row, "query_response")


BAD_ROWS = [
    ("query_response", {"query": "q"}, "response"),
    ("query_response", {"query": "q", "response": None}, "response"),
    ("instruction_output", {"output": "a"}, "instruction"),
    ("messages", {"conversations": []}, "messages"),
    ("sharegpt", {"conversations": []}, "conversations"),
    ("sharegpt", {"conversations": [{"from": "x", "value": "y"}]}, "conversations[0].from"),
]


@pytest.mark.parametrize(("form", "row", "where"), BAD_ROWS)
def test_bad_rows_name_the_field(form: str, row: dict[str, Any], where: str, tmp_path: Path) -> None:
    source = SourceConfig(name="s", format=form, path=str(jsonl(tmp_path / "r.jsonl", [row])))
    with pytest.raises(DataError) as error:
        conversation(next(iter(read(source))), form)
    assert error.value.where == where


def test_sharegpt_meta_names_files_and_repeats(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [SHAREGPT] * 4)
    meta = tmp_path / "meta.json"
    meta.write_text(
        json.dumps(
            {
                "twice": {"root": "", "annotation": "a.jsonl", "repeat_time": 2, "length": 4},
                "half": {"annotation": str(tmp_path / "a.jsonl"), "repeat_time": 0.5},
                "once": {"annotation": "a.jsonl"},
            }
        )
    )
    found = expand([SourceConfig(name="m", format="sharegpt", path=str(meta))])
    assert [(s.name, s.repeat, s.limit, count(s)) for s in found] == [
        ("m/twice", 2, 0, 4),
        ("m/half", 1, 2, 2),
        ("m/once", 1, 0, 4),
    ]
    assert conversation(next(iter(read(found[0]))), "sharegpt") == EXPECTED


@pytest.mark.parametrize(
    "entry", [3, {}, {"annotation": "a", "repeat_time": 1.5}, {"annotation": "a", "repeat_time": "2"}]
)
def test_bad_meta_names_the_entry(entry: Any, tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"mine": entry}))
    with pytest.raises(DataError, match="mine"):
        expand([SourceConfig(name="m", format="sharegpt", path=str(meta))])


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "x.json").write_text('{"a": 1}')
    (tmp_path / "empty").mkdir()
    for name, what in (
        ("missing.jsonl", "no such file"),
        ("empty", "no .jsonl"),
        ("x.csv", "unknown kind"),
        ("x.parquet", "not Parquet"),
        ("x.json", "list of rows"),
    ):
        with pytest.raises(DataError, match=what):
            count(SourceConfig(name="s", path=str(tmp_path / name)))

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="no network"):
        count(SourceConfig(name="s", hub="owner/set"))
