"""Rules of a packed row, each checked from the row's tokens and layout alone (docs/method.md)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, block_count, draw_many
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import regular_file

Violation = tuple[str, int | None, str]
"""(rule, document number, description)"""


@dataclass(frozen=True)
class RuleSettings:
    """Fields of the manifest that the rules depend on."""

    row_length: int
    max_document_length: int
    block_size: int
    target_shift: bool
    repeat: int
    seed: int
    mask: int
    eos: int
    pad: int
    vocab_size: int
    im_start: int  # the token that begins a turn, in any chat format
    document: list[int]  # ids before the first turn of a document
    newline: list[int]
    header: int  # number of tokens of an assistant turn's header
    header_end: int  # the token that ends a header of varying length; -1: none
    assistant: list[int]  # ids of the header between `<|im_start|>` and the newline, which may merge with the text
    trim: float  # largest share of its blocks that a document may have lost to fill a row
    cut_turns: bool  # whether a document may end inside a turn (overlong: reference)
    untrained: np.ndarray  # int64, ascending: keys (`turn_keys`) of the answers that are not trained

    @classmethod
    def of(cls, manifest: dict[str, Any], folder: str | Path) -> "RuleSettings":
        """The settings of the dataset in `folder`; raises DataError if `sdlm prepare` did not write its manifest."""
        size = ("row_length", "max_document_length", "block_size", "target_shift", "repeat")
        keys = (*size, "seed", "vocab_size", "trim")
        fix = "use a dataset built with `sdlm prepare`, whose manifest describes its documents"
        try:
            chat = manifest["chat"]
            document = chat.get("document", [])  # datasets of earlier versions are ChatML
            numbers = [chat["im_start"], chat["header"]["assistant"], *chat["newline"], *chat["assistant"], *document]
            numbers.append(chat.get("header_end", 0))
            if not all(type(n) is int and 0 <= n < 2**31 for n in numbers) or not 0 <= manifest["trim"] <= 1:
                raise TypeError("chat or trim has a value of a wrong type or size")
            return cls(
                **{key: manifest[key] for key in keys},
                mask=manifest["mask_token_id"],
                eos=manifest["eos_token_id"],
                pad=manifest["pad_token_id"],
                im_start=chat["im_start"],
                document=document,
                newline=chat["newline"],
                header=chat["header"]["assistant"],
                header_end=chat.get("header_end", -1),
                assistant=chat["assistant"][: len(chat["assistant"]) - len(chat["newline"])],
                cut_turns=manifest["overlong"] == "reference",
                untrained=_read_untrained(manifest, Path(folder)),
            )
        except KeyError as error:
            raise DataError(f"the manifest lacks {error}", str(Path(folder) / "manifest.json"), fix) from None
        except (TypeError, AttributeError) as error:
            where = f"{Path(folder) / 'manifest.json'}, field chat or trim"
            raise DataError(f"the manifest cannot be used: {error}", where, fix) from None


UNTRAINED_FILE = "untrained.bin"
"""File of a dataset with answers that are not trained: int64 keys (`turn_keys`), ascending. Absent if there are none.
Tokens alone do not show that a flag of the row excluded an answer."""


def turn_keys(documents: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64 keys of turns: the document's number and the index of the turn's first token in the document."""
    return documents.astype(np.int64) << 32 | starts.astype(np.int64)


def _read_untrained(manifest: dict[str, Any], folder: Path) -> np.ndarray:
    if UNTRAINED_FILE not in manifest["files"]:
        return np.empty(0, np.int64)
    file = regular_file(folder, UNTRAINED_FILE, DataError)
    size = file.stat().st_size
    return np.memmap(file, np.int64, "r") if size and size % 8 == 0 else np.empty(0, np.int64)


@dataclass(frozen=True)
class ParsedRow:
    """A row with the turns and anchors derived from its tokens."""

    tokens: np.ndarray
    layout: RowLayout
    epoch: int
    clean: np.ndarray  # int32 (n_clean,)
    first: np.ndarray  # int64 (n_docs,): index of each document's first token
    turn_starts: np.ndarray  # int64 (turns,): index of each turn's `<|im_start|>`
    turn_docs: np.ndarray  # int64 (turns,): index in the row of each turn's document
    closings: np.ndarray  # int64 (turns,): index of each turn's `<|im_end|>`, or of its last token if it has none
    closed: np.ndarray  # bool (turns,): whether the turn has an `<|im_end|>`
    anchors: np.ndarray  # int32 (anchors,): anchors of all documents, relative to their document's first token
    n_anchors: np.ndarray  # int64 (n_docs,): number of anchors of each document


def read_row(tokens: np.ndarray, layout: RowLayout, settings: RuleSettings, epoch: int) -> ParsedRow:
    """Derives the turns and anchors of a row from its clean tokens."""
    clean = tokens[: layout.n_clean]
    first = layout.clean_offsets().astype(np.int64)
    ends = first + layout.clean_lens
    starts = np.flatnonzero(clean == settings.im_start)
    docs = np.searchsorted(first, starts, side="right") - 1
    # A turn extends to the next one of its document or to the document's end.
    reach = np.minimum(np.append(starts[1:], layout.n_clean), ends[docs]) if len(starts) else starts
    eos = np.append(np.flatnonzero(clean == settings.eos), layout.n_clean)
    closing = eos[np.searchsorted(eos, starts)]
    closed = closing < reach
    closing = np.where(closed, closing, reach - 1)
    # An assistant turn is recognized by the ids of its header, without decoding.
    name = np.ones(len(starts), dtype=bool)
    for offset, token in enumerate(settings.assistant, 1):
        name &= clean.take(starts + offset, mode="clip") == token
    if len(settings.untrained):
        keys = turn_keys(layout.doc_ids[docs], starts - first[docs])
        name &= settings.untrained.take(np.searchsorted(settings.untrained, keys), mode="clip") != keys
    header = starts + settings.header
    if settings.header_end >= 0:
        marks = np.append(np.flatnonzero(clean == settings.header_end), layout.n_clean)
        header = marks[np.searchsorted(marks, starts)] + 1
    begin = np.minimum(header, closing) - 1
    count = np.where(name, np.maximum(closing - begin, 0), 0)
    anchors = np.arange(count.sum()) + np.repeat(begin - first[docs] - (np.cumsum(count) - count), count)
    n_anchors = np.bincount(docs, weights=count, minlength=layout.n_docs).astype(np.int64)
    return ParsedRow(
        tokens, layout, epoch, clean, first, starts, docs, closing, closed, anchors.astype(np.int32), n_anchors
    )


def check_row(tokens: np.ndarray, layout: RowLayout, settings: RuleSettings, epoch: int) -> Iterator[Violation]:
    """All violations of one row."""
    if not layout.n_docs:
        yield "documents", None, "the row has no documents"
        return
    # The other rules assume documents with tokens and blocks.
    if (layout.clean_lens < 1).any() or (layout.n_blocks < 1).any():
        for i in np.flatnonzero((layout.clean_lens < 1) | (layout.n_blocks < 1)).tolist():
            yield "documents", _number(layout, i), f"{layout.clean_lens[i]} clean tokens, {layout.n_blocks[i]} blocks"
        return
    row = read_row(tokens, layout, settings, epoch)
    for rule in _CHECKS:
        yield from rule(row, settings)


def _number(layout: RowLayout, i: int) -> int:
    return int(layout.doc_ids[i])


def _lengths(row: ParsedRow, settings: RuleSettings) -> Iterator[Violation]:
    layout = row.layout
    if layout.used > settings.row_length:
        yield "lengths", None, f"{layout.used:,} tokens exceed the row length {settings.row_length:,}"
    lengths = layout.clean_lens + layout.n_blocks * settings.block_size
    for i in np.flatnonzero(lengths > settings.max_document_length).tolist():
        yield "lengths", _number(layout, i), f"{lengths[i]:,} tokens, the limit is {settings.max_document_length:,}"


def _vocabulary(row: ParsedRow, settings: RuleSettings) -> Iterator[Violation]:
    outside = (row.tokens < 0) | (row.tokens >= settings.vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        yield "vocabulary", None, f"token {at} is {row.tokens[at]}, the largest id is {settings.vocab_size - 1}"
    for token, name in ((settings.mask, "mask"), (settings.pad, "padding")):
        if token in (settings.eos, settings.im_start, *settings.document):  # some base models pad with such a token
            continue
        for at in np.flatnonzero(row.clean == token).tolist():
            i = int(np.searchsorted(row.first, at, side="right")) - 1
            yield "vocabulary", _number(row.layout, i), f"clean token {at - row.first[i]} is the {name} token"


def _turns(row: ParsedRow, settings: RuleSettings) -> Iterator[Violation]:
    layout = row.layout
    begins = np.ones(layout.n_docs, dtype=bool)
    for offset, token in enumerate([*settings.document, settings.im_start]):
        begins &= row.clean.take(row.first + offset, mode="clip") == token
    for i in np.flatnonzero(~begins).tolist():
        yield "turns", _number(layout, i), "the document does not begin with a turn (ChatML: <|im_start|>)"
    last = np.append(np.diff(row.turn_docs) > 0, True) if len(row.turn_docs) else np.empty(0, bool)
    open_turns = ~row.closed & ~(last & settings.cut_turns)
    for t in np.flatnonzero(open_turns).tolist():
        i = row.turn_docs[t]
        yield "turns", _number(layout, i), f"the turn at {row.turn_starts[t] - row.first[i]} has no end token"
    ends = (row.first + layout.clean_lens)[row.turn_docs]
    after = np.where(last, ends, np.append(row.turn_starts[1:], 0)) if len(ends) else ends
    gap = after - row.closings - 1
    wrong = row.closed & (gap != len(settings.newline)) & ~(last & settings.cut_turns)
    for offset, token in enumerate(settings.newline, 1):
        there = row.closings + offset < ends
        wrong |= row.closed & there & (row.clean.take(row.closings + offset, mode="clip") != token)
    for t in np.flatnonzero(wrong).tolist():
        i = row.turn_docs[t]
        yield (
            "turns",
            _number(layout, i),
            f"the end token at {row.closings[t] - row.first[i]} is not followed by a newline or the next turn",
        )
    if (row.clean == settings.eos).sum() != row.closed.sum():
        yield "turns", None, "the row has an end token outside of any turn"


def _count(row: ParsedRow, settings: RuleSettings) -> Iterator[Violation]:
    layout = row.layout
    for i, (length, n_anchors, n) in enumerate(
        zip(layout.clean_lens.tolist(), row.n_anchors.tolist(), layout.n_blocks.tolist(), strict=True)
    ):
        expected = block_count(length, n_anchors, settings.max_document_length, settings.block_size, settings.repeat)
        least = expected - int(expected * settings.trim)
        if settings.cut_turns:  # the count was computed from the anchors before the cut
            expected, least = min((settings.max_document_length - length) // settings.block_size, n_anchors), 1
        if not least <= n <= expected:
            yield "blocks", _number(layout, i), f"{n} blocks for {n_anchors} anchors; expected {expected}"


def _starts(row: ParsedRow, settings: RuleSettings) -> Iterator[Violation]:
    """Block starts must be anchors, ascend, and match the draw."""
    layout, documents = row.layout, row.layout.block_documents()
    falls = (np.diff(layout.starts) <= 0) & (np.diff(documents) == 0)
    for i in np.unique(documents[1:][falls]).tolist():
        yield "order", _number(layout, i), "the block starts do not ascend"
    legal = np.zeros(layout.n_clean, dtype=bool)
    legal[np.repeat(row.first, row.n_anchors) + row.anchors] = True
    anchors = layout.anchors
    inside = (anchors >= 0) & (anchors < layout.clean_lens[documents])
    wrong = ~(inside & legal.take(row.first[documents] + anchors, mode="clip"))
    illegal, at = np.unique(documents[wrong], return_index=True)
    for i, start in zip(illegal.tolist(), anchors[wrong][at].tolist(), strict=True):
        yield "anchors", _number(layout, i), f"a block starts at {start}, which is not an anchor"
    # A document with more blocks than anchors has no draw; the rule "blocks" reports it.
    drawable = layout.n_blocks <= row.n_anchors
    n_drawn, numbers = np.where(drawable, layout.n_blocks, 0), layout.doc_ids.astype(np.int64)
    drawn = row.anchors[draw_many(row.n_anchors, n_drawn, numbers, seed=settings.seed, epoch=row.epoch)]
    comparable = drawable[documents]
    for i in np.setdiff1d(documents[comparable][anchors[comparable] != drawn], illegal).tolist():
        yield "draw", _number(layout, i), "the block starts differ from the draw for (seed, epoch, document number)"


def check_targets(
    tokens: np.ndarray, layout: RowLayout, targets: np.ndarray, settings: RuleSettings
) -> Iterator[Violation]:
    """Compares targets, int32 (D, blocks), as training derives them with a token-by-token evaluation of the rule."""
    clean, anchors, first = tokens[: layout.n_clean].tolist(), layout.anchors.tolist(), layout.clean_offsets().tolist()
    for b, i in enumerate(layout.block_documents().tolist()):
        begin = first[i] + anchors[b] + 1
        ahead = clean[begin : min(begin + settings.block_size, first[i] + int(layout.clean_lens[i]))]
        if settings.eos in ahead:
            ahead = ahead[: ahead.index(settings.eos) + 1]
        expected = ahead + [IGNORE] * (settings.block_size - len(ahead))
        if targets[:, b].tolist() != expected:
            actual = targets[:, b].tolist()
            yield "targets", _number(layout, i), f"the block at {anchors[b]} has targets {actual}, not {expected}"


def _slots(row: ParsedRow, settings: RuleSettings) -> Iterator[Violation]:
    layout = row.layout
    blocks = row.tokens[layout.n_clean :].reshape(-1, settings.block_size)
    documents = layout.block_documents()
    anchors = row.clean.take(row.first[documents] + layout.anchors, mode="clip")
    expected = anchors if layout.target_shift else np.full_like(anchors, settings.mask)
    for b in np.flatnonzero(blocks[:, 0] != expected).tolist():
        what = f"the block at {layout.starts[b]} begins with {blocks[b, 0]}, not {expected[b]}"
        yield "slots", _number(layout, documents[b]), what
    for b in np.flatnonzero((blocks[:, 1:] != settings.mask).any(axis=1)).tolist():
        yield (
            "slots",
            _number(layout, documents[b]),
            f"the block at {layout.starts[b]} has a token other than the mask token",
        )


_CHECKS: tuple[Callable[[ParsedRow, RuleSettings], Iterator[Violation]], ...] = (
    _lengths,
    _vocabulary,
    _turns,
    _count,
    _starts,
    _slots,
)

ROW_RULES = {
    "documents": "a row has documents, each with clean tokens and at least one block",
    "lengths": "no row exceeds row_length, no document max_document_length",
    "vocabulary": "ids are in the vocabulary; no clean token is the mask or padding token",
    "turns": "documents consist of whole turns (ChatML: <|im_start|> ... <|im_end|> newline)",
    "blocks": "the number of blocks of a document matches its length and anchors",
    "order": "block starts ascend strictly in a document",
    "anchors": "blocks start at anchors: from the end of an assistant header to before its end token",
    "draw": "block starts match the draw for (seed, epoch, document number)",
    "slots": "slot 0 repeats the anchor, the other slots are mask tokens",
    "targets": "in one row of 64: slot j's target is the token j + 1 after the start, up to an end token",
}
"""Rule -> description."""
