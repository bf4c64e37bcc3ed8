"""Packing: nothing is lost, nothing is split, rows are full, and the result depends on the input alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import best_fit, order
from sdlm_megatron.diffusion.layout import draw_starts

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


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
    assert len(fill) < 2 or fill[0] + fill[1] > row_length, "best fit would have put one into the other"


def test_by_hand() -> None:
    # longest first: 7 opens row 0, 6 row 1, 4 goes into row 1 (full), 3 into row 0 (full)
    assert best_fit([3, 4, 6, 7], 10, window=4) == [[3, 0], [2, 1]]
    assert best_fit([], 10, window=4) == []


def test_rows_are_nearly_full_on_mixed_lengths() -> None:
    lengths = np.random.default_rng(0).integers(50, 2000, 3000)
    rows = best_fit(lengths, 5632, window=1024)
    assert lengths.sum() / (len(rows) * 5632) > 0.99


@pytest.mark.parametrize("lengths", [[0], [11]])
def test_a_length_that_cannot_be_placed_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        best_fit(lengths, 10, 4)


def test_order_is_a_pure_function_of_its_arguments() -> None:
    first = order(7, 0, 50, "rows")
    assert sorted(first) == list(range(50))
    assert np.array_equal(first, order(7, 0, 50, "rows"))
    for other in (order(8, 0, 50, "rows"), order(7, 1, 50, "rows"), order(7, 0, 50, "documents")):
        assert not np.array_equal(first, other)


@given(st.integers(1, 100), st.data())
def test_draws_are_a_pure_function_of_seed_epoch_and_document(n_anchors: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, n_anchors))
    anchors = np.arange(5, 5 + n_anchors, dtype=np.int32)
    starts = draw_starts(anchors, n, seed=1, epoch=2, document=3)
    draw_starts(anchors, n, seed=1, epoch=2, document=4)  # a draw in between changes nothing
    assert np.array_equal(starts, draw_starts(anchors, n, seed=1, epoch=2, document=3))
    assert len(set(starts.tolist())) == n
    assert set(starts.tolist()) <= set(anchors.tolist())


def test_draws_differ_between_seeds_epochs_and_documents() -> None:
    anchors = np.arange(1000, dtype=np.int32)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = {draw_starts(anchors, 300, seed=s, epoch=e, document=d).tobytes() for s, e, d in keys}
    assert len(draws) == len(keys)
