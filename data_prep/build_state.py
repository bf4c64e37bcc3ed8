"""State of a build: its work folder, the units that are complete, and the settings with which it was begun."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_prep.build_config import BuildConfig, SourceConfig, lasting
from data_prep.documents import UnitResult, load_result
from data_prep.readers import InputUnit
from sdlm_megatron.errors import ConfigError, DataError
from sdlm_megatron.files import lock_file, write_json


@dataclass(frozen=True)
class BuildState:
    """A build in progress; equal in all processes that work on it."""

    config: BuildConfig
    sources: list[SourceConfig]
    units: list[InputUnit]
    meta: dict[str, Any]
    partial: Path
    begun: str = ""  # digest of the settings with which the build was begun

    @property
    def work(self) -> Path:
        return self.partial / "work"

    @property
    def discarded(self) -> Path:
        """Folder to which `discard` renames the work folder."""
        return self.partial.with_name(f"{self.partial.name}.old")

    @property
    def mismatch(self) -> Path:
        """File that exists once the fast encoder has returned wrong ids; contains the message."""
        return self.work / "mismatch.txt"

    @property
    def refused(self) -> Path:
        """File that exists once the build was stopped because of its rows; with other settings it then starts over."""
        return self.work / "refused"

    @property
    def rejects(self) -> Path:
        """File beside the output with the rows that stopped the build; no .jsonl, which an input *.jsonl would take."""
        return Path(f"{Path(self.config.out)}.rejects")

    def result(self, number: int) -> UnitResult | None:
        """Result of a unit; None while it is incomplete, of other settings, or may contain wrong ids."""
        result = load_result(self.work, number)
        if result is None or result.begun != self.begun:  # another build may have left it here
            return None
        return None if result.encoder.startswith("fastokens") and self.mismatch.exists() else result


def open_work(state: BuildState, settings: dict[str, Any], *, restart: bool) -> BuildState:
    """Opens the work folder, new or begun with the same settings. If they are others: starts over with `restart` and if
    the build was refused, else raises ConfigError, or DataError if only the input files changed."""
    settings = json.loads(json.dumps(settings))  # comparable with the stored file: tuples become lists
    file = state.work / "build.json"
    if state.refused.exists():
        unread = json.loads(state.refused.read_text(encoding="utf-8"))
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        same = before and lasting(before["config"], unread) == lasting(settings["config"], unread)
        resumed = {**settings, "config": before["config"]} if same else settings
        if not restart or before == resumed:
            settings = resumed
        else:
            with locked(state.work):
                if state.refused.exists():  # else another process has started over meanwhile
                    discard(state)
    if not file.exists():
        shutil.rmtree(state.discarded, ignore_errors=True)
        state.work.mkdir(parents=True, exist_ok=True)
        write_json(file, settings, shared=True)  # of several shards that start at once, each
    begun = json.loads(file.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if begun.get(key, value) == value:  # an older version does not write the weights
            continue
        if key in ("weights", "units") and settings["config"] == begun["config"]:
            raise _changed_input(state, begun[key], value)
        names = [k for k in value if begun[key].get(k) != value[k]] if isinstance(value, dict) else ["the input files"]
        raise ConfigError(
            f"this build was begun with other settings: {', '.join(names)}",
            str(state.partial),
            "use the same settings to resume it, or remove the folder to start over",
        )
    return replace(state, begun=_digest(begun))


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def input_digests(names: Sequence[str], units: Sequence[InputUnit]) -> dict[str, str]:
    """Digest by name of the content of the files of each source in their order, however they are divided into units.
    `names`: for each number of a source in the units, that in the configuration: a meta JSON has several numbers."""
    stamps = dict.fromkeys((unit.source, unit.file, unit.stamp) for unit in units)
    own = {name: [(i - names.index(name), s) for i, _, s in stamps if names[i] == name] for name in names}
    return {f"source {name}": _digest(entries) for name, entries in own.items()}


def weights_by_name(sources: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Weights and limits of sources: those of a meta JSON are neither settings nor content of the files it names."""
    return {f"weight of source {source['name']}": [source["weight"], source["limit"]] for source in sources}


def evaluation_digest(evaluation: Mapping[str, str]) -> dict[str, str]:
    """The same of the evaluation files, as from `evaluation_files`; {} without any."""
    return {"decontaminate": _digest([*evaluation.values()])} if evaluation else {}


def discard(state: BuildState) -> None:
    """Renames a work folder, of which a part would look like a build; to be removed when its lock is closed, because on
    NFS an open file stays, and so its folder."""
    shutil.rmtree(state.discarded, ignore_errors=True)
    os.replace(state.partial, state.discarded)


def _changed_input(state: BuildState, *values: Any) -> DataError:
    """Error that names the weights or the files of units that are not as they were: `values` before and now."""
    old, new = (x if isinstance(x, dict) else {unit["file"]: unit["stamp"] for unit in x} for x in values)
    names = [file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = f"the input changed after this build began: {names[0] if names else 'the order of the files'}{more}"
    fix = "restore the files to resume it, or remove the folder to start over"
    return DataError(what, str(state.partial), fix)


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Prevents a second process from completing the same build."""
    with open(work / "lock", "w", encoding="utf-8") as file:
        lock_file(file, DataError("another process works on this build", str(work.parent), "wait for it"))
        yield
