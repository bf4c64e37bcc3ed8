"""What training has to know about a tokenizer folder: which tokenizer it is, and the id of a token.

Reads the JSON files only, so neither `tokenizers` nor `transformers` is needed.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdlm_megatron.errors import DataError

TEXT_MASK = "<text_mask>"
"""The mask token an SDLM folder adds to its base's tokenizer; no part of the fingerprint."""


def fingerprint(folder: str | Path) -> str | None:
    """sha256 (hex) over vocabulary, merges and added tokens of the tokenizer in `folder`; None without its
    files.

    An added `<text_mask>` is left out, so that a base and the SDLM folder made from it have the same
    fingerprint. Depends on the content only, not on how the JSON is written. Raises DataError on a file that
    cannot be read.
    """
    tokenizer = _read(Path(folder))
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


def _ids(folder: Path) -> dict[str, int]:
    tokenizer = _read(folder)
    if tokenizer is None:
        raise DataError(
            "the folder holds no tokenizer",
            where=str(folder),
            fix="name a folder with tokenizer.json (or vocab.json and merges.txt)",
        )
    vocab, _, added = tokenizer
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return {**ids, **added}


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder holds the files of a tokenizer."""
    folder = Path(folder)
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def _read(folder: Path) -> tuple[Any, list[Any], dict[str, int]] | None:
    """`_parse` of the folder as it is now: a start asks four times, and a parse of Qwen2.5's takes half a second."""
    files = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"))
    stamps = tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())
    return _parse(folder, stamps)


@lru_cache(maxsize=2)
def _parse(folder: Path, stamps: tuple) -> tuple[Any, list[Any], dict[str, int]] | None:
    """(vocab, merges, added token -> id) of the folder, or None when it holds no tokenizer."""
    whole, vocab_file, merges_file = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.is_file():
            content = json.loads(whole.read_text(encoding="utf-8"))
            model = content["model"]
            added = {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens") or []}
            return model["vocab"], model.get("merges") or [], added
        if vocab_file.is_file() and merges_file.is_file():
            lines = merges_file.read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
            return json.loads(vocab_file.read_text(encoding="utf-8")), merges, _added_in_config(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"a tokenizer file cannot be read: {type(error).__name__}: {error}",
            where=str(folder),
            fix="fetch the tokenizer files again",
        ) from error
    return None


def _added_in_config(folder: Path) -> dict[str, int]:
    """Added tokens of an old folder without tokenizer.json: they stand in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
    return {entry["content"]: int(i) for i, entry in entries.items()}
