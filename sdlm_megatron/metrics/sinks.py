"""Sinks of a run's log records: JSONL, TensorBoard and W&B behind one `log(step, record)`.

    RUN/metrics.jsonl     exactly one JSON object per logged step, however often the run was stopped and resumed;
                          records of steps that were repeated are in metrics.redone.jsonl
    RUN/tensorboard/      event files; after a resume, repeated steps replace the old ones
    RUN/samples.jsonl     answers of the model at some steps (observe.sample_every), one JSON object per step
    RUN/validation.jsonl  metrics on data.validation, likewise
    RUN/wandb/            W&B's own files, and run-id: a resumed run continues the same W&B run

Only one process may open them.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sdlm_megatron.config.schema import ObserveConfig
from sdlm_megatron.files import write_text
from sdlm_megatron.metrics.metric_table import tab_of
from sdlm_megatron.metrics.wandb_sink import WandbSink, open_wandb

Record = Mapping[str, float | int | str]
METRICS_FILE, SAMPLES_FILE, VALIDATION_FILE = "metrics.jsonl", "samples.jsonl", "validation.jsonl"
REDONE = ".redone"
"""metrics.redone.jsonl: records of steps that were repeated after a crash. Goodput counts their time as lost."""


class Sink(Protocol):
    """Takes log records."""

    def log(self, step: int, record: Record) -> None:
        """Writes the record of one step; steps ascend."""

    def close(self) -> None:
        """Writes pending records; no `log` follows."""


class JsonlSink:
    """Appends records to a JSONL file, one object per line, unbuffered. Lines that a full disk refuses wait in memory.

    Args:
        path: the file; created if it does not exist.
        resume_step: step of the checkpoint that the run resumes from, 0 for a new run. Records of later steps, which
            are about to be repeated, move to NAME.redone.jsonl; the file is replaced atomically.
        resume_note: added to the first record after a resume next to `resumed_from`, e.g. "DP 2".
    """

    def __init__(self, path: Path, *, resume_step: int = 0, resume_note: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = _lines(path)
            later = [line for record, line in lines if record is not None and record["step"] > resume_step]
            if later:
                with open(path.with_suffix(REDONE + path.suffix), "a", encoding="utf-8") as redone:
                    redone.writelines(later)
            # a line that is no record stays where it is: it may be a user's
            kept = (line for record, line in lines if record is None or record["step"] <= resume_step)
            write_text(path, "".join(kept))
        # unbuffered: after a crash, every record up to the last step is in the file
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._waiting, self._warned = b"", False
        self._mark: dict[str, int | str] = {}
        if resume_step > 0:
            self._mark = {"resumed_from": resume_step}
            if resume_note:
                self._mark["resume_note"] = resume_note

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        fields = {"step": step, **record, **self._mark}
        self._mark = {}
        # JSON has no NaN: null keeps the line readable by every parser
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        self._waiting += (json.dumps(clean, ensure_ascii=False) + "\n").encode()
        self._write()

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as problem:
            if not self._warned:
                print(
                    f"cannot write {self._file.name}, its lines wait in memory: {problem}", file=sys.stderr, flush=True
                )
            self._warned = True

    def close(self) -> None:
        self._write()
        self._file.close()


class TensorBoardSink:
    """Writes the numbers of each record as scalars, and purges steps after `resume_step` of an earlier attempt.

    An error is printed and ends the sink until the next start of the run, but never training.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run needs it

            purge = resume_step + 1 if folder.exists() else None
            self._writer = SummaryWriter(str(folder), purge_step=purge)
        except Exception as problem:  # noqa: BLE001 - the package, protobuf or the disk
            self._stop(resume_step + 1, problem)

    def log(self, step: int, record: Record) -> None:
        if self._writer is None:
            return
        try:
            for key, value in record.items():
                if key not in ("step", "time") and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{tab_of(key)}/{key}", value, step)
        except Exception as problem:  # noqa: BLE001 - its thread reports errors of any kind here
            self._stop(step, problem)

    def _stop(self, step: int, problem: Exception) -> None:
        print(f"TensorBoard's files cannot be written from step {step} on: {problem}", file=sys.stderr, flush=True)
        self._writer = None

    def close(self) -> None:
        if self._writer is not None:
            with suppress(Exception):
                self._writer.close()


class Sinks(AbstractContextManager):
    """All sinks of a run behind one `log`. A context manager; `close` may be called twice."""

    def __init__(self, sinks: list[Sink], open_file: Callable[[str], JsonlSink]) -> None:
        self._sinks = sinks
        self._open_file = open_file
        self._files: dict[str, JsonlSink] = {}
        """Samples and validation: opened with their first record."""

    @classmethod
    def open(
        cls,
        run_dir: str | Path,
        settings: ObserveConfig,
        resume_step: int = 0,
        *,
        run_config: Mapping[str, Any] | None = None,
        resume_note: str = "",
    ) -> "Sinks":
        """Opens the sinks that the section `observe` of the configuration selects.

        Args:
            run_dir: the run folder; its name is that of the W&B run.
            resume_step: step of the checkpoint that the run resumes from, 0 for a new run.
            run_config: the resolved configuration, for W&B.
            resume_note: the layout after the resume, e.g. "PP 1, DP 2"; the report shows it.
        """
        folder = Path(run_dir)
        sinks: list[Sink] = [JsonlSink(folder / METRICS_FILE, resume_step=resume_step, resume_note=resume_note)]
        if settings.tensorboard:
            sinks.append(TensorBoardSink(folder / "tensorboard", resume_step=resume_step))
        wandb_sink = open_wandb(
            folder,
            mode=settings.wandb,
            project=settings.wandb_project,
            run_config=dict(run_config or {}),
            earlier=partial(_earlier, folder, resume_step),
        )
        if wandb_sink is not None:
            sinks.append(wandb_sink)
        return cls(sinks, lambda name: JsonlSink(folder / name, resume_step=resume_step))

    def log(self, step: int, record: Record) -> None:
        """Writes the record of one step to all sinks."""
        for sink in self._sinks:
            sink.log(step, record)

    def log_samples(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes samples.jsonl, its numbers to TensorBoard and W&B, and a table to W&B.

        Args:
            step: steps ascend.
            record: `tokens_per_pass`, and `samples` as in report/evaluation_record.py.
        """
        self._file(SAMPLES_FILE).log(step, record)
        for sink in self._sinks:
            if isinstance(sink, WandbSink):
                sink.log_table(step, "samples", sample_table(record))
            if not isinstance(sink, JsonlSink):
                sink.log(step, sample_numbers(record))

    def log_validation(self, step: int, record: Record) -> None:
        """Writes validation.jsonl, and its numbers to TensorBoard and W&B; steps ascend."""
        self._file(VALIDATION_FILE).log(step, record)
        for sink in self._sinks:
            if not isinstance(sink, JsonlSink):  # metrics.jsonl has one object per logged step
                sink.log(step, record)

    def _file(self, name: str) -> JsonlSink:
        if name not in self._files:
            self._files[name] = self._open_file(name)
        return self._files[name]

    def close(self) -> None:
        """Closes every sink."""
        while self._files:
            self._files.popitem()[1].close()
        while self._sinks:
            self._sinks.pop().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sample_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of samples, by their names in TensorBoard and W&B."""
    return {f"sample_{name}": value for name, value in record.items() if isinstance(value, float)}


def sample_table(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples of a record as rows of a table; bars separate the tokens of different passes."""
    rows = []
    for sample in record["samples"]:
        groups = groupby(sample["answer_tokens"], key=lambda token: token["pass"])
        answer = ["".join(token["text"] for token in tokens) for _, tokens in groups]
        rows.append({"prompt": sample["prompt"], "answer": "|".join(answer), "expected": sample.get("expected")})
    return rows


def _earlier(folder: Path, resume_step: int) -> list[tuple[int, Record]]:
    """The numbers of all steps up to the checkpoint, by step, as `Sinks` has logged them; without tables of samples."""
    rows: list[tuple[int, Record]] = []
    for file in (METRICS_FILE, SAMPLES_FILE, VALIDATION_FILE):
        for record in read_metrics(folder / file) if (folder / file).exists() else ():
            if "samples" in record:
                record = {"step": record["step"], **sample_numbers(record)}
            marks = ("step", "resumed_from", "resume_note")
            row = {key: value for key, value in record.items() if key not in marks and value is not None}
            rows += [(record["step"], row)] if record["step"] <= resume_step else []
    return sorted(rows, key=lambda row: row[0])


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL file in its order, each with a step. Numbers in them are finite.

    Lines that are no log records are skipped; their number is printed, once for each file.
    """
    return [record for record, _ in _lines(Path(path)) if record is not None]


def _lines(path: Path) -> list[tuple[dict[str, Any] | None, str]]:
    """Records and their lines; None for a line that is no record. A last line that a crash has cut is left out."""
    # undecodable bytes are replaced: they can only be in a line that a crash has cut
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = [(_record(line), line + "\n") for line in lines]
    wrong = [number for number, (record, _) in enumerate(records, start=1) if record is None]
    if wrong and path not in _REPORTED:
        _REPORTED.add(path)
        text = f"{len(wrong)} of {len(records)} lines are no log records and are skipped, the first is line {wrong[0]}"
        print(f"{path}: {text}", file=sys.stderr, flush=True)
    return records


_REPORTED: set[Path] = set()
_TEXTS, _MOST = ("slowest_host", "resume_note", "held_out_data"), 1e300
"""Fields that hold text; the largest absolute value of a number."""


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    if type(step) is not int or not 0 <= step < 2**53:
        return None
    for key, value in record.items():
        if key in ("samples", "warnings"):
            if not (_samples(value) if key == "samples" else _texts(value)):
                return None
        elif isinstance(value, float) and not math.isfinite(value):
            record[key] = None
        elif isinstance(value, (int, float)):
            if abs(value) > _MOST:
                return None
        elif not (value is None or (isinstance(value, str) and key in _TEXTS)):
            return None
    return record


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _samples(value: Any) -> bool:
    """Whether a value has the form of report/evaluation_record.py."""
    return isinstance(value, list) and all(
        isinstance(sample, dict)
        and isinstance(sample.get("prompt"), str)
        and isinstance(sample.get("expected"), str | None)
        and isinstance(sample.get("answer_tokens"), list)
        and all(
            isinstance(token, dict) and isinstance(token.get("text"), str) and type(token.get("pass")) is int
            for token in sample["answer_tokens"]
        )
        for sample in value
    )
