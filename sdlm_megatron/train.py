"""Train a model, or resume its run: `torchrun --nproc-per-node N -m sdlm_megatron.train --config PRESET_OR_FILE`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdlm_megatron.config.command_line import at_least, make_config_parser, parse_config
from sdlm_megatron.config.load import PRESETS
from sdlm_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from sdlm_megatron.config.validate import check_run, process_place
from sdlm_megatron.errors import ConfigError, drop_lost_output, run_cli
from sdlm_megatron.files import make_folder, need_open_files
from sdlm_megatron.ops.attempt import adopt_slurm_ranks, refuse_lone_tasks
from sdlm_megatron.ops.node.local_environment import set_local_environment
from sdlm_megatron.ops.rank.owner import RunOwner
from sdlm_megatron.ops.rank.stop import StopRequests, refuse_to_start
from sdlm_megatron.ops.rank.watchdog import Watch

if TYPE_CHECKING:
    from sdlm_megatron.data.cut import StepGrid
    from sdlm_megatron.data.format import PackedDataset
    from sdlm_megatron.training.run_plan import RunPlan

EXAMPLE = """sdlm train --config sdlm_3b_d4 --data.path=DATA --checkpoint.base=DIR --dry-run
torchrun --nproc-per-node 8 -m sdlm_megatron.train --config sdlm_3b_d4 --data.path=DATA --checkpoint.base=DIR"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_config_parser("sdlm train", __doc__, example=EXAMPLE, schema=RunConfig, presets=PRESETS)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be trained, and exit"
    )
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="profile these steps, such as 10:12 or 10: writes a trace for Perfetto or chrome://tracing and a summary "
        "to RUN_DIR/profile",
    )
    parser.add_argument(
        "--find-nan",
        type=at_least(0),
        default=0,
        metavar="STEP",
        help="in this step check every module and gradient (slow), and report where numbers stop being finite",
    )
    parser.add_argument(
        "--take-over", action="store_true", help="replace a training that still writes to the same run folder"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the configuration, builds the model and trains."""
    adopt_slurm_ranks()
    requests = StopRequests()
    config, args = parse_config(build_parser(), RunConfig, PRESETS, argv)
    rank, world = process_place()
    check_run(config, world)
    if rank == 0:
        make_folder(Path(config.run_dir), dry=args.dry_run)
    if args.dry_run:
        train(config, None, profile=args.profile, find_nan=args.find_nan)
        return
    drop_lost_output()
    need_open_files()
    refuse_lone_tasks()
    owner = None
    if rank == 0:
        owner = RunOwner(Path(config.run_dir), config.fault.heartbeat_seconds)
        owner.take(take_over=args.take_over)
    with Watch(config.run_dir, config.fault, requests, owner) as watch:
        refuse_to_start(Path(config.run_dir))
        set_local_environment()
        train(config, watch, profile=args.profile, find_nan=args.find_nan)


def train(config: RunConfig, watch: Watch | None, *, profile: str | None = None, find_nan: int = 0) -> None:
    """Runs a checked configuration on this process, together with the others of the job.

    Args:
        watch: None: only print what would be trained.
        profile: steps to profile, as in `--profile`.
        find_nan: step in which to search for numbers that are not finite; 0: none.
    """
    # Imported here, so that errors are reported before Megatron's ten seconds of imports, and so that the helper
    # processes of a checkpoint save, which import this module again, start at once.
    from sdlm_megatron.config.hardware import slow_bf16
    from sdlm_megatron.data.format import PackedDataset
    from sdlm_megatron.model.layers import check_layers
    from sdlm_megatron.training import run_plan
    from sdlm_megatron.training.sample_prompts import choose_prompts
    from sdlm_megatron.weights.checkpoint_folder import refuse_restart

    rank, world = process_place()
    main_process = rank == 0
    log = (lambda text: print(text, flush=True)) if main_process else (lambda text: None)
    profile_steps = run_plan.parse_profile_steps(profile) if profile is not None else None
    dataset = PackedDataset(config.data.path)
    plan = run_plan.make_run_plan(config, dataset, log)
    # a start comes to it later: it waits for a shared folder, and first copies what the nodes' disks hold
    if watch is None and plan.kind != "resume" and not config.checkpoint.local_dir:
        refuse_restart(Path(config.run_dir) / "ckpt")
    dp_size = world // config.parallel.model_size
    grid = run_plan.make_grid(plan.config, dataset, plan.state.rows_per_step, dp_size)
    log(describe(plan.config, plan, dataset, grid))
    if main_process and config.train.precision == "bf16" and (reason := slow_bf16()):
        log(f"note     {reason}: --train.precision=fp32 is faster here")
    validation = run_plan.open_validation(config, dataset)
    if config.observe.sample_every:
        choose_prompts(dataset)  # an error before the model is built, and in a dry run
    last = plan.last_step(config)
    if find_nan > last:
        what = f"--find-nan {find_nan}, but this run ends with step {last}"
        raise ConfigError(what, "the command line", f"--find-nan with one of steps {plan.state.step + 1} to {last}")
    if profile_steps is not None:
        profile_steps = run_plan.steps_to_profile(profile_steps, plan.state.step, last)
    if watch is None:
        run_plan.check_weights(plan)
        if layers := check_layers(config.train, config.parallel):
            log(f"layers   {layers}")
        return
    from sdlm_megatron.parallel import compat, cpu

    compat.silence_known_notices()
    cpu.install()  # before anything imports megatron
    from sdlm_megatron.training.start import start_training

    start_training(
        config, plan, dataset, grid, validation, watch, profile_steps=profile_steps, find_nan=find_nan, log=log
    )


def _interleaved(parallel: ParallelConfig, shape: ModelConfig) -> str:
    if parallel.virtual_pipeline == 1:
        return ""
    layers = shape.num_layers // (parallel.pipeline * parallel.virtual_pipeline)
    return f" (interleaved, {parallel.virtual_pipeline} chunks of {layers} layers per stage)"


def _settings(config: RunConfig) -> list[str]:
    """Precision, recomputation and overlap."""
    train, parallel = config.train, config.parallel
    words = [train.precision + (", gradients summed in bf16" if train.gradient_dtype == "bf16" else "")]
    if train.recompute == "selective":
        words.append("selective recompute (norms)")
    elif train.recompute == "full":
        layers = f"first {train.recompute_layers} layers of each chunk" if train.recompute_layers else "all layers"
        words.append(f"full recompute ({layers})")
    overlapped = {
        "gradient reduction": parallel.overlap_grad_reduce,
        "weight gathering": parallel.overlap_param_gather,
        "tensor parallelism": parallel.overlap_tensor,
    }
    if any(overlapped.values()):
        words.append(f"overlapped: {', '.join(k for k, on in overlapped.items() if on)}")
    if not parallel.distributed_optimizer:
        words.append("replicated optimizer")
    return words


def describe(config: RunConfig, plan: "RunPlan", dataset: "PackedDataset", grid: "StepGrid") -> str:
    """The run in five lines for the console: model, data, layout, step and length."""
    shape, state, parallel = plan.state.shape, plan.state, config.parallel
    rows = grid.ranks * grid.micro_batches
    padding = 1 - state.rows_per_step * dataset.mean_tokens / (rows * grid.row_length)
    source = {"resume": f"resumes from {plan.source} at step {state.step}", "random": "random weights"}.get(
        plan.kind, f"starts from {plan.source}"
    )
    context = f" x CP {parallel.context}" if parallel.context > 1 else ""
    lines = [
        f"model    {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_attention_heads} heads / "
        f"{shape.num_query_groups} KV, FFN {shape.ffn_hidden_size}, vocabulary {shape.vocab_size}"
        f"{', tied embeddings' if shape.tied_embeddings else ''}; {source}",
        f"data     {dataset.path}: {dataset.rows(0)} rows of {dataset.row_length} tokens, "
        f"{dataset.manifest['mean_documents_per_row']:.2f} documents per row, block size {dataset.block_size}",
        f"layout   TP {parallel.tensor} (sequence parallel {'on' if parallel.sequence else 'off'}) x PP "
        f"{parallel.pipeline}{_interleaved(parallel, shape)}{context} x DP {grid.ranks}, "
        f"{', '.join(_settings(config))}",
        f"step     {state.rows_per_step} rows' documents in {rows} rows of {grid.row_length} tokens, {padding:.1%} "
        f"padding: {grid.micro_batches} micro-batches per data-parallel rank",
        f"length   {plan.steps} steps, {plan.total_rows} rows, learning rate {config.optimizer.lr:g} "
        f"{config.schedule.style}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
