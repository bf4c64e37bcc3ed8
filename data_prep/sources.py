"""Sources: the files in which a source's rows are stored."""

import glob
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_prep.build_config import SourceConfig
from data_prep.columnar import open_hub, open_table
from data_prep.csv_files import count_csv
from data_prep.input_bytes import COMPRESSIONS, file_type, is_columnar, limited_lines, open_utf8, reading, stamp
from data_prep.json_files import is_entry, json_elements, read_meta
from data_prep.source_formats import FILE_TYPES
from sdlm_megatron.errors import ConfigError, DataError
from sdlm_megatron.files import checked, read_json_object, regular_file


def expand(sources: list[SourceConfig]) -> list[SourceConfig]:
    """Replaces every ShareGPT meta JSON by the annotation files it lists: one source per entry, named NAME/ENTRY.

    `repeat_time` becomes the weight. A fraction selects the first part of the file, as in the reference code.
    """
    result: list[SourceConfig] = []
    for source in sources:
        path = Path(source.path)
        is_json = source.format in ("", "sharegpt") and path.suffix.lower() == ".json" and path.is_file()
        meta = read_meta(path) if is_json else None
        if meta is None or not (source.format or any(map(is_entry, meta.values()))):
            result.append(source)
        else:
            result += [_from_meta(source, str(name), entry) for name, entry in meta.items()]
    return result


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


def input_sources(inputs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Settings of one source for each list of paths of the command line: its location, and a name of its own, from the
    end of the path, or of what the paths have in common. ConfigError: a hub dataset beside another path."""
    places, ends = list[dict[str, Any]](), []
    for paths in inputs:
        if len(paths) > 1 and any(path.startswith("hub:") for path in paths):
            fix = " ".join(f"--input {shlex.quote(path)}" for path in paths)
            raise ConfigError("a hub dataset needs an --input of its own", f"--input {shlex.join(paths)}", fix)
        hub = paths[0].removeprefix("hub:") if paths[0].startswith("hub:") else ""
        places.append({"hub": hub} if hub else {"path": paths[0]} if len(paths) == 1 else {"paths": list(paths)})
        common = hub or os.path.commonpath([os.path.abspath(path) for path in paths])
        *folders, last = [*takewhile(lambda part: not glob.has_magic(part), Path(common).parts)] or [""]
        ends.append([*folders[-2:], last if hub else last.strip("/").partition(".")[0] or "input"])
    choices = [["-".join(end[-depth:]) for end in ends] for depth in (1, 2, 3)]
    choices.append([f"{name}-{i}" for i, name in enumerate(choices[0], 1)])
    names = next(names for names in choices if len(set(names)) == len(names))
    return [{"name": name, **place} for name, place in zip(names, places, strict=True)]


def count(source: SourceConfig) -> int:
    """Rows of a source: fast for columnar files, one pass over the others."""
    hub = open_hub(source.hub, source.subset, source.split, source.revision) if source.hub else None
    paths = hub.files if hub else files(source)
    total = hub.rows if hub and hub.schema else sum(_count_file(file, source.encoding) for file in paths)
    return min(total, source.limit) if source.limit else total


def _count_file(file: Path, encoding: str) -> int:
    if is_columnar(file):
        return open_table(file).rows
    if file_type(file).content == ".csv":
        return count_csv(file, encoding, stamp(file))
    if (elements := json_elements(file, encoding, stamp(file))) is not None:
        return elements.rows
    with reading(file), open_utf8(file, encoding) as lines:
        return sum(1 for line in limited_lines(lines) if not line.isspace())


_SPLIT_WORD = re.compile(r"(?<![a-z0-9])(train|test|valid|val|dev|eval)(ing|idation|uation)?(?![a-z])", re.IGNORECASE)
_INFO_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def files(source: SourceConfig) -> list[Path]:
    """The files of a source, in order: those of each of its paths. A path is a file, a folder or a glob.

    A folder is one of: the output of `datasets`' save_to_disk; a copy of a hub dataset, in which `datasets` looks up
    the files of subset and split (its README.md names files, names contain that of a split, or `subset` is set); or a
    plain folder, whose files and those of its subfolders are read in order of their names.

    Raises:
        DataError: there is no file, or one cannot be used.
    """
    result = [file for path in _paths(source) for file in _files_of(path, source)]
    seen = set()
    for file in result:
        if (name := os.path.abspath(file)) in seen:
            fix = "name it once; `weight` says how often its rows are used"
            raise DataError(f"source {source.name!r}: a file is named twice", str(file), fix)
        seen.add(name)
        _check_file(file, source)
    return result


def unread_files(source: SourceConfig) -> list[Path]:
    """Files in the folders of a local source that are not read, without descriptions of the data and hidden files."""
    if source.hub:
        return []
    used = {Path(os.path.abspath(file)) for file in files(source)}
    known = (*_INFO_FILES, "README.md")
    below = (file for folder in _paths(source) if folder.is_dir() for file in _walk(folder))
    return [file for file in below if Path(os.path.abspath(file)) not in used and file.name not in known]


def _paths(source: SourceConfig) -> list[Path]:
    """The paths of a source, with the matches of a glob in order of their names."""
    result: list[Path] = []
    for path in source.paths or [source.path]:
        if not glob.has_magic(path) or os.path.lexists(path):
            result.append(Path(path))
            continue
        matches = sorted(map(Path, glob.glob(path, recursive=True)))
        if not matches:
            raise DataError(f"source {source.name!r}: no file matches", path, "check `path`")
        # a/** also gives the folders whose files it gives
        result += [m for m in matches if m.is_file()] if "**" in path else matches
    return result


def _files_of(path: Path, source: SourceConfig) -> list[Path]:
    if path.is_dir():
        return _folder_files(path, source)
    if not path.is_file():
        raise DataError(f"source {source.name!r}: no such file or folder", str(path), "check `path`")
    return [path]


def _check_file(file: Path, source: SourceConfig) -> None:
    if file_type(file).content not in FILE_TYPES:
        what = f"source {source.name!r}: unsupported file type"
        fix = f"use {', '.join(FILE_TYPES)}, each also {', '.join(COMPRESSIONS)}"
        raise DataError(what, str(file), fix)
    try:
        with open(file, "rb") as content:
            start = content.read(40)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", str(file), "check `path`") from None
    # A clone without `git lfs` has pointer files, which would be rejected row by row.
    if start.startswith(b"version https://git-lfs"):
        fix = "run `git lfs pull` in the copy"
        raise DataError(f"source {source.name!r}: the file is a Git LFS pointer without data", str(file), fix)


def _walk(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, in order of their names; links to folders are not followed."""
    below = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in links]
        below += [Path(parent, name) for name in (*names, *links) if not name.startswith(".")]
    return sorted(below)


def _folder_files(folder: Path, source: SourceConfig) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        file = regular_file(folder, "dataset_dict.json", DataError)
        splits = checked(read_json_object(file, DataError), "splits", list, file, DataError)
        if source.split not in splits:
            raise _no_split(source, folder, splits)
        folder = folder / source.split
    if (folder / "state.json").is_file():
        return _saved_files(folder, source)
    below = [file for file in _walk(folder) if file_type(file).content in FILE_TYPES and file.name not in _INFO_FILES]
    for file in below:
        regular_file(folder, str(file.relative_to(folder)), DataError)
    named = any(
        _SPLIT_WORD.search(name) for file in below for name in (*file.relative_to(folder).parent.parts, file.stem)
    )
    readme = folder / "README.md"
    described = readme.is_file() and b"data_files:" in readme.read_bytes()[: 1 << 20]
    if not (described or named or source.subset):
        if not below:
            raise DataError(f"source {source.name!r}: no {', '.join(FILE_TYPES)} files", str(folder), "check `path`")
        return below
    by_split = _hub_copy(folder, source)
    assigned = {file for split in by_split.values() for file in split}
    # Without a README the assignment is guessed from names: a file that `datasets` ignores is probably an accident.
    if not described and (ignored := [file.name for file in below if file.parent == folder and file not in assigned]):
        what = f"source {source.name!r}: `datasets` assigns {ignored[0]} to no split"
        raise DataError(what, str(folder), "name all files after their split, or set `path` to files, such as DIR/a*")
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
