"""Argument parsers of all commands: one style, every option explained, an example at the end of `--help`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class CommandParser(argparse.ArgumentParser):
    """An argument parser of this project; make it with `make_parser`.

    Attributes:
        settings: schema of the settings that may follow as `--section.key=value`; None where the command takes none.
        list_settings: whether `--help` ends with a line for every setting of that schema.
    """

    settings: type | None = None
    list_settings = False

    def format_help(self) -> str:
        """The help text; the settings are read from the schema's source only when somebody asks for help."""
        text = super().format_help()
        if self.settings is not None and self.list_settings:
            from sdlm_megatron.config.load import settings_help

            text += f"\n{settings_help(self.settings)}\n"
        return text


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks of descriptions and examples, and appends the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
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
    command: str, description: str | None, *, example: str, schema: type, presets: Path
) -> CommandParser:
    """A parser for a command that is configured by a file: --config, --print-config and every setting of `schema`."""
    notes = "Any setting below may follow as --section.key=value."
    parser = make_parser(command, description, example=example, notes=notes, settings=schema)
    parser.list_settings = True
    names = ", ".join(sorted(file.stem for file in presets.glob("*.yaml")))
    parser.add_argument("--config", required=True, metavar="FILE", help=f"YAML file or preset: {names}")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    return parser


def parse_config(
    parser: argparse.ArgumentParser, schema: type[T], presets: Path, argv: Sequence[str] | None
) -> tuple[T, argparse.Namespace]:
    """Reads the command line of a parser made by `make_config_parser`: the configuration and the other options.

    An entry of a list is set by its name or number: `--sources.smoltalk.path=FOLDER`. With `--print-config` the
    resolved configuration is printed and SystemExit raised. Raises ConfigError on a setting that does not exist.
    """
    from sdlm_megatron.config.load import load_config, to_yaml

    args, overrides = parser.parse_known_args(argv)
    config = load_config(schema, args.config, overrides, presets)
    if args.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config, args
