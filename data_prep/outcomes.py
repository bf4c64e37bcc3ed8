"""Rows that are not in the dataset, by reason: their summary, and the cases in which they stop a build."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sdlm_megatron.errors import DataError

# Lists of reasons stay short even if each text is another: further ones are counted together.
MOST_REASONS, SHOWN = 200, 5
OTHER = "other reasons"


class ReasonCount(NamedTuple):
    """Rows of one source that are not in the dataset for one reason. The field names are keys of the manifest."""

    source: str
    outcome: str  # rejected, dropped or duplicate
    reason: str
    rows: int
    example: str  # file and row of the first, with the field
    fix: str  # what to do about it; may be empty


class Reasons:
    """Counts rejected and dropped rows by source, outcome and reason."""

    def __init__(self) -> None:
        self._rows: Counter[tuple[str, str, str]] = Counter()
        self._examples: dict[tuple[str, str, str], tuple[str, str]] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line of rejects.jsonl."""
        key = (line["source"], line["outcome"], line["reason"])
        if key not in self._examples and len(self._examples) >= MOST_REASONS:
            key = (*key[:2], OTHER)
        self._rows[key] += 1
        if key not in self._examples:
            place = line.get("where") or f"row {line['row']} of {line['source']}"
            field = f", field {line['field']}" if line.get("field") else ""
            example = place + field + (f": {line['detail']}" if line.get("detail") else "")
            self._examples[key] = (example, line.get("fix", ""))

    def counts(self) -> list[ReasonCount]:
        """The reasons, the most frequent first."""
        return [ReasonCount(*key, rows, *self._examples[key]) for key, rows in self._rows.most_common()]


def reason_lines(counts: Sequence[ReasonCount]) -> list[str]:
    """The most frequent reasons, one line each, and how many more there are."""
    lines = [
        f"{count.rows:,} {count.outcome}: {count.reason}" + (f" (first: {count.example})" if count.example else "")
        for count in counts[:SHOWN]
    ]
    if rest := counts[SHOWN:]:
        lines.append(f"{sum(count.rows for count in rest):,} rows for {len(rest)} more reasons")
    return lines


class SourceRows(NamedTuple):
    """Number of rows of a source, or of a sample of them."""

    name: str
    rows: int
    rejected: int  # rows that are not a valid conversation
    usable: int  # rows that become documents


def refusal(
    rows: Sequence[SourceRows],
    count: Callable[[], Sequence[ReasonCount]],
    max_rejected: float,
    *,
    listed: str = "",
    sample: bool = False,
) -> DataError | None:
    """The error that stops a build; None if enough rows remain.

    Args:
        rows: the rows of each source.
        count: returns the reasons, the most frequent first; called if the build stops.
        max_rejected: largest share of rejected rows of a source, in [0, 1].
        listed: file with all rejected rows, for the message; empty: none.
        sample: `rows` are a sample of the rows of each source.
    """
    total = sum(source.rows for source in rows)
    if not total:
        return DataError("no rows to write: the sources are empty", rows[0].name, "check the sources")
    over = [source for source in rows if source.rejected > max_rejected * source.rows]
    empty = not any(source.usable for source in rows)
    if not over and not empty:
        return None
    if not (counts := count()):
        return DataError("no rows to write: the weights select no row", rows[0].name, "set larger weights")
    # By source: one unusable source must not hide among larger ones.
    worst = max(over, key=lambda source: source.rejected / source.rows) if over else rows[0]
    if empty:
        what = f"no rows to write: all {total:,} {'sampled ' * sample}rows were rejected or dropped"
        fix = "check that the source's format matches its rows (`sdlm prepare --help` lists the formats)"
    else:
        share = worst.rejected / worst.rows
        counts = [own for own in counts if own.source == worst.name and own.outcome == "rejected"]
        what = (
            f"source {worst.name!r}: {worst.rejected:,} of {worst.rows:,} {'sampled ' * sample}rows ({share:.1%}) "
            f"were rejected, more than max_rejected allows ({max_rejected:.1%})"
        )
        fix = f"repair the rows, or leave them out with --max_rejected={math.ceil(100 * share) / 100:g}"
    # What a reason says about itself is better advice than a look at the format.
    advice = [counts[0].fix, f"{listed} lists every such row" if listed else "", "" if empty and counts[0].fix else fix]
    where = counts[0].example
    return DataError("\n    ".join([what, *reason_lines(counts)]), where, "; ".join(filter(None, advice)))
