"""Where conversations come from: files here or sets of the hub, in the row forms of the training mixture."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.chat import check_text, parse
from data_prep.config import SourceConfig
from sdlm_megatron.errors import DataError

Conversation = list[tuple[str, str]]
"""[(ChatML role, text)…]"""


@dataclass(frozen=True)
class InputRow:
    """One row of a source, as it was found."""

    source: str
    row: int
    """Number in its source, from 0."""
    where: str
    """File and line (or row), for messages."""
    content: Any
    """The row, or an `Unreadable`."""


@dataclass(frozen=True)
class Unreadable:
    """A line that is no row."""

    reason: str
    line: str
    """The line itself; bytes that are no UTF-8 as backslash escapes."""


def conversation(row: InputRow, form: str) -> Conversation:
    """The checked conversation of a row; DataError names the field that is wrong."""
    if isinstance(row.content, Unreadable):
        raise DataError(row.content.reason)
    if not isinstance(row.content, Mapping):
        raise DataError(f"a row must be an object, not {type(row.content).__name__}")
    return _FORMS[form](row.content)


def _turns(field: str) -> Callable[[Mapping[str, Any]], Conversation]:
    def read(row: Mapping[str, Any]) -> Conversation:
        return parse({field: _column(row, field)})

    return read


def _pair(prompt: str, answer: str) -> Callable[[Mapping[str, Any]], Conversation]:
    def read(row: Mapping[str, Any]) -> Conversation:
        texts = [check_text(_column(row, field), field) for field in (prompt, answer)]
        return [("user", texts[0]), ("assistant", texts[1])]

    return read


_FORMS = {
    "messages": _turns("messages"),  # smoltalk, tulu-3-sft-mixture, Table-GPT
    "sharegpt": _turns("conversations"),
    "query_response": _pair("query", "response"),  # ScaleQuest-Math
    "instruction_output": _pair("instruction", "output"),  # opc-sft-stage2
    "input_output": _pair("input", "output"),  # SciRIFF
}


def _column(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        raise DataError(f"the row has no `{field}`; it has {', '.join(map(str, row)) or 'nothing'}", where=field)
    return row[field]


def expand(sources: list[SourceConfig]) -> list[SourceConfig]:
    """Replaces every ShareGPT meta JSON by the annotation files it names: one source per entry, called
    NAME/ENTRY."""
    found: list[SourceConfig] = []
    for source in sources:
        found += _expand_meta(source) if source.format == "sharegpt" and source.path.endswith(".json") else [source]
    return found


def _expand_meta(source: SourceConfig) -> list[SourceConfig]:
    content = _read_json(Path(source.path))
    if not isinstance(content, dict):
        return [source]
    return [_from_meta(source, str(name), entry) for name, entry in content.items()]


def _from_meta(source: SourceConfig, name: str, entry: Any) -> SourceConfig:
    where = f"{source.path}, entry {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
        raise DataError("a meta entry needs `annotation`, the path of a JSONL file", where)
    times = entry.get("repeat_time", 1)
    if isinstance(times, bool) or not isinstance(times, int | float) or times <= 0 or (times > 1 and times % 1):
        raise DataError(f"repeat_time is {times!r}", where, "a whole number, or a fraction below 1")
    beside = Path(source.path).parent / entry["annotation"]
    path = beside if beside.exists() else Path(entry["annotation"])
    found = replace(source, name=f"{source.name}/{name}", path=str(path), repeat=source.repeat * max(1, int(times)))
    if times < 1:  # the first part of the file, as the reference takes it
        rows = max(1, int(count(found) * times))
        found = replace(found, limit=min(rows, source.limit or rows))
    return found


def count(source: SourceConfig) -> int:
    """Rows `read` will give: cheap for files (no row is parsed)."""
    total = len(_load_hub(source)) if source.hub else sum(_count_file(file) for file in files(source))
    return min(total, source.limit) if source.limit else total


def read(source: SourceConfig) -> Iterator[InputRow]:
    """The rows of a source in order, once (`repeat` is the caller's). A line that cannot be read is a row
    too."""
    rows = _read_hub(source) if source.hub else (row for file in files(source) for row in _read_file(file))
    for number, (where, content) in enumerate(rows):
        if source.limit and number >= source.limit:
            return
        yield InputRow(source.name, number, where, content)


def files(source: SourceConfig) -> list[Path]:
    """The files of a source, by name; DataError when there is none."""
    path = Path(source.path)
    found = [path] if path.is_file() else []
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
    if not found:
        what = "no .jsonl or .parquet file in the folder" if path.is_dir() else "no such file or folder"
        raise DataError(f"source {source.name!r}: {what}", str(path), "check `path`")
    if found[0].suffix not in (".jsonl", ".json", ".parquet"):
        raise DataError(f"source {source.name!r}: unknown kind of file", str(path), "use .jsonl, .json or .parquet")
    return found


def _count_file(file: Path) -> int:
    if file.suffix == ".parquet":
        return _parquet(file)[0]
    if file.suffix == ".json":
        return len(_read_json_list(file))
    with open(file, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def _read_file(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        for i, row in enumerate(_parquet(file)[1]):
            yield f"{file}, row {i}", row
    elif file.suffix == ".json":
        for i, row in enumerate(_read_json_list(file)):
            yield f"{file}, element {i}", row
    else:
        # Not through `datasets`: its reader wants one schema for all lines and fails as a whole on a bad one.
        with open(file, "rb") as lines:
            for i, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}, line {i}", _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        return Unreadable(f"the line is not JSON: {error}", line.decode("utf-8", errors="backslashreplace").rstrip())


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError("no such file", str(file), "check `path`") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file is not JSON: {error}", str(file)) from None


def _read_json_list(file: Path) -> list[Any]:
    content = _read_json(file)
    if not isinstance(content, list):
        raise DataError(f"the file holds a {type(content).__name__}, not a list of rows", str(file))
    return content


def _parquet(file: Path) -> tuple[int, Iterator[dict[str, Any]]]:
    """Number of rows, and the rows, which are read as they are asked for."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise DataError(f"the file is not Parquet: {error}", str(file)) from None
    batches = table.iter_batches(batch_size=1024)
    return table.metadata.num_rows, (row for batch in batches for row in batch.to_pylist())


def _load_hub(source: SourceConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.hub, source.subset or None, split=source.split)
    except Exception as error:  # the library raises many kinds: no network, no such set, no such split
        raise DataError(
            f"source {source.name!r} cannot be loaded: {error}",
            f"{source.hub}, subset {source.subset or '(default)'}, split {source.split}",
            "check the names and the network, or download the files and use `path`",
        ) from error


def _read_hub(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    for i, row in enumerate(_load_hub(source)):
        yield f"{source.hub}, row {i}", row
