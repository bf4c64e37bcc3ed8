"""`--profile FIRST:LAST`: a trace of these steps, and what it says, on one page."""

import gzip
import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.training.trace import PARTS, Summary, summarize


def parse_steps(text: str) -> tuple[int, int]:
    """ "10:12" to (10, 12), "10" to (10, 10); ConfigError for anything else."""
    first, colon, last = text.partition(":")
    last = last if colon else first
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ConfigError(
            f"--profile {text} names no steps",
            "the command line",
            "--profile 10:12 for steps 10 to 12, or --profile 10",
        )
    return int(first), int(last)


def steps_to_profile(steps: tuple[int, int], start: int, stop: int) -> tuple[int, int] | None:
    """`steps` of a run that trains steps start + 1 to stop; None where it goes on after them.

    So a job that is started again with the same command goes on. Raises ConfigError for steps after the last one.
    """
    if steps[1] > stop:
        raise ConfigError(
            f"--profile {steps[0]}:{steps[1]}, but this run ends with step {stop}",
            "the command line",
            f"--profile with some of steps {start + 1} to {stop}",
        )
    return steps if steps[0] > start else None


class StepProfiler:
    """Profiles steps `first` to `last` of the training loop, and writes RUN_DIR/profile when they are done.

    Args:
        first, last: steps, both included.
        folder: RUN_DIR/profile.
        rank: number of this process, for the name of its trace; None where it writes none.
        gather: from one object a process to the objects of all processes, in order of rank; all call it.
        heading: what was run where, for the top of the page.
    """

    def __init__(
        self,
        first: int,
        last: int,
        folder: Path,
        *,
        rank: int | None,
        gather: Callable[[Any], list[Any]],
        heading: str,
    ) -> None:
        self.first, self.last, self.folder, self.rank = first, last, folder, rank
        self.gather, self.heading = gather, heading
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call it before each step. One step is for warming up, if there is one before the first."""
        if self.rank is None or self._profile is not None or not self.first - 1 <= step <= self.last:
            return
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        warm_up, steps = self.first - step, self.last - self.first + 1
        if on_gpu:
            torch.cuda.synchronize()  # kernels of earlier steps are not of these
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=lambda n: (
                ProfilerAction.WARMUP
                if n < warm_up
                else ProfilerAction.RECORD
                if n < warm_up + steps - 1
                else ProfilerAction.RECORD_AND_SAVE
                if n == warm_up + steps - 1
                else ProfilerAction.NONE
            ),
            on_trace_ready=self._export,
        )
        self._profile.start()

    def after(self, step: int) -> str | None:
        """Call it after each step, the last one when the device is through: then it returns the page, on rank 0."""
        if self._profile is not None:
            self._profile.step()
        if step != self.last:
            return None
        mine = None
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            with gzip.open(self._trace(), "rt", encoding="utf-8") as file:
                mine = summarize(json.load(file)["traceEvents"]), _peak()
        found = [(rank, *entry) for rank, entry in enumerate(self.gather(mine)) if entry is not None]
        if self.rank != 0:
            return None
        text = page(f"Steps {self.first} to {self.last}: {self.heading}", found)
        (self.folder / "summary.md").write_text(text, encoding="utf-8")
        return text

    def _trace(self) -> Path:
        return self.folder / f"trace_rank{self.rank}.json.gz"

    def _export(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._trace()))


def _peak() -> str:
    if not torch.cuda.is_available():
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB"
    used, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    return f"{used:.1f} GB ({reserved:.1f} reserved)"


def page(heading: str, found: Sequence[tuple[int, Summary, str]]) -> str:
    """The summaries of some processes (rank, summary, peak memory), one column each, in Markdown."""
    columns = [f"rank {rank}" for rank, _, _ in found]
    summaries = [summary for _, summary, _ in found]

    def share(summary: Summary, ms: float) -> str:
        return f"{ms / summary.steps:.1f} ({ms / summary.wall:.0%})" if summary.wall else "-"

    rows = [
        ["a whole step", *(f"{s.wall / s.steps:.1f}" for s in summaries)],
        *([part, *(share(s, s.parts[part]) for s in summaries)] for part in PARTS),
        ["communication alone", *(share(s, s.exposed) for s in summaries)],
        ["nothing at all", *(share(s, s.idle) for s in summaries)],
    ]
    text = [f"# {heading}", "", "Milliseconds a step, and the share of it:", "", *_table(["", *columns], rows), ""]
    text += [
        "Communication alone is time in which only a kernel that talks to other processes ran: waiting for them is in "
        "it, so with a pipeline its bubbles are too. Nothing at all: the host was too slow, or waited.",
        "",
    ]
    text += _communication(columns, summaries)
    names = sorted({name for s in summaries for name in s.waits})
    counts = [[n, *(_count(s, n) for s in summaries)] for n in names]
    counts.append(["peak memory", *(peak for _, _, peak in found)])
    text += ["Waits of the host for the device, a step, and the memory:", "", *_table(["", *columns], counts), ""]
    rank, first, _ = found[0]
    longest = [
        [f"`{_short(n)}`", part, f"{calls / first.steps:.0f}", share(first, ms)] for n, part, calls, ms in first.top
    ]
    text += [f"What took longest on rank {rank}:", "", *_table(["", "part", "calls", "ms"], longest)]
    return "\n".join(text) + "\n"


def _communication(columns: Sequence[str], summaries: Sequence[Summary]) -> list[str]:
    keys = sorted({key for s in summaries for key in s.communication})
    if not keys:
        return []

    def cell(summary: Summary, key: tuple[str, str]) -> str:
        if key not in summary.communication:
            return "-"
        calls, ms, alone = (x / summary.steps for x in summary.communication[key])
        return f"{calls:.0f} x, {ms:.1f}, {alone:.1f} alone"

    rows = [[" ".join(part for part in key if part), *(cell(s, key) for s in summaries)] for key in keys]
    head = "Communication by kind and group: calls, milliseconds, and of those not hidden behind other work, a step:"
    return [head, "", *_table(["", *columns], rows), ""]


def _count(summary: Summary, name: str) -> str:
    return f"{summary.waits.get(name, 0) / summary.steps:.1f}"


def _short(name: str) -> str:
    return name if len(name) <= 70 else f"{name[:67]}..."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "| "
        + " | ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    ]
    marks = "|" + "|".join(("-" * (w + 2)) if i == 0 else ("-" * (w + 1) + ":") for i, w in enumerate(widths)) + "|"
    return [text[0], marks, *text[1:]]
