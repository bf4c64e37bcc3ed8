"""The style of all figures, and curves against the training step. Nothing here touches matplotlib's global state."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from sdlm_megatron.errors import neutral

INK, SOFT, GRID = "#1f2933", "#6b7785", "#e3e8ee"
CLEAN, CONTEXT, BLOCK, NONE = "#3b6fb6", "#9cc3e6", "#e2803a", "#f4f6f8"
"""Clean tokens, clean tokens that blocks see, block tokens, nothing."""
SERIES = ("#3b6fb6", "#e2803a", "#2f9e77", "#b5527d", "#8a63c2", "#8d7a1f", "#4aa3b5", "#c24b3a")
Records = Sequence[Mapping[str, Any]]


def figure_of(width: float, height: float, rows: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches and its axes, row by row, in the style of the reports.

    `grid` goes to Figure.subplots: ncols, sharex, height_ratios.
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = np.atleast_1d(figure.subplots(rows, **grid)).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(SOFT)
        axis.tick_params(colors=SOFT, labelsize=9, which="both")
        axis.grid(True, color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def show_plainly(figure: Figure) -> None:
    """Makes all texts of a finished figure neutral, and no dollar sign starts a formula."""
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    # their labels are formulas that matplotlib writes: 10 with an exponent
    scales = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    formulas = {id(text) for axis in scales for text in axis.findobj(Text)}
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in formulas:
            text.set_parse_math(False)
            text.set_text(neutral(text.get_text()))


def legend(owner: Axes | Figure, **options: Any) -> None:
    """A legend in the style of the reports, unless nothing has a label."""
    drawn = [owner] if isinstance(owner, Axes) else owner.axes
    if "handles" in options or any(axis.get_legend_handles_labels()[1] for axis in drawn):
        style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
        compact = {"columnspacing": 1.2, "handlelength": 1.6, "handletextpad": 0.6}
        owner.legend(**style, **compact, **options)


def curves_figure(
    records: Records,
    curves: Mapping[str, str],
    label: str,
    *,
    share: bool = False,
    dashed: str = "",
    resumes: Records = (),
    annotate: bool = False,
) -> Figure:
    """Fields of log records against the step, with dotted verticals where the run was resumed.

    Args:
        records: in step order; a field may be absent or null.
        curves: legend text of each field; fields that no record has are left out.
        label: of the vertical axis.
        share: values are shares, shown in percent.
        dashed: the field drawn as a dashed dark line.
        resumes: records with the resumes, if these are not in `records`.
        annotate: write at the verticals what they are.
    """
    figure, (axis,) = figure_of(7.2, 3.5)
    highest = 0.0
    for n, (key, name) in enumerate(curves.items()):
        points = [(int(r["step"]), float(r[key])) for r in records if r.get(key) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        highest = max(highest, *values)
        color, line = (INK, (0, (4, 2))) if key == dashed else (SERIES[n % len(SERIES)], "-")
        marker = "o" if len(values) < 3 else ""  # a line through one or two points is hard to see
        axis.plot(steps, values, color=color, linestyle=line, marker=marker, linewidth=1.5, label=name)
    mark_resumes(axis, resumes or records, annotate=annotate)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel(label, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(0, 1.08 * highest or 1)
    if share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.margins(x=0.01)
    legend(axis, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def mark_resumes(axis: Axes, records: Records, *, annotate: bool = False) -> None:
    """Dotted verticals where the run was resumed."""
    resumed = [r for r in records if "resumed_from" in r]
    for record in resumed:
        axis.axvline(record["resumed_from"] + 0.5, color=SOFT, linewidth=1, linestyle=":")
        if annotate and len(resumed) <= 2:  # more texts would overlap
            axis.annotate(
                f"stopped and resumed\n{record.get('resume_note', '')}",
                (record["resumed_from"] + 0.5, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8.5,
                color=SOFT,
                va="top",
            )
