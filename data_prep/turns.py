"""Turns: one conversation as it is written in data sets -> checked ChatML turns.

Read are the layouts of ShareGPT ({from, value}) and of chat APIs ({role, content}), calls of tools and their results,
and text that is already ChatML. Tools are rendered as Qwen2.5's chat template does it; a test compares the ids.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sdlm_megatron.data.chatml import IM_END, IM_START
from sdlm_megatron.errors import DataError


class ChatTurn(NamedTuple):
    """One turn. Answers are trained if `trained`; other turns never are."""

    role: str  # ChatML role: system, user, assistant or function
    text: str
    trained: bool = True


Conversation = list[ChatTurn]

_CALL, _RESULT = "call", "result"
_SPELLINGS = {
    "user": "user human prompter",
    "assistant": "assistant gpt model bot chatgpt bard bing",
    "system": "system developer",
    "function": "function",
    _CALL: "function_call tool_call",
    _RESULT: "tool observation function_response tool_response ipython",
}
ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings.split()}
"""Role of a turn in data sets, in lower case -> role in ChatML, `call` or `result`."""
CHATML_ROLES = ("assistant", "function", "system", "user")
ROLE_KEYS, TEXT_KEYS = ("from", "role"), ("value", "content")
"""Keys of a turn's role and of its text."""

FLAGS = ("weight", "train", "loss", "loss_weight", "trainable")
"""Fields of a row or turn that exclude it from training with 0 or false."""
_FLAG_TEXTS = {"": None, "0": 0, "1": 1, "false": False, "true": True}
_COMMON = """
id _id uid uuid guid idx index seq_id row_id item_id sample_id example_id instance_id _instance_id conversation_id
conversation_hash conv_id dialog_id message_id prompt_id question_id task_id source_id hash
source sources source_type dataset dataset_name data_source origin subset split url link license licence
language lang locale country category categories topic topics subject domain task task_type task_name tag tags type
difficulty level quality score scores score_chosen score_rejected rating ratings likes rank
date created created_at updated_at timestamp time version model model_name generator author annotator
length num_turns n_turns num_tokens n_tokens token_count metadata meta
"""
COMMON_IGNORED = frozenset(_COMMON.split())
"""Fields of rows and turns that every format ignores on purpose: they describe the row."""
# Qwen2.5's template leaves these out as well. A speaker's name is no part of ChatML.
_TURN_IGNORED = COMMON_IGNORED | {"name", "tool_call_id"}

TOOLS_HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TOOLS_TAIL = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
"""The text about tools with which Qwen2.5 was trained."""
_CHATML_TURN = re.compile(
    rf"{re.escape(IM_START)}([^\n]*)\n(.*?){re.escape(IM_END)}\s*(?=$|{re.escape(IM_START)})", re.DOTALL
)
_ARGUMENTS = ("arguments", "parameters")
_NOT_TEXT = ("image", "audio", "video", "file")


def holds(value: Any) -> bool:
    """Whether a field holds something: not null, an empty text, an empty list or an empty object."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def check_text(text: Any, where: str) -> str:
    """Returns `text` if it is valid Unicode text; raises DataError, which names the field, otherwise."""
    if not isinstance(text, str):
        raise DataError(f"text is required, not {type(text).__name__}", where=where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"{where}, character {error.start}"
        raise DataError(f"the text is no valid Unicode: {error.reason}", place) from None
    return text


def parse_json(text: str, what: str, where: str) -> Any:
    """The value of JSON in a field; raises DataError, which begins with `what`, otherwise."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{what} is not JSON", where) from None


def flag_value(value: Any) -> Any:
    """A flag whose text is read as its value: every cell of a CSV file is text."""
    return _FLAG_TEXTS.get(value.strip().lower(), value) if isinstance(value, str) else value


def is_trained(fields: Mapping[str, Any], flags: Collection[str], where: str) -> bool:
    """Whether no flag of a row or turn excludes it from training; raises DataError on a weight other than 0 and 1."""
    result = True
    for flag in flags:
        value = flag_value(fields.get(flag))
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            name = f"{where.partition('[')[0]}.{flag}" if where else flag
            fix = f"use 0 or 1, or put `{name}` into the source's `ignore`: then it is trained"
            raise DataError(f"`{flag}` is neither 0 nor 1: a token is trained or it is not", f"{where}{flag}", fix)
        result &= bool(value)
    return result


def tools_text(tools: Any, where: str, *, columnar: bool = False) -> str:
    """The part of the system turn that describes the tools; empty if there are none. `columnar`: of a columnar file."""
    if columnar:
        without_nulls(tools, where)
    if isinstance(tools, str):
        tools = parse_json(tools, "the list of tools", where) if tools.strip() else []
    if isinstance(tools, Mapping):
        tools = [tools]
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"a list of tools is required, not {type(tools).__name__}", where)
    if not tools:
        return ""
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise DataError(f"a tool must be an object, not {type(tool).__name__}", where)
    return TOOLS_HEAD + "\n".join(check_text(_dumps(tool), where) for tool in tools) + TOOLS_TAIL


def without_nulls(value: Any, where: str) -> None:
    """Raises DataError if an object from a columnar file holds a null: such a file gives every row the keys of all
    rows, so that missing keys look like nulls, and both would be trained."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for inner in values:
        if inner is None:
            what = "a tool or call holds a null, which a columnar file does not tell from a missing key"
            raise DataError(what, where, "store tools, and the arguments of calls, as JSON text")
        without_nulls(inner, where)


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)  # as transformers' filter `tojson`
    except (TypeError, ValueError, RecursionError):
        raise DataError("a tool or call cannot be written as JSON") from None


def parse_chatml(text: str, where: str) -> list[dict[str, str]]:
    """The turns of a text that is already ChatML; raises DataError if anything is outside of them."""
    turns, at = [], 0
    text = text.strip().removesuffix("<|endoftext|>").rstrip()
    for match in _CHATML_TURN.finditer(text):
        if match.start() != at:
            break
        turns.append({"role": match[1], "content": match[2]})
        at = match.end()
    if at != len(text) or not turns or any(mark in turn["content"] for mark in (IM_START, IM_END) for turn in turns):
        raise DataError(f"the text begins with {IM_START} but is not a sequence of ChatML turns", where)
    return turns


class TurnParser:
    """Parser of lists of turns of one source.

    Args:
        role, text: keys of a turn's role and text; empty: those of ShareGPT or of chat APIs.
        ignored: fields of turns, with their list ("messages.x"), that are ignored by the user's choice.
        columnar: whether the rows are from a columnar file.
    """

    def __init__(
        self, role: str = "", text: str = "", ignored: Collection[str] = (), *, columnar: bool = False
    ) -> None:
        self._columnar = columnar
        self.unread: Counter[str] = Counter()
        """Fields of turns that hold something and are neither read nor ignored, with their list ("messages.x")."""
        self._ignored = frozenset(ignored)
        self._roles = (role,) if role else ROLE_KEYS
        self._texts = (text,) if text else TEXT_KEYS
        self._read = {*self._roles, *self._texts, "tool_calls", "function_call", *FLAGS}

    def parse(self, turns: Any, field: str) -> Conversation:
        """The conversation in column `field`; raises DataError, which names the invalid turn and field."""
        if isinstance(turns, str):
            chatml = turns.lstrip().startswith(IM_START)
            turns = parse_chatml(turns, field) if chatml else parse_json(turns, f"the text in `{field}`", field)
        if isinstance(turns, str | bytes) or not isinstance(turns, Sequence):
            raise DataError(f"a list of turns is required, not {type(turns).__name__}", where=field)
        if not turns:
            raise DataError("the conversation has no turn", where=field)
        unread: set[str] = set()
        parsed = [self._parse_turn(turn, f"{field}[{i}]", field, unread) for i, turn in enumerate(turns)]
        self.unread.update(unread)
        return merge_results(parsed)

    def _parse_turn(self, turn: Any, where: str, field: str, unread: set[str]) -> ChatTurn:
        if not isinstance(turn, Mapping):
            raise DataError(f"a turn must be an object, not {type(turn).__name__}", where=where)
        if self._ignored:
            turn = {key: value for key, value in turn.items() if f"{field}.{key}" not in self._ignored}
        for key, value in turn.items():
            if key not in self._read and key not in _TURN_IGNORED and holds(value):
                unread.add(f"{field}.{key}")
        role = self._role(turn, where)
        calls = self._calls(turn, role, where)
        text = self._text(turn, where, optional=bool(calls))
        trained = is_trained(turn, FLAGS, f"{where}.")
        if role == _CALL:
            role, text = "assistant", _call_text(text, where)
        elif calls:
            text = "\n".join([text] * bool(text) + calls)
        # An empty answer would teach the model to end at once.
        return ChatTurn(role, text, trained and text != "")

    def _role(self, turn: Mapping[str, Any], where: str) -> str:
        keys = self._one(turn, self._roles, where, "role")
        role = turn[keys]
        spelling = role if isinstance(role, str) and role in ROLES else str(role).strip().lower()
        if not isinstance(role, str) or spelling not in ROLES:
            place, shown = f"{where}.{keys}", role[:40] if isinstance(role, str) else type(role).__name__
            raise DataError("unknown role", f"{place}: {shown!r}", f"use one of {', '.join(ROLES)}")
        return ROLES[spelling]

    def _one(self, turn: Mapping[str, Any], keys: Sequence[str], where: str, what: str) -> str:
        """The key of `keys` that the turn has; one that holds null counts only if there is no other."""
        present = [key for key in keys if key in turn]
        filled = [key for key in present if turn[key] is not None]
        if len(filled) > 1 and any(turn[key] != turn[filled[0]] for key in filled):
            names = " and ".join(f"`{key}`" for key in filled)
            raise DataError(f"the turn has two readings of its {what}: {names}", where, "put one into `ignore`")
        if not present:
            names, fields = " and ".join(f"`{key}`" for key in keys), ", ".join(map(str, turn)) or "nothing"
            fix = f"the turn has {fields}; name the keys with columns={{role: KEY, content: KEY}}"
            raise DataError(f"a turn without {names}", where, fix)
        return (filled or present)[0]

    def _text(self, turn: Mapping[str, Any], where: str, *, optional: bool) -> str:
        if optional and not any(holds(turn.get(key)) for key in self._texts):
            return ""
        key = self._one(turn, self._texts, where, "text")
        content = turn[key]
        if not isinstance(content, list):
            return check_text(content, f"{where}.{key}")
        return "".join(_part_text(part, f"{where}.{key}[{i}]") for i, part in enumerate(content))

    def _calls(self, turn: Mapping[str, Any], role: str, where: str) -> list[str]:
        calls: dict[str, list[str]] = {}
        for key in ("tool_calls", "function_call"):
            value = turn.get(key)
            if isinstance(value, str) and value.strip():
                value = parse_json(value, f"the text in `{key}`", f"{where}.{key}")
            if not holds(value):
                continue
            if role != "assistant":
                raise DataError(f"`{key}` in a turn that is no answer", where)
            if self._columnar and not isinstance(turn[key], str):
                _check_arguments(value, f"{where}.{key}")
            if key == "function_call":  # the older form: a single call
                value = [value]
            if not isinstance(value, list):
                raise DataError(f"`{key}` must be a list of calls, not {type(value).__name__}", where)
            calls[key] = [_render_call(call, f"{where}.{key}[{i}]") for i, call in enumerate(value)]
        first, *others = calls.values() or [[]]
        if any(other != first for other in others):
            names = " and ".join(f"`{key}`" for key in calls)
            fix = f"put `{where.partition('[')[0]}.function_call` into the source's `ignore`"
            raise DataError(f"the turn has two readings of its calls: {names}", where, fix)
        return first


def _part_text(part: Any, where: str) -> str:
    """Text of one part of a message; raises DataError on images, audio and other parts that are no text."""
    if isinstance(part, str):
        return check_text(part, where)
    if not isinstance(part, Mapping):
        raise DataError(f"a part of a message must be an object, not {type(part).__name__}", where)
    kind = str(part.get("type", "text"))
    filled = [key for key, value in part.items() if key != "type" and holds(value)]
    for name in _NOT_TEXT:
        if name in kind or any(name in str(key) for key in filled):
            article = "an" if name[0] in "ia" else "a"
            fix = "remove such rows, or these parts of them"
            raise DataError(f"the message contains {article} {name}; only text can be trained", where, fix)
    if kind not in ("text", "input_text", "output_text") or set(filled) - {"text", "annotations", "cache_control"}:
        raise DataError("the message contains a part that is no text", f"{where}: {kind[:40]!r}")
    return check_text(part.get("text"), f"{where}.text")


def _call_text(text: str, where: str) -> str:
    """Text of a turn with the role of a call: JSON of one call or several, or the text that the model shall write."""
    if text.lstrip().startswith("<tool_call>"):
        return text
    calls = parse_json(text, "a function call", where)
    calls = calls if isinstance(calls, list) else [calls]
    return "\n".join(_render_call(call, where) for call in calls)


def _check_arguments(calls: Any, where: str) -> None:
    """Applies `without_nulls` to the arguments of calls; their other keys may be null."""
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function") if isinstance(call, Mapping) else None
        for holder in (call, inner):
            if isinstance(holder, Mapping):
                without_nulls([holder[key] for key in _ARGUMENTS if holder.get(key) is not None], where)


def _render_call(call: Any, where: str) -> str:
    """A call as Qwen2.5's template writes it. Arguments in a JSON text, as chat APIs return them, become an object."""
    if isinstance(call, Mapping) and holds(call.get("function")):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise DataError("a call needs a `name` and `arguments`", where)
    readings = [call[key] for key in _ARGUMENTS if call.get(key) is not None]
    readings = [parse_json(v, "the arguments of a call", where) if isinstance(v, str) else v for v in readings]
    if len(readings) > 1 and readings[0] != readings[1]:
        what = f"the call has two readings of its arguments: {' and '.join(f'`{key}`' for key in _ARGUMENTS)}"
        raise DataError(what, where, "keep one of them")
    arguments = readings[0] if readings else None
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of a call must be an object, not {type(arguments).__name__}", where)
    name, values = check_text(call["name"], where), check_text(_dumps(arguments), where)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {values}}}\n</tool_call>'


def merge_results(turns: Sequence[ChatTurn]) -> Conversation:
    """Results of tools become user turns, one for consecutive results."""
    merged: Conversation = []
    for i, turn in enumerate(turns):
        if turn.role != _RESULT:
            merged.append(turn)
            continue
        wrapped = turn.text.strip().startswith("<tool_response>") and turn.text.strip().endswith("</tool_response>")
        text = turn.text if wrapped else f"<tool_response>\n{turn.text}\n</tool_response>"
        if i and turns[i - 1].role == _RESULT:
            merged[-1] = ChatTurn("user", f"{merged[-1].text}\n{text}")
        else:
            merged.append(ChatTurn("user", text))
    return merged


def with_system(turns: Conversation, system: Any, tools: str, default: str | None, where: str) -> Conversation:
    """The conversation with the text of a `system` column and the description of its tools in the system turn.

    Args:
        system: content of the column; null or empty: none.
        tools: description of the tools (`tools_text`); empty: none.
        default: system text of a conversation with tools and without any system turn.
    """
    first = turns[0].role == "system"
    if holds(system):
        text = check_text(system, where)
        if first and turns[0].text != text:
            raise DataError(f"two system texts: the column `{where}` and the first turn", where, "ignore one of them")
        turns = turns if first else [ChatTurn("system", text), *turns]
    if not tools:
        return turns
    if turns[0].role == "system":
        default, turns = turns[0].text, turns[1:]
    return [ChatTurn("system", tools if default is None else f"{default}\n\n{tools}"), *turns]
