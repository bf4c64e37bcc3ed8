"""Help of all commands has one style: program name, example, and a sentence for every option."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from sdlm_megatron.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGES = ("sdlm_megatron", "data_prep", "checkpoints_tools", "dev")


def _sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _command_modules() -> list[str]:
    """Modules of the product and of dev/ that users start with `python -m`, except the dispatcher."""
    started = [path for path in _sources() if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in started]
    # `sdlm plan --simulate` starts the second one and writes to its input
    return [name for name in names if name not in ("sdlm_megatron.cli", "sdlm_megatron.parallel.simulate")]


MODULES = _command_modules()


def test_every_subcommand_is_a_command_module():
    modules = {command.module for command in COMMANDS.values()}
    assert modules <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_help_has_an_example_and_a_sentence_for_every_option(name: str):
    parser = importlib.import_module(name).build_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    assert re.match(r"sdlm |python -m ", parser.prog), "prog must be the command as typed"
    assert parser.description
    assert "example:\n  " in parser.format_help()
    assert "docs/" not in parser.format_help() or name.startswith("dev."), "a wheel has no docs/"
    without = ["/".join(a.option_strings) or a.dest for a in parser._actions if not a.help]
    assert not without, f"{name}: no help for {', '.join(without)}"


def test_parsers_are_made_in_one_place():
    makers = [path.name for path in _sources() if "ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert makers == [], "use sdlm_megatron.config.command_line.make_parser"
