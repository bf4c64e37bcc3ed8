"""Names, types, defaults and explanations of the settings of a schema, for `--help`, completion and error messages."""

import ast
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

WIDTH = 110
"""Columns of the list of settings."""


@dataclass(frozen=True)
class Setting:
    """One setting of a schema, as `--help`, completion and error messages need it."""

    key: str
    """Dotted name, such as train.steps."""
    type: str
    default: str
    """As YAML would write it."""
    text: str
    """The docstring under the field."""


def settings_of(schema: type, head: str = "") -> Iterator[Setting]:
    """All settings of a dataclass and the dataclasses in it. Entries of a list of dataclasses get NAME as their key."""
    hints, texts = typing.get_type_hints(schema), field_docs(schema)
    for field in fields(schema):
        kind, key = hints[field.name], f"{head}{field.name}"
        if is_dataclass(kind):
            yield from settings_of(typing.cast(type, kind), f"{key}.")
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        yield Setting(key, _type_name(kind), typed(default), texts.get(field.name, ""))
        # list[SourceConfig]: the settings of one entry follow the list itself
        for part in typing.get_args(kind):
            if is_dataclass(part):
                yield from settings_of(typing.cast(type, part), f"{key}.NAME.")


def field_docs(schema: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line; read from the source because Python drops them."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    statements = typing.cast(ast.ClassDef, body).body
    texts = {}
    for statement, following in itertools.pairwise(statements):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    texts[statement.target.id] = " ".join(text.split())
    return texts


def _type_name(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (None, list, dict):
        return str((origin or kind).__name__)
    return str(typing.get_args(kind)[0].__name__)  # X | None


def typed(value: Any) -> str:
    """A value as it is typed on a command line, without the quotes that a YAML library would add."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    return f'"{value}"' if value == "" else str(value)


def settings_help(schema: type) -> str:
    """Every setting with type, default and explanation, for the end of `--help`."""
    lines = ["settings:"]
    for setting in settings_of(schema):
        lines.append(f"  --{setting.key}={setting.type.upper()}  (default: {setting.default})")
        lines += textwrap.wrap(setting.text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
