"""What became of every input row. The parts add up to the rows that were read."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build_config import SourceConfig
from data_prep.documents import DOCUMENT, UnitResult, read_rejects, unit_file
from data_prep.planning import INDEX, Numbering, load, repeated
from data_prep.readers import Unit, where
from sdlm_megatron.files import fsync

DUPLICATE = "duplicate of an earlier row"


@dataclass
class Tally:
    """Outcomes of rows: of one source, or of all. A row counts once, however often an epoch takes it."""

    rows: int = 0
    packed: int = 0
    """Whole documents."""
    truncated: int = 0
    """Packed, after turns or tokens were cut off."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Valid rows that would train nothing, or are not wanted twice, by reason."""
    rejected: int = 0
    """Rows that are no conversation."""
    turns_cut: int = 0
    tokens_cut: int = 0
    blocks_missing: int = 0
    """Blocks that long documents had no room for."""
    blocks: int = 0
    clean_tokens: int = 0
    spelled: int = 0
    """Texts that spell a special token; they were encoded as text."""

    def take(self, documents: np.ndarray) -> None:
        """Counts the DOCUMENT records that are packed."""
        truncated = int((documents["tokens_cut"] > 0).sum())
        self.truncated += truncated
        self.packed += len(documents) - truncated
        for key, name in (("turns_cut", "turns_cut"), ("tokens_cut", "tokens_cut"), ("blocks_missing", "missing")):
            setattr(self, key, getattr(self, key) + int(documents[name].sum()))
        self.blocks += int(documents["blocks"].sum())
        self.clean_tokens += int(documents["clean"].sum())

    def check(self) -> None:
        """The parts must add up: a row that vanished is a defect of this program."""
        parts = self.packed + self.truncated + self.dropped.total() + self.rejected
        assert parts == self.rows, f"{self.rows} rows were read, {parts} are accounted for"

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**vars(self), "dropped": dict(sorted(self.dropped.items()))}


def total(tallies: list[Tally]) -> Tally:
    """The sum of tallies."""
    result = Tally()
    for tally in tallies:
        for key, value in vars(tally).items():
            setattr(result, key, getattr(result, key) + value)
    return result


def account(
    work: Path,
    sources: Sequence[SourceConfig],
    units: Sequence[Unit],
    results: Sequence[UnitResult],
    numbering: Numbering,
    *,
    dropped_duplicates: bool,
) -> dict[str, Any]:
    """The totals, and of each source its tally and the number of its first document."""
    tallies = [Tally() for _ in sources]
    first = load(work, "first", np.int64) if dropped_duplicates else None
    at = 0
    for number, (unit, result) in enumerate(zip(units, results, strict=True)):
        documents, tally = np.fromfile(unit_file(work, number, "docs"), DOCUMENT), tallies[unit.source]
        if first is not None:
            kept = np.asarray(first[at : at + len(documents)]) < 0
            at += len(documents)
            if again := int((~kept).sum()):
                tally.dropped[DUPLICATE] += again
            documents = documents[kept]
        tally.rows += result.rows
        tally.dropped.update(result.dropped)
        tally.rejected += result.rejected
        tally.spelled += result.spelled
        tally.take(documents)
    by_source = []
    for source, tally, number in zip(sources, tallies, numbering.first_number, strict=True):
        tally.check()
        by_source.append({"name": source.name, "first_document": number, "weight": source.weight, **tally.to_dict()})
    whole = total(tallies)
    whole.check()
    return {**whole.to_dict(), "by_source": by_source}


def write_rejects(
    path: Path,
    work: Path,
    sources: Sequence[SourceConfig],
    units: Sequence[Unit],
    results: Sequence[UnitResult],
    numbering: Numbering,
    *,
    dropped_duplicates: bool,
) -> None:
    """Writes rejects.jsonl: one line for every input row that is no document of the dataset, with its source, row
    number, place, outcome, reason and the row itself; of a duplicate, the row it repeats."""
    with open(path, "w", encoding="utf-8") as file:
        for line in _rejected(work, sources, units, results):
            file.write(json.dumps(line, ensure_ascii=True) + "\n")
        if dropped_duplicates:
            for line in _duplicates(work, sources, numbering):
                file.write(json.dumps(line, ensure_ascii=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fsync(path.parent)


def _rejected(
    work: Path, sources: Sequence[SourceConfig], units: Sequence[Unit], results: Sequence[UnitResult]
) -> Iterator[dict[str, Any]]:
    rows, lines = [0] * len(sources), [0] * len(sources)
    last = ""
    for number, (unit, result) in enumerate(zip(units, results, strict=True)):
        if unit.file != last:
            lines[unit.source] = 0
        last = unit.file
        for line in read_rejects(work, number):
            index, place = line.pop("index"), line.pop("place")
            yield {
                "source": sources[unit.source].name,
                "row": rows[unit.source] + index,
                "where": where(unit, place, lines[unit.source]),
                **line,
            }
        rows[unit.source] += result.rows
        lines[unit.source] += result.lines


def _duplicates(work: Path, sources: Sequence[SourceConfig], numbering: Numbering) -> Iterator[dict[str, Any]]:
    index = load(work, "index.all", INDEX)
    first_number = np.array(numbering.first_number)
    for again, first in repeated(work, len(index)):
        (source, row), (kept_source, kept_row) = (
            (part["source"].tolist(), (part["number"] - first_number[part["source"]]).tolist())
            for part in (index[again], index[first])
        )
        for a, b, c, d in zip(source, row, kept_source, kept_row, strict=True):
            yield {
                "source": sources[a].name,
                "row": b,
                "outcome": "duplicate",
                "reason": DUPLICATE,
                "same_as": {"source": sources[c].name, "row": d},
            }
