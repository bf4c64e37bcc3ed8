"""Sources: row formats, their schemas, and the files of a source."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.build_config import SourceConfig
from data_prep.forms import FormReader, Unreadable, check_schema, detect_format
from data_prep.readers import plan_units, read_unit
from data_prep.source_formats import FILE_TYPES, FORMATS
from data_prep.sources import count, expand, files
from data_prep.turns import Conversation
from sdlm_megatron.errors import DataError
from tests.fixtures.hub_sets import OPC_EXTRA, SETS, opc

pytestmark = pytest.mark.usefixtures("datasets_cache")
EXPECTED = [("user", "q", True), ("assistant", "a", True)]
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "source": "x"}
ROWS: dict[str, dict[str, Any]] = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "query_response": {"query": "q", "response": "a"},
    "instruction_output": {"instruction": "q", "output": "a", "seq_id": 3},
    "input_output": {"input": "q", "output": "a", "metadata": {"task": "t"}, "_instance_id": "i"},
    "instruction_response": {"instruction": "q", "response": "a", "category": "open_qa"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "prompt_response": {"prompt": "q", "response": "a"},
    "question_answer": {"question": "q", "answer": "a"},
}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(source: SourceConfig) -> list[Any]:
    return [row.content for unit in plan_units([source]) for row in read_unit(unit, source)]


def arrow(path: Path, rows: list[Any], form: Any = pyarrow.ipc.new_stream) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, form(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "jsonl": jsonl,
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "lines.json": jsonl,
    "parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "stream.arrow": arrow,
    "file.arrow": lambda path, rows: arrow(path, rows, pyarrow.ipc.new_file),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2),
    "dict": lambda path, rows: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    ).save_to_disk(path),
}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_in_every_file_type(form: str, kind: str, tmp_path: Path) -> None:
    rows = [{**ROWS[form], "n": i} for i in range(5)]
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, rows)
    source = SourceConfig(name="s", format=form, path=str(path))
    assert expand([source]) == [source]
    assert count(source) == 5
    loaded = contents(source)
    assert loaded == rows
    assert [FormReader(source).read(row) for row in loaded] == [EXPECTED] * 5


@pytest.mark.parametrize("make", SETS)
def test_every_mixture_dataset_in_its_hub_layout(make: Any, tmp_path: Path) -> None:
    a_set = make(tmp_path)
    options = {"name": a_set.name, "format": a_set.form, "subset": a_set.subset}
    copy, hub = SourceConfig(path=str(a_set.folder), **options), SourceConfig(hub=str(a_set.folder), **options)
    theirs = list(datasets.load_dataset(str(a_set.folder), a_set.subset or None, split="train"))
    assert contents(copy) == contents(hub) == theirs == a_set.rows
    assert count(copy) == count(hub) == len(theirs)
    spoken = [FormReader(copy).read(row) for row in contents(copy)]
    assert all(turns[0][0] == "user" and turns[-1][0] == "assistant" for turns in spoken)


def test_configurations_of_a_dataset_have_their_own_columns(tmp_path: Path) -> None:
    for subset in OPC_EXTRA:
        a_set = opc(tmp_path, subset)
        source = SourceConfig(name="s", format=a_set.form, path=str(a_set.folder), subset=subset)
        assert contents(source) == a_set.rows
        assert {row["tag"] for row in contents(source)} == {subset}


def test_missing_subset_or_split_error_lists_available_ones(tmp_path: Path) -> None:
    folder = opc(tmp_path).folder
    with pytest.raises(DataError, match="mceval_instruct"):
        files(SourceConfig(name="s", path=str(folder), subset="python"))
    with pytest.raises(DataError, match="available: train"):
        files(SourceConfig(name="s", path=str(folder), subset="evol_instruct", split="test"))
    with pytest.raises(DataError, match="cannot be loaded"):
        plan_units([SourceConfig(name="s", hub=str(folder), subset="python")])
    datasets.DatasetDict({"test": datasets.Dataset.from_list([MESSAGES])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="available: test"):
        files(SourceConfig(name="s", path=str(tmp_path / "saved")))


def test_files_named_after_splits_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        jsonl(tmp_path / f"{name}.jsonl", [{"query": name, "response": "a"}])
    source = SourceConfig(name="s", format="query_response", path=str(tmp_path))
    assert [row["query"] for row in contents(source)] == ["train-0", "train-1"]
    source.split = "test"
    assert [row["query"] for row in contents(source)] == ["test-0"]
    jsonl(tmp_path / "extra.jsonl", [])  # `datasets` would skip it silently
    with pytest.raises(DataError, match="assigns extra.jsonl to no split"):
        files(source)


def test_the_cache_of_datasets_can_be_read(tmp_path: Path) -> None:
    a_set = SETS[1](tmp_path)
    prepared = datasets.load_dataset(str(a_set.folder), "all", cache_dir=str(tmp_path / "cache"))
    folder = Path(prepared["train"].cache_files[0]["filename"]).parent
    assert {file.suffix for file in folder.iterdir()} == {".arrow", ".json"}
    for split, rows in (("train", a_set.rows), ("test", list(prepared["test"]))):
        source = SourceConfig(name="s", path=str(folder), split=split)
        assert contents(source) == rows


def test_saved_selection_is_refused_or_has_only_its_rows(tmp_path: Path) -> None:
    rows = [{"query": str(i), "response": "a"} for i in range(6)]
    datasets.Dataset.from_list(rows).select([4, 1]).save_to_disk(tmp_path / "saved")
    source = SourceConfig(name="s", format="query_response", path=str(tmp_path / "saved"))
    assert contents(source) == [rows[4], rows[1]]
    state = json.loads((tmp_path / "saved/state.json").read_text())
    (tmp_path / "saved/state.json").write_text(json.dumps({**state, "_indices_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(DataError, match="selection"):
        files(source)


BAD_ROWS: list[tuple[str, Any, str, str]] = [
    ("query_response", {"query": "q"}, "response", "no `response`"),
    ("query_response", {"query": "q", "response": None}, "response", "NoneType"),
    ("query_response", {"query": ["q"], "response": "a"}, "query[0]", "a turn must be an object, not str"),
    ("query_response", {"query": b"q", "response": "a"}, "query", "bytes"),
    ("query_response", {"query": "q", "response": "\ud800"}, "response, character 0", "Unicode"),
    ("instruction_output", {"output": "a"}, "instruction", "no `instruction`"),
    ("input_output", {"input": 3, "output": "a"}, "input", "int"),
    ("messages", {"conversations": []}, "messages", "no `messages`"),
    ("messages", {"messages": []}, "messages", "no turn"),
    ("messages", {"messages": None}, "messages", "NoneType"),
    ("messages", {"messages": "hello"}, "messages", "not JSON"),
    ("messages", {"messages": {"role": "user"}}, "messages", "dict"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "NoneType"),
    ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: 'robot'", "unknown role"),
    (
        "messages",
        {"messages": [MESSAGES["messages"][0], {"role": "user"}]},
        "messages[1]",
        "a turn without `value` and `content`",
    ),
    ("messages", {"messages": [MESSAGES["messages"][0], "x"]}, "messages[1]", "object"),
    ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role: 'list'", "unknown role"),
    ("messages", {"messages": [{"role": "user", "content": "é\udfff"}]}, "messages[0].content, character 1", "Unicode"),
    ("messages", {"messages": [{"from": "x", "role": "user", "content": "x"}]}, "messages[0]", "`from` and `role`"),
    ("sharegpt", {"conversations": []}, "conversations", "no turn"),
    ("sharegpt", {"conversations": [{"from": "x", "value": "y"}]}, "conversations[0].from: 'x'", "unknown role"),
    ("messages", [1], "", "object"),
    ("messages", None, "", "object"),
    ("messages", Unreadable("the line is not JSON: x", "{"), "x", "not JSON"),
]


@pytest.mark.parametrize(("form", "row", "where", "what"), BAD_ROWS)
def test_invalid_row_error_names_the_field(form: str, row: Any, where: str, what: str) -> None:
    with pytest.raises(DataError) as error:
        FormReader(SourceConfig(format=form)).read(row)
    assert error.value.where == where
    assert what in error.value.what


LONG = "x" * 1_000_000
GOOD_ROWS: list[tuple[str, Any, Conversation]] = [
    ("query_response", {"query": "", "response": " "}, [("user", "", True), ("assistant", " ", True)]),
    ("query_response", {"query": "a\x00b", "response": LONG}, [("user", "a\x00b", True), ("assistant", LONG, True)]),
    ("messages", {"messages": [{"role": "system", "content": "s"}]}, [("system", "s", True)]),
    ("messages", {"messages": [{"role": "user", "content": "u"}] * 2}, [("user", "u", True)] * 2),
    ("messages", {"messages": [{"from": "gpt", "value": "ü🙂"}]}, [("assistant", "ü🙂", True)]),
    ("sharegpt", {"conversations": [{"role": "function", "content": "", "x": 1}]}, [("function", "", False)]),
]


@pytest.mark.parametrize(("form", "row", "expected"), GOOD_ROWS)
def test_unusual_valid_rows_are_accepted(form: str, row: Any, expected: Conversation) -> None:
    assert FormReader(SourceConfig(format=form)).read(row) == expected


TEXT, INT = pyarrow.string(), pyarrow.int64()
TURN = pyarrow.struct([("content", TEXT), ("role", TEXT)])
SCHEMAS: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": pyarrow.list_(TURN), "x": INT}, ""),
    ("messages", {"messages": pyarrow.large_list(pyarrow.struct([("from", TEXT), ("value", TEXT)]))}, ""),
    ("query_response", {"query": pyarrow.large_string(), "response": pyarrow.dictionary(INT, TEXT)}, ""),
    ("input_output", {"input": pyarrow.string_view(), "output": TEXT}, ""),
    ("messages", {"message": TEXT}, r"no column `messages` .* has message"),
    ("messages", {"messages": TEXT}, ""),
    ("sharegpt", {"conversations": pyarrow.list_(pyarrow.struct([("from", TEXT), ("content", TEXT)]))}, ""),
    ("messages", {"messages": INT}, r"`messages` is int64, required is a list of turns \(\{role"),
    ("messages", {"messages": pyarrow.list_(TEXT)}, "list<"),
    ("messages", {"messages": pyarrow.struct([("role", pyarrow.list_(TEXT))])}, "struct<"),
    ("sharegpt", {"conversations": pyarrow.list_(pyarrow.struct([("from", TEXT), ("x", TEXT)]))}, "list<"),
    ("query_response", {"query": TEXT, "response": INT}, "`response` is int64, required is text"),
    ("query_response", {"query": pyarrow.null(), "response": TEXT}, "`query` is null"),
    ("instruction_output", {"instruction": TEXT, "output": pyarrow.list_(TEXT)}, "`output` is list"),
]


@pytest.mark.parametrize(("form", "columns", "what"), SCHEMAS)
def test_columns_are_checked_against_the_format(form: str, columns: dict[str, Any], what: str) -> None:
    schema = pyarrow.schema(list(columns.items()))
    if not what:
        check_schema(schema, SourceConfig(format=form), "FILE")
        return
    with pytest.raises(DataError, match=what) as error:
        check_schema(schema, SourceConfig(format=form), "FILE")
    assert error.value.where == "FILE"
    assert form in error.value.fix


def test_mismatched_schema_fails_planning(tmp_path: Path) -> None:
    rows = [ROWS["query_response"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        with pytest.raises(DataError, match="no column `messages`"):
            plan_units([SourceConfig(name="s", format="messages", path=str(path))])
    with pytest.raises(DataError, match="no column `instruction`"):
        plan_units([SourceConfig(name="s", format="instruction_output", hub=str(SETS[0](tmp_path).folder))])


def test_duplicate_column_names_are_refused() -> None:
    with pytest.raises(DataError, match="2 columns `query`"):
        check_schema(
            pyarrow.schema([("query", TEXT), ("query", TEXT), ("response", TEXT)]),
            SourceConfig(format="query_response"),
            "F",
        )


def test_tested_formats_match_the_registered_formats() -> None:
    assert set(FORMATS) == {*ROWS, "turns", "text", "preference", "columns"}  # these: tests/forms
    for name, row in ROWS.items():
        assert detect_format([("FILE", row)], SourceConfig(name="s")) == name


def test_documentation_contains_the_format_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = [f"| `{name}` | {form.description} | {form.used_by} |" for name, form in FORMATS.items()]
    assert "\n".join(["| format | columns | used by |", "|---|---|---|", *rows]) in text
    assert all(f"`{suffix}`" in text for suffix in FILE_TYPES)


def test_fields_matching_no_format_or_several_are_refused() -> None:
    source = SourceConfig(name="s")
    with pytest.raises(DataError, match="no source format matches the fields txt, id") as error:
        detect_format([("FILE, line 1", {"txt": "x", "id": 3})], source)
    assert error.value.where == "FILE, line 1"
    assert "--sources.s.columns" in error.value.fix and "query, response" in error.value.fix
    with pytest.raises(DataError, match="two readings: messages and query_response") as error:
        detect_format([("FILE, line 1", {**MESSAGES, "query": "q", "response": "a"})], source)
    assert "messages (messages): FILE, line 1" in error.value.where and "--sources.s.format" in error.value.fix
    # alpaca's columns include those of input_output; an empty column is no reading
    row = {"instruction": "q", "input": "i", "output": "a", "messages": None, "text": ""}
    assert detect_format([("FILE", row)], source) == "instruction_output"


def test_sharegpt_meta_names_files_and_repeats(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [SHAREGPT] * 4)
    entries = {
        "twice": {"root": "", "annotation": "a.jsonl", "repeat_time": 2, "length": 4},
        "half": {"annotation": str(tmp_path / "a.jsonl"), "repeat_time": 0.5},
        "little": {"annotation": "a.jsonl", "repeat_time": 0.01},
        "once": {"annotation": "a.jsonl"},
    }
    meta = tmp_path / "meta.json"
    for indent in (None, 2):  # multi-line and single-line files
        meta.write_text(json.dumps(entries, indent=indent))
        expanded = expand([SourceConfig(name="m", format="sharegpt", path=str(meta), weight=1.5)])
        assert [(s.name, s.weight, s.limit, count(s)) for s in expanded] == [
            ("m/twice", 3, 0, 4),
            ("m/half", 1.5, 2, 2),
            ("m/little", 1.5, 1, 1),
            ("m/once", 1.5, 0, 4),
        ]
    assert contents(expanded[1]) == [SHAREGPT] * 2
    assert expanded[1].option("ignore", ["x"]) == "'--sources.m/half.ignore=[x]'"


def test_annotations_may_be_named_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metas").mkdir()
    jsonl(tmp_path / "a.jsonl", [SHAREGPT])
    meta = tmp_path / "metas/meta.json"
    meta.write_text(json.dumps({"mine": {"annotation": "a.jsonl"}}))
    monkeypatch.chdir(tmp_path)
    [source] = expand([SourceConfig(name="m", format="sharegpt", path=str(meta))])
    assert contents(source) == [SHAREGPT]


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"annotation": "a", "repeat_time": 1.5},
        {"annotation": "a", "repeat_time": "2"},
        {"annotation": "a", "repeat_time": 0},
        {"annotation": "a", "repeat_time": float("inf")},
    ],
)
def test_invalid_meta_error_names_the_entry(entry: Any, tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"mine": entry}, indent=1))
    with pytest.raises(DataError, match="mine"):
        expand([SourceConfig(name="m", format="sharegpt", path=str(meta))])


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "x.arrow").write_text("no arrow")
    (tmp_path / "x.tsv").write_text("a\tb")
    (tmp_path / "x.json").write_text('{"a":\n {}}')
    (tmp_path / "bad.json").write_text('{"a":\n 1')
    (tmp_path / "lfs.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    (tmp_path / "empty").mkdir()
    for name, what in (
        ("missing.jsonl", "no such file"),
        ("empty", "no .jsonl"),
        ("x.tsv", "unsupported file type"),
        ("x.parquet", "not Parquet"),
        ("x.arrow", "not Arrow"),
        ("x.json", "list of rows"),
        ("bad.json", "not JSON"),
        ("lfs.jsonl", "Git LFS"),
    ):
        for ask in (count, lambda source: plan_units([source])):
            with pytest.raises(DataError, match=what) as error:
                ask(SourceConfig(name="s", path=str(tmp_path / name)))
            assert name in error.value.where
    with pytest.raises(DataError, match="not JSON"):
        expand([SourceConfig(name="s", format="sharegpt", path=str(tmp_path / "bad.json"))])


def _folder(path: Path, **contents: str) -> SourceConfig:
    path.mkdir()
    for name, text in contents.items():
        (path / name.replace("__", ".")).write_text(text)
    return SourceConfig(name="s", path=str(path), format="messages")


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        ({"state__json": "[1]"}, "state.json holds a list, not an object"),
        ({"state__json": '{"_data_files": 5}'}, "_data_files is a whole number"),
        ({"state__json": '{"_data_files": [5]}'}, "an entry has no `filename`"),
        ({"state__json": '{"_data_files": [{"filename": "/etc/passwd"}]}'}, "/etc/passwd leads out of its folder"),
        ({"state__json": '{"_data_files": [{"filename": "../x.arrow"}]}'}, "../x.arrow leads out of its folder"),
        ({"state__json": '{"a":' * 100_000}, "state.json is nested too deeply"),
        ({"dataset_dict__json": '{"splits": "train"}'}, "splits is text"),
        ({"dataset_dict__json": "null"}, "dataset_dict.json holds null, not an object"),
    ],
)
def test_hostile_description_of_a_saved_dataset_is_refused(tmp_path: Path, contents: dict[str, str], what: str) -> None:
    with pytest.raises(DataError) as caught:
        files(_folder(tmp_path / "source", **contents))
    assert what in caught.value.what


def test_links_out_of_a_source_folder_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text("{}\n")
    plain = _folder(tmp_path / "plain", a__jsonl="{}\n")
    (tmp_path / "plain" / "b.jsonl").symlink_to(secret)
    (tmp_path / "plain" / "c.jsonl").symlink_to("a.jsonl")
    hub = _folder(tmp_path / "hub", README__md="---\nconfigs:\n- config_name: d\n  data_files: '*.jsonl'\n---\n")
    (tmp_path / "hub" / "train.jsonl").symlink_to(secret)
    for source, name in ((plain, "b.jsonl"), (hub, "train.jsonl")):
        with pytest.raises(DataError, match=f"{name} leads out of its folder"):
            files(source)
    (tmp_path / "plain" / "b.jsonl").unlink()
    assert [file.name for file in files(plain)] == ["a.jsonl", "c.jsonl"]


def test_files_outside_that_a_readme_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text("{}\n")
    readme = "---\nconfigs:\n- config_name: d\n  data_files: '../secret.jsonl'\n---\n"
    with pytest.raises(DataError, match="secret.jsonl"):
        files(_folder(tmp_path / "hub", README__md=readme))


def test_documentation_has_a_row_of_each_format() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([{\[].*[}\]])` \|$", text, re.M))
    assert rows.keys() == FORMATS.keys() - {"columns"}
    for name, row in rows.items():
        assert detect_format([("FILE", json.loads(row))], SourceConfig(name="s")) == name
