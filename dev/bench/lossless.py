"""Tokens per pass of lossless decoding beside thresholds, and how many answers equal next-token decoding.

Drafts can be verified by passes of other shapes. Their tokens per pass follow from the drafts that are right behind
every token of the next-token text, which one forward pass over the text shows (evaluation/probe.py).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TemperatureLogitsWarper

from dev.bench.timing import print_table
from sdlm_megatron.chat.chat_model import DecodingRule, load
from sdlm_megatron.config.command_line import at_least, make_parser
from sdlm_megatron.diffusion.decode import SPECULATIVE
from sdlm_megatron.errors import run_cli
from sdlm_megatron.evaluation import held_out
from sdlm_megatron.evaluation.probe import probe

Drafts = Callable[[int], int]
"""Number of right drafts, 0 to n-1, of the window whose slot 0 proposes the token with this index."""


@dataclass(frozen=True)
class _Sampled(DecodingRule):
    temperature: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        warper = TemperatureLogitsWarper(self.temperature)
        return super().options | {"seed": 0, "warp": lambda logits: warper(None, logits)}


def every(tokens: int, n: int, right: Drafts) -> tuple[int, int]:
    """(passes, positions fed) with a window behind each verified token, as `lossless` has."""
    passes, fed, kept = 1, n, 1  # the first pass keeps a token and drafts
    while kept < tokens:
        passes, fed, kept = passes + 1, fed + n * n, kept + 1 + right(kept - 1)
    return passes, fed


def alternate(tokens: int, n: int, right: Drafts) -> tuple[int, int]:
    """The same, with passes that draft and passes that verify in turn; a pass that drafts also keeps one token."""
    passes, kept = 0, 0
    while kept < tokens:
        passes, kept = passes + 1 + (kept + 1 < tokens), kept + 2 + right(kept)
    return passes, passes * n


def optimistic(tokens: int, n: int, right: Drafts) -> tuple[int, int]:
    """The same, with one window behind the last draft: a pass that drafts follows wherever a draft was wrong."""
    passes, fed, kept = 1, n, 1
    while kept < tokens:
        drafts = right(kept - 1)
        passes, fed, kept = passes + 1, fed + 2 * n - 1, kept + 1 + drafts
        if drafts < n - 1 and kept < tokens:
            passes, fed, kept = passes + 1, fed + n, kept + 1
    return passes, fed


SHAPES = {"a window behind each token": every, "draft, verify": alternate, "a window behind the last": optimistic}


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "python -m dev.bench.lossless --model SDLM --prompts held_out.jsonl"
    parser = make_parser("python -m dev.bench.lossless", __doc__, example=example)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported folder trained with causal_attn")
    add("--prompts", type=Path, required=True, metavar="FILE", help="JSONL with prompt and expected")
    add("--most", type=at_least(1), default=200, metavar="N", help="prompts to decode; default: 200")
    add("--thresholds", type=float, nargs="*", default=[0.98, 0.9, 0.5], metavar="TAU", help="of prob_conf")
    add("--dtype", default="fp32", choices=("fp32", "bf16"), help="of the weights; default: fp32")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    chat = load(args.model, dtype=args.dtype, device=None)
    prompts = held_out.read_prompts(args.prompts, args.most)
    encoded = [held_out.encode(chat, prompt) for prompt in prompts]
    n, room = chat.config.decoding.block_size, held_out.longest_answer(chat, prompts)
    rules = [DecodingRule(), *(DecodingRule(alg, n) for alg in reversed(SPECULATIVE))]
    rules += [DecodingRule("prob_conf", n, tau) for tau in args.thresholds]
    answers = [held_out.decode_prompts(chat, encoded, rule, max_new_tokens=room) for rule in rules]
    rows: list[tuple[str, ...]] = []
    for rule, answer in zip(rules, answers, strict=True):
        equal = sum(a == b for a, b in zip(answer.tokens, answers[0].tokens, strict=True))
        exact = sum(held_out.exact_matches(chat, prompts, answer))
        of = len(prompts)
        rows.append((rule.name, f"{answer.tokens_per_pass:.2f}", f"{equal}/{of}", f"{exact}/{of}"))
    print_table(("greedy", "tokens per pass", "equal to n = 1", "exact"), rows)
    rows = []
    for temperature in (0.7, 1.0):
        for alg in reversed(SPECULATIVE):
            rule = _Sampled(alg, n, temperature=temperature)
            answer = held_out.decode_prompts(chat, encoded, rule, max_new_tokens=room)
            rows.append((rule.name, f"{temperature:g}", f"{answer.tokens_per_pass:.2f}"))
    print_table(("sampled", "temperature", "tokens per pass"), rows)
    probes = probe(chat, encoded, answers[0].tokens, window=n, entropy=False)
    texts, rows = answers[0].tokens, []
    tokens = sum(map(len, texts))
    for name, shape in SHAPES.items():
        counts = [
            shape(len(text), n, partial(_right, text, probed.tokens.tolist()))
            for text, probed in zip(texts, probes, strict=True)
        ]
        passes, fed = (sum(x) for x in zip(*counts, strict=True))
        rows.append((name, f"{tokens / passes:.2f}", f"{fed / passes:.1f}", f"{fed / tokens:.1f}"))
    print_table(("shape of passes", "tokens per pass", "positions per pass", "positions per token"), rows)


def _right(text: list[int], proposals: list[list[int]], index: int) -> int:
    """`Drafts` of a text with the proposals of its probe."""
    drafts = proposals[index][1:]
    wanted = text[index + 1 : index + 1 + len(drafts)]
    return next((i for i, token in enumerate(wanted) if drafts[i] != token), len(wanted))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
