"""Chat with a model folder: SDLM's answers in the colours of the passes their tokens came in.

In a terminal it is a conversation (/reset forgets it, /quit or Ctrl-D ends, Ctrl-C stops an answer). With --prompt, or
with text on standard input, it gives one answer. A folder without SDLM's keys is decoded one token a pass (ar).
"""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sdlm_megatron.chat.chat_model import DTYPES, Answer, ChatModel, Settings, load
from sdlm_megatron.chat.terminal_view import LiveAnswer, figures, note, show_pair
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.diffusion.decode import ALGORITHMS
from sdlm_megatron.errors import CheckpointError, ConfigError, UserError, run_cli

EXAMPLES = """sdlm generate --model runs/quickstart/hf
sdlm generate --model SDLM-3B-D4 --threshold 0.98 --prompt "Why is the sky blue?"
sdlm generate --model SDLM-3B-D4 --compare < question.txt"""
COMMANDS = ("/reset", "/quit")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm generate", __doc__, example=EXAMPLES)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="exported or published Hugging Face folder")
    add("--prompt", metavar="TEXT", help="one answer to this, without a conversation")
    add("--system", metavar="TEXT", help="system turn; default: the chat template's")
    add("--compare", action="store_true", help="also decode greedily by transformers (ar), and compare")
    add("--alg", choices=ALGORITHMS, help="default: as the folder says, else prob_conf")
    add("--n", type=int, help="tokens proposed in a pass; default: as the folder says")
    add("--threshold", type=float, metavar="TAU", help="keep tokens surer than this; default: as the folder says")
    add("--product", action="store_true", help="compare the product of the confidences so far with the threshold")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="default: 512")
    add("--temperature", type=float, default=0.0, metavar="T", help="sample; default: 0, greedy")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest that hold this share")
    add("--seed", type=int, default=0, help="of sampling; default: 0")
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer after this; may be given many times")
    add("--dtype", choices=sorted(DTYPES), help="default: as the folder says")
    add("--device", help="default: a GPU if there is one, else cpu")
    return parser


def settings_of(args: argparse.Namespace, chat: ChatModel) -> Settings:
    """What the command line asks for, completed by the folder; ConfigError names the option that does not fit."""
    config, folder = chat.config, chat.defaults
    alg = args.alg or (folder.get("sdlm_alg") or "prob_conf" if config.is_sdlm else "ar")
    if not config.is_sdlm and (args.compare or alg != "ar"):
        option = "--compare" if args.compare else f"--alg {alg}"
        raise CheckpointError(
            f"{option} needs an SDLM folder, this is a plain {config.model_type}: its config.json has no block_size",
            str(chat.folder),
            "leave it out (--alg ar is what works), or name a folder that was trained as an SDLM",
        )
    if args.compare and alg == "ar":
        raise ConfigError("--compare sets SDLM's decoding beside ar", "--alg ar", "leave one of them out")
    if args.compare and args.temperature:
        raise ConfigError("--compare compares greedy answers", "--temperature", "leave one of them out")
    if not args.temperature and (args.top_k is not None or args.top_p is not None):
        raise ConfigError("--top-k and --top-p choose what is sampled", "--temperature", "set it, e.g. 1")
    if alg not in ALGORITHMS:
        raise CheckpointError(
            f"sdlm_alg is '{alg}'", f"{chat.folder}/generation_config.json", f"one of {', '.join(ALGORITHMS)}"
        )
    window = args.n if args.n is not None else _stored(chat, "sdlm_n", config.block_size or 1)
    threshold = args.threshold if args.threshold is not None else _stored(chat, "sdlm_threshold", 0.9)
    found = Settings(
        alg=alg,
        window=1 if alg == "ar" else window,
        threshold=threshold,
        product=args.product or bool(folder.get("sdlm_product")),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    wrong = {
        "--n": (found.window, found.window >= 1, "at least 1"),
        "--threshold": (found.threshold, 0 <= found.threshold <= 1, "between 0 and 1"),
        "--max-new-tokens": (found.max_new_tokens, found.max_new_tokens >= 1, "at least 1"),
        "--temperature": (found.temperature, found.temperature >= 0, "0 or more"),
        "--top-k": (found.top_k, found.top_k is None or found.top_k >= 1, "at least 1"),
        "--top-p": (found.top_p, found.top_p is None or 0 < found.top_p <= 1, "above 0, at most 1"),
        "--stop": ("empty", all(found.stop), "some text"),
    }
    for name, (value, fits, fix) in wrong.items():
        if not fits:
            raise ConfigError(f"{name} is {value}", "the command line", f"give {fix}")
    return found


def _stored(chat: ChatModel, name: str, default: Any) -> Any:
    """A number of generation_config.json, of the kind that `default` is."""
    value = chat.defaults.get(name)
    if value is None:
        return default
    kinds = int if isinstance(default, int) else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise CheckpointError(
            f"{name} is {value!r}", f"{chat.folder}/generation_config.json", f"a number, as {default}"
        )
    return value


class Session:
    """One conversation."""

    def __init__(self, chat: ChatModel, settings: Settings, system: str | None, compare: bool) -> None:
        self._chat, self._settings, self._compare = chat, settings, compare
        self._console = Console(highlight=False)
        self._system = chat.default_system() if system is None else system
        self._turns = 0
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, prompt: str) -> Answer:
        """Shows the answer to `prompt`, and remembers both."""
        messages = [*self._messages, {"role": "user", "content": prompt}]
        ids = self._chat.encode(messages)
        settings = dataclasses.replace(self._settings, seed=self._settings.seed + self._turns)
        answer = self._both(ids, settings) if self._compare else self._one(ids, settings)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._turns += 1
        return answer

    def _one(self, ids: list[int], settings: Settings) -> Answer:
        with LiveAnswer(self._console, self._chat.tokenizer) as view:
            answer = self._chat.answer(ids, settings, view.add)
        note(self._console, figures(answer, settings.max_new_tokens))
        return answer

    def _both(self, ids: list[int], settings: Settings) -> Answer:
        names = (str(settings), "ar: transformers' greedy generate")
        runs = (self._chat.answer, self._chat.greedy)
        answers: list[Answer] = []
        few = dataclasses.replace(settings, max_new_tokens=min(2 * settings.window, settings.max_new_tokens))
        for warm, run in [(True, run) for run in runs] + [(False, run) for run in runs]:
            label = "warming up: " if warm else f"{names[len(answers)]}: "
            with LiveAnswer(self._console, self._chat.tokenizer, label=label, text=False) as view:
                answer = run(ids, few if warm else settings, view.add)
            if answer.interrupted:
                raise KeyboardInterrupt
            answers += [] if warm else [answer]
        ours, theirs = answers
        show_pair(self._console, self._chat.tokenizer, (ours, theirs), names, settings.max_new_tokens)
        return ours

    def converse(self) -> None:
        """Asks and answers until /quit or the end of the input."""
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/quit":
                return
            if line == "/reset":
                self.reset()
                note(self._console, "the conversation is forgotten")
            elif line.startswith("/") and " " not in line:
                note(self._console, f"no command {line}: {', '.join(COMMANDS)}")
            elif line:
                try:
                    self.ask(line)
                except KeyboardInterrupt:
                    note(self._console, "interrupted")
                except UserError as error:
                    note(self._console, f"error: {error}")


def _piped_prompt() -> str | None:
    """Standard input when it is no terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt is no UTF-8 text: {error.reason}", "standard input") from None
    if not text:
        raise ConfigError("no prompt: standard input is empty", fix='pass --prompt "…", or run it in a terminal')
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal's encoding lacks a character
    try:
        _run(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # e.g. `| head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _run(args: argparse.Namespace) -> None:
    prompt = args.prompt if args.prompt is not None else _piped_prompt()
    _quiet_transformers()
    chat = load(args.model, dtype=args.dtype, device=args.device)
    settings = settings_of(args, chat)
    session = Session(chat, settings, args.system, args.compare)
    console = Console(stderr=True, highlight=False)
    note(console, f"{chat.describe()}: {settings}")
    if not chat.config.is_sdlm:
        note(console, "no SDLM keys in its config.json: plain next-token decoding, one token a pass")
    if prompt is None:
        import readline  # noqa: F401  # line editing and history for input()

        note(console, f"commands: {', '.join(COMMANDS)}")
        session.converse()
    elif session.ask(prompt).interrupted:
        raise KeyboardInterrupt


def _quiet_transformers() -> None:
    """Without a terminal, no progress bars; no advice about settings that are not ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
