"""Drawings of the attention mask of a row: the whole row as a PNG, an excerpt as a PNG or as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIXELS = 1100
"""Side of the image of a row; longer rows are downscaled."""
EXCERPT, EXCERPT_BLOCKS = 32, 3
"""Maximum number of clean tokens and of blocks in an excerpt."""

KINDS = ("clean sees clean, up to itself", "block sees clean, before its start", "block sees its own tokens")
COLORS = ("#3b6fb6", "#9cc3e6", "#e2803a")
_LETTERS = "·█░▓"  # not visible, and the three KINDS
_STYLES = ("dim", *COLORS)
_NONE, _INK, _SOFT = "#f4f6f8", "#1f2933", "#6b7785"


@dataclass(frozen=True)
class MaskExcerpt:
    """A few neighboring blocks of a document with the clean tokens around them."""

    low: int
    """First clean token."""
    high: int
    """Index after the last clean token."""
    starts: np.ndarray
    """int (blocks,): block starts."""
    kinds: np.ndarray
    """int8 (queries, keys) over clean tokens low..high-1, then block tokens. 0: not visible, k + 1: KINDS[k]."""


def excerpt_of(clean_len: int, starts: np.ndarray, block_size: int) -> MaskExcerpt:
    """Excerpt with the neighboring blocks of a document that are closest to each other.

    Args:
        clean_len: clean tokens of the document.
        starts: block starts, int (blocks,), ascending; at least one.
        block_size: block size D.
    """
    n = min(EXCERPT_BLOCKS, len(starts))
    first = int(np.argmin(starts[n - 1 :] - starts[: len(starts) - n + 1]))
    shown = starts[first : first + n]
    low = max(0, int(shown[0]) - 3)
    shown = shown[shown < low + EXCERPT - block_size]
    high = min(clean_len, int(shown[-1]) + block_size + 1)
    kinds = visible(high, shown, block_size=block_size)[low:, low:].astype(np.int8)
    width = high - low
    kinds[width:, :width] *= 2
    kinds[width:, width:] *= 3
    return MaskExcerpt(low, high, shown, kinds)


def excerpt_text(excerpt: MaskExcerpt, block_size: int, texts: Sequence[str]) -> Text:
    """An excerpt as text, one line per query.

    Args:
        excerpt: the excerpt.
        block_size: block size D.
        texts: text of each clean token of the document.
    """
    width = excerpt.high - excerpt.low
    names = [f"{place} {_short(texts[place])}" for place in range(excerpt.low, excerpt.high)]
    for start in excerpt.starts.tolist():
        names += [f"block {start}, slot {j}" for j in range(block_size)]
    margin = max(map(len, names)) + 2
    picture = Text(f"{'query':<{margin}}keys: clean {excerpt.low} to {excerpt.high - 1}", style="dim")
    picture.append(f"{'':<{max(1, width - len(picture) + margin + 2)}}blocks\n")
    for name, row in zip(names, excerpt.kinds, strict=True):
        picture.append(f"{name:<{margin}}", style="dim")
        for key, kind in enumerate(row.tolist()):
            if key >= width and (key - width) % block_size == 0:
                picture.append("  " if key == width else " ")
            picture.append(_LETTERS[kind], style=_STYLES[kind])
        picture.append("\n")
    for kind, name in enumerate(KINDS, 1):
        picture.append(_LETTERS[kind], style=_STYLES[kind])
        picture.append(f" {name}   ")
    return picture


def save_png(path: Path, layout: RowLayout, document: int, texts: Sequence[str], title: str) -> None:
    """Writes an image of the whole row, with an excerpt of one document below.

    Args:
        path: PNG file to write.
        layout: layout of the row.
        document: index in the row of the document of the excerpt.
        texts: text of each of its clean tokens.
        title: title of the image.
    """
    from matplotlib.figure import Figure  # importing it takes a second
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8.6, 13.4), layout="constrained", facecolor="white")
    whole, part = figure.subplots(2, 1, height_ratios=(8, 5))
    # parse_math: a `$` in a name or token is not a formula
    figure.suptitle(title, fontsize=11, color=_INK, parse_math=False)
    _draw_row(whole, layout)
    edges = np.cumsum([0, *layout.n_blocks])
    starts = layout.starts[edges[document] : edges[document + 1]]
    excerpt = excerpt_of(int(layout.clean_lens[document]), starts, layout.block_size)
    _draw_excerpt(part, excerpt, layout.block_size, texts, document)
    handles = [Patch(facecolor=color, label=name) for color, name in zip(COLORS, KINDS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=_INK)
    figure.savefig(path, dpi=130, format="png")


def row_image(layout: RowLayout, pixels: int) -> np.ndarray:
    """The mask of a row in colors, float (side, side, 3) with side = min(pixels, used).

    A pixel that covers several tokens has their mean color; blocks' own tokens keep theirs, or they would vanish.
    """
    side = min(pixels, layout.used)
    cells = np.zeros((3, side, side))
    edges = np.arange(layout.used + 1) * side // layout.used  # pixel of each token
    clean_at, size = layout.clean_offsets(), layout.block_size
    block_edges = np.cumsum([0, *layout.n_blocks])
    # Document by document: the mask of a whole row of 5,632 tokens would have 32 million entries.
    for doc in range(layout.n_docs):
        length, starts = int(layout.clean_lens[doc]), layout.starts[block_edges[doc] : block_edges[doc + 1]]
        seen = visible(length, starts, block_size=size)
        clean = edges[clean_at[doc] : clean_at[doc] + length]
        blocks = edges[layout.n_clean + block_edges[doc] * size : layout.n_clean + block_edges[doc + 1] * size]
        _pool(cells[0], seen[:length, :length], clean, clean)
        _pool(cells[1], seen[length:, :length], blocks, clean)
        _pool(cells[2], seen[length:, length:], blocks, blocks)
    per_pixel = np.bincount(edges[:-1], minlength=side)
    share = cells / np.outer(per_pixel, per_pixel)
    share[2] = share[2] > 0
    share[:2] *= 1 - share[2]
    colors = np.array([_rgb(color) for color in COLORS])
    return np.einsum("kqp,kc->qpc", share, colors) + (1 - share.sum(axis=0))[..., None] * _rgb(_NONE)


def _pool(cells: np.ndarray, seen: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """Adds to each pixel the number of visible pairs in it; rows, columns: pixel of each token, ascending."""
    if not seen.size:
        return
    row_edges, column_edges = (np.flatnonzero(np.diff(part, prepend=-1)) for part in (rows, columns))
    sums = np.add.reduceat(seen, row_edges, axis=0, dtype=np.int32)
    sums = np.add.reduceat(sums, column_edges, axis=1)
    cells[np.ix_(rows[row_edges], columns[column_edges])] += sums


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _draw_row(axis: "Axes", layout: RowLayout) -> None:
    axis.imshow(row_image(layout, PIXELS), extent=(0, layout.used, layout.used, 0), interpolation="nearest")
    ends = np.cumsum([*layout.clean_lens, *(layout.n_blocks * layout.block_size)])
    middles = ends - np.diff(ends, prepend=0) / 2
    for line in (axis.axhline, axis.axvline):
        for end in ends[:-1].tolist():
            strong = end == layout.n_clean
            line(end, color=_INK if strong else "white", linewidth=0.9 if strong else 0.7)
    labels: list[tuple[float, str]] = []
    for i, middle in enumerate(middles.tolist()):
        if not labels or middle - labels[-1][0] > 0.05 * layout.used:  # omit labels that would overlap
            number = layout.doc_ids[i % layout.n_docs]
            labels.append((middle, f"{'clean' if i < layout.n_docs else 'blocks'}\n{number}"))
    axis.set_yticks([place for place, _ in labels], [name for _, name in labels])
    axis.set_xticks([place for place, _ in labels], [name for _, name in labels], rotation=90)
    axis.xaxis.set_label_position("top")
    axis.set_xlabel("keys", color=_INK, fontsize=9)
    axis.set_ylabel("queries", color=_INK, fontsize=9)
    axis.xaxis.tick_top()
    axis.tick_params(labelsize=7.5, colors=_SOFT, length=0)
    axis.spines[:].set_color(_SOFT)


def _draw_excerpt(axis: "Axes", excerpt: MaskExcerpt, block_size: int, texts: Sequence[str], document: int) -> None:
    from matplotlib.colors import ListedColormap

    axis.pcolormesh(
        excerpt.kinds, cmap=ListedColormap([_NONE, *COLORS]), vmin=0, vmax=3, edgecolors="white", linewidth=0.8
    )
    axis.invert_yaxis()
    axis.set_aspect("equal")
    for line in (axis.axhline, axis.axvline):
        line(excerpt.high - excerpt.low, color=_INK, linewidth=0.9)
    names = [f"{_short(_latin(texts[place]))}  {place}" for place in range(excerpt.low, excerpt.high)]
    for start in excerpt.starts.tolist():
        names += [f"block at {start}, slot {j}" if not j else f"slot {j}" for j in range(block_size)]
    places = np.arange(len(names)) + 0.5
    axis.set_yticks(places, names, parse_math=False)
    axis.set_xticks(places, names, rotation=90, parse_math=False)
    axis.xaxis.tick_top()
    axis.tick_params(labelsize=7, colors=_INK, length=0)
    axis.set_xlabel(f"excerpt of document {document + 1} of the row", color=_INK, fontsize=9)
    axis.spines[:].set_visible(False)


def _short(text: str) -> str:
    """A token as one short word."""
    shown = text.strip(" ").replace("\n", "⏎").replace("\t", "⇥")
    return shown if len(shown) <= 12 else shown[:11] + "…"


def _latin(text: str) -> str:
    """Replaces characters that matplotlib's default font lacks."""
    return "".join(c if c == "\n" or (c.isprintable() and ord(c) < 0x250) else "?" for c in text)
