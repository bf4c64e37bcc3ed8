"""Text of an answer token by token, with the forward pass of each token, and its colors.

The chat, the samples of training and the evaluation show answers through this module.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from rich.text import Text

from sdlm_megatron.errors import neutral

# Blue, orange, violet, green for successive passes; readable on a black and on a white background.
COLORS = ("color(31)", "color(130)", "color(133)", "color(28)")

# Text that a token adds to an answer, and its pass, counted from 1.
TokenText = TypedDict("TokenText", {"text": str, "pass": int})

_UNFINISHED = "\ufffd"  # replacement character: a tokenizer's text for trailing bytes that do not form a character yet


class TextStream:
    """Incremental decoding of tokens to text. A character that is split over tokens appears with the last of them.

    The returned texts add up to `tokenizer.decode` of all tokens without special tokens. The exception is a tokenizer
    with byte fallback that meets bytes which are not text: `decode` then also replaces characters before them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # tokens are decoded together with the previous whole character: alone, a first token may lose its space
        self._context = 0
        self._whole = 0  # the text of tokens[:_whole] ends with a whole character
        self._returned = ""  # text of tokens[_context:] that was already returned

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
        new = ready[len(self._returned) :]
        self._returned = ready if new else self._returned
        if ready == text:
            self._context, self._whole = self._whole, len(self._tokens)
            self._returned = self._text()
        return new

    def flush(self) -> str:
        """The remaining text at the end of an answer; bytes that form no character appear as U+FFFD."""
        text = self._text()
        new, self._returned = text[len(self._returned) :], text
        return new


def token_texts(tokenizer: Any, tokens: Sequence[int], accepted: Sequence[int]) -> list[TokenText]:
    """Text and pass of each token of a decoded row.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: (T,) the row's tokens, or the first of them.
        accepted: tokens kept in each pass.
    """
    stream = TextStream(tokenizer)
    passes = [number for number, count in enumerate(accepted, 1) for _ in range(count)]
    texts = [TokenText({"text": stream.push(t), "pass": p}) for t, p in zip(tokens, passes, strict=False)]
    if texts:
        texts[-1]["text"] += stream.flush()
    return texts


def style_of(number: int) -> str:
    """The rich style of pass `number`."""
    return COLORS[(number - 1) % len(COLORS)]


def colored(answer: Iterable[TokenText]) -> Text:
    """The answer with one color per pass; neighboring passes differ."""
    return Text.assemble(*((neutral(token["text"]), style_of(token["pass"])) for token in answer))


def summary(tokens: int, passes: int, seconds: float) -> str:
    """ "44 tokens in 12 passes: 3.67 per pass, 41.2 tokens/s"."""
    rate = f"{tokens / seconds:.1f}" if seconds > 0 else "?"
    noun = "token" if tokens == 1 else "tokens"
    mean = tokens / max(passes, 1)
    return f"{tokens} {noun} in {passes} pass{'es' * (passes != 1)}: {mean:.2f} per pass, {rate} tokens/s"
