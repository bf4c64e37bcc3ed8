"""Sources: the row forms of the training mixture, and the files in which a source's rows lie.

What becomes of unusual rows, in every form and from every kind of file:

=================================================  ==================================================
a line that is not JSON, or not UTF-8              rejected; the line is kept
a row that is no object; a column that is missing  rejected
a column, turn, role or text that is null          rejected
a list of turns without a turn                     rejected
a role that is not one of `chat.ROLES`             rejected
text with a lone surrogate, text not UTF-8         rejected
empty text, text of white space                    valid: the turn is just `<|im_end|>`
NUL and other control characters, 1 MB of text     valid
no assistant turn, only a system turn              valid here; dropped later, having nothing to train
two rows alike, or with the same id                valid here; duplicates are found later, by content
fields that the form does not name                 ignored
=================================================  ==================================================
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from data_prep.build_config import SourceConfig
from data_prep.chat import ROLES, check_text, parse
from data_prep.columnar import open_hub, open_table
from sdlm_megatron.errors import DataError

Conversation = list[tuple[str, str]]
"""[(ChatML role, text)…]"""

KINDS = (".jsonl", ".json", ".parquet", ".arrow")
TURN_KEYS = (("from", "value"), ("role", "content"))
"""How a turn may be spelled: (role, text)."""


class InputRow(NamedTuple):
    """One row of a source, as it was found."""

    place: int
    """In a unit of lines: 1-based number of the line in the unit. Otherwise: 0-based number of the row in the
    file."""
    content: Any
    """The row (a dict, if it is as it should be), or an `Unreadable`."""


@dataclass(frozen=True)
class Unreadable:
    """A line that is no row, or a row of a columnar file that cannot be decoded."""

    reason: str
    line: str
    """The line itself; bytes that are no UTF-8 as backslash escapes."""


@dataclass(frozen=True)
class Form:
    """A row form."""

    turns: str = ""
    """Column with a list of turns, each {role: text, content: text} or {from: text, value: text}."""
    prompt: str = ""
    """Column with the user's text, in forms of one question and one answer."""
    answer: str = ""
    """Column with the assistant's text."""
    keys: tuple[str, str] = TURN_KEYS[1]
    """How a turn is usually spelled."""


FORMS = {
    "messages": Form(turns="messages"),  # smoltalk, tulu-3-sft-mixture, Table-GPT
    "sharegpt": Form(turns="conversations", keys=TURN_KEYS[0]),
    "query_response": Form(prompt="query", answer="response"),  # ScaleQuest-Math
    "instruction_output": Form(prompt="instruction", answer="output"),  # opc-sft-stage2
    "input_output": Form(prompt="input", answer="output"),  # SciRIFF
}
"""The schema of every form: these columns, of these types. Other columns are ignored."""


def conversation(row: InputRow, form: str) -> Conversation:
    """The checked conversation of a row; DataError names the field that is wrong."""
    kind, content = FORMS[form], row.content
    try:
        return _turns(content[kind.turns], kind.keys) if kind.turns else _pair(content, kind)
    except (LookupError, TypeError, ValueError):
        return _slowly(content, kind)


def _turns(turns: Any, keys: tuple[str, str]) -> Conversation:
    """Of a usual row; raises anything on another."""
    role_key, text_key = keys
    found = []
    for turn in turns:
        if role_key == "role" and "from" in turn:
            raise ValueError  # `parse` takes that spelling first
        text = turn[text_key]
        if not str.isascii(text):  # of another type: raises
            text.encode()  # a lone surrogate raises
        found.append((ROLES[turn[role_key]], text))
    if not found:
        raise ValueError
    return found


def _pair(content: Any, kind: Form) -> Conversation:
    prompt, answer = content[kind.prompt], content[kind.answer]
    for text in (prompt, answer):
        if not str.isascii(text):
            text.encode()
    return [("user", prompt), ("assistant", answer)]


def _slowly(content: Any, kind: Form) -> Conversation:
    """As above, for any row: finds the words for what is wrong."""
    if isinstance(content, Unreadable):
        raise DataError(content.reason)
    if not isinstance(content, Mapping):
        raise DataError(f"a row must be an object, not {type(content).__name__}")
    if kind.turns:
        return parse({kind.turns: _column(content, kind.turns)})
    texts = [check_text(_column(content, field), field) for field in (kind.prompt, kind.answer)]
    return [("user", texts[0]), ("assistant", texts[1])]


def _column(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        raise DataError(f"the row has no `{field}`; it has {', '.join(map(str, row)) or 'nothing'}", where=field)
    return row[field]


def check_schema(schema: Any, form: str, where: str) -> None:
    """Raises DataError unless a columnar file has the columns of `form`: names the column, its type and the one
    wanted.

    Args:
        schema: pyarrow.Schema of the file.
        form: one of FORMS.
        where: the file, for the message.
    """
    import pyarrow.types as types

    def is_text(kind: Any) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    def is_turns(kind: Any) -> bool:
        lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
        if not any(test(kind) for test in (*lists, types.is_large_list_view)) or not types.is_struct(kind.value_type):
            return False
        fields = {field.name: field.type for field in kind.value_type}
        return any(all(key in fields and is_text(fields[key]) for key in keys) for keys in TURN_KEYS)

    kind = FORMS[form]
    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        kind.turns: (is_turns, "a list of {role: text, content: text} or {from: text, value: text}"),
        kind.prompt: (is_text, "text"),
        kind.answer: (is_text, "text"),
    }
    for column, (test, name) in wanted.items():
        if not column:
            continue
        fix = f"the source's `format` is {form}; use the one that fits the columns"
        if schema.names.count(column) != 1:
            how = f"{schema.names.count(column)} columns" if column in schema.names else "no column"
            have = ", ".join(schema.names) or "nothing"
            raise DataError(f"{how} `{column}` ({name} is wanted); the file has {have}", where, fix)
        if not test(schema.field(column).type):
            raise DataError(f"column `{column}` is {schema.field(column).type}; {name} is wanted", where, fix)


def expand(sources: list[SourceConfig]) -> list[SourceConfig]:
    """Replaces every ShareGPT meta JSON by the annotation files it names: one source per entry, called
    NAME/ENTRY. `repeat_time` becomes the weight; a fraction takes the first part of the file, as the reference
    does."""
    found: list[SourceConfig] = []
    for source in sources:
        meta = source.format == "sharegpt" and source.path.endswith(".json") and not is_lines(Path(source.path))
        found += _expand_meta(source) if meta else [source]
    return found


def _expand_meta(source: SourceConfig) -> list[SourceConfig]:
    content = read_json(Path(source.path))
    if not isinstance(content, dict):
        return [source]
    return [_from_meta(source, str(name), entry) for name, entry in content.items()]


def _from_meta(source: SourceConfig, name: str, entry: Any) -> SourceConfig:
    where = f"{source.path}, entry {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
        raise DataError("a meta entry needs `annotation`, the path of a JSONL file", where)
    times = entry.get("repeat_time", 1)
    if isinstance(times, bool) or not isinstance(times, int | float) or not 0 < times < float("inf"):
        raise DataError(f"repeat_time is {times!r}", where, "a whole number, or a fraction below 1")
    if times > 1 and times % 1:
        raise DataError(f"repeat_time is {times!r}", where, "a whole number, or a fraction below 1")
    beside = Path(source.path).parent / entry["annotation"]
    path = beside if beside.exists() else Path(entry["annotation"])
    found = replace(source, name=f"{source.name}/{name}", path=str(path), weight=source.weight * max(1, int(times)))
    if times < 1:
        rows = max(1, int(count(found) * times))
        found = replace(found, limit=min(rows, source.limit or rows))
    return found


def count(source: SourceConfig) -> int:
    """Rows of a source: cheap for columnar files, one pass over the lines of others."""
    if source.hub:
        total = open_hub(source.hub, source.subset, source.split, source.revision).rows
    else:
        total = sum(_count_file(file) for file in files(source))
    return min(total, source.limit) if source.limit else total


def _count_file(file: Path) -> int:
    if file.suffix in (".parquet", ".arrow"):
        return open_table(file).rows
    if not is_lines(file):
        return len(read_json_list(file))
    with open(file, "rb") as lines:
        return sum(1 for line in lines if not line.isspace())


def is_lines(file: Path) -> bool:
    """Whether a .jsonl or .json file holds a row a line: the latter may also be one list of rows, or a meta JSON
    (one object whose entries are objects). DataError when there is no such file."""
    if file.suffix == ".jsonl":
        return True
    try:
        with open(file, "rb") as lines:
            first, second = islice(chain((line for line in lines if not line.isspace()), (b"", b"")), 2)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", str(file), "check `path`") from None
    row = _value(first)
    if row is None:  # a row that is no JSON, or a value that goes on behind the line
        return not first.lstrip().startswith(b"[") and isinstance(_value(second), dict)
    if second:
        return True
    return isinstance(row, dict) and not all(isinstance(value, dict) for value in row.values())


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_json(file: Path) -> Any:
    """The content of a JSON file; DataError when there is none."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError("no such file", str(file), "check `path`") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file is not JSON: {error}", str(file)) from None


def read_json_list(file: Path) -> list[Any]:
    """The rows of a JSON file that is one list; DataError when it is not."""
    content = read_json(file)
    if not isinstance(content, list):
        raise DataError(f"the file holds a {type(content).__name__}, not a list of rows", str(file))
    return content


_SPLIT_WORD = re.compile(r"(?<![a-z0-9])(train|test|valid|val|dev|eval)(ing|idation|uation)?(?![a-z])", re.IGNORECASE)
_INFO_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def files(source: SourceConfig) -> list[Path]:
    """The files of a source in their order; DataError when there is none, or one that cannot be used.

    A folder is read as what it is: one written by `datasets`' save_to_disk; a plain folder of files, by name; or
    else (it has a README.md or folders, its files are named after splits, or `subset` is set) a copy of a hub
    dataset, in which `datasets` looks up the files of subset and split.
    """
    path = Path(source.path)
    if path.is_dir():
        found = _folder_files(path, source)
    elif path.is_file():
        found = [path]
    else:
        raise DataError(f"source {source.name!r}: no such file or folder", str(path), "check `path`")
    for file in found:
        _check_file(file, source)
    return found


def _check_file(file: Path, source: SourceConfig) -> None:
    if file.suffix not in KINDS:
        what = f"source {source.name!r}: unknown kind of file"
        raise DataError(what, str(file), f"use {', '.join(KINDS)}")
    try:
        with open(file, "rb") as content:
            start = content.read(40)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", str(file), "check `path`") from None
    if start.startswith(b"version https://git-lfs"):
        fix = "run `git lfs pull` in the copy"
        raise DataError(f"source {source.name!r}: the file is only a pointer to the data in Git LFS", str(file), fix)


def _folder_files(folder: Path, source: SourceConfig) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits", [])
        if source.split not in splits:
            raise _no_split(source, folder, splits)
        folder = folder / source.split
    if (folder / "state.json").is_file():
        return _saved_files(folder, source)
    here = sorted(file for file in folder.iterdir() if file.suffix in KINDS and file.name not in _INFO_FILES)
    named = any(_SPLIT_WORD.search(file.stem) for file in here)
    readme = (folder / "README.md").is_file()
    if here and not (readme or named or source.subset):
        return here
    found = _hub_copy(folder, source)
    in_some_split = {file for split in found.values() for file in split}
    if not readme and (missed := [file.name for file in here if file not in in_some_split]):
        what = f"source {source.name!r}: {missed[0]} belongs to no split, as `datasets` sees the folder"
        raise DataError(what, str(folder), "name the files alike, or give `path` one file")
    if source.split not in found:
        raise _no_split(source, folder, list(found))
    return found[source.split]


def _saved_files(folder: Path, source: SourceConfig) -> list[Path]:
    """Of `save_to_disk`."""
    state = read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        what = f"source {source.name!r}: the saved dataset is a selection of its rows"
        raise DataError(what, str(folder), "save it once more after `flatten_indices()`")
    return [folder / entry["filename"] for entry in state.get("_data_files", [])]


def _hub_copy(folder: Path, source: SourceConfig) -> dict[str, list[Path]]:
    """Split -> files, as `datasets` finds them by the README's YAML or by the names of files and folders."""
    import datasets

    try:
        with TemporaryDirectory() as cache:  # nothing is prepared in it
            builder = datasets.load_dataset_builder(str(folder), source.subset or None, cache_dir=cache)
            found = builder.config.data_files or {}
    except Exception as error:  # the library raises many kinds
        what = f"source {source.name!r}: no .jsonl, .json, .parquet or .arrow files found: {error}"
        raise DataError(what, str(folder), "check `path`, `subset` and `split`") from error
    return {str(split): [Path(file) for file in names] for split, names in found.items()}


def _no_split(source: SourceConfig, folder: Path, splits: list[str]) -> DataError:
    what = f"source {source.name!r}: no split {source.split!r}; there is {', '.join(splits) or 'none'}"
    return DataError(what, str(folder), "set `split`")
