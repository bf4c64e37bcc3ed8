"""Rules for documents that exceed max_document_length: the part that is kept, and its number of blocks.

`keep_whole_turns` is the default; `reference` is the rule that the published models were trained with.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_prep.chat import RenderedBatch, RenderedDocument, Turn
from sdlm_megatron.diffusion.layout import block_count

# Reasons in the manifest and in rejects.jsonl.
NO_ANSWER = "no assistant turn"
UNTRAINED = "all answers are empty or excluded from training by a flag"
SHORT_ANSWER = "answers too short for a block"
LONG_PROMPT = "the prompt alone exceeds max_document_length"
LONG_ANSWER = "the first answer does not fit into max_document_length"


@dataclass(frozen=True)
class FittedDocument:
    """The part of a document that is kept."""

    input_ids: np.ndarray  # int32 (L,)
    anchors: np.ndarray  # int32 (R,), ascending
    n_blocks: int  # number of blocks; 0 if the document is dropped
    turns_cut: int = 0
    tokens_cut: int = 0
    blocks_missing: int = 0  # blocks of the whole document that did not fit
    drop_reason: str = ""


Fit = Callable[..., FittedDocument]


def keep_whole_turns(document: RenderedDocument, *, max_len: int, block_size: int, repeat: int) -> FittedDocument:
    """Keeps as many whole turns as leave room for at least one block; blocks fill the remaining room.

    `max_len` limits the expanded document, in tokens; it has `repeat` * R // `block_size` blocks if they fit.
    """
    size = {"block_size": block_size, "repeat": repeat}
    wanted = _wanted(len(document.anchors), **size)
    # From the end: the largest number of turns that fits wins.
    for kept in range(len(document.turns), 0, -1):
        turns = document.turns[:kept]
        if kept < len(document.turns) and not turns[-1].n_anchors:
            continue  # a trailing question without its answer trains nothing
        clean_len, n_anchors = turns[-1].end, sum(turn.n_anchors for turn in turns)
        if n_blocks := block_count(clean_len, n_anchors, max_len, **size):
            return FittedDocument(
                document.input_ids[:clean_len],
                document.anchors[:n_anchors],
                n_blocks,
                turns_cut=len(document.turns) - kept,
                tokens_cut=len(document.input_ids) - clean_len,
                blocks_missing=wanted - n_blocks,
            )
    return _dropped(document, _why_dropped(document, wanted, max_len, block_size))


def reference(document: RenderedDocument, *, max_len: int, block_size: int, repeat: int) -> FittedDocument:
    """The rule of the reference code; arguments as for `keep_whole_turns`.

    Turns are removed from the first one, fourth or later, at which prompt + 2 * response tokens exceed `max_len`. If
    the rest still needs more than `max_len`, the clean part is cut, inside a turn, so that about a third of the room
    after the last header remains for blocks. A document whose prompt exceeds `max_len` is dropped; the reference code
    raises an exception there.
    """
    turns = document.turns[: _turns_within(document.turns, max_len)]
    clean_len, n_anchors = turns[-1].end, sum(turn.n_anchors for turn in turns)
    # The reference code compares the unrounded block tokens, without limiting blocks to anchors.
    if clean_len + repeat * n_anchors > max_len:
        header_end = max((turn.first_anchor for turn in turns if turn.n_anchors), default=clean_len)
        if header_end >= max_len:
            return _dropped(document, LONG_PROMPT if n_anchors else _no_answer(document))
        clean_len = min(clean_len, max_len - (max_len - header_end) // 3)
    anchors = document.anchors[document.anchors < clean_len - 1]  # an anchor needs its successor
    n_blocks = min(block_count(clean_len, n_anchors, max_len, block_size, repeat), len(anchors))
    wanted = _wanted(len(document.anchors), block_size, repeat)
    if not n_blocks:
        return _dropped(document, _why_dropped(document, wanted, max_len, block_size))
    return FittedDocument(
        document.input_ids[:clean_len],
        anchors,
        n_blocks,
        turns_cut=len(document.turns) - len(turns),
        tokens_cut=len(document.input_ids) - clean_len,
        blocks_missing=wanted - n_blocks,
    )


FITS: dict[str, Fit] = {"keep_whole_turns": keep_whole_turns, "reference": reference}
"""Value of the setting `overlong` -> rule."""


@dataclass(frozen=True)
class FittedBatch:
    """Kept parts of several documents; arrays are int64 (documents,). A document with 0 blocks is dropped."""

    clean_lens: np.ndarray
    n_anchors: np.ndarray  # number of anchors kept: the first ones of the document
    n_blocks: np.ndarray
    turns_cut: np.ndarray
    tokens_cut: np.ndarray
    blocks_missing: np.ndarray
    drop_reasons: dict[int, str]  # index of a dropped document -> reason


def fit_batch(batch: RenderedBatch, rule: str, *, max_len: int, block_size: int, repeat: int) -> FittedBatch:
    """Applies a rule of `FITS` to a batch. Documents with room for all their blocks, nearly all, need no rule and are
    processed together."""
    clean, anchors = np.diff(batch.doc_edges), batch.anchors_per_document()
    wanted = np.minimum(repeat * anchors // block_size, anchors)
    result = FittedBatch(clean, anchors, wanted, np.zeros_like(clean), np.zeros_like(clean), np.zeros_like(clean), {})
    # The reference rule counts response tokens twice, so it may cut any document beyond half of max_len.
    room = (clean + repeat * anchors <= max_len) & (2 * clean <= max_len) & (wanted > 0)
    for i in np.flatnonzero(~room).tolist():
        fitted = FITS[rule](batch.document(i), max_len=max_len, block_size=block_size, repeat=repeat)
        result.n_blocks[i] = fitted.n_blocks
        if not fitted.n_blocks:
            result.drop_reasons[i] = fitted.drop_reason
            continue
        result.clean_lens[i], result.n_anchors[i] = len(fitted.input_ids), len(fitted.anchors)
        result.turns_cut[i], result.tokens_cut[i] = fitted.turns_cut, fitted.tokens_cut
        result.blocks_missing[i] = fitted.blocks_missing
    return result


def _turns_within(turns: tuple[Turn, ...], max_len: int) -> int:
    """Number of turns the reference code keeps; after a cut the last one is an answer."""
    cost = 0
    for i, turn in enumerate(turns):
        cost += (turn.end - turn.start) * (2 if turn.n_anchors else 1)
        if i >= 3 and cost > max_len:
            return max((k for k in range(i, 2, -1) if turns[k - 1].n_anchors), default=3)
    return len(turns)


def _wanted(n_anchors: int, block_size: int, repeat: int) -> int:
    return min(repeat * n_anchors // block_size, n_anchors)


def _why_dropped(document: RenderedDocument, wanted: int, max_len: int, block_size: int) -> str:
    answers = [turn for turn in document.turns if turn.n_anchors]
    if not answers:
        return _no_answer(document)
    if not wanted:
        return SHORT_ANSWER
    return LONG_PROMPT if answers[0].first_anchor + 1 + block_size > max_len else LONG_ANSWER


def _no_answer(document: RenderedDocument) -> str:
    return UNTRAINED if any(turn.role == "assistant" for turn in document.turns) else NO_ANSWER


def _dropped(document: RenderedDocument, reason: str) -> FittedDocument:
    return FittedDocument(document.input_ids, document.anchors, 0, drop_reason=reason)
