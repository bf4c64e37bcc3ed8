"""Everything this package measures of a checkpoint, and one page with all pictures: OUT/index.html.

Runs sweep, calibration, speed, context and perplexity one after the other, then page. What OUT holds already is kept:
remove a file to measure it again, or run the command of that name alone for its other options.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sdlm_megatron.errors import run_cli
from sdlm_megatron.evaluation import calibration, context, page, perplexity, speed, sweep
from sdlm_megatron.evaluation.common_options import add_prompt_options, parser_of
from sdlm_megatron.weights.hf_reader import read_hf_config


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "--model runs/quickstart/hf --prompts runs/quickstart/task/heldout.jsonl --out results"
    parser = parser_of("sdlm evaluate report", __doc__, example)
    add_prompt_options(parser)
    add = parser.add_argument
    add("--timed", type=int, default=32, metavar="N", help="prompts of speed and context, which are dear; default: 32")
    add("--contexts", type=int, nargs="+", default=[64, 512, 2048], metavar="P", help="of speed; default: 64 512 2048")
    add("--shots", type=int, nargs="+", default=[0, 4, 16], metavar="K", help="examples of context; default: 0 4 16")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    model = ["--model", str(args.model), "--out", str(args.out)]
    for option in ("dtype", "device", "threads"):
        if getattr(args, option) is not None:
            model += [f"--{option}", str(getattr(args, option))]
    prompts = [*model, "--prompts", str(args.prompts)]
    many = [*prompts, "--most", str(args.most), "--batch", str(args.batch)]
    timed = [*prompts, "--most", str(args.timed)]
    contexts, shots = (["--" + name, *map(str, getattr(args, name))] for name in ("contexts", "shots"))
    parts: list[tuple[str, Callable[[Sequence[str]], None], list[str]]] = [
        ("sweep", sweep.main, many),
        ("calibration", calibration.main, many),
        ("speed", speed.main, [*timed, *contexts]),
        ("context", context.main, [*timed, *shots]),
        ("perplexity", perplexity.main, model),
    ]
    if (read_hf_config(args.model).block_size or 1) == 1:
        parts = [part for part in parts if part[0] != "calibration"]  # a window of one slot has nothing to calibrate
    for number, (name, measure, options) in enumerate(parts, 1):
        there = (args.out / f"{name}.json").exists()
        print(f"\n[{number}/{len(parts) + 1}] {name}{': kept as it is' if there else ''}", flush=True)
        if not there:
            measure(options)
    print(f"\n[{len(parts) + 1}/{len(parts) + 1}] page", flush=True)
    page.main([str(args.out), "--out", str(Path(args.out) / "index.html")])


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
