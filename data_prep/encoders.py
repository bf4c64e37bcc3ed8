"""One narrow view of every tokenizer: text to ids with no special token recognised in it.

A message that spells `<|im_end|>` must not end its turn. So special tokens are switched off in the tokenizer
that encodes text, and only the code that writes the chat structure uses their ids.

`open_encoder` gives the fastest encoder that is proved right: `fastokens`, compared with Hugging Face
`tokenizers` when it is opened and by sample while it works; or `tokenizers` itself, with the reason why.
"""

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from data_prep.encoding import SpelledTokens, flatten, known, probe_texts
from data_prep.piece_tokenizer import PieceTokenizer
from sdlm_megatron.data.chatml import IM_END, IM_START
from sdlm_megatron.data.tokenizer_identity import TEXT_MASK, sentencepiece_file
from sdlm_megatron.errors import DataError

CHECK_EVERY = 509
"""One text of so many is encoded twice; a prime, so that every turn of a regular conversation gets its turn."""

N_PROBES = 400
"""Texts compared when an encoder is opened."""


@runtime_checkable
class TextEncoder(Protocol):
    """What rendering needs of a tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; a special token spelled in a text is encoded as the characters it is."""

    def token_id(self, token: str) -> int:
        """Id of a token of the vocabulary; DataError when there is none of this name."""


class BulkEncoder(TextEncoder, Protocol):
    """What a build needs of a tokenizer. Not to be shared between threads; to be opened in the process that uses
    it."""

    @property
    def backend(self) -> str:
        """Name and version of the library that encodes: "fastokens 0.3.5"."""

    @property
    def reason(self) -> str:
        """Why it is not the fast one; empty when it is."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, int32 (n,), and where each text's begin, int64 (len(texts) + 1,); maybe read-only.

        The texts must be valid Unicode (`chat.check_text`). Raises TokenizerMismatch.
        """

    def spelled(self, texts: Sequence[str]) -> int:
        """How many of the texts spell a special token or the mask token."""


def flat(encoder: TextEncoder, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`encode_flat` of any encoder: ids int32 (n,), offsets int64 (len(texts) + 1,)."""
    if hasattr(encoder, "encode_flat"):
        return encoder.encode_flat(texts)
    return flatten(encoder.encode_batch(texts))


def _pieces(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[start:stop].tolist() for start, stop in pairwise(offsets.tolist())]


def open_encoder(folder: str | Path, mask_token: str = TEXT_MASK) -> BulkEncoder:
    """The fastest encoder that is proved right for a tokenizer: a folder, or a SentencePiece `.model` file.

    Sets the libraries' thread counts to one where the environment does not say otherwise: a build runs one process
    a core.

    Raises:
        DataError: there is no tokenizer, it cannot be read, or it lacks the tokens of ChatML.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoder = _open(folder, mask_token)
    for token in (IM_START, IM_END):
        encoder.token_id(token)
    return encoder


def describe(encoder: BulkEncoder) -> str:
    """Which library encodes, and why it is not the fast one."""
    return encoder.backend + (f" ({encoder.reason})" if encoder.reason else "")


def _open(folder: str | Path, mask_token: str) -> BulkEncoder:
    if sentencepiece_file(folder):
        return PieceTokenizer(folder, mask_token)
    judge = TextTokenizer.from_folder(folder, mask_token)
    try:
        return FastTokenizer(judge)
    except FastokensError as error:
        judge.reason = str(error)
        return judge


class TextTokenizer:
    """`BulkEncoder` over Hugging Face `tokenizers`.

    Args:
        definition: content of a `tokenizer.json`.
        name: how messages call it.
        mask_token: spelled out even where the tokenizer does not flag it as special; so are ChatML's tokens.

    Added tokens that the tokenizer does not flag as special (Qwen2.5: `<tool_call>`…) stay ordinary words of
    its vocabulary; the special ones are spelled out.
    """

    def __init__(self, definition: dict[str, Any], name: str, mask_token: str = TEXT_MASK) -> None:
        self.name, self.backend, self.reason = name, f"tokenizers {tokenizers.__version__}", ""
        always = {mask_token, IM_START, IM_END}
        # All added tokens stay in the definition: `tokenizers` numbers them by their order.
        added = [
            {**entry, "special": bool(entry.get("special")) or entry["content"] in always}
            for entry in definition.get("added_tokens") or []
        ]
        text_only = {**definition, "added_tokens": added, "truncation": None, "padding": None}
        self.definition = json.dumps(text_only)
        self.added_tokens = [entry["content"] for entry in added]
        self._spelled = SpelledTokens([mask_token, *(entry["content"] for entry in added if entry["special"])])
        self._backend = Tokenizer.from_str(self.definition)
        self._backend.encode_special_tokens = True  # as text, that is

    @classmethod
    def from_folder(cls, folder: str | Path, mask_token: str = TEXT_MASK) -> "TextTokenizer":
        """Reads `tokenizer.json`, or vocab.json and merges.txt; DataError when they are missing or cannot be used."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        try:
            if path.is_file():
                definition = json.loads(path.read_text(encoding="utf-8"))
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                definition = _converted(folder)
            else:
                raise DataError(
                    "no tokenizer.json", where=str(folder), fix="name a folder with the tokenizer files of the base"
                )
            return cls(definition, folder.name, mask_token)
        except DataError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exception on a bad definition
            raise DataError(f"the tokenizer cannot be read: {error}", where=str(path), fix="fetch it again") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return flatten(self.encode_batch(texts))

    def spelled(self, texts: Sequence[str]) -> int:
        return self._spelled.count(texts)

    def token_id(self, token: str) -> int:
        return known(self._backend.token_to_id(token), token, self.name)


def _converted(folder: Path) -> dict[str, Any]:
    """What a tokenizer.json would hold for an old folder; which rules split the text, only transformers knows."""
    from transformers import AutoTokenizer  # takes seconds to import

    return json.loads(AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str())


class FastokensError(Exception):
    """Why `fastokens` cannot be used for a tokenizer."""


class TokenizerMismatch(Exception):
    """While it worked, `fastokens` gave other ids than `tokenizers`.

    By the time this is raised the encoder has fallen back to `tokenizers`: what it encodes from now on is right.
    What it gave before was compared by sample only, so a careful caller throws that away.
    """

    def __init__(self, text: str, fast: Sequence[int], slow: Sequence[int]) -> None:
        self.text, self.fast, self.slow = text, list(fast), list(slow)
        super().__init__(text, self.fast, self.slow)

    def __str__(self) -> str:
        shared = min(len(self.fast), len(self.slow))
        at = next((i for i in range(shared) if self.fast[i] != self.slow[i]), shared)
        text = self.text if len(self.text) <= 200 else f"{self.text[:200]}…"
        return f"from token {at} on {self.fast[at : at + 8]} instead of {self.slow[at : at + 8]} for {text!r}"


class FastTokenizer:
    """`BulkEncoder` over `fastokens`, with a `TextTokenizer` as its judge.

    Raises FastokensError when the library is missing, does not take the tokenizer, or differs on a probe.
    """

    def __init__(self, judge: TextTokenizer) -> None:
        self._judge = judge
        self._seen = 0
        self.reason = ""
        for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):  # read when the library first needs threads
            os.environ.setdefault(name, "1")
        try:
            import fastokens
        except ImportError as error:
            raise FastokensError(f"fastokens cannot be imported: {error}") from None
        self.backend = f"fastokens {version('fastokens')}"
        self._fast: Any = _native(fastokens.Tokenizer.from_json_str, judge.definition)
        probes = probe_texts([*judge.added_tokens, TEXT_MASK, IM_START, IM_END], N_PROBES, seed=0)
        if difference := self._difference(probes, _pieces(*self._encode(probes))):
            raise FastokensError(f"fastokens gives other ids {difference}")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return _pieces(*self.encode_flat(texts))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._fast is None:
            return self._judge.encode_flat(texts)
        try:
            ids, offsets = self._encode(texts)
        except FastokensError as error:
            self._give_up(str(error))
            return self._judge.encode_flat(texts)
        sample = range(-self._seen % CHECK_EVERY, len(texts), CHECK_EVERY)
        self._seen += len(texts)
        pieces = [ids[offsets[i] : offsets[i + 1]].tolist() for i in sample]
        if difference := self._difference([texts[i] for i in sample], pieces):
            self._give_up(f"it gave other ids {difference}")
            raise difference
        return ids, offsets

    def spelled(self, texts: Sequence[str]) -> int:
        return self._judge.spelled(texts)

    def token_id(self, token: str) -> int:
        return self._judge.token_id(token)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        ids, offsets = _native(self._fast.encode_batch_flat, list(texts), **options)
        return np.frombuffer(ids, dtype=np.int32), np.frombuffer(offsets, dtype=np.int64)

    def _difference(self, texts: Sequence[str], pieces: Sequence[list[int]]) -> TokenizerMismatch | None:
        """The first of `texts` for which the judge gives other ids than `pieces`."""
        judged = self._judge.encode_batch(texts)
        rows = zip(texts, pieces, judged, strict=True)
        return next((TokenizerMismatch(text, fast, slow) for text, fast, slow in rows if fast != slow), None)

    def _give_up(self, reason: str) -> None:
        self._fast, self.backend = None, self._judge.backend
        self.reason = f"fastokens was given up: {reason}"


def _native(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls `fastokens`; FastokensError on what it raises, a panic of its Rust code included."""
    try:
        return call(*args, **options)
    except UnicodeEncodeError:  # a text that no encoder takes
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise FastokensError(f"fastokens failed: {type(error).__name__}: {error}") from error
        raise


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
        return known(None if missing else found, token, type(self._tokenizer).__name__)


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
        known_view = _views.get(tokenizer)
    except TypeError:  # a bare tokenizers.Tokenizer takes no weak reference
        return TextTokenizer(json.loads(backend.to_str()), type(tokenizer).__name__)
    if known_view is None or known_view[0] != size:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        known_view = (size, TextTokenizer(json.loads(backend.to_str()), name))
        _views[tokenizer] = known_view
    return known_view[1]
