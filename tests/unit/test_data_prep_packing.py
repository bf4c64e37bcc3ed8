"""Packing: no document is lost or split, rows are full, and the result depends on the input alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import BestFit
from sdlm_megatron.diffusion.layout import draw_starts

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


def best_fit(lengths: Any, row_length: int, window: int) -> list[list[int]]:
    """Packs a complete list of documents; returns the document numbers of each row."""
    sizes = np.asarray(lengths, dtype=np.int64)
    packer = BestFit(row_length)
    packed = [packer.add(sizes[at : at + window]) for at in range(0, len(sizes), window)]
    rows = []
    for part in [*packed, packer.finish()]:
        rows += np.split(part.documents, np.cumsum(part.counts)[:-1]) if len(part.counts) else []
    return [row.tolist() for row in rows]


@given(LENGTHS, st.integers(64, 100), st.integers(1, 50))
def test_every_document_is_whole_in_exactly_one_row(lengths: list[int], row_length: int, window: int) -> None:
    rows = best_fit(lengths, row_length, window)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[d] for d in row) <= row_length for row in rows)
    assert rows == best_fit(np.array(lengths), row_length, window)


@given(LENGTHS, st.integers(64, 100))
def test_with_one_window_no_two_rows_are_half_empty(lengths: list[int], row_length: int) -> None:
    rows = best_fit(lengths, row_length, window=1000)
    fill = sorted(sum(lengths[d] for d in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > row_length, "best fit would have merged the two rows"


def test_packing_matches_hand_computed_rows() -> None:
    # longest first: 7 opens row 0, 6 row 1, 4 goes into row 1 (full), 3 into row 0 (full)
    assert best_fit([3, 4, 6, 7], 10, window=4) == [[0, 3], [1, 2]]
    assert best_fit([], 10, window=4) == []
    # a second window continues with the rows that have room
    assert best_fit([4, 3, 9, 3], 10, window=2) == [[0, 1, 3], [2]]


def test_document_is_cut_only_to_fill_a_row() -> None:
    """7 and 6 open rows; 5 is cut by one to fit next to 6; 4 may not be cut, so it opens a third row."""
    packer = BestFit(10)
    lengths, spare = np.array([7, 6, 5, 4]), np.array([0, 0, 1, 0])
    parts = [packer.add(lengths, spare), packer.finish()]
    documents, counts, cut = (
        np.concatenate([getattr(p, key) for p in parts]) for key in ("documents", "counts", "cut")
    )
    rows = [part.tolist() for part in np.split(documents, np.cumsum(counts)[:-1])]
    assert sorted(rows) == [[0], [1, 2], [3]]
    assert dict(zip(documents.tolist(), cut.tolist(), strict=True)) == {0: 0, 1: 0, 2: 1, 3: 0}


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(64, 100), st.data())
def test_cut_documents_fit_and_lose_no_more_than_they_may(
    lengths: list[int], row_length: int, data: st.DataObject
) -> None:
    spare = [data.draw(st.integers(0, n - 1)) for n in lengths]
    packer = BestFit(row_length)
    parts = [packer.add(np.array(lengths), np.array(spare)), packer.finish()]
    documents, cut = (np.concatenate([getattr(p, key) for p in parts]) for key in ("documents", "cut"))
    row = np.repeat(np.arange(sum(len(p.counts) for p in parts)), np.concatenate([p.counts for p in parts]))
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    assert np.bincount(row, weights=np.array(lengths)[documents] - cut).max() <= row_length
    assert (cut >= 0).all()
    assert (cut <= np.array(spare)[documents]).all()


def test_rows_are_nearly_full_on_mixed_lengths() -> None:
    lengths = np.random.default_rng(0).integers(50, 2000, 3000)
    rows = best_fit(lengths, 5632, window=1024)
    assert lengths.sum() / (len(rows) * 5632) > 0.99


@pytest.mark.parametrize("lengths", [[0], [11]])
def test_unplaceable_length_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        best_fit(lengths, 10, 4)


@given(st.integers(1, 100), st.data())
def test_draws_are_a_pure_function_of_seed_epoch_and_document(n_anchors: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, n_anchors))
    anchors = np.arange(5, 5 + n_anchors, dtype=np.int32)
    starts = draw_starts(anchors, n, seed=1, epoch=2, document=3)
    draw_starts(anchors, n, seed=1, epoch=2, document=4)  # a draw in between has no effect
    assert np.array_equal(starts, draw_starts(anchors, n, seed=1, epoch=2, document=3))
    assert len(set(starts.tolist())) == n
    assert set(starts.tolist()) <= set(anchors.tolist())


def test_draws_differ_between_seeds_epochs_and_documents() -> None:
    anchors = np.arange(1000, dtype=np.int32)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = {draw_starts(anchors, 300, seed=s, epoch=e, document=d).tobytes() for s, e, d in keys}
    assert len(draws) == len(keys)
