"""Argument parsers of all commands: one style, every option and setting explained, an example in `--help`."""

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sdlm_megatron.config.explain import settings_help, settings_of
from sdlm_megatron.errors import ConfigError, UserError, print_error

T = TypeVar("T")


class CommandParser(argparse.ArgumentParser):
    """An argument parser of this project; make it with `make_parser` or `make_config_parser`.

    Attributes:
        settings: schema of the settings that may follow as `--section.key=value`; None where the command takes none.
        list_settings: whether `--help` ends with a line for every setting of that schema.
    """

    settings: type | None = None
    list_settings = False

    def format_help(self) -> str:
        """The help text. The settings are only read here: parsing their source takes longer than the parser itself."""
        text = super().format_help()
        return f"{text}\n{settings_help(self.settings)}\n" if self.settings and self.list_settings else text

    def error(self, message: str) -> NoReturn:
        """Ends the command with the form that all errors of this project have."""
        print_error(UserError(message, "the command line", f"`{self.prog} --help` explains the options"))
        raise SystemExit(2)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks of descriptions and examples, and appends the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        # argparse's own formatter for defaults would print "(default: None)" and "(default: False)" too.
        text = action.help or ""
        shown = action.default not in (None, False, True, argparse.SUPPRESS, "", [], ())
        return f"{text} (default: %(default)s)" if shown and action.option_strings and "default" not in text else text


def make_parser(
    command: str, description: str | None, *, example: str, notes: str = "", settings: type | None = None
) -> CommandParser:
    """An argument parser in the style of this project.

    Args:
        command: the command as it is typed, such as "sdlm export" or "python -m dev.bench.step".
        description: what the command does; usually the module's docstring.
        example: one or more complete command lines.
        notes: text between the options and the example.
        settings: schema of the settings that may follow as `--section.key=value`.
    """
    lines = "\n".join(f"  {line}" for line in example.strip().splitlines())
    parser = CommandParser(
        prog=command,
        description=(description or "").strip(),
        epilog="\n\n".join([*filter(None, [notes.strip()]), f"example:\n{lines}"]),
        formatter_class=_HelpFormatter,
        # An abbreviation that works today would become ambiguous with the next option.
        allow_abbrev=False,
    )
    parser.settings = settings
    return parser


def make_config_parser(
    command: str, description: str | None, *, example: str, schema: type, presets: Path, config_required: bool = True
) -> CommandParser:
    """A parser for a command that is configured by a file: --config, --print-config and every setting of `schema`."""
    notes = "Any setting below may follow as --section.key=VALUE; lists are written as in YAML: [1, 2]."
    parser = make_parser(command, description, example=example, notes=notes, settings=schema)
    parser.list_settings = True
    add_preset(parser, "--config", presets, required=config_required)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    return parser


def add_preset(parser: argparse._ActionsContainer, name: str, presets: Path, **options: Any) -> None:
    """Adds the argument `name`: a YAML file, or the name of one in the folder `presets`."""
    names = sorted(file.stem for file in presets.glob("*.yaml"))
    options |= {"metavar": "FILE"} if name.startswith("-") else {}
    explained = f"YAML file or preset: {', '.join(names)}"
    complete_with(parser.add_argument(name, type=_name, help=explained, **options), names)


def _name(text: str) -> str:
    """An argparse type: a name. It is empty where a shell's variable has no value."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def complete_with(argument: argparse.Action, names: Sequence[str]) -> None:
    """Lets the shell complete an argument by names and files."""
    # argcomplete looks for this attribute. A completer replaces its own completion of file names.
    argument.completer = lambda prefix, **_: [*names, *map(str, Path().glob(f"{prefix}*"))]  # type: ignore[attr-defined]


def parse_config(
    parser: argparse.ArgumentParser, schema: type[T], presets: Path, argv: Sequence[str] | None
) -> tuple[T, argparse.Namespace]:
    """Reads the command line of a parser made by `make_config_parser`: the configuration and the other options.

    An entry of a list is set by its name or number: `--sources.smoltalk.path=FOLDER`. With `--print-config` the
    resolved configuration is printed and SystemExit raised. Raises ConfigError on a setting that does not exist.
    """
    from sdlm_megatron.config.load import load_config, to_yaml

    # Settings are no options of argparse: the usage line would list all of them, and list entries have no fixed names.
    args, overrides = parse_with_settings(parser, argv)
    config = load_config(schema, args.config or "", overrides, presets)
    if args.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config, args


def parse_with_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Options of the parser, and the other arguments as `--key=value`. Raises ConfigError on a misspelled option."""
    schema = parser.settings if isinstance(parser, CommandParser) else None
    names = {f"--{field.name}" for field in fields(schema)} if schema else set()
    left: list[str] = []
    settings: list[str] = []
    takes = False
    # Before argparse, which takes a setting with a space, and the VALUE of `--key VALUE`, for an argument of its own.
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, _ = word.partition("=")
        options, dashed = parser._option_string_actions, word.startswith("--")
        setting = dashed and name not in options and (equals or "." in name or name in names)
        (settings if setting or (takes and not dashed) else left).append(word)
        takes = bool(setting and not equals)
    args, rest = parser.parse_known_args(left)
    overrides = [*join_values(settings), *join_values(rest)]
    known = {f"--{setting.key}" for setting in settings_of(schema)} if schema and overrides else set()
    for override in overrides:
        name = override.partition("=")[0]
        near = difflib.get_close_matches(name, [*parser._option_string_actions, *known], 1, 0.8)
        # A misspelled setting is an error of load_config, which also says where it is.
        if name not in known and near and near[0] not in known:
            raise ConfigError(f"unknown option {name}", "the command line", f"did you mean {near[0]}?")
    return args, overrides


def join_values(arguments: Sequence[str]) -> list[str]:
    """`--key VALUE` written as `--key=VALUE`, the only form that `load_config` reads."""
    joined: list[str] = []
    for argument in arguments:
        # A value may start with one dash, as negative numbers do; a key starts with two.
        if joined and not argument.startswith("--") and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def add_setting_options(parser: argparse.ArgumentParser, *, names: bool) -> None:
    """Adds the settings of a command as options, for shell completion only.

    Args:
        names: complete names: each option ends in `=`, after which the shell adds no space. False: complete values.
    """
    from sdlm_megatron.config.validate import CHOICES

    schema = parser.settings if isinstance(parser, CommandParser) else None
    for setting in settings_of(schema) if schema else ():
        # a key that the user chooses cannot be completed, and an option may have the name of a setting
        if ".NAME." in setting.key or f"--{setting.key}" in parser._option_string_actions:
            continue
        choices = ("true", "false") if setting.type == "bool" else CHOICES.get(setting.key)
        parser.add_argument(f"--{setting.key}{'=' if names else ''}", choices=choices)


def at_least(least: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """An argparse type: a number that is not below `least`."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is below {least}, or no finite number")
        return value

    # argparse names the type in the message about text that is no number
    number.__name__ = kind.__name__
    return number


def threshold(text: str) -> float:
    """An argparse type: a confidence between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
