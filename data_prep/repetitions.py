"""Near-duplicates and overlaps with evaluation files in the manifest, on the console and on the page of a dataset."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.accounting import Accounting
from data_prep.build_config import BuildConfig
from data_prep.decontaminate import evaluation_files, open_evaluations
from sdlm_megatron.errors import DataError

if TYPE_CHECKING:
    from sdlm_megatron.report.page_kit import PageSection  # imports matplotlib

_SHOWN = 5


def repetition_entries(
    config: BuildConfig, near: Sequence[Mapping[str, Any]], accounting: Accounting
) -> dict[str, dict[str, Any]]:
    """Entries of the manifest: `near_duplicates` and `decontamination`, each if the build looked for them."""
    result: dict[str, dict[str, Any]] = {}
    if config.near_duplicates != "off":
        result["near_duplicates"] = {
            "policy": config.near_duplicates,
            "similarity": config.near_duplicate_similarity,
            "documents": sum(pair["documents"] for pair in near),
            "pairs": list(near),
        }
    if texts := open_evaluations(config.decontaminate):
        begun = json.loads((accounting.work / "build.json").read_text(encoding="utf-8"))["evaluation"]
        now = evaluation_files(config.decontaminate)
        if changed := [name for name in sorted({*begun, *now}) if begun.get(name) != now.get(name)]:
            fix = "restore it and run the same command again, or remove the folder to start over"
            raise DataError("an evaluation file changed during the build", ", ".join(changed), fix)
        overlaps, rows = _overlaps(config, accounting)
        figures = zip(config.decontaminate, texts.rows, rows, texts.short, strict=True)
        names = ("file", "rows", "overlapping", "short_texts")
        files = [dict(zip(names, (name, n, len(own), short), strict=True)) for name, n, own, short in figures]
        result["decontamination"] = {"policy": config.contaminated, "files": files, "overlaps": overlaps}
    return result


def _overlaps(config: BuildConfig, accounting: Accounting) -> tuple[list[dict[str, Any]], list[set[int]]]:
    """Overlaps of each source with each evaluation file, and the rows of each file that are in some source."""
    rows: list[set[int]] = [set() for _ in config.decontaminate]
    entries: dict[tuple[int, int], dict[str, Any]] = {}
    own: dict[tuple[int, int], set[int]] = {}
    before = [0] * len(accounting.sources)
    for unit, result in zip(accounting.units, accounting.results, strict=True):
        for number, entry in ((int(number), entry) for number, entry in result.overlaps.items()):
            key = (number, unit.source)
            if key not in entries:
                example = {**entry["example"], "row": before[unit.source] + entry["example"]["row"]}
                names = {"file": config.decontaminate[number], "source": accounting.sources[unit.source].name}
                entries[key], own[key] = {**names, "rows": 0, "evaluation_rows": 0, "example": example}, set()
            entries[key]["rows"] += entry["rows"]
            own[key].update(entry["evaluation_rows"])
            rows[number].update(entry["evaluation_rows"])
        before[unit.source] += result.rows
    return [{**entries[key], "evaluation_rows": len(own[key])} for key in sorted(entries)], rows


def repetition_lines(manifest: Mapping[str, Any]) -> list[str]:
    """Lines of the console."""
    lines = []
    if near := manifest.get("near_duplicates"):
        verb = {"report": "kept", "drop": "dropped"}[near["policy"]]
        most = sorted(near["pairs"], key=lambda pair: -pair["documents"])
        pairs = [f"{pair['documents']:,} of {pair['duplicate']} resemble {pair['kept']}" for pair in most]
        more = f" and {len(pairs) - _SHOWN} more pairs of sources (manifest.json)" if len(pairs) > _SHOWN else ""
        head = f"near-duplicates (similarity {near['similarity']:g} and more) {verb}: {near['documents']:,}"
        lines.append("; ".join([head, *([", ".join(pairs[:_SHOWN]) + more] if pairs else [])]))
    if check := manifest.get("decontamination"):
        verb = {"report": "kept", "drop": "dropped"}[check["policy"]]
        for file in check["files"]:
            lines.append(
                f"{file['file']}: {file['overlapping']:,} of {file['rows']:,} evaluation rows are in the sources"
            )
            for entry in (entry for entry in check["overlaps"] if entry["file"] == file["file"]):
                example = entry["example"]
                lines.append(
                    f"    {entry['rows']:,} rows of {entry['source']} {verb}; row {example['row']} has, of evaluation "
                    f"row {example['evaluation_row']}: {example['words']}"
                )
    return lines


def add_repetitions(section: "PageSection", manifest: Mapping[str, Any]) -> None:
    """Tables of the page."""
    if near := manifest.get("near_duplicates"):
        verb = {"report": "kept", "drop": "dropped"}[near["policy"]]
        section.text(
            f"{near['documents']:,} documents resemble an earlier one (similarity {near['similarity']:g} and more); "
            f"they were {verb}."
        )
        example = "row {row:,} resembles row {resembles:,} ({similarity:.2f})"
        rows = [
            [pair["duplicate"], pair["kept"], f"{pair['documents']:,}", example.format(**pair["example"])]
            for pair in sorted(near["pairs"], key=lambda pair: -pair["documents"])
        ]
        if rows:
            section.table(["near-duplicates in", "of rows in", "documents", "example"], rows)
    if check := manifest.get("decontamination"):
        verb = {"report": "kept", "drop": "dropped"}[check["policy"]]
        files = [
            [file["file"], f"{file['rows']:,}", f"{file['overlapping']:,}", f"{file['short_texts']:,}"]
            for file in check["files"]
        ]
        section.table(["evaluation file", "rows", "in the sources", "texts too short to look for"], files)
        overlaps = [
            [entry["source"], entry["file"], f"{entry['rows']:,}", f"{entry['example']['words']}"]
            for entry in check["overlaps"]
        ]
        if overlaps:
            section.table(["source", "evaluation file", f"rows {verb}", "words of the first"], overlaps, align="left")
