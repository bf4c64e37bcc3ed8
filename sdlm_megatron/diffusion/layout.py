"""Anchors, blocks, positions and targets: the definition that data preparation, training and tests derive from.

A document is L clean tokens x[0..L-1] and n blocks (paper, section 3.2). The block at anchor p holds D tokens at
positions p..p+D-1: slot 0 repeats x[p], slots 1..D-1 hold the mask token M. Slot j is trained to predict x[p+1+j]
(targets shifted by one, as in next-token prediction), unless that token lies outside the document or follows the end
of the turn.

Example: L = 6, D = 3, anchors 2 and 4, x[5] = 99 ends the turn (`expand_document`):

    index          0   1   2   3   4   5 |  6   7   8 |  9  10  11
    input_ids     10  11  12  13  14  99 | 12   M   M | 14   M   M
    position_ids   0   1   2   3   4   5 |  2   3   4 |  4   5   6
    targets        -   -   -   -   -   - | 13  14  99 | 99   -   -

Without the target shift (an ablation in the paper) each slot predicts the token at its own position: the block of
anchor p starts at p+1, holds mask tokens only, and sees x[p]. Targets stay the same; positions and visibility follow
from the block's start as before.

A row packs several documents: all clean parts, then all block parts, then padding (never stored). Arrays are NumPy's;
this module needs no torch, so that data preparation and the planner start fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdlm_megatron.diffusion import decode_random

IGNORE = -100
"""Target of a token without a loss; the value that torch's cross entropy ignores by default."""


def block_count(clean_len: int, n_anchors: int, max_len: int, block_size: int, repeat: int) -> int:
    """Number of blocks n = min(min(max_len - L, repeat * R) // D, R) of a document, at least 0.

    Args:
        clean_len: L, clean tokens.
        n_anchors: R, anchors; equals the number of response tokens.
        max_len: limit of the expanded length L + n * D.
        block_size: D.
        repeat: limits block tokens to repeat * R, so that a response token is a target about `repeat` times.
    """
    return max(0, min(min(max_len - clean_len, repeat * n_anchors) // block_size, n_anchors))


def draw_starts(anchors: np.ndarray, n: int, *, seed: int, epoch: int, document: int) -> np.ndarray:
    """Draws `n` of the `anchors` (R,) without replacement: int32 (n,), ascending.

    A pure function of (seed, epoch, document); see `draw_many`.
    """
    counts = np.array([[len(anchors)], [n], [document]])
    return np.asarray(anchors, dtype=np.int32)[draw_many(*counts, seed=seed, epoch=epoch)]


_GOLDEN = np.uint64(decode_random.GOLDEN % 2**64)
_INDEX = np.uint64((1 << 24) - 1)
"""Low bits of an anchor's key; they hold its index in the document."""


def draw_many(
    n_anchors: np.ndarray, n_drawn: np.ndarray, documents: np.ndarray, *, seed: int, epoch: int
) -> np.ndarray:
    """Draws anchors for many documents at once.

    Each anchor gets a 64-bit key, a hash of (seed, epoch, document, index of the anchor); the anchors with the
    smallest keys are drawn. So a draw depends neither on the number of workers nor on the order of processing.

    Args:
        n_anchors: int (docs,), anchors of each document, below 2**24.
        n_drawn: int (docs,), anchors to draw, at most `n_anchors`.
        documents: int (docs,), number of each document in its dataset.
        seed: of the dataset.
        epoch: from 0; each epoch draws anew.

    Returns:
        int64 (sum of n_drawn,): indices into the concatenated anchors of all documents, ascending.
    """
    state = mix64(mix64(mix64(np.uint64(seed)) ^ np.uint64(epoch)) ^ documents.astype(np.uint64))
    first = np.cumsum(n_anchors) - n_anchors
    counter = np.arange(n_anchors.sum(), dtype=np.uint64)
    counter -= np.repeat(first.astype(np.uint64), n_anchors)
    keys = mix64(np.repeat(state + _GOLDEN, n_anchors) + counter * _GOLDEN)
    # the index in the low bits makes keys distinct, so that exactly n of them are at most the n-th smallest
    keys &= ~_INDEX
    keys |= counter
    limit = np.zeros(len(first), dtype=np.uint64)
    ordered = keys.copy()
    # partition is O(R) where sorting is O(R log R): this loop dominates the expansion of a dataset
    for i, (at, total, n) in enumerate(zip(first.tolist(), n_anchors.tolist(), n_drawn.tolist(), strict=True)):
        if n:
            of_document = ordered[at : at + total]
            of_document.partition(n - 1)
            limit[i] = of_document[n - 1]
    drawn = keys <= np.repeat(limit, n_anchors)
    if not n_drawn.all():  # the limit 0 of a document without draws would admit the key 0
        drawn &= np.repeat(n_drawn > 0, n_anchors)
    return np.flatnonzero(drawn)


def mix64(value: np.ndarray | np.uint64) -> np.ndarray:
    """`decode_random.mix64` on uint64: same shape, at least one dimension."""
    # NumPy warns when a product of scalars overflows, but not when one of arrays does
    value = np.atleast_1d(np.asarray(value, dtype=np.uint64))
    return decode_random.mix64(value.view(np.int64)).view(np.uint64)


@dataclass(frozen=True)
class ExpandedDocument:
    """One document with its blocks; int32 arrays of shape (L + n*D,), clean part first."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray
    """Token that each input token has to predict, at the index of the input token; IGNORE where there is none."""


@dataclass(frozen=True)
class RowLayout:
    """Documents and blocks of a packed row; together with the tokens it determines positions, targets, visibility.

    The clean parts of all documents come first, then their blocks, both in the order of `doc_ids`.
    """

    doc_ids: np.ndarray
    """int32 (docs,): number of each document in its dataset."""
    clean_lens: np.ndarray
    """int32 (docs,): clean tokens L of each document."""
    n_blocks: np.ndarray
    """int32 (docs,): blocks of each document."""
    starts: np.ndarray
    """int32 (blocks,): position of slot 0 of each block, by document, ascending in each."""
    block_size: int
    target_shift: bool = True
    """False: a block starts one position after its anchor and does not repeat it."""

    @property
    def anchors(self) -> np.ndarray:
        """int32 (blocks,): position of the token before each block's first target."""
        return self.starts if self.target_shift else self.starts - np.int32(1)

    @property
    def n_docs(self) -> int:
        return len(self.doc_ids)

    @property
    def n_clean(self) -> int:
        """Clean tokens of the row; their indices are [0, n_clean)."""
        return int(self.clean_lens.sum())

    @property
    def n_block_tokens(self) -> int:
        """Block tokens of the row; their indices are [n_clean, used)."""
        return len(self.starts) * self.block_size

    @property
    def used(self) -> int:
        """Tokens of the row without padding."""
        return self.n_clean + self.n_block_tokens

    def to_ints(self) -> np.ndarray:
        """The form on disk, int32: [docs, doc_ids…, clean_lens…, n_blocks…, starts…]."""
        head = np.array([self.n_docs], dtype=np.int32)
        return np.concatenate([head, self.doc_ids, self.clean_lens, self.n_blocks, self.starts]).astype(np.int32)

    @classmethod
    def from_ints(cls, ints: np.ndarray, block_size: int, target_shift: bool = True) -> "RowLayout":
        """Inverse of `to_ints`. Raises ValueError when the numbers contradict each other."""
        n_docs = int(ints[0]) if len(ints) else -1
        if n_docs < 0 or len(ints) < 1 + 3 * n_docs:
            raise ValueError(f"a layout of {len(ints)} numbers cannot hold {n_docs} documents")
        doc_ids, clean_lens, n_blocks = np.split(ints[1 : 1 + 3 * n_docs], 3) if n_docs else (ints[:0],) * 3
        starts = ints[1 + 3 * n_docs :]
        if len(starts) != int(n_blocks.sum()) or (n_docs and min(clean_lens.min(), n_blocks.min()) < 0):
            raise ValueError(f"a layout lists {len(starts)} block starts for {int(n_blocks.sum())} blocks")
        return cls(doc_ids, clean_lens, n_blocks, starts, block_size, target_shift)

    def block_documents(self) -> np.ndarray:
        """int (blocks,): index in the row of each block's document."""
        return np.repeat(np.arange(self.n_docs), self.n_blocks)

    def clean_offsets(self) -> np.ndarray:
        """int (docs,): index in the row of each document's first clean token."""
        return np.cumsum(self.clean_lens) - self.clean_lens


def row_positions(layout: RowLayout) -> np.ndarray:
    """Position ids of a row, int32 (used,): each document counts from 0, a block with start p holds p..p+D-1."""
    clean = np.arange(layout.n_clean) - np.repeat(layout.clean_offsets(), layout.clean_lens)
    blocks = layout.starts[:, None] + np.arange(layout.block_size)
    return np.concatenate([clean, blocks.reshape(-1)]).astype(np.int32)


def row_targets(tokens: np.ndarray, layout: RowLayout, eos_token_id: int) -> np.ndarray:
    """Targets of a row, int32 (used,), at the indices of the input tokens; IGNORE where there is none.

    Args:
        tokens: int (used,) or longer, the tokens of the row.
        layout: of the row.
        eos_token_id: token that closes a turn; the slots after one that predicts it have no target.
    """
    targets = np.full(layout.used, IGNORE, dtype=np.int32)
    targets[layout.n_clean :] = slot_targets(tokens, layout, eos_token_id).T.reshape(-1)
    return targets


def slot_targets(tokens: np.ndarray, layout: RowLayout, eos_token_id: int) -> np.ndarray:
    """Targets of a row's block tokens by slot, int32 (D, blocks): x[p+1+j] at [j, block]; see `row_targets`."""
    targets = np.full((layout.block_size, len(layout.starts)), IGNORE, dtype=np.int32)
    if not len(layout.starts):
        return targets
    clean = tokens[: layout.n_clean]
    documents = layout.block_documents()
    target_index = layout.clean_offsets()[documents] + layout.anchors  # row index of x[p+1+j], less j + 1
    last = np.cumsum(layout.clean_lens)[documents] - 1
    alive = np.ones(len(target_index), dtype=bool)
    for target in targets:
        target_index += 1
        alive &= target_index <= last
        value = clean.take(target_index, mode="clip")  # clipped indices are not alive, so their value is not copied
        np.copyto(target, value, where=alive)
        alive &= value != eos_token_id
    return targets


def next_token_targets(tokens: np.ndarray, layout: RowLayout, eos_token_id: int) -> np.ndarray:
    """Targets of clean tokens, for `diffusion.next_token_weight`: int32 (n_clean,), IGNORE where there is none.

    Each x[q] that is a target of some block of its document becomes the target of clean token q-1, once, however many
    blocks predict it. In the module's example: clean tokens 2, 3, 4 get the targets 13, 14, 99.
    """
    by_slot = slot_targets(tokens, layout, eos_token_id)  # (D, blocks)
    before = (layout.clean_offsets()[layout.block_documents()] + layout.anchors) + np.arange(layout.block_size)[:, None]
    targets = np.full(layout.n_clean, IGNORE, dtype=np.int32)
    real = by_slot != IGNORE
    targets[before[real]] = by_slot[real]
    return targets


def pack_row(
    documents: Sequence[tuple[int, np.ndarray, np.ndarray]],
    *,
    block_size: int,
    mask_token_id: int,
    target_shift: bool = True,
) -> tuple[np.ndarray, RowLayout]:
    """Packs documents into one row.

    Args:
        documents: (number, clean_ids int (L,), anchors int (n,) ascending) of each.
        block_size: D.
        mask_token_id: token of the slots 1..D-1 (of all slots without the target shift).
        target_shift: see `RowLayout`.

    Returns:
        The tokens, int32 (used,), and their layout.

    Raises:
        ValueError: an anchor lies outside its document, or anchors do not ascend strictly.
    """
    ids, cleans, anchors = zip(*documents, strict=True) if documents else ((), (), ())
    empty = np.empty(0, dtype=np.int32)
    layout = RowLayout(
        np.array(ids, dtype=np.int32),
        np.array([len(c) for c in cleans], dtype=np.int32),
        np.array([len(a) for a in anchors], dtype=np.int32),
        block_starts(np.concatenate([empty, *anchors]).astype(np.int32), target_shift),
        block_size,
        target_shift,
    )
    return add_blocks(np.concatenate([empty, *cleans]).astype(np.int32), layout, mask_token_id), layout


def block_starts(anchors: np.ndarray, target_shift: bool) -> np.ndarray:
    """Position of slot 0 of each anchor's block, int32 (blocks,)."""
    return anchors if target_shift else anchors + np.int32(1)


def add_blocks(clean: np.ndarray, layout: RowLayout, mask_token_id: int) -> np.ndarray:
    """Tokens of a row, int32 (used,): clean tokens (n_clean,), then the tokens of the blocks.

    Raises ValueError when an anchor lies outside its document, or anchors do not ascend strictly in a document.
    """
    documents = layout.block_documents()
    anchors = layout.anchors
    inside = (anchors >= 0) & (anchors < layout.clean_lens[documents])
    ascends = (np.diff(layout.starts) > 0) | (np.diff(documents) > 0)
    if not (inside.all() and ascends.all()):
        wrong = documents[int(np.argmin(inside)) if not inside.all() else int(np.argmin(ascends)) + 1]
        raise ValueError(
            f"document {layout.doc_ids[wrong]}: anchors of blocks must ascend strictly inside "
            f"[0, {layout.clean_lens[wrong]})"
        )
    tokens = np.full(layout.used, mask_token_id, dtype=np.int32)
    tokens[: layout.n_clean] = clean
    if layout.target_shift:
        tokens[layout.n_clean :: layout.block_size] = clean[layout.clean_offsets()[documents] + anchors]
    return tokens


def pick_document(tokens: np.ndarray, layout: RowLayout, index: int) -> tuple[np.ndarray, RowLayout]:
    """Document `index` of a row, as a row of its own: tokens int32 (used,) and layout."""
    clean, block = int(layout.clean_lens[:index].sum()), int(layout.n_blocks[:index].sum())
    after, blocks, size = clean + int(layout.clean_lens[index]), int(layout.n_blocks[index]), layout.block_size
    begin = layout.n_clean + block * size
    itself, starts = slice(index, index + 1), layout.starts[block : block + blocks]
    alone = (
        layout.doc_ids[itself],
        layout.clean_lens[itself],
        layout.n_blocks[itself],
        starts,
        size,
        layout.target_shift,
    )
    return np.concatenate([tokens[clean:after], tokens[begin : begin + blocks * size]]), RowLayout(*alone)


def join_documents(
    documents: Sequence[tuple[np.ndarray, RowLayout]], block_size: int, target_shift: bool
) -> tuple[np.ndarray, RowLayout]:
    """Rows as one row, in their order: tokens int32 (used,) and layout."""
    empty = np.empty(0, dtype=np.int32)
    names = ("doc_ids", "clean_lens", "n_blocks", "starts")
    whole = {name: np.concatenate([empty, *(getattr(layout, name) for _, layout in documents)]) for name in names}
    clean = [tokens[: layout.n_clean] for tokens, layout in documents]
    blocks = [tokens[layout.n_clean :] for tokens, layout in documents]
    return np.concatenate([empty, *clean, *blocks]), RowLayout(
        **whole, block_size=block_size, target_shift=target_shift
    )


def expand_document(
    clean_ids: np.ndarray, block_starts: np.ndarray, *, block_size: int, mask_token_id: int, eos_token_id: int
) -> ExpandedDocument:
    """Expands one document, clean tokens (L,) and anchors (n,), to the sequence that is trained (module's example)."""
    tokens, layout = pack_row(
        [(0, np.asarray(clean_ids), np.asarray(block_starts))], block_size=block_size, mask_token_id=mask_token_id
    )
    return ExpandedDocument(tokens, row_positions(layout), row_targets(tokens, layout, eos_token_id))
