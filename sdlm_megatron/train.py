"""Entry point of training: `torchrun --nproc-per-node N -m sdlm_megatron.train --config PRESET_OR_FILE [--a.b=c]`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdlm_megatron.config.command_line import make_config_parser, parse_config
from sdlm_megatron.config.load import PRESETS, save_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.validate import check_run
from sdlm_megatron.errors import run_cli
from sdlm_megatron.ops.attempt import adopt_slurm_ranks
from sdlm_megatron.ops.rank.stop import StopRequests, refuse_to_start
from sdlm_megatron.ops.rank.watchdog import Watch

if TYPE_CHECKING:
    from sdlm_megatron.data.format import PackedDataset
    from sdlm_megatron.metrics.console import Console
    from sdlm_megatron.metrics.sinks import Sinks
    from sdlm_megatron.parallel.groups import Groups
    from sdlm_megatron.training.run_plan import Plan

EXAMPLE = "torchrun --nproc-per-node 2 -m sdlm_megatron.train --config sdlm_3b_d4 --data.path=DIR --checkpoint.base=DIR"


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_config_parser("sdlm train", __doc__, example=EXAMPLE, schema=RunConfig, presets=PRESETS)
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be trained, and exit")
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="profile these steps, such as 10:12 or 10: a trace for Perfetto or chrome://tracing and a page of what "
        "it says, in RUN_DIR/profile; without it nothing is slower",
    )
    parser.add_argument(
        "--find-nan",
        type=int,
        default=0,
        metavar="STEP",
        help="in this step look at every module and gradient, slowly, and say where numbers stop being finite",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the configuration, builds, trains."""
    requests = StopRequests()
    config, args = parse_config(build_parser(), RunConfig, PRESETS, argv)
    check_run(config, int(os.environ.get("WORLD_SIZE", 1)))
    steps = None
    if args.profile is not None:
        from sdlm_megatron.training.profile import parse_steps

        steps = parse_steps(args.profile)
    if args.dry_run:
        train(config, None, profile_steps=steps)
        return
    with Watch(config.run_dir, config.fault, requests) as watch:
        refuse_to_start(Path(config.run_dir))
        train(config, watch, profile_steps=steps, find_nan=args.find_nan)


def train(
    config: RunConfig, watch: Watch | None, *, profile_steps: tuple[int, int] | None = None, find_nan: int = 0
) -> None:
    """Runs a checked configuration on this process, together with the others of the job; without a `watch` it only
    says what would be trained."""
    # Imports stand where they are needed: mistakes are found before Megatron's ten seconds, and the helper processes
    # of a checkpoint save, which import this module again, start at once.
    from sdlm_megatron.bf16 import slow_bf16
    from sdlm_megatron.data.format import PackedDataset
    from sdlm_megatron.training.run_plan import describe, make_plan, open_validation

    main_process = os.environ.get("RANK", "0") == "0"
    say = (lambda text: print(text, flush=True)) if main_process else (lambda text: None)
    dataset = PackedDataset(config.data.path)
    plan = make_plan(config, dataset, say)
    config = replace(config, diffusion=plan.state.diffusion)  # completed by the dataset's manifest
    dp_size = int(os.environ.get("WORLD_SIZE", 1)) // (config.parallel.tensor * config.parallel.pipeline)
    say(describe(config, plan, dataset, dp_size))
    if main_process and config.train.precision == "bf16" and (reason := slow_bf16()):
        say(f"note     {reason}: --train.precision=fp32 is the faster one here")
    validation = open_validation(config, dataset)
    if profile_steps is not None:
        from sdlm_megatron.training.profile import steps_to_profile

        profile_steps = steps_to_profile(profile_steps, plan.state.step, plan.last_step(config))
    if watch is not None:
        _run(config, plan, dataset, validation, watch, profile_steps, find_nan, say)


def _run(
    config: RunConfig,
    plan: "Plan",
    dataset: "PackedDataset",
    validation: "PackedDataset | None",
    watch: Watch,
    profile_steps: tuple[int, int] | None,
    find_nan: int,
    say: Callable[[str], None],
) -> None:
    """Joins the other processes, builds, and trains."""
    from sdlm_megatron.parallel import compat, cpu

    compat.silence_known_notices()
    cpu.install()  # before anything imports megatron
    from sdlm_megatron.model.layers import optimizer_text
    from sdlm_megatron.ops.rank.monitor import Monitor
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.parallel.groups import close_groups, init_groups
    from sdlm_megatron.training.profile import StepProfiler
    from sdlm_megatron.training.resume import agree
    from sdlm_megatron.training.samples import Sampler
    from sdlm_megatron.training.trainer import Trainer
    from sdlm_megatron.training.validation import Validator

    groups = init_groups(config.parallel, seed=config.train.seed)
    plan = agree(config, plan, dataset, groups, say)
    engine = Engine(
        config,
        plan.state.shape,
        groups,
        max_positions=dataset.row_length + config.diffusion.block_size,
        row_length=dataset.row_length,
        steps=plan.steps,
        initialize=plan.kind == "random",
    )
    layout = f"TP {groups.tp_size}, PP {groups.pp_size}, DP {groups.dp_size}"
    sinks, console, profiler = None, None, None
    if profile_steps is not None:
        profiler = StepProfiler(
            *profile_steps,
            Path(config.run_dir) / "profile",
            rank=groups.rank if groups.tp_rank == groups.dp_rank == 0 else None,  # one process of each stage
            gather=groups.gather,
            heading=f"{layout} on {groups.device_name}",
        )
    if groups.main:
        print(f"attention {engine.attention.text}", flush=True)
        print(f"layers {engine.layers.text}; {optimizer_text()}", flush=True)
        sinks, console = _observers(config, plan, watch, layout, groups)
    sampler = Sampler(engine, plan.state, dataset, plan.assets) if config.observe.sample_every else None
    validator = Validator(engine, plan.state, validation) if validation is not None else None
    monitor = Monitor(config, engine, dataset, watch, find_nan=find_nan)
    with sinks or nullcontext():
        Trainer(config, plan, engine, dataset, watch, monitor, sinks, console, profiler, sampler, validator).fit()
    watch.at("end")
    close_groups()


def _observers(config: RunConfig, plan: "Plan", watch: Watch, layout: str, groups: "Groups") -> "tuple[Sinks, Console]":
    """Begins the run's folder: its configuration, the event `start`, and the files and lines that steps write."""
    import psutil

    from sdlm_megatron.metrics.console import Console
    from sdlm_megatron.metrics.sinks import Sinks
    from sdlm_megatron.planner.flops import peak_flops

    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    watch.event(
        "start",
        step=plan.state.step,
        world_size=groups.world_size,
        layout=layout,
        process_start=psutil.Process().create_time(),
    )
    console = Console(
        steps=plan.steps,
        block_size=config.diffusion.block_size,
        show_next_token=config.diffusion.next_token_weight > 0,
        show_mfu=peak_flops(groups.device_name) is not None,
    )
    return Sinks.open(run_dir, config.observe, plan.state.step, run_config=asdict(config), resume_note=layout), console


if __name__ == "__main__":
    adopt_slurm_ranks()
    run_cli(main, sys.argv[1:])
