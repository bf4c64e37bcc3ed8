"""Hooks of the training loop: what happens around steps besides training itself.

A hook is added by one class and one line in `train.py`, where the list says the order in which hooks are called.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sdlm_megatron.checkpoint.async_writer import CheckpointWriter
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.cut import StepGrid
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.metrics.sinks import Record, Sinks
from sdlm_megatron.ops.rank.monitor import Monitor
from sdlm_megatron.ops.rank.watchdog import Watch
from sdlm_megatron.ops.run_facts import run_facts
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.results import QueuedStep, StepResult
from sdlm_megatron.training.run_plan import RunPlan
from sdlm_megatron.weights.checkpoint_folder import TrainState


@dataclass
class TrainingRun:
    """A run in progress, shared by the training loop and its hooks."""

    config: RunConfig
    plan: RunPlan
    engine: Engine
    dataset: PackedDataset
    grid: StepGrid
    watch: Watch
    sinks: Sinks | None
    """On the main process only."""
    state: TrainState
    """After the newest step."""
    stopping: bool = False
    """Whether a process was asked to stop the run, as of the newest step whose results were read."""
    data_wait: float = 0.0
    """Seconds that steps have waited for their rows, since the start."""
    record: Record = field(default_factory=dict)
    """The newest log record, on the main process."""
    paused: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds since the newest log record in which no step ran, by cause; "" for causes that are not recorded."""

    failed: set[str] = field(default_factory=set)
    """Optional parts that have failed, see `optional`."""

    @contextmanager
    def optional(self, what: str, *, together: bool = False) -> Iterator[None]:
        """A body that only shows, draws or measures: errors are printed, once for each `what`, and training goes on.

        Args:
            together: all processes work together in the body. One of them cannot skip it while the others wait, so an
                error ends the training of several processes.
        """
        try:
            yield
        except Exception as error:
            if together and self.engine.groups.world_size > 1:
                raise
            if what not in self.failed:
                self.failed.add(what)
                reason = f"{type(error).__name__}: {error}"
                print(f"WARNING: {what} failed, training goes on: {reason}", file=sys.stderr, flush=True)

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.engine.groups.main

    @property
    def last_step(self) -> int:
        """The step at which the run ends."""
        return self.plan.last_step(self.config)

    def every(self, steps: int, step: int) -> bool:
        """Whether `step` is the run's last step or a multiple of `steps`; 0: the last step only."""
        return step == self.last_step or (steps > 0 and step % steps == 0)

    @contextmanager
    def pause(self, cause: str = "") -> Iterator[None]:
        """Keeps the time of its body out of the step time, and records it as time_CAUSE in the next log record."""
        started = time.perf_counter()
        yield
        self.paused[cause] += time.perf_counter() - started


class Hook:
    """Base class: every method does nothing. All processes have the same hooks in the same order.

    A hook is entered before the weights are loaded, and left when training ends, also with an error.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    def before_step(self, step: int) -> None:
        """Before the rows of a step are taken from the loader."""

    def on_batches(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """The rows of this process are there."""

    def around_step(self, step: int, batches: Sequence[MicroBatch]) -> AbstractContextManager:
        """Entered around the forward pass, the backward pass and the update."""
        return nullcontext()

    def due(self, step: int) -> bool:
        """Whether `after_due_step` is called for this step, the same on all processes.

        Only then, and after the first step, the host reads results, and so waits for the device.
        """
        return False

    def on_results(self, queued: Sequence[QueuedStep], results: Sequence[StepResult]) -> None:
        """Results were read: those of all steps since the previous call."""

    def after_step(self, step: int) -> None:
        """After every step; the device may still be working on it unless the step is due."""

    def after_due_step(self, step: int) -> None:
        """After a step that is due: its results are read, and its weights are known to be finite."""

    def log_fields(self) -> dict[str, float | str]:
        """Fields for the log record that is about to be written; called on all processes."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Releases what the hook holds."""


class HealthHook(Hook):
    """Slow hosts, spikes, replicas that differ and NaNs; see ops/rank/monitor.py."""

    def __init__(self, run: TrainingRun, *, find_nan: int = 0) -> None:
        super().__init__(run)
        self._monitor = Monitor(run.config, run.engine, run.dataset, run.watch, find_nan=find_nan)

    def on_batches(self, step: int, batches: Sequence[MicroBatch]) -> None:
        self._monitor.loaded(step, batches)

    def around_step(self, step: int, batches: Sequence[MicroBatch]) -> AbstractContextManager:
        return self._monitor.around(step, batches)

    def on_results(self, queued: Sequence[QueuedStep], results: Sequence[StepResult]) -> None:
        self._monitor.look(queued, results)

    def log_fields(self) -> dict[str, float | str]:
        return self._monitor.fields


class CheckpointHook(Hook):
    """Saves a checkpoint every checkpoint.save_every steps, at the last step, and when the run is asked to stop."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._writer = CheckpointWriter(run.engine, Path(run.config.run_dir), run.config.checkpoint, run.plan.assets)

    def due(self, step: int) -> bool:
        return self.run.stopping or self.run.every(self.run.config.checkpoint.save_every, step)

    def after_due_step(self, step: int) -> None:
        run, groups = self.run, self.run.engine.groups
        run.watch.at("save")
        # only the main process writes run.json, and only it has log records
        facts = None
        if run.main:
            facts = run_facts(run.config, run.dataset.manifest, run.record, dp_size=groups.dp_size)
        # nothing follows a final save: it is retried, and its failure is an error of the run
        final = run.stopping or step == run.last_step
        with run.pause("save"):
            self._writer.save(run.state, facts, final=final)

    def log_fields(self) -> dict[str, float | str]:
        self._writer.check()  # an error of a background save ends the run here, not only at the next save
        return {}

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._writer.__exit__(kind, error, trace)
