"""Truncation of long documents: values computed by hand for a byte tokenizer. The reference's rule is tested
against the oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.chat import RenderedDocument, render
from data_prep.encoders import TextTokenizer
from data_prep.truncate import (
    FITS,
    LONG_ANSWER,
    LONG_PROMPT,
    NO_ANSWER,
    SHORT_ANSWER,
    UNTRAINED,
    keep_whole_turns,
    reference,
)
from tests.byte_tokenizer import definition

BYTES = TextTokenizer(definition(), "bytes")
D4 = {"block_size": 4, "repeat": 3}


def document(*lengths: int, last: str = "") -> RenderedDocument:
    """Renders a user/assistant conversation whose texts have these lengths; no system turn.

    A user turn of text length n has 1 + 5 + n + 2 tokens, an assistant's 1 + 10 + n + 2, of which n + 1 are
    answers.
    """
    turns = [{"from": ("human", "gpt")[i % 2], "value": "x" * n} for i, n in enumerate(lengths)]
    if last:
        turns.append({"from": "human", "value": last})
    return render(turns, BYTES, default_system=None)


def test_document_that_fits_is_unchanged() -> None:
    doc = document(2, 9, last="more")
    kept = keep_whole_turns(doc, max_len=1000, **D4)
    assert kept.n_blocks == 3 * 10 // 4
    assert np.array_equal(kept.input_ids, doc.input_ids)
    assert np.array_equal(kept.anchors, doc.anchors)
    assert (kept.turns_cut, kept.tokens_cut, kept.blocks_missing) == (0, 0, 0)


def test_number_of_blocks_is_limited_by_remaining_room() -> None:
    doc = document(2, 9)
    assert len(doc.input_ids) == 10 + 22
    kept = keep_whole_turns(doc, max_len=32 + 4 * 3 + 3, **D4)
    assert (kept.n_blocks, kept.blocks_missing, kept.tokens_cut) == (3, 4, 0)


def test_whole_turns_are_cut_and_the_rest_ends_with_an_answer() -> None:
    doc = document(2, 9, 5, 50)
    kept = keep_whole_turns(doc, max_len=60, **D4)
    assert len(kept.input_ids) == doc.turns[1].end == 32
    assert (kept.turns_cut, kept.tokens_cut) == (2, 13 + 63)
    assert kept.n_blocks == (60 - 32) // 4
    assert kept.anchors.tolist() == doc.anchors[:10].tolist()


def test_drop_reasons() -> None:
    cases = {
        NO_ANSWER: render([{"from": "human", "value": "x"}], BYTES),
        UNTRAINED: document(2, 0),
        LONG_PROMPT: document(90, 9),
        LONG_ANSWER: document(2, 90),
    }
    short = keep_whole_turns(document(2, 1), max_len=60, block_size=8, repeat=3)
    assert (short.n_blocks, short.drop_reason) == (0, SHORT_ANSWER)
    for reason, doc in cases.items():
        dropped = keep_whole_turns(doc, max_len=60, **D4)
        assert (dropped.n_blocks, dropped.drop_reason) == (0, reason)


def test_reference_rule_cuts_inside_an_answer() -> None:
    doc = document(2, 90)  # header ends at 20, L = 113, R = 91
    kept = reference(doc, max_len=80, **D4)
    assert len(kept.input_ids) == 80 - (80 - 20) // 3
    assert kept.n_blocks == (80 - 60) // 4
    assert kept.tokens_cut == 113 - 60
    assert kept.anchors[-1] == 58, "the last anchor still has a successor"


def test_reference_rule_drops_documents_that_fail_in_the_reference() -> None:
    assert reference(document(90, 9), max_len=60, **D4).drop_reason == LONG_PROMPT
    only_prompt = render([{"from": "human", "value": "x" * 90}], BYTES)
    assert reference(only_prompt, max_len=60, **D4).drop_reason == NO_ANSWER


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=7),
    st.integers(10, 400),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from(sorted(FITS)),
)
def test_kept_tokens_fit_and_are_a_prefix(
    lengths: list[int], max_len: int, block_size: int, repeat: int, rule: str
) -> None:
    doc = document(*lengths)
    kept = FITS[rule](doc, max_len=max_len, block_size=block_size, repeat=repeat)
    if not kept.n_blocks:
        assert kept.drop_reason
        return
    length = len(kept.input_ids)
    assert length + kept.n_blocks * block_size <= max_len
    assert kept.n_blocks <= len(kept.anchors)
    assert kept.anchors[-1] + 1 < length
    assert np.array_equal(kept.input_ids, doc.input_ids[:length])
    assert np.array_equal(kept.anchors, doc.anchors[: len(kept.anchors)])
    assert kept.tokens_cut == len(doc.input_ids) - length
    if rule == "keep_whole_turns":
        assert length in [turn.end for turn in doc.turns]


@pytest.mark.parametrize("rule", sorted(FITS))
def test_both_rules_keep_documents_that_fit(rule: str) -> None:
    doc = document(2, 9, 5, 50, last="bye")
    kept = FITS[rule](doc, max_len=5632, **D4)
    assert len(kept.input_ids) == len(doc.input_ids)
    assert kept.n_blocks == 3 * 61 // 4
