"""Interface of text encoders and their shared parts: detection of spelled special tokens, probe texts."""

import random
from collections.abc import Sequence
from itertools import chain

import numpy as np

from sdlm_megatron.data.chatml import ChatFormat, format_of
from sdlm_megatron.errors import DataError


def flatten(pieces: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated ids, int32 (n,), and the offset of each sequence, int64 (len(pieces) + 1,)."""
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    return np.fromiter(chain.from_iterable(pieces), dtype=np.int32, count=offsets[-1]), offsets


class TextEncoder:
    """Tokenizer in which text never produces a special token. Not thread-safe; open it in the process that uses it."""

    backend = ""
    """Name and version of the library, such as "fastokens 0.3.5"."""
    chat: ChatFormat | None = None
    """The chat format, where its tokens alone do not tell; None: `format_of` its tokens."""
    reason = ""
    """Reason why the fast library is not used; empty if it is."""
    _spelled: "SpelledTokens"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; a special token spelled in a text is encoded as plain characters."""
        raise NotImplementedError

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Concatenated ids, int32 (n,), and the offset of each text, int64 (len(texts) + 1,); may be read-only.

        The texts must be valid Unicode (see `chat.check_text`).

        Raises:
            TokenizerMismatch: the fast library differs from `tokenizers` on a verified text.
        """
        return flatten(self.encode_batch(texts))

    def spelled(self, texts: Sequence[str]) -> int:
        """Number of texts that spell a special token or the mask token."""
        return self._spelled.count(texts)

    def token_id(self, token: str) -> int:
        """Id of a token of the vocabulary; raises DataError if it does not exist."""
        raise NotImplementedError


def encode_flat(encoder: TextEncoder, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`TextEncoder.encode_flat`, also for an object that has only `encode_batch`."""
    return encoder.encode_flat(texts) if hasattr(encoder, "encode_flat") else flatten(encoder.encode_batch(texts))


def chat_format(encoder: TextEncoder) -> ChatFormat:
    """The chat format of the tokenizer's template, or the one whose tokens it has."""
    if chat := getattr(encoder, "chat", None):
        return chat

    def has(token: str) -> bool:
        try:
            encoder.token_id(token)
        except DataError:
            return False
        return True

    return format_of(has)


class SpelledTokens:
    """Counts texts that spell at least one of a set of tokens.

    Almost no text does, so texts are filtered in stages: by the punctuation shared by all tokens of a group (a single
    character is searched at memory speed), by their common prefix, then by the tokens. Qwen2.5 has the groups `<|` and
    `<text_mask>`.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        groups: dict[str, list[str]] = {}
        for token in sorted(set(filter(None, tokens))):
            groups.setdefault(token[:2], []).append(token)
        starts = map(_common_prefix, groups.values())
        rare = ([*(sign for sign in dict.fromkeys(start) if not sign.isalnum()), start] for start in starts)
        self._groups = list(zip(rare, groups.values(), strict=True))

    def count(self, texts: Sequence[str]) -> int:
        """Number of texts that spell at least one of the tokens."""
        matches: set[int] = set()
        for filters, tokens in self._groups:
            left = list(range(len(texts)))  # indices of the texts that have passed all filters so far
            for text_filter in filters:
                left = [i for i in left if text_filter in texts[i]]
            matches.update(i for i in left if any(token in texts[i] for token in tokens))
        return len(matches)


def _common_prefix(tokens: Sequence[str]) -> str:
    first, last = min(tokens), max(tokens)
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differing, len(first))]


def require_id(token_id: int | None, token: str, name: str, alternative: str = "add it to the added tokens") -> int:
    """Returns `token_id`; raises DataError if it is None."""
    if token_id is None:
        fix = f"use a tokenizer with ChatML (Qwen, SmolLM…) or Llama 3's headers, or {alternative}"
        raise DataError(f"the tokenizer has no `{token}`", where=name, fix=fix)
    return token_id


# fmt: off
_PIECES = (
    "the ", "Don't", "I'LL we've", " naïve", "x86_64", "#include", "C# F#", "http://a.b/c?d=1&e=%20", "3.14159",
    "\n", "\n\n\n", "\r\n", "\r", "\t\t", " ", "   ", " " * 40, "\u00a0", "\u2028", "\u3000 ", "\x0b\x0c\x85", "\x00",
    "e\u0301", "A\u030a", "\u0301", "\u0323\u0307", "\u212b", "ﬁ", "\u1e9b\u0323", "q\u0307\u0323", "\u0f71\u0f72",
    "中文字符", "日本語テキスト", "カ\u3099", "한국어", "\u1112\u1161\u11ab", "\u1100\u1161", "\uac00\u11a8", "豈",
    "👩\u200d👩\u200d👧", "🇫🇷", "👍🏽", "❤\ufe0f", "עברית", "العربية", "\u202eabc\u202c", "हिन्दी", "ไทย", "\u0e33",
    "\ue000", "\U000f0000", "\ufffe", "\uffff", "\U0010ffff", "\ufeff", "\u200b", "\u00ad", "\u0378", "\ufffd",
    "{", "}", "=>", "((", "!!", "...", "<", "|", ">", "_", "\\n", '"', "`", "//", "é", "ß", "İ", "ſ", "½", "Ⅷ", "²",
    "'S", "'ſ", "١٢٣", "Ελλ", "Ждё", "\U00020000", "<|", "|>", "<|im_", "end|>", "▁", "<0x0A>", "Ġ", "Ċ",
)
# fmt: on


def probe_texts(tokens: Sequence[str], n: int, seed: int) -> list[str]:
    """`n` texts, deterministic in `seed`, on which tokenizers tend to differ: normalization forms, scripts, white
    space, and the tokens in `tokens` spelled out, whole or in part, next to these."""
    # Random concatenations exercise the boundaries between the parts, where pre-tokenizers differ.
    draw = random.Random(seed)
    spelled = sorted(set(filter(None, tokens))) or ["<|im_end|>"]
    texts = [*_PIECES, *spelled[: n // 4]]
    while len(texts) < n:
        kind, length = draw.random(), int(draw.expovariate(1 / 8)) + 1
        if kind < 0.5:
            parts = draw.choices(_PIECES, k=length)
        elif kind < 0.8:
            parts = [draw.choice(_PIECES if draw.random() < 0.6 else spelled) for _ in range(length)]
        else:
            parts = [_any_character(draw) for _ in range(length)]
        if draw.random() < 0.2:
            token = draw.choice(spelled)
            parts.insert(draw.randrange(len(parts) + 1), token[: draw.randrange(len(token) + 1)])
        texts.append("".join(parts))
    return texts[:n]


def _any_character(draw: random.Random) -> str:
    code = draw.randrange(0x110000) if draw.random() < 0.3 else draw.randrange(0x3000)
    # surrogates are not valid text
    return chr(code) if not 0xD800 <= code < 0xE000 else " "
