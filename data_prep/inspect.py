"""Show a row of a packed dataset.

Prints its documents with turns colored by role and a mark at every block start; the content and targets of the blocks;
and the attention mask of an excerpt.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer, decoders, models

from data_prep.encoders import TextTokenizer
from data_prep.row_rules import ParsedRow, RuleSettings, read_row
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.chatml import LLAMA3
from sdlm_megatron.data.format import REBUILD, PackedDataset, origin, prefix
from sdlm_megatron.data.indexed import IndexedReader
from sdlm_megatron.data.tokenizer_identity import (
    added_tokens,
    has_tokenizer,
    parse_sentencepiece,
    same_tokenizer,
    sentencepiece_file,
)
from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, slot_targets
from sdlm_megatron.diffusion.mask import visible
from sdlm_megatron.errors import DataError, make_console, neutral, run_cli
from sdlm_megatron.files import make_folder

# Shown without --all: documents per row; per document its first blocks, this many clean tokens at both ends, and this
# many around the first block start.
DOCUMENTS, BLOCKS, EDGE, MIDDLE = 3, 6, 120, 320

MARK = "▸"
"""Precedes a token at which a block starts."""
MASK, PART, NONE = "▢", "◌", "–"
"""The mask token; a token that is only a part of a character; no target."""

ROLES = {"system": "magenta", "user": "cyan", "assistant": "green", "function": "yellow"}
FRAME, ANCHOR = "bright_black", "bold underline"

EXCERPT, EXCERPT_BLOCKS = 32, 3
"""Maximum number of clean tokens and of blocks in an excerpt of the mask."""
PICTURE = 6144
"""Maximum number of tokens in the image of a row; drawing it needs about 20 bytes per pair of tokens."""
KINDS = ("clean sees clean, up to itself", "block sees clean, before its start", "block sees its own tokens")
_LETTERS, _STYLES = "·█░▓", ("dim", "#3b6fb6", "#9cc3e6", "#e2803a")  # not visible, and KINDS in the colors of reports

TokenText = Callable[[Sequence[int]], list[str]]
"""Ids -> one string per id; concatenated they are the text. Of the tokens of one character, all but the last yield an
empty string."""


def open_text(folder: str | Path) -> TokenText:
    """Decoder of a tokenizer, which is a folder or a SentencePiece `.model` file; an unknown id yields `<id 7>`. Raises
    DataError if the tokenizer is missing or cannot be read."""
    try:
        if model := sentencepiece_file(folder):
            pieces = parse_sentencepiece(model.read_bytes()).pieces
            vocabulary = {**{piece.piece: i for i, piece in enumerate(pieces)}, **added_tokens(folder)}
            backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        else:
            backend = Tokenizer.from_str(TextTokenizer.from_folder(folder).definition)
    except ValueError as error:
        raise DataError(f"the tokenizer cannot be read: {error}", str(folder), "set another --tokenizer") from error
    return lambda ids: _texts(backend, ids)


def _texts(backend: Tokenizer, ids: Sequence[int]) -> list[str]:
    texts, stream, open_since = [], decoders.DecodeStream(skip_special_tokens=False), 0
    # The stream returns nothing until the last token of a character has arrived.
    for n, i in enumerate(map(int, ids)):
        known = i >= 0 and backend.id_to_token(i) is not None
        text = stream.step(backend, i) if known else f"<id {i}>"
        texts.append(text or "")
        if text or not known:
            open_since = n + 1
        if not known:
            stream = decoders.DecodeStream(skip_special_tokens=False)
    if open_since < len(texts):  # the last character is incomplete
        texts[-1] = backend.decode([int(i) for i in ids[open_since:]], skip_special_tokens=False)
    return texts


@dataclass(frozen=True)
class DocumentView:
    """One document of a row, prepared for display."""

    number: int
    index: int  # index in the row
    texts: list[str]  # text of each clean token
    turns: list[tuple[int, int, int]]  # (first token, closing `<|im_end|>`, index after the last token) of each turn
    starts: np.ndarray  # int32 (blocks,): block starts
    targets: np.ndarray  # bool (blocks, D): whether a slot has a target
    n_anchors: int


def view_documents(row: ParsedRow, settings: RuleSettings, text_of: TokenText) -> list[DocumentView]:
    """The documents of a row."""
    layout, views = row.layout, []
    targets = slot_targets(row.tokens, layout, settings.eos).T != IGNORE
    block_edges = np.cumsum([0, *layout.n_blocks])
    for i in range(layout.n_docs):
        first, length = int(row.first[i]), int(layout.clean_lens[i])
        turns = np.flatnonzero(row.turn_docs == i)
        begins = (row.turn_starts[turns] - first).tolist()
        closings = (row.closings[turns] - first).tolist()
        views.append(
            DocumentView(
                number=int(layout.doc_ids[i]),
                index=i,
                texts=text_of(row.clean[first : first + length].tolist()),
                turns=[(a, c, b) for (a, b), c in zip(pairwise([*begins, length]), closings, strict=True)],
                starts=layout.starts[block_edges[i] : block_edges[i + 1]],
                targets=targets[block_edges[i] : block_edges[i + 1]],
                n_anchors=int(row.n_anchors[i]),
            )
        )
    return views


def clean_text(document: DocumentView, header: dict[str, int], *, whole: bool) -> Text:
    """The clean tokens, colored by role, with a mark at each block start.

    `header` is role -> number of tokens of its header; without `whole`, tokens far from both ends and from the first
    block start are omitted.
    """
    result, shown = Text(), _shown(document, whole)
    starts = set(document.starts.tolist())
    skipped = 0
    for n, (begin, closing, end) in enumerate(document.turns):
        role = "".join(document.texts[begin + 1 : begin + 8]).split("\n")[0].removesuffix(LLAMA3.role_end)
        inside = range(begin + header.get(role, 1), closing)
        for at in range(begin if n else 0, end):  # with the tokens before the first turn
            skipped = 0 if shown[at] else skipped + 1
            if skipped:
                if shown[at + 1]:  # the last token is always shown
                    result.append(f" … {skipped:,} tokens omitted (--all) … ", style="reverse")
                continue
            style = ROLES.get(role, "") if at in inside else FRAME
            if at in starts:
                result.append(MARK, style="bold red")
            result.append(neutral(document.texts[at]), style=f"{style} {ANCHOR}" if at in starts else style)
    return result


def _shown(document: DocumentView, whole: bool) -> np.ndarray:
    """bool (clean tokens,)."""
    place = np.arange(len(document.texts))
    middle = int(document.starts[0]) - EDGE // 2 if len(document.starts) else 0
    near = (place >= middle) & (place < middle + MIDDLE)
    return whole | (place < EDGE) | near | (place >= len(place) - EDGE)


def block_lines(document: DocumentView, layout: RowLayout, *, whole: bool) -> Iterator[Text]:
    """One line per block: its start, the content of its slots, and their targets."""
    shown = len(document.starts) if whole else min(BLOCKS, len(document.starts))
    for start, has_target in zip(document.starts[:shown].tolist(), document.targets.tolist(), strict=False):
        line = Text(f"  block at {start:>5}  ")
        line.append(_word(document.texts[start]) if layout.target_shift else MASK, style="bold")
        line.append(f" {MASK}" * (layout.block_size - 1), style=FRAME)
        line.append("  →  ")
        for slot, trained in enumerate(has_target):
            if slot:
                line.append(" | ", style=FRAME)
            word = _word(document.texts[start + slot + layout.target_shift]) if trained else NONE
            line.append(word, style="green" if trained else FRAME)
        yield line
    if shown < len(document.starts):
        yield Text(f"  … {len(document.starts) - shown:,} more blocks (--all shows them)", style=FRAME)


def _word(text: str) -> str:
    """A token with visible white space."""
    return neutral(text).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or PART


@dataclass(frozen=True)
class MaskExcerpt:
    """A few neighboring blocks of a document with the clean tokens around them."""

    low: int  # first clean token
    high: int  # index after the last clean token
    starts: np.ndarray  # int (blocks,): block starts
    kinds: np.ndarray
    """int8 (queries, keys) over clean tokens low..high-1, then block tokens. 0: not visible, k + 1: KINDS[k]."""


def excerpt_of(clean_len: int, starts: np.ndarray, block_size: int) -> MaskExcerpt:
    """The neighboring blocks of a document that are closest to each other; `starts`, int (blocks,), must ascend."""
    # Blocks that are far apart would need an excerpt too wide for a terminal.
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
    """An excerpt as text, one line per query; `texts` are those of the document's clean tokens."""
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


def _short(text: str) -> str:
    """A token as one short word."""
    shown = text.strip(" ").replace("\n", "⏎").replace("\t", "⇥")
    return shown if len(shown) <= 12 else shown[:11] + "…"


def find_document(dataset: PackedDataset, epoch: int, number: int) -> int:
    """The row of an epoch that contains document `number`; raises DataError if there is none. Scans the layouts."""
    before = 0
    for part, rows in enumerate(dataset.part_rows(epoch)):
        file = prefix(dataset.path, epoch, part, "layout")
        try:
            layouts = IndexedReader(file)
        except ValueError as error:
            raise DataError(f"the layouts cannot be read: {error}", file, REBUILD) from None
        for row in range(rows):
            ints = layouts[row]  # checksum, number of documents, document numbers, …
            if len(ints) > 2 and number in ints[2 : 2 + ints[1]]:
                return before + row
        before += rows
    raise DataError(
        f"epoch {epoch} has no document {number:,}",
        str(dataset.path),
        "see rejects.jsonl for rows without a document; with a weight below 1 an epoch uses a part of a source",
    )


def _text_of(manifest: dict[str, Any], folder: str, console: Console) -> TokenText:
    """Decoder of the given tokenizer, or of the one the dataset was built with if it still exists."""
    if folder and not has_tokenizer(folder):
        raise DataError("there is no tokenizer", folder, "name a folder with one, or leave out --tokenizer")
    folder = folder or manifest.get("build", {}).get("tokenizer", "")
    if not folder or not has_tokenizer(folder):
        reason = f"there is no tokenizer in {folder}" if folder else "the manifest names no tokenizer"
        _print(console, Text(neutral(f"showing token ids instead of text: {reason}; set --tokenizer=FOLDER")))
        return lambda ids: [f"{int(i)} " for i in ids]
    if same_tokenizer(folder, manifest) is False:
        _print(console, Text(f"{neutral(folder)} is not the tokenizer of this dataset", style="red"))
    return open_text(folder)


def show(
    dataset: PackedDataset,
    epoch: int,
    number: int,
    text_of: TokenText,
    console: Console,
    *,
    document: int | None = None,
    whole: bool = False,
    save: Path | None = None,
) -> None:
    """Prints one row.

    Args:
        number: number of the row in the epoch's files.
        document: show only the document with this number.
        whole: omit nothing.
        save: PNG file of the mask to write; a second one, with -blocks in its name, shows a few blocks enlarged.

    Raises:
        DataError: the row is damaged or does not contain the document.
    """
    settings = RuleSettings.of(dataset.manifest, dataset.path)
    tokens, layout = dataset.read(epoch, number)
    row = read_row(tokens, layout, settings, epoch)
    documents = view_documents(row, settings, text_of)
    _print(console, _head(dataset, epoch, number, layout, documents))
    shown = [d for d in documents if document in (None, d.number)]
    if not shown:
        numbers = ", ".join(str(d.number) for d in documents)
        raise DataError(f"the row has no document {document}", f"row {number}", f"its documents are {numbers}")
    limit = len(shown) if whole or document is not None else DOCUMENTS
    for view in shown[:limit]:
        _print(console, _document_head(view, layout, dataset.manifest))
        _print(console, clean_text(view, dataset.manifest["chat"]["header"], whole=whole))
        for line in block_lines(view, layout, whole=whole):
            _print(console, line)
    if limit < len(shown):
        rest = f"… {len(shown) - limit} more documents (--all shows them, --document NUMBER shows one)"
        _print(console, Text(f"\n{rest}", style=FRAME))
    pictured = next((view for view in shown if len(view.starts)), None)
    if pictured is None:
        return
    excerpt = excerpt_of(len(pictured.texts), pictured.starts, layout.block_size)
    _print(console, Text(f"\nattention mask, excerpt of document {pictured.number}", style="bold"))
    words = [neutral(text) for text in pictured.texts]
    _print(console, excerpt_text(excerpt, layout.block_size, words))
    if save:
        # not at the top: importing matplotlib takes a second
        from sdlm_megatron.report.row_plots import crop_layout, mask_figure, zoom_figure

        picture, blocks = crop_layout(layout, PICTURE), save.with_stem(f"{save.stem}-blocks")
        mask_figure(picture, picture.used).savefig(save, dpi=200)
        zoom_figure(layout, pictured.index).savefig(blocks, dpi=200)
        _print(console, Text(neutral(f"wrote the mask of the row to {save}, some of its blocks enlarged to {blocks}")))


def _head(
    dataset: PackedDataset, epoch: int, number: int, layout: RowLayout, documents: Sequence[DocumentView]
) -> Text:
    used, length, n = layout.used, dataset.row_length, len(documents)
    targets = sum(int(view.targets.sum()) for view in documents)
    place = neutral(f"{dataset.path}, epoch {epoch}, row {number:,} of {dataset.rows(epoch):,}\n")
    head = Text(place, style="bold")
    return head.append(
        f"{used:,} of {length:,} tokens ({used / length:.1%}): {n:,} document{'s' * (n != 1)}, "
        f"{layout.n_clean:,} clean tokens, {len(layout.starts):,} blocks of {layout.block_size}, {targets:,} targets",
        style="not bold",
    )


def _document_head(view: DocumentView, layout: RowLayout, manifest: dict[str, Any]) -> Text:
    clean, blocks = len(view.texts), len(view.starts)
    head = Text(f"\ndocument {view.number} ({view.index + 1} of {layout.n_docs}), ", style="bold")
    head.append(neutral(origin(view.number, manifest)))
    return head.append(
        f"\n{clean:,} clean + {layout.block_size} x {blocks:,} block tokens; blocks start ({MARK}) "
        f"{'at' if layout.target_shift else 'behind'} {blocks:,} of {view.n_anchors:,} anchors\n",
        style="not bold",
    )


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm inspect", __doc__, example="sdlm inspect DATA --row 3 --save mask.png")
    parser.add_argument("dataset", metavar="DATA", help="dataset folder, written by `sdlm prepare`")
    parser.add_argument("--row", type=int, metavar="N", help="row of the epoch, from 0 (default: 0)")
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="epoch, from 0")
    parser.add_argument("--document", type=int, metavar="NUMBER", help="show only this document; finds its row")
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="default: the tokenizer of the build")
    parser.add_argument("--all", action="store_true", help="omit nothing")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write images of the row's attention mask")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    console = make_console()
    if args.save is not None:
        if args.save.suffix not in (".png", ".pdf", ".svg"):
            raise DataError(f"--save is {args.save}", "the command line", "name a file that ends in .png")
        make_folder(args.save.parent)
    dataset = PackedDataset(args.dataset)
    if not 0 <= args.epoch < dataset.epochs:
        raise DataError(f"no epoch {args.epoch}", args.dataset, f"use 0 to {dataset.epochs - 1}")
    row = args.row or 0
    if args.row is None and args.document is not None:
        row = find_document(dataset, args.epoch, args.document)
    if not 0 <= row < dataset.rows(args.epoch):
        fix = f"epoch {args.epoch} has rows 0 to {dataset.rows(args.epoch) - 1}"
        raise DataError(f"no row {row}", args.dataset, fix)
    text_of = _text_of(dataset.manifest, args.tokenizer, console)
    show(dataset, args.epoch, row, text_of, console, document=args.document, whole=args.all, save=args.save)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
