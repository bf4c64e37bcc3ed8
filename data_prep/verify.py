"""Verify a packed dataset: every file, and every row by the rules of packed rows (targets: one row of 64).

All files are read again. From the tokens, and the list of answers that are not trained, follow the turns, hence the
anchors, the number of blocks, the draw, and the content of the blocks; each is compared with what is stored.

Exit code 0: no findings. 1: findings, each with its position. 2: the folder is not a dataset.
"""

import argparse
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
from data_prep.row_rules import ROW_RULES, RuleSettings, check_row, check_targets
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.format import KINDS, REBUILD, PartReader, RowCounts, epoch_sizes, prefix, read_manifest
from sdlm_megatron.data.sizes import read_sizes, sizes_prefix
from sdlm_megatron.diffusion.layout import IGNORE, slot_targets
from sdlm_megatron.errors import DataError, make_console, run_cli
from sdlm_megatron.files import sha256
from sdlm_megatron.progress import track

RULES = {
    "files": "every file of the manifest exists with its size and sha256, and there is no other file",
    "parts": "the index of each part matches its data and the manifest's number of rows",
    "checksum": "each row matches its crc32, and its tokens match its layout",
    **ROW_RULES,
    "sizes": "the sizes of an epoch's documents are those of its layouts",
    "numbers": "an epoch has no document twice, none beyond the sources' rows, and as many as the weights require",
    "counts": "the manifest's counts match the rows",
    "accounting": "the outcomes of the input rows add up per source, in total, and to the tokens of the epochs",
    "rejects": "rejects.jsonl has one line for each dropped or rejected row of each source",
}
"""Rule -> description."""

# Findings printed per rule.
SHOWN = 20
# Findings kept per part: a completely damaged dataset would otherwise produce one or more per row.
KEPT = 500
# Interval of the rows whose targets are derived a second time, token by token, which is slow.
TARGETS_EVERY = 64


@dataclass(frozen=True)
class DatasetFinding:
    """A violation of a rule."""

    rule: str
    where: str
    what: str


Places = Iterator[tuple[str, str]]
"""(position, description) of the violations of one rule."""


def _findings(rule: str, places: Places) -> list[DatasetFinding]:
    try:
        return [DatasetFinding(rule, where, what) for where, what in places]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"the rule {rule} cannot read the manifest: {type(error).__name__}: {error!s:.200}"
        raise DataError(what, "manifest.json", REBUILD) from None


@dataclass
class PartReport:
    """Findings and counts of a part."""

    findings: list[DatasetFinding] = field(default_factory=list)
    more: int = 0  # number of findings beyond KEPT
    counts: RowCounts = field(default_factory=RowCounts)
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """int32 (documents,): document numbers."""

    def add(self, finding: DatasetFinding) -> None:
        if len(self.findings) < KEPT:
            self.findings.append(finding)
        else:
            self.more += 1


def verify(path: str | Path, console: Console | None = None, *, workers: int = 1) -> list[DatasetFinding]:
    """Checks a dataset and returns the findings; raises DataError if the folder is not a dataset."""
    path, console = Path(path), console or make_console()
    manifest = read_manifest(path)
    RuleSettings.of(manifest, path)
    tasks = [(e, p, rows) for e, parts in enumerate(manifest["part_rows"]) for p, rows in enumerate(parts)]
    # The fast checks first: they need no row.
    findings = _findings("accounting", _accounting(manifest))
    findings += _findings("rejects", _rejects(path, manifest)) + _findings("files", _other_files(path, manifest))
    epochs: list[list[PartReport]] = [[] for _ in manifest["part_rows"]]
    with track("verify", sum(rows for _, _, rows in tasks), "rows", console) as advance:
        for (epoch, _, rows), report in work_on(tasks, PartChecker, (path, manifest), workers):
            epochs[epoch].append(report)
            findings += report.findings
            advance(rows, report.counts.clean + report.counts.block)
    for epoch, reports in enumerate(epochs):
        findings += _findings("numbers", _numbers(manifest, epoch, [report.numbers for report in reports]))
        findings += _findings("counts", _counts(manifest, epoch, [report.counts for report in reports]))
        findings += _findings("sizes", _sizes(path, manifest, epoch))
        if more := sum(report.more for report in reports):
            findings.append(DatasetFinding("more", f"epoch {epoch}", f"{more:,} more findings are not listed"))
    return findings


class PartChecker:
    """Worker: (epoch, part, rows) -> PartReport."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self._path, self._manifest = path, manifest
        self._settings = RuleSettings.of(manifest, path)

    def __call__(self, task: tuple[int, int, int]) -> PartReport:
        epoch, part, rows = task
        report = PartReport(counts=RowCounts(slots=[0] * self._settings.block_size))
        for name in _part_files(epoch, part):
            report.findings += _findings("files", _file(self._path, name, self._manifest))
        try:
            reader = PartReader(self._path, epoch, part, self._manifest)
        except DataError as error:
            report.add(DatasetFinding("parts", f"epoch {epoch}, part {part}", error.what))
            return report
        # Training numbers the rows of an epoch over its parts.
        numbers, first = [], sum(self._manifest["part_rows"][epoch][:part])
        for row in range(rows):
            where = f"epoch {epoch}, row {first + row} (row {row} of part {part})"
            numbers += self._check(reader, row, where, epoch, report)
        report.numbers = np.concatenate(numbers) if numbers else report.numbers
        return report

    def _check(self, reader: PartReader, row: int, where: str, epoch: int, report: PartReport) -> list[np.ndarray]:
        """Checks one row; returns its document numbers, or nothing if it is damaged."""
        try:
            tokens, layout = reader.read(row)
        except DataError as error:
            report.add(DatasetFinding("checksum", where, error.what))
            return []
        targets = slot_targets(tokens, layout, self._settings.eos)
        violations = [*check_row(tokens, layout, self._settings, epoch)]
        if not violations and row % TARGETS_EVERY == 0:
            violations += check_targets(tokens, layout, targets, self._settings)
        for rule, document, what in violations:
            report.add(DatasetFinding(rule, where if document is None else f"{where}, document {document}", what))
        slots = [int(np.count_nonzero(target != IGNORE)) for target in targets]
        report.counts.add(RowCounts(1, layout.n_docs, layout.n_clean, layout.n_block_tokens, sum(slots), slots))
        return [layout.doc_ids]


def _part_files(epoch: int, part: int) -> list[str]:
    return [prefix(Path(), epoch, part, kind) + suffix for kind in KINDS for suffix in (".bin", ".idx")]


def _file(path: Path, name: str, manifest: dict[str, Any]) -> Places:
    entry, file = manifest["files"].get(name), path / name
    if entry is None:
        yield name, "the manifest does not list the file"
        return
    if not file.is_file():
        yield name, "the file is missing"
        return
    if (size := file.stat().st_size) != entry["bytes"]:
        yield name, f"the file has {size:,} bytes, the manifest says {entry['bytes']:,}"
    if sha256(file) != entry["sha256"]:
        yield name, "the sha256 differs from the manifest"


def _other_files(path: Path, manifest: dict[str, Any]) -> Places:
    parts = {
        name
        for epoch, rows in enumerate(manifest["part_rows"])
        for part in range(len(rows))
        for name in _part_files(epoch, part)
    }
    for name in sorted(set(manifest["files"]) - parts):
        yield from _file(path, name, manifest)
    for file in sorted(path.iterdir()):
        if file.name not in manifest["files"] and file.name != "manifest.json":
            yield file.name, "the file is not part of the dataset"


def _sizes(path: Path, manifest: dict[str, Any], epoch: int) -> Places:
    where = sizes_prefix(path, epoch)
    if f"{Path(where).name}.bin" not in manifest["files"]:
        return  # a dataset of an older version
    try:
        stored, actual = read_sizes(where, sum(manifest["part_rows"][epoch])), epoch_sizes(path, epoch, manifest)
    except (DataError, ValueError, OSError) as error:
        yield Path(where).name, error.what if isinstance(error, DataError) else str(error)
        return
    if not (np.array_equal(stored.first, actual.first) and np.array_equal(stored.table, actual.table)):
        yield Path(where).name, "they differ from those of the layouts"


def _accounting(manifest: dict[str, Any]) -> Places:
    accounting = manifest["accounting"]
    by_source = accounting["by_source"]
    for entry in [accounting, *by_source]:
        parts = entry["packed"] + entry["truncated"] + sum(entry["dropped"].values()) + entry["rejected"]
        if parts != entry["rows"]:
            name = entry.get("name", "all sources")
            yield name, f"{entry['rows']:,} rows were read, {parts:,} are accounted for"
    for key, whole in accounting.items():
        if isinstance(whole, int) and (total := sum(entry[key] for entry in by_source)) != whole:
            yield key, f"the total is {whole:,}, the sum over sources {total:,}"
    reasons = Counter[str]()
    for entry in by_source:
        reasons.update(entry["dropped"])
    if reasons != accounting["dropped"]:
        yield "dropped", f"the total is {accounting['dropped']}, the sum over sources {dict(reasons)}"
    if "reasons" in accounting:  # missing in datasets of older versions
        expected = accounting["rejected"] + sum(accounting["dropped"].values())
        if (total := sum(reason["rows"] for reason in accounting["reasons"])) != expected:
            yield "reasons", f"the reasons count {total:,} rows, {expected:,} are not in the dataset"
    pairs = sum(pair["documents"] for pair in manifest["duplicates"]["pairs"])
    if pairs != manifest["duplicates"]["documents"]:
        what = f"the total is {manifest['duplicates']['documents']:,}, the sum over pairs of sources {pairs:,}"
        yield "duplicates", what
    if all(float(entry["weight"]).is_integer() for entry in by_source):
        yield from _epoch_totals(manifest)


def _epoch_totals(manifest: dict[str, Any]) -> Places:
    """Compares epochs with sources, which determine them if every weight is a whole number."""
    clean, blocks = (
        int(sum(entry[key] * entry["weight"] for entry in manifest["accounting"]["by_source"]))
        for key in ("clean_tokens", "blocks")
    )
    for epoch, counts in enumerate(manifest["counts"]):
        block = (blocks - manifest["blocks_trimmed"][epoch]) * manifest["block_size"]
        for name, actual, expected in (("clean", counts["clean"], clean), ("block", counts["block"], block)):
            if actual != expected:
                yield f"epoch {epoch}", f"{actual:,} {name} tokens, the sources have {expected:,}"


def _rejects(path: Path, manifest: dict[str, Any]) -> Places:
    file = path / "rejects.jsonl"
    if not file.is_file():  # reported by the rule `files`
        return
    lines_of: Counter[tuple[str, str]] = Counter()
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                outcome = "rejected" if row["outcome"] == "rejected" else "dropped"
                lines_of[row["source"], outcome] += bool(row["reason"])
            except (ValueError, KeyError, TypeError, RecursionError):
                yield f"rejects.jsonl, line {number}", "the line is not a row with source, outcome and reason"
    for entry in manifest["accounting"]["by_source"]:
        for outcome, expected in (("rejected", entry["rejected"]), ("dropped", sum(entry["dropped"].values()))):
            n = lines_of.pop((entry["name"], outcome), 0)
            if n != expected:
                yield file.name, f"{n:,} lines with a reason for {expected:,} {outcome} rows of {entry['name']}"
    for (name, outcome), n in lines_of.items():
        yield file.name, f"{n:,} {outcome} rows of {name}, which is not a source in the manifest"


def _numbers(manifest: dict[str, Any], epoch: int, parts: Sequence[np.ndarray]) -> Places:
    """Checks the document numbers of an epoch. Memory: four bytes per document, twice."""
    # Sorted, so that duplicates are adjacent and a source's range is found by bisection.
    numbers = np.sort(np.concatenate([np.empty(0, dtype=np.int32), *parts]))
    for number in islice(np.unique(numbers[1:][numbers[1:] == numbers[:-1]]).tolist(), SHOWN):
        yield f"epoch {epoch}, document {number}", "the document occurs more than once"
    last = 0
    for entry in manifest["accounting"]["by_source"]:
        usable, copies = entry["packed"] + entry["truncated"], int(np.ceil(entry["weight"]))
        for copy in range(copies):
            first = entry["first_document"] + copy * entry["rows"]
            last = first + entry["rows"]
            n = int(np.searchsorted(numbers, last) - np.searchsorted(numbers, first))
            expected = round(usable * min(1.0, entry["weight"] - copy))
            if n != expected:
                where = f"epoch {epoch}, source {entry['name']}, copy {copy + 1} of {copies}"
                yield where, f"{n:,} documents, expected {expected:,}"
    for number in islice(numbers[(numbers < 0) | (numbers >= last)].tolist(), SHOWN):
        yield f"epoch {epoch}, document {number}", f"the document number is outside of 0 to {last - 1:,}"


def _counts(manifest: dict[str, Any], epoch: int, parts: Sequence[RowCounts]) -> Places:
    total = RowCounts(slots=[0] * manifest["block_size"])
    for part in parts:
        total.add(part)
    for key, expected in manifest["counts"][epoch].items():
        if (actual := getattr(total, key)) != expected:
            yield f"epoch {epoch}, {key}", f"the rows have {actual}, the manifest says {expected}"


def show(findings: Sequence[DatasetFinding], console: Console) -> None:
    """Prints findings grouped by rule."""
    grouped: dict[str, list[DatasetFinding]] = defaultdict(list)
    for finding in findings:
        grouped[finding.rule].append(finding)
    for rule, group in grouped.items():
        title = f"{rule}: {len(group):,} findings ({RULES.get(rule, 'not listed')})"
        console.print(title)
        for finding in group[:SHOWN]:
            console.print(f"  {finding.where}: {finding.what}")
        if len(group) > SHOWN:
            console.print(f"  and {len(group) - SHOWN:,} more")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    rules = "\n".join(f"  {name:<12}{text}" for name, text in RULES.items())
    parser = make_parser("sdlm verify", __doc__, example="sdlm verify DATA", notes=f"rules:\n{rules}")
    parser.add_argument("dataset", metavar="DATA", help="dataset folder, written by `sdlm prepare`")
    parser.add_argument("--workers", type=int, default=cpus(), metavar="N", help="number of processes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    console = make_console()
    findings = verify(args.dataset, console, workers=max(1, args.workers))
    show(findings, console)
    clean = f"clean: every rule holds on every row (targets: one row of {TARGETS_EVERY})"
    console.print(f"{len(findings):,} findings" if findings else clean)
    if findings:
        raise SystemExit(1)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
