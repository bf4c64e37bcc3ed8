"""Decodes held-out prompts with an exported folder, every setting for real: tokens a pass and exact answers.

"exact" means that the whole answer equals the expected text. The result is the evaluation.json that the report of a
run shows (report/evaluation_record.py). Curves, intervals and more questions: sdlm_megatron.evaluation.sweep and its neighbours.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sdlm_megatron.chat.chat_model import DTYPES, ChatModel, load
from sdlm_megatron.chat.passes import coloured, pieces
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli
from sdlm_megatron.evaluation.common_options import at_least, exact_of, longest_answer, threshold
from sdlm_megatron.evaluation.decoding import Setting, decode_prompts
from sdlm_megatron.evaluation.prompts import Prompt, encode, read_prompts
from sdlm_megatron.files import write_json

BATCH = 52


def measure(
    chat: ChatModel, prompts: Sequence[Prompt], settings: Iterable[tuple[str, Setting]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of evaluation.json for (name, setting), and the first answer of the first setting with blocks as a sample.

    Answers are cut at the length of the longest expected one.
    """
    encoded, room = [encode(chat, prompt) for prompt in prompts], longest_answer(chat, prompts)
    rows: list[dict[str, Any]] = []
    sample: dict[str, Any] = {}
    for name, setting in settings:
        done = decode_prompts(chat, encoded, setting, max_new_tokens=room, batch=BATCH)
        blocks = setting.alg != "ar"
        row = {
            "name": name,
            "alg": setting.alg if blocks else "greedy",
            "n": setting.window,
            "threshold": setting.threshold if blocks else None,
            "tokens_per_pass": sum(map(sum, done.accepted)) / sum(map(len, done.accepted)),
            "exact": sum(exact_of(chat, prompts, done)) / len(prompts),
            "n_prompts": len(prompts),
            "seconds": done.seconds,
        }
        rows.append(row)
        print(
            f"  {name:28} {row['tokens_per_pass']:5.2f} tokens a pass  {row['exact']:7.1%} exact"
            f"  ({len(prompts)} prompts, {done.seconds:.0f} s)",
            flush=True,
        )
        if blocks and not sample:
            tokens = [token for token in done.tokens[0] if token not in chat.end_tokens]
            answer = pieces(chat.tokenizer, tokens, done.accepted[0])
            sample = {"prompt": prompts[0].text, "answer_tokens": answer, "expected": prompts[0].expected}
    return rows, sample


def show(sample: dict[str, Any]) -> None:
    """Prints the sample; tokens that came in one pass share a colour."""
    tokens = sample["answer_tokens"]
    passes = len({token["pass"] for token in tokens})
    console = Console(highlight=False)
    console.print(f"\n  {sample['prompt']}", markup=False)
    console.print("  ", coloured(tokens), f" ({len(tokens)} tokens in {passes} passes)", sep="", markup=False)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "sdlm evaluate table",
        __doc__,
        example="sdlm evaluate table --model runs/quickstart/hf --base runs/quickstart/base "
        "--prompts runs/quickstart/task/heldout.jsonl --out runs/quickstart/evaluation.json",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="exported Hugging Face folder")
    add("--base", type=Path, metavar="FOLDER", help="the untouched base, decoded beside it")
    add("--prompts", type=Path, required=True, metavar="JSONL", help='lines of {"prompt": …, "expected": …}')
    add("--most", type=at_least(1), default=128, metavar="N", help="use the first so many prompts; default: 128")
    add("--thresholds", type=threshold, nargs="+", default=[0.98, 0.9, 0.5], metavar="TAU", help="default: .98 .9 .5")
    add("--dtype", choices=sorted(DTYPES), help="of both models; default: as their folders say")
    add("--out", type=Path, required=True, metavar="FILE", help="evaluation.json to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    prompts = read_prompts(args.prompts, args.most)
    baseline: list[dict[str, Any]] = []
    if args.base:
        base = load(args.base, dtype=args.dtype, device=None)
        baseline, _ = measure(base, prompts, [("untouched model, n = 1", Setting())])
    chat = load(args.model, dtype=args.dtype, device=None)
    window = chat.config.block_size or 1
    blocks = [(f"tau {t:.2f}", Setting("prob_conf", window, t)) for t in args.thresholds if window > 1]
    rows, sample = measure(chat, prompts, [*blocks, ("n = 1 (one token a pass)", Setting())])
    baseline.append(rows.pop())
    if sample:
        show(sample)
    write_json(args.out, {"prompts": len(prompts), "rows": rows, "baseline": baseline, "sample": sample})


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
