"""Write an HTML page about a packed dataset.

Tokens, slots, duplicates and the outcome of the input rows are exact, from the manifest. Statistics of documents and
rows (lengths, anchors, fill) are computed from evenly spaced rows of the first epoch.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from rich.console import Console

from data_prep.build_report import short
from data_prep.repetitions import add_repetitions
from data_prep.row_rules import RuleSettings, read_row
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import DataError, make_console, run_cli
from sdlm_megatron.progress import track
from sdlm_megatron.report.page_kit import Page, PageSection
from sdlm_megatron.report.plots import BLOCK, CLEAN, INK, SERIES, figure_of, legend

# Default number of rows read: the histograms do not change visibly beyond it.
SAMPLE = 20_000
MOST_REASONS = 20  # in the table; the list of first rows has all
WIDTH = 5.4  # of the figures, in inches: they fit the screen of a phone


@dataclass(frozen=True)
class RowSample:
    """Measurements of a sample of the rows of the first epoch."""

    rows: int  # rows of the epoch
    used: np.ndarray  # int64 (sampled rows,): tokens without padding
    documents: np.ndarray  # int64 (sampled rows,): documents of each row
    clean: np.ndarray  # int64 (documents of these rows,): clean tokens
    blocks: np.ndarray  # int64 (documents,)
    anchors: np.ndarray  # int64 (documents,)


def take_sample(dataset: PackedDataset, rows: int, console: Console) -> RowSample:
    """Reads `rows` evenly spaced rows, or all if there are fewer."""
    settings, total = RuleSettings.of(dataset.manifest, dataset.path), dataset.rows(0)
    numbers = np.unique(np.linspace(0, total - 1, min(rows, total)).astype(np.int64)).tolist()
    measured: list[np.ndarray] = []
    used, documents = [], []
    with track("read", len(numbers), "rows", console) as advance:
        for number in numbers:
            tokens, layout = dataset.read(0, number)
            row = read_row(tokens, layout, settings, 0)
            used.append(layout.used)
            documents.append(layout.n_docs)
            measured.append(np.stack([layout.clean_lens, layout.n_blocks, row.n_anchors]).astype(np.int64))
            advance(1, layout.used)
    return RowSample(total, np.array(used), np.array(documents), *np.concatenate(measured, axis=1))


def write_stats(path: str | Path, out: Path, console: Console | None = None, *, rows: int = SAMPLE) -> RowSample:
    """Writes the page about the dataset in `path` to the HTML file `out`, from at most `rows` rows. Raises DataError if
    the folder is not a dataset built by `sdlm prepare`, or a row is damaged."""
    dataset = PackedDataset(path)
    if "accounting" not in dataset.manifest:
        raise DataError("the manifest has no accounting of the input rows", str(path), "build it with `sdlm prepare`")
    sample = take_sample(dataset, rows, console or make_console())
    make_page(dataset.path.name, dataset.manifest, sample).write(out)
    return sample


def make_page(name: str, manifest: Mapping[str, Any], sample: RowSample) -> Page:
    """The page about a dataset `name`."""
    page = Page(name)
    _add_totals(page.section("totals"), manifest)
    _add_reasons(page.section("reasons", "Rows that are not in the dataset"), manifest)
    _add_outcomes(page.section("outcomes", "Outcome of the input rows"), manifest)
    _add_tokens(page.section("tokens", "Tokens per source in one epoch"), manifest)
    _add_lengths(page.section("lengths", "Document length"), manifest, sample)
    _add_anchors(page.section("anchors", "Anchors and blocks per document"), manifest, sample)
    _add_rows(page.section("rows", "Rows"), manifest, sample)
    _add_slots(page.section("slots", "Targets per slot"), manifest)
    _add_duplicates(page.section("duplicates", "Duplicates"), manifest)
    _add_settings(page.section("settings", "Settings"), manifest)
    return page


def _add_totals(section: PageSection, manifest: Mapping[str, Any]) -> None:
    counts = manifest["counts"]
    total = {key: sum(epoch[key] for epoch in counts) for key in ("rows", "documents", "clean", "block", "targets")}
    fill = (total["clean"] + total["block"]) / (total["rows"] * manifest["row_length"])
    section.cards(
        [
            (str(len(counts)), "epoch" + "s" * (len(counts) != 1)),
            (f"{total['rows']:,}", f"rows of {manifest['row_length']:,} tokens"),
            (f"{total['documents']:,}", "documents"),
            (short(total["clean"]), "clean tokens"),
            (short(total["block"]), f"block tokens (D = {manifest['block_size']})"),
            (short(total["targets"]), "targets"),
            (f"{fill:.2%}", "of the rows filled"),
        ]
    )


def _add_reasons(section: PageSection, manifest: Mapping[str, Any]) -> None:
    accounting = manifest["accounting"]
    dropped, rejected = sum(accounting["dropped"].values()), accounting["rejected"]
    if not dropped + rejected:
        section.text("None.")
        return
    share = (dropped + rejected) / accounting["rows"]
    cards = [("dropped (no target)", dropped), ("rejected (not valid)", rejected)]
    section.cards([(f"{share:.1%}", "of the input rows"), *((f"{n:,}", name) for name, n in cards)])
    reasons = accounting.get("reasons", [])  # missing in datasets of older versions
    if reasons:
        # The number comes second: a phone shows the first columns.
        rows = [[count["reason"], f"{count['rows']:,}", count["outcome"], count["source"]] for count in reasons]
        section.table(["reason", "rows", "outcome", "source"], rows[:MOST_REASONS])
        if more := reasons[MOST_REASONS:]:
            section.note(f"{sum(count['rows'] for count in more):,} rows for {len(more)} more reasons, listed below.")
        examples = "\n".join(f"{count['rows']:,}: {count['reason']}\n    {count['example']}" for count in reasons)
        section.details("the first row of each reason", examples)
    section.note("rejects.jsonl lists every row with its content.")


def _add_outcomes(section: PageSection, manifest: Mapping[str, Any]) -> None:
    accounting = manifest["accounting"]
    rows = []
    for entry in [*accounting["by_source"], {**accounting, "name": "all"}]:
        dropped = sum(entry["dropped"].values())
        figures = [entry["rows"], entry["packed"], entry["truncated"], dropped, entry["rejected"]]
        rows.append([entry["name"], *(f"{figure:,}" for figure in figures)])
    section.table(["source", "rows", "packed whole", "truncated", "dropped", "rejected"], rows, total=True)
    section.note("Every row is counted in exactly one of the four columns after “rows”.")
    changes = [
        ["turns removed from documents that are too long", accounting["turns_cut"]],
        ["tokens in these turns", accounting["tokens_cut"]],
        ["blocks that did not fit into long documents", accounting["blocks_missing"]],
        ["blocks trimmed to fill rows", sum(manifest.get("blocks_trimmed", []))],
        ["texts that spell a special token (encoded as plain text)", accounting["spelled"]],
    ]
    section.table(["other losses and changes", "number"], [[name, f"{n:,}"] for name, n in changes])


def _add_tokens(section: PageSection, manifest: Mapping[str, Any]) -> None:
    size, by_source = manifest["block_size"], manifest["accounting"]["by_source"]
    names = [entry["name"] for entry in by_source]
    clean = np.array([entry["clean_tokens"] * entry["weight"] for entry in by_source])
    block = np.array([entry["blocks"] * entry["weight"] * size for entry in by_source])
    figure, (axis,) = figure_of(WIDTH, 0.9 + 0.45 * len(names))
    places = np.arange(len(names))
    axis.barh(places, clean, color=CLEAN, label="clean", height=0.7)
    axis.barh(places, block, left=clean, color=BLOCK, label="block", height=0.7)
    axis.set_yticks(places, [fill(name, 18) for name in names])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(int(value))))
    _legend_above(axis)
    section.figure(figure, "clean and block tokens of each source")
    whole = max(1.0, float(clean.sum() + block.sum()))
    rows = [
        [name, f"{entry['weight']:g}", short(round(c)), short(round(b)), f"{(c + b) / whole:.1%}"]
        for name, entry, c, b in zip(names, by_source, clean.tolist(), block.tolist(), strict=True)
    ]
    section.table(["source", "weight", "clean tokens", "block tokens", "share"], rows)


def _add_lengths(section: PageSection, manifest: Mapping[str, Any], sample: RowSample) -> None:
    expanded = sample.clean + sample.blocks * manifest["block_size"]
    limit = manifest["max_document_length"]
    # Logarithmic bins: lengths span three orders of magnitude.
    edges = np.unique(np.geomspace(max(1, sample.clean.min()), max(limit, expanded.max()) + 1, 50).astype(np.int64))
    figure, (axis,) = figure_of(WIDTH, 3.2)
    axis.axvline(limit, color=INK, linewidth=1, linestyle=":", label=f"limit: {limit:,}")
    series = ((sample.clean, CLEAN, "clean"), (expanded, BLOCK, "including blocks"))
    _histograms(axis, edges, series, "tokens per document")
    section.figure(figure, "histogram of document lengths")
    _add_quantiles(section, {"clean tokens": sample.clean, "tokens including blocks": expanded}, sample)


def _histograms(axis: Axes, edges: np.ndarray, series: Iterable[tuple[np.ndarray, str, str]], label: str) -> None:
    """Histograms of (values, color, name) on a logarithmic axis, as shares of the documents."""
    for values, color, name in series:
        heights, _ = np.histogram(values, edges)
        axis.stairs(heights / len(values), edges, color=color, fill=True, alpha=0.35)
        axis.stairs(heights / len(values), edges, color=color, label=name, linewidth=1.4)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel(label, color=INK)
    axis.set_ylabel("documents", color=INK)
    _legend_above(axis)


def _legend_above(axis: Axes) -> None:
    # Above the drawing, of which a legend inside would hide a part.
    legend(axis, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)


def _add_anchors(section: PageSection, manifest: Mapping[str, Any], sample: RowSample) -> None:
    edges = np.unique(np.geomspace(1, max(2, sample.anchors.max()) + 1, 50).astype(np.int64))
    figure, (axis,) = figure_of(WIDTH, 2.9)
    series = ((sample.anchors, SERIES[2], "anchors"), (sample.blocks, BLOCK, "blocks"))
    _histograms(axis, edges, series, "anchors, blocks per document")
    section.figure(figure, "histogram of anchors and blocks per document")
    used = sample.blocks.sum() / max(1, sample.anchors.sum())
    limit = min(1.0, manifest["repeat"] / manifest["block_size"])
    section.text(
        f"Blocks start at {used:.1%} of the anchors. With repeat {manifest['repeat']} and D = {manifest['block_size']} "
        f"it is {limit:.1%} where the document has room for all blocks."
    )
    _add_quantiles(section, {"anchors": sample.anchors, "blocks": sample.blocks}, sample)


def _add_rows(section: PageSection, manifest: Mapping[str, Any], sample: RowSample) -> None:
    filled = sample.used / manifest["row_length"]
    figure, (upper, lower) = figure_of(WIDTH, 4.6, 2)
    low = min(0.99, float(np.quantile(filled, 0.002)))  # the last row of a dataset is almost empty
    heights, edges = np.histogram(np.maximum(filled, low), np.linspace(low, 1.0, 41))
    upper.stairs(heights / len(filled), edges, color=CLEAN, fill=True)
    upper.set_xlabel("filled share of a row", color=INK)
    upper.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    upper.xaxis.set_major_locator(MaxNLocator(5))
    numbers = np.bincount(sample.documents)
    lower.bar(np.arange(len(numbers)), numbers / len(sample.documents), color=SERIES[2], width=0.85)
    lower.set_xlabel("documents per row", color=INK)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (upper, lower):
        axis.set_ylabel("rows", color=INK)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    section.figure(figure, "histograms of the fill of rows and of documents per row")
    section.text(
        f"Mean fill {filled.mean():.2%}, lowest fill {filled.min():.1%}; "
        f"{sample.documents.mean():.2f} documents per row."
    )
    _add_source(section, sample)


def _add_slots(section: PageSection, manifest: Mapping[str, Any]) -> None:
    slots = np.sum([epoch["slots"] for epoch in manifest["counts"]], axis=0)
    blocks = sum(epoch["block"] for epoch in manifest["counts"]) // manifest["block_size"]
    rows = [
        [f"{j + 1}" + (" (next token)" if not j else ""), f"{n:,}", f"{n / max(1, blocks):.2%}"]
        for j, n in enumerate(slots.tolist())
    ]
    section.table(["slot", "targets", "share of blocks"], rows)
    section.note(
        "A slot has no target beyond the end of the document, or after an earlier slot of its block whose target ends "
        "the turn."
    )


def _add_duplicates(section: PageSection, manifest: Mapping[str, Any]) -> None:
    duplicates = manifest["duplicates"]
    n = duplicates["documents"]
    verb = {"keep": "kept", "drop": "dropped"}.get(duplicates["policy"], duplicates["policy"])
    section.text(f"{n:,} documents have the same tokens as an earlier one; they were {verb}." if n else "None.")
    if duplicates["pairs"]:
        most = sorted(duplicates["pairs"], key=lambda pair: -pair["documents"])
        rows = [[pair["duplicate"], pair["kept"], f"{pair['documents']:,}"] for pair in most]
        section.table(["duplicates in", "of rows in", "documents"], rows)
    add_repetitions(section, manifest)


def _add_settings(section: PageSection, manifest: Mapping[str, Any]) -> None:
    settings = {key: value for key, value in manifest.get("build", {}).items() if key != "sources"}
    ids = {key: f"{manifest[key]:,}" for key in ("vocab_size", "mask_token_id", "eos_token_id", "pad_token_id")}
    section.facts({**settings, "tokenizer fingerprint": manifest["tokenizer"]["fingerprint"], **ids})
    sources = [
        [s["name"], s["format"], s["hub"] or s["path"] or " ".join(s["paths"]), f"{s['weight']:g}", s["licence"] or "–"]
        for s in manifest["sources"]
    ]
    section.table(["source", "format", "from", "weight", "license"], sources, align="left")


def _add_quantiles(section: PageSection, columns: Mapping[str, np.ndarray], sample: RowSample) -> None:
    shares = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    rows = [
        [name, *(f"{value:,.0f}" for value in [values.mean(), *np.quantile(values, shares), values.max()])]
        for name, values in columns.items()
    ]
    section.table(["", "mean", *(f"{share:.0%}" for share in shares), "max"], rows)
    _add_source(section, sample)


def _add_source(section: PageSection, sample: RowSample) -> None:
    rows = "all" if len(sample.used) == sample.rows else f"{len(sample.used):,} of {sample.rows:,}"
    section.note(f"From {rows} rows of the first epoch ({len(sample.clean):,} documents).")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm stats", __doc__, example="sdlm stats DATA --out stats.html")
    parser.add_argument("dataset", metavar="DATA", help="dataset folder, written by `sdlm prepare`")
    parser.add_argument("--out", type=Path, default=Path("stats.html"), metavar="FILE", help="HTML file to write")
    parser.add_argument("--rows", type=int, default=SAMPLE, metavar="N", help="number of rows to read")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows is {args.rows}: use a number above 0")
    console = make_console()
    sample = write_stats(args.dataset, args.out, console, rows=args.rows)
    used = f"{len(sample.used):,} of {sample.rows:,} rows"
    console.print(f"wrote {args.out}: lengths, anchors and fill from {used}, the rest exact", soft_wrap=True)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
