"""Chat with a model folder in the terminal, each token colored by the forward pass that produced it.

In a terminal this is a conversation: /reset clears it, /quit or Ctrl-D ends it, Ctrl-C stops an answer. With --prompt,
or with text on standard input, it prints one answer. A folder that is not an SDLM is decoded one token per pass (ar).
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.chat.chat_model import Answer, AnswerSettings, ChatModel, load, quiet_transformers
from sdlm_megatron.chat.terminal_view import LiveAnswer, note, show_pair, statistics
from sdlm_megatron.config.command_line import at_least, make_parser, threshold
from sdlm_megatron.diffusion.decode import ALGORITHMS
from sdlm_megatron.diffusion.settings import LOSSLESS_UNTRAINED
from sdlm_megatron.errors import ConfigError, DataError, UserError, make_console, run_cli
from sdlm_megatron.weights.dtypes import PRECISIONS
from sdlm_megatron.weights.positions import trained_positions

EXAMPLES = """sdlm generate --model runs/quickstart/hf
sdlm generate --model SDLM-3B-D4 --threshold 0.98 --prompt "Why is the sky blue?"
sdlm generate --model SDLM-3B-D4 --compare < question.txt"""
COMMANDS = ("/reset", "/quit")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm generate", __doc__, example=EXAMPLES)
    add = parser.add_argument
    folder = "default: the folder's generation_config.json"
    add("--model", type=Path, required=True, metavar="DIR", help="exported SDLM folder, or a plain base model")
    add("--prompt", metavar="TEXT", help="answer this prompt and exit")
    add("--system", metavar="TEXT", help="system turn; default: the chat template's")
    add("--compare", action="store_true", help="also run the greedy generate of transformers (ar) and compare")
    add("--alg", choices=ALGORITHMS, help=f"decoding algorithm; {folder}, else prob_conf")
    add("--n", type=at_least(1), metavar="N", help=f"tokens proposed in a pass; {folder}, else the trained block size")
    above = "keep tokens with a confidence above this"
    add("--threshold", type=threshold, metavar="TAU", help=f"{above}; {folder}, else 0.9")
    add(
        "--product", action="store_true", default=None, help="compare the product of the confidences with the threshold"
    )
    add("--max-new-tokens", type=at_least(1), default=512, metavar="N", help="longest answer, in tokens")
    add("--temperature", type=at_least(0, float), default=0.0, metavar="T", help="sample; default: 0, greedy")
    add("--top-k", type=at_least(1), metavar="K", help="sample from the K most likely tokens")
    add("--top-p", type=threshold, metavar="P", help="sample from the most likely tokens with this total probability")
    add("--seed", type=int, default=0, help="seed of sampling; default: 0")
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer after this text; can be repeated")
    add("--dtype", choices=sorted(PRECISIONS), help="dtype of the weights; default: the folder's own")
    add("--device", help="torch device; default: a GPU if there is one, else cpu")
    return parser


def settings_of(args: argparse.Namespace, chat: ChatModel) -> AnswerSettings:
    """Settings from the command line, completed from the folder. ConfigError names options that do not fit."""
    names = ("alg", "n", "threshold", "product")
    rule = chat.decoding_rule("the command line", **{name: getattr(args, name) for name in names})
    if args.compare and rule.alg == "ar":
        what = "--compare sets SDLM decoding beside ar, and this is ar alone"
        raise ConfigError(what, "the command line", "leave out --compare, or name an SDLM folder and no --alg ar")
    if args.compare and args.temperature:
        raise ConfigError("--compare compares greedy answers", "--temperature", "leave one of them out")
    if not args.temperature and (args.top_k is not None or args.top_p is not None):
        raise ConfigError("--top-k and --top-p have an effect on sampling only", "--temperature", "set it, e.g. to 1")
    if not all(args.stop):
        raise ConfigError("--stop is empty", "the command line", "pass some text")
    return AnswerSettings(
        **rule.options,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )


class Session:
    """One conversation."""

    def __init__(self, chat: ChatModel, settings: AnswerSettings, system: str | None, compare: bool) -> None:
        self._chat, self._settings, self._compare = chat, settings, compare
        self._console = make_console()
        self._system = chat.default_system() if system is None else system
        self._turns = 0
        self.reset()

    def reset(self) -> None:
        """Clears the conversation."""
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, prompt: str) -> Answer:
        """Decodes and shows the answer to `prompt`, and adds both to the conversation."""
        messages = [*self._messages, {"role": "user", "content": prompt}]
        ids, most = self._chat.encode(messages), trained_positions(self._chat.config)
        if len(ids) >= most:
            what = f"the conversation has {len(ids):,} tokens, the model was trained for {most:,} positions"
            raise DataError(what, str(self._chat.folder / "config.json"), "ask less; in the chat, /reset clears it")
        room, self._limit = most - len(ids), "the last of the trained positions"
        if room >= self._settings.max_new_tokens:
            room, self._limit = self._settings.max_new_tokens, f"--max-new-tokens {self._settings.max_new_tokens}"
        else:
            note(self._console, f"the model was trained for {most:,} positions: {room:,} are left for the answer")
        seed = self._settings.seed + self._turns
        settings = dataclasses.replace(self._settings, seed=seed, max_new_tokens=room)
        answer = self._both(ids, settings) if self._compare else self._one(ids, settings)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._turns += 1
        return answer

    def _one(self, ids: list[int], settings: AnswerSettings) -> Answer:
        with LiveAnswer(self._console, self._chat.tokenizer) as view:
            answer = self._chat.answer(ids, settings, view.add)
        note(self._console, statistics(answer, self._limit))
        return answer

    def _both(self, ids: list[int], settings: AnswerSettings) -> Answer:
        names = (str(settings), "ar: transformers' greedy generate")
        runs = (self._chat.answer, self._chat.greedy)
        answers: list[Answer] = []
        # both are warmed up first: the first decoding of a process allocates memory and selects kernels
        few = dataclasses.replace(settings, max_new_tokens=min(2 * settings.window, settings.max_new_tokens))
        for warm, run in [(True, run) for run in runs] + [(False, run) for run in runs]:
            label = "warming up: " if warm else f"{names[len(answers)]}: "
            with LiveAnswer(self._console, self._chat.tokenizer, label=label, text=False) as view:
                answer = run(ids, few if warm else settings, view.add)
            if answer.interrupted:
                raise KeyboardInterrupt
            answers += [] if warm else [answer]
        ours, theirs = answers
        show_pair(self._console, self._chat.tokenizer, (ours, theirs), names, self._limit)
        return ours

    def converse(self) -> None:
        """Reads and answers prompts until /quit or the end of the input."""
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            except UnicodeDecodeError as error:
                note(self._console, f"error: the line is not {error.encoding} text: {error.reason}")
                continue
            if line == "/quit":
                return
            if line == "/reset":
                self.reset()
                note(self._console, "the conversation is cleared")
            elif line.startswith("/") and " " not in line:
                note(self._console, f"unknown command {line}; commands: {', '.join(COMMANDS)}")
            elif line:
                try:
                    self.ask(line)
                except KeyboardInterrupt:
                    note(self._console, "interrupted")
                except UserError as error:
                    note(self._console, f"error: {error}")


def _piped_prompt() -> str | None:
    """The text on standard input; None if that is a terminal. ConfigError when there is no text."""
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read().strip() if sys.stdin is not None else ""  # None: closed, as `<&-` does
    except UnicodeDecodeError as error:
        what = f"the prompt is not UTF-8 text: {error.reason}"
        raise ConfigError(what, "standard input", "convert it, as with iconv") from None
    if not text:
        raise ConfigError("no prompt: standard input is empty", fix='pass --prompt "…", or run it in a terminal')
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    try:
        _run(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run(args: argparse.Namespace) -> None:
    prompt = args.prompt if args.prompt is not None else _piped_prompt()
    quiet_transformers()
    chat = load(args.model, dtype=args.dtype, device=args.device)
    settings = settings_of(args, chat)
    session = Session(chat, settings, args.system, args.compare)
    console = make_console(stderr=True)
    note(console, f"{chat.describe()}: {settings}")
    if settings.alg == "lossless" and chat.config.decoding.next_token_weight == 0:
        note(console, LOSSLESS_UNTRAINED)
    if not chat.config.is_sdlm:
        note(console, "not an SDLM (its config.json has no block_size): plain next-token decoding, one token per pass")
    if prompt is None:
        with contextlib.suppress(ImportError):  # line editing and history for input(), which some Pythons lack
            import readline  # noqa: F401

        note(console, f"commands: {', '.join(COMMANDS)}")
        session.converse()
    elif session.ask(prompt).interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
