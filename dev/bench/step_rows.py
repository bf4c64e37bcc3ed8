"""Rows of a step by number of GPUs: the dataset's rows in turn, with empty ones, and the documents cut anew.

Computed by the planner for documents drawn from the published mixture; nothing is measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dev.bench.timing import print_table
from sdlm_megatron.config.command_line import add_preset, make_parser
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.cut import StepDocuments
from sdlm_megatron.errors import run_cli
from sdlm_megatron.planner.assumptions import Assumptions, device_of
from sdlm_megatron.planner.parallel_layout import ParallelLayout, layout_of
from sdlm_megatron.planner.search import LayoutPlan, Planner, recommended
from sdlm_megatron.planner.step_time import step_time
from sdlm_megatron.planner.workload import workload

COLUMNS = ("", "rows of a step", "empty", "padding", "pairs of a row", "of a rank", "step", "GPU-hours")


def in_turn(docs: StepDocuments, ranks: int, micro_batches: int) -> tuple[float, float]:
    """Largest visible pairs over their mean, of a row and of a rank, if ranks take the dataset's rows in turn."""
    pairs = np.bincount(docs.rows, docs.pairs, ranks * micro_batches).reshape(micro_batches, ranks)
    return pairs.max() / pairs.mean(), pairs.sum(0).max() / pairs.sum(0).mean()


def before(planner: Planner, layout: ParallelLayout) -> tuple[str, ...]:
    """Empty rows fill the last micro-batches."""
    work, ranks, group = planner.work, layout.data, layout.parallel.group
    count = -(-planner.rows // (ranks * group)) * group
    spread = np.mean([in_turn(docs, ranks, count) for docs in work.sample.steps(planner.rows)], axis=0)
    share = planner.rows / (ranks * count)
    plan = planner.plan(layout)
    costs = replace(plan.costs, work=work.scaled(work.row.length, share))
    seconds = step_time(costs, count, float(spread[1])).total
    padding = 1 - share * (work.row.clean + work.row.block) / work.row.length
    return _cells("before", count, ranks, work.row.length, 1 - share, padding, spread, seconds, plan)


def after(plan: LayoutPlan) -> tuple[str, ...]:
    """As training does it."""
    grid = plan.grid
    seconds = plan.time.total
    return _cells("after", grid.micro_batches, grid.ranks, grid.row_length, 0, plan.padding, plan.spread, seconds, plan)


def _cells(
    name: str,
    count: int,
    ranks: int,
    length: int,
    empty: float,
    padding: float,
    spread: Sequence[float],
    seconds: float,
    plan: LayoutPlan,
) -> tuple[str, ...]:
    rows = f"{count} x {ranks} of {length}"
    share = seconds / plan.time.total
    hours = f"{plan.gpu_hours * share:,.0f}"
    worst = [f"{x:.2f}" for x in spread]
    return f"{plan.layout.gpus} GPUs, {name}", rows, f"{empty:.1%}", f"{padding:.1%}", *worst, f"{seconds:.3f} s", hours


def table(preset: str, gpus: Sequence[int], best: bool) -> Iterator[tuple[str, ...]]:
    """Two lines for each number of GPUs."""
    config, assumed = load_config(RunConfig, preset, [], PRESETS), Assumptions()
    planner = Planner(config, workload(config, "", assumed), device_of("h100", assumed), assumed)
    for count in gpus:
        chosen = recommended(planner.best(count)) if best else None
        layout = chosen.layout if chosen else layout_of(config, count)
        yield before(planner, layout)
        yield after(planner.plan(layout))


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.bench.step_rows"
    parser = make_parser(command, __doc__, example=f"{command} sdlm_32b_d4 --gpus 32 64 208 232")
    add_preset(parser, "preset", PRESETS)
    parser.add_argument("--gpus", type=int, nargs="+", default=[32, 64, 208, 232], metavar="N", help="numbers of GPUs")
    parser.add_argument("--best", action="store_true", help="the recommended layout instead of the preset's")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    print_table(COLUMNS, table(args.preset, args.gpus, args.best))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
