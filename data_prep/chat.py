"""Conversations to tokens: rendering, and the anchors at which a block may start (docs/method.md, section 1).

A turn is `<|im_start|>ROLE\\nTEXT<|im_end|>\\n` (ChatML; Llama 3's headers: sdlm_megatron/data/chatml.py). The answer
tokens of an assistant turn are those after its header, up to and including the token that ends the turn; an anchor is a
token whose successor is an answer token.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from data_prep.encoders import as_text_encoder
from data_prep.encoding import TextEncoder, chat_format, encode_flat
from data_prep.inst_template import check_exchanges
from data_prep.turns import CHATML_ROLES, ChatTurn, Conversation, TurnParser
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM
from sdlm_megatron.errors import DataError


@dataclass(frozen=True)
class Turn:
    """Token range of a turn in its document."""

    role: str
    start: int  # index of the token that begins it: `<|im_start|>` in ChatML
    end: int  # index after the `\n` that follows `<|im_end|>`, or after the last token kept
    first_anchor: int  # index of the last header token
    n_anchors: int  # number of answer tokens, each with one anchor before it; 0 if the turn is not trained


@dataclass(frozen=True)
class RenderedDocument:
    """The clean tokens of a conversation."""

    input_ids: np.ndarray  # int32 (L,)
    anchors: np.ndarray  # int32 (R,), ascending: candidate block starts
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
        conversation: turns {from, value} or {role, content}, or a row with such turns under `conversations` or
            `messages`.
        tokenizer: a transformers tokenizer, a `tokenizers.Tokenizer` or a `TextTokenizer`.
        default_system: text of the system turn prepended to a conversation without one; None prepends nothing.
        answer_roles: ChatML roles whose turns are trained. The reference code's `prepare_for_pt` corresponds to
            ("user", "assistant") on a conversation without system turns.

    Raises:
        DataError: names the invalid turn and field. A conversation without an assistant turn is valid and has no
            anchors.
    """
    turns, encoder = parse(conversation), as_text_encoder(tokenizer)
    if chat_format(encoder).exchanges:
        check_exchanges(turns)
    options: dict[str, Any] = {"default_system": default_system, "answer_roles": answer_roles}
    return render_batch([turns], encoder, **options).document(0)


def parse(conversation: Any) -> Conversation:
    """The checked turns of a conversation (see `render`). Raises DataError, which names the invalid turn and field."""
    field, turns = "conversation", conversation
    if isinstance(conversation, Mapping):
        field = next((key for key in ("conversations", "messages") if key in conversation), "")
        if not field:
            raise DataError("a row without `conversations` and `messages`", fix=f"it has {', '.join(conversation)}")
        turns = conversation[field]
    return TurnParser().parse(turns, field)


@dataclass(frozen=True)
class RenderedBatch:
    """Concatenated clean tokens of several conversations, and the position of their turns."""

    input_ids: np.ndarray  # int32 (tokens,)
    doc_edges: np.ndarray  # int64 (documents + 1,): document i has tokens [doc_edges[i], doc_edges[i + 1])
    turn_edges: np.ndarray  # int64 (documents + 1,): document i has turns [turn_edges[i], turn_edges[i + 1])
    roles: list[str]  # ChatML role of each turn
    # int64 (turns,) each, the fields of `Turn`; indices are relative to the document
    starts: np.ndarray
    ends: np.ndarray
    first_anchors: np.ndarray
    n_anchors: np.ndarray

    def __len__(self) -> int:
        return len(self.doc_edges) - 1

    def anchors_per_document(self) -> np.ndarray:
        """int64 (documents,): number of anchors R of each document."""
        sums = np.concatenate([[0], np.cumsum(self.n_anchors)])
        return np.diff(sums[self.turn_edges])

    def document(self, i: int) -> RenderedDocument:
        """Document i as a `RenderedDocument`."""
        turns = tuple(
            Turn(
                self.roles[t], *(int(part[t]) for part in (self.starts, self.ends, self.first_anchors, self.n_anchors))
            )
            for t in range(self.turn_edges[i], self.turn_edges[i + 1])
        )
        ranges = [np.arange(turn.first_anchor, turn.first_anchor + turn.n_anchors, dtype=np.int32) for turn in turns]
        ids = self.input_ids[self.doc_edges[i] : self.doc_edges[i + 1]]
        return RenderedDocument(ids, np.concatenate([np.empty(0, np.int32), *ranges]), turns)


def render_batch(
    conversations: Sequence[Conversation],
    encoder: TextEncoder,
    *,
    default_system: str | None = DEFAULT_SYSTEM,
    answer_roles: Collection[str] = ("assistant",),
) -> RenderedBatch:
    """Renders checked conversations (see `parse`, `check_exchanges`), whose texts are encoded in one call."""
    if chat_format(encoder).exchanges:
        return _render_exchanges(conversations, encoder, answer_roles)
    whole = [_with_system(turns, default_system) for turns in conversations]
    roles = [turn.role for turns in whole for turn in turns]
    chat, frame = chat_format(encoder), frame_of(encoder)
    # ROLE\nTEXT is encoded as one text: leading white space may merge with the newline, as in the reference code. After
    # a special token a text begins anew.
    texts = [chat.encoded(role, text) for turns in whole for role, text, _ in turns]
    pieces, edges = encode_flat(encoder, texts)
    turn_edges = np.concatenate([[0], np.cumsum([len(turns) for turns in whole], dtype=np.int64)])
    opening = np.zeros(len(roles), dtype=np.int64)
    opening[turn_edges[:-1]] = len(frame.document)
    before = np.array([len(frame.before[role]) for role in roles], dtype=np.int64)
    after = len(frame.newline) + 1  # <|im_end|> and the newline
    sizes = np.diff(edges)
    lengths = opening + before + sizes + after
    ends = np.cumsum(lengths)
    starts = ends - lengths + opening
    # Vectorized over all turns: a Python loop over tokens or turns would take longer than tokenizing.
    ids = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int32)
    ids[np.arange(len(pieces)) + np.repeat(starts + before - edges[:-1], sizes)] = pieces
    for role in set(roles):
        own = starts[[other == role for other in roles]]
        for offset, token in enumerate(frame.before[role]):
            ids[own + offset] = token
    for offset, token in enumerate([frame.im_end, *frame.newline]):
        ids[ends - after + offset] = token
    for offset, token in enumerate(frame.document, -len(frame.document)):
        ids[starts[turn_edges[:-1]] + offset] = token
    doc_edges = np.concatenate([[0], ends])[turn_edges]
    origin = np.repeat(doc_edges[:-1], np.diff(turn_edges))
    closing = ends - after - origin  # index of <|im_end|>
    header = np.array([frame.header[role] for role in roles], dtype=np.int64)
    # If the newline merged with the text, the turn is shorter than its nominal header: clip at <|im_end|>.
    first = np.minimum(starts - origin + header, closing) - 1
    # an answer of white space alone may be empty now
    trained = [
        turn.trained and turn.role in answer_roles and chat.content(turn.text) != ""
        for turns in whole
        for turn in turns
    ]
    answers = np.where(trained, closing - first, 0) if roles else first
    return RenderedBatch(ids, doc_edges, turn_edges, roles, starts - origin, ends - origin, first, answers)


def _render_exchanges(
    conversations: Sequence[Conversation], encoder: TextEncoder, answer_roles: Collection[str]
) -> RenderedBatch:
    """`render_batch` of [INST] templates: a question and its answer are one turn, whose header ends with [/INST]."""
    chat, turns = chat_format(encoder), [turn for conversation in conversations for turn in conversation]
    answers = turns[1::2]
    texts = [chat.gap + (chat.content(t.text) if t.role == "assistant" else t.text) for t in turns]
    pieces, edges = encode_flat(encoder, texts)
    sizes = np.diff(edges)
    questions, own = sizes[::2], sizes[1::2]
    counts = np.array([len(conversation) // 2 for conversation in conversations], dtype=np.int64)
    turn_edges = np.concatenate([[0], np.cumsum(counts)])
    lengths = questions + own + 3
    ends = np.cumsum(lengths + np.isin(np.arange(len(lengths)), turn_edges[:-1]))  # <s> before the first
    starts = ends - lengths
    closings = starts + questions + 1  # of [/INST]
    ids = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int32)
    begins = np.stack([starts, closings], axis=1).reshape(-1) + 1
    ids[np.arange(len(pieces)) + np.repeat(begins - edges[:-1], sizes)] = pieces
    places = (starts[turn_edges[:-1]] - 1, starts, closings, ends - 1)
    for place, token in zip(places, chat.specials, strict=True):
        ids[place] = encoder.token_id(token)
    doc_edges = np.concatenate([[0], ends])[turn_edges]
    origin = np.repeat(doc_edges[:-1], counts)
    trained = [t.trained and t.role in answer_roles and chat.content(t.text) != "" for t in answers]
    anchors = np.where(np.array(trained, dtype=bool), own + 1, 0)
    roles = [turn.role for turn in answers]
    return RenderedBatch(ids, doc_edges, turn_edges, roles, starts - origin, ends - origin, closings - origin, anchors)


def _with_system(turns: Conversation, default: str | None) -> Conversation:
    return turns if default is None or turns[0].role == "system" else [ChatTurn("system", default), *turns]


@dataclass(frozen=True)
class ChatFrame:
    """Token ids of the chat structure around the text of a turn. The field names are keys of the manifest."""

    im_start: int
    """The token that begins a turn, in any format."""
    im_end: int
    """The token that ends a turn."""
    newline: list[int]
    """After a turn."""
    header: dict[str, int]
    """Role -> number of tokens of `<|im_start|>ROLE\\n` (Qwen2.5: 3); also used where the newline merged with the
    text."""
    assistant: list[int]  # ids of `assistant\n`; with Llama 3's headers, of `assistant<|end_header_id|>`
    before: dict[str, list[int]]
    """Role -> ids that begin a turn and do not depend on its text: `<|im_start|>`, or Llama 3's header."""
    document: list[int]
    """Before the first turn."""
    header_end: int = -1
    """The token that ends a header whose length varies, [/INST]; -1: headers have the lengths of `header`."""

    def to_manifest(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("header_end", -1)}


def frame_of(encoder: TextEncoder) -> ChatFrame:
    """The chat structure of a tokenizer; raises DataError if it lacks the tokens of every format."""
    chat, roles = chat_format(encoder), CHATML_ROLES
    start, end = encoder.token_id(chat.start), encoder.token_id(chat.end)
    if chat.exchanges:
        first, middle = encoder.token_id(chat.document), encoder.token_id(chat.role_end)
        return ChatFrame(start, end, [], {"assistant": 1}, [], {}, [first], middle)
    role_end, document = ([encoder.token_id(token)] if token else [] for token in (chat.role_end, chat.document))
    # Encoded with the newline, as in a turn: some tokenizers merge it with the role's last character.
    gap = "" if role_end else chat.gap
    ids, edges = encode_flat(encoder, [chat.tail, chat.gap * len(role_end), *(role + gap for role in roles)])
    tail, rest, *names = (ids[a:b].tolist() for a, b in pairwise(edges))
    headers = {role: [*name, *role_end] for role, name in zip(roles, names, strict=True)}
    return ChatFrame(
        start,
        end,
        tail,
        {role: 1 + len(header) + len(rest) for role, header in headers.items()},
        headers["assistant"],
        {role: [start, *(header if role_end else [])] for role, header in headers.items()},
        document,
    )
