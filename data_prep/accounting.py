"""Accounting of every input row: the outcomes add up to the rows that were read."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build_config import SourceConfig
from data_prep.documents import DOCUMENT, UnitResult, read_rejects, unit_file
from data_prep.outcomes import ReasonCount, Reasons, SourceRows
from data_prep.planning import INDEX, Numbering, iterate_duplicates, load
from data_prep.readers import InputUnit, where
from sdlm_megatron.files import fsync

DUPLICATE, NEAR_DUPLICATE = "duplicate of an earlier row", "near-duplicate of an earlier row"
REASONS = {"first": DUPLICATE, "near": NEAR_DUPLICATE}
"""Reason for dropping the documents of each of `planning.dropped_files`."""


@dataclass
class Tally:
    """Outcomes of the rows of one source or of all sources. A row counts once, regardless of its weight. The field
    names are keys of the manifest."""

    rows: int = 0
    packed: int = 0  # documents packed completely
    truncated: int = 0  # documents packed after turns or tokens were removed
    dropped: Counter[str] = field(default_factory=Counter)
    """Valid rows without a training target and dropped duplicates, by reason."""
    rejected: int = 0  # rows that are not a valid conversation
    turns_cut: int = 0
    tokens_cut: int = 0
    blocks_missing: int = 0  # blocks of long documents that did not fit
    blocks: int = 0
    clean_tokens: int = 0
    spelled: int = 0  # texts that spell a special token, encoded as plain text

    def take(self, documents: np.ndarray) -> None:
        """Adds packed DOCUMENT records."""
        truncated = int((documents["tokens_cut"] > 0).sum())
        self.truncated += truncated
        self.packed += len(documents) - truncated
        self.turns_cut += int(documents["turns_cut"].sum())
        self.tokens_cut += int(documents["tokens_cut"].sum())
        self.blocks_missing += int(documents["missing"].sum())
        self.blocks += int(documents["blocks"].sum())
        self.clean_tokens += int(documents["clean"].sum())

    def check(self) -> None:
        """Asserts that the outcomes add up: a lost row is a bug of this program."""
        parts = self.packed + self.truncated + self.dropped.total() + self.rejected
        assert parts == self.rows, f"{self.rows} rows were read, {parts} are accounted for"

    def to_dict(self) -> dict[str, Any]:
        """Entry of the manifest."""
        return {**vars(self), "dropped": dict(sorted((+self.dropped).items()))}


@dataclass(frozen=True)
class Accounting:
    """Outcomes of the rows of a build whose plan is complete."""

    work: Path
    sources: Sequence[SourceConfig]
    units: Sequence[InputUnit]
    results: Sequence[UnitResult]
    numbering: Numbering
    dropped: Sequence[str]  # files of the plan whose documents were removed

    def source_rows(self) -> list[SourceRows]:
        """The rows of each source."""
        totals = np.zeros((len(self.sources), 3), dtype=np.int64)
        for unit, result in zip(self.units, self.results, strict=True):
            totals[unit.source] += (result.rows, result.rejected, result.documents)
        return [SourceRows(source.name, *row) for source, row in zip(self.sources, totals.tolist(), strict=True)]

    def summarize(self) -> dict[str, Any]:
        """The `accounting` entry of the manifest: totals, and per source its tally and its first document number."""
        tallies = [Tally() for _ in self.sources]
        earlier = {REASONS[name]: load(self.work, name, np.int64) for name in self.dropped}
        at = 0
        for number, (unit, result) in enumerate(zip(self.units, self.results, strict=True)):
            documents, tally = np.fromfile(unit_file(self.work, number, "docs"), DOCUMENT), tallies[unit.source]
            kept = np.ones(len(documents), bool)
            for reason, file in earlier.items():  # each has one entry per document, over the units in order
                again = np.asarray(file[at : at + len(documents)]) >= 0
                tally.dropped[reason] += int(again.sum())
                kept &= ~again
            at += len(documents)
            documents = documents[kept]
            tally.rows += result.rows
            tally.dropped.update(result.dropped)
            tally.rejected += result.rejected
            tally.spelled += result.spelled
            tally.take(documents)
        total, by_source = Tally(), []
        for source, tally, number in zip(self.sources, tallies, self.numbering.first_number, strict=True):
            tally.check()
            for key, value in vars(tally).items():
                setattr(total, key, getattr(total, key) + value)
            head = {"name": source.name, "first_document": number, "weight": source.weight}
            by_source.append({**head, **tally.to_dict()})
        return {**total.to_dict(), "by_source": by_source}

    def write_untrained(self, path: Path) -> bool:
        """Writes the answers that are not trained (row_rules.UNTRAINED_FILE); returns whether there are any."""
        keys: list[list[np.ndarray]] = [[] for _ in self.sources]
        before = list(self.numbering.first_number)
        for number, (unit, result) in enumerate(zip(self.units, self.results, strict=True)):
            rows = np.fromfile(unit_file(self.work, number, "untrained"), np.int64)
            keys[unit.source].append(rows + (before[unit.source] << 32))
            before[unit.source] += result.rows
        if not any(map(len, (part for parts in keys for part in parts))):
            return False
        with open(path, "wb") as file:
            for source, n_rows, parts in zip(self.sources, self.numbering.rows, keys, strict=True):
                for copy in range(int(np.ceil(source.weight))):  # every copy has its own numbers
                    for part in parts:
                        file.write((part + (copy * n_rows << 32)).tobytes())
            file.flush()
            os.fsync(file.fileno())
        return True

    def write_rejects(self, path: Path) -> list[ReasonCount]:
        """Writes rejects.jsonl and returns its reasons: one line per input row that is not in the dataset, with its
        source, row number, position, outcome, reason and content; for a duplicate, the row it repeats."""
        reasons = Reasons()
        with open(path, "w", encoding="utf-8") as file:
            repeats = (line for name in self.dropped for line in self._duplicates(name))
            for line in chain(self._rejected(), repeats):
                reasons.add(line)
                file.write(json.dumps(line, ensure_ascii=True) + "\n")
            # The manifest will contain the checksum of this file: it must not be lost after the manifest is written.
            file.flush()
            os.fsync(file.fileno())
        fsync(path.parent)
        return reasons.counts()

    def _places(self) -> Iterator[tuple[InputUnit, int, int]]:
        """(unit, rows of its source before it, lines of its file before it) of each unit."""
        rows, lines, last = [0] * len(self.sources), 0, (-1, "")
        for unit, result in zip(self.units, self.results, strict=True):
            lines = lines if (unit.source, unit.file) == last else 0  # line numbers restart in every file
            last = (unit.source, unit.file)
            yield unit, rows[unit.source], lines
            rows[unit.source] += result.rows
            lines += result.lines

    def _rejected(self) -> Iterator[dict[str, Any]]:
        for number, (unit, rows, lines) in enumerate(self._places()):
            for line in read_rejects(self.work, number):
                row, place = rows + line.pop("index"), where(unit, line.pop("place"), lines)
                yield {"source": self.sources[unit.source].name, "row": row, "where": place, **line}

    def _duplicates(self, name: str) -> Iterator[dict[str, Any]]:
        index = load(self.work, "index.all", INDEX)  # `index` no longer has the duplicates
        first_number = np.array(self.numbering.first_number)
        names = [source.name for source in self.sources]
        similarity = load(self.work, "similarity", np.float32) if name == "near" else None
        for duplicates, first in iterate_duplicates(self.work, len(index), name):
            own, kept = (
                zip(part["source"].tolist(), (part["number"] - first_number[part["source"]]).tolist(), strict=True)
                for part in (index[duplicates], index[first])
            )
            similar = similarity[duplicates].tolist() if similarity is not None else [None] * len(duplicates)
            for (source, row), (kept_source, kept_row), share in zip(own, kept, similar, strict=True):
                yield {
                    "source": names[source],
                    "row": row,
                    "outcome": "duplicate",
                    "reason": REASONS[name],
                    "same_as": {"source": names[kept_source], "row": kept_row},
                    **({} if share is None else {"similarity": round(share, 3)}),
                }
