"""Health of a run while it trains: slow hosts, spikes with their rows, replica checks, the rows of each step.

RUN/rows/ATTEMPT/rank-00000.jsonl   fault.log_rows: {"step", "rows", "documents", "time"}, one file per data-parallel
                                    rank: each document's row of the run, and its number in the dataset
RUN/spikes.jsonl                    one line per spike, with its worst documents and the setting that skips their rows
"""

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import PackedDataset, origin
from sdlm_megatron.data.order import locate
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.ops.attempt import attempt, attempt_dir
from sdlm_megatron.ops.rank.find_nan import looking_for_nan
from sdlm_megatron.ops.rank.replicas import check_replicas
from sdlm_megatron.ops.rank.watchdog import Watch
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.results import DocumentLoss, QueuedStep, StepResult, document_losses

SPIKES_FILE = "spikes.jsonl"
SLOW_STEPS = 3  # consecutive log steps in which a host must be slow to be reported
WINDOW, WINDOW_MINIMUM = 100, 20
"""Number of steps that define the usual value, and how many of them are needed."""
SPREAD_FLOOR = 0.02  # minimum spread as a fraction of the median: a converged run still varies a little
MAX_DOCUMENTS = 4  # maximum number of documents reported for a spike


class Monitor:
    """Checks on a run while it trains. All processes create one together, after the process groups.

    Args:
        find_nan: step that is searched for the place where values stop being finite; 0: none.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, dataset: PackedDataset, watch: Watch, *, find_nan: int = 0
    ) -> None:
        self.config, self.engine, self.dataset, self.watch = config, engine, dataset, watch
        self.find_nan, self.run_dir, fault = find_nan, Path(config.run_dir), config.fault
        self.hosts: list[str] = engine.groups.gather(watch.host)
        self.fields: dict[str, float | str] = {}  # compute times for the log record of the steps read last
        self._stragglers = Stragglers(self.hosts, fault.straggler_factor)
        self._outliers = {"loss": Outliers(fault.spike_factor), "grad_norm": Outliers(fault.spike_factor)}
        self._rows: TextIO | None = None
        if fault.log_rows and engine.groups.tp_rank == engine.groups.pp_rank == engine.groups.cp_rank == 0:
            folder = self.run_dir / "rows" / attempt()
            folder.mkdir(parents=True, exist_ok=True)
            self._rows = open(folder / f"rank-{watch.rank:05d}.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def loaded(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Notes the rows of this process in `step`."""
        rows = [row for batch in batches for row in batch.rows]
        self.watch.rows = sorted(set(rows))
        if self._rows is not None:
            documents = [int(number) for batch in batches for number in batch.layout.doc_ids]
            entry = {"step": step, "rows": rows, "documents": documents, "time": time.time()}
            try:
                self._rows.write(json.dumps(entry) + "\n")
            except OSError as problem:  # a full disk must not end a run; the buffered line comes with the next one
                print(f"cannot write the rows of step {step}: {problem}", file=sys.stderr, flush=True)

    def around(self, step: int, batches: Sequence[MicroBatch]) -> AbstractContextManager:
        """Context of the work of a step.

        Raises:
            ReplicaError: a check of the replicas was due and they differ.
        """
        every = self.config.fault.replica_check_every
        if every and step % every == 0 and self.engine.groups.dp_cp_size > 1:
            check_replicas(self.engine, self.hosts, step)
        if step != self.find_nan:
            return nullcontext()
        report = attempt_dir(self.run_dir) / "find-nan.json"
        return looking_for_nan(self.engine, batches, step, self.watch.host, report)

    def look(self, queued: Sequence[QueuedStep], results: Sequence[StepResult]) -> None:
        """Examines steps whose results were read. All processes see the same numbers, so all take the same branches."""
        self.fields, slow = self._stragglers.look(results[-1].rank_seconds)
        for event in slow:
            self.watch.event("straggler", step=queued[-1].step, **event)
            if self.engine.groups.main:
                ratio = f"{event['ratio']:.2f} x the median"
                print(f"slow host: {event['host']} (rank {event['rank']}), compute time {ratio}")
        if self.config.fault.spike_factor:
            for step, result in zip(queued, results, strict=True):
                usual = {key: outliers.usual() for key, outliers in self._outliers.items()}
                if over := [k for k, outliers in self._outliers.items() if outliers.add(getattr(result, k))]:
                    self._report_spike(step, result, over, usual)

    def _report_spike(
        self, queued: QueuedStep, result: StepResult, over: Sequence[str], usual: dict[str, float | None]
    ) -> None:
        losses = document_losses(queued, self.engine.groups)
        if not self.engine.groups.main:
            return
        seed = self.config.train.seed
        worst = suspects(losses, self.config.fault.spike_factor)
        skip = sorted({*self.config.data.skip_rows, *(document.row for document in worst)})
        spike: dict[str, Any] = {
            "step": queued.step,
            "what": list(over),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "usual": usual,
            "rows": [describe_document(document, self.dataset, seed=seed) for document in worst],
            "skip": f"--data.skip_rows={json.dumps(skip, separators=(',', ':'))}",
        }
        self.watch.event("spike", **spike)
        try:
            with open(self.run_dir / SPIKES_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(spike, ensure_ascii=False) + "\n")
        except OSError as problem:
            print(f"cannot write {SPIKES_FILE}: {problem}", file=sys.stderr)
        values = ", ".join(f"{key} {getattr(result, key):.4g} (usually {usual[key]:.4g})" for key in over)
        numbers = ", ".join(f"{d.document} of row {d.row} (loss {d.loss:.3f})" for d in worst)
        text = f"spike in step {queued.step}: {values}; worst documents {numbers}; to skip their rows: {spike['skip']}"
        print(text, flush=True)


class Stragglers:
    """Compares the compute times of hosts (of ranks, if there is one host) at each log step.

    A rank's compute time is that before the reduction of gradients (parallel/device.py).

    Args:
        hosts: host name of each rank.
        factor: multiple of the median above which a host is slow; 0 disables the reports.
    """

    def __init__(self, hosts: Sequence[str], factor: float) -> None:
        self.hosts, self.factor = hosts, factor
        single = len(set(hosts)) == 1
        self._places = [f"rank {r} on {host}" if single else host for r, host in enumerate(hosts)]
        self._slow: dict[str, int] = {}

    def look(self, seconds: Sequence[float]) -> tuple[dict[str, float | str], list[dict[str, Any]]]:
        """Fields of the log record, and an event for each place that has just been slow for SLOW_STEPS log steps.

        Args:
            seconds: compute time of each rank. A host takes as long as its slowest rank.
        """
        slowest: dict[str, int] = {}
        for rank, place in enumerate(self._places):
            if place not in slowest or seconds[rank] > seconds[slowest[place]]:
                slowest[place] = rank
        times = {place: seconds[rank] for place, rank in slowest.items()}
        # the lower median: of two hosts the slow one is compared with the fast one, not with their mean
        median, worst = statistics.median_low(times.values()), max(times, key=lambda place: times[place])
        fields: dict[str, float | str] = {
            "compute_min": min(times.values()),
            "compute_median": median,
            "compute_max": times[worst],
            "slowest_host": self.hosts[slowest[worst]],
        }
        slow = {p for p, t in times.items() if self.factor and len(times) > 1 and t > self.factor * median}
        self._slow = {place: self._slow.get(place, 0) + 1 for place in slow}
        events = [
            {
                "host": self.hosts[slowest[place]],
                "rank": slowest[place],
                "seconds": times[place],
                "median": median,
                "ratio": times[place] / median if median else 0.0,
            }
            for place, count in self._slow.items()
            if count == SLOW_STEPS
        ]
        return fields, events


class Outliers:
    """Detects values far above the last WINDOW ones."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._values: deque[float] = deque(maxlen=WINDOW)

    def usual(self) -> float | None:
        """Median of the window; None until it holds enough values."""
        return statistics.median(self._values) if len(self._values) >= WINDOW_MINIMUM else None

    def add(self, value: float) -> bool:
        """Adds a value to the window; returns whether it is a spike."""
        limit = outlier_limit(self._values, self.factor) if len(self._values) >= WINDOW_MINIMUM else value
        self._values.append(value)
        return value > limit


def outlier_limit(values: Sequence[float] | deque[float], factor: float) -> float:
    """Median plus `factor` robust standard deviations."""
    median = statistics.median(values)
    # 1.4826 x the median absolute deviation estimates the standard deviation of a normal distribution
    spread = 1.4826 * statistics.median(abs(v - median) for v in values)
    return median + factor * max(spread, SPREAD_FLOOR * abs(median))


def suspects(losses: Sequence[DocumentLoss], factor: float) -> list[DocumentLoss]:
    """Documents of a step whose loss is far above the others', worst first: at least the worst, at most MAX_DOCUMENTS.

    Args:
        losses: of all documents, ascending.
        factor: robust standard deviations above the median.
    """
    if not losses:
        return []
    limit = outlier_limit([document.loss for document in losses], factor)
    return [x for i, x in enumerate(reversed(losses)) if i == 0 or x.loss > limit][:MAX_DOCUMENTS]


def describe_document(worst: DocumentLoss, dataset: PackedDataset, *, seed: int) -> dict[str, Any]:
    """Source of a document: its row of the run, epoch and row of the dataset's file, and the input row."""
    place = locate(worst.row, dataset.rows, seed=seed)
    documents = [{"document": worst.document, "origin": origin(worst.document, dataset.manifest)}]
    where = {"row": worst.row, "epoch": place.epoch, "file_row": place.row}
    return where | {"loss": worst.loss, "documents": documents}


def documents_of_run(run_dir: str | Path) -> dict[int, list[tuple[int, int]]]:
    """Documents in each step as (row of the run, number), ascending, from the files of fault.log_rows.

    A step that several attempts did counts as done by the last one that began it.
    """
    attempts: dict[int, dict[str, tuple[float, list[tuple[int, int]]]]] = {}
    for file in Path(run_dir).glob("rows/*/rank-*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut by a kill
                continue
            of_step = attempts.setdefault(entry["step"], {})
            began, known = of_step.get(file.parent.name, (0.0, []))
            pairs = list(zip(entry["rows"], entry["documents"], strict=True))
            of_step[file.parent.name] = (max(began, entry["time"]), known + pairs)
    return {step: sorted(max(of_step.values())[1]) for step, of_step in sorted(attempts.items())}
