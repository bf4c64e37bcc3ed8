"""Quality against tokens a pass: held-out prompts decoded with many thresholds, at little more than the price of two.

The prompts are decoded plainly (n = 1) and with the highest threshold; what was written is probed once
(evaluation.probe), and every other setting is followed along it. A prompt for which a setting would write something
else is decoded with that setting. Writes OUT/sweep.json; `python -m evaluation.page OUT` draws it.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data_prep.progress import Advance, track
from rich.console import Console

from evaluation.decoding import Decoded, Setting, decode_prompts
from evaluation.facts import facts_of
from evaluation.probe import follow, probe
from evaluation.prompts import Prompt, encode, read_prompts
from sdlm_megatron.chat.model import ChatModel, load
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.files import write_json

PROB = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
ENTROPY = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""1 - H / log V; a certain slot has 1."""


class Sweep:
    """The settings of one window over the same prompts."""

    def __init__(
        self, chat: ChatModel, prompts: Sequence[Prompt], *, max_new_tokens: int, batch: int, console: Console
    ) -> None:
        self.chat, self.prompts, self.console = chat, prompts, console
        self.encoded = [encode(chat, prompt) for prompt in prompts]
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch": batch}

    def plain(self) -> dict[str, Any]:
        """One causal step a token."""
        return self.decoded(Setting())

    def window(self, window: int, prob: Sequence[float], entropy: Sequence[float]) -> list[dict[str, Any]]:
        """Rows of all thresholds with windows of `window` tokens, and of self-speculation."""
        base = Setting("prob_conf", window, max(prob))
        written = self._decode(range(len(self.prompts)), base)
        end = self.chat.end_tokens[-1]
        texts = [[*t, end][: sum(a)] for t, a in zip(written.tokens, written.accepted, strict=True)]
        with self._track(f"probe, n = {window}") as advance:
            probes = probe(self.chat, self.encoded, texts, window=window, progress=advance)
        settings = [Setting("prob_conf", window, t) for t in prob if t != base.threshold]
        settings += [Setting("entropy_conf", window, t) for t in entropy]
        settings.append(Setting("self_speculative", window))
        rows = [self._row(base, written, len(self.prompts))]
        for setting in settings:
            accepted = [follow(text, seen, setting) for text, seen in zip(texts, probes, strict=True)]
            left = [i for i, found in enumerate(accepted) if found is None]
            again = self._decode(left, setting)
            tokens = list(written.tokens)
            for i, new, kept in zip(left, again.tokens, again.accepted, strict=True):
                tokens[i], accepted[i] = new, kept
            rows.append(self._row(setting, Decoded(tokens, [a or [] for a in accepted], 0.0), len(left)))
        return rows

    def decoded(self, setting: Setting) -> dict[str, Any]:
        """The row of a setting with every prompt decoded."""
        return self._row(setting, self._decode(range(len(self.prompts)), setting), len(self.prompts))

    def _decode(self, which: Sequence[int], setting: Setting) -> Decoded:
        if not which:
            return Decoded([], [], 0.0)
        with self._track(setting.name, len(which)) as advance:
            return decode_prompts(
                self.chat, [self.encoded[i] for i in which], setting, progress=advance, **self.options
            )

    def _track(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        return track(title, total or len(self.prompts), "prompts", self.console)

    def _row(self, setting: Setting, done: Decoded, decoded: int) -> dict[str, Any]:
        texts = self.chat.tokenizer.batch_decode(done.tokens)
        exact = [int(text == prompt.expected) for text, prompt in zip(texts, self.prompts, strict=True)]
        tokens, passes = [sum(a) for a in done.accepted], [len(a) for a in done.accepted]
        self.console.print(
            f"{setting.name:28} {sum(tokens) / sum(passes):5.2f} tokens a pass {sum(exact) / len(exact):7.1%} exact"
            f"   ({decoded} of {len(exact)} decoded)",
            highlight=False,
        )
        threshold = setting.threshold if setting.alg.endswith("_conf") else None
        return {
            "alg": setting.alg,
            "n": setting.window,
            "threshold": threshold,
            "exact": exact,
            "tokens": tokens,
            "passes": passes,
            "decoded": decoded,
        }


def run(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    *,
    windows: Sequence[int],
    prob: Sequence[float],
    entropy: Sequence[float],
    max_new_tokens: int,
    batch: int,
    console: Console,
) -> list[dict[str, Any]]:
    """All rows of a sweep; windows of one token only have the plain one."""
    sweep = Sweep(chat, prompts, max_new_tokens=max_new_tokens, batch=batch, console=console)
    rows = [sweep.plain()] if chat.config.target_shift else []  # without the shift a model was not trained for it
    for window in windows:
        if window > 1:
            rows += sweep.window(window, prob, entropy)
    return rows


def windows_of(chat: ChatModel, given: Sequence[int] | None) -> list[int]:
    """The windows asked for, or the block size of the model; CheckpointError where it cannot decode blocks."""
    if chat.config.block_size is None:
        if given:
            raise CheckpointError("the model has no block_size: it is no SDLM", str(chat.folder), "leave out --windows")
        return [1]
    return list(given or [chat.config.block_size])


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What every measurement of prompts takes."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help='JSONL of {"prompt", "expected"}')
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the result")
    parser.add_argument("--most", type=int, default=0, help="use the first so many prompts; default: all")
    parser.add_argument("--batch", type=int, default=64, help="prompts at a time")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m evaluation.sweep --model runs/quickstart/hf "
        "--prompts runs/quickstart/task/heldout.jsonl --out runs/quickstart/sweep",
    )
    add_model_arguments(parser)
    parser.add_argument("--windows", type=int, nargs="+", metavar="N", help="default: the trained block size")
    parser.add_argument("--prob", type=float, nargs="+", default=PROB, help="thresholds of prob_conf")
    parser.add_argument("--entropy", type=float, nargs="*", default=ENTROPY, help="thresholds of entropy_conf")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args(argv)
    prompts = read_prompts(args.prompts, args.most)
    chat = load(args.model, dtype=None, device=None)
    console = Console()
    console.print(chat.describe(), highlight=False)
    rows = run(
        chat,
        prompts,
        windows=windows_of(chat, args.windows),
        prob=args.prob,
        entropy=args.entropy,
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        console=console,
    )
    facts = facts_of(chat, "evaluation.sweep", argv, prompts=str(args.prompts), n_prompts=len(prompts))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "sweep.json", {"kind": "sweep", "model": str(args.model), "facts": facts, "rows": rows})
    console.print(f"wrote {args.out / 'sweep.json'}", highlight=False)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
