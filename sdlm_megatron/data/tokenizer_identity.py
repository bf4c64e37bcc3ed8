"""Identity of a tokenizer and its token ids, read from its files alone.

A tokenizer is a folder with tokenizer.json, with a SentencePiece tokenizer.model, or with vocab.json and merges.txt
(the first that exists), or a SentencePiece `.model` file itself. Training needs neither `tokenizers` nor
`transformers` for this; protobuf is imported for SentencePiece models only.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdlm_megatron.errors import DataError
from sdlm_megatron.files import checked, optional_file, read_json_object, regular_file

TEXT_MASK = "<text_mask>"
"""Mask token of the SDLM paper's authors, and the default; SDLM folders add it to the tokenizer of their base."""

MOST_TOKENIZER_BYTES = 128 << 20
"""Largest file of a tokenizer; 256,000 entries take 33 MB."""
MOST_ID = 10_000_000
_FIX = "download the tokenizer's files again"


def fingerprint(folder: str | Path, mask_token: str = TEXT_MASK) -> str | None:
    """sha256 (hex) over vocabulary, merges and added tokens of a tokenizer; None if there are no tokenizer files.

    Depends on content only, not on formatting. Added tokens that a SentencePiece model already contains are excluded.

    Args:
        mask_token: excluded too if it is an added token, so a base and the SDLM folder made from it have the same
            fingerprint.

    Raises:
        DataError: a tokenizer file cannot be read.
    """
    return _fingerprint(Path(folder), mask_token, _stamps(Path(folder)))


def same_tokenizer(folder: str | Path, manifest: Mapping[str, Any]) -> bool | None:
    """Whether a dataset was made with the tokenizer in `folder`; None if one of the fingerprints is missing."""
    recorded = manifest["tokenizer"].get("fingerprint")
    current = fingerprint(folder, manifest.get("mask_token", TEXT_MASK))
    if current is None or recorded is None:
        return None
    # Datasets built before the mask token was configurable left out <text_mask> only.
    return recorded in (current, fingerprint(folder))


@lru_cache(maxsize=4)
def _fingerprint(folder: Path, mask_token: str, stamps: tuple) -> str | None:
    tokenizer = _parse(folder, stamps)
    if tokenizer is None:
        return None
    vocab, merges, added = tokenizer
    content = {
        "vocab": vocab,
        "merges": [m if isinstance(m, list) else m.split(" ", 1) for m in merges],
        "added": sorted([token, i] for token, i in added.items() if token != mask_token),
    }
    # Canonical JSON: the formatting of the tokenizer's files must not matter.
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def special_token_id(folder: str | Path, token: str) -> int:
    """Id of `token`; for a token the tokenizer lacks, the first id after all of its own. Raises DataError if the folder
    contains no tokenizer."""
    ids = _ids(Path(folder))
    return ids[token] if token in ids else max(ids.values(), default=-1) + 1


def vocabulary_size(folder: str | Path) -> int:
    """Highest token id, added tokens included, plus 1. Raises DataError as `special_token_id`."""
    return max(_ids(Path(folder)).values(), default=-1) + 1


def added_tokens(folder: str | Path) -> dict[str, int]:
    """Ids of the tokens listed beside the vocabulary. Raises DataError as `special_token_id`."""
    return dict(_required(Path(folder))[2])


def own_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The chat template of a model folder, "" if it has none, and its special tokens by name."""
    file, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_json_object(path, DataError, _FIX) if path.is_file() else {}
    own = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    if isinstance(own, list):  # of several templates by name
        own = next((e.get("template") for e in own if isinstance(e, dict) and e.get("name") == "default"), None)
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    special = {key: text for key, text in texts.items() if text and isinstance(text, str)}
    return own if isinstance(own, str) else "", special


def sentencepiece_file(folder: str | Path) -> Path | None:
    """The SentencePiece model of a tokenizer; None if it is of another kind."""
    folder = Path(folder)
    if folder.is_file():
        return folder if folder.suffix == ".model" else None
    model = folder / "tokenizer.model"
    return model if model.is_file() and not (folder / "tokenizer.json").is_file() else None


def parse_sentencepiece(model: bytes) -> Any:
    """A SentencePiece model as `sentencepiece_model_pb2.ModelProto`, whose `pieces` have text, score and type. Raises
    ValueError if the bytes are not a SentencePiece model, or protobuf is too old for the installed sentencepiece."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # noqa: BLE001 - ImportError, or protobuf's VersionError, which old versions lack
        raise ValueError(f"sentencepiece needs another protobuf (pip install -U protobuf): {error}") from None
    from google.protobuf.message import DecodeError

    try:
        content = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError(f"not a SentencePiece model: {error}") from None
    # protobuf returns text that is not UTF-8 as bytes
    if not content.pieces or not all(piece.piece and isinstance(piece.piece, str) for piece in content.pieces):
        raise ValueError("not a SentencePiece model: its vocabulary is empty or has a piece without valid text")
    return content


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder contains tokenizer files."""
    folder = Path(folder)
    whole = (folder / "tokenizer.json").is_file() or sentencepiece_file(folder) is not None
    return whole or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def _ids(folder: Path) -> dict[str, int]:
    vocab, _, added = _required(folder)
    # A Unigram vocabulary is a list of [text, score, …]; ids are positions.
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return {**ids, **added}


def _required(folder: Path) -> tuple[Any, list[Any], dict[str, int]]:
    tokenizer = _parse(folder, _stamps(folder))
    if tokenizer is None:
        raise DataError(
            "the folder contains no tokenizer",
            where=str(folder),
            fix="name a folder with tokenizer.json (or tokenizer.model, or vocab.json and merges.txt); to get one: "
            "hf download OWNER/NAME --local-dir FOLDER",
        )
    return tokenizer


_BESIDE = ("added_tokens.json", "tokenizer_config.json")


def _stamps(folder: Path) -> tuple:
    """Cache key that changes with the files. A start asks four times; parsing Qwen2.5's files takes half a second."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", *_BESIDE)
    home = folder.parent if folder.is_file() else folder
    files = (folder, *(home / name for name in names))
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())


@lru_cache(maxsize=2)
def _parse(folder: Path, stamps: tuple) -> tuple[Any, list[Any], dict[str, int]] | None:
    """(vocabulary, merges, added token -> id); None if the folder contains no tokenizer."""
    if model := sentencepiece_file(folder):
        return _parse_sentencepiece_folder(model)
    if whole := optional_file(folder, "tokenizer.json", DataError):
        content = read_json_object(whole, DataError, _FIX, MOST_TOKENIZER_BYTES)
        model_part = checked(content, "model", dict, whole, DataError)
        vocab, merges = _vocabulary(model_part.get("vocab"), whole), model_part.get("merges") or []
        if not isinstance(merges, list) or not all(isinstance(m, str | list) for m in merges):
            raise DataError("merges is not a list of pairs of tokens", f"{whole}, field model.merges", _FIX)
        added = content.get("added_tokens") or []
        entries = [(e.get("content"), e.get("id")) if isinstance(e, dict) else e for e in _list(added)]
        return vocab, merges, _checked_ids(entries, f"{whole}, field added_tokens")
    vocab_file, merges_file = (optional_file(folder, n, DataError) for n in ("vocab.json", "merges.txt"))
    if vocab_file and merges_file:
        text = _read_bytes(merges_file).decode(errors="replace")
        merges = [line for line in text.splitlines() if line and not line.startswith("#version")]
        vocab = _vocabulary(read_json_object(vocab_file, DataError, _FIX, MOST_TOKENIZER_BYTES), vocab_file)
        return vocab, merges, added_beside(folder)
    return None


def _vocabulary(vocab: Any, file: Path) -> Any:
    """`vocab` if it maps tokens to ids, or is a list of [token, score, …]."""
    if isinstance(vocab, dict):
        _checked_ids(vocab.items(), f"{file}, field model.vocab")
    elif not (isinstance(vocab, list) and all(isinstance(e, list) and e and isinstance(e[0], str) for e in vocab)):
        raise DataError("vocab does not list the tokens", f"{file}, field model.vocab", _FIX)
    return vocab


def _checked_ids(entries: Any, where: str) -> dict[str, int]:
    """(token, id) pairs as a dictionary; DataError where a token is no text or an id no number of a vocabulary."""
    for entry in entries:
        if not isinstance(entry, tuple) or not isinstance(entry[0], str) or type(entry[1]) is not int:
            raise DataError(f"expected tokens with their ids, got {entry!r:.60}", where, _FIX)
        if not 0 <= entry[1] <= MOST_ID:
            raise DataError(f"token {entry[0]!r:.60} has id {entry[1]}, expected 0 to {MOST_ID:,}", where, _FIX)
    return dict(entries)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_bytes(path: Path) -> bytes:
    if (size := path.stat().st_size) > MOST_TOKENIZER_BYTES:
        raise DataError(f"{path.name} has {size:,} bytes, no tokenizer is so large", str(path), _FIX)
    return path.read_bytes()


def _parse_sentencepiece_folder(model: Path) -> tuple[Any, list[Any], dict[str, int]]:
    try:
        pieces = parse_sentencepiece(_read_bytes(regular_file(model.parent, model.name, DataError))).pieces
    except ValueError as error:
        raise DataError(f"the tokenizer cannot be read: {error}", str(model), _FIX) from None
    own = {piece.piece: i for i, piece in enumerate(pieces)}
    added = {token: i for token, i in added_beside(model.parent).items() if own.get(token) != i}
    return [[piece.piece, piece.score, piece.type] for piece in pieces], [], added


def added_beside(folder: Path) -> dict[str, int]:
    """Added tokens that a folder lists outside tokenizer.json; tokenizer_config.json takes precedence.

    Raises:
        DataError: one of the two files cannot be read.
    """
    plain, config = (
        read_json_object(path, DataError, _FIX) if (path := optional_file(folder, name, DataError)) else {}
        for name in _BESIDE
    )
    where = f"{folder / _BESIDE[1]}, field added_tokens_decoder"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise DataError("added_tokens_decoder is not an object", where, _FIX)
    entries = [
        (e.get("content"), int(i)) if isinstance(e, dict) and i.isdecimal() and len(i) < 20 else (i, e)
        for i, e in decoder.items()
    ]
    return {**_checked_ids(plain.items(), str(folder / _BESIDE[0])), **_checked_ids(entries, where)}
