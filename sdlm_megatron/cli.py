"""The command `sdlm`: a table of subcommands; a command's module is imported only when it is called."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from sdlm_megatron import __version__
from sdlm_megatron.errors import UserError, run_cli


@dataclass(frozen=True)
class Command:
    """One subcommand: `module.main(argv)` runs it, `module.build_parser()` describes its options."""

    module: str
    summary: str


COMMANDS = {
    "prepare": Command("data_prep.build", "conversations to a packed dataset"),
    "inspect": Command("data_prep.inspect", "show one row of a packed dataset"),
    "stats": Command("data_prep.stats", "HTML page about a packed dataset"),
    "verify": Command("data_prep.verify", "check a packed dataset against its rules"),
    "plan": Command("sdlm_megatron.planner.plan", "memory, time and cost of a training run, and the best layouts"),
    "train": Command("sdlm_megatron.train", "train on this machine (start several processes with torchrun)"),
    "submit": Command("sdlm_megatron.ops.driver.submit", "submit a job to Slurm with the settings of a cluster"),
    "preflight": Command("sdlm_megatron.ops.driver.preflight", "check the nodes of a Slurm job"),
    "report": Command("sdlm_megatron.report.run_page", "HTML page about a training run"),
    "import": Command("checkpoints_tools.hf_to_mcore", "Hugging Face folder to training checkpoint"),
    "export": Command("checkpoints_tools.mcore_to_hf", "training checkpoint to Hugging Face folder"),
    "compare": Command("checkpoints_tools.compare", "compare the tensors of two models"),
    "generate": Command("sdlm_megatron.chat.generate", "chat with an exported folder in the terminal"),
    "evaluate": Command("sdlm_megatron.evaluation.evaluate", "quality, speed and calibration of an exported folder"),
    "doctor": Command("sdlm_megatron.doctor", "check this machine's environment"),
}
COMPLETION = 'eval "$(register-python-argcomplete sdlm)"'


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `sdlm COMMAND ARGUMENTS`. Raises UserError on an unknown command."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(_overview())
        return
    if command == "--version":
        print(f"sdlm {__version__}")
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, [*COMMANDS, "--help", "--version"], 1)
        fix = f"did you mean `sdlm {near[0]}`?" if near else f"one of: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command}", "the command line", fix)
    importlib.import_module(COMMANDS[command].module).main(rest)


def _overview() -> str:
    rows = "\n".join(f"  {name:10} {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: sdlm COMMAND [OPTIONS]\n\n{rows}\n\n"
        "example:\n  sdlm train --config sdlm_3b_d4 --data.path=DATA --checkpoint.base=DIR --dry-run\n\n"
        "sdlm COMMAND --help explains the options of a command, sdlm --version prints the version.\n"
        f"Completion of commands, options and settings in bash and zsh: {COMPLETION}"
    )


def complete() -> None:
    """Answers a shell that asks for completions (see argcomplete), and exits.

    Only the module of the command on the line is imported: completing `sdlm tr` imports no torch.
    """
    import argcomplete

    from sdlm_megatron.config.command_line import add_setting_options, make_parser

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    _, prefix, _, words, _ = argcomplete.split_line(line, point)
    if len(words) > 1 and words[1] in COMMANDS:
        module, name = importlib.import_module(COMMANDS[words[1]].module), 2
        kinds = getattr(module, "KINDS", ())  # of evaluate, each of which is a module with options of its own
        if len(words) > 2 and words[2] in kinds:
            kind, name = words[2], 3
            module = module if kind == "report" else importlib.import_module(f"{module.__package__}.{kind}")
        parser = module.build_parser()
        if kinds and name == 2:
            parser.add_argument("kind", choices=list(kinds))
        add_setting_options(parser, names=prefix.startswith("-") and "=" not in prefix)
        # argcomplete takes the word with this number, from 1, for the name of the program.
        os.environ["_ARGCOMPLETE"] = str(name)
    else:
        parser = make_parser("sdlm", None, example="sdlm train")
        parser.add_argument("--version", action="store_true", help="print the version")
        parser.add_argument("command", choices=list(COMMANDS))
    argcomplete.autocomplete(parser)


def entry() -> None:
    """Console script of the wheel."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    run_cli(main, sys.argv[1:])


if __name__ == "__main__":
    entry()
