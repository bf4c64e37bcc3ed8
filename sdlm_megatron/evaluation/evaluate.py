"""Evaluate an exported folder: quality, speed and calibration, as result files and one HTML page.

Runs the kinds sweep, calibration, speed, context and perplexity one after the other, then page, which writes
OUT/index.html. Result files that OUT already holds are kept if they are of the same model, prompts and dtype: remove
one to measure it again, or run its kind alone for its other options.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdlm_megatron.config.command_line import at_least
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.evaluation import held_out, measurement

TIMED, CONTEXTS, SHOTS = 32, (64, 512, 2048), (0, 4, 16)
# Kinds of evaluation and a line about each; a kind is the module of that name, "report" is this module.
KINDS = {
    "report": "all of the measurements below and one page (the default)",
    "table": "a few thresholds, as the report of a training run shows them",
    "sweep": "quality against tokens per pass, for many thresholds",
    "calibration": "confidence of every slot against its accuracy",
    "speed": "cost of a pass, wall time of answers",
    "context": "quality and speed with longer contexts",
    "perplexity": "perplexity of unrelated text: what training made the model forget",
    "serving": "throughput and latency of vLLM, beside plain serving (needs vLLM)",
    "page": "one page for the results of one or several models",
    "paper": "the tasks of the paper's tables, beside its figures (needs datasets)",
    "lm_eval": "lm-evaluation-harness with the model `sdlm`",
}
NOTES = "kinds, as sdlm evaluate KIND; sdlm evaluate KIND --help explains the options of a kind:\n" + "\n".join(
    f"  {kind:12} {summary}" for kind, summary in KINDS.items()
)


def build_parser() -> argparse.ArgumentParser:
    """Options of `sdlm evaluate` without a kind, and of `sdlm evaluate report`."""
    parser = measurement.make_parser("", __doc__, notes=NOTES)
    measurement.add_prompts(parser, batch=held_out.BATCH)
    add = parser.add_argument
    timed = f"prompts of speed and context, which take longer; default: {TIMED}; the examples of --shots follow them"
    add("--timed", type=at_least(1), metavar="N", help=timed)
    contexts, shots = (f"default: {' '.join(map(str, values))}" for values in (CONTEXTS, SHOTS))
    add("--contexts", type=at_least(2), nargs="+", metavar="P", help=f"tokens before a pass, for speed; {contexts}")
    add("--shots", type=at_least(0), nargs="+", metavar="K", help=f"numbers of examples, for context; {shots}")
    return parser


def run_kind(kind: str, argv: Sequence[str]) -> None:
    """Runs another kind, whose module is imported only now: each needs other packages, some take seconds to load."""
    importlib.import_module(f"sdlm_megatron.evaluation.{kind}").main(argv)


def options_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """The options of each kind that `sdlm evaluate` runs."""
    from sdlm_megatron.weights.hf_config import read_hf_config

    model = ["--model", str(args.model), "--out", str(args.out)]
    for option in ("dtype", "device", "threads"):
        if getattr(args, option) is not None:
            model += [f"--{option}", str(getattr(args, option))]
    prompts = [*model, "--prompts", str(args.prompts)]
    all_prompts = [*prompts, "--batch", str(args.batch), *(["--most", str(args.most)] if args.most else [])]
    timed = [*prompts, "--most", str(args.timed or TIMED)]
    kinds = {
        "sweep": all_prompts,
        "calibration": all_prompts,
        "speed": [*timed, "--contexts", *map(str, args.contexts or CONTEXTS)],
        "context": [*timed, "--shots", *map(str, args.shots or SHOTS)],
        "perplexity": model,
    }
    if read_hf_config(args.model).decoding.block_size == 1:
        del kinds["calibration"]  # a window of one slot proposes what n = 1 does
    return kinds


def kept_kinds(args: argparse.Namespace, kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """The kinds that OUT has a result of. DataError: one was measured with something else than what is asked for."""
    from sdlm_megatron.evaluation import result_files

    kept = []
    for kind, options in kinds.items():
        if (path := args.out / f"{kind}.json").exists():
            module = importlib.import_module(f"sdlm_megatron.evaluation.{kind}")
            settings = measurement.settings_of(module.build_parser().parse_args(options))
            # of a kind that was run alone, any values are kept by default
            skipped = [name for name in ("contexts", "shots") if getattr(args, name) is None]
            if kind in ("speed", "context") and args.timed is None:
                skipped += ["most", "prompts_sha256"]
            for name in skipped:
                settings.pop(name, None)
            result_files.read_kept(path, kind, settings)
            kept.append(kind)
    return kept


def report(argv: Sequence[str]) -> None:
    """All measurements of one model, and their page."""
    from sdlm_megatron.evaluation import context

    args = build_parser().parse_args(argv)
    kinds = options_of(args)
    kept, steps = kept_kinds(args, kinds), len(kinds) + 1
    if "context" not in kept:
        prompts, shots = held_out.read_prompts(args.prompts), max(args.shots or SHOTS)
        # now: its stage comes after long ones
        context.split(prompts, args.timed or TIMED, shots, args.prompts, "--timed")
    for number, (kind, options) in enumerate(kinds.items(), 1):
        print(f"\n[{number}/{steps}] {kind}{': exists, kept' if kind in kept else ''}", flush=True)
        if kind not in kept:
            try:
                run_kind(kind, options)
            except held_out.ShortAnswersError as problem:
                print(f"left out: {problem.what}", flush=True)
    print(f"\n[{steps}/{steps}] page", flush=True)
    run_kind("page", [str(args.out), "--out", str(Path(args.out) / "index.html")])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `sdlm evaluate [KIND] OPTIONS`."""
    words = list(sys.argv[1:] if argv is None else argv)
    kind = words.pop(0) if words and not words[0].startswith("-") else "report"
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"unknown kind of evaluation '{kind}'", "sdlm evaluate", f"{hint}one of {', '.join(KINDS)}")
    if kind == "report":
        report(words)
    else:
        run_kind(kind, words)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
