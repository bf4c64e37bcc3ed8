"""Argument parsers of all commands: one style, every option explained, an example at the end of `--help`."""

import argparse
from typing import Any


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks of descriptions and examples, and appends the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, False, True, argparse.SUPPRESS, "", [], ())
        return f"{text} (default: %(default)s)" if shown and action.option_strings and "default" not in text else text


def make_parser(command: str, description: str, *, example: str, **options: Any) -> argparse.ArgumentParser:
    """An argument parser in the style of this project.

    Args:
        command: how the command is typed, such as "sdlm export" or "python -m dev.bench.step".
        description: what it does; the first line should be one sentence.
        example: one or more complete command lines.
        options: further arguments of argparse.ArgumentParser.
    """
    lines = "\n".join(f"  {line}" for line in example.splitlines())
    return argparse.ArgumentParser(
        prog=command,
        description=description.strip(),
        epilog=f"example:\n{lines}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        **options,
    )
