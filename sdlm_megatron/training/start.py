"""Start of training: processes join and agree on the checkpoint to resume from, engine and hooks are built.

Importing this module imports Megatron-Core.
"""

import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import psutil

from sdlm_megatron.checkpoint.local_disk import carry_over
from sdlm_megatron.checkpoint.restore import damage
from sdlm_megatron.config.load import save_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.secret_text import mask_values
from sdlm_megatron.data.cut import StepGrid
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.metrics.console import Console
from sdlm_megatron.metrics.sinks import Sinks
from sdlm_megatron.ops.attempt import record_event
from sdlm_megatron.ops.rank.watchdog import Watch
from sdlm_megatron.ops.run_facts import software
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.groups import Groups, close_groups, init_groups
from sdlm_megatron.parallel.optimizer import optimizer_text
from sdlm_megatron.planner.flops import peak_flops
from sdlm_megatron.training.evaluation_hooks import SampleHook, ValidationHook
from sdlm_megatron.training.hooks import CheckpointHook, HealthHook, Hook, TrainingRun
from sdlm_megatron.training.log_hook import LogHook
from sdlm_megatron.training.profile import ProfileHook
from sdlm_megatron.training.run_plan import RunPlan, make_run_plan
from sdlm_megatron.training.trainer import Trainer
from sdlm_megatron.weights.checkpoint_folder import refuse_restart, set_aside, step_folders

_PATIENCE = 60
"""Seconds within which all nodes must see the same checkpoints: shared folders are not consistent at once."""


def start_training(
    config: RunConfig,
    plan: RunPlan,
    dataset: PackedDataset,
    grid: StepGrid,
    validation: PackedDataset | None,
    watch: Watch,
    *,
    profile_steps: tuple[int, int] | None = None,
    find_nan: int = 0,
    log: Callable[[str], None],
) -> None:
    """Trains to the end of the plan.

    Args:
        plan: this process's own; the processes agree on one here.
        grid: rows of a step.
        validation: held-out rows, or None.
        profile_steps: first and last step to profile.
        find_nan: step to search for the module where numbers stop being finite; 0: none.
        log: prints on the main process.
    """
    # the process groups come first: everything after it may need a collective
    groups = init_groups(config.parallel, seed=config.train.seed)
    plan = sync_resume_plan(config, plan, dataset, groups, log)
    config = plan.config
    engine = Engine(
        config,
        plan.state.shape,
        groups,
        max_positions=dataset.row_length + config.diffusion.block_size,
        row_length=grid.row_length,
        steps=plan.steps,
        initialize=plan.kind == "random",  # weights that are loaded would overwrite random ones
        mask_token_id=plan.state.mask_token_id,
    )
    log(f"device {groups.device_text}")
    log(f"attention {engine.attention.text}")
    log(f"layers {engine.layers.text}; {optimizer_text()}")
    sinks = _open_sinks(config, plan, dataset, watch, groups) if groups.main else None
    run = TrainingRun(config, plan, engine, dataset, grid, watch, sinks, plan.state)
    with sinks or nullcontext():
        Trainer(run, make_hooks(run, validation, profile_steps, find_nan)).fit()
    watch.at("end")  # leaving the process groups waits for all processes, and may hang
    close_groups()


def make_hooks(
    run: TrainingRun, validation: PackedDataset | None, profile_steps: tuple[int, int] | None, find_nan: int
) -> list[Hook]:
    """The hooks of a run, in the order in which they are called."""
    config = run.config
    hooks: list[Hook] = [HealthHook(run, find_nan=find_nan)]
    if profile_steps is not None:
        hooks.append(ProfileHook(run, *profile_steps))
    # a record before the save, which stores its losses; the save last, so that the others' records are not repeated
    # by a job that is killed while it saves
    checkpoints = CheckpointHook(run)
    hooks.append(LogHook(run, [*hooks, checkpoints], _console(run) if run.main else None))
    if validation is not None:
        hooks.append(ValidationHook(run, validation))
    if config.observe.sample_every:
        hooks.append(SampleHook(run))
    return [*hooks, checkpoints]


def _console(run: TrainingRun) -> Console:
    return Console(
        steps=run.plan.steps,
        block_size=run.config.diffusion.block_size,
        show_next_token=run.config.diffusion.next_token_weight > 0,
        show_mfu=peak_flops(run.engine.groups.device_name) is not None,
    )


def _open_sinks(config: RunConfig, plan: RunPlan, dataset: PackedDataset, watch: Watch, groups: Groups) -> Sinks:
    """Creates the run folder with its configuration, records the event `start`, and opens the files of metrics."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # before the first step, so that `sdlm report` works for a run that crashes in it
    save_config(config, run_dir / "config.yaml")
    layout = groups.layout_text
    watch.event(
        "start",
        step=plan.state.step,
        world_size=groups.world_size,
        layout=layout,
        process_start=psutil.Process().create_time(),
        dataset=dataset.manifest["checksum"],
        software=software(),
        machine=f"{platform.system()} {platform.machine()}",
    )
    return Sinks.open(
        run_dir, config.observe, plan.state.step, run_config=mask_values(asdict(config)), resume_note=layout
    )


# ------------------------------------------------------------------------------- which checkpoint to resume from
def sync_resume_plan(
    config: RunConfig, plan: RunPlan, dataset: PackedDataset, groups: Groups, log: Callable[[str], None]
) -> RunPlan:
    """The plan of all processes, with a checkpoint whose files are those that were written.

    All processes call it, each with its own plan. A damaged checkpoint of the run is renamed and the one before is
    taken instead.

    Raises:
        CheckpointError: the base or every checkpoint of the run is damaged, or the processes see different files.
    """
    # a node that died may have left a newer checkpoint on its own disk only
    if carry_over(config.checkpoint, Path(config.run_dir), groups, log):
        plan = make_run_plan(config, dataset, log)
    while True:
        plan = _wait_for_same_source(config, plan, dataset, groups, log)
        if plan.source is None or plan.kind == "huggingface":
            break  # no checksums of our own to verify
        started = time.perf_counter()
        problem = damage(plan.source, groups)
        if not problem:
            log(f"checked  {plan.source}: all checksums match, {time.perf_counter() - started:.1f} s")
            break
        if plan.kind == "checkpoint":
            raise CheckpointError(f"the base is damaged: {problem}", str(plan.source), "copy or convert it again")
        if groups.main:
            aside = set_aside(plan.source)
            log(f"DAMAGED CHECKPOINT: {problem}\n  renamed to {aside}; trying the previous one")
            record_event(config.run_dir, "checkpoint_damaged", step=plan.state.step, reason=problem)
        groups.gather(None)  # no process plans again before the folder is renamed
        plan = make_run_plan(config, dataset, log)
    folder = Path(config.run_dir) / "ckpt"
    if plan.kind != "resume":
        refuse_restart(folder, groups.gather)
    for step, path, suffix in step_folders(folder) if groups.main else ():
        if not suffix and step > plan.state.step:
            set_aside(path)  # incomplete: it must not count as the newest later on
    return plan


def _wait_for_same_source(
    config: RunConfig, plan: RunPlan, dataset: PackedDataset, groups: Groups, log: Callable[[str], None]
) -> RunPlan:
    """A plan whose checkpoint all processes see: a shared folder may show a file to one node before another."""
    started = time.monotonic()
    while len(sources := set(groups.gather(str(plan.source)))) > 1:
        if time.monotonic() - started > _PATIENCE:
            raise CheckpointError(
                f"the processes see different checkpoints: {', '.join(sorted(sources))}",
                config.run_dir,
                "the run folder must be one shared folder on all nodes",
            )
        time.sleep(1)
        plan = make_run_plan(config, dataset, lambda text: None)
    return plan
