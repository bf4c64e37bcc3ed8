"""Encoder for SentencePiece `.model` files."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from data_prep.encoding import SpelledTokens, TextEncoder, require_id
from sdlm_megatron.data.chatml import IM_END, IM_START
from sdlm_megatron.data.tokenizer_identity import TEXT_MASK, added_tokens, parse_sentencepiece, sentencepiece_file
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import optional_file, read_json_object

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # ModelProto.SentencePiece.Type


class VocabularyPiece(NamedTuple):
    """Entry of a SentencePiece vocabulary; its id is its index."""

    text: str
    score: float
    kind: int


class PieceTokenizer(TextEncoder):
    """Encodes with the sentencepiece package, after completing the vocabulary of the model.

    SentencePiece never produces a control piece from text, and always produces a user-defined piece where it is
    spelled. Special tokens therefore become control pieces: ChatML's, the mask token, user-defined pieces and added
    tokens of the form `<|…|>`, and tokens that tokenizer_config.json or special_tokens_map.json declare as special.
    Other added tokens (`<tool_call>`…) become user-defined pieces; user-defined pieces that are not special (runs of
    white space, `<table>`…) are unchanged.

    Most models prepend a space to a text. In a rendered conversation every text follows a special token, where
    transformers 5 adds no space; neither does this class, unless tokenizer_config.json has `"legacy": true`. In that
    case every text gets the space, including role names and newlines.

    `source` is a `.model` file or a folder with tokenizer.model; raises DataError if it is missing or cannot be read.
    """

    backend = f"sentencepiece {sentencepiece.__version__}"
    reason = "fastokens does not support SentencePiece models"

    def __init__(self, source: str | Path, mask_token: str = TEXT_MASK) -> None:
        path = sentencepiece_file(source)
        if path is None:
            raise DataError("no tokenizer.model", str(source), "name a folder with tokenizer.model, or a .model file")
        self.name = str(path)
        added = added_tokens(source)
        config = _read_json(path.parent, "tokenizer_config.json")
        special = {mask_token, IM_START, IM_END}
        special |= set(_declared_special(config))
        special |= set(_declared_special(_read_json(path.parent, "special_tokens_map.json")))
        # Tokens of the form <|…|> that the config explicitly declares as ordinary words.
        words = {entry["content"] for entry in _entries(config) if not entry.get("special")}
        try:
            model = parse_sentencepiece(path.read_bytes())
            pieces = complete_vocabulary(vocabulary(model), added, special, words)
            prefix = config.get("legacy") is True and config.get("add_prefix_space") is not False
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(serialize(model, pieces, dummy_prefix=prefix))
        except (ValueError, RuntimeError) as error:
            what = f"the tokenizer cannot be read: {error}"
            raise DataError(what, where=self.name, fix="download it again") from error
        self._ids = {**{piece.text: i for i, piece in enumerate(pieces)}, **added}
        self._spelled = SpelledTokens([mask_token, *(p.text for p in pieces if p.kind in (CONTROL, UNKNOWN))])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def token_id(self, token: str) -> int:
        alternative = "assign the token an id in an added_tokens.json beside the model"
        return require_id(self._ids.get(token), token, self.name, alternative)


def vocabulary(model: Any) -> list[VocabularyPiece]:
    """Pieces of a ModelProto, by id."""
    return [VocabularyPiece(piece.piece, piece.score, piece.type) for piece in model.pieces]


def serialize(model: Any, pieces: Sequence[VocabularyPiece], *, dummy_prefix: bool) -> bytes:
    """The model with another vocabulary; without `dummy_prefix`, no space is prepended to a text."""
    result = type(model)()
    result.CopyFrom(model)
    # Self-test samples list the pieces expected for some texts, with the prepended space; a library that checks them
    # on loading would reject the changed vocabulary. Newer schemas do not know the field.
    result.DiscardUnknownFields()
    if "self_test_data" in result.DESCRIPTOR.fields_by_name:
        result.ClearField("self_test_data")
    del result.pieces[:]
    for piece in pieces:
        result.pieces.add(piece=piece.text, score=piece.score, type=piece.kind)
    if not dummy_prefix:
        result.normalizer_spec.add_dummy_prefix = False
    return result.SerializeToString()


def complete_vocabulary(
    pieces: Sequence[VocabularyPiece], added: dict[str, int], special: Collection[str], words: Collection[str]
) -> list[VocabularyPiece]:
    """The vocabulary with added tokens at their ids, each of the kind that `PieceTokenizer` describes.

    An added token may replace the piece at its id, and ids may be skipped.
    """
    # A piece whose text is an added token with another id is dropped: two pieces of one text are invalid.
    by_id = {i: piece for i, piece in enumerate(pieces) if added.get(piece.text, i) == i}
    for token, i in added.items():
        kind = UNKNOWN if i < len(pieces) and pieces[i].kind == UNKNOWN else USER_DEFINED
        by_id[i] = VocabularyPiece(token.replace(" ", "▁"), 0.0, kind)
    for i, piece in by_id.items():
        looks_special = piece.text.startswith("<|") and piece.text.endswith("|>") and piece.text not in words
        if piece.text in special or (piece.kind == USER_DEFINED and looks_special):
            by_id[i] = piece._replace(kind=UNKNOWN if piece.kind == UNKNOWN else CONTROL)
    return [by_id.get(i, VocabularyPiece(f"<unused id {i}>", 0.0, CONTROL)) for i in range(max(by_id) + 1)]


def _entries(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Added tokens described in tokenizer_config.json."""
    decoder = config.get("added_tokens_decoder")
    entries = decoder.values() if isinstance(decoder, dict) else ()
    yield from (entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("content"), str))


def _declared_special(config: dict[str, Any]) -> Iterator[str]:
    """Tokens that a JSON file declares as special: `"eos_token"`, `"additional_special_tokens"`, `"special": true`."""
    yield from (entry["content"] for entry in _entries(config) if entry.get("special"))
    for key, value in config.items():
        if key.endswith(("_token", "special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                content = token.get("content") if isinstance(token, dict) else token
                if isinstance(content, str):
                    yield content


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = optional_file(folder, name, DataError)
    return read_json_object(path, DataError, "download it again") if path else {}
