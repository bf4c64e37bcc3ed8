"""Answers as text: characters split over tokens, colours by pass, summary line."""

from typing import Any

import pytest
from byte_tokenizer import PAD, write_folder
from hypothesis import given
from hypothesis import strategies as st
from rich.color import Color
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sdlm_megatron.chat.passes import COLORS, TextStream, colored, summary, token_texts

MIXED = "naïve “quotes”\n你好，世界！🙂👩‍👩‍👧 \ufffd 한국어"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tokenizer with one token per byte."""
    return AutoTokenizer.from_pretrained(write_folder(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def fallback() -> Any:
    """Tokenizer that decodes like SentencePiece: a space before each word, the first stripped, bytes as <0x..>."""
    words = {"▁hello": 256, "▁world": 257, "ing": 258, "▁": 259}
    vocab = {**{f"<0x{i:02X}>": i for i in range(256)}, **words}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def stream(tokenizer: Any, ids: list[int]) -> list[str]:
    """Text emitted for each token and at the end."""
    text = TextStream(tokenizer)
    return [*(text.push(i) for i in ids), text.flush()]


def test_split_characters_are_emitted_whole(tokenizer: Any) -> None:
    ids = list(MIXED.encode())
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == MIXED
    assert pieces[-1] == ""
    # a character is emitted with its last byte, without a placeholder before
    assert [f for f in pieces if f] == [*MIXED.partition("\ufffd")[0], "\ufffd ", *MIXED.partition("\ufffd ")[2]]


def test_special_tokens_are_left_out(tokenizer: Any) -> None:
    assert stream(tokenizer, [*b"a", PAD, *b"b"]) == ["a", "", "b", ""]


@given(ids=st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x41]))))
def test_streamed_bytes_equal_decode(tokenizer: Any, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(
    parts=st.lists(
        st.one_of(
            st.text("aé你🙂 \n\u0301").map(lambda text: [*text.encode()]), st.integers(256, 259).map(lambda i: [i])
        )
    )
)
def test_streamed_words_and_byte_tokens_equal_decode(fallback: Any, parts: list[list[int]]) -> None:
    ids = [i for part in parts for i in part]
    assert "".join(stream(fallback, ids)) == fallback.decode(ids, clean_up_tokenization_spaces=False)


def test_leading_spaces_are_kept(fallback: Any) -> None:
    assert stream(fallback, [256, 257, 258, 256]) == ["hello", " world", "ing", " hello", ""]


def test_pieces_carry_their_pass(tokenizer: Any) -> None:
    ids = [*"a你b".encode(), 0xE4]
    pieces = token_texts(tokenizer, ids, [2, 3, 1])
    assert [(p["text"], p["pass"]) for p in pieces] == [("a", 1), ("", 1), ("", 2), ("你", 2), ("b", 2), ("\ufffd", 3)]
    assert token_texts(tokenizer, ids[:1], [2]) == [{"text": "a", "pass": 1}]  # without the end token
    assert token_texts(tokenizer, [], []) == []
    text = colored(pieces)
    assert text.plain == "a你b\ufffd"
    assert {str(span.style) for span in text.spans if text.plain[span.start : span.end] in ("你", "b")} == {COLORS[1]}


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of a colour of the 256-colour palette."""
    rgb = [c / 255 for c in Color.parse(colour).get_truecolor()]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", COLORS)
def test_colours_are_readable_on_black_and_white(colour: str) -> None:
    light = luminance(colour)
    assert 1.05 / (light + 0.05) > 4
    assert (light + 0.05) / 0.05 > 4


def test_summary() -> None:
    assert summary(44, 12, 2.0) == "44 tokens in 12 passes: 3.67 per pass, 22.0 tokens/s"
    assert summary(1, 1, 0.0) == "1 token in 1 pass: 1.00 per pass, ? tokens/s"
