"""The report's figures. Each function returns a matplotlib Figure; nothing here touches global plot state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import visible_row

INK, SOFT, GRID = "#1f2933", "#6b7785", "#e3e8ee"
CLEAN, CONTEXT, BLOCK, NONE = "#3b6fb6", "#9cc3e6", "#e2803a", "#f4f6f8"
SERIES = ("#3b6fb6", "#e2803a", "#2f9e77", "#b5527d", "#8a63c2", "#8d7a1f", "#4aa3b5", "#c24b3a")
MASK_TOKENS = 640
"""A mask picture shows at most this many tokens: more cells than this cannot be told apart."""

ZOOM_TOKENS = 40
"""The enlarged picture shows at most this many clean tokens."""


@dataclass(frozen=True)
class Fill:
    """How rows are filled: tokens of each kind a row, int64 (rows,)."""

    clean: np.ndarray
    block: np.ndarray
    row_length: int

    @property
    def padding(self) -> np.ndarray:
        return self.row_length - self.clean - self.block


def figure_of(width: float, height: float, rows: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure of that many inches, and its axes, row by row, in the report's style."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = np.atleast_1d(figure.subplots(rows, **grid)).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(SOFT)
        axis.tick_params(colors=SOFT, labelsize=9)
        axis.grid(True, color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def legend(owner: Axes | Figure, **options: Any) -> None:
    """A legend in the report's style, where something has a label."""
    drawn = [owner] if isinstance(owner, Axes) else owner.axes
    if "handles" in options or any(axis.get_legend_handles_labels()[1] for axis in drawn):
        style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
        compact = {"columnspacing": 1.2, "handlelength": 1.6, "handletextpad": 0.6}
        owner.legend(**style, **compact, **options)


def loss_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses per slot and in total against the step; dashed verticals where the run was resumed.

    Args:
        records: log records in step order; a slot's value may be absent or null.
    """
    figure, (axis,) = figure_of(7.2, 3.7)
    slots = sorted({int(k[len("loss_pos_") :]) for r in records for k in r if k.startswith("loss_pos_")})
    highest = 0.0
    for n, slot in enumerate(slots):
        steps, values = series(records, f"loss_pos_{slot}")
        label = "slot 1 (next token)" if slot == 1 else f"slot {slot}"
        axis.plot(steps, values, color=SERIES[n % len(SERIES)], linewidth=1.6, label=label)
        highest = max(highest, *values)
    steps, values = series(records, "loss_next_token")
    if values:
        axis.plot(steps, values, color=SOFT, linewidth=1.3, label="clean tokens")
        highest = max(highest, *values)
    steps, values = series(records, "loss")
    axis.plot(steps, values, color=INK, linewidth=1.3, linestyle=(0, (4, 2)), label="all targets")
    highest = max([highest, *values]) if values else highest
    axis.set_ylim(0, highest * 1.05 if highest > 0 else 1)
    mark_resumes(axis, records, words=True)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel("loss (nats a target)", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(x=0.01)
    legend(axis, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def mark_resumes(axis: Axes, records: Sequence[Mapping[str, Any]], *, words: bool = False) -> None:
    """Dotted verticals where the run was resumed; with `words` where there are few."""
    resumes = [r for r in records if "resumed_from" in r]
    for record in resumes:
        axis.axvline(record["resumed_from"] + 0.5, color=SOFT, linewidth=1, linestyle=":")
        note = record.get("resume_note")
        if words and len(resumes) <= 2:
            axis.annotate(
                "stopped and resumed" + (f"\n{note}" if note else ""),
                (record["resumed_from"] + 0.5, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8.5,
                color=SOFT,
                va="top",
            )


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a field, where it is known."""
    points = [(r["step"], float(r[key])) for r in records if r.get(key) is not None]
    return [int(s) for s, _ in points], [v for _, v in points]


def crop_layout(layout: RowLayout, most: int = MASK_TOKENS) -> RowLayout:
    """The first documents of a row that fit `most` tokens, but one at least; of that one the first blocks only.

    A picture of thousands of tokens a side shows nothing, and the mask behind it grows with the square.
    """
    sizes = layout.clean_lens + layout.n_blocks * layout.block_size
    n_docs = max(1, int((np.cumsum(sizes) <= most).sum()))
    lens, blocks = layout.clean_lens[:n_docs].copy(), layout.n_blocks[:n_docs].copy()
    starts = layout.starts[: int(blocks.sum())]
    if n_docs == 1 and layout.n_docs and sizes[0] > most:
        lens[0] = min(int(lens[0]), most // 2)
        room = (most - int(lens[0])) // layout.block_size
        starts = starts[starts < lens[0]][: max(room, 1)]
        blocks[0] = len(starts)
    return RowLayout(layout.doc_ids[:n_docs], lens, blocks, starts, layout.block_size, layout.target_shift)


def _mask_kinds(layout: RowLayout, row_length: int, causal_attn: bool) -> np.ndarray:
    """int8 (row_length, row_length): 0 unseen, 1 clean sees clean, 2 block sees clean, 3 block sees its own."""
    seen = visible_row(layout, row_length, causal_attn=causal_attn)
    kinds = np.zeros(seen.shape, dtype=np.int8)
    clean, used = layout.n_clean, layout.used
    kinds[:clean, :clean] = seen[:clean, :clean] * 1
    kinds[clean:used, :clean] = seen[clean:used, :clean] * 2
    kinds[clean:used, clean:used] = seen[clean:used, clean:used] * 3
    return kinds


def mask_figure(layout: RowLayout, row_length: int, *, causal_attn: bool = False) -> Figure:
    """Who sees whom in one packed row: keys across, queries down, documents labelled on both edges.

    Args:
        layout: the row, or what `crop_layout` left of it.
        row_length: tokens to show; what exceeds `layout.used` is padding.
    """
    kinds = _mask_kinds(layout, row_length, causal_attn)
    figure = Figure(figsize=(7.2, 6.9), layout="constrained", facecolor="white")
    axis = figure.subplots()
    colours = ListedColormap([NONE, CLEAN, CONTEXT, BLOCK])
    axis.imshow(kinds, cmap=colours, vmin=0, vmax=3, interpolation="nearest", extent=(0, row_length, row_length, 0))
    ends = [*np.cumsum(layout.clean_lens), *(layout.n_clean + np.cumsum(layout.n_blocks) * layout.block_size)]
    for end in ends:
        strong = end in (layout.n_clean, layout.used)
        for line in (axis.axhline, axis.axvline):
            line(end, color=INK if strong else "white", linewidth=0.9 if strong else 0.7)
    _document_ticks(axis, layout, row_length)
    axis.set_xlabel("key: may be seen", color=INK)
    axis.set_ylabel("query: looks", color=INK)
    axis.xaxis.set_label_position("top")
    _mask_legend(figure)
    return figure


def _document_ticks(axis: Axes, layout: RowLayout, row_length: int) -> None:
    places: list[float] = []
    labels: list[str] = []
    for offset, sizes, kind in (
        (0, layout.clean_lens, "clean"),
        (layout.n_clean, layout.n_blocks * layout.block_size, "blocks"),
    ):
        middles = offset + np.cumsum(sizes) - sizes / 2
        places += middles.tolist()
        labels += [f"doc {n + 1}\n{kind}" for n in range(layout.n_docs)]
    if row_length - layout.used > 0.04 * row_length:
        places.append((layout.used + row_length) / 2)
        labels.append("padding")
    # a label needs about a twentieth of the side; of those too close to the one before, the first stays
    kept, last = [], -math.inf
    for place, label in zip(places, labels, strict=True):
        if place - last >= 0.055 * row_length:
            kept.append((place, label))
            last = place
    axis.set_yticks([p for p, _ in kept], [t for _, t in kept])
    axis.set_xticks([p for p, _ in kept], [t for _, t in kept], rotation=90)
    axis.xaxis.tick_top()
    axis.tick_params(labelsize=7.5, colors=SOFT, length=0)
    for side in axis.spines.values():
        side.set_color(SOFT)


def _mask_legend(figure: Figure) -> None:
    entries = (
        (CLEAN, "clean sees clean, up to itself"),
        (CONTEXT, "block sees clean, before its start"),
        (BLOCK, "block sees its own tokens"),
    )
    handles = [Patch(facecolor=colour, label=label) for colour, label in entries]
    legend(figure, handles=handles, loc="outside lower center", ncols=3)


def zoom_figure(layout: RowLayout, document: int, *, causal_attn: bool = False, blocks: int = 4) -> Figure:
    """A few blocks of one document enlarged: their slots as queries, the clean tokens around them as keys.

    Args:
        layout: the row.
        document: index of the document in the row; it has at least one block.
        blocks: blocks to show, neighbours in the row.
    """
    size = layout.block_size
    shown = min(blocks, int(layout.n_blocks[document]))
    first = _closest_blocks(layout, document, shown)
    while shown > 1 and layout.starts[first + shown - 1] - layout.starts[first] > ZOOM_TOKENS - 8:
        shown -= 1  # too far apart for one picture
        first = _closest_blocks(layout, document, shown)
    starts = layout.starts[first : first + shown]
    low = max(0, int(starts[0]) - 3)
    high = min(int(layout.clean_lens[document]), int(starts[-1]) + size + 1, low + ZOOM_TOKENS)
    clean_at = int(layout.clean_offsets()[document])
    keys = np.concatenate([clean_at + np.arange(low, high), layout.n_clean + first * size + np.arange(shown * size)])
    queries = layout.n_clean + first * size + np.arange(shown * size)
    kinds = _mask_kinds(layout, layout.used, causal_attn)[np.ix_(queries, keys)]
    figure = Figure(figsize=(7.2, 1.6 + 4.6 * len(queries) / max(len(keys), 1)), layout="constrained")
    axis = figure.subplots()
    colours = ListedColormap([NONE, CLEAN, CONTEXT, BLOCK])
    axis.pcolormesh(kinds, cmap=colours, vmin=0, vmax=3, edgecolors="white", linewidth=1.2)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    width = high - low
    for n, start in enumerate(starts):
        axis.add_patch(Rectangle((width + n * size, n * size), size, size, fill=False, edgecolor=INK, linewidth=1.3))
        if start - low < width:  # the anchor itself is not seen: its copy in the block stands for it
            axis.add_patch(
                Rectangle((start - low, n * size), 1, size, fill=False, edgecolor=INK, linewidth=0.9, linestyle=":")
            )
    axis.axvline(width, color=INK, linewidth=1)
    every = max(1, math.ceil(width / 16))
    ticks = [*(np.arange(0, width, every) + 0.5), *(width + size * (np.arange(shown) + 0.5))]
    labels = [*map(str, range(low, high, every)), *(f"block at {s}" for s in starts)]
    axis.set_xticks(ticks, labels)
    for text in axis.get_xticklabels()[-shown:]:
        text.set(rotation=20, ha="right", rotation_mode="anchor")
    axis.set_yticks(size * (np.arange(shown) + 0.5), [f"block at {s}" for s in starts])
    axis.tick_params(labelsize=8, colors=SOFT, length=0)
    axis.set_xlabel(f"clean tokens {low}–{high - 1} of document {document + 1}, then the blocks' own tokens", color=INK)
    for side in axis.spines.values():
        side.set_visible(False)
    return figure


def _closest_blocks(layout: RowLayout, document: int, count: int) -> int:
    """Index of the first of `count` neighbouring blocks of a document whose starts lie closest together."""
    first = int(layout.n_blocks[:document].sum())
    starts = layout.starts[first : first + int(layout.n_blocks[document])]
    return first + int(np.argmin(starts[count - 1 :] - starts[: len(starts) - count + 1]))


def fill_figure(fill: Fill) -> Figure:
    """How rows are filled: stacked clean / block / padding tokens, row after row (averaged where there are many)."""
    figure, (axis,) = figure_of(7.2, 3.2)
    rows = len(fill.clean)
    bins = np.array_split(np.arange(rows), min(rows, 96))
    bottom = np.zeros(len(bins))
    lefts = np.array([b[0] for b in bins], dtype=float)
    widths = np.array([len(b) for b in bins], dtype=float)
    total = rows * fill.row_length
    kinds = (
        ("clean", fill.clean, CLEAN),
        ("blocks", fill.block, BLOCK),
        ("padding", fill.padding, "#cfd6de"),
    )
    for name, tokens, colour in kinds:
        height = np.array([tokens[b].mean() for b in bins])
        label = f"{name} {tokens.sum() / total:.1%}"
        axis.bar(
            lefts,
            height,
            widths,
            bottom,
            align="edge",
            color=colour,
            label=label,
            edgecolor="white",
            linewidth=0.2,
        )
        bottom += height
    axis.set_xlim(0, rows)
    axis.set_ylim(0, fill.row_length)
    axis.grid(False)
    axis.set_xlabel("row" if rows <= 96 else "row (neighbours averaged)", color=INK)
    axis.set_ylabel("tokens", color=INK)
    legend(axis, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure


def threshold_figure(rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens a pass (above) and exact answers (below) against the threshold; one line an algorithm and width.

    Args:
        rows, baseline: entries of evaluation.json; those without a threshold (n = 1) become level lines.
    """
    figure, (upper, lower) = figure_of(7.2, 5.2, 2, sharex=True)
    swept: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("threshold") is not None and row["n"] > 1:
            swept.setdefault((row["alg"], row["n"]), []).append(row)
    for index, ((alg, n), points) in enumerate(sorted(swept.items())):
        points = sorted(points, key=lambda r: r["threshold"])
        x = [r["threshold"] for r in points]
        style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "marker": "o", "markersize": 5, "linewidth": 1.6}
        upper.plot(x, [r["tokens_per_pass"] for r in points], label=f"{alg}, n = {n}", **style)
        lower.plot(x, [r["exact"] for r in points], **style)
        for r in points:
            _label_point(upper, r["threshold"], r["tokens_per_pass"], f"{r['tokens_per_pass']:.2f}", style["color"])
            _label_point(lower, r["threshold"], r["exact"], f"{r['exact']:.0%}", style["color"], r["exact"] > 0.5)
    levels = [*(r for r in rows if r.get("threshold") is None or r["n"] <= 1), *baseline]
    for index, row in enumerate(levels):
        dash: dict[str, Any] = {
            "color": (SOFT, "#b5527d", INK)[index % 3],
            "linewidth": 1.2,
            "linestyle": (0, (5, 2 + 2 * index)),
        }
        upper.axhline(row["tokens_per_pass"], label=row["name"], **dash)
        lower.axhline(row["exact"], **dash)
    upper.set_ylim(0, max([1.0, *(r["tokens_per_pass"] for r in [*rows, *baseline])]) * 1.18)
    lower.set_ylim(-0.05, 1.08)
    lower.set_yticks([0, 0.25, 0.5, 0.75, 1])
    lower.yaxis.set_major_formatter(PercentFormatter(1.0))
    upper.set_ylabel("tokens a pass", color=INK)
    lower.set_ylabel("exact answers", color=INK)
    lower.set_xlabel("threshold τ", color=INK)
    for axis in (upper, lower):
        axis.margins(x=0.06)
    legend(figure, loc="outside upper left", ncols=3)
    return figure


def _label_point(axis: Axes, x: float, y: float, text: str, colour: str, below: bool = False) -> None:
    offset = (0, -14) if below else (0, 7)
    axis.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=8.5, color=colour, ha="center")
