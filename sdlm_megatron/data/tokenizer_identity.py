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

TEXT_MASK = "<text_mask>"
"""Mask token of the SDLM paper's authors, and the default; SDLM folders add it to the tokenizer of their base."""


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
            fix="name a folder with tokenizer.json (or tokenizer.model, or vocab.json and merges.txt)",
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
    whole, vocab_file, merges_file = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if model := sentencepiece_file(folder):
            return _parse_sentencepiece_folder(model)
        if whole.is_file():
            content = json.loads(whole.read_text(encoding="utf-8"))
            model_part = content["model"]
            added = {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens") or []}
            return model_part["vocab"], model_part.get("merges") or [], added
        if vocab_file.is_file() and merges_file.is_file():
            lines = merges_file.read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
            return json.loads(vocab_file.read_text(encoding="utf-8")), merges, _added_beside(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"a tokenizer file cannot be read: {type(error).__name__}: {error}",
            where=str(folder),
            fix="download the tokenizer files again",
        ) from error
    return None


def _parse_sentencepiece_folder(model: Path) -> tuple[Any, list[Any], dict[str, int]]:
    pieces = parse_sentencepiece(model.read_bytes()).pieces
    own = {piece.piece: i for i, piece in enumerate(pieces)}
    added = {token: i for token, i in _added_beside(model.parent).items() if own.get(token) != i}
    return [[piece.piece, piece.score, piece.type] for piece in pieces], [], added


def _added_beside(folder: Path) -> dict[str, int]:
    """Added tokens of a folder without tokenizer.json: listed in two files; tokenizer_config.json takes precedence."""
    plain, config = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {} for name in _BESIDE
    )
    entries = config.get("added_tokens_decoder") or {}
    return {**{t: int(i) for t, i in plain.items()}, **{entry["content"]: int(i) for i, entry in entries.items()}}
