"""Accounting of every input row: the outcomes add up to the rows that were read."""

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
from data_prep.planning import INDEX, Numbering, iterate_duplicates, load
from data_prep.readers import InputUnit, where
from sdlm_megatron.files import fsync

DUPLICATE = "duplicate of an earlier row"


@dataclass
class Tally:
    """Outcomes of the rows of one source or of all sources. A row counts once, regardless of its weight. The field
    names are keys of the manifest."""

    rows: int = 0
    packed: int = 0
    """Documents packed completely."""
    truncated: int = 0
    """Documents packed after turns or tokens were removed."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Valid rows without a training target and dropped duplicates, by reason."""
    rejected: int = 0
    """Rows that are not a valid conversation."""
    turns_cut: int = 0
    tokens_cut: int = 0
    blocks_missing: int = 0
    """Blocks of long documents that did not fit."""
    blocks: int = 0
    clean_tokens: int = 0
    spelled: int = 0
    """Texts that spell a special token, encoded as plain text."""

    def take(self, documents: np.ndarray) -> None:
        """Adds packed DOCUMENT records."""
        truncated = int((documents["tokens_cut"] > 0).sum())
        self.truncated += truncated
        self.packed += len(documents) - truncated
        for key, name in (("turns_cut", "turns_cut"), ("tokens_cut", "tokens_cut"), ("blocks_missing", "missing")):
            setattr(self, key, getattr(self, key) + int(documents[name].sum()))
        self.blocks += int(documents["blocks"].sum())
        self.clean_tokens += int(documents["clean"].sum())

    def check(self) -> None:
        """Asserts that the outcomes add up: a lost row is a bug of this program."""
        parts = self.packed + self.truncated + self.dropped.total() + self.rejected
        assert parts == self.rows, f"{self.rows} rows were read, {parts} are accounted for"

    def to_dict(self) -> dict[str, Any]:
        """Entry of the manifest."""
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
    units: Sequence[InputUnit],
    results: Sequence[UnitResult],
    numbering: Numbering,
    *,
    dropped_duplicates: bool,
) -> dict[str, Any]:
    """The `accounting` entry of the manifest: totals, and per source its tally and the number of its first document."""
    tallies = [Tally() for _ in sources]
    first = load(work, "first", np.int64) if dropped_duplicates else None
    at = 0
    for number, (unit, result) in enumerate(zip(units, results, strict=True)):
        documents, tally = np.fromfile(unit_file(work, number, "docs"), DOCUMENT), tallies[unit.source]
        if first is not None:
            kept = np.asarray(first[at : at + len(documents)]) < 0
            at += len(documents)
            if duplicates := int((~kept).sum()):
                tally.dropped[DUPLICATE] += duplicates
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
    units: Sequence[InputUnit],
    results: Sequence[UnitResult],
    numbering: Numbering,
    *,
    dropped_duplicates: bool,
) -> None:
    """Writes rejects.jsonl: one line per input row that is not in the dataset, with its source, row number, position,
    outcome, reason and content; for a duplicate, the row it repeats."""
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
    work: Path, sources: Sequence[SourceConfig], units: Sequence[InputUnit], results: Sequence[UnitResult]
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
    for duplicates, first in iterate_duplicates(work, len(index)):
        (source, row), (kept_source, kept_row) = (
            (part["source"].tolist(), (part["number"] - first_number[part["source"]]).tolist())
            for part in (index[duplicates], index[first])
        )
        for own_source, own_row, first_source, first_row in zip(source, row, kept_source, kept_row, strict=True):
            yield {
                "source": sources[own_source].name,
                "row": own_row,
                "outcome": "duplicate",
                "reason": DUPLICATE,
                "same_as": {"source": sources[first_source].name, "row": first_row},
            }
