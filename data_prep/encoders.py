"""Text encoders: a uniform interface to tokenizers in which text never produces a special token.

A message that spells `<|im_end|>` must not end its turn. Special tokens are therefore disabled in the tokenizer that
encodes text; only the code that renders the chat structure uses their ids.

`open_encoder` returns the fastest verified encoder: `fastokens`, compared with Hugging Face `tokenizers` on probes
when it is opened and on a sample while it runs; otherwise `tokenizers` itself, with the reason.
"""

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from data_prep.encoding import SpelledTokens, TextEncoder, chat_format, probe_texts, require_id
from data_prep.inst_template import inst_format
from data_prep.piece_tokenizer import PieceTokenizer
from sdlm_megatron.data.chatml import IM_END, IM_START
from sdlm_megatron.data.tokenizer_identity import MOST_TOKENIZER_BYTES, TEXT_MASK, added_tokens, sentencepiece_file
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import optional_file, read_json_object

# Interval of the texts that are verified; prime, so that it cannot align with the turns of regular conversations.
CHECK_EVERY = 509
# Number of texts compared when an encoder is opened; more would delay the start of every process.
N_PROBES = 400


def _pieces(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[start:stop].tolist() for start, stop in pairwise(offsets.tolist())]


def open_encoder(folder: str | Path, mask_token: str = TEXT_MASK) -> TextEncoder:
    """The fastest verified encoder for a tokenizer, which is a folder or a SentencePiece `.model` file.

    Sets the libraries' thread counts to one unless the environment sets them: a build runs one process per core.

    Raises:
        DataError: the tokenizer is missing, cannot be read, or lacks the tokens of a chat format.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoder = _open(folder, mask_token)
    if chat_format(encoder).exchanges:
        encoder.chat = inst_format(folder)
    for token in chat_format(encoder).specials:
        encoder.token_id(token)
    return encoder


def describe(encoder: TextEncoder) -> str:
    """The library of an encoder, and the reason if it is not the fast one."""
    return encoder.backend + (f" ({encoder.reason})" if encoder.reason else "")


def _open(folder: str | Path, mask_token: str) -> TextEncoder:
    if sentencepiece_file(folder):
        return PieceTokenizer(folder, mask_token)
    baseline = TextTokenizer.from_folder(folder, mask_token)
    try:
        return FastTokenizer(baseline)
    except FastokensError as error:
        baseline.reason = str(error)
        return baseline


class TextTokenizer(TextEncoder):
    """Encoder for Hugging Face `tokenizers`.

    Special tokens in text are encoded as plain characters. Added tokens that the tokenizer does not flag as special
    (Qwen2.5: `<tool_call>`…) remain ordinary words of its vocabulary.
    `definition` is the content of a `tokenizer.json`. `mask_token` and ChatML's tokens are treated as special even if
    it does not flag them.
    """

    def __init__(self, definition: dict[str, Any], name: str, mask_token: str = TEXT_MASK) -> None:
        self.name, self.backend = name, f"tokenizers {tokenizers.__version__}"
        always = {mask_token, IM_START, IM_END}
        # All added tokens remain in the definition because `tokenizers` numbers them by their order.
        added = [
            {**entry, "special": bool(entry.get("special")) or entry["content"] in always}
            for entry in definition.get("added_tokens") or []
        ]
        text_only = {**definition, "added_tokens": added, "truncation": None, "padding": None}
        text_only["pre_tokenizer"] = _after_special(definition.get("pre_tokenizer"))
        self.definition = json.dumps(text_only)
        self.added_tokens = [entry["content"] for entry in added]
        self._spelled = SpelledTokens([mask_token, *(entry["content"] for entry in added if entry["special"])])
        self._backend = Tokenizer.from_str(self.definition)
        self._backend.encode_special_tokens = True  # encode them as plain text

    @classmethod
    def from_folder(cls, folder: str | Path, mask_token: str = TEXT_MASK) -> "TextTokenizer":
        """Reads `tokenizer.json`, or vocab.json and merges.txt; raises DataError if they are missing or unusable."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        try:
            if optional_file(folder, path.name, DataError):
                added_tokens(folder)  # checks types and ids
                definition = read_json_object(path, DataError, "download it again", MOST_TOKENIZER_BYTES)
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                added_tokens(folder)  # checks the files that transformers reads
                definition = _converted(folder)
            else:
                raise DataError(
                    "no tokenizer.json",
                    where=str(folder),
                    fix="name a folder with the tokenizer files of the base model",
                )
            return cls(definition, folder.name, mask_token)
        except DataError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exception on a bad definition
            raise DataError(f"the tokenizer cannot be read: {error}", str(path), "download it again") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def token_id(self, token: str) -> int:
        return require_id(self._backend.token_to_id(token), token, self.name)


def _after_special(pre_tokenizer: Any) -> Any:
    """A pre-tokenizer for texts that follow a special token: no space is put before them, as at the start of a text."""
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    if isinstance(steps := pre_tokenizer.get("pretokenizers"), list):
        return {**pre_tokenizer, "pretokenizers": list(map(_after_special, steps))}
    first = pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first"
    return {**pre_tokenizer, "prepend_scheme": "never"} if first else pre_tokenizer


def _converted(folder: Path) -> dict[str, Any]:
    """Content of a tokenizer.json for a folder without one. Only transformers knows the pre-tokenizer of each model."""
    from transformers import AutoTokenizer  # importing it takes seconds

    return json.loads(AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str())


class FastokensError(Exception):
    """`fastokens` cannot be used for a tokenizer."""


class TokenizerMismatch(Exception):
    """`fastokens` returned ids other than those of `tokenizers` while encoding.

    When this is raised the encoder has fallen back to `tokenizers`, so later results are correct. Earlier results were
    verified by sample only and should be discarded.
    """

    def __init__(self, text: str, fast: Sequence[int], slow: Sequence[int]) -> None:
        self.text, self.fast, self.slow = text, list(fast), list(slow)
        super().__init__(text, self.fast, self.slow)

    def __str__(self) -> str:
        shared = min(len(self.fast), len(self.slow))
        at = next((i for i in range(shared) if self.fast[i] != self.slow[i]), shared)
        text = self.text if len(self.text) <= 200 else f"{self.text[:200]}…"
        return f"at token {at}: {self.fast[at : at + 8]} instead of {self.slow[at : at + 8]} for {text!r}"


class FastTokenizer(TextEncoder):
    """Encoder for `fastokens`, verified against a `TextTokenizer`. Raises FastokensError if the library is missing,
    does not support the tokenizer, or differs on a probe."""

    def __init__(self, baseline: TextTokenizer) -> None:
        self._baseline, self._spelled = baseline, baseline._spelled
        self._seen = 0
        for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):  # read when the library first needs threads
            os.environ.setdefault(name, "1")
        try:
            import fastokens
        except ImportError as error:
            raise FastokensError(f"fastokens cannot be imported: {error}") from None
        self.backend = f"fastokens {version('fastokens')}"
        self._fast: Any = _native(fastokens.Tokenizer.from_json_str, baseline.definition)
        probes = probe_texts([*baseline.added_tokens, TEXT_MASK, IM_START, IM_END], N_PROBES, seed=0)
        if difference := self._difference(probes, _pieces(*self._encode(probes))):
            raise FastokensError(f"fastokens returns other ids {difference}")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return _pieces(*self.encode_flat(texts))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._fast is None:
            return self._baseline.encode_flat(texts)
        try:
            ids, offsets = self._encode(texts)
        except FastokensError as error:
            self._give_up(str(error))
            return self._baseline.encode_flat(texts)
        sample = range(-self._seen % CHECK_EVERY, len(texts), CHECK_EVERY)
        self._seen += len(texts)  # continues over calls: small batches are verified as often as large ones
        pieces = [ids[offsets[i] : offsets[i + 1]].tolist() for i in sample]
        if difference := self._difference([texts[i] for i in sample], pieces):
            self._give_up(f"it returned other ids {difference}")
            raise difference
        return ids, offsets

    def token_id(self, token: str) -> int:
        return self._baseline.token_id(token)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        ids, offsets = _native(self._fast.encode_batch_flat, list(texts), **options)
        return np.frombuffer(ids, dtype=np.int32), np.frombuffer(offsets, dtype=np.int64)

    def _difference(self, texts: Sequence[str], pieces: Sequence[list[int]]) -> TokenizerMismatch | None:
        """The first of `texts` for which the baseline's ids differ from `pieces`."""
        expected = self._baseline.encode_batch(texts)
        rows = zip(texts, pieces, expected, strict=True)
        return next((TokenizerMismatch(text, fast, slow) for text, fast, slow in rows if fast != slow), None)

    def _give_up(self, reason: str) -> None:
        self._fast, self.backend = None, self._baseline.backend
        self.reason = f"fastokens was disabled: {reason}"


def _native(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls `fastokens`; converts its exceptions, including panics of its Rust code, to FastokensError."""
    try:
        return call(*args, **options)
    except UnicodeEncodeError:  # the text is invalid for every encoder
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise FastokensError(f"fastokens failed: {type(error).__name__}: {error}") from error
        raise


class _SlowTokenizer(TextEncoder):
    """Encoder for a pure-Python transformers tokenizer, which has no `tokenizers` backend."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return [self._tokenizer.encode(text, **options) for text in texts]

    def token_id(self, token: str) -> int:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        missing = token_id is None or token_id == getattr(self._tokenizer, "unk_token_id", None)
        return require_id(None if missing else token_id, token, type(self._tokenizer).__name__)


# Cache of encoders, with the vocabulary size for which each was made; building one takes a second.
_encoders: WeakKeyDictionary[Any, tuple[int, TextEncoder]] = WeakKeyDictionary()


def as_text_encoder(tokenizer: Any) -> TextEncoder:
    """The encoder of a transformers tokenizer or a `tokenizers.Tokenizer`. A TextEncoder, or any object with its
    `encode_batch` and `token_id`, is returned as is."""
    if hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "token_id"):
        return tokenizer
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return _SlowTokenizer(tokenizer)
    size = backend.get_vocab_size()
    try:
        cached = _encoders.get(tokenizer)
    except TypeError:  # tokenizers.Tokenizer does not support weak references
        return TextTokenizer(json.loads(backend.to_str()), type(tokenizer).__name__)
    if cached is None or cached[0] != size:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        cached = (size, TextTokenizer(json.loads(backend.to_str()), name))
        _encoders[tokenizer] = cached
    return cached[1]
