"""What became of every input row. The parts add up to the rows that were read."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.sources import InputRow, Unreadable
from data_prep.truncate import FittedDocument
from sdlm_megatron.errors import DataError


@dataclass
class Tally:
    """Outcomes of rows: of one source, or of all."""

    rows: int = 0
    packed: int = 0
    """Whole documents."""
    truncated: int = 0
    """Packed, after turns or tokens were cut off."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Valid rows that would train nothing, by reason."""
    rejected: int = 0
    """Rows that are no conversation; rejects.jsonl tells each."""
    turns_cut: int = 0
    tokens_cut: int = 0
    blocks_missing: int = 0
    """Blocks that long documents had no room for."""
    blocks: int = 0
    clean_tokens: int = 0

    def take(self, document: FittedDocument) -> bool:
        """Counts a rendered row; True if it is to be packed."""
        self.rows += 1
        if not document.n_blocks:
            self.dropped[document.drop_reason] += 1
            return False
        if document.tokens_cut:
            self.truncated += 1
        else:
            self.packed += 1
        self.turns_cut += document.turns_cut
        self.tokens_cut += document.tokens_cut
        self.blocks_missing += document.blocks_missing
        self.blocks += document.n_blocks
        self.clean_tokens += len(document.input_ids)
        return True

    def reject(self) -> None:
        """Counts a row that is no conversation."""
        self.rows += 1
        self.rejected += 1

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


class Rejects:
    """rejects.jsonl: one line for every row that is no conversation.

    Args:
        path: file to create, even if no row is rejected.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: InputRow, document: int, error: DataError) -> None:
        """Writes source, row number, place, document number, field, reason, and the row itself."""
        line = {
            "source": row.source,
            "row": row.row,
            "where": row.where,
            "document": document,
            "field": error.where,
            "reason": error.what,
            "content": row.content.line if isinstance(row.content, Unreadable) else row.content,
        }
        # a parquet row may hold dates or bytes: what JSON cannot say is written as Python shows it
        self._file.write(json.dumps(line, ensure_ascii=True, default=repr) + "\n")
