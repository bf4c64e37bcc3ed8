"""The pieces of a SentencePiece `.model` file, read and written without the sentencepiece package.

The file is one protobuf message. Field 1, repeated, is a piece: {1: text, 2: score float32, 3: kind}; field 3 is the
normalizer's settings, in which field 3 says whether a space is put in front of every text; field 4 holds texts with
the pieces they must give when the model is loaded.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces. A control piece never comes from text; a user-defined one always does where it is spelled."""

_PIECE, _NORMALIZER, _SELF_TEST = 1, 3, 4
_VARINT, _BYTES = 0, 2
_SIZES = {1: 8, _BYTES: 0, 5: 4}
"""Wire types that are not varints -> size in bytes; the size of `_BYTES` stands in front of it."""
_NO_DUMMY_PREFIX = b"\x18\x00"
"""Normalizer settings with nothing but field 3 = false."""


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


def read_pieces(model: bytes) -> list[Piece]:
    """The vocabulary of a model, by id. ValueError when the bytes are no SentencePiece model."""
    pieces = [_piece(value) for field, value, _ in _fields(model) if field == _PIECE]
    if not pieces:
        raise ValueError("it holds no piece")
    return pieces


def with_pieces(model: bytes, pieces: Sequence[Piece], *, dummy_prefix: bool) -> bytes:
    """The model with another vocabulary; without `dummy_prefix`, no space is put in front of a text."""
    kept = [raw for field, _, raw in _fields(model) if field not in (_PIECE, _SELF_TEST)]
    if not dummy_prefix:
        kept.append(_message(_NORMALIZER, _NO_DUMMY_PREFIX))  # a message given twice is merged
    return b"".join([*kept, *(_message(_PIECE, _piece_bytes(piece)) for piece in pieces)])


def _piece(message: bytes) -> Piece:
    values = {field: value for field, value, _ in _fields(message)}
    text = values.get(1)
    if not text:
        raise ValueError("a piece has no text")
    return Piece(text.decode("utf-8"), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, NORMAL))


def _piece_bytes(piece: Piece) -> bytes:
    return (
        _message(1, piece.text.encode("utf-8")) + b"\x15" + struct.pack("<f", piece.score) + bytes((0x18, piece.kind))
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """(field, value, the bytes of both) of every field of a protobuf message; numbers as int, the rest as bytes."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        value: Any
        if (wire := tag & 7) == _VARINT:
            value, at = _varint(message, at)
        else:
            if wire not in _SIZES:
                raise ValueError(f"byte {start} begins no field")
            size, at = _varint(message, at) if wire == _BYTES else (_SIZES[wire], at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError(f"the file ends inside the field at byte {start}")
        yield tag >> 3, value, message[start:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    number = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise ValueError(f"no number ends at byte {at}")


def _message(field: int, content: bytes) -> bytes:
    size, length = len(content), bytearray()
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([field << 3 | _BYTES, *length, size]) + content
