"""`BulkEncoder` over SentencePiece `.model` files."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_prep.encoding import SpelledTokens, flatten, known
from sdlm_megatron.data.chatml import IM_END, IM_START
from sdlm_megatron.data.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, Piece, read_pieces, with_pieces
from sdlm_megatron.data.tokenizer_identity import TEXT_MASK, added_tokens, sentencepiece_file
from sdlm_megatron.errors import DataError


class PieceTokenizer:
    """Encodes with the sentencepiece package, from a model whose vocabulary is completed first.

    SentencePiece never makes a control piece out of text, and always a user-defined one where it is spelled. So the
    special tokens are made control pieces: ChatML's, the mask token, user-defined pieces and added tokens that look
    like `<|…|>`, and what tokenizer_config.json or special_tokens_map.json flags or names as special. Other added
    tokens (`<tool_call>`…) are made user-defined pieces, and user-defined pieces that are not special (runs of white
    space, `<table>`…) stay what they are.

    The space that most models put in front of a text: in a rendered conversation every text follows a special token,
    where transformers 5 puts none. So there is none here, unless tokenizer_config.json says `"legacy": true`: then it
    stands in front of every text, role name and newline included.

    Args:
        source: a `.model` file, or a folder with tokenizer.model.
        mask_token: spelled out like a special token.

    Raises DataError when there is no model or it cannot be read.
    """

    backend = f"sentencepiece {sentencepiece.__version__}"
    reason = "fastokens reads no SentencePiece model"

    def __init__(self, source: str | Path, mask_token: str = TEXT_MASK) -> None:
        path = sentencepiece_file(source)
        if path is None:
            raise DataError("no tokenizer.model", where=str(source), fix="name a folder that has one, or a .model file")
        self.name = str(path)
        config = _read_json(path.parent / "tokenizer_config.json")
        special = {mask_token, IM_START, IM_END}
        special |= set(_named(config)) | set(_named(_read_json(path.parent / "special_tokens_map.json")))
        words = {entry["content"] for entry in _entries(config) if not entry.get("special")}
        added = added_tokens(source)
        try:
            model = path.read_bytes()
            pieces = _complete(read_pieces(model), added, special, words)
            prefix = config.get("legacy") is True and config.get("add_prefix_space") is not False
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(with_pieces(model, pieces, dummy_prefix=prefix))
        except (ValueError, RuntimeError) as error:
            raise DataError(f"the tokenizer cannot be read: {error}", where=self.name, fix="fetch it again") from error
        self._ids = {**{piece.text: i for i, piece in enumerate(pieces)}, **added}
        self._spelled = SpelledTokens([mask_token, *(p.text for p in pieces if p.kind in (CONTROL, UNKNOWN))])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return flatten(self.encode_batch(texts))

    def spelled(self, texts: Sequence[str]) -> int:
        return self._spelled.count(texts)

    def token_id(self, token: str) -> int:
        way_out = "give the token an id in an added_tokens.json beside the model"
        return known(self._ids.get(token), token, self.name, way_out)


def _complete(
    pieces: Sequence[Piece], added: dict[str, int], special: Collection[str], words: Collection[str]
) -> list[Piece]:
    """The vocabulary with the added tokens at their ids, each of the kind `PieceTokenizer` says.

    An added token may take the id of a piece, which is then gone, and ids may be left out.
    """
    by_id = {i: piece for i, piece in enumerate(pieces) if added.get(piece.text, i) == i}
    for token, i in added.items():
        kind = UNKNOWN if i < len(pieces) and pieces[i].kind == UNKNOWN else USER_DEFINED
        by_id[i] = Piece(token.replace(" ", "▁"), 0.0, kind)
    for i, piece in by_id.items():
        looks_special = piece.text.startswith("<|") and piece.text.endswith("|>") and piece.text not in words
        if piece.text in special or (piece.kind == USER_DEFINED and looks_special):
            by_id[i] = Piece(piece.text, piece.score, UNKNOWN if piece.kind == UNKNOWN else CONTROL)
    return [by_id.get(i, Piece(f"<unused id {i}>", 0.0, CONTROL)) for i in range(max(by_id) + 1)]


def _entries(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Added tokens as tokenizer_config.json describes them."""
    yield from (config.get("added_tokens_decoder") or {}).values()


def _named(config: dict[str, Any]) -> Iterator[str]:
    """Tokens a JSON file calls special: `"eos_token": …`, `"additional_special_tokens": […]`, `"special": true`."""
    yield from (entry["content"] for entry in _entries(config) if entry.get("special"))
    for key, value in config.items():
        if key.endswith(("_token", "special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                content = token.get("content") if isinstance(token, dict) else token
                if isinstance(content, str):
                    yield content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"the file is no JSON: {error}", where=str(path), fix="fetch it again") from error
