"""Stage two, in one process: numbers the documents, finds duplicates, and plans the packing of each epoch.

Everything that grows with the corpus is stored in memory-mapped files of the work folder. A plan needs memory for one
packing window, and for one bucket of digests during the search for duplicates.

    index             one INDEX record per document, in input order
    first             int64 per document: the first document with the same tokens, or -1 for that document itself
    near, similarity  data_prep/near_duplicates.py
    epochE.documents  int64: indices into the epoch's shuffled order, row by row as packed
    epochE.cut        int32: blocks that each of them loses to fill its row
    epochE.rows       int64: offset of each row in the two files above, and one final entry
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.documents import DOCUMENT, UnitResult, unit_file
from data_prep.near_duplicates import count_near_pairs, find_near_duplicates
from data_prep.packing import BestFit, ClosedRows
from data_prep.readers import InputUnit
from sdlm_megatron.data.order import shuffled_many
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import fsync, write_json
from sdlm_megatron.progress import Advance, track

_COPIED = ("token", "turn", "clean", "turns", "blocks")  # fields of DOCUMENT
# number: document number of the first copy
INDEX = np.dtype([("number", "i8"), ("unit", "i4"), ("source", "i4"), *((name, DOCUMENT[name]) for name in _COPIED)])
# Approximate number of documents whose digests are compared at once: about 200 MB.
BUCKET = 1 << 22


@dataclass
class EpochSegment:
    """Documents of one source that an epoch uses once: all of them, or the next `taken` of a shuffled order."""

    source: int
    copy: int
    first: int  # index of the source's first document
    documents: int  # number of documents of the source
    taken: int


@dataclass
class Numbering:
    """Document numbers of a build: number = first_number[source] + copy * rows[source] + row."""

    rows: list[int]  # input rows of each source
    first_number: list[int]
    documents: list[int]  # packed documents of each source


def number_sources(
    sources: Sequence[SourceConfig], units: Sequence[InputUnit], results: Sequence[UnitResult]
) -> Numbering:
    """Numbers the rows of the sources; raises DataError if the numbers exceed int32."""
    rows, documents = ([0] * len(sources) for _ in range(2))
    for unit, result in zip(units, results, strict=True):
        rows[unit.source] += result.rows
        documents[unit.source] += result.documents
    # Every copy has its own numbers, and thereby its own block draws.
    copies = [int(np.ceil(source.weight)) for source in sources]
    first = np.concatenate([[0], np.cumsum([n * c for n, c in zip(rows, copies, strict=True)])]).tolist()
    if first[-1] >= 2**31:
        raise DataError(f"{first[-1]:,} rows are too many for one dataset", "", "build several of up to 2^31 rows each")
    return Numbering(rows, first[:-1], documents)


def build_index(work: Path, units: Sequence[InputUnit], results: Sequence[UnitResult], numbering: Numbering) -> None:
    """Writes `index`: the numbered records of all units."""
    before = list(numbering.first_number)
    with open(work / "index.partial", "wb") as file:
        for i, (unit, result) in enumerate(zip(units, results, strict=True)):
            documents = np.fromfile(unit_file(work, i, "docs"), DOCUMENT)
            records = np.zeros(len(documents), INDEX)
            for name in _COPIED:
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
    """Writes `first`.

    Digests are distributed to bucket files by value, so that equal ones meet; each file is compared by itself. The
    corpus's digests would not fit in memory.
    """
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
        # Sorting by document within equal digests makes the first of each run the earliest document.
        records = records[np.lexsort((records["document"], low, high))]
        repeats = (records["digest"][1:] == records["digest"][:-1]).all(axis=1)
        head = np.maximum.accumulate(np.where(np.concatenate([[True], ~repeats]), np.arange(len(records)), 0))
        first[records["document"][1:][repeats]] = records["document"][head[1:][repeats]]
        name.unlink()
    first.flush()


def dropped_files(config: BuildConfig) -> list[str]:
    """Files of the plan whose documents are dropped because of an earlier one; no document is in two of them."""
    policies = {"first": config.duplicates, "near": config.near_duplicates}
    return [name for name, policy in policies.items() if policy == "drop"]


def drop_documents(work: Path, numbering: Numbering, files: Sequence[str]) -> Numbering:
    """Removes the documents of `dropped_files` from `index` (the original becomes `index.all`) and keeps the order."""
    os.replace(work / "index", work / "index.all")
    index, earlier = load(work, "index.all", INDEX), [load(work, name, np.int64) for name in files]
    documents = np.zeros(len(numbering.rows), dtype=np.int64)
    with open(work / "index.partial", "wb") as file:
        for at in range(0, len(index), BUCKET):
            part = index[at : at + BUCKET]
            kept = part[np.all([document[at : at + len(part)] < 0 for document in earlier], axis=0)]
            documents += np.bincount(kept["source"], minlength=len(documents))
            file.write(kept.tobytes())
    os.replace(work / "index.partial", work / "index")
    return Numbering(numbering.rows, numbering.first_number, documents.tolist())


class EpochOrder:
    """Shuffled order of the packed documents of one epoch, computed on demand instead of stored."""

    def __init__(self, config: BuildConfig, sources: Sequence[SourceConfig], numbering: Numbering, epoch: int) -> None:
        self._seed, self._epoch = config.seed, epoch
        self._numbering = numbering
        self._segments: list[EpochSegment] = []
        first = 0
        for i, (source, n) in enumerate(zip(sources, numbering.documents, strict=True)):
            for copy in range(int(np.ceil(source.weight))):
                taken = round(n * min(1.0, source.weight - copy))
                self._segments.append(EpochSegment(i, copy, first, n, taken))
            first += n
        self._edges = np.concatenate([[0], np.cumsum([segment.taken for segment in self._segments])])

    def __len__(self) -> int:
        return int(self._edges[-1])

    def documents(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the document at each place of the order, and the offset of its copy's document number; both int64
        (places,)."""
        # place -> index into the concatenated segments -> segment and document
        drawn = shuffled_many(places, len(self), seed=self._seed, epoch=self._epoch, purpose="documents")
        segment = np.searchsorted(self._edges, drawn, side="right") - 1
        within = drawn - self._edges[segment]
        index, offset = np.zeros_like(within), np.zeros_like(within)
        for i, part in enumerate(self._segments):
            selected = segment == i
            if selected.any():
                index[selected] = part.first + self._in_segment(part, within[selected])
                offset[selected] = part.copy * self._numbering.rows[part.source]
        return index, offset

    def _in_segment(self, part: EpochSegment, within: np.ndarray) -> np.ndarray:
        if part.taken == part.documents:
            return within
        # The same permutation in all epochs, from which each takes the next range: all documents are used equally.
        turn = (within + self._epoch * part.taken) % part.documents
        return shuffled_many(turn, part.documents, seed=self._seed, epoch=0, purpose=f"part of source {part.source}")


def plan_epoch(config: BuildConfig, order: EpochOrder, work: Path, epoch: int, advance: Advance) -> None:
    """Packs the documents of an epoch into rows and writes the three files of its plan."""
    index = load(work, "index", INDEX)
    packer, size = BestFit(config.row_length), config.block_size
    names = [work / f"epoch{epoch}.{kind}" for kind in ("documents", "cut", "rows")]
    files = [open(f"{name}.partial", "wb") for name in names]  # noqa: SIM115
    files[2].write(np.int64(0).tobytes())
    written = 0

    def write(packed: ClosedRows) -> None:
        nonlocal written
        files[0].write(packed.documents.astype(np.int64).tobytes())
        # Whole blocks are removed, so the cut in tokens is rounded up.
        files[1].write((-(-packed.cut // size)).astype(np.int32).tobytes())
        files[2].write((written + np.cumsum(packed.counts)).astype(np.int64).tobytes())
        written += len(packed.documents)

    for at in range(0, len(order), config.window):
        places = np.arange(at, min(at + config.window, len(order)))
        records = index[order.documents(places)[0]]
        blocks = records["blocks"].astype(np.int64)
        # at least one block remains: a document without blocks would train nothing
        spare = np.minimum((blocks * config.trim).astype(np.int64), blocks - 1) * size if config.trim else None
        write(packer.add(records["clean"] + blocks * size, spare))
        advance(len(places))
    write(packer.finish())
    for name, file in zip(names, files, strict=True):
        file.close()
        os.replace(file.name, name)
        fsync(name)


@dataclass
class PackingPlan:
    """Result of stage two; stored as plan.json once all its files are complete."""

    numbering: Numbering
    duplicates: int
    pairs: list[dict[str, str | int]]
    near: list[dict[str, Any]]  # near-duplicates by pair of sources
    rows: list[int]  # rows of each epoch
    blocks_trimmed: list[int]  # blocks trimmed in each epoch


def make_plan(
    config: BuildConfig,
    sources: Sequence[SourceConfig],
    units: Sequence[InputUnit],
    results: Sequence[UnitResult],
    work: Path,
    console: Console,
) -> PackingPlan:
    """Runs stage two, or loads its result if it has run before."""
    file = work / "plan.json"
    if file.exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        return PackingPlan(Numbering(**content.pop("numbering")), **content)
    numbering = number_sources(sources, units, results)
    build_index(work, units, results, numbering)
    find_duplicates(work, len(units))
    pairs = _count_pairs(work, sources)
    near: list[dict[str, Any]] = []
    if config.near_duplicates != "off":
        find_near_duplicates(config, work, len(units), load(work, "first", np.int64), console)
        index = load(work, "index", INDEX)
        near = count_near_pairs(work, [source.name for source in sources], index, numbering.first_number)
    if dropped := dropped_files(config):
        numbering = drop_documents(work, numbering, dropped)
    rows, trimmed = [], []
    orders = [EpochOrder(config, sources, numbering, epoch) for epoch in range(config.epochs)]
    with track("pack", sum(map(len, orders)), "documents", console) as advance:
        for epoch, order in enumerate(orders):
            plan_epoch(config, order, work, epoch, advance)
            rows.append(len(load(work, f"epoch{epoch}.rows", np.int64)) - 1)
            trimmed.append(int(load(work, f"epoch{epoch}.cut", np.int32).sum()))
    # Written last: without plan.json, stage two starts over.
    plan = PackingPlan(numbering, sum(int(pair["documents"]) for pair in pairs), pairs, near, rows, trimmed)
    write_json(file, asdict(plan))
    return plan


def _count_pairs(work: Path, sources: Sequence[SourceConfig]) -> list[dict[str, str | int]]:
    """Number of duplicates for each pair of sources."""
    index, n = load(work, "index", INDEX), len(sources)
    counts = np.zeros(n * n, dtype=np.int64)
    for duplicates, first in iterate_duplicates(work, len(index)):
        pair = index["source"][first].astype(np.int64) * n + index["source"][duplicates]
        counts += np.bincount(pair, minlength=n * n)
    return [
        {"kept": sources[i // n].name, "duplicate": sources[i % n].name, "documents": int(counts[i])}
        for i in np.flatnonzero(counts).tolist()
    ]


def iterate_duplicates(work: Path, n_documents: int, name: str = "first") -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of (duplicate documents, the earlier document that they repeat or resemble), int64 each, of a file of the
    plan."""
    first = load(work, name, np.int64)[:n_documents]
    for at in range(0, n_documents, BUCKET):
        chunk = np.asarray(first[at : at + BUCKET])
        duplicates = np.flatnonzero(chunk >= 0)
        yield at + duplicates, chunk[duplicates]
