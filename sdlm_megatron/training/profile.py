"""Option `--profile FIRST:LAST`: traces these steps with torch.profiler and summarizes the trace on one page.

RUN/profile/trace_rankN.json.gz   for Perfetto or chrome://tracing, one per pipeline stage
RUN/profile/summary.md            parts of a step, communication, waits of the host, memory, longest kernels
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from sdlm_megatron.parallel.device import device_peak_memory_gb
from sdlm_megatron.training.hooks import Hook, TrainingRun
from sdlm_megatron.training.trace import PARTS, TraceSummary, summarize

if TYPE_CHECKING:
    from sdlm_megatron.report.page_kit import Page, PageSection

_LONGEST_NAME = 70
"""Characters of a kernel's name that are shown."""


class ProfileHook(Hook):
    """Profiles steps `first` to `last`, both included, on one process of each pipeline stage."""

    def __init__(self, run: TrainingRun, first: int, last: int) -> None:
        super().__init__(run)
        self.first, self.last, self.folder = first, last, Path(run.config.run_dir) / "profile"
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        groups = self.run.engine.groups
        # one step to warm the profiler up, if there is one before `first`
        wanted = groups.tp_rank == groups.dp_cp_rank == 0 and self.first - 1 <= step <= self.last
        if not wanted or self._profile is not None:
            return
        with self.run.optional("the profile"):
            self._start(step)

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()  # kernels of earlier steps do not belong into the trace
        steps = self.last - self.first + 1
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=self.first - step, active=steps, repeat=1),
            on_trace_ready=self._export,
        )
        self._profile.start()

    def due(self, step: int) -> bool:
        return step in (self.first - 1, self.last)  # the device must be idle when the trace begins and ends

    def after_step(self, step: int) -> None:
        with self.run.pause():
            if self._profile is not None:
                with self.run.optional("the profile"):
                    self._profile.step()
            if step == self.last:
                self._finish()

    def _finish(self) -> None:
        summary = None
        # only some processes have a trace, but all take part in the gather below
        if self._profile is not None:
            with self.run.optional("the profile"):
                self._profile.stop()
                # read back from the file: `summarize` works on the exported format, which tests can write by hand
                with gzip.open(self._trace(), "rt", encoding="utf-8") as file:
                    measured = summarize(json.load(file)["traceEvents"])
                # JSON has no keys that are tuples
                fields = asdict(replace(measured, communication={}))
                summary = fields, list(measured.communication.items()), _peak_memory(self.run.engine.groups.device)
            self._profile = None
        gathered = self.run.engine.groups.gather(summary)
        columns = [
            (rank, TraceSummary(**fields | {"communication": {tuple(key): value for key, value in calls}}), memory)
            for rank, (fields, calls, memory) in ((r, entry) for r, entry in enumerate(gathered) if entry)
        ]
        if not self.run.main or not columns:
            return
        with self.run.optional("the profile"):
            groups = self.run.engine.groups
            layout = f"{groups.layout_text} on {groups.device_name}"
            text = summary_page(f"Steps {self.first} to {self.last}: {layout}", columns).markdown()
            (self.folder / "summary.md").write_text(text, encoding="utf-8")
            print(f"{text}written to {self.folder}", flush=True)

    def _trace(self) -> Path:
        return self.folder / f"trace_rank{self.run.engine.groups.rank}.json.gz"

    def _export(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._trace()))


def _peak_memory(device: torch.device) -> str:
    reserved = f" ({torch.cuda.max_memory_reserved() / 1e9:.1f} reserved)" if device.type == "cuda" else ""
    return f"{device_peak_memory_gb(device):.1f} GB{reserved}"


def summary_page(title: str, columns: Sequence[tuple[int, TraceSummary, str]]) -> "Page":
    """The page of some processes, one column each: (rank, summary, peak memory)."""
    from sdlm_megatron.report.page_kit import Page  # not at the top: every rank would import matplotlib

    ranks = ["", *(f"rank {rank}" for rank, _, _ in columns)]
    summaries = [summary for _, summary, _ in columns]
    page = Page(title)
    section = page.section("profile")
    section.text("Milliseconds per step, and their share of it:")
    section.table(
        ranks,
        [
            ["whole step", *(f"{s.wall / s.steps:.1f}" for s in summaries)],
            *([part, *(_share(s, s.parts[part]) for s in summaries)] for part in PARTS),
            ["exposed communication", *(_share(s, s.exposed) for s in summaries)],
            ["idle", *(_share(s, s.idle) for s in summaries)],
        ],
    )
    section.text(
        "Exposed communication is time in which only communication kernels ran. It includes waiting for other "
        "processes, and so the bubbles of a pipeline. Idle: the host was too slow to keep the device busy, or waited."
    )
    _communication(section, ranks, summaries)
    names = sorted({name for s in summaries for name in s.waits})
    waits = [[name, *(f"{s.waits.get(name, 0) / s.steps:.1f}" for s in summaries)] for name in names]
    section.text("Waits of the host for the device, per step, and peak memory:")
    section.table(ranks, [*waits, ["peak memory", *(memory for _, _, memory in columns)]])
    rank, first, _ = columns[0]
    section.text(f"Longest kernels (on a CPU: operators) of rank {rank}:")
    section.table(
        ["", "part", "calls", "ms"],
        [[f"`{_short(n)}`", part, f"{calls / first.steps:.0f}", _share(first, ms)] for n, part, calls, ms in first.top],
    )
    return page


def _share(summary: TraceSummary, ms: float) -> str:
    return f"{ms / summary.steps:.1f} ({ms / summary.wall:.0%})" if summary.wall else "-"


def _communication(section: "PageSection", ranks: Sequence[str], summaries: Sequence[TraceSummary]) -> None:
    keys = sorted({key for s in summaries for key in s.communication})
    if not keys:
        return

    def cell(summary: TraceSummary, key: tuple[str, str]) -> str:
        if key not in summary.communication:
            return "-"
        calls, ms, exposed = (x / summary.steps for x in summary.communication[key])
        return f"{calls:.0f} x, {ms:.1f}, {exposed:.1f} exposed"

    section.text("Communication by kind and group, per step: calls, milliseconds, and milliseconds exposed:")
    section.table(ranks, [[" ".join(filter(None, key)), *(cell(s, key) for s in summaries)] for key in keys])


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
