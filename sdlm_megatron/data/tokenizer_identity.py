"""What training has to know about a tokenizer: which one it is, and the id of a token.

A tokenizer is a folder with tokenizer.json, with a SentencePiece tokenizer.model or with vocab.json and merges.txt
(the first of them that is there), or a SentencePiece `.model` file itself. Only these files are read, so neither
`tokenizers`, `sentencepiece` nor `transformers` is needed.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdlm_megatron.data.sentencepiece_model import read_pieces
from sdlm_megatron.errors import DataError

TEXT_MASK = "<text_mask>"
"""The mask token an SDLM folder adds to its base's tokenizer; no part of the fingerprint."""


def fingerprint(folder: str | Path) -> str | None:
    """sha256 (hex) over vocabulary, merges and added tokens of the tokenizer in `folder`; None without its
    files.

    An added `<text_mask>` is left out, so that a base and the SDLM folder made from it have the same
    fingerprint; so are added tokens that a SentencePiece model holds itself. Depends on the content only, not on
    how the files are written. Raises DataError on a file that cannot be read.
    """
    return _fingerprint(Path(folder), _stamps(Path(folder)))


@lru_cache(maxsize=2)
def _fingerprint(folder: Path, stamps: tuple) -> str | None:
    tokenizer = _parse(folder, stamps)
    if tokenizer is None:
        return None
    vocab, merges, added = tokenizer
    content = {
        "vocab": vocab,
        "merges": [m if isinstance(m, list) else m.split(" ", 1) for m in merges],
        "added": sorted([token, i] for token, i in added.items() if token != TEXT_MASK),
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def special_token_id(folder: str | Path, token: str) -> int:
    """The id of `token` in the tokenizer of `folder`; of a token it lacks, the first id after all of its own.

    Raises DataError when the folder holds no tokenizer.
    """
    ids = _ids(Path(folder))
    return ids[token] if token in ids else max(ids.values(), default=-1) + 1


def vocabulary_size(folder: str | Path) -> int:
    """Highest id of the tokenizer in `folder`, added tokens included, plus 1. DataError when it holds no
    tokenizer."""
    return max(_ids(Path(folder)).values(), default=-1) + 1


def added_tokens(folder: str | Path) -> dict[str, int]:
    """Tokens that stand in the tokenizer's files beside its vocabulary, with their ids. DataError as above."""
    return dict(_required(Path(folder))[2])


def sentencepiece_file(folder: str | Path) -> Path | None:
    """The SentencePiece model that is the tokenizer of `folder`, if it is one."""
    folder = Path(folder)
    if folder.is_file():
        return folder if folder.suffix == ".model" else None
    model = folder / "tokenizer.model"
    return model if model.is_file() and not (folder / "tokenizer.json").is_file() else None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder holds the files of a tokenizer."""
    folder = Path(folder)
    whole = (folder / "tokenizer.json").is_file() or sentencepiece_file(folder) is not None
    return whole or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def _ids(folder: Path) -> dict[str, int]:
    vocab, _, added = _required(folder)
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return {**ids, **added}


def _required(folder: Path) -> tuple[Any, list[Any], dict[str, int]]:
    tokenizer = _read(folder)
    if tokenizer is None:
        raise DataError(
            "the folder holds no tokenizer",
            where=str(folder),
            fix="name a folder with tokenizer.json (or tokenizer.model, or vocab.json and merges.txt)",
        )
    return tokenizer


def _read(folder: Path) -> tuple[Any, list[Any], dict[str, int]] | None:
    return _parse(folder, _stamps(folder))


def _stamps(folder: Path) -> tuple:
    """What changes when the files do: a start asks four times, and a parse of Qwen2.5's takes half a second."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", *_BESIDE)
    files = (folder, *(_home(folder) / name for name in names))
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())


def _home(folder: Path) -> Path:
    return folder.parent if folder.is_file() else folder


@lru_cache(maxsize=2)
def _parse(folder: Path, stamps: tuple) -> tuple[Any, list[Any], dict[str, int]] | None:
    """(vocab, merges, added token -> id) of the folder, or None when it holds no tokenizer."""
    whole, vocab_file, merges_file = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if model := sentencepiece_file(folder):
            return _parse_pieces(model)
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
            fix="fetch the tokenizer files again",
        ) from error
    return None


def _parse_pieces(model: Path) -> tuple[Any, list[Any], dict[str, int]]:
    pieces = read_pieces(model.read_bytes())
    own = {piece.text: i for i, piece in enumerate(pieces)}
    added = {token: i for token, i in _added_beside(model.parent).items() if own.get(token) != i}
    return [[piece.text, piece.score, piece.kind] for piece in pieces], [], added


_BESIDE = ("added_tokens.json", "tokenizer_config.json")


def _added_beside(folder: Path) -> dict[str, int]:
    """Added tokens of a folder without tokenizer.json: they stand in two files, of which the second is newer."""
    plain, config = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {} for name in _BESIDE
    )
    entries = config.get("added_tokens_decoder") or {}
    return {**{t: int(i) for t, i in plain.items()}, **{entry["content"]: int(i) for i, entry in entries.items()}}
