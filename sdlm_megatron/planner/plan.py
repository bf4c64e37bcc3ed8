"""Plan a run: memory of a GPU, time of a step, cost, and the fastest layouts for a number of GPUs.

Nothing is built or started; the numbers come from a model of training. With --simulate, the real engine also makes one
step of some ranks without their GPUs, on tensors without numbers: it finds what a job would stop at in its first step.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdlm_megatron.config.command_line import add_preset, at_least, make_parser, parse_with_settings
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.validate import check_length, check_model, check_schedule, check_values, resolve_shape
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.planner import plan_text
from sdlm_megatron.planner.assumptions import DEVICES, Assumptions, assume, device_of, explain, ranges
from sdlm_megatron.planner.parallel_layout import ParallelLayout, layout_of
from sdlm_megatron.planner.search import CLOSE, LayoutPlan, Planner, recommended
from sdlm_megatron.planner.simulation import default_ranks, planned, run_simulation, simulation_text
from sdlm_megatron.planner.workload import Workload, workload
from sdlm_megatron.weights.checkpoint_folder import read_state
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.positions import base_config, check_dataset, check_positions

EXAMPLES = """sdlm plan sdlm_32b_d4 --gpus 64
sdlm plan sdlm_3b_d4 --gpus 32 --gpu h200 --price 2.5 --assume gemm_efficiency=0.6
sdlm plan sdlm_32b_d4 --gpus 64 --data DATA --parallel.tensor=8 --train.recompute=full --top 0"""
MOST_GPUS = 4096


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    notes = "Any setting of training may follow as --section.key=value; `sdlm train --help` lists them."
    notes += f"\n\n{plan_text.assumptions_text(Assumptions())}"
    parser = make_parser("sdlm plan", __doc__, example=EXAMPLES, notes=notes, settings=RunConfig)
    add_preset(parser, "preset", PRESETS)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help=f"number of GPUs, 1 to {MOST_GPUS}")
    parser.add_argument("--gpu", choices=DEVICES, default="h100", help="kind of GPU")
    parser.add_argument("--data", default="", metavar="DIR", help="a packed dataset; default: the published mixture")
    parser.add_argument("--price", type=at_least(0, float), default=0.0, metavar="USD", help="price of a GPU-hour")
    parser.add_argument(
        "--top", type=at_least(0), default=5, metavar="K", help="layouts to show; 0: only that of the preset"
    )
    parser.add_argument("--fp8", action="store_true", help="same as --train.fp8=current")
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set an assumption (below), or its range by NAME=LOW..HIGH; repeatable",
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="make a step of the first, a middle stage's and the last rank, see above",
    )
    parser.add_argument("--rank", type=at_least(0), action="append", metavar="R", help="simulate this rank; repeatable")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args, overrides = parse_with_settings(build_parser(), argv)
    config = _read_config(args, overrides)
    assumed = assume(args.assume)
    data = args.data or config.data.path
    work = workload(config, data, assumed)
    if config.checkpoint.base:
        _check_positions(work, data, Path(config.checkpoint.base))
    planner = Planner(config, work, device_of(args.gpu, assumed), assumed, ranges(args.assume), data)
    check_model(config.model, RunConfig(), work.row.length)  # only the sizes: the layout is checked below
    args.simulate |= args.rank is not None
    if args.simulate:
        _checked_layout(planner, args.gpus)  # its error has the place and the fix
        if wrong := [r for r in args.rank or [] if r >= args.gpus]:
            fix = f"a number from 0 to {args.gpus - 1}"
            raise ConfigError(f"there is no rank {wrong[0]} of {args.gpus}", "the command line, --rank", fix)
    own, problem = _preset_plan(planner, args.gpus)
    if own and args.simulate and data:  # of the published mixture the number of steps is an estimate
        check_schedule(config, own.steps)
    best, missing = _best_plans(planner, args.gpus) if args.top > 0 else ([], "")
    if not args.json:
        print(_text(args, planner, own, problem, best, missing), flush=True)
    simulated = []
    if own and args.simulate:
        simulated = run_simulation(planner, own, args.rank or default_ranks(own.layout))
    if args.json:
        document = _document(args, planner, own, problem, best)
        document["simulated"] = [vars(r) | {"planned": planned(planner, own, r)} for r in simulated if own]
        print(json.dumps(document, indent=1))
    elif own and simulated:
        print(f"\n{simulation_text(planner, own, simulated)}")


def _read_config(args: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """Settings of the run, with the base's shape; ConfigError for one that cannot be planned."""
    if not 1 <= args.gpus <= MOST_GPUS:
        raise ConfigError(f"--gpus is {args.gpus}", "the command line", f"a number from 1 to {MOST_GPUS}")
    if args.fp8:
        overrides = [*overrides, "--train.fp8=current"]
    config = load_config(RunConfig, args.preset, overrides, PRESETS)
    check_values(config)
    if config.train.attention not in ("auto", "triton"):
        what = f"attention is planned for the Triton kernels only, not {config.train.attention}"
        raise ConfigError(what, "train.attention", "--train.attention=auto")
    check_length(config.train)
    base = Path(config.checkpoint.base)  # a Hugging Face folder or one that `sdlm import` wrote
    imported = (base / "complete.json").exists()
    if config.checkpoint.base and (not config.model.num_layers or imported or (base / "config.json").exists()):
        shape = read_state(base).shape if imported else read_hf_config(base).shape
        last = shape.vocab_size - 1  # may be the mask token's row, which a configuration need not count
        mask_token_id = last if config.model.vocab_size == last else -1
        config = replace(config, model=resolve_shape(config.model, shape, str(base), mask_token_id))
    return config


def _check_positions(work: Workload, data: str, base: Path) -> None:
    """Raises DataError if documents are longer than the base was trained for."""
    folder = base / "hf" if (base / "complete.json").exists() else base
    if data:
        check_dataset(PackedDataset(data), folder)
    elif work.row.length != Assumptions.row_length and (config := base_config(folder)):
        check_positions(work.row.length - work.row.block_size, "the longest document (row_length)", config, folder)


def _preset_plan(planner: Planner, gpus: int) -> tuple[LayoutPlan | None, str]:
    """Plan of the preset's layout, or None and the reason where training would refuse it on `gpus` GPUs."""
    try:
        return planner.plan(_checked_layout(planner, gpus)), ""
    except ConfigError as error:
        return None, f"{error.what}; {error.fix}"


def _best_plans(planner: Planner, gpus: int) -> tuple[list[LayoutPlan], str]:
    """The layouts that fit, and the reason if there are none."""
    try:
        best = planner.best(gpus)
    except ConfigError as error:
        return [], f"training accepts no layout: {error.what}; {error.fix}"
    return best, "" if best else "no layout fits: use more GPUs, or GPUs with more memory"


def _checked_layout(planner: Planner, gpus: int) -> ParallelLayout:
    """The preset's layout; ConfigError where training would refuse it."""
    size = planner.config.parallel.model_size
    if gpus < size:
        what = f"{gpus} GPUs are fewer than tensor x pipeline x context = {size}"
        raise ConfigError(what, "--gpus", "use more GPUs")
    layout = layout_of(planner.config, gpus)
    planner.check(layout)
    return layout


def _text(
    args: argparse.Namespace,
    planner: Planner,
    own: LayoutPlan | None,
    problem: str,
    best: list[LayoutPlan],
    missing: str,
) -> str:
    """Header, the preset's layout in detail, the fastest layouts, the recommended one, notes."""
    parts = [plan_text.header(planner, args.preset, args.gpus)]
    choice = recommended(best)
    if own is None:
        parts.append(f"layout of the preset: cannot run on {args.gpus} GPUs: {problem}")
    else:
        parts.append(f"layout of the preset: {plan_text.layout_text(own)}\n{plan_text.details(own, args.price)}")
    if choice is not None:
        parts += _recommendation(args, planner, own, best, choice)
    elif missing:
        parts.append(missing)
    subject = choice or own
    if subject is not None:
        parts.append(plan_text.batch_note(subject))
    parts.append(plan_text.changed_assumptions(planner))
    return "\n\n".join(parts)


def _recommendation(
    args: argparse.Namespace, planner: Planner, own: LayoutPlan | None, best: list[LayoutPlan], choice: LayoutPlan
) -> list[str]:
    """Table of the fastest layouts; details of the recommended one where it is not the preset's, and its settings."""
    shown = best[: args.top]
    shown += [plan for plan in (own, choice) if plan is not None and plan not in shown]
    labels = [", ".join(n for n, p in (("preset", own), ("recommended", choice)) if plan == p) for plan in shown]
    parts = [
        f"fastest layouts ({len(best)} fit); recommended is the simplest within {CLOSE:.0%} of the fastest:\n"
        f"{plan_text.table(shown, labels)}"
    ]
    if choice != own:
        preset = layout_of(planner.config, args.gpus).settings()
        changed = {key: value for key, value in choice.layout.settings().items() if value != preset[key]}
        settings = " ".join(f"--{key}={str(value).lower()}" for key, value in changed.items())
        details = plan_text.details(choice, args.price)
        parts.append(f"recommended layout: {plan_text.layout_text(choice)}\n{details}\n  use it with: {settings}")
    return parts


def _document(
    args: argparse.Namespace, planner: Planner, own: LayoutPlan | None, problem: str, best: list[LayoutPlan]
) -> dict[str, Any]:
    """The plan for programs, as printed with --json."""
    choice = recommended(best)
    subject = choice or own
    return {
        "preset": args.preset,
        "gpus": args.gpus,
        "gpu": args.gpu,
        "workload": plan_text.work_dict(planner.work),
        "preset_layout": plan_text.as_dict(own, args.price) if own else {"problem": problem},
        "best": [plan_text.as_dict(plan, args.price) for plan in best[: args.top]],
        "recommended": plan_text.as_dict(choice, args.price) if choice else None,
        "notes": plan_text.batch_note(subject).splitlines() if subject else [],
        "assumptions": {name: value for name, value, _ in explain(planner.assumed)},
        "ranges": planner.ranges,
    }


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
