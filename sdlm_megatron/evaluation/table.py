"""Table: decode held-out prompts with an exported folder at a few thresholds.

Prints tokens per pass and the share of exact answers (the whole answer equals the expected text) and writes the
evaluation.json that the report of a training run shows. For curves, intervals and costs: `sdlm evaluate report`.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdlm_megatron.chat.chat_model import ChatModel, DecodingRule
from sdlm_megatron.chat.passes import colored, token_texts
from sdlm_megatron.config.command_line import threshold
from sdlm_megatron.errors import make_console, run_cli
from sdlm_megatron.evaluation import held_out, measurement, signatures
from sdlm_megatron.evaluation.held_out import HeldOutPrompt
from sdlm_megatron.files import make_folder, write_json

BATCH = 52  # prompts per batch: half of the quickstart's 104 prompts


def measure(
    chat: ChatModel, prompts: Sequence[HeldOutPrompt], rules: Iterable[tuple[str, DecodingRule]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of evaluation.json for each (name, rule), and as a sample the first answer of the first rule with blocks.

    Answers are cut at the length of the longest expected one.
    """
    encoded, length = held_out.encode_prompts(chat, prompts), held_out.longest_answer(chat, prompts)
    expected = held_out.encode_answers(chat, prompts)
    rows: list[dict[str, Any]] = []
    sample: dict[str, Any] = {}
    for name, rule in rules:
        decoded = held_out.decode_prompts(chat, encoded, rule, max_new_tokens=length, batch=BATCH)
        blocks = rule.alg != "ar"
        answer_signatures = signatures.of_answers(
            decoded.tokens, decoded.accepted, expected, chat.end_tokens, several=rule.window > 1
        )
        row = {
            "name": name,
            **rule.row,
            "alg": rule.alg if blocks else "greedy",
            "tokens_per_pass": decoded.tokens_per_pass,
            "exact": sum(held_out.exact_matches(chat, prompts, decoded)) / len(prompts),
            "n_prompts": len(prompts),
            "seconds": decoded.seconds,
            **signatures.fields(answer_signatures),
            "warnings": answer_signatures.warnings(),
        }
        rows.append(row)
        print(
            f"  {name:28} {row['tokens_per_pass']:5.2f} tokens per pass  {row['exact']:7.1%} exact"
            f"  ({len(prompts)} prompts, {decoded.seconds:.0f} s)",
            flush=True,
        )
        for warning in answer_signatures.warnings():
            print(f"  {name}: {warning}", flush=True)
        if blocks and not sample:
            tokens = [token for token in decoded.tokens[0] if token not in chat.end_tokens]
            answer = token_texts(chat.tokenizer, tokens, decoded.accepted[0])
            sample = {"prompt": prompts[0].text, "answer_tokens": answer, "expected": prompts[0].expected}
    return rows, sample


def show(sample: dict[str, Any]) -> None:
    """Prints the sample; tokens of one pass share a color."""
    tokens = sample["answer_tokens"]
    passes = len({token["pass"] for token in tokens})
    console = make_console()
    console.print(f"\n  {sample['prompt']}", markup=False, soft_wrap=True)
    answer = ("  ", colored(tokens), f" ({len(tokens)} tokens in {passes} passes)")
    console.print(*answer, sep="", markup=False, soft_wrap=True)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = measurement.EXAMPLE.replace("--out results", "--out runs/quickstart/evaluation.json")
    parser = measurement.make_parser("table", __doc__, example=example, out="evaluation.json to write")
    measurement.add_prompts(parser, most=128)
    add = parser.add_argument
    add("--base", type=Path, metavar="DIR", help="the model before training, decoded with n = 1 for comparison")
    add("--thresholds", type=threshold, nargs="+", default=[0.98, 0.9, 0.5], metavar="TAU", help="of prob_conf")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    make_folder(args.out.parent)
    prompts = held_out.read_prompts(args.prompts, args.most)
    baseline: list[dict[str, Any]] = []
    if args.base:
        base = measurement.load_folder(args, args.base)
        baseline, _ = measure(base, prompts, [("untouched model, n = 1", DecodingRule())])
    chat = measurement.load_folder(args, args.model)
    window = chat.config.decoding.block_size
    blocks = [(f"tau {t:.2f}", DecodingRule("prob_conf", window, t)) for t in args.thresholds if window > 1]
    plain = [("n = 1 (one token per pass)", rule) for rule in held_out.plain_rules(chat.config.decoding)]
    rows, sample = measure(chat, prompts, [*blocks, *plain])
    baseline += rows[len(blocks) :]
    del rows[len(blocks) :]
    if sample:
        show(sample)
    write_json(args.out, {"prompts": len(prompts), "rows": rows, "baseline": baseline, "sample": sample})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
