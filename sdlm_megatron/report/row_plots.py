"""Figures of packed rows: visibility mask, enlarged blocks, and how rows are filled."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.report.plots import BLOCK, CLEAN, CONTEXT, INK, NONE, SOFT, figure_of, legend

MASK_TOKENS = 640
"""Tokens that a mask figure shows at most: more cells cannot be distinguished."""
ZOOM_TOKENS = 40
"""Clean tokens that the enlarged figure shows at most."""
MAX_ROWS = 512
"""Rows that are counted for the fill figure; of a larger dataset, this many at equal distances."""


class PackedRows(Protocol):
    """The part of `data.format.PackedDataset` that figures read."""

    manifest: dict[str, Any]

    def rows(self, epoch: int) -> int:
        """Rows of an epoch."""

    def read(self, epoch: int, row: int) -> tuple[np.ndarray, RowLayout]:
        """Tokens and layout of a row."""


@dataclass(frozen=True)
class Fill:
    """Tokens of each kind per row, int64 (rows,)."""

    clean: np.ndarray
    block: np.ndarray
    row_length: int

    @property
    def padding(self) -> np.ndarray:
        return self.row_length - self.clean - self.block


def read_fill(dataset: PackedRows) -> Fill:
    """Token counts of the rows of epoch 0, at most MAX_ROWS of them at equal distances."""
    count = dataset.rows(0)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_ROWS)).astype(int))
    layouts = [dataset.read(0, int(i))[1] for i in chosen]
    clean = np.array([layout.n_clean for layout in layouts], dtype=np.int64)
    block = np.array([layout.n_block_tokens for layout in layouts], dtype=np.int64)
    return Fill(clean, block, int(dataset.manifest["row_length"]))


def crop_layout(layout: RowLayout, most: int = MASK_TOKENS) -> RowLayout:
    """The first documents of a row that fit into `most` tokens, at least one; of a longer one its first blocks.

    Thousands of tokens per side cannot be distinguished, and the mask grows with the square of their number.
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
    """int8 (row_length, row_length): 0 not visible, 1 clean sees clean, 2 block sees clean, 3 block sees itself."""
    seen = visible_row(layout, row_length, causal_attn=causal_attn)
    kinds = np.zeros(seen.shape, dtype=np.int8)
    clean, used = layout.n_clean, layout.used
    kinds[:clean, :clean] = seen[:clean, :clean] * 1
    kinds[clean:used, :clean] = seen[clean:used, :clean] * 2
    kinds[clean:used, clean:used] = seen[clean:used, clean:used] * 3
    return kinds


def mask_figure(layout: RowLayout, row_length: int, *, causal_attn: bool = False) -> Figure:
    """The visibility mask of one packed row: keys across, queries down, documents labeled on both edges.

    Args:
        layout: the row, or the result of `crop_layout`.
        row_length: tokens to show; those after `layout.used` are padding.
    """
    kinds = _mask_kinds(layout, row_length, causal_attn)
    figure = Figure(figsize=(7.2, 6.9), layout="constrained", facecolor="white")
    axis = figure.subplots()
    colors = ListedColormap([NONE, CLEAN, CONTEXT, BLOCK])
    axis.imshow(kinds, cmap=colors, vmin=0, vmax=3, interpolation="nearest", extent=(0, row_length, row_length, 0))
    ends = [*np.cumsum(layout.clean_lens), *(layout.n_clean + np.cumsum(layout.n_blocks) * layout.block_size)]
    for end in ends:
        strong = end in (layout.n_clean, layout.used)
        for line in (axis.axhline, axis.axvline):
            line(end, color=INK if strong else "white", linewidth=0.9 if strong else 0.7)
    _document_ticks(axis, layout, row_length)
    axis.set_xlabel("key", color=INK)
    axis.set_ylabel("query", color=INK)
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
    # a label needs about a twentieth of the side: labels closer than that to the previous one are dropped
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
    handles = [Patch(facecolor=color, label=label) for color, label in entries]
    legend(figure, handles=handles, loc="outside lower center", ncols=3)


def zoom_figure(layout: RowLayout, document: int, *, causal_attn: bool = False, blocks: int = 4) -> Figure:
    """A few neighboring blocks of one document: their slots as queries, the clean tokens around them as keys.

    Args:
        layout: the row.
        document: index in the row of a document with at least one block.
        blocks: number of blocks to show at most.
    """
    size = layout.block_size
    shown = min(blocks, int(layout.n_blocks[document]))
    first = _closest_blocks(layout, document, shown)
    while shown > 1 and layout.starts[first + shown - 1] - layout.starts[first] > ZOOM_TOKENS - 8:
        shown -= 1  # the blocks are too far apart for one figure
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
    colors = ListedColormap([NONE, CLEAN, CONTEXT, BLOCK])
    axis.pcolormesh(kinds, cmap=colors, vmin=0, vmax=3, edgecolors="white", linewidth=1.2)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    width = high - low
    for n, start in enumerate(starts):
        axis.add_patch(Rectangle((width + n * size, n * size), size, size, fill=False, edgecolor=INK, linewidth=1.3))
        if layout.target_shift and start - low < width:  # the anchor is not visible: the block holds a copy of it
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
    """Index of the first of the `count` neighboring blocks of a document whose anchors lie closest together."""
    first = int(layout.n_blocks[:document].sum())
    starts = layout.starts[first : first + int(layout.n_blocks[document])]
    return first + int(np.argmin(starts[count - 1 :] - starts[: len(starts) - count + 1]))


def fill_figure(fill: Fill) -> Figure:
    """Clean, block and padding tokens of each row, stacked; neighbors are averaged above 96 rows."""
    figure, (axis,) = figure_of(7.2, 3.2)
    rows = len(fill.clean)
    bins = np.array_split(np.arange(rows), min(rows, 96))
    bottom = np.zeros(len(bins))
    lefts = np.array([b[0] for b in bins], dtype=float)
    widths = np.array([len(b) for b in bins], dtype=float)
    total = rows * fill.row_length
    kinds = (("clean", fill.clean, CLEAN), ("blocks", fill.block, BLOCK), ("padding", fill.padding, "#cfd6de"))
    for name, tokens, color in kinds:
        height = np.array([tokens[b].mean() for b in bins])
        label = f"{name} {tokens.sum() / total:.1%}"
        axis.bar(
            lefts, height, widths, bottom, align="edge", color=color, label=label, edgecolor="white", linewidth=0.2
        )
        bottom += height
    axis.set_xlim(0, rows)
    axis.set_ylim(0, fill.row_length)
    axis.grid(False)
    axis.set_xlabel("row" if rows <= 96 else "row (neighbors averaged)", color=INK)
    axis.set_ylabel("tokens", color=INK)
    legend(axis, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure
