"""Pictures of who sees whom in a row: the whole row as a PNG, a stretch of it in letters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import visible

PIXELS = 1100
"""Side of the picture; a longer row is shrunk to it."""
STRETCH = 32
"""Clean tokens that an enlarged stretch shows at most."""
STRETCH_BLOCKS = 3

KINDS = ("clean sees clean, up to itself", "block sees clean, before its start", "block sees its own tokens")
COLOURS = ("#3b6fb6", "#9cc3e6", "#e2803a")
_LETTERS = " █░▓"
"""Of the unseen and of KINDS."""
_STYLES = ("", *COLOURS)
_NONE, _INK, _SOFT = "#f4f6f8", "#1f2933", "#6b7785"


@dataclass(frozen=True)
class Stretch:
    """A few neighbouring blocks of a document with the clean tokens around them."""

    low: int
    """The first clean token shown, and (next) the one after the last."""
    high: int
    starts: np.ndarray
    """int (blocks,)."""
    kinds: np.ndarray
    """int8 (queries, keys), of the clean tokens low..high-1 and then the blocks' own: 0 unseen, k + 1: KINDS[k]."""


def stretch_of(clean_len: int, starts: np.ndarray, block_size: int) -> Stretch:
    """The neighbouring blocks of a document that lie closest together.

    Args:
        clean_len: clean tokens of the document.
        starts: its block starts, int (blocks,), ascending; at least one.
        block_size: D.
    """
    n = min(STRETCH_BLOCKS, len(starts))
    first = int(np.argmin(starts[n - 1 :] - starts[: len(starts) - n + 1]))
    shown = starts[first : first + n]
    low = max(0, int(shown[0]) - 3)
    shown = shown[shown < low + STRETCH - block_size]
    high = min(clean_len, int(shown[-1]) + block_size + 1)
    seen = visible(high, shown, block_size=block_size)[low:, low:].astype(np.int8)
    width = high - low
    seen[width:, :width] *= 2
    seen[width:, width:] *= 3
    return Stretch(low, high, shown, seen)


def in_letters(stretch: Stretch, block_size: int, texts: Sequence[str]) -> Text:
    """The mask of a stretch, a line for each query.

    Args:
        stretch: what to draw.
        block_size: D.
        texts: of each clean token of the document.
    """
    width = stretch.high - stretch.low
    names = [f"{place} {_short(texts[place])}" for place in range(stretch.low, stretch.high)]
    for start in stretch.starts.tolist():
        names += [f"block {start}, slot {j}" for j in range(block_size)]
    margin = max(map(len, names)) + 2
    picture = Text(f"{'query':<{margin}}keys: clean {stretch.low} to {stretch.high - 1}", style="dim")
    picture.append(f"{'':<{max(1, width - len(picture) + margin + 2)}}blocks\n")
    for name, row in zip(names, stretch.kinds, strict=True):
        picture.append(f"{name:<{margin}}", style="dim")
        for key, kind in enumerate(row.tolist()):
            if key >= width and (key - width) % block_size == 0:
                picture.append("  " if key == width else " ")
            picture.append(_LETTERS[kind] if kind else "·", style=_STYLES[kind] if kind else "dim")
        picture.append("\n")
    for kind, name in enumerate(KINDS, 1):
        picture.append(_LETTERS[kind], style=_STYLES[kind])
        picture.append(f" {name}   ")
    return picture


def save_png(path: Path, layout: RowLayout, document: int, texts: Sequence[str], title: str) -> None:
    """Writes a picture of the whole row, and below it a stretch of one document.

    Args:
        path: PNG to write.
        layout: the row.
        document: index in the row of the document to enlarge.
        texts: of each of its clean tokens.
        title: stands above the picture.
    """
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(8.6, 13.4), layout="constrained", facecolor="white")
    whole, part = figure.subplots(2, 1, height_ratios=(8, 5))
    figure.suptitle(title, fontsize=11, color=_INK, parse_math=False)
    _draw_row(whole, layout)
    edges = np.cumsum([0, *layout.n_blocks])
    starts = layout.starts[edges[document] : edges[document + 1]]
    stretch = stretch_of(int(layout.clean_lens[document]), starts, layout.block_size)
    _draw_stretch(part, stretch, layout.block_size, texts, document)
    _legend(figure)
    figure.savefig(path, dpi=130, format="png")


def row_image(layout: RowLayout, pixels: int) -> np.ndarray:
    """The mask of a row in colours, float (side, side, 3), side = min(pixels, used).

    A pixel that stands for several tokens has their mean colour; blocks' own tokens, which would vanish, keep theirs.
    """
    side = min(pixels, layout.used)
    cells = np.zeros((3, side, side))
    edges = np.arange(layout.used + 1) * side // layout.used  # pixel of each token
    clean_at = layout.clean_offsets()
    block_edges = np.cumsum([0, *layout.n_blocks])
    for doc in range(layout.n_docs):
        length, starts = int(layout.clean_lens[doc]), layout.starts[block_edges[doc] : block_edges[doc + 1]]
        seen = visible(length, starts, block_size=layout.block_size)
        places = (
            slice(clean_at[doc], clean_at[doc] + length),
            slice(
                layout.n_clean + block_edges[doc] * layout.block_size,
                layout.n_clean + block_edges[doc + 1] * layout.block_size,
            ),
        )
        for kind, (query, key) in enumerate(((0, 0), (1, 0), (1, 1))):
            block = seen[slice(length, None) if query else slice(length), slice(length, None) if key else slice(length)]
            _pool(cells[kind], block, edges[places[query]], edges[places[key]])
    per_pixel = np.bincount(edges[:-1], minlength=side)
    share = cells / np.outer(per_pixel, per_pixel)
    share[2] = share[2] > 0
    share[:2] *= 1 - share[2]
    colours = np.array([_rgb(colour) for colour in COLOURS])
    return np.einsum("kqp,kc->qpc", share, colours) + (1 - share.sum(axis=0))[..., None] * _rgb(_NONE)


def _pool(cells: np.ndarray, seen: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """Adds to each pixel how many pairs of `seen` fall into it; rows, columns: the pixel of each token, ascending."""
    if not seen.size:
        return
    row_edges, column_edges = (np.flatnonzero(np.diff(part, prepend=-1)) for part in (rows, columns))
    sums = np.add.reduceat(seen, row_edges, axis=0, dtype=np.int32)
    sums = np.add.reduceat(sums, column_edges, axis=1)
    cells[np.ix_(rows[row_edges], columns[column_edges])] += sums


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _draw_row(axis: Any, layout: RowLayout) -> None:
    axis.imshow(row_image(layout, PIXELS), extent=(0, layout.used, layout.used, 0), interpolation="nearest")
    ends = np.cumsum([*layout.clean_lens, *(layout.n_blocks * layout.block_size)])
    middles = ends - np.diff(ends, prepend=0) / 2
    for line in (axis.axhline, axis.axvline):
        for end in ends[:-1].tolist():
            strong = end == layout.n_clean
            line(end, color=_INK if strong else "white", linewidth=0.9 if strong else 0.7)
    kept: list[tuple[float, str]] = []
    for i, middle in enumerate(middles.tolist()):
        if not kept or middle - kept[-1][0] > 0.05 * layout.used:  # a label needs room
            number = layout.doc_ids[i % layout.n_docs]
            kept.append((middle, f"{'clean' if i < layout.n_docs else 'blocks'}\n{number}"))
    axis.set_yticks([place for place, _ in kept], [name for _, name in kept])
    axis.set_xticks([place for place, _ in kept], [name for _, name in kept], rotation=90)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xlabel("key: may be seen", color=_INK, fontsize=9)
    axis.set_ylabel("query: looks", color=_INK, fontsize=9)
    axis.tick_params(labelsize=7.5, colors=_SOFT, length=0)
    for side in axis.spines.values():
        side.set_color(_SOFT)


def _draw_stretch(axis: Any, stretch: Stretch, block_size: int, texts: Sequence[str], document: int) -> None:
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([_NONE, *COLOURS])
    axis.pcolormesh(stretch.kinds, cmap=colours, vmin=0, vmax=3, edgecolors="white", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    width = stretch.high - stretch.low
    for line in (axis.axhline, axis.axvline):
        line(width, color=_INK, linewidth=0.9)
    names = [f"{_short(_latin(texts[place]))}  {place}" for place in range(stretch.low, stretch.high)]
    for start in stretch.starts.tolist():
        names += [f"block at {start}, slot {j}" if not j else f"slot {j}" for j in range(block_size)]
    places = np.arange(len(names)) + 0.5
    axis.set_yticks(places, names, parse_math=False)
    axis.set_xticks(places, names, rotation=90, parse_math=False)
    axis.xaxis.tick_top()
    axis.tick_params(labelsize=7, colors=_INK, length=0)
    axis.set_xlabel(f"a stretch of document {document + 1} of the row, enlarged", color=_INK, fontsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=name) for colour, name in zip(COLOURS, KINDS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=_INK)


def _short(text: str) -> str:
    """A token as one short word."""
    shown = text.strip(" ").replace("\n", "⏎").replace("\t", "⇥")
    return shown if len(shown) <= 12 else shown[:11] + "…"


def _latin(text: str) -> str:
    """Letters that matplotlib's own font has."""
    return "".join(c if c == "\n" or (c.isprintable() and ord(c) < 0x250) else "?" for c in text)
