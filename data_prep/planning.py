"""Stage two, in one process: the documents get their numbers, duplicates are found, and each epoch is planned.

Everything that grows with the corpus lies in files of the work folder, memory-mapped: a plan costs the memory of a
packing window, and of a stretch of the digests while duplicates are looked for.

    index             an INDEX record for each document, in the order of the input
    first             int64 for each document: the first one with the same tokens, -1 if it is that itself
    epochE.documents  int64: places in the epoch's order, row after row as they were packed
    epochE.cut        int32: blocks each of them loses to fill its row
    epochE.rows       int64: where each row begins in the two files above; one more at the end
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.documents import DOCUMENT, UnitResult, unit_file
from data_prep.packing import BestFit, PackedRows
from data_prep.readers import Unit
from sdlm_megatron.data.order import shuffled_many
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import fsync, write_json
from sdlm_megatron.progress import Advance

INDEX = np.dtype(
    [
        ("number", "i8"),  # of its first copy
        ("unit", "i4"),
        ("source", "i4"),
        ("token", "i8"),
        ("turn", "i8"),
        ("clean", "i4"),
        ("turns", "i4"),
        ("blocks", "i4"),
    ]
)
BUCKET = 1 << 22
"""Documents whose digests are compared together, about."""


@dataclass
class Segment:
    """Documents of one source that an epoch takes once."""

    source: int
    copy: int
    first: int
    """Index of the source's first document."""
    documents: int
    """Documents of the source."""
    taken: int
    """Of these the epoch takes so many: all of them, or a stretch of a shuffled order that moves from epoch to
    epoch."""


@dataclass
class Numbering:
    """How the documents of a build are numbered: number = first_number[source] + copy * rows[source] + row."""

    rows: list[int]
    """Input rows of each source."""
    first_number: list[int]
    documents: list[int]
    """Documents of each source that are packed."""


def number_sources(sources: Sequence[SourceConfig], units: Sequence[Unit], results: Sequence[UnitResult]) -> Numbering:
    """Numbers the rows of the sources; DataError when int32 cannot hold the numbers."""
    rows, documents = ([0] * len(sources) for _ in range(2))
    for unit, result in zip(units, results, strict=True):
        rows[unit.source] += result.rows
        documents[unit.source] += result.documents
    copies = [int(np.ceil(source.weight)) for source in sources]
    first = np.concatenate([[0], np.cumsum([n * c for n, c in zip(rows, copies, strict=True)])]).tolist()
    if first[-1] >= 2**31:
        raise DataError(f"{first[-1]:,} rows are too many for one dataset", "", "build it as several, below 2^31 rows")
    return Numbering(rows, first[:-1], documents)


def build_index(work: Path, units: Sequence[Unit], results: Sequence[UnitResult], numbering: Numbering) -> None:
    """Writes `index`: the records of all units with their numbers."""
    before = list(numbering.first_number)
    with open(work / "index.partial", "wb") as file:
        for i, (unit, result) in enumerate(zip(units, results, strict=True)):
            documents = np.fromfile(unit_file(work, i, "docs"), DOCUMENT)
            records = np.zeros(len(documents), INDEX)
            for name in ("token", "turn", "clean", "turns", "blocks"):
                records[name] = documents[name]
            records["number"] = documents["row"] + before[unit.source]
            records["unit"], records["source"] = i, unit.source
            file.write(records.tobytes())
            before[unit.source] += result.rows
    os.replace(work / "index.partial", work / "index")


def load(work: Path, name: str, dtype: np.dtype | type) -> np.ndarray:
    """A file of the plan, memory-mapped."""
    file = work / name
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)


def find_duplicates(work: Path, n_units: int) -> None:
    """Writes `first`. Digests are dealt out to files by their value, so that equal ones meet; each file is then
    compared by itself."""
    index = load(work, "index", INDEX)
    first = np.memmap(work / "first", np.int64, "w+", shape=(max(1, len(index)),))
    first[:] = -1
    n_buckets = 1 + len(index) // BUCKET
    names = [work / f"digests{i}" for i in range(n_buckets)]
    record = np.dtype([("digest", "u8", (2,)), ("document", "i8")])
    files = [open(name, "wb") for name in names]  # noqa: SIM115
    at = 0
    for unit in range(n_units):
        digests = np.fromfile(unit_file(work, unit, "docs"), DOCUMENT)["digest"]
        records = np.zeros(len(digests), record)
        records["digest"], records["document"] = digests, np.arange(at, at + len(digests))
        bucket = digests[:, 0] % np.uint64(n_buckets)
        for i in range(n_buckets):
            files[i].write(records[bucket == i].tobytes())
        at += len(digests)
    for name, file in zip(names, files, strict=True):
        file.close()
        records = np.fromfile(name, record)
        low, high = records["digest"].T
        records = records[np.lexsort((records["document"], low, high))]
        again = (records["digest"][1:] == records["digest"][:-1]).all(axis=1)
        head = np.maximum.accumulate(np.where(np.concatenate([[True], ~again]), np.arange(len(records)), 0))
        first[records["document"][1:][again]] = records["document"][head[1:][again]]
        name.unlink()
    first.flush()


def drop_duplicates(work: Path, numbering: Numbering) -> Numbering:
    """Takes the duplicates out of `index` (kept as `index.all`), in the same order."""
    os.replace(work / "index", work / "index.all")
    index, first = load(work, "index.all", INDEX), load(work, "first", np.int64)
    documents = np.zeros(len(numbering.rows), dtype=np.int64)
    with open(work / "index.partial", "wb") as file:
        for at in range(0, len(index), BUCKET):
            kept = index[at : at + BUCKET][first[at : at + BUCKET] < 0]
            documents += np.bincount(kept["source"], minlength=len(documents))
            file.write(kept.tobytes())
    os.replace(work / "index.partial", work / "index")
    return Numbering(numbering.rows, numbering.first_number, documents.tolist())


class EpochOrder:
    """The documents of one epoch in shuffled order: place -> document, without a list of them.

    Args:
        config: seed; sources: weights; numbering: of the documents that are packed.
    """

    def __init__(self, config: BuildConfig, sources: Sequence[SourceConfig], numbering: Numbering, epoch: int) -> None:
        self._seed, self._epoch = config.seed, epoch
        self._numbering = numbering
        self._segments: list[Segment] = []
        first = 0
        for i, (source, n) in enumerate(zip(sources, numbering.documents, strict=True)):
            for copy in range(int(np.ceil(source.weight))):
                taken = round(n * min(1.0, source.weight - copy))
                self._segments.append(Segment(i, copy, first, n, taken))
            first += n
        self._edges = np.concatenate([[0], np.cumsum([segment.taken for segment in self._segments])])

    def __len__(self) -> int:
        return int(self._edges[-1])

    def documents(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the document at each place, and what is to be added to its number for the copy that is meant;
        int64 (places,)."""
        drawn = shuffled_many(places, len(self), seed=self._seed, epoch=self._epoch, purpose="documents")
        segment = np.searchsorted(self._edges, drawn, side="right") - 1
        within = drawn - self._edges[segment]
        index, added = np.zeros_like(within), np.zeros_like(within)
        for i, part in enumerate(self._segments):
            mine = segment == i
            if mine.any():
                index[mine] = part.first + self._in_segment(part, within[mine])
                added[mine] = part.copy * self._numbering.rows[part.source]
        return index, added

    def _in_segment(self, part: Segment, within: np.ndarray) -> np.ndarray:
        if part.taken == part.documents:
            return within
        turn = (within + self._epoch * part.taken) % part.documents
        return shuffled_many(turn, part.documents, seed=self._seed, epoch=0, purpose=f"part of source {part.source}")


def plan_epoch(config: BuildConfig, order: EpochOrder, work: Path, epoch: int, advance: Advance) -> None:
    """Packs the documents of an epoch into rows and writes the plan's three files."""
    index = load(work, "index", INDEX)
    packer, size = BestFit(config.row_length), config.block_size
    names = [work / f"epoch{epoch}.{kind}" for kind in ("documents", "cut", "rows")]
    files = [open(f"{name}.partial", "wb") for name in names]  # noqa: SIM115
    files[2].write(np.int64(0).tobytes())
    written = 0

    def write(packed: PackedRows) -> None:
        nonlocal written
        files[0].write(packed.documents.astype(np.int64).tobytes())
        files[1].write((-(-packed.cut // size)).astype(np.int32).tobytes())
        files[2].write((written + np.cumsum(packed.counts)).astype(np.int64).tobytes())
        written += len(packed.documents)

    for at in range(0, len(order), config.window):
        places = np.arange(at, min(at + config.window, len(order)))
        found = index[order.documents(places)[0]]
        blocks = found["blocks"].astype(np.int64)
        # at least one block stays
        spare = np.minimum((blocks * config.trim).astype(np.int64), blocks - 1) * size if config.trim else None
        write(packer.add(found["clean"] + blocks * size, spare))
        advance(len(places))
    write(packer.finish())
    for name, file in zip(names, files, strict=True):
        file.close()
        os.replace(file.name, name)
        fsync(name)


@dataclass
class Plan:
    """What stage two found; stored as plan.json when all its files are whole."""

    numbering: Numbering
    duplicates: int
    pairs: list[dict[str, str | int]]
    rows: list[int]
    """Rows of each epoch."""
    blocks_trimmed: list[int]
    """Of each epoch."""


def make_plan(
    config: BuildConfig,
    sources: Sequence[SourceConfig],
    units: Sequence[Unit],
    results: Sequence[UnitResult],
    work: Path,
    advance: Advance,
) -> Plan:
    """Runs stage two, or returns its result when it has run before."""
    file = work / "plan.json"
    if file.exists():
        content = json.loads(file.read_text())
        return Plan(Numbering(**content.pop("numbering")), **content)
    numbering = number_sources(sources, units, results)
    build_index(work, units, results, numbering)
    find_duplicates(work, len(units))
    pairs = _pairs(work, sources)
    if config.duplicates == "drop":
        numbering = drop_duplicates(work, numbering)
    rows, trimmed = [], []
    for epoch in range(config.epochs):
        plan_epoch(config, EpochOrder(config, sources, numbering, epoch), work, epoch, advance)
        rows.append(len(load(work, f"epoch{epoch}.rows", np.int64)) - 1)
        trimmed.append(int(load(work, f"epoch{epoch}.cut", np.int32).sum()))
    plan = Plan(numbering, sum(int(pair["documents"]) for pair in pairs), pairs, rows, trimmed)
    write_json(file, asdict(plan))
    return plan


def _pairs(work: Path, sources: Sequence[SourceConfig]) -> list[dict[str, str | int]]:
    """How many documents of which source repeat one of which source."""
    index, n = load(work, "index", INDEX), len(sources)
    found = np.zeros(n * n, dtype=np.int64)
    for again, first in repeated(work, len(index)):
        found += np.bincount(index["source"][first].astype(np.int64) * n + index["source"][again], minlength=n * n)
    return [
        {"kept": sources[i // n].name, "duplicate": sources[i % n].name, "documents": int(found[i])}
        for i in np.flatnonzero(found).tolist()
    ]


def repeated(work: Path, n_documents: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stretches of (documents that repeat an earlier one, the earlier ones), int64 each."""
    first = load(work, "first", np.int64)[:n_documents]
    for at in range(0, n_documents, BUCKET):
        stretch = np.asarray(first[at : at + BUCKET])
        again = np.flatnonzero(stretch >= 0)
        yield at + again, stretch[again]
