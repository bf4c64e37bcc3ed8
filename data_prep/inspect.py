"""Shows a row of a packed dataset as a person wants to see it: `python -m data_prep.inspect DATASET --row 3`.

Its documents, the turns coloured by role, with a mark at every token where a block starts; the blocks, what they hold
and what they are trained to produce; who sees whom.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from data_prep.mask_picture import in_letters, save_png, stretch_of
from data_prep.row_rules import Facts, Row, read_row
from data_prep.token_text import TokenText, open_text, show_ids
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.format import REBUILD, PackedDataset, origin, prefix
from sdlm_megatron.data.indexed import IndexedReader
from sdlm_megatron.data.tokenizer_identity import fingerprint, has_tokenizer
from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, slot_targets
from sdlm_megatron.errors import DataError, run_cli

DOCUMENTS, BLOCKS, EDGE, MIDDLE = 3, 6, 120, 320
"""What is shown of a row without --all: documents; of each its first blocks, as many of the first and last clean
tokens, and as many where the first block starts."""

MARK = "▸"
"""Stands before a token at which a block starts."""
MASK, PART, NONE = "▢", "◌", "–"
"""The mask token; a token that is but a part of a character; no target."""

ROLES = {"system": "magenta", "user": "cyan", "assistant": "green", "function": "yellow"}
FRAME, ANCHOR = "bright_black", "bold underline"

_UNSEEN = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""Characters that would steer the terminal, or turn the direction of its text."""
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys(_UNSEEN, 0xFFFD)


@dataclass(frozen=True)
class Document:
    """One document of a row, ready to be shown."""

    number: int
    index: int
    """Its place in the row, from 0."""
    texts: list[str]
    """Of each clean token."""
    turns: list[tuple[int, int, int]]
    """(first token, closing `<|im_end|>`, one after the last token) of each turn."""
    starts: np.ndarray
    """int32 (blocks,)."""
    targets: np.ndarray
    """bool (blocks, D): whether a slot has a target."""
    n_anchors: int


def view_documents(row: Row, facts: Facts, text_of: TokenText) -> list[Document]:
    """Takes a row apart."""
    layout, found = row.layout, []
    targets = slot_targets(row.tokens, layout, facts.eos).T != IGNORE
    block_edges = np.cumsum([0, *layout.n_blocks])
    for i in range(layout.n_docs):
        first, length = int(row.first[i]), int(layout.clean_lens[i])
        mine = np.flatnonzero(row.turn_docs == i)
        begins = (row.turn_starts[mine] - first).tolist()
        closings = (row.closings[mine] - first).tolist()
        found.append(
            Document(
                number=int(layout.doc_ids[i]),
                index=i,
                texts=text_of(row.clean[first : first + length].tolist()),
                turns=[(a, c, b) for (a, b), c in zip(pairwise([*begins, length]), closings, strict=True)],
                starts=layout.starts[block_edges[i] : block_edges[i + 1]],
                targets=targets[block_edges[i] : block_edges[i + 1]],
                n_anchors=int(row.n_anchors[i]),
            )
        )
    return found


def clean_text(document: Document, header: dict[str, int], *, whole: bool) -> Text:
    """The clean tokens, coloured by role, marked where blocks start.

    Args:
        document: what to show.
        header: role -> tokens of its header.
        whole: all tokens; otherwise the first and the last, and those where the blocks begin.
    """
    result, shown = Text(), _shown(document, whole)
    starts = set(document.starts.tolist())
    left_out = 0
    for begin, closing, end in document.turns:
        role = "".join(document.texts[begin + 1 : begin + 8]).split("\n")[0]
        inside = range(begin + header.get(role, 1), closing)
        for at in range(begin, end):
            left_out = 0 if shown[at] else left_out + 1
            if left_out:
                if shown[at + 1]:  # the last one always is
                    result.append(f" … {left_out:,} tokens left out (--all) … ", style="reverse")
                continue
            style = ROLES.get(role, "") if at in inside else FRAME
            if at in starts:
                result.append(MARK, style="bold red")
            result.append(_printable(document.texts[at]), style=f"{style} {ANCHOR}" if at in starts else style)
    return result


def _shown(document: Document, whole: bool) -> np.ndarray:
    """bool (clean tokens,)."""
    place = np.arange(len(document.texts))
    middle = int(document.starts[0]) - EDGE // 2 if len(document.starts) else 0
    near = (place >= middle) & (place < middle + MIDDLE)
    return whole | (place < EDGE) | near | (place >= len(place) - EDGE)


def block_lines(document: Document, block_size: int, *, whole: bool) -> Iterator[Text]:
    """A line for each block: where it starts, what its slots hold, and what each is trained to produce."""
    shown = len(document.starts) if whole else min(BLOCKS, len(document.starts))
    for start, has_target in zip(document.starts[:shown].tolist(), document.targets.tolist(), strict=False):
        line = Text(f"  block at {start:>5}  ")
        line.append(_word(document.texts[start]), style="bold")
        line.append(f" {MASK}" * (block_size - 1), style=FRAME)
        line.append("  →  ")
        for slot, there in enumerate(has_target):
            if slot:
                line.append(" | ", style=FRAME)
            word = _word(document.texts[start + 1 + slot]) if there else NONE
            line.append(word, style="green" if there else FRAME)
        yield line
    if shown < len(document.starts):
        yield Text(f"  … {len(document.starts) - shown:,} more blocks (--all shows them)", style=FRAME)


def _word(text: str) -> str:
    """A token whose white space can be seen."""
    return _printable(text).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or PART


def _printable(text: str) -> str:
    return text.translate(_PICTURES)


def find_document(dataset: PackedDataset, epoch: int, number: int) -> int:
    """The row of an epoch that holds document `number`; DataError when none does. Reads the layouts until then."""
    before = 0
    for part, rows in enumerate(dataset.part_rows(epoch)):
        file = prefix(dataset.path, epoch, part, "layout")
        try:
            layouts = IndexedReader(file)
        except ValueError as error:
            raise DataError(f"the layouts cannot be read: {error}", file, REBUILD) from None
        for row in range(rows):
            ints = layouts[row]  # checksum, number of documents, their numbers…
            if len(ints) > 2 and number in ints[2 : 2 + ints[1]]:
                return before + row
        before += rows
    raise DataError(
        f"epoch {epoch} has no document {number:,}",
        str(dataset.path),
        "rows that became no document are in rejects.jsonl; with a weight below 1 an epoch takes a share of a source",
    )


def _text_of(manifest: dict[str, Any], folder: str, console: Console) -> TokenText:
    """The tokenizer that is named, or the one the dataset was built with if it is still there."""
    folder = folder or manifest.get("build", {}).get("tokenizer", "")
    if not folder or not has_tokenizer(folder):
        at = f"{folder} is not there any more" if folder else "the manifest names no tokenizer"
        _print(console, Text(f"token ids are shown, not text: {at}; give --tokenizer=FOLDER"))
        return show_ids
    if fingerprint(folder) != manifest["tokenizer"]["fingerprint"]:
        _print(console, Text(f"{folder} is not the tokenizer of this dataset", style="red"))
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
        dataset: the dataset; epoch, number: the row.
        text_of: text of its tokens.
        console: where to print.
        document: number of the only document to show.
        whole: leave nothing out.
        save: PNG of the mask to write.

    Raises DataError when the row is damaged, or does not hold the document.
    """
    facts = Facts.of(dataset.manifest)
    tokens, layout = dataset.read(epoch, number)
    row = read_row(tokens, layout, facts, epoch)
    documents = view_documents(row, facts, text_of)
    _print(console, _head(dataset, epoch, number, layout, documents))
    shown = [d for d in documents if document in (None, d.number)]
    if not shown:
        held = ", ".join(str(d.number) for d in documents)
        raise DataError(f"the row holds no document {document}", f"row {number}", f"it holds {held}")
    limit = len(shown) if whole or document is not None else DOCUMENTS
    for view in shown[:limit]:
        _print(console, _document_head(view, layout, dataset.manifest))
        _print(console, clean_text(view, dataset.manifest["chat"]["header"], whole=whole))
        for line in block_lines(view, layout.block_size, whole=whole):
            _print(console, line)
    if limit < len(shown):
        rest = f"… {len(shown) - limit} more documents (--all shows them, --document NUMBER shows one)"
        _print(console, Text(f"\n{rest}", style=FRAME))
    pictured = next((view for view in shown if len(view.starts)), None)
    if pictured is None:
        return
    stretch = stretch_of(len(pictured.texts), pictured.starts, layout.block_size)
    _print(console, Text(f"\nwho sees whom, a stretch of document {pictured.number}", style="bold"))
    words = [_printable(text) for text in pictured.texts]
    _print(console, in_letters(stretch, layout.block_size, words))
    if save:
        title = f"{dataset.path.name}, epoch {epoch}, row {number}: who sees whom"
        save_png(save, layout, pictured.index, words, title)
        _print(console, Text(f"the mask of the row: {save}"))


def _head(dataset: PackedDataset, epoch: int, number: int, layout: RowLayout, documents: Sequence[Document]) -> Text:
    used, length = layout.used, dataset.row_length
    targets = sum(int(view.targets.sum()) for view in documents)
    head = Text(f"{dataset.path}, epoch {epoch}, row {number:,} of {dataset.rows(epoch):,}\n", style="bold")
    return head.append(
        f"{used:,} of {length:,} tokens ({used / length:.1%}): {_many(len(documents), 'document')}, "
        f"{layout.n_clean:,} clean tokens, {len(layout.starts):,} blocks of {layout.block_size}, {targets:,} targets",
        style="not bold",
    )


def _document_head(view: Document, layout: RowLayout, manifest: dict[str, Any]) -> Text:
    clean, blocks = len(view.texts), len(view.starts)
    head = Text(f"\ndocument {view.number} ({view.index + 1} of {layout.n_docs}), ", style="bold")
    head.append(origin(view.number, manifest))
    return head.append(
        f"\n{clean:,} clean + {layout.block_size} x {blocks:,} block tokens; a block starts ({MARK}) at "
        f"{blocks:,} of {view.n_anchors:,} anchors\n",
        style="not bold",
    )


def _many(n: int, what: str) -> str:
    return f"{n:,} {what}" + "s" * (n != 1)


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm inspect", __doc__, example="sdlm inspect DATA --row 3 --save mask.png")
    parser.add_argument("dataset", help="folder that `python -m data_prep.build` wrote")
    parser.add_argument("--row", type=int, metavar="N", help="row of the epoch, from 0 (default: 0)")
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="from 0 (default: %(default)s)")
    parser.add_argument("--document", type=int, metavar="NUMBER", help="show this document only; finds its row")
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="default: the one it was built with")
    parser.add_argument("--all", action="store_true", help="leave nothing out")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write a picture of the row's mask")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    console = Console()
    dataset = PackedDataset(args.dataset)
    if not 0 <= args.epoch < dataset.epochs:
        raise DataError(f"no epoch {args.epoch}", args.dataset, f"it has epochs 0 to {dataset.epochs - 1}")
    row = args.row or 0
    if args.row is None and args.document is not None:
        row = find_document(dataset, args.epoch, args.document)
    if not 0 <= row < dataset.rows(args.epoch):
        raise DataError(
            f"no row {row}", args.dataset, f"epoch {args.epoch} has rows 0 to {dataset.rows(args.epoch) - 1}"
        )
    text_of = _text_of(dataset.manifest, args.tokenizer, console)
    options: dict[str, Any] = {"document": args.document, "whole": args.all, "save": args.save}
    show(dataset, args.epoch, row, text_of, console, **options)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
