"""What the processes of a run decide together before the first step: from which checkpoint they go on."""

import time
from collections.abc import Callable
from pathlib import Path

from sdlm_megatron.checkpoint.local_disk import carry_over
from sdlm_megatron.checkpoint.restore import damage
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.ops.attempt import record_event
from sdlm_megatron.parallel.groups import Groups
from sdlm_megatron.training.run_plan import Plan, make_plan
from sdlm_megatron.weights.checkpoint_folder import set_aside, step_of

_PATIENCE = 60
"""Seconds until the nodes of a cluster must see the same folders."""


def agree(config: RunConfig, plan: Plan, dataset: PackedDataset, groups: Groups, say: Callable[[str], None]) -> Plan:
    """The plan of all processes, with a checkpoint whose bytes are those that were written.

    All processes call it, each with the plan it made alone. A damaged checkpoint of the run is renamed, and the one
    before takes its place. CheckpointError where the base is damaged, or the processes see different files.
    """
    if carry_over(config.checkpoint, Path(config.run_dir), groups, say):
        plan = make_plan(config, dataset, say)
    while True:
        plan = _same(config, plan, dataset, groups, say)
        if plan.source is None or plan.kind == "huggingface":
            break
        began = time.perf_counter()
        problem = damage(plan.source, groups)
        if not problem:
            say(f"checked  {plan.source}: every file as written, {time.perf_counter() - began:.1f} s")
            break
        if plan.kind == "checkpoint":
            raise CheckpointError(f"the base is damaged: {problem}", str(plan.source), "copy or convert it again")
        if groups.main:
            aside = set_aside(plan.source)
            say(f"DAMAGED CHECKPOINT: {problem}\n  renamed to {aside}; trying the one before")
            record_event(config.run_dir, "checkpoint_damaged", step=plan.state.step, reason=problem)
        groups.gather(None)  # nobody looks before it is renamed
        plan = make_plan(config, dataset, say)
    if groups.main:
        _clear(Path(config.run_dir) / "ckpt", plan)
    return plan


def _same(config: RunConfig, plan: Plan, dataset: PackedDataset, groups: Groups, say: Callable[[str], None]) -> Plan:
    """A shared folder may show one node what another has not seen yet."""
    began = time.monotonic()
    while len(found := {str(source) for source in groups.gather(plan.source)}) > 1:
        if time.monotonic() - began > _PATIENCE:
            raise CheckpointError(
                f"the processes see different checkpoints: {', '.join(sorted(found))}",
                config.run_dir,
                "the run folder must be one shared folder on all nodes",
            )
        time.sleep(1)
        plan = make_plan(config, dataset, lambda text: None)
    return plan


def _clear(folder: Path, plan: Plan) -> None:
    """Checkpoints that were cut short and lie after the one in use: they must not count as the newest later on."""
    for path in folder.glob("step-*"):
        if not path.suffix and (plan.kind != "resume" or step_of(path) > plan.state.step):
            set_aside(path)
