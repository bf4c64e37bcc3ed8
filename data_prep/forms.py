"""Forms of rows: a row of a source -> its conversation, and the fields of the row that were not read.

docs/data.md has a table of unusual rows, which are treated alike in every format and file type.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_prep.build_config import SourceConfig
from data_prep.source_formats import FORMATS, formats_with_columns
from data_prep.turns import (
    CHATML_ROLES,
    COMMON_IGNORED,
    FLAGS,
    ROLE_KEYS,
    ROLES,
    TEXT_KEYS,
    ChatTurn,
    Conversation,
    TurnParser,
    check_text,
    flag_value,
    holds,
    is_trained,
    parse_json,
    tools_text,
    with_system,
)
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM, IM_START
from sdlm_megatron.errors import ConfigError, DataError

_USUAL_ROLES = {spelling: role for spelling, role in ROLES.items() if role in CHATML_ROLES}
_KINDS = {"turns": ("turns",), "pair": ("prompt", "answer"), "text": ("text",), "preference": ("chosen", "rejected")}
_FURTHER = {"pair": ("input", "history"), "preference": ("prompt", "input")}
"""Ways of reading a row, each with the columns that it must have and with those that only it may have."""
_new: Callable[[type[ChatTurn], tuple[str, str, bool]], ChatTurn] = tuple.__new__
"""Makes a turn without a Python call, which would take longer than all checks of a turn."""


class InputRow(NamedTuple):
    """One row of a source, as read."""

    place: int  # in a unit of lines: 1-based line number within the unit. Otherwise: 0-based row number in the file.
    content: Any  # the row (a dict if valid), or an `Unreadable`


NOT_UTF8 = "is not UTF-8"


@dataclass(frozen=True)
class Unreadable:
    """A line that is not a row, or a row of a columnar file that cannot be decoded."""

    reason: str
    line: str  # the line; bytes that are not UTF-8 as backslash escapes


class NotChosen(DataError):
    """A row of a preference file whose answer is marked as bad; it is dropped, not rejected."""


class FormReader:
    """Reader of the rows of one source, whose format must be known.

    Args:
        source: its settings.
        system_prompt: system text of a conversation with tools and without a system turn; None: none.
        columnar: whether the rows are from a columnar file, which fills missing keys with nulls.

    Raises:
        ConfigError: the columns of the source's settings contradict its format.
    """

    def __init__(
        self, source: SourceConfig, system_prompt: str | None = DEFAULT_SYSTEM, *, columnar: bool = False
    ) -> None:
        self._columnar = columnar
        form = FORMATS[source.format]
        named = {**form.fields, **source.columns}
        self.fields = {name: column for name, column in named.items() if column not in source.ignore}
        """Columns that are read, by our names."""
        self.preference, self._system_prompt, self._source = source.preference, system_prompt, source
        self.kind = _kind(self.fields, source)
        _check_names(self.kind, self.fields, source)
        own = (self.fields.pop("role", ""), self.fields.pop("content", ""))
        self._parser = TurnParser(*own, source.ignore, columnar=columnar)
        self._flags = [flag for flag in FLAGS if flag not in source.ignore and flag not in self.fields.values()]
        if weight := self.fields.pop("weight", ""):
            self._flags.append(weight)
        self._known = {*self.fields.values(), *self._flags}
        self._ignored = COMMON_IGNORED | set(source.ignore)
        self._unread: Counter[str] = Counter()
        # A row in which other columns hold something takes the slow path.
        direct = ("turns",) if self.kind == "turns" else ("prompt", "answer")
        self._columns = [self.fields[name] for name in direct] if self.kind in ("turns", "pair") else []
        self._plain = (self._ignored - self._known) | set(self._columns)
        usual = ROLE_KEYS.index("from") if source.format == "sharegpt" else ROLE_KEYS.index("role")
        self._keys = (own[0] or ROLE_KEYS[usual], own[1] or TEXT_KEYS[usual])

    @property
    def unread(self) -> Counter[str]:
        """Number of rows read so far, by field that held something and was neither read nor ignored. A field of turns
        is named with their list: "messages.reasoning_content"."""
        return self._unread + self._parser.unread

    def read(self, content: Any) -> Conversation:
        """The checked conversation of a row; raises DataError, which names the invalid field, and NotChosen."""
        # Valid rows of the usual kinds take the fast path, which raises anything on others.
        try:
            if not self._plain.issuperset(content) and any(holds(content[k]) for k in content if k not in self._plain):
                raise ValueError
            if self.kind == "turns":
                return _fast_turns(content[self._columns[0]], *self._keys)
            if self.kind == "pair":
                return _fast_pair(content[self._columns[0]], content[self._columns[1]])
        except (LookupError, TypeError, ValueError):
            pass
        return self._read(content)

    def _read(self, row: Any) -> Conversation:
        if isinstance(row, Unreadable):
            what, _, detail = row.reason.partition(": ")
            raise DataError(what, detail, _encoding_fix(self._source) if NOT_UTF8 in what else "")
        if self.kind == "rows" and isinstance(row, list):
            return self._parser.parse(row, "row")
        if not isinstance(row, Mapping):
            raise DataError(f"a row must be an object, not {type(row).__name__}")
        if self.kind == "rows":
            raise DataError("a row must be a list of turns, not dict")
        chosen = self._is_chosen(row)
        turns = getattr(self, f"_read_{self.kind}")(row)
        tools = tools_text(self._value(row, "tools"), self.fields.get("tools", ""), columnar=self._columnar)
        where = self.fields.get("system", "system")
        turns = with_system(turns, self._value(row, "system"), tools, self._system_prompt, where)
        if not chosen:
            raise NotChosen("the answer is marked as bad", self.fields["label"])
        if not is_trained(row, self._flags, ""):
            turns = [turn._replace(trained=False) for turn in turns]
        # Counted only for rows that are used: the fields of others are in rejects.jsonl.
        for key, value in row.items():
            if key not in self._known and key not in self._ignored and holds(value):
                self._unread[str(key)] += 1
        return turns

    def _value(self, row: Mapping[str, Any], name: str) -> Any:
        """Content of an optional column; None if it does not exist."""
        return row.get(self.fields[name]) if name in self.fields else None

    def _column(self, row: Mapping[str, Any], name: str) -> Any:
        column = self.fields[name]
        if column not in row:
            fix = f"the row has {', '.join(map(str, row)) or 'nothing'}; set `format` or `columns` of the source"
            raise DataError(f"the row has no `{column}`", column, fix)
        return row[column]

    def _is_chosen(self, row: Mapping[str, Any]) -> bool:
        label = flag_value(self._value(row, "label"))
        if label is None:
            return True
        column = self.fields["label"]
        if not isinstance(label, bool):
            raise DataError(
                f"`{column}` is not true or false",
                column,
                f"write true or false, or put `{column}` into the source's `ignore` if it is no preference",
            )
        if not self.preference:
            fix = f"{self._source.option('preference', 'chosen')} trains the answers with `{column}: true`"
            raise DataError(f"a preference file: `{column}` marks good and bad answers", column, fix)
        return label

    def _read_turns(self, row: Mapping[str, Any]) -> Conversation:
        return self._parser.parse(self._column(row, "turns"), self.fields["turns"])

    def _read_pair(self, row: Mapping[str, Any]) -> Conversation:
        prompt, answer = self._column(row, "prompt"), self._column(row, "answer")
        before = self._history(row) + self._prompt(row, prompt)
        return before + self._said("assistant", answer, self.fields["answer"])

    def _prompt(self, row: Mapping[str, Any], prompt: Any) -> Conversation:
        """The turns before the answer; `input` continues the text of the prompt on a new line."""
        added = self._value(row, "input")
        if not holds(added):
            return self._said("user", prompt, self.fields["prompt"])
        texts = [check_text(prompt, self.fields["prompt"]), check_text(added, self.fields["input"])]
        return [ChatTurn("user", "\n".join(filter(None, texts)))]

    def _said(self, role: str, value: Any, column: str) -> Conversation:
        """A text, or a list of turns."""
        if isinstance(value, list) and value:
            return self._parser.parse(value, column)
        text = check_text(value, column)
        return [ChatTurn(role, text, text != "")]

    def _history(self, row: Mapping[str, Any]) -> Conversation:
        """Earlier turns: a list of turns, or of pairs of question and answer."""
        history, column = self._value(row, "history"), self.fields.get("history", "")
        if isinstance(history, str) and history.strip():
            history = parse_json(history, f"the text in `{column}`", column)
        if not holds(history) or history == "":
            return []
        if not isinstance(history, list):
            raise DataError(f"a list of earlier turns is required, not {type(history).__name__}", column)
        if all(isinstance(turn, Mapping) for turn in history):
            return self._parser.parse(history, column)
        result: Conversation = []
        for i, pair in enumerate(history):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise DataError("a pair of question and answer is required", f"{column}[{i}]")
            question, answer = (check_text(text, f"{column}[{i}]") for text in pair)
            result += [ChatTurn("user", question), ChatTurn("assistant", answer, answer != "")]
        return result

    def _read_text(self, row: Mapping[str, Any]) -> Conversation:
        text, column = check_text(self._column(row, "text"), self.fields["text"]), self.fields["text"]
        if text.lstrip().startswith(IM_START):
            return self._parser.parse(text, column)
        return [ChatTurn("assistant", text, text != "")]

    def _read_preference(self, row: Mapping[str, Any]) -> Conversation:
        self._column(row, "rejected")
        answer, prompt = self._column(row, "chosen"), self._value(row, "prompt")
        turns = self._said("assistant", answer, self.fields["chosen"])
        if not holds(prompt):
            if holds(self._value(row, "input")):
                fix = f"{self._ignoring('input')} leaves it out"
                raise DataError("the row continues a prompt that it does not have", self.fields["input"], fix)
            return turns
        before = self._prompt(row, prompt)
        if turns[0].role == "assistant":
            return before + turns
        # A list of turns usually repeats the prompt.
        if not {turn[:2] for turn in before} <= {turn[:2] for turn in turns}:
            fix = f"{self._ignoring('prompt')} trains the turns"
            raise DataError("two prompts: the column and the turns of the answer", self.fields["prompt"], fix)
        return turns

    def _ignoring(self, name: str) -> str:
        """The argument that ignores a column too, beside those that the source ignores already."""
        return self._source.option("ignore", sorted({self.fields[name], *self._source.ignore}))


def _kind(fields: Mapping[str, str], source: SourceConfig) -> str:
    """The way of reading: turns, pair, text, preference, or rows that are lists."""
    where = f"source {source.name!r}"
    present = [kind for kind, names in _KINDS.items() if all(name in fields for name in names)]
    if source.format == "turns" and not present:
        return "rows"
    if len(present) != 1:
        problem = f"two readings: {' and '.join(present)}" if present else "no column for the answers"
        fix = "set turns, text, or prompt and answer in its `columns`"
        raise ConfigError(f"the columns of the source have {problem}", where, fix)
    if present[0] == "preference" and not source.preference:
        fix = f"{source.option('preference', 'chosen')} trains the chosen answers"
        raise ConfigError("a preference file has two answers in each row; SDLM trains one", where, fix)
    return present[0]


def further_names(source: SourceConfig) -> tuple[str, ...]:
    """Names in `columns` of texts that the rows of a source may have beside those they must have, and its weights."""
    return (*_FURTHER.get(FormReader(source).kind, ()), "system", "tools", "weight")


def _check_names(kind: str, fields: Mapping[str, str], source: SourceConfig) -> None:
    """Raises ConfigError if `columns` has a name that rows of this kind do not have: its column would be lost."""
    more = () if kind == "rows" else (*_KINDS[kind], *_FURTHER.get(kind, ()), "system", "tools", "weight", "label")
    names = ("role", "content", *more)
    for name in source.columns:
        if name in fields and name not in names:
            what = f"`columns` has {name}, which rows of the form {kind} do not have"
            fix = f"use {', '.join(names)}, or put `{fields[name]}` into `ignore`"
            raise ConfigError(what, f"source {source.name!r}", fix)


def _fast_turns(turns: Any, role_key: str, text_key: str) -> Conversation:
    result = []
    for turn in turns:
        if len(turn) != 2:
            raise ValueError  # other fields may have a meaning
        text = turn[text_key]
        if not str.isascii(text):  # raises on a type other than str
            text.encode()  # raises on a lone surrogate
        result.append(_new(ChatTurn, (_USUAL_ROLES[turn[role_key]], text, text != "")))
    if not result:
        raise ValueError
    return result


def _fast_pair(prompt: Any, answer: Any) -> Conversation:
    for text in (prompt, answer):
        if not str.isascii(text):
            text.encode()
    return [_new(ChatTurn, ("user", prompt, True)), _new(ChatTurn, ("assistant", answer, answer != ""))]


def detect_format(rows: Iterable[tuple[str, Any]], source: SourceConfig) -> str:
    """The format of rows, from the fields that hold something; raises DataError if not exactly one matches.

    Args:
        rows: (file and row for messages, row) of the first rows of a source.
        source: its settings; its `columns` may name the fields.
    """
    own = set(source.columns)
    if own & {"turns", "text"} or own >= {"prompt", "answer"} or own >= {"chosen", "rejected"}:
        return "columns"
    seen, matches, first, both = 0, dict[str, str](), None, False
    for where, row in rows:
        seen += 1
        if first is None or (isinstance(row, dict) and not isinstance(first[1], dict)):
            first = (where, row)
        for name in (names := _matches(row, source)):
            matches.setdefault(name, where)
        both |= len(names) > 1
    if len(matches) == 1:
        return next(iter(matches))
    if len(matches) > 1:
        places = "; ".join(f"{name} ({', '.join(FORMATS[name].columns)}): {where}" for name, where in matches.items())
        fix = "; or ".join(_to_read(name, matches, source) for name in matches)
        if not both:
            fix = "give the files of each form an --input or source of their own"
        raise DataError(f"the rows have two {'readings' if both else 'forms'}: {' and '.join(matches)}", places, fix)
    if first is None:
        raise DataError("the file has no rows", source.path or source.hub, "write one JSON object per row")
    where, row = first
    if not isinstance(row, dict):
        reason = f"; first: {row.reason}" if isinstance(row, Unreadable) else ""
        what = f"none of the first {seen} rows is a JSON object or a list of turns{reason}"
        raise DataError(what, where, _encoding_fix(source) if NOT_UTF8 in reason else "write one object per row")
    has = ", ".join(map(str, row))
    known = "; ".join(", ".join(form.columns) for form in FORMATS.values() if form.columns)
    turns = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    columns = {"turns": str(turns[0])} if turns else {"prompt": "NAME", "answer": "NAME"}
    fix = f"name the columns: {source.option('columns', columns)}; known without it: {known}"
    raise DataError(f"no source format matches the fields {has or '(none)'}", where, fix)


def _to_read(name: str, matches: Iterable[str], source: SourceConfig) -> str:
    """The settings that read one of the formats that match."""
    others = {column for other in matches for column in FORMATS[other].columns} - set(FORMATS[name].fields.values())
    return f"{source.option('format', name)} {source.option('ignore', sorted(others))}"


def _encoding_fix(source: SourceConfig) -> str:
    return f"repair the row, or name the encoding of the file, such as {source.option('encoding', 'cp1252')}"


def _matches(row: Any, source: SourceConfig) -> list[str]:
    if isinstance(row, list):
        return ["turns"] if row and isinstance(row[0], dict) else []
    if not isinstance(row, dict):
        return []
    named = {column: name for name, column in source.columns.items()}
    return formats_with_columns(
        [key for key, value in row.items() if holds(value) and key not in source.ignore and key not in named]
    )


def check_schema(schema: Any, source: SourceConfig, where: str) -> None:
    """Raises DataError, which names column, type and required type, unless a columnar file has the columns of a
    source's format. A source without a format is not checked.

    Args:
        schema: pyarrow.Schema of the file.
        source: settings of the source.
        where: the file, for the message.
    """
    if not source.format:
        return
    form = FORMATS[source.format]
    required = {**form.required, **{name: source.columns[name] for name in source.columns if name in _REQUIRED}}
    fix = f"the source's format is {source.format}; set the one that matches the columns, or `columns`"
    for name, column in required.items():
        wanted = "a list of turns ({role, content} or {from, value}) or text" if name == "turns" else "text"
        if schema.names.count(column) != 1:
            number = f"{schema.names.count(column)} columns" if column in schema.names else "no column"
            present = ", ".join(schema.names) or "nothing"
            raise DataError(f"{number} `{column}` (required: {wanted}); the file has {present}", where, fix)
        kind = schema.field(column).type
        if not (_is_text(kind) or (name in _TURNS and _is_turns(kind, source))):
            raise DataError(f"column `{column}` is {kind}, required is {wanted}", where, fix)


_REQUIRED = ("turns", "prompt", "answer", "text", "chosen", "rejected")
_TURNS = ("turns", "prompt", "answer", "chosen", "rejected")
"""Columns that must exist, and those that may hold lists of turns."""


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_turns(kind: Any, source: SourceConfig) -> bool:
    import pyarrow.types as types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if not any(test(kind) for test in lists) or not types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    roles = [source.columns["role"]] if "role" in source.columns else ROLE_KEYS
    texts = [source.columns["content"]] if "content" in source.columns else TEXT_KEYS
    has_text = any(key in fields and (_is_text(fields[key]) or types.is_list(fields[key])) for key in texts)
    return any(key in fields and _is_text(fields[key]) for key in roles) and has_text
