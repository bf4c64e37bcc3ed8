"""One narrow view of every tokenizer: text to ids with no special token recognised in it.

A message that spells `<|im_end|>` must not end its turn. So special tokens are switched off in the tokenizer
that encodes text, and only the code that writes the chat structure uses their ids.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from sdlm_megatron.data.tokenizer import TEXT_MASK
from sdlm_megatron.errors import DataError


@runtime_checkable
class TextEncoder(Protocol):
    """What rendering needs of a tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; a special token spelled in a text is encoded as the characters it is."""

    def token_id(self, token: str) -> int:
        """Id of a token of the vocabulary; DataError when there is none of this name."""


class TextTokenizer:
    """`TextEncoder` over Hugging Face `tokenizers`.

    Args:
        definition: content of a `tokenizer.json`.
        name: how messages call it.
        mask_token: spelled out even where the tokenizer does not flag it as special.

    Added tokens that the tokenizer does not flag as special (Qwen2.5: `<tool_call>`…) stay ordinary words of
    its vocabulary; the special ones are spelled out.
    """

    def __init__(self, definition: dict[str, Any], name: str, mask_token: str = TEXT_MASK) -> None:
        self.name = name
        # All added tokens stay in the definition: `tokenizers` numbers them by their order.
        added = [
            {**entry, "special": bool(entry.get("special")) or entry["content"] == mask_token}
            for entry in definition.get("added_tokens") or []
        ]
        text_only = {**definition, "added_tokens": added, "truncation": None, "padding": None}
        self._backend = Tokenizer.from_str(json.dumps(text_only))
        self._backend.encode_special_tokens = True  # as text, that is

    @classmethod
    def from_folder(cls, folder: str | Path, mask_token: str = TEXT_MASK) -> "TextTokenizer":
        """Reads `tokenizer.json`; DataError when it is missing or cannot be used."""
        path = Path(folder) / "tokenizer.json"
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")), Path(folder).name, mask_token)
        except FileNotFoundError:
            raise DataError(
                "no tokenizer.json", where=str(folder), fix="name a folder with a Hugging Face fast tokenizer"
            ) from None
        except Exception as error:  # `tokenizers` raises plain Exception on a bad definition
            raise DataError(f"the tokenizer cannot be read: {error}", where=str(path), fix="fetch it again") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def token_id(self, token: str) -> int:
        return _known(self._backend.token_to_id(token), token, self.name)


class _SlowTokenizer:
    """`TextEncoder` over a transformers tokenizer written in Python, which has no `tokenizers` backend."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return [self._tokenizer.encode(text, **options) for text in texts]

    def token_id(self, token: str) -> int:
        found = self._tokenizer.convert_tokens_to_ids(token)
        missing = found is None or found == getattr(self._tokenizer, "unk_token_id", None)
        return _known(None if missing else found, token, type(self._tokenizer).__name__)


def _known(found: int | None, token: str, name: str) -> int:
    if found is None:
        raise DataError(
            f"the tokenizer has no `{token}`",
            where=name,
            fix="use a tokenizer of the ChatML family (Qwen2.5, SmolLM2…)",
        )
    return found


_views: WeakKeyDictionary[Any, tuple[int, TextEncoder]] = WeakKeyDictionary()
"""Views already made, with the vocabulary size they were made for: building one takes a second."""


def as_text_encoder(tokenizer: Any) -> TextEncoder:
    """The `TextEncoder` of a transformers tokenizer or a `tokenizers.Tokenizer`; of a `TextEncoder`,
    itself."""
    if isinstance(tokenizer, TextEncoder):
        return tokenizer
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return _SlowTokenizer(tokenizer)
    size = backend.get_vocab_size()
    try:
        known = _views.get(tokenizer)
    except TypeError:  # a bare tokenizers.Tokenizer takes no weak reference
        return TextTokenizer(json.loads(backend.to_str()), type(tokenizer).__name__)
    if known is None or known[0] != size:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        known = (size, TextTokenizer(json.loads(backend.to_str()), name))
        _views[tokenizer] = known
    return known[1]
