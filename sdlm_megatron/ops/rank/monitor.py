"""What a run looks at while it trains: slow hosts, spikes, replicas, the rows it takes. All processes have one.

RUN/rows/ATTEMPT/rank-00000.jsonl   fault.log_rows: {"step", "rows", "time"}, one file of each data-parallel rank
RUN/spikes.jsonl                    a spike a line, with its worst rows and the setting that leaves them out
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.ops.attempt import attempt, attempt_dir
from sdlm_megatron.ops.rank.find_nan import looking_for_nan
from sdlm_megatron.ops.rank.replicas import check_replicas
from sdlm_megatron.ops.rank.spikes import Outliers, describe_row, suspects, write_spike
from sdlm_megatron.ops.rank.stragglers import Stragglers
from sdlm_megatron.ops.rank.watchdog import Watch
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.results import QueuedStep, StepResult, row_losses


class Monitor:
    """Made by all processes together, when the groups stand.

    Args:
        find_nan: the step that is searched for the place where it stops being finite; 0: none.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, dataset: PackedDataset, watch: Watch, *, find_nan: int = 0
    ) -> None:
        self.config, self.engine, self.dataset, self.watch = config, engine, dataset, watch
        self.find_nan, self.run_dir, fault = find_nan, Path(config.run_dir), config.fault
        self.hosts: list[str] = engine.groups.gather(watch.host)
        self.fields: dict[str, float | str] = {}
        """Of the log record: how long ranks computed in the steps read last."""
        self._stragglers = Stragglers(self.hosts, fault.straggler_factor)
        self._outliers = {"loss": Outliers(fault.spike_factor), "grad_norm": Outliers(fault.spike_factor)}
        self._rows: TextIO | None = None
        if fault.log_rows and engine.groups.tp_rank == engine.groups.pp_rank == 0:
            folder = self.run_dir / "rows" / attempt()
            folder.mkdir(parents=True, exist_ok=True)
            self._rows = open(folder / f"rank-{watch.rank:05d}.jsonl", "a", buffering=1)  # noqa: SIM115

    def loaded(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """These are the rows of this process in `step`."""
        self.watch.rows = [b.number for b in batches if b.number is not None]
        if self._rows is not None:
            try:
                self._rows.write(json.dumps({"step": step, "rows": self.watch.rows, "time": time.time()}) + "\n")
            except OSError as problem:  # a full disk is no reason to end a run; what waits comes with the next line
                print(f"the rows of step {step} cannot be written: {problem}", file=sys.stderr, flush=True)

    def around(self, step: int, batches: Sequence[MicroBatch]) -> AbstractContextManager:
        """Around the work of a step; ReplicaError where a check of the replicas was due and found a difference."""
        every = self.config.fault.replica_check_every
        if every and step % every == 0 and self.engine.groups.dp_size > 1:
            check_replicas(self.engine, self.hosts, step)
        if step != self.find_nan:
            return nullcontext()
        report = attempt_dir(self.run_dir) / "find-nan.json"
        return looking_for_nan(self.engine, batches, step, self.watch.host, report)

    def look(self, queued: Sequence[QueuedStep], results: Sequence[StepResult]) -> None:
        """After steps were read; all see the same numbers, so all take the same turns."""
        self.fields, slow = self._stragglers.look(results[-1].rank_seconds)
        for event in slow:
            self.watch.event("straggler", step=queued[-1].step, **event)
            if self.engine.groups.main:
                ratio = f"{event['ratio']:.2f} x the median"
                print(f"slow: {event['host']} (rank {event['rank']}) computes {ratio} before gradients are reduced")
        if self.config.fault.spike_factor:
            for one, result in zip(queued, results, strict=True):
                usual = {key: outliers.usual() for key, outliers in self._outliers.items()}
                if over := [k for k, outliers in self._outliers.items() if outliers.far(getattr(result, k))]:
                    self._spike(one, result, over, usual)

    def _spike(self, one: QueuedStep, result: StepResult, over: Sequence[str], usual: dict[str, float | None]) -> None:
        losses = row_losses(one, self.engine.groups)
        if not self.engine.groups.main:
            return
        seed = self.config.train.seed
        found = suspects(losses, self.config.fault.spike_factor)
        skip = sorted({*self.config.data.skip_rows, *(number for number, _ in found)})
        spike: dict[str, Any] = {
            "step": one.step,
            "what": list(over),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "usual": usual,
            "rows": [describe_row(number, loss, self.dataset, seed=seed) for number, loss in found],
            "skip": f"--data.skip_rows={json.dumps(skip, separators=(',', ':'))}",
        }
        self.watch.event("spike", **spike)
        try:
            write_spike(self.run_dir, spike)
        except OSError as problem:
            print(f"spikes.jsonl cannot be written: {problem}", file=sys.stderr)
        numbers = ", ".join(f"{n} (loss {loss:.3f})" for n, loss in found)
        said = ", ".join(f"{key} {getattr(result, key):.4g} (usually {usual[key]:.4g})" for key in over)
        print(f"spike in step {one.step}: {said}; worst rows {numbers}; to leave them out: {spike['skip']}", flush=True)


def rows_of_run(run_dir: str | Path) -> dict[int, list[int]]:
    """Rows of the run that went into each step, ascending, from the files of fault.log_rows.

    A step that was done again counts as done in the last attempt that began it.
    """
    taken: dict[int, dict[str, tuple[float, list[int]]]] = {}
    for file in Path(run_dir).glob("rows/*/rank-*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut by a kill
                continue
            of_attempt = taken.setdefault(entry["step"], {})
            began, rows = of_attempt.get(file.parent.name, (0.0, []))
            of_attempt[file.parent.name] = (max(began, entry["time"]), rows + entry["rows"])
    return {step: sorted(max(attempts.values())[1]) for step, attempts in sorted(taken.items())}
