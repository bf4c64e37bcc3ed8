"""The rules that a packed row has to follow, each checked from the row's tokens and layout (docs/method.md)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, block_count, draw_many
from sdlm_megatron.errors import DataError

Broken = tuple[str, int | None, str]
"""(rule, document number, what is wrong)"""


@dataclass(frozen=True)
class Facts:
    """What the manifest says that the rules need."""

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
    im_start: int
    newline: list[int]
    header: int
    """Tokens of an assistant turn's header."""
    assistant: list[int]
    """Ids with which the header goes on after `<|im_start|>`, the newline left out: it may merge with the text."""
    trim: float
    """Share of its blocks that a document may have lost to fill a row."""
    cut_turns: bool
    """A document may end inside a turn: the reference's cuts."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Facts":
        """The facts of a manifest; DataError when it is not one of `data_prep.build`."""
        size = ("row_length", "max_document_length", "block_size", "target_shift", "repeat")
        keys = (*size, "seed", "vocab_size", "trim")
        try:
            chat = manifest["chat"]
            return cls(
                **{key: manifest[key] for key in keys},
                mask=manifest["mask_token_id"],
                eos=manifest["eos_token_id"],
                pad=manifest["pad_token_id"],
                im_start=chat["im_start"],
                newline=chat["newline"],
                header=chat["header"]["assistant"],
                assistant=chat["assistant"][: len(chat["assistant"]) - len(chat["newline"])],
                cut_turns=manifest["overlong"] == "reference",
            )
        except KeyError as error:
            fix = "only datasets of `python -m data_prep.build` say how their documents were made"
            raise DataError(f"the manifest lacks {error}", "manifest.json", fix) from None


@dataclass(frozen=True)
class Row:
    """A row with what follows from its tokens."""

    tokens: np.ndarray
    layout: RowLayout
    epoch: int
    clean: np.ndarray
    """int32 (n_clean,)."""
    first: np.ndarray
    """int64 (n_docs,): where each document begins."""
    turn_starts: np.ndarray
    """int64 (turns,): where the turns begin."""
    turn_docs: np.ndarray
    """int64 (turns,): documents of the turns, by their place in the row."""
    closings: np.ndarray
    """int64 (turns,): where each turn's `<|im_end|>` is; where its document or turn ends if it has none."""
    closed: np.ndarray
    """bool (turns,)."""
    anchors: np.ndarray
    """int32 (anchors,): legal block starts of all documents, each counted from its document's begin."""
    n_anchors: np.ndarray
    """int64 (n_docs,)."""


def read_row(tokens: np.ndarray, layout: RowLayout, facts: Facts, epoch: int) -> Row:
    """Finds the turns and legal block starts of a row from its clean tokens."""
    clean = tokens[: layout.n_clean]
    first = layout.clean_offsets().astype(np.int64)
    ends = first + layout.clean_lens
    starts = np.flatnonzero(clean == facts.im_start)
    docs = np.searchsorted(first, starts, side="right") - 1
    # a turn reaches to the next one of its document, or to the document's end
    reach = np.minimum(np.append(starts[1:], layout.n_clean), ends[docs]) if len(starts) else starts
    eos = np.append(np.flatnonzero(clean == facts.eos), layout.n_clean)
    closing = eos[np.searchsorted(eos, starts)]
    closed = closing < reach
    closing = np.where(closed, closing, reach - 1)
    name = np.ones(len(starts), dtype=bool)
    for offset, token in enumerate(facts.assistant, 1):
        name &= clean.take(starts + offset, mode="clip") == token
    begin = np.minimum(starts + facts.header, closing) - 1
    count = np.where(name, np.maximum(closing - begin, 0), 0)
    anchors = np.arange(count.sum()) + np.repeat(begin - first[docs] - (np.cumsum(count) - count), count)
    n_anchors = np.bincount(docs, weights=count, minlength=layout.n_docs).astype(np.int64)
    return Row(tokens, layout, epoch, clean, first, starts, docs, closing, closed, anchors.astype(np.int32), n_anchors)


def check_row(tokens: np.ndarray, layout: RowLayout, facts: Facts, epoch: int) -> Iterator[Broken]:
    """Every broken rule of one row: (rule, document number or None, what is wrong)."""
    if not layout.n_docs:
        yield "documents", None, "the row holds no document"
        return
    if (layout.clean_lens < 1).any() or (layout.n_blocks < 1).any():
        for i in np.flatnonzero((layout.clean_lens < 1) | (layout.n_blocks < 1)).tolist():
            yield "documents", _number(layout, i), f"{layout.clean_lens[i]} clean tokens, {layout.n_blocks[i]} blocks"
        return
    row = read_row(tokens, layout, facts, epoch)
    for rule in _CHECKS:
        yield from rule(row, facts)


def _number(layout: RowLayout, i: int) -> int:
    return int(layout.doc_ids[i])


def _lengths(row: Row, facts: Facts) -> Iterator[Broken]:
    layout = row.layout
    if layout.used > facts.row_length:
        yield "lengths", None, f"{layout.used:,} tokens in a row of {facts.row_length:,}"
    lengths = layout.clean_lens + layout.n_blocks * facts.block_size
    for i in np.flatnonzero(lengths > facts.max_document_length).tolist():
        yield "lengths", _number(layout, i), f"{lengths[i]:,} tokens, the limit is {facts.max_document_length:,}"


def _vocabulary(row: Row, facts: Facts) -> Iterator[Broken]:
    outside = (row.tokens < 0) | (row.tokens >= facts.vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        yield "vocabulary", None, f"token {at} is {row.tokens[at]}, ids go to {facts.vocab_size - 1}"
    for token, name in ((facts.mask, "mask"), (facts.pad, "padding")):
        if token in (facts.eos, facts.im_start):  # a base may pad with a token of the chat
            continue
        for at in np.flatnonzero(row.clean == token).tolist():
            i = int(np.searchsorted(row.first, at, side="right")) - 1
            yield "vocabulary", _number(row.layout, i), f"clean token {at - row.first[i]} is the {name} token"


def _turns(row: Row, facts: Facts) -> Iterator[Broken]:
    layout = row.layout
    for i in np.flatnonzero(row.clean[row.first] != facts.im_start).tolist():
        yield "turns", _number(layout, i), "it does not begin with <|im_start|>"
    last = np.append(np.diff(row.turn_docs) > 0, True) if len(row.turn_docs) else np.empty(0, bool)
    open_turns = ~row.closed & ~(last & facts.cut_turns)
    for t in np.flatnonzero(open_turns).tolist():
        i = row.turn_docs[t]
        yield "turns", _number(layout, i), f"the turn at {row.turn_starts[t] - row.first[i]} has no <|im_end|>"
    ends = (row.first + layout.clean_lens)[row.turn_docs]
    after = np.where(last, ends, np.append(row.turn_starts[1:], 0)) if len(ends) else ends
    gap = after - row.closings - 1
    wrong = row.closed & (gap != len(facts.newline)) & ~(last & facts.cut_turns)
    for offset, token in enumerate(facts.newline, 1):
        there = row.closings + offset < ends
        wrong |= row.closed & there & (row.clean.take(row.closings + offset, mode="clip") != token)
    for t in np.flatnonzero(wrong).tolist():
        i = row.turn_docs[t]
        yield (
            "turns",
            _number(layout, i),
            f"<|im_end|> at {row.closings[t] - row.first[i]} is not followed by a newline",
        )
    if (row.clean == facts.eos).sum() != row.closed.sum():
        yield "turns", None, "an <|im_end|> stands outside of any turn"


def _count(row: Row, facts: Facts) -> Iterator[Broken]:
    layout = row.layout
    for i, (length, n_anchors, n) in enumerate(
        zip(layout.clean_lens.tolist(), row.n_anchors.tolist(), layout.n_blocks.tolist(), strict=True)
    ):
        wanted = block_count(length, n_anchors, facts.max_document_length, facts.block_size, facts.repeat)
        least = wanted - int(wanted * facts.trim)
        if facts.cut_turns:  # its count was made from the anchors before the cut
            wanted, least = min((facts.max_document_length - length) // facts.block_size, n_anchors), 1
        if not least <= n <= wanted:
            yield "blocks", _number(layout, i), f"{n} blocks for {n_anchors} anchors; the rule gives {wanted}"


def _starts(row: Row, facts: Facts) -> Iterator[Broken]:
    """Legal starts, in order, and those that the draw gives."""
    layout, documents = row.layout, row.layout.block_documents()
    falls = (np.diff(layout.starts) <= 0) & (np.diff(documents) == 0)
    for i in np.unique(documents[1:][falls]).tolist():
        yield "order", _number(layout, i), "its block starts do not ascend"
    legal = np.zeros(layout.n_clean, dtype=bool)
    legal[np.repeat(row.first, row.n_anchors) + row.anchors] = True
    anchors = layout.anchors
    inside = (anchors >= 0) & (anchors < layout.clean_lens[documents])
    wrong = ~(inside & legal.take(row.first[documents] + anchors, mode="clip"))
    illegal, at = np.unique(documents[wrong], return_index=True)
    for i, start in zip(illegal.tolist(), anchors[wrong][at].tolist(), strict=True):
        yield "anchors", _number(layout, i), f"a block starts at {start}, which is no anchor"
    drawable = layout.n_blocks <= row.n_anchors
    n_drawn, numbers = np.where(drawable, layout.n_blocks, 0), layout.doc_ids.astype(np.int64)
    drawn = row.anchors[draw_many(row.n_anchors, n_drawn, numbers, seed=facts.seed, epoch=row.epoch)]
    mine = drawable[documents]
    for i in np.setdiff1d(documents[mine][anchors[mine] != drawn], illegal).tolist():
        yield "draw", _number(layout, i), "its block starts are not those that seed, epoch and number give"


def check_targets(tokens: np.ndarray, layout: RowLayout, targets: np.ndarray, facts: Facts) -> Iterator[Broken]:
    """Targets int32 (D, blocks) as training derives them, against the rule read off token by token."""
    clean, anchors, first = tokens[: layout.n_clean].tolist(), layout.anchors.tolist(), layout.clean_offsets().tolist()
    for b, i in enumerate(layout.block_documents().tolist()):
        begin = first[i] + anchors[b] + 1
        ahead = clean[begin : min(begin + facts.block_size, first[i] + int(layout.clean_lens[i]))]
        if facts.eos in ahead:
            ahead = ahead[: ahead.index(facts.eos) + 1]
        wanted = ahead + [IGNORE] * (facts.block_size - len(ahead))
        if targets[:, b].tolist() != wanted:
            found = targets[:, b].tolist()
            yield "targets", _number(layout, i), f"the block at {anchors[b]} has targets {found}, not {wanted}"


def _slots(row: Row, facts: Facts) -> Iterator[Broken]:
    layout = row.layout
    blocks = row.tokens[layout.n_clean :].reshape(-1, facts.block_size)
    documents = layout.block_documents()
    anchors = row.clean.take(row.first[documents] + layout.anchors, mode="clip")
    wanted = anchors if layout.target_shift else np.full_like(anchors, facts.mask)
    for b in np.flatnonzero(blocks[:, 0] != wanted).tolist():
        what = f"the block at {layout.starts[b]} begins with {blocks[b, 0]}, not {wanted[b]}"
        yield "slots", _number(layout, documents[b]), what
    for b in np.flatnonzero((blocks[:, 1:] != facts.mask).any(axis=1)).tolist():
        yield "slots", _number(layout, documents[b]), f"the block at {layout.starts[b]} holds more than mask tokens"


_CHECKS: tuple[Callable[[Row, Facts], Iterator[Broken]], ...] = (_lengths, _vocabulary, _turns, _count, _starts, _slots)

ROW_RULES = {
    "documents": "a row holds documents, each with clean tokens and at least one block",
    "lengths": "no row and no document is longer than it may be",
    "vocabulary": "ids lie in the vocabulary; no clean token is the mask or padding token",
    "turns": "documents are whole turns: <|im_start|> ... <|im_end|> newline",
    "blocks": "a document has the number of blocks that its length and anchors give",
    "order": "block starts ascend strictly in a document",
    "anchors": "blocks start at anchors: from the end of an assistant header to before its <|im_end|>",
    "draw": "block starts are those that (seed, epoch, document number) draw",
    "slots": "slot 0 repeats the anchor, the other slots hold the mask token",
    "targets": "of one row in 64: slot j's target is the token j + 1 after the start, up to an <|im_end|>",
}
"""Rule -> what it says."""
