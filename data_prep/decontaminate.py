"""Decontamination: rows that share words with the texts of evaluation files.

A row overlaps an evaluation text (docs/data.md) if

    texts of 13 words and more    one of its turns has 13 consecutive words of the text, as in GPT-3
    texts of 8 to 12 words        one of its turns has all words of the text in a row
    texts of 4 to 7 words         one of its turns consists of the words of the text

Shorter texts, such as the letter of an answer, are in too many rows to say anything. Words: `data_prep.words`.

Every process holds the hashes of all runs of the evaluation files: 20 to 30 bytes per word of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from data_prep.build_config import SourceConfig
from data_prep.forms import Unreadable
from data_prep.readers import plan_units, read_unit
from data_prep.sources import files
from data_prep.words import HashedWords, groups, split_words
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import sha256

RUN, SHORTEST_RUN, SHORTEST = 13, 8, 4
# Rows of an evaluation file whose texts are hashed together.
_CHUNK = 256
_SHOWN = 40  # words of an overlap in reports


@dataclass(frozen=True)
class Overlap:
    """Words that a row shares with an evaluation file."""

    file: int  # index in the list of evaluation files
    rows: list[int]  # rows of that file with some of the words, ascending
    row: int  # the first of them that has `words`
    words: str  # the first run of shared words


def evaluation_files(paths: Sequence[str]) -> dict[str, str]:
    """Digest of the content of every evaluation file, folder and hub dataset. Raises DataError if one does not exist,
    or is no source."""
    digests = dict[str, str]()
    for source in map(_source, paths):
        hub = {unit.file: unit.stamp for unit in plan_units([source])} if source.hub else {}
        digests |= hub or {str(file): sha256(file) for file in files(source)}
    return digests


class OverlapCounts:
    """Overlaps of the rows of a unit, by evaluation file."""

    def __init__(self) -> None:
        self._files: dict[int, dict[str, Any]] = {}

    def add(self, index: int, overlaps: Sequence[Overlap]) -> None:
        """Adds row `index` of the unit."""
        for overlap in overlaps:
            example = {"row": index, "evaluation_row": overlap.row, "words": overlap.words}
            entry = self._files.setdefault(overlap.file, {"rows": 0, "evaluation_rows": set(), "example": example})
            entry["rows"] += 1
            entry["evaluation_rows"].update(overlap.rows)

    def to_dict(self) -> dict[str, Any]:
        """By index of the file, as text: its number of rows, the rows of the evaluation file, and the first of each."""
        entries = sorted(self._files.items())
        return {str(i): {**entry, "evaluation_rows": sorted(entry["evaluation_rows"])} for i, entry in entries}


def open_evaluations(paths: Sequence[str]) -> "EvaluationTexts | None":
    """The texts of evaluation files, read once per process and content; None without files."""
    return _open(tuple(paths), tuple(evaluation_files(paths).items())) if paths else None


@lru_cache(maxsize=1)
def _open(paths: tuple[str, ...], _: object) -> "EvaluationTexts":
    return EvaluationTexts(paths)


def _source(path: str) -> SourceConfig:
    """The source of a path, or of hub:NAME, hub:NAME:SUBSET and hub:NAME:SUBSET:SPLIT."""
    if not path.startswith("hub:"):
        return SourceConfig(name=path, path=path)
    name, subset, split = [*path.split(":")[1:4], "", ""][:3]
    return SourceConfig(name=path, hub=name, subset=subset, split=split or "test")


def _rows(path: str) -> Iterator[list[str]]:
    """All texts of each row of an evaluation file, at any depth."""
    source = _source(path)
    for unit in plan_units([source]):
        for number, row in enumerate(read_unit(unit, source)):
            if isinstance(row.content, Unreadable):
                place = f"{unit.file}, row {number} of its unit"
                raise DataError(f"evaluation file: {row.content.reason}", place, "correct or remove the row")
            yield list(_texts(row.content))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence) and not isinstance(value, bytes):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


class EvaluationTexts:
    """Hashes of all runs of words in evaluation files.

    Args:
        paths: files or folders, of any type that sources can have. All texts of their rows are looked for.

    Raises:
        DataError: a file cannot be read, or has no text of at least SHORTEST words.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.names = list(paths)
        self.rows: list[int] = []  # rows of each file
        self.short: list[int] = []  # texts of each file that are too short to be looked for
        keys: list[np.ndarray] = []
        owners: list[np.ndarray] = []  # (file, row) of each key
        self._kinds: set[tuple[int, bool]] = set()  # (words, whether they are a whole turn) of the keys
        for number, path in enumerate(paths):
            self.rows.append(0)
            self.short.append(0)
            before = len(keys)
            texts = _rows(path)
            while rows := list(islice(texts, _CHUNK)):
                for new, row in self._hash(rows):
                    keys.append(new)
                    owners.append(np.stack([np.full(len(row), number), row + self.rows[-1]]))
                self.rows[-1] += len(rows)
            if not any(map(len, keys[before:])):
                what = f"the evaluation file has no text of at least {SHORTEST} words"
                raise DataError(what, path, "remove it from `decontaminate`")
        self._keys, (self._file, self._row) = np.concatenate(keys), np.concatenate(owners, axis=1).astype(np.int32)
        # one entry per run, file and row, in this order
        order = np.lexsort((self._row, self._file, self._keys))
        columns = [column[order] for column in (self._keys, self._file, self._row)]
        first = np.any([column[1:] != column[:-1] for column in columns], axis=0)
        self._keys, self._file, self._row = (column[np.concatenate([[True], first])] for column in columns)
        # Most runs are in no evaluation file: one byte per value of their leading bits says so without a search.
        bits = max(10, (8 * len(self._keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._present = np.zeros(1 << bits, bool)
        self._present[self._keys >> self._shift] = True

    def _hash(self, rows: Sequence[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Hashes of the runs of some rows, and the index of the row of each."""
        words = HashedWords.of([text for texts in rows for text in texts])
        row_of_text = np.repeat(np.arange(len(rows)), [len(texts) for texts in rows])
        lengths = np.diff(words.edges)
        self.short[-1] += int((lengths < SHORTEST).sum())
        for length in range(SHORTEST, RUN + 1):
            starts = words.starts(length)
            text = np.searchsorted(words.edges, starts, side="right") - 1
            if length < RUN:
                starts, text = (part[lengths[text] == length] for part in (starts, text))
            if len(starts):
                self._kinds.add((length, length < SHORTEST_RUN))
                yield words.hashes(starts, length), row_of_text[text]

    def find(self, conversations: Sequence[Sequence[tuple[Any, ...]]]) -> dict[int, list[Overlap]]:
        """The overlaps of each conversation that has some, at most one per evaluation file, in their order."""
        result: dict[int, list[Overlap]] = {}
        for group in groups(conversations):
            texts = [turn[1] for i in group for turn in conversations[i]]
            row_of_text = np.repeat(np.arange(group.start, group.stop), [len(conversations[i]) for i in group])
            words = HashedWords.of(texts)
            starts, ends, entries = self._search(words)
            text = np.searchsorted(words.edges, starts, side="right") - 1
            row = row_of_text[text]
            order = np.lexsort((starts, self._file[entries], row))
            starts, ends, entries, text, row = (part[order] for part in (starts, ends, entries, text, row))
            pair = np.stack([row, self._file[entries]])
            edges = np.flatnonzero(np.concatenate([[True], (pair[:, 1:] != pair[:, :-1]).any(axis=0), [True]]))
            for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True) if len(row) else ():
                first, last = _first_run(starts[a:b].tolist(), ends[a:b].tolist())
                at = int(words.edges[text[a]])
                shown = split_words(texts[text[a]])[first - at : last - at]
                rows = np.unique(self._row[entries[a:b]]).tolist()
                same = self._row[entries[a:b]][starts[a:b] == first]
                more = " …" if len(shown) > _SHOWN else ""
                overlap = Overlap(int(pair[1, a]), rows, int(same.min()), " ".join(shown[:_SHOWN]) + more)
                result.setdefault(int(row[a]), []).append(overlap)
        return result

    def _search(self, words: HashedWords) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First word, word after the last one, and entry of the tables of every run that an evaluation file has."""
        parts = []
        for length, whole in sorted(self._kinds):
            starts = words.edges[:-1][np.diff(words.edges) == length] if whole else words.starts(length)
            keys = words.hashes(starts, length)
            likely = self._present[keys >> self._shift]
            starts, keys = starts[likely], keys[likely]
            low, high = (np.searchsorted(self._keys, keys, side) for side in ("left", "right"))
            count = high - low
            entries = np.arange(count.sum()) + np.repeat(low - (np.cumsum(count) - count), count)
            starts = np.repeat(starts, count)
            parts.append((starts, starts + length, entries))
        starts, ends, entries = (np.concatenate(column) for column in zip(*parts, strict=True))
        return starts, ends, entries


def _first_run(starts: list[int], ends: list[int]) -> tuple[int, int]:
    """The first run of words that overlapping matches cover."""
    last = ends[0]
    for start, end in zip(starts, ends, strict=True):
        if start > last:
            break
        last = max(last, end)
    return starts[0], last
