"""Blocks, positions, targets and visibility match hand-computed cases and slow reference loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlm_megatron.diffusion.layout import (
    IGNORE,
    RowLayout,
    block_count,
    draw_starts,
    expand_document,
    next_token_targets,
    pack_row,
    row_positions,
    row_targets,
)
from sdlm_megatron.diffusion.mask import block_rows, visible, visible_pairs, visible_row
from sdlm_megatron.diffusion.row import make_micro_batch

MASK, EOS = 99, 7
N = IGNORE


def test_block_count() -> None:
    assert block_count(65, 20, 5632, 4, 3) == 15  # 3 * 20 // 4
    assert block_count(250, 20, 256, 4, 3) == 1  # room for 6 tokens
    assert block_count(300, 20, 256, 4, 3) == 0
    assert block_count(10, 5, 100, 1, 3) == 5  # never more blocks than anchors
    assert block_count(10, 0, 100, 4, 3) == 0


def test_document_matches_hand_computed_layout() -> None:
    #         0   1   2   3    4   5
    clean = [10, 11, 12, EOS, 13, 14]
    expanded = expand_document(np.array(clean), np.array([1, 4]), block_size=3, mask_token_id=MASK, eos_token_id=EOS)
    assert expanded.input_ids.tolist() == [*clean, 11, MASK, MASK, 13, MASK, MASK]
    assert expanded.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6]
    # block at 1: 12, then the end of the turn, then nothing; block at 4: 14, then the document ends
    assert expanded.targets.tolist() == [N] * 6 + [12, EOS, N, 14, N, N]


def test_documented_examples_are_correct() -> None:
    """Checks the examples in layout.py, mask.py, row.py and docs/method.md."""
    clean, anchors = np.array([10, 11, 12, 13, 14, 99], dtype=np.int32), np.array([2, 4])
    document = expand_document(clean, anchors, block_size=3, mask_token_id=0, eos_token_id=99)
    assert document.input_ids.tolist() == [*clean, 12, 0, 0, 14, 0, 0]
    assert document.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 4, 5, 6]
    assert document.targets.tolist() == [N] * 6 + [13, 14, 99, 99, N, N]
    assert np.flatnonzero(visible(6, anchors, block_size=3)[7]).tolist() == [0, 1, 6, 7, 8]
    tokens, layout = pack_row([(0, clean, anchors)], block_size=3, mask_token_id=0)
    assert next_token_targets(tokens, layout, 99).tolist() == [N, N, 13, 14, 99, N]
    row = make_micro_batch(tokens, layout, row_length=16, pad_token_id=0, eos_token_id=99)
    labels = (row.label_index, row.label_targets, row.label_slots)
    assert [x.tolist() for x in labels] == [[6, 7, 8, 9], [13, 14, 99, 99], [0, 1, 2, 0]]
    seen = visible(4, np.array([2]), block_size=2)
    assert ["".join("1" if x else "." for x in line) for line in seen] == [
        "1.....",
        "11....",
        "111...",
        "1111..",
        "11..11",
        "11..11",
    ]


def test_visibility_matches_hand_computed_case() -> None:
    seen = visible(3, np.array([1, 2]), block_size=2).astype(int)
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],  # block at 1: clean 0, not clean 1; its own two tokens
        [1, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 1],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    causal = visible(3, np.array([1, 2]), block_size=2, causal_attn=True).astype(int)
    assert causal[3].tolist() == [1, 0, 0, 1, 0, 0, 0]
    assert causal[4].tolist() == [1, 0, 0, 1, 1, 0, 0]


@st.composite
def documents(draw: st.DrawFn) -> tuple[int, list[tuple[int, np.ndarray, np.ndarray]]]:
    """Strategy: a block size and up to four documents, some without blocks, some of one token."""
    size = draw(st.integers(1, 9))
    drawn = []
    for i in range(draw(st.integers(0, 4))):
        length = draw(st.integers(1, 20))
        clean = draw(st.lists(st.integers(0, 9), min_size=length, max_size=length))
        starts = sorted(draw(st.sets(st.integers(0, length - 1), max_size=length)))
        drawn.append((i * 3, np.array(clean, np.int32), np.array(starts, np.int32)))
    return size, drawn


@settings(max_examples=200, deadline=None)
@given(documents(), st.booleans())
def test_rows_follow_the_rules_token_by_token(case: tuple, causal: bool) -> None:
    """Every token of a packed row matches the rules of the method, written as loops."""
    size, docs = case
    tokens, layout = pack_row(docs, block_size=size, mask_token_id=MASK)
    positions, targets = row_positions(layout), row_targets(tokens, layout, EOS)
    length = layout.used + 3
    seen = visible_row(layout, length, causal_attn=causal)
    # kind of each token: (document, "clean" or block number, slot or position)
    kinds = [(d, None, i) for d, (_, clean, _) in enumerate(docs) for i in range(len(clean))]
    kinds += [(d, b, j) for d, (_, _, starts) in enumerate(docs) for b in range(len(starts)) for j in range(size)]
    assert len(kinds) == layout.used == len(tokens)
    for q, (doc, block, place) in enumerate(kinds):
        _, clean, starts = docs[doc]
        if block is None:
            assert (tokens[q], positions[q], targets[q]) == (clean[place], place, IGNORE)
        else:
            p = int(starts[block])
            assert tokens[q] == (clean[p] if place == 0 else MASK)
            assert positions[q] == p + place
            earlier = [int(clean[p + 1 + j]) for j in range(place) if p + 1 + j < len(clean)]
            trained = p + 1 + place < len(clean) and EOS not in earlier
            assert targets[q] == (clean[p + 1 + place] if trained else IGNORE)
        for k, (other, key_block, key_place) in enumerate(kinds):
            if doc != other:
                wanted = False
            elif block is None:
                wanted = key_block is None and key_place <= place
            elif key_block is None:
                wanted = key_place < int(starts[block])
            else:
                wanted = key_block == block and (not causal or key_place <= place)
            assert seen[q, k] == wanted
    assert not seen[: layout.used, layout.used :].any()
    assert (seen[layout.used :] == np.eye(length, dtype=bool)[layout.used :]).all()
    assert visible_pairs(layout, causal_attn=causal) == seen[: layout.used].sum()


@settings(max_examples=100, deadline=None)
@given(documents())
def test_stored_layout_round_trips(case: tuple) -> None:
    size, docs = case
    _, layout = pack_row(docs, block_size=size, mask_token_id=MASK)
    again = RowLayout.from_ints(layout.to_ints(), size)
    for name in ("doc_ids", "clean_lens", "n_blocks", "starts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(layout, name))


def test_damaged_layouts_are_refused() -> None:
    _, layout = pack_row([(0, np.arange(9), np.array([2, 5]))], block_size=4, mask_token_id=MASK)
    for ints in (layout.to_ints()[:-1], layout.to_ints()[:2], np.array([-1], np.int32), np.array([], np.int32)):
        with pytest.raises(ValueError):
            RowLayout.from_ints(ints, 4)


def test_block_rows_of_a_chunk_match_the_document() -> None:
    """Visibility of a chunk of blocks is computed from the chunk alone."""
    starts = np.array([3, 8, 9, 14])
    whole = visible(20, starts, block_size=4)
    part = block_rows(9, starts[1:3], block_size=4)
    np.testing.assert_array_equal(part[:, :9], whole[24:32, :9])
    np.testing.assert_array_equal(part[:, 9:], whole[24:32, 24:32])
    assert not whole[24:32, 9:24].any()


def test_out_of_range_or_repeated_starts_are_refused() -> None:
    for starts in ([5], [-1], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match="ascend strictly"):
            pack_row([(0, np.arange(5), np.array(starts))], block_size=4, mask_token_id=MASK)


def test_draws_depend_on_seed_epoch_and_document_only() -> None:
    anchors = np.arange(100, 180)

    def draw(**changed: int) -> list[int]:
        return draw_starts(anchors, 30, **{"seed": 1, "epoch": 0, "document": 5, **changed}).tolist()

    first = draw()
    np.random.default_rng(0).random(10)
    assert draw() == first
    assert len(set(first)) == 30
    assert first == sorted(first)
    assert set(first) <= set(anchors.tolist())
    assert len({tuple(draw(**change)) for change in ({}, {"seed": 2}, {"epoch": 1}, {"document": 6})}) == 4


def test_draws_are_uniform() -> None:
    counts = np.zeros(20, dtype=int)
    for document in range(4000):
        counts[draw_starts(np.arange(20), 5, seed=0, epoch=0, document=document)] += 1
    expected = 4000 * 5 / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi square, 19 degrees of freedom, 0.1 %


def test_layout_without_target_shift_matches_hand_computed_case() -> None:
    """Anchors and targets are unchanged; the block starts one position later, repeats no token and sees its anchor."""
    clean = np.array([10, 11, 12, EOS, 13, 14], dtype=np.int32)
    tokens, layout = pack_row([(0, clean, np.array([1, 4]))], block_size=3, mask_token_id=MASK, target_shift=False)
    assert tokens.tolist() == [*clean.tolist(), *[MASK] * 6]
    assert layout.starts.tolist() == [2, 5] and layout.anchors.tolist() == [1, 4]
    assert row_positions(layout).tolist()[6:] == [2, 3, 4, 5, 6, 7]
    shifted = pack_row([(0, clean, np.array([1, 4]))], block_size=3, mask_token_id=MASK)
    assert row_targets(tokens, layout, EOS).tolist() == row_targets(*shifted, EOS).tolist()
    for weight in (layout, shifted[1]):
        assert next_token_targets(clean, weight, EOS).tolist() == [N, 12, EOS, N, 14, N]
    seen = visible_row(layout, len(tokens))
    assert seen[6].tolist() == [True, True, *[False] * 4, *[True] * 3, *[False] * 3]  # the block after anchor 1
    assert RowLayout.from_ints(layout.to_ints(), 3, target_shift=False).anchors.tolist() == [1, 4]
