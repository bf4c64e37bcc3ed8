"""Anchors, blocks, positions and targets: the one definition that everything else derives from.

A document is L clean tokens x[0..L-1] and n blocks. The block with start (anchor) p holds D tokens at positions
p..p+D-1: slot 0 repeats x[p], slots 1..D-1 hold the mask token. Slot j is trained to produce x[p+1+j]
(shifted targets, paper section 3.2), unless that lies outside the document or the turn has already ended.

Without the target shift (an ablation of the paper) every slot produces the token of its own position: the block
behind the same anchor p starts at p+1, holds mask tokens only, and sees x[p]. Targets, and all that follows from
starts and positions (who sees whom), stay as they are.

A row packs several documents: all clean parts, then all block parts, then padding (never stored).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORE = -100
"""Target of a token that is not trained."""


def block_count(clean_len: int, n_anchors: int, max_len: int, block_size: int, repeat: int) -> int:
    """Number of blocks a document gets: min(max_len - L, repeat * R) // D, at most one per anchor.

    `repeat` bounds the block tokens to `repeat` times the R response tokens, so that each response token is a
    target about `repeat` times; `max_len` bounds the expanded length of the document.
    """
    return max(0, min(min(max_len - clean_len, repeat * n_anchors) // block_size, n_anchors))


def draw_starts(anchors: np.ndarray, n: int, *, seed: int, epoch: int, document: int) -> np.ndarray:
    """Draws `n` of `anchors` (R,) without replacement: int32 (n,), ascending.

    A pure function of (seed, epoch, document): neither the number of workers nor the order of processing can change
    a draw. `draw_many` is the rule.
    """
    one = np.array([[len(anchors)], [n], [document]])
    return np.asarray(anchors, dtype=np.int32)[draw_many(*one, seed=seed, epoch=epoch)]


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_INDEX = np.uint64((1 << 24) - 1)
"""Low bits of a draw's key: the index of the anchor."""


def draw_many(
    n_anchors: np.ndarray, n_drawn: np.ndarray, documents: np.ndarray, *, seed: int, epoch: int
) -> np.ndarray:
    """Draws blocks for many documents at once; all arrays are int (n_docs,).

    Every anchor of a document gets a key from a counter-based generator (SplitMix64 at a state made of seed, epoch and
    document number); the `n_drawn` anchors with the smallest keys are drawn. The lowest bits of a key are the anchor's
    index, so no two are equal.

    Returns:
        int64 (sum of n_drawn,): indices into the anchors of all documents, one document after the other, ascending.
    """
    state = mix64(mix64(mix64(np.uint64(seed)) ^ np.uint64(epoch)) ^ documents.astype(np.uint64))
    first = np.cumsum(n_anchors) - n_anchors
    counter = np.arange(n_anchors.sum(), dtype=np.uint64)
    counter -= np.repeat(first.astype(np.uint64), n_anchors)
    keys = mix64(np.repeat(state + _GOLDEN, n_anchors) + counter * _GOLDEN)
    keys &= ~_INDEX
    keys |= counter
    limit = np.zeros(len(first), dtype=np.uint64)
    ordered = keys.copy()
    for i, (at, total, n) in enumerate(zip(first.tolist(), n_anchors.tolist(), n_drawn.tolist(), strict=True)):
        if n:
            of_document = ordered[at : at + total]
            of_document.partition(n - 1)
            limit[i] = of_document[n - 1]
    drawn = keys <= np.repeat(limit, n_anchors)
    if not n_drawn.all():  # a limit of zero would let a key of zero pass
        drawn &= np.repeat(n_drawn > 0, n_anchors)
    return np.flatnonzero(drawn)


def mix64(value: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser on uint64: a bijective hash (Steele et al. 2014)."""
    value = np.atleast_1d(np.asarray(value, dtype=np.uint64)) + _GOLDEN
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        value ^= value >> np.uint64(shift)
        if factor > 1:
            value *= np.uint64(factor)
    return value


@dataclass(frozen=True)
class ExpandedDocument:
    """One document with its blocks; int32 arrays of shape (L + n*D,), clean part first."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray
    """Unshifted: the token each input token has to produce, or -100."""


@dataclass(frozen=True)
class RowLayout:
    """Which documents and blocks a row holds; with the tokens it determines positions, targets and visibility."""

    doc_ids: np.ndarray
    """int32 (n_docs,): number of each document in its dataset."""
    clean_lens: np.ndarray
    """int32 (n_docs,): clean tokens L of each document."""
    n_blocks: np.ndarray
    """int32 (n_docs,): blocks of each document."""
    starts: np.ndarray
    """int32 (sum of n_blocks,): position of slot 0 of each block, document after document, ascending in each."""
    block_size: int
    target_shift: bool = True
    """False: a block starts behind its anchor and repeats nothing."""

    @property
    def anchors(self) -> np.ndarray:
        """int32 (blocks,): position of the token before each block's first target."""
        return self.starts if self.target_shift else self.starts - np.int32(1)

    @property
    def n_docs(self) -> int:
        return len(self.doc_ids)

    @property
    def n_clean(self) -> int:
        """Clean tokens of the row; they are tokens [0, n_clean)."""
        return int(self.clean_lens.sum())

    @property
    def n_block_tokens(self) -> int:
        """Block tokens of the row; they are tokens [n_clean, used)."""
        return len(self.starts) * self.block_size

    @property
    def used(self) -> int:
        """Tokens of the row without padding."""
        return self.n_clean + self.n_block_tokens

    def to_ints(self) -> np.ndarray:
        """The stored form, int32: [n_docs, doc_ids…, clean_lens…, n_blocks…, starts…]."""
        head = np.array([self.n_docs], dtype=np.int32)
        return np.concatenate([head, self.doc_ids, self.clean_lens, self.n_blocks, self.starts]).astype(np.int32)

    @classmethod
    def from_ints(cls, ints: np.ndarray, block_size: int, target_shift: bool = True) -> "RowLayout":
        """Inverse of `to_ints`; ValueError when the numbers contradict each other."""
        n_docs = int(ints[0]) if len(ints) else -1
        if n_docs < 0 or len(ints) < 1 + 3 * n_docs:
            raise ValueError(f"a layout of {len(ints)} numbers cannot hold {n_docs} documents")
        doc_ids, clean_lens, n_blocks = np.split(ints[1 : 1 + 3 * n_docs], 3) if n_docs else (ints[:0],) * 3
        starts = ints[1 + 3 * n_docs :]
        if len(starts) != int(n_blocks.sum()) or (n_docs and min(clean_lens.min(), n_blocks.min()) < 0):
            raise ValueError(f"a layout lists {len(starts)} block starts for {int(n_blocks.sum())} blocks")
        return cls(doc_ids, clean_lens, n_blocks, starts, block_size, target_shift)

    def block_documents(self) -> np.ndarray:
        """int (blocks,): index in the row of the document of each block."""
        return np.repeat(np.arange(self.n_docs), self.n_blocks)

    def clean_offsets(self) -> np.ndarray:
        """int (n_docs,): row index of each document's first clean token."""
        return np.cumsum(self.clean_lens) - self.clean_lens


def row_positions(layout: RowLayout) -> np.ndarray:
    """Position ids of a row, int32 (used,): each document counts from 0, a block at p holds p..p+D-1."""
    clean = np.arange(layout.n_clean) - np.repeat(layout.clean_offsets(), layout.clean_lens)
    blocks = layout.starts[:, None] + np.arange(layout.block_size)
    return np.concatenate([clean, blocks.reshape(-1)]).astype(np.int32)


def row_targets(tokens: np.ndarray, layout: RowLayout, eos_token_id: int) -> np.ndarray:
    """Targets of a row, int32 (used,), unshifted, -100 where none.

    Slot j of the block at p gets x[p+1+j]; none beyond the document, none after a slot whose target was
    `eos_token_id` (the token that closes a turn).
    """
    targets = np.full(layout.used, IGNORE, dtype=np.int32)
    targets[layout.n_clean :] = slot_targets(tokens, layout, eos_token_id).T.reshape(-1)
    return targets


def slot_targets(tokens: np.ndarray, layout: RowLayout, eos_token_id: int) -> np.ndarray:
    """Targets of the block tokens of a row, int32 (D, blocks): `row_targets` slot by slot."""
    targets = np.full((layout.block_size, len(layout.starts)), IGNORE, dtype=np.int32)
    if not len(layout.starts):
        return targets
    clean = tokens[: layout.n_clean]
    documents = layout.block_documents()
    wanted = layout.clean_offsets()[documents] + layout.anchors  # index in the row of slot j's target, less j + 1
    last = np.cumsum(layout.clean_lens)[documents] - 1
    alive = np.ones(len(wanted), dtype=bool)
    for target in targets:
        wanted += 1
        alive &= wanted <= last
        value = clean.take(wanted, mode="clip")
        np.copyto(target, value, where=alive)
        alive &= value != eos_token_id
    return targets


def next_token_targets(tokens: np.ndarray, layout: RowLayout, eos_token_id: int) -> np.ndarray:
    """Targets of the clean tokens under diffusion.next_token_weight, int32 (n_clean,), -100 where none.

    Every x[q] that is a target of a block of its document is the target of clean token q-1, once.
    """
    wanted = slot_targets(tokens, layout, eos_token_id)  # (D, blocks)
    before = (layout.clean_offsets()[layout.block_documents()] + layout.anchors) + np.arange(layout.block_size)[:, None]
    targets = np.full(layout.n_clean, IGNORE, dtype=np.int32)
    real = wanted != IGNORE
    targets[before[real]] = wanted[real]
    return targets


def pack_row(
    documents: Sequence[tuple[int, np.ndarray, np.ndarray]],
    *,
    block_size: int,
    mask_token_id: int,
    target_shift: bool = True,
) -> tuple[np.ndarray, RowLayout]:
    """Packs (doc_id, clean_ids (L,), anchors (n,)) triples into one row.

    Returns the tokens, int32 (used,), and their layout. ValueError on an anchor outside its document, or on anchors
    that do not ascend strictly.
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
    """Position of slot 0 for each anchor, int32."""
    return anchors if target_shift else anchors + np.int32(1)


def add_blocks(clean: np.ndarray, layout: RowLayout, mask_token_id: int) -> np.ndarray:
    """Tokens of a row, int32 (used,): its clean tokens, int32 (n_clean,), then its blocks.

    ValueError on an anchor outside its document, or on anchors that do not ascend strictly in a document.
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


def expand_document(
    clean_ids: np.ndarray, block_starts: np.ndarray, *, block_size: int, mask_token_id: int, eos_token_id: int
) -> ExpandedDocument:
    """Clean tokens (L,) and block starts (n,) to the trained sequence: a row of one document."""
    tokens, layout = pack_row(
        [(0, np.asarray(clean_ids), np.asarray(block_starts))],
        block_size=block_size,
        mask_token_id=mask_token_id,
    )
    return ExpandedDocument(tokens, row_positions(layout), row_targets(tokens, layout, eos_token_id))
