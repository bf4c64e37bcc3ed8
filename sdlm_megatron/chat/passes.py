"""An answer as text, token by token, with the forward pass that each token came in, and in colours.

One rendering for the chat, the samples of training and the evaluation.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from rich.text import Text

COLOURS = ("color(31)", "color(130)", "color(133)", "color(28)")
"""Blue, orange, violet, green, pass after pass; of a brightness that can be read on black and on white."""

Piece = TypedDict("Piece", {"text": str, "pass": int})
"""Text that a token added, and its pass, from 1."""

_UNFINISHED = "\ufffd"
"""What a tokenizer puts in place of bytes that are no whole character, at the end: not one yet."""


class TextStream:
    """Tokens to text as they come. A character that is split over tokens comes with the last of them.

    The texts of all tokens add up to `tokenizer.decode` of them, special tokens left out. (Not quite for bytes that are
    no text in a tokenizer with byte fallback: it then also takes back characters before them.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded together: a first token may lose its space
        self._whole = 0  # the text of the tokens before this one ends with a whole character
        self._given = ""  # what was returned of the text of tokens[_context:]

    def _text(self) -> str:
        text: str = self._tokenizer.decode(
            self._tokens[self._context :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._tokens.append(token)
        text = self._text()
        ready = text.rstrip(_UNFINISHED)
        piece = ready[len(self._given) :]
        self._given = ready if piece else self._given
        if ready == text:
            self._context, self._whole = self._whole, len(self._tokens)
            self._given = self._text()
        return piece

    def flush(self) -> str:
        """What was held back when no token follows; U+FFFD stands for bytes that never became a character."""
        text = self._text()
        piece, self._given = text[len(self._given) :], text
        return piece


def pieces(tokenizer: Any, tokens: Sequence[int], accepted: Sequence[int]) -> list[Piece]:
    """One piece a token of one row of `Decoded`.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: (T,) the row's tokens, or their beginning.
        accepted: tokens kept in each pass.
    """
    stream = TextStream(tokenizer)
    passes = [number for number, count in enumerate(accepted, 1) for _ in range(count)]
    found = [Piece({"text": stream.push(t), "pass": p}) for t, p in zip(tokens, passes, strict=False)]
    if found:
        found[-1]["text"] += stream.flush()
    return found


def style_of(number: int) -> str:
    """The rich style of pass `number`."""
    return COLOURS[(number - 1) % len(COLOURS)]


def coloured(answer: Iterable[Piece]) -> Text:
    """The answer; tokens of one pass share a colour, those of the next have another."""
    return Text.assemble(*((piece["text"], style_of(piece["pass"])) for piece in answer))


def summary(tokens: int, passes: int, seconds: float) -> str:
    """ "44 tokens in 12 passes: 3.67 a pass, 41.2 tokens/s"."""
    rate = f"{tokens / seconds:.1f}" if seconds > 0 else "?"
    noun = "token" if tokens == 1 else "tokens"
    return (
        f"{tokens} {noun} in {passes} pass{'es' * (passes != 1)}: {tokens / max(passes, 1):.2f} a pass, {rate} tokens/s"
    )
