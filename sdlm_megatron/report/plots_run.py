"""Figures of a run as a job: curves with its restarts, where a step's time went, where the whole time went."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sdlm_megatron.ops.goodput import CAUSES, USEFUL, Goodput
from sdlm_megatron.report.plots import GRID, INK, SERIES, SOFT, figure_of, legend, mark_resumes, series

PARTS = {
    "time_forward_backward": "forward and backward",
    "time_reduce": "gradient reduction",
    "time_update": "update",
    "data_wait": "data wait",
    "time_read_log": "results, log, rest",
}
"""Fields of a record that add up to its step_time."""
COLOURS = {
    USEFUL: "#2f9e77",
    "queue": "#cfd6de",
    "pre-flight": "#9cc3e6",
    "start": "#3b6fb6",
    "first step": "#4aa3b5",
    "redone steps": "#c24b3a",
    "save": "#e2803a",
    "validation and samples": "#8a63c2",
    "data wait": "#8d7a1f",
    "hang or crash": "#7d1f14",
    "stop and restart": "#b5527d",
    "other": "#6b7785",
}


def curves_figure(
    records: Sequence[Mapping[str, Any]],
    curves: Mapping[str, str],
    label: str,
    *,
    share: bool = False,
    marks: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Fields of the records against the step.

    Args:
        curves: name in the legend for each field; fields that no record has are left out.
        label: of the vertical axis.
        share: they are shares, shown as percent from 0 to 100.
        marks: records that tell of resumes, where `records` are not those.
    """
    figure, (axis,) = figure_of(7.2, 3.2)
    highest = 0.0
    for n, (key, name) in enumerate(curves.items()):
        steps, values = series(records, key)
        if values:
            highest = max(highest, *values)
            few = len(values) < 3
            axis.plot(steps, values, "o-" if few else "-", color=SERIES[n % len(SERIES)], linewidth=1.5, label=name)
    mark_resumes(axis, marks or records)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel(label, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(0, 1.08 * highest or 1)
    if share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.margins(x=0.01)
    legend(axis, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def breakdown_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds a step, stacked by part, against the step (neighbours averaged where there are many)."""
    figure, (axis,) = figure_of(7.2, 3.2)
    known = [r for r in records if r.get("time_forward_backward") is not None]
    bins = np.array_split(np.arange(len(known)), min(len(known), 120))
    steps = [known[b[-1]]["step"] for b in bins]
    bottom = np.zeros(len(bins))
    for n, (key, name) in enumerate(PARTS.items()):
        values = np.array([float(r.get(key) or 0.0) for r in known])
        height = np.array([values[b].mean() for b in bins])
        axis.fill_between(steps, bottom, bottom + height, color=SERIES[n], label=name, linewidth=0, step=None)
        bottom += height
    mark_resumes(axis, records)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel("seconds a step", color=INK)
    # a first step that compiles would leave nothing to see of the others
    axis.set_ylim(0, float(np.percentile(bottom, 98)) * 1.25 or 1)
    axis.margins(x=0)
    legend(axis, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure


def goodput_figure(found: Goodput, attempts: Sequence[float]) -> Figure:
    """What the whole time went to: in order of size above, along the clock below.

    Args:
        attempts: when attempts started, seconds since 1970.
    """
    figure, (upper, lower) = figure_of(7.2, 1.6 + 0.28 * len(found.seconds), 2, height_ratios=[len(found.seconds), 2.2])
    causes = sorted(found.seconds, key=lambda c: (c != USEFUL, -found.seconds[c]))
    share = [found.seconds[c] / found.wall for c in causes]
    upper.barh(range(len(causes)), share, color=[COLOURS[c] for c in causes])
    upper.set_yticks(range(len(causes)), causes)
    upper.invert_yaxis()
    upper.set_xlim(0, max(share) * 1.15)
    for n, x in enumerate(share):
        upper.annotate(
            f"{x:.1%}", (x, n), xytext=(4, 0), textcoords="offset points", fontsize=8.5, color=INK, va="center"
        )
    upper.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    upper.grid(False, axis="y")
    _clock(lower, found, attempts)
    return figure


def _clock(axis: Axes, found: Goodput, attempts: Sequence[float]) -> None:
    """The spans along the time."""
    unit, name = (
        (3600.0, "hours") if found.wall > 3 * 3600 else (60.0, "minutes") if found.wall > 180 else (1.0, "seconds")
    )
    for cause in CAUSES:
        bars = [((s.start - found.start) / unit, (s.end - s.start) / unit) for s in found.spans if s.cause == cause]
        axis.broken_barh(bars, (0, 1), color=COLOURS[cause], linewidth=0)
    for start in attempts:
        axis.axvline((start - found.start) / unit, color=INK, linewidth=0.9, linestyle=":")
    axis.set_xlim(0, found.wall / unit)
    axis.set_yticks([])
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(f"{name} since the beginning (dotted: a start of the processes)", color=INK)
    axis.tick_params(colors=SOFT, labelsize=9)
    axis.set_facecolor(GRID)
