"""The page that `stats` writes: one HTML file, figures inside."""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from data_prep.build_report import short

INK, SOFT, GRID = "#1f2933", "#6b7785", "#e3e8ee"
CLEAN, BLOCK, OTHER = "#3b6fb6", "#e2803a", "#2f9e77"

CSS = """
:root { --ink: #1f2933; --soft: #6b7785; --line: #e3e8ee; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; margin: 12px 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 10px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 0 0 16px; }
p { margin: 0 0 10px; }
.soft { color: var(--soft); font-size: .92rem; }
.cards { display: flex; flex-wrap: wrap; gap: 10px 34px; }
.cards b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.2; }
.cards span { color: var(--soft); font-size: .9rem; }
figure { margin: 8px 0 0; overflow-x: auto; }
img { display: block; width: 100%; min-width: 520px; height: auto; }
.wide { overflow-x: auto; margin: 0 0 10px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: right; vertical-align: top; padding: 5px 0 5px 14px; border-top: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; border-top: 0; }
tbody tr.sum td { font-weight: 600; }
.text td, .text th { text-align: left; }
.text td:first-child { white-space: nowrap; color: var(--soft); }
@media (max-width: 560px) { main { padding: 12px 8px 40px; } section { padding: 14px 12px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Sample:
    """What was counted on some rows of the first epoch."""

    rows: int
    """Rows of the epoch."""
    used: np.ndarray
    """int64 (sampled rows,): tokens without padding."""
    documents: np.ndarray
    """int64 (sampled rows,)."""
    clean: np.ndarray
    """int64 (documents of these rows,): clean tokens."""
    blocks: np.ndarray
    """int64 (documents,)."""
    anchors: np.ndarray
    """int64 (documents,)."""


def page(name: str, manifest: Mapping[str, Any], sample: Sample) -> str:
    """The HTML text.

    Args:
        name: of the dataset.
        manifest: its manifest, with accounting and duplicates.
        sample: what was counted on its rows.
    """
    sections = (
        ("", _cards(manifest)),
        ("What became of the input rows", _outcomes(manifest)),
        ("Tokens of each source, in one epoch", _tokens(manifest)),
        ("Length of documents", _lengths(manifest, sample)),
        ("Anchors and blocks of a document", _anchors(manifest, sample)),
        ("Rows", _rows(manifest, sample)),
        ("Targets of each slot", _slots(manifest)),
        ("Duplicates", _duplicates(manifest)),
        ("Settings", _settings(manifest)),
    )
    body = "\n".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}\n{''.join(parts)}</section>" for title, parts in sections
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(name)}</title>'
        f"<style>{CSS}</style></head>\n<body><main><h1>{escape(name)}</h1>\n{body}\n</main></body></html>\n"
    )


def _cards(manifest: Mapping[str, Any]) -> Iterator[str]:
    counts = manifest["counts"]
    total = {key: sum(epoch[key] for epoch in counts) for key in ("rows", "documents", "clean", "block", "targets")}
    fill = (total["clean"] + total["block"]) / (total["rows"] * manifest["row_length"])
    cards = [
        (str(len(counts)), "epoch" + "s" * (len(counts) != 1)),
        (f"{total['rows']:,}", f"rows of {manifest['row_length']:,} tokens"),
        (f"{total['documents']:,}", "documents"),
        (short(total["clean"]), "clean tokens"),
        (short(total["block"]), f"block tokens (D = {manifest['block_size']})"),
        (short(total["targets"]), "targets"),
        (f"{fill:.2%}", "of the rows is filled"),
    ]
    yield '<div class="cards">' + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in cards) + "</div>"


def _outcomes(manifest: Mapping[str, Any]) -> Iterator[str]:
    accounting = manifest["accounting"]
    rows = []
    for entry in [*accounting["by_source"], {**accounting, "name": "all"}]:
        figures = [
            entry["rows"],
            entry["packed"],
            entry["truncated"],
            sum(entry["dropped"].values()),
            entry["rejected"],
        ]
        rows.append([entry["name"], *(f"{figure:,}" for figure in figures)])
    yield _table(["source", "rows", "packed whole", "truncated", "dropped", "rejected"], rows, sums=True)
    yield "<p class=soft>Every row is in exactly one of the four columns after “rows”.</p>"
    reasons = [[reason, f"{n:,}"] for reason, n in accounting["dropped"].items()]
    reasons += [["rejected: no conversation (reasons in rejects.jsonl)", f"{accounting['rejected']:,}"]]
    yield _table(["why a row is not in the dataset", "rows"], reasons)
    cut = [
        ["turns cut from documents that are too long", f"{accounting['turns_cut']:,}"],
        ["tokens in them", f"{accounting['tokens_cut']:,}"],
        ["blocks that long documents had no room for", f"{accounting['blocks_missing']:,}"],
        ["blocks trimmed to fill rows", f"{sum(manifest.get('blocks_trimmed', [])):,}"],
        ["texts that spell a special token (encoded as text)", f"{accounting['spelled']:,}"],
    ]
    yield _table(["what else was lost, or changed", ""], cut)


def _tokens(manifest: Mapping[str, Any]) -> Iterator[str]:
    size, by_source = manifest["block_size"], manifest["accounting"]["by_source"]
    names = [entry["name"] for entry in by_source]
    clean = np.array([entry["clean_tokens"] * entry["weight"] for entry in by_source])
    block = np.array([entry["blocks"] * entry["weight"] * size for entry in by_source])
    figure, axis = _figure(7.6, 0.9 + 0.36 * len(names))
    places = np.arange(len(names))
    axis.barh(places, clean, color=CLEAN, label="clean", height=0.7)
    axis.barh(places, block, left=clean, color=BLOCK, label="block", height=0.7)
    axis.set_yticks(places, names, parse_math=False)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(int(value))))
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    yield _picture(figure, "clean and block tokens of each source")
    whole = max(1.0, float(clean.sum() + block.sum()))
    rows = [
        [name, f"{entry['weight']:g}", short(round(c)), short(round(b)), f"{(c + b) / whole:.1%}"]
        for name, entry, c, b in zip(names, by_source, clean.tolist(), block.tolist(), strict=True)
    ]
    yield _table(["source", "weight", "clean tokens", "block tokens", "share"], rows)


def _lengths(manifest: Mapping[str, Any], sample: Sample) -> Iterator[str]:
    expanded = sample.clean + sample.blocks * manifest["block_size"]
    limit = manifest["max_document_length"]
    edges = np.unique(np.geomspace(max(1, sample.clean.min()), max(limit, expanded.max()) + 1, 50).astype(np.int64))
    figure, axis = _figure(7.6, 3.2)
    axis.axvline(limit, color=INK, linewidth=1, linestyle=":", label=f"limit: {limit:,}")
    _shares(axis, edges, ((sample.clean, CLEAN, "clean"), (expanded, BLOCK, "with its blocks")), "tokens of a document")
    yield _picture(figure, "histogram of the lengths of documents")
    yield _quantiles([("clean tokens", sample.clean), ("with its blocks", expanded)])
    yield _source_of(sample)


def _shares(axis: Axes, edges: np.ndarray, series: Iterable[tuple[np.ndarray, str, str]], label: str) -> None:
    """Histograms of (values, colour, name) over one logarithmic axis, as shares of the documents."""
    for values, colour, name in series:
        heights, _ = np.histogram(values, edges)
        axis.stairs(heights / len(values), edges, color=colour, fill=True, alpha=0.35)
        axis.stairs(heights / len(values), edges, color=colour, label=name, linewidth=1.4)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel(label, color=INK)
    axis.set_ylabel("documents", color=INK)
    axis.legend(frameon=False, fontsize=9, labelcolor=INK)


def _anchors(manifest: Mapping[str, Any], sample: Sample) -> Iterator[str]:
    edges = np.unique(np.geomspace(1, max(2, sample.anchors.max()) + 1, 50).astype(np.int64))
    figure, axis = _figure(7.6, 2.9)
    series = ((sample.anchors, OTHER, "anchors"), (sample.blocks, BLOCK, "blocks"))
    _shares(axis, edges, series, "anchors, blocks of a document")
    yield _picture(figure, "histogram of anchors and blocks a document")
    yield _quantiles([("anchors", sample.anchors), ("blocks", sample.blocks)])
    used = sample.blocks.sum() / max(1, sample.anchors.sum())
    rule = min(1.0, manifest["repeat"] / manifest["block_size"])
    yield (
        f"<p>Blocks start at {used:.1%} of the anchors. Repeat {manifest['repeat']} and D = {manifest['block_size']} "
        f"give {rule:.1%} where the document has room for them.</p>"
    )
    yield _source_of(sample)


def _rows(manifest: Mapping[str, Any], sample: Sample) -> Iterator[str]:
    fill = sample.used / manifest["row_length"]
    figure, (left, right) = _figure(7.6, 2.8, 2)
    low = min(0.99, float(np.quantile(fill, 0.002)))  # the last row of a dataset is nearly empty
    heights, edges = np.histogram(np.maximum(fill, low), np.linspace(low, 1.0, 41))
    left.stairs(heights / len(fill), edges, color=CLEAN, fill=True)
    left.set_xlabel("share of a row that is filled", color=INK)
    left.set_ylabel("rows", color=INK)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    numbers = np.bincount(sample.documents)
    right.bar(np.arange(len(numbers)), numbers / len(sample.documents), color=OTHER, width=0.85)
    right.set_xlabel("documents in a row", color=INK)
    right.set_ylabel("rows", color=INK)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    yield _picture(figure, "fill of rows, documents a row")
    yield (
        f"<p>Mean fill {fill.mean():.2%}, the emptiest row {fill.min():.1%}; "
        f"{sample.documents.mean():.2f} documents a row.</p>"
    )
    yield _source_of(sample)


def _slots(manifest: Mapping[str, Any]) -> Iterator[str]:
    slots = np.sum([epoch["slots"] for epoch in manifest["counts"]], axis=0)
    blocks = sum(epoch["block"] for epoch in manifest["counts"]) // manifest["block_size"]
    rows = [
        [f"{j + 1}" + (" (next token)" if not j else ""), f"{n:,}", f"{n / max(1, blocks):.2%}"]
        for j, n in enumerate(slots.tolist())
    ]
    yield _table(["slot", "targets", "of all blocks"], rows)
    yield (
        "<p class=soft>A slot has no target where the document ends, or after an earlier slot of its block was trained "
        "to close the turn.</p>"
    )


def _duplicates(manifest: Mapping[str, Any]) -> Iterator[str]:
    found = manifest["duplicates"]
    verb = {"keep": "kept", "drop": "dropped"}.get(found["policy"], found["policy"])
    n = found["documents"]
    yield f"<p>{n:,} documents equal an earlier one, token for token; they were {verb}.</p>" if n else "<p>None.</p>"
    if found["pairs"]:
        most = sorted(found["pairs"], key=lambda pair: -pair["documents"])
        yield _table(
            ["duplicates in", "of rows of", "documents"],
            [[pair["duplicate"], pair["kept"], f"{pair['documents']:,}"] for pair in most],
        )


def _settings(manifest: Mapping[str, Any]) -> Iterator[str]:
    settings = {key: value for key, value in manifest.get("build", {}).items() if key != "sources"}
    rows = [[key, str(value)] for key, value in settings.items()]
    rows += [
        ["tokenizer fingerprint", str(manifest["tokenizer"]["fingerprint"])],
        *([key, f"{manifest[key]:,}"] for key in ("vocab_size", "mask_token_id", "eos_token_id", "pad_token_id")),
    ]
    yield _table(["", ""], rows, kind="text")
    sources = [
        [s["name"], s["format"], s["hub"] or s["path"], f"{s['weight']:g}", s["licence"] or "–"]
        for s in manifest["sources"]
    ]
    yield _table(["source", "format", "from", "weight", "licence"], sources, kind="text")


def _source_of(sample: Sample) -> str:
    whole = len(sample.used) == sample.rows
    what = "all" if whole else f"{len(sample.used):,} of {sample.rows:,}"
    return f"<p class=soft>From {what} rows of the first epoch ({len(sample.clean):,} documents).</p>"


def _quantiles(columns: Sequence[tuple[str, np.ndarray]]) -> str:
    shares = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    rows = [
        [name, *(f"{value:,.0f}" for value in [values.mean(), *np.quantile(values, shares), values.max()])]
        for name, values in columns
    ]
    return _table(["", "mean", *(f"{share:.0%}" for share in shares), "most"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, sums: bool = False, kind: str = "") -> str:
    """A table; with `sums` the last row is set off."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    top = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
    body = ""
    for n, row in enumerate(rows):
        mark = ' class="sum"' if sums and n == len(rows) - 1 else ""
        body += f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
    style = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{style}>{top}<tbody>{body}</tbody></table></div>'


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes: Any = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes).tolist():
        _plain(axis)
    return figure, axes


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(SOFT)
    axis.tick_params(colors=SOFT, labelsize=9, which="both")
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _picture(figure: Figure, description: str) -> str:
    """The figure as an image inside the page."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stats"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}"></figure>'
