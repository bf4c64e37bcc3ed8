"""Quality against tokens a pass: held-out prompts decoded with many thresholds, at little more than the price of two.

The prompts are decoded plainly (n = 1) and with the highest threshold; what was written is probed once
(sdlm_megatron.evaluation.probe), and every other setting is followed along it. A prompt for which a setting would write something
else is decoded with that setting. Writes OUT/sweep.json; `python -m sdlm_megatron.evaluation.page OUT` draws it.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.diffusion.decode import ALGORITHMS
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.evaluation.common_options import (
    add_prompt_options,
    at_least,
    exact_of,
    load_model,
    longest_answer,
    parser_of,
    threshold,
)
from sdlm_megatron.evaluation.decoding import Decoded, Setting, decode_prompts
from sdlm_megatron.evaluation.facts import facts_of
from sdlm_megatron.evaluation.probe import follow, probe
from sdlm_megatron.evaluation.prompts import Prompt, encode, read_prompts
from sdlm_megatron.files import write_json
from sdlm_megatron.progress import track

PROB = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
ENTROPY = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""1 - H / log V; a certain slot has 1."""


class Sweep:
    """The settings of one window over the same prompts."""

    def __init__(self, chat: ChatModel, prompts: Sequence[Prompt], *, batch: int) -> None:
        self.chat, self.prompts = chat, prompts
        self.encoded = [encode(chat, prompt) for prompt in prompts]
        self.options: dict[str, Any] = {"max_new_tokens": longest_answer(chat, prompts), "batch": batch}

    def plain(self) -> dict[str, Any]:
        """The row of one causal step a token."""
        everyone = range(len(self.prompts))
        return self._row(Setting(), self._decode(everyone, Setting()), len(everyone))

    def window(self, window: int, prob: Sequence[float], entropy: Sequence[float]) -> list[dict[str, Any]]:
        """Rows of all thresholds with windows of `window` tokens, and of self-speculation."""
        base = Setting("prob_conf", window, max(prob))
        written = self._decode(range(len(self.prompts)), base)
        with track(f"probe, n = {window}", len(self.prompts), "prompts", Console()) as advance:
            probes = probe(
                self.chat, self.encoded, written.tokens, window=window, entropy=bool(entropy), progress=advance
            )
        settings = [Setting("prob_conf", window, t) for t in prob if t != base.threshold]
        settings += [Setting("entropy_conf", window, t) for t in entropy]
        settings.append(Setting("self_speculative", window))
        rows = [self._row(base, written, len(self.prompts))]
        for setting in settings:
            accepted = [follow(text, seen, setting) for text, seen in zip(written.tokens, probes, strict=True)]
            left = [i for i, found in enumerate(accepted) if found is None]
            again = self._decode(left, setting)
            tokens = list(written.tokens)
            for i, new, kept in zip(left, again.tokens, again.accepted, strict=True):
                tokens[i], accepted[i] = new, kept
            rows.append(self._row(setting, Decoded(tokens, [a or [] for a in accepted], 0.0), len(left)))
        return sorted(rows, key=lambda row: (ALGORITHMS.index(row["alg"]), row["threshold"] or 0))

    def _decode(self, which: Sequence[int], setting: Setting) -> Decoded:
        if not which:
            return Decoded([], [], 0.0)
        encoded = [self.encoded[i] for i in which]
        with track(setting.name, len(which), "prompts", Console()) as advance:
            return decode_prompts(self.chat, encoded, setting, progress=advance, **self.options)

    def _row(self, setting: Setting, done: Decoded, decoded: int) -> dict[str, Any]:
        exact = exact_of(self.chat, self.prompts, done)
        tokens, passes = [sum(a) for a in done.accepted], [len(a) for a in done.accepted]
        print(
            f"{setting.name:28} {sum(tokens) / sum(passes):5.2f} tokens a pass {sum(exact) / len(exact):7.1%} exact"
            f"   ({decoded} of {len(exact)} decoded)",
            flush=True,
        )
        return {
            "alg": setting.alg,
            "n": setting.window,
            "threshold": setting.threshold if setting.alg.endswith("_conf") else None,
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
    batch: int,
) -> list[dict[str, Any]]:
    """All rows of a sweep; windows of one token only have the plain one."""
    sweep = Sweep(chat, prompts, batch=batch)
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


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "--model runs/quickstart/hf --prompts runs/quickstart/task/heldout.jsonl --out results"
    parser = parser_of("sdlm evaluate sweep", __doc__, example)
    add_prompt_options(parser)
    add = parser.add_argument
    add("--windows", type=at_least(1), nargs="+", metavar="N", help="default: the trained block size")
    add("--prob", type=threshold, nargs="+", default=PROB, metavar="TAU", help="thresholds of prob_conf")
    add("--entropy", type=threshold, nargs="*", default=ENTROPY, metavar="TAU", help="thresholds of entropy_conf")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    prompts = read_prompts(args.prompts, args.most)
    chat = load_model(args)
    rows = run(
        chat,
        prompts,
        windows=windows_of(chat, args.windows),
        prob=args.prob,
        entropy=args.entropy,
        batch=args.batch,
    )
    facts = facts_of(chat, parser.prog, argv, prompts=str(args.prompts), n_prompts=len(prompts))
    write_json(args.out / "sweep.json", {"kind": "sweep", "model": str(args.model), "facts": facts, "rows": rows})
    print(f"wrote {args.out / 'sweep.json'}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
