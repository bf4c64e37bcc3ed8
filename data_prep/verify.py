"""Checks a packed dataset: `python -m data_prep.verify DATASET`.

Everything is read again, and every rule of docs/method.md is checked on every row: from the tokens alone it follows
where the turns lie, so where blocks may start, how many there are, which were drawn, and what they hold.

Exit code 0: clean. 1: findings, each with its place. 2: no dataset.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_prep.pool import cpus, work_on
from data_prep.row_rules import ROW_RULES, Facts, check_row, check_targets
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.format import KINDS, Counts, PartReader, prefix, read_manifest
from sdlm_megatron.diffusion.layout import IGNORE, slot_targets
from sdlm_megatron.errors import DataError, run_cli
from sdlm_megatron.progress import track

RULES = {
    "files": "every file of the manifest is there, with its size and sha256",
    "parts": "the index of each part fits its data and the manifest's number of rows",
    "checksum": "each row has the crc32 it was written with, and tokens and layout fit each other",
    **ROW_RULES,
    "numbers": "an epoch holds no document twice, none beyond the sources' rows, and as many as the weights say",
    "counts": "the manifest's counts are what the rows hold",
    "accounting": "the outcomes of the input rows add up, in each source, in all, and to what the epochs hold",
    "rejects": "rejects.jsonl has one line for each dropped or rejected row of each source",
}
"""Rule -> what it says."""

SHOWN = 20
"""Places that are printed of each rule."""
KEPT = 500
"""Findings that are kept of one part."""
TARGETS_EVERY = 64
"""The targets of one row in so many are derived twice."""


@dataclass(frozen=True)
class Finding:
    """A broken rule."""

    rule: str
    where: str
    what: str


@dataclass
class PartReport:
    """What was found in a part."""

    findings: list[Finding] = field(default_factory=list)
    more: int = 0
    """Findings beyond KEPT."""
    counts: Counts = field(default_factory=Counts)
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """int32 (documents,): their numbers."""


def verify(path: str | Path, console: Console | None = None, *, workers: int = 1) -> list[Finding]:
    """Checks a dataset; returns what is wrong with it. DataError when the folder is no dataset."""
    path, console = Path(path), console or Console()
    manifest = read_manifest(path)
    Facts.of(manifest)
    tasks = [(e, p, rows) for e, parts in enumerate(manifest["part_rows"]) for p, rows in enumerate(parts)]
    findings = [*_accounting(manifest), *_rejects(path, manifest), *_other_files(path, manifest)]
    epochs: list[list[PartReport]] = [[] for _ in manifest["part_rows"]]
    with track("verify", sum(rows for _, _, rows in tasks), "rows", console) as advance:
        for (epoch, _, rows), report in work_on(tasks, Checker, (path, manifest), workers):
            epochs[epoch].append(report)
            findings += report.findings
            advance(rows, report.counts.clean + report.counts.block)
    for epoch, reports in enumerate(epochs):
        findings += _numbers(manifest, epoch, [report.numbers for report in reports])
        findings += _counts(manifest, epoch, [report.counts for report in reports])
        if more := sum(report.more for report in reports):
            findings.append(Finding("more", f"epoch {epoch}", f"{more:,} more findings are not listed"))
    return findings


class Checker:
    """Worker: (epoch, part, rows) -> what is found there."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self._path, self._manifest = path, manifest
        self._facts = Facts.of(manifest)

    def __call__(self, task: tuple[int, int, int]) -> PartReport:
        epoch, part, rows = task
        report = PartReport(counts=Counts(slots=[0] * self._facts.block_size))
        for kind in KINDS:
            for ending in (".bin", ".idx"):
                report.findings += _file(self._path, prefix(Path(), epoch, part, kind) + ending, self._manifest)
        try:
            facts = self._facts
            reader = PartReader(
                self._path, epoch, part, rows=rows, block_size=facts.block_size, target_shift=facts.target_shift
            )
        except DataError as error:
            report.findings.append(Finding("parts", f"epoch {epoch}, part {part}", error.what))
            return report
        numbers, first = [], sum(self._manifest["part_rows"][epoch][:part])
        for row in range(rows):
            where = f"epoch {epoch}, row {first + row} (row {row} of part {part})"
            try:
                tokens, layout = reader.read(row)
            except DataError as error:
                self._note(report, Finding("checksum", where, error.what))
                continue
            targets = slot_targets(tokens, layout, self._facts.eos)
            broken = [*check_row(tokens, layout, self._facts, epoch)]
            if not broken and row % TARGETS_EVERY == 0:
                broken += check_targets(tokens, layout, targets, self._facts)
            for rule, document, what in broken:
                place = where if document is None else f"{where}, document {document}"
                self._note(report, Finding(rule, place, what))
            numbers.append(layout.doc_ids)
            slots = [int(np.count_nonzero(target != IGNORE)) for target in targets]
            shape = (layout.n_docs, layout.n_clean, layout.n_block_tokens)
            report.counts.add(Counts(1, *shape, sum(slots), slots))
        report.numbers = np.concatenate(numbers) if numbers else report.numbers
        return report

    @staticmethod
    def _note(report: PartReport, finding: Finding) -> None:
        if len(report.findings) < KEPT:
            report.findings.append(finding)
        else:
            report.more += 1


def _file(path: Path, name: str, manifest: dict[str, Any]) -> Iterator[Finding]:
    said, file = manifest["files"].get(name), path / name
    if said is None:
        yield Finding("files", name, "the manifest does not list it")
        return
    if not file.is_file():
        yield Finding("files", name, "it is missing")
        return
    if (size := file.stat().st_size) != said["bytes"]:
        yield Finding("files", name, f"{size:,} bytes, the manifest says {said['bytes']:,}")
    with open(file, "rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != said["sha256"]:
            yield Finding("files", name, "its sha256 is not the manifest's")


def _other_files(path: Path, manifest: dict[str, Any]) -> Iterator[Finding]:
    parts = {
        Path(prefix(Path(), epoch, part, kind)).name + ending
        for epoch, rows in enumerate(manifest["part_rows"])
        for part in range(len(rows))
        for kind in KINDS
        for ending in (".bin", ".idx")
    }
    for name in sorted(set(manifest["files"]) - parts):
        yield from _file(path, name, manifest)
    for file in sorted(path.iterdir()):
        if file.name not in manifest["files"] and file.name != "manifest.json":
            yield Finding("files", file.name, "it is no part of the dataset")


def _accounting(manifest: dict[str, Any]) -> Iterator[Finding]:
    accounting = manifest["accounting"]
    by_source = accounting["by_source"]
    for entry in [accounting, *by_source]:
        parts = entry["packed"] + entry["truncated"] + sum(entry["dropped"].values()) + entry["rejected"]
        if parts != entry["rows"]:
            name = entry.get("name", "all sources")
            yield Finding("accounting", name, f"{entry['rows']:,} rows were read, {parts:,} are accounted for")
    for key, whole in accounting.items():
        if isinstance(whole, int) and (found := sum(entry[key] for entry in by_source)) != whole:
            yield Finding("accounting", key, f"{whole:,} in all, {found:,} in the sources together")
    reasons = Counter[str]()
    for entry in by_source:
        reasons.update(entry["dropped"])
    if reasons != accounting["dropped"]:
        what = f"{accounting['dropped']} in all, {dict(reasons)} in the sources together"
        yield Finding("accounting", "dropped", what)
    pairs = sum(pair["documents"] for pair in manifest["duplicates"]["pairs"])
    if pairs != manifest["duplicates"]["documents"]:
        what = f"{manifest['duplicates']['documents']:,} in all, {pairs:,} in the pairs of sources together"
        yield Finding("accounting", "duplicates", what)
    if all(float(entry["weight"]).is_integer() for entry in by_source):
        yield from _epoch_totals(manifest)


def _epoch_totals(manifest: dict[str, Any]) -> Iterator[Finding]:
    """Where every document is taken a whole number of times, the sources say what an epoch holds."""
    clean, blocks = (
        int(sum(entry[key] * entry["weight"] for entry in manifest["accounting"]["by_source"]))
        for key in ("clean_tokens", "blocks")
    )
    for epoch, counts in enumerate(manifest["counts"]):
        wanted = (clean, (blocks - manifest["blocks_trimmed"][epoch]) * manifest["block_size"])
        for name, found, want in zip(("clean", "block"), (counts["clean"], counts["block"]), wanted, strict=True):
            if found != want:
                yield Finding("accounting", f"epoch {epoch}", f"{found:,} {name} tokens, the sources give {want:,}")


def _rejects(path: Path, manifest: dict[str, Any]) -> Iterator[Finding]:
    file = path / "rejects.jsonl"
    if not file.is_file():  # `files` says so
        return
    found: Counter[tuple[str, str]] = Counter()
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                found[row["source"], "rejected" if row["outcome"] == "rejected" else "dropped"] += bool(row["reason"])
            except (ValueError, KeyError, TypeError, RecursionError):
                yield Finding("rejects", f"rejects.jsonl, line {number}", "it is no row with a source and a reason")
    for entry in manifest["accounting"]["by_source"]:
        for outcome, wanted in (("rejected", entry["rejected"]), ("dropped", sum(entry["dropped"].values()))):
            lines_found = found.pop((entry["name"], outcome), 0)
            if lines_found != wanted:
                what = f"{lines_found:,} lines with a reason, {wanted:,} rows of {entry['name']} were {outcome}"
                yield Finding("rejects", "rejects.jsonl", what)
    for (name, outcome), n in found.items():
        yield Finding(
            "rejects", "rejects.jsonl", f"{n:,} rows {outcome} of a source that is not in the manifest: {name}"
        )


def _numbers(manifest: dict[str, Any], epoch: int, parts: Sequence[np.ndarray]) -> Iterator[Finding]:
    """Memory: four bytes a document, twice."""
    numbers = np.sort(np.concatenate([np.empty(0, dtype=np.int32), *parts]))
    for number in islice(np.unique(numbers[1:][numbers[1:] == numbers[:-1]]).tolist(), SHOWN):
        yield Finding("numbers", f"epoch {epoch}, document {number}", "it is there more than once")
    last = 0
    for entry in manifest["accounting"]["by_source"]:
        usable, copies = entry["packed"] + entry["truncated"], int(np.ceil(entry["weight"]))
        for copy in range(copies):
            first = entry["first_document"] + copy * entry["rows"]
            last = first + entry["rows"]
            found = int(np.searchsorted(numbers, last) - np.searchsorted(numbers, first))
            wanted = round(usable * min(1.0, entry["weight"] - copy))
            if found != wanted:
                where = f"epoch {epoch}, source {entry['name']}, copy {copy + 1} of {copies}"
                yield Finding("numbers", where, f"{found:,} documents, {wanted:,} are wanted")
    for number in islice(numbers[(numbers < 0) | (numbers >= last)].tolist(), SHOWN):
        yield Finding("numbers", f"epoch {epoch}, document {number}", f"the sources have documents 0 to {last - 1:,}")


def _counts(manifest: dict[str, Any], epoch: int, parts: Sequence[Counts]) -> Iterator[Finding]:
    total = Counts(slots=[0] * manifest["block_size"])
    for part in parts:
        total.add(part)
    for key, said in manifest["counts"][epoch].items():
        if (found := getattr(total, key)) != said:
            yield Finding("counts", f"epoch {epoch}, {key}", f"the rows hold {found}, the manifest says {said}")


def show(findings: Sequence[Finding], console: Console) -> None:
    """Prints findings by rule."""
    grouped: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        grouped[finding.rule].append(finding)
    for rule, found in grouped.items():
        console.print(
            f"{rule}: {len(found):,} findings ({RULES.get(rule, 'not listed')})", highlight=False, markup=False
        )
        for finding in found[:SHOWN]:
            console.print(f"  {finding.where}: {finding.what}", highlight=False, markup=False)
        if len(found) > SHOWN:
            console.print(f"  and {len(found) - SHOWN:,} more", highlight=False)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    rules = "\n".join(f"  {name:<12}{text}" for name, text in RULES.items())
    parser = make_parser("sdlm verify", __doc__, example="sdlm verify DATA", notes=f"rules:\n{rules}")
    parser.add_argument("dataset", help="folder that `python -m data_prep.build` wrote")
    parser.add_argument("--workers", type=int, default=cpus(), metavar="N", help="processes (all CPUs: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    console = Console()
    findings = verify(args.dataset, console, workers=max(1, args.workers))
    show(findings, console)
    console.print("clean: every rule holds on every row" if not findings else f"{len(findings):,} findings")
    if findings:
        raise SystemExit(1)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
