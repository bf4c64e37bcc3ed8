"""Memory, time and cost of a training run, and the best layouts for a number of GPUs; nothing is built or started.

The numbers are a model's: docs/planning.md says which, how it was checked, and what was not. Every assumption is
printed and can be set.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.load import PRESETS, load_config, preset_names
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.validate import check_model
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.planner import plan_text as report
from sdlm_megatron.planner.assumptions import DEVICES, assume, device_of, explain
from sdlm_megatron.planner.parallel_layout import layout_of
from sdlm_megatron.planner.search import CLOSE, Plan, Planner, recommended
from sdlm_megatron.planner.workload import workload

EXAMPLES = """sdlm plan sdlm_32b_d4 --gpus 64
sdlm plan sdlm_3b_d4 --gpus 32 --gpu h200 --price 2.5 --assume gemm_efficiency=0.6
sdlm plan sdlm_32b_d4 --gpus 64 --data DATA --parallel.tensor=8 --train.recompute=full --top 0"""
MOST_GPUS = 4096


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    notes = "Any setting of training may follow as --section.key=value; `sdlm train --help` lists them."
    parser = make_parser("sdlm plan", __doc__, example=EXAMPLES, notes=notes, settings=RunConfig)
    parser.add_argument("preset", help=f"YAML file or preset: {', '.join(preset_names(PRESETS))}")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help=f"1 to {MOST_GPUS}")
    parser.add_argument("--gpu", choices=DEVICES, default="h100", help="kind of GPU")
    parser.add_argument("--data", default="", metavar="DIR", help="a packed dataset; default: the published mixture")
    parser.add_argument("--price", type=float, default=0.0, metavar="USD", help="of a GPU-hour")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="layouts to show; 0: only the preset's")
    parser.add_argument("--fp8", action="store_true", help="the same as --train.fp8=current")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="may be given many times")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args, overrides = build_parser().parse_known_args(argv)
    if not 1 <= args.gpus <= MOST_GPUS:
        raise ConfigError(f"--gpus is {args.gpus}", "the command line", f"a number from 1 to {MOST_GPUS}")
    if args.fp8:
        overrides = [*overrides, "--train.fp8=current"]
    config = load_config(RunConfig, args.preset, overrides, PRESETS)
    given = assume(args.assume)
    work = workload(config, args.data or config.data.path, given)
    planner = Planner(config, work, device_of(args.gpu, given), given)
    check_model(config.model, RunConfig(), work.row.length)  # the sizes; the layout is checked below
    own, problem = _preset_plan(planner, args.gpus)
    best = planner.best(args.gpus) if args.top > 0 else []
    if args.json:
        print(json.dumps(_document(args, planner, own, problem, best), indent=1))
    else:
        print(_text(args, planner, own, problem, best))


def _preset_plan(planner: Planner, gpus: int) -> tuple[Plan | None, str]:
    """Of the preset's own layout; None and the reason where training would refuse it on so many GPUs."""
    size = planner.config.parallel.tensor * planner.config.parallel.pipeline
    try:
        if gpus < size:
            raise ConfigError(f"{gpus} GPUs are fewer than tensor x pipeline = {size}")
        layout = layout_of(planner.config, gpus)
        planner.check(layout)
    except ConfigError as error:
        return None, error.what
    return planner.plan(layout), ""


def _text(args: argparse.Namespace, planner: Planner, own: Plan | None, problem: str, best: list[Plan]) -> str:
    parts = [report.header(planner, args.preset, args.gpus)]
    if own is None:
        parts.append(f"the preset's layout cannot run here: {problem}")
    else:
        parts.append(f"the preset's layout: {report.details(own, args.price)}")
    choice = recommended(best)
    if args.top > 0:
        if choice is None:
            parts.append("no layout fits: more GPUs, or GPUs with more memory")
        else:
            parts.append(f"fastest layouts of {len(best)} that fit:\n{report.table(best[: args.top])}")
            settings = " ".join(f"--{k}={str(v).lower()}" for k, v in choice.layout.settings().items())
            text = report.details(choice, args.price)
            parts.append(f"recommended, the simplest within {CLOSE:.0%} of the fastest: {text}\n  {settings}")
    subject = choice or own
    if subject is not None:
        parts.append(report.batch_note(subject))
    parts.append(report.assumptions_text(planner))
    return "\n\n".join(parts)


def _document(
    args: argparse.Namespace, planner: Planner, own: Plan | None, problem: str, best: list[Plan]
) -> dict[str, Any]:
    choice = recommended(best)
    subject = choice or own
    return {
        "preset": args.preset,
        "gpus": args.gpus,
        "gpu": args.gpu,
        "workload": report.work_dict(planner.work),
        "preset_layout": report.as_dict(own, args.price) if own else {"problem": problem},
        "best": [report.as_dict(plan, args.price) for plan in best[: args.top]],
        "recommended": report.as_dict(choice, args.price) if choice else None,
        "notes": report.batch_note(subject).splitlines() if subject else [],
        "assumptions": {name: value for name, value, _ in explain(planner.given)},
    }


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
