"""Sweep: quality against tokens per pass for many thresholds, at little more than the cost of two decodes.

The prompts are decoded with n = 1 and with the highest threshold. The resulting text is probed once (probe.py), and
every other decoding rule is followed along it; only the prompts for which a rule would write other text are decoded
with that rule. Writes OUT/sweep.json. `sdlm evaluate page OUT` draws it.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from sdlm_megatron.chat.chat_model import ChatModel, DecodingRule
from sdlm_megatron.config.command_line import at_least, threshold
from sdlm_megatron.diffusion.decode import ALGORITHMS, SPECULATIVE
from sdlm_megatron.errors import make_console, run_cli
from sdlm_megatron.evaluation import held_out, measurement, signatures
from sdlm_megatron.evaluation.held_out import DecodedPrompts, HeldOutPrompt
from sdlm_megatron.evaluation.probe import follow, probe
from sdlm_megatron.progress import track

PROB = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
ENTROPY = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # 1 - H / log V, which is 1 for a slot without any doubt


class Sweep:
    """Decoding rules measured on the same prompts."""

    def __init__(self, chat: ChatModel, prompts: Sequence[HeldOutPrompt], *, batch: int) -> None:
        self.chat, self.prompts = chat, prompts
        self.encoded = held_out.encode_prompts(chat, prompts)
        self.options: dict[str, Any] = {"max_new_tokens": held_out.longest_answer(chat, prompts), "batch": batch}

    def plain(self) -> dict[str, Any]:
        """The row of next-token decoding."""
        everything = range(len(self.prompts))
        return self._row(DecodingRule(), self._decode(everything, DecodingRule()), len(everything))

    def window(self, window: int, prob: Sequence[float], entropy: Sequence[float]) -> list[dict[str, Any]]:
        """Rows of all thresholds and of verified drafts, with windows of `window` tokens."""
        # the highest threshold comes closest to what n = 1 writes, so that most other rules follow its text
        base = DecodingRule("prob_conf", window, max(prob))
        text = self._decode(range(len(self.prompts)), base)
        with track(f"probe, n = {window}", len(self.prompts), "prompts", make_console()) as advance:
            probes = probe(self.chat, self.encoded, text.tokens, window=window, entropy=bool(entropy), progress=advance)
        rules = [DecodingRule("prob_conf", window, t) for t in prob if t != base.threshold]
        rules += [DecodingRule("entropy_conf", window, t) for t in entropy]
        rules += [DecodingRule(alg, window) for alg in SPECULATIVE[: 1 + self.chat.config.decoding.lossless]]
        rows = [self._row(base, text, len(self.prompts))]
        for rule in rules:
            accepted = [follow(tokens, probed, rule) for tokens, probed in zip(text.tokens, probes, strict=True)]
            different = [i for i, kept in enumerate(accepted) if kept is None]
            again = self._decode(different, rule)
            tokens = list(text.tokens)
            for i, new, kept in zip(different, again.tokens, again.accepted, strict=True):
                tokens[i], accepted[i] = new, kept
            rows.append(self._row(rule, DecodedPrompts(tokens, [kept or [] for kept in accepted], 0.0), len(different)))
        return sorted(rows, key=lambda row: (ALGORITHMS.index(row["alg"]), row["threshold"] or 0))

    def _decode(self, indices: Sequence[int], rule: DecodingRule) -> DecodedPrompts:
        if not indices:
            return DecodedPrompts([], [], 0.0)
        encoded = [self.encoded[i] for i in indices]
        with track(rule.name, len(indices), "prompts", make_console()) as advance:
            return held_out.decode_prompts(self.chat, encoded, rule, progress=advance, **self.options)

    def _row(self, rule: DecodingRule, answers: DecodedPrompts, decoded: int) -> dict[str, Any]:
        exact = held_out.exact_matches(self.chat, self.prompts, answers)
        print(
            f"{rule.name:28} {answers.tokens_per_pass:5.2f} tokens per pass {sum(exact) / len(exact):7.1%} exact"
            f"   ({decoded} of {len(exact)} decoded)",
            flush=True,
        )
        more = signatures.vectors(answers.tokens, self.chat.end_tokens)
        return {**rule.row, "exact": exact, **answers.counts, **more, "decoded": decoded}


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = measurement.make_parser("sweep", __doc__)
    measurement.add_prompts(parser, batch=held_out.BATCH)
    add = parser.add_argument
    add("--windows", type=at_least(1), nargs="+", metavar="N", help="values of n; default: the trained block size")
    add("--prob", type=threshold, nargs="+", default=PROB, metavar="TAU", help="thresholds of prob_conf")
    add("--entropy", type=threshold, nargs="*", default=ENTROPY, metavar="TAU", help="thresholds of entropy_conf")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    prompts = held_out.read_prompts(args.prompts, args.most or 0)
    chat = measurement.load_model(args)
    if args.windows:
        measurement.trained_block_size(chat, "leave out --windows")
    sweep = Sweep(chat, prompts, batch=args.batch)
    rows = [sweep.plain()] if held_out.plain_rules(chat.config.decoding) else []
    for window in args.windows or [chat.config.decoding.block_size]:
        if window > 1:
            rows += sweep.window(window, args.prob, args.entropy)
    expected = signatures.of_expected(held_out.encode_answers(chat, prompts))
    measurement.write_result(chat, args, argv, "sweep", {"rows": rows, "expected": expected}, n_prompts=len(prompts))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
