"""Conversations to tokens: ChatML, and the anchors at which a block may start (docs/method.md, section 1).

A turn is `<|im_start|>ROLE\\nTEXT<|im_end|>\\n`. The answer tokens of an assistant turn are those after its
header up to and including `<|im_end|>`; an anchor is a token whose successor is an answer token.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.tokenizer import TextEncoder, as_text_encoder
from sdlm_megatron.errors import DataError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant."

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function": "function",
}
"""Role of a turn as datasets spell it -> role in ChatML."""


@dataclass(frozen=True)
class Turn:
    """Where a turn lies in its document, in tokens."""

    role: str
    start: int
    """Index of `<|im_start|>`."""
    end: int
    """Index after the `\\n` that follows `<|im_end|>`, or after the last token that was kept."""
    first_anchor: int
    """Index of the last header token."""
    n_anchors: int
    """Answer tokens of the turn, one anchor before each; 0 when the turn is not trained."""


@dataclass(frozen=True)
class RenderedDocument:
    """The clean tokens of a conversation."""

    input_ids: np.ndarray
    """int32 (L,)."""
    anchors: np.ndarray
    """int32 (R,), ascending: candidate block starts."""
    turns: tuple[Turn, ...]


def render(
    conversation: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    tokenizer: Any,
    *,
    default_system: str | None = DEFAULT_SYSTEM,
    answer_roles: Collection[str] = ("assistant",),
) -> RenderedDocument:
    """Renders one conversation.

    Args:
        conversation: turns {from: human|gpt|system|function, value} or {role, content}; or a row that holds
            them under `conversations` or `messages`.
        tokenizer: a transformers tokenizer, a `tokenizers.Tokenizer` or a `TextTokenizer`.
        default_system: text of the system turn put in front of a conversation that starts without one; None
            puts none.
        answer_roles: ChatML roles whose turns are trained. The reference's `prepare_for_pt` is ("user",
            "assistant") on a conversation without system turns.

    Raises:
        DataError: names the turn and field that is wrong. A conversation without an assistant turn is not an
            error: it has no anchors.
    """
    options: dict[str, Any] = {"default_system": default_system, "answer_roles": answer_roles}
    return render_parsed([parse(conversation)], as_text_encoder(tokenizer), **options)[0]


def parse(conversation: Any) -> list[tuple[str, str]]:
    """Checks a conversation: [(ChatML role, text)…]; DataError names the turn and field that is wrong."""
    field, turns = "conversation", conversation
    if isinstance(conversation, Mapping):
        field = next((key for key in ("conversations", "messages") if key in conversation), "")
        if not field:
            raise DataError(f"a row without `conversations` and `messages`; it has {_names(conversation)}")
        turns = conversation[field]
    if isinstance(turns, str | bytes) or not isinstance(turns, Sequence):
        raise DataError(f"a list of turns is wanted, not {type(turns).__name__}", where=field)
    if not turns:
        raise DataError("the conversation has no turn", where=field)
    return [_parse_turn(turn, f"{field}[{i}]") for i, turn in enumerate(turns)]


def _parse_turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise DataError(f"a turn must be an object, not {type(turn).__name__}", where=where)
    keys = next((pair for pair in (("from", "value"), ("role", "content")) if pair[0] in turn), None)
    if keys is None:
        raise DataError(f"a turn without `from` and `role`; it has {_names(turn)}", where=where)
    role_key, text_key = keys
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"unknown role {role!r}", f"{where}.{role_key}", f"one of {', '.join(ROLES)}")
    if text_key not in turn:
        raise DataError(f"the turn has no `{text_key}`", where=where)
    return ROLES[role], check_text(turn[text_key], f"{where}.{text_key}")


def check_text(text: Any, where: str) -> str:
    """`text` if it is a string that can be encoded; DataError names the field otherwise."""
    if not isinstance(text, str):
        raise DataError(f"text is wanted, not {type(text).__name__}", where=where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text is no valid Unicode: {error.reason} at character {error.start}", where) from None
    return text


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in row) or "no field"


def render_parsed(
    conversations: Sequence[Sequence[tuple[str, str]]],
    encoder: TextEncoder,
    *,
    default_system: str | None = DEFAULT_SYSTEM,
    answer_roles: Collection[str] = ("assistant",),
) -> list[RenderedDocument]:
    """Renders checked conversations (`parse`) together: their texts are encoded in one call."""
    whole = [_with_system(turns, default_system) for turns in conversations]
    # ROLE\nTEXT is one piece: a text that starts with white space may merge with the newline, as in the
    # reference.
    pieces = encoder.encode_batch([f"{role}\n{text}" for turns in whole for role, text in turns])
    roles = sorted(set(ROLES.values()))
    newline, *headers = encoder.encode_batch(["\n", *(f"{role}\n" for role in roles)])
    header = {role: 1 + len(ids) for role, ids in zip(roles, headers, strict=True)}
    frame = _Frame(encoder.token_id(IM_START), encoder.token_id(IM_END), newline, header, frozenset(answer_roles))
    documents, at = [], 0
    for turns in whole:
        documents.append(_assemble([role for role, _ in turns], pieces[at : at + len(turns)], frame))
        at += len(turns)
    return documents


def _with_system(turns: Sequence[tuple[str, str]], default: str | None) -> list[tuple[str, str]]:
    missing = default is not None and turns[0][0] != "system"
    return [("system", default or ""), *turns] if missing else list(turns)


@dataclass(frozen=True)
class _Frame:
    """Ids of what surrounds a turn."""

    im_start: int
    im_end: int
    newline: list[int]
    header: dict[str, int]
    """Role -> tokens of `<|im_start|>ROLE\\n` (Qwen2.5: 3), taken as such even where the newline merged with
    the text."""
    answer_roles: frozenset[str]


def _assemble(roles: Sequence[str], pieces: Sequence[list[int]], frame: _Frame) -> RenderedDocument:
    ids: list[int] = []
    turns, anchors = [], [np.empty(0, dtype=np.int32)]
    for role, piece in zip(roles, pieces, strict=True):
        start = len(ids)
        ids += [frame.im_start, *piece, frame.im_end, *frame.newline]
        closing = start + 1 + len(piece)  # index of <|im_end|>
        first = min(start + frame.header[role], closing) - 1
        answers = closing - first if role in frame.answer_roles else 0
        turns.append(Turn(role, start, len(ids), first, answers))
        anchors.append(np.arange(first, first + answers, dtype=np.int32))
    return RenderedDocument(np.array(ids, dtype=np.int32), np.concatenate(anchors), tuple(turns))
