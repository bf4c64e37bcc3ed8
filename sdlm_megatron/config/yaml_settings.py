"""Settings from YAML text: each scalar keeps its characters, and the type of its setting decides how they are read.

A text setting takes them as they are; numbers, true, false and null follow the core schema of YAML 1.2. A value that
YAML 1.1 reads otherwise is an error that names both readings.
"""

import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sdlm_megatron.config.secret_text import MASK, mask_text
from sdlm_megatron.errors import ConfigError

MOST_BYTES, MOST_LEVELS, MOST_DIGITS = 256 << 10, 20, 40
"""Limits of a file, of its nesting and of a number. The largest file of this project has 6 kB, in 4 levels."""
COMMAND_LINE = "the command line"
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
"""Types of settings in the words of an error message."""
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_OCTAL = re.compile(r"[-+]?0[0-9]+")
_BASE_60 = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+")
_NULL = ("null", "Null", "NULL", "~")
_BOOL = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_QUOTES = "put a text in quotes that contains `: ` or ` #`, or starts with one of | > @ ` % & * ! [ ] { } ' \""
_FIXES = {
    r"'\t'": "indent with spaces, not with tabs",
    "nested more than": "write it in fewer levels: sections have at most three",
    "no tag is read": "remove the tag (!…); a text that starts with ! needs quotes",
    "another document": "remove the line ---: a file is one document",
    "special characters": "remove the control character",
}
"""Fixes of YAML's own complaints, by a part of the complaint."""
_VARIABLE = re.compile(r"\$\{[^}]*\}?|\$[A-Za-z_]\w*")
_HOME = re.compile(r"~[\w.-]*/")
_PLAIN_VARIABLE = re.compile(r"\$\w+|\$\{\w+\}")
_EXPANDED = "checkpoint.local_dir"
_LITERAL = ("setup", "system_prompt", "mask_token", "pad_token")
"""Settings whose text may contain `$NAME`: lines of a shell, and what a model reads."""


class Override(yaml.ScalarNode):
    """Value of `--key=value`: the characters themselves for a text setting, YAML for any other.

    Args:
        text: the value.
        argument: the whole argument, for messages.
    """

    def __init__(self, text: str, argument: str) -> None:
        argument = mask_text(argument if len(argument) < 200 else f"{argument[:200]}…")
        mark = yaml.Mark(f"{COMMAND_LINE}, {argument}", 0, 0, 0, None, 0)
        super().__init__("tag:yaml.org,2002:str", text, mark, mark)

    def parsed(self) -> yaml.Node:
        """The value as YAML."""
        name = self.start_mark.name
        return _compose(self.value, name) or yaml.ScalarNode(self.tag, "", self.start_mark, self.end_mark)


class _Loader(yaml.BaseLoader):
    """Composes nodes without giving plain scalars a type; no tags, few levels."""

    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MOST_LEVELS} levels", event.start_mark)
        if tag := getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"the tag {tag[:40]}: no tag is read", event.start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def read_yaml(file: Path) -> yaml.MappingNode | None:
    """The settings of a file; None if it has none. Raises ConfigError on a file that is not readable YAML."""
    try:
        with open(file, "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"the file has more than {MOST_BYTES:,} bytes", str(file), "name a file of settings")
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        fix = "name a text file that you can read, saved as UTF-8"
        raise ConfigError(f"the file is not readable YAML: {error}", str(file), fix) from None
    node = _compose(text, str(file))
    if node is not None and not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "text"
        raise ConfigError(f"the file contains a {kind}, not settings", str(file), "write `section: {key: value}`")
    return node


def _compose(text: str, name: str) -> yaml.Node | None:
    loader: Any = None
    try:
        loader = _Loader(text)  # refuses control characters already here
        loader.name = name
        return typing.cast(yaml.Node | None, loader.get_single_node())
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        problem = problem or str(error).splitlines()[0]  # the reader's text has a second line about its buffer
        where = name if mark is None or name.startswith(COMMAND_LINE) else f"{name}, line {mark.line + 1}"
        fix = next((fix for part, fix in _FIXES.items() if part in problem), _QUOTES)
        raise ConfigError(f"not readable YAML: {problem}", where, fix) from None
    except RecursionError:  # the scanner's own depth
        raise ConfigError("the value is nested too deeply", name, "write it with fewer levels") from None


def place_of(node: yaml.Node) -> str:
    """File and line of a node, or its argument on the command line."""
    name = str(node.start_mark.name)
    return name if name.startswith(COMMAND_LINE) else f"{name}, line {node.start_mark.line + 1}"


def shown(text: str) -> str:
    """Text for an error message: one line, short, without control characters."""
    text = text if len(text) <= 60 else f"{text[:60]}…"
    return text if text.isprintable() else ascii(text)


def entries(node: yaml.MappingNode, head: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Keys and values of a section. Raises ConfigError on a key that is set twice or is no text."""
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"a key of {head or 'the file '}is not a text", place_of(key_node), "write NAME: VALUE")
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in lines:
            what = f"{head}{shown(key)} is set twice, in line {lines[key]} and line {line}"
            raise ConfigError(what, place_of(key_node), "keep one of them")
        if key == "<<":
            fix = "write the settings out, or name another file with `extends: FILE`"
            raise ConfigError("the merge key << is not read", place_of(key_node), fix)
        lines[key] = line
        yield key, value


def wrong(node: yaml.Node, key: str, expected: str, fix: str = "") -> ConfigError:
    """The error about a value of another type."""
    if isinstance(node, yaml.ScalarNode):
        value = shown(node.value) or "empty"
    else:
        value = "a list" if isinstance(node, yaml.SequenceNode) else "a section"
    return ConfigError(f"{key} is {value}, not {expected}", place_of(node), fix or f"set {key} to {expected}")


def scalar(node: yaml.Node, kind: Any, key: str) -> Any:
    """Value of a setting that is a text, a number, true or false.

    Args:
        kind: str, int, float or bool, or one of them `| None`.
        key: dotted name of the setting.

    Raises:
        ConfigError: another type, or two readings.
    """
    kinds = typing.get_args(kind) or (kind,)
    if isinstance(node, Override) and kinds[0] is not str:
        node = node.parsed()
    if not isinstance(node, yaml.ScalarNode):
        raise wrong(node, key, TYPES[kinds[0]])
    text, plain = node.value, node.style is None
    if plain and text in _NULL:
        if type(None) in kinds:
            return None
        fix = f'write "" for an empty {key}' if kinds[0] is str else ""
        raise wrong(node, key, TYPES[kinds[0]], fix)
    if kinds[0] is str:
        return _text(node, key)
    if kinds[0] is bool:
        if text not in _BOOL:
            raise wrong(node, key, TYPES[bool])
        return _BOOL[text]
    return _number(node, kinds[0], key)


def _text(node: yaml.ScalarNode, key: str) -> str:
    text, place = str(node.value), place_of(node)
    if isinstance(node, Override):
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            fix = f"--{key}={text[1:-1]} for the text without them; in a file they may be part of it"
            raise ConfigError(f"{key} is {shown(text)}: the quotes may be YAML's, or part of the text", place, fix)
    elif not text and node.style is None:
        raise wrong(node, key, "text", f'write "" for an empty {key}')
    if "\0" in text:
        raise ConfigError(f"{key} contains the character NUL", place, "remove it")
    if re.search("[\ud800-\udfff]", text):
        raise ConfigError(f"{key} is not valid UTF-8: {shown(text)}", place, "rename the file or folder")
    if re.sub(r"\[\d+\]$", "", key).rpartition(".")[2] in _LITERAL:
        return text
    if MASK in text:
        raise ConfigError(f"{key} contains {MASK}, written in place of a secret", place, "write the value itself")
    if _HOME.match(text):
        what = f"{key} starts with ~: a folder of that name, or your home folder"
        raise ConfigError(what, place, "write the whole path (or ./~ for the folder of that name)")
    if (variable := _VARIABLE.search(text)) is None:
        return text
    if key != _EXPANDED:
        what = f"{key} contains {shown(variable[0])}: characters of the text, or a variable of the environment"
        raise ConfigError(what, place, "write the value itself; configurations read no environment")
    if not _PLAIN_VARIABLE.fullmatch(variable[0]):
        raise ConfigError(f"{key} contains {shown(variable[0])}", place, "variables are written $NAME or ${NAME}")
    return text


def _number(node: yaml.ScalarNode, kind: type, key: str) -> int | float:
    text, place = node.value, place_of(node)
    if len(text) > MOST_DIGITS:
        raise ConfigError(f"{key} has {len(text)} digits or other characters", place, f"set {key} to {TYPES[kind]}")
    if _OCTAL.fullmatch(text):
        octal = f", or {int(text, 8)} as YAML 1.1 reads it (octal)" if not set(text) & set("89") else ""
        fix = f"write {int(text)} without the zeros"
        raise ConfigError(f"{key} is {text}: {int(text)}{octal}", place, fix)
    if _BASE_60.fullmatch(text):
        value = 0
        for part in text.lstrip("-+").split(":"):
            value = value * 60 + int(part)
        what = f"{key} is {text}: no number, or {value} as YAML 1.1 reads it (base 60)"
        raise ConfigError(what, place, f"write {value}, if that is meant")
    if not (_INTEGER if kind is int else _FLOAT).fullmatch(text):
        plain = text.replace("_", "")
        fix = f"write {plain}" if plain != text and _FLOAT.fullmatch(plain) else ""
        raise wrong(node, key, TYPES[kind], fix)
    number = kind(text)
    if not math.isfinite(number):
        raise wrong(node, key, "a finite number")
    return typing.cast("int | float", number)


def read_list(node: yaml.Node, key: str) -> list[yaml.Node]:
    """The entries of a list setting."""
    if isinstance(node, Override):
        node = node.parsed()
    if not isinstance(node, yaml.SequenceNode):
        raise wrong(node, key, "a list")
    return node.value


def read_section(node: yaml.Node, head: str) -> yaml.MappingNode:
    """A section; `head`: its dotted name with a dot at the end."""
    if isinstance(node, Override):
        node = node.parsed()
    if not isinstance(node, yaml.MappingNode):
        name, place = head[:-1], place_of(node)
        typed = place.startswith(COMMAND_LINE)
        fix = f"write {head}NAME=VALUE" if typed else "write NAME: VALUE below it, or remove the line"
        raise ConfigError(f"{name} is a section, not a value", place, fix)
    return node
