"""Sources: the files in which a source's rows are stored."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from data_prep.build_config import SourceConfig
from data_prep.columnar import open_hub, open_table
from data_prep.source_formats import FILE_TYPES
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import checked, read_json_object, regular_file


def expand(sources: list[SourceConfig]) -> list[SourceConfig]:
    """Replaces every ShareGPT meta JSON by the annotation files it lists: one source per entry, named NAME/ENTRY.

    `repeat_time` becomes the weight. A fraction selects the first part of the file, as in the reference code.
    """
    result: list[SourceConfig] = []
    for source in sources:
        meta = source.format in ("", "sharegpt") and source.path.endswith(".json") and not is_lines(Path(source.path))
        result += _expand_meta(source) if meta else [source]
    return result


def _expand_meta(source: SourceConfig) -> list[SourceConfig]:
    content = read_json(Path(source.path))
    if not isinstance(content, dict) or (not source.format and not any(map(_is_entry, content.values()))):
        return [source]
    return [_from_meta(source, str(name), entry) for name, entry in content.items()]


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and "annotation" in value


def _from_meta(source: SourceConfig, name: str, entry: Any) -> SourceConfig:
    where = f"{source.path}, entry {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
        raise DataError("the meta entry has no `annotation`", where, "set it to the path of a JSONL file")
    times = entry.get("repeat_time", 1)
    is_number = isinstance(times, int | float) and not isinstance(times, bool)
    if not is_number or not 0 < times < float("inf") or (times > 1 and times % 1):
        raise DataError(f"repeat_time is {times!r}", where, "use a whole number, or a fraction below 1")
    beside = Path(source.path).parent / entry["annotation"]
    path = beside if beside.exists() else Path(entry["annotation"])
    result = replace(source, name=f"{source.name}/{name}", path=str(path), weight=source.weight * max(1, int(times)))
    if times < 1:
        rows = max(1, int(count(result) * times))
        result = replace(result, limit=min(rows, source.limit or rows))
    return result


def count(source: SourceConfig) -> int:
    """Rows of a source: fast for columnar files, one pass over the lines for others."""
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
        return sum(1 for line in limited_lines(lines) if not line.isspace())


def limited_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one longer than MOST_LINE only the beginning is kept."""
    while line := read_line(file)[0]:
        yield line


def read_line(file: BinaryIO) -> tuple[bytes, int]:
    """The next line, with its line break, and its bytes in the file.

    The first MOST_LINE + 1 bytes of a longer line, whose rest is skipped: one line could fill the memory.
    """
    line = file.readline(MOST_LINE + 1)
    size, rest = len(line), line
    while len(rest) > MOST_LINE and not rest.endswith(b"\n"):
        rest = file.readline(MOST_LINE + 1)
        size += len(rest)
    return line, size


def is_lines(file: Path) -> bool:
    """Whether a .jsonl or .json file has one row per line; raises DataError if it cannot be read.

    A .json file may also be one list of rows, or a meta JSON (an object whose values are objects).
    """
    if file.suffix == ".jsonl":
        return True
    try:
        with open(file, "rb") as lines:
            first, second = islice(chain((line for line in limited_lines(lines) if not line.isspace()), (b"", b"")), 2)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", str(file), "check `path`") from None
    row = _value(first)
    if row is None:  # not JSON by itself: an invalid row, or a value that continues on the next line
        return not first.lstrip().startswith(b"[") and isinstance(_value(second), dict)
    if second:
        return True
    return isinstance(row, dict) and not all(isinstance(value, dict) for value in row.values())


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


MOST_LINE = 64 << 20
"""Bytes of the longest line that is read, about 16 million tokens."""
LIST_OF_ROWS = "write one list, [row, row, ...], or one row per line into a .jsonl file"


def read_json(file: Path) -> Any:
    """The content of a JSON file; DataError if it is missing or not JSON."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError("no such file", str(file), "check `path`") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file is not JSON: {error}", str(file), LIST_OF_ROWS) from None


def read_json_list(file: Path) -> list[Any]:
    """The rows of a JSON file that contains one list; DataError otherwise."""
    content = read_json(file)
    if not isinstance(content, list):
        what = f"the file contains one value of type {type(content).__name__}, not a list of rows"
        raise DataError(what, str(file), LIST_OF_ROWS)
    return content


_SPLIT_WORD = re.compile(r"(?<![a-z0-9])(train|test|valid|val|dev|eval)(ing|idation|uation)?(?![a-z])", re.IGNORECASE)
_INFO_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def files(source: SourceConfig) -> list[Path]:
    """The files of a source, in order.

    A folder is one of: the output of `datasets`' save_to_disk; a plain folder of files, read in order of their names;
    or (if it has a README.md or subfolders, its files are named after splits, or `subset` is set) a copy of a hub
    dataset, in which `datasets` looks up the files of subset and split.

    Raises:
        DataError: there is no file, or one cannot be used.
    """
    path = Path(source.path)
    if path.is_dir():
        result = _folder_files(path, source)
    elif path.is_file():
        result = [path]
    else:
        raise DataError(f"source {source.name!r}: no such file or folder", str(path), "check `path`")
    for file in result:
        _check_file(file, source)
    return result


def _check_file(file: Path, source: SourceConfig) -> None:
    if file.suffix not in FILE_TYPES:
        what = f"source {source.name!r}: unsupported file type"
        raise DataError(what, str(file), f"use {', '.join(FILE_TYPES)}")
    try:
        with open(file, "rb") as content:
            start = content.read(40)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", str(file), "check `path`") from None
    # A clone without `git lfs` has pointer files, which would be rejected row by row.
    if start.startswith(b"version https://git-lfs"):
        fix = "run `git lfs pull` in the copy"
        raise DataError(f"source {source.name!r}: the file is a Git LFS pointer without data", str(file), fix)


def _folder_files(folder: Path, source: SourceConfig) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        file = regular_file(folder, "dataset_dict.json", DataError)
        splits = checked(read_json_object(file, DataError), "splits", list, file, DataError)
        if source.split not in splits:
            raise _no_split(source, folder, splits)
        folder = folder / source.split
    if (folder / "state.json").is_file():
        return _saved_files(folder, source)
    local = sorted(file for file in folder.iterdir() if file.suffix in FILE_TYPES and file.name not in _INFO_FILES)
    for file in local:
        regular_file(folder, file.name, DataError)
    named = any(_SPLIT_WORD.search(file.stem) for file in local)
    readme = (folder / "README.md").is_file()
    if local and not (readme or named or source.subset):
        return local
    by_split = _hub_copy(folder, source)
    assigned = {file for split in by_split.values() for file in split}
    # Without a README the assignment is guessed from names: a file that `datasets` ignores is probably an accident.
    if not readme and (ignored := [file.name for file in local if file not in assigned]):
        what = f"source {source.name!r}: `datasets` assigns {ignored[0]} to no split"
        raise DataError(what, str(folder), "name all files after their split, or set `path` to one file")
    if source.split not in by_split:
        raise _no_split(source, folder, list(by_split))
    return by_split[source.split]


def _saved_files(folder: Path, source: SourceConfig) -> list[Path]:
    """Files written by `save_to_disk`."""
    file = regular_file(folder, "state.json", DataError)
    state = read_json_object(file, DataError)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        what = f"source {source.name!r}: the saved dataset is a selection of its rows"
        raise DataError(what, str(folder), "call `flatten_indices()` and save it again")
    entries = checked(state, "_data_files", list, file, DataError)
    if not all(isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in entries):
        raise DataError("an entry has no `filename`", f"{file}, field _data_files", "save the dataset again")
    return [regular_file(folder, entry["filename"], DataError) for entry in entries]


def _hub_copy(folder: Path, source: SourceConfig) -> dict[str, list[Path]]:
    """Files per split, as `datasets` derives them from the README's YAML or from file and folder names."""
    import datasets

    try:
        with TemporaryDirectory() as cache:  # nothing is prepared there
            builder = datasets.load_dataset_builder(str(folder), source.subset or None, cache_dir=cache)
            data_files = builder.config.data_files or {}
    except Exception as error:  # the library raises many types
        what = f"source {source.name!r}: no {', '.join(FILE_TYPES)} files: {error}"
        raise DataError(what, str(folder), "check `path`, `subset` and `split`") from error
    by_split: dict[str, list[Path]] = {str(split): list(map(Path, names)) for split, names in data_files.items()}
    for file in {file for names in by_split.values() for file in names}:
        # The README may name any file of this machine, which regular_file refuses as an absolute path.
        roots = [root for root in (Path(os.path.abspath(folder)), folder.resolve()) if file.is_relative_to(root)]
        regular_file(folder, str(file.relative_to(roots[0]) if roots else file), DataError)
    return by_split


def _no_split(source: SourceConfig, folder: Path, splits: list[str]) -> DataError:
    what = f"source {source.name!r}: no split {source.split!r}; available: {', '.join(splits) or 'none'}"
    return DataError(what, str(folder), "set `split`")
