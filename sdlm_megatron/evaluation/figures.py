"""Figures of what decoding gives: quality by tokens a pass, wall time and threshold; models below each other.

Every function takes results by label, several seeds of one label as a list, and returns a matplotlib Figure.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

from sdlm_megatron.evaluation.intervals import Estimate
from sdlm_megatron.evaluation.results import Point, Results, Timed, points, timings
from sdlm_megatron.report.plots import INK, SERIES, figure_of, legend

LINES = {"prob_conf": "-", "entropy_conf": (0, (3, 2))}
WORDS = {"prob_conf": "prob", "entropy_conf": "entropy", "self_speculative": "self-speculative", "ar": "n = 1"}
MARKS = {"prob_conf": "o", "entropy_conf": "s", "self_speculative": "D", "ar": "*"}
LEAST_GAP = 0.16
"""Least distance of two labelled thresholds, in decades of 1 - threshold."""


def colour_of(index: int) -> str:
    """Of the label with this number."""
    return SERIES[index % len(SERIES)]


def curves(given: Sequence[Point]) -> dict[tuple[str, int], list[Point]]:
    """Points of one algorithm and n, by rising threshold."""
    found: dict[tuple[str, int], list[Point]] = {}
    for point in sorted(given, key=lambda p: p.threshold or 0.0):
        found.setdefault((point.alg, point.n), []).append(point)
    return found


def _words(label: str, alg: str, n: int, several: bool) -> str:
    words = WORDS.get(alg, alg) if alg == "ar" or not several else f"{WORDS.get(alg, alg)}, n = {n}"
    return f"{label}: {words}"


def _several(given: Sequence[Point]) -> bool:
    """Whether more than one window width was measured."""
    return len({p.n for p in given if p.alg != "ar"}) > 1


def _errors(axis: Axes, x: Sequence[Estimate], y: Sequence[Estimate], colour: str) -> None:
    """Crosses of both intervals, without a line or mark."""
    axis.errorbar(
        [e.value for e in x],
        [e.value for e in y],
        xerr=np.array([e.bars for e in x]).T,
        yerr=np.array([e.bars for e in y]).T,
        fmt="none",
        ecolor=colour,
        elinewidth=0.9,
        alpha=0.55,
    )


def quality_figure(sweeps: Results) -> Figure:
    """Exact answers against tokens a pass: a line for each confidence, a point for each threshold, with intervals."""
    figure, (axis,) = figure_of(7.2, 4.4)
    for index, (label, seeds) in enumerate(sweeps.items()):
        given, colour = points(seeds), colour_of(index)
        several = _several(given)
        for number, ((alg, n), line) in enumerate(curves(given).items()):
            x, y = [p.speed for p in line], [p.exact for p in line]
            _errors(axis, x, y, colour)
            axis.plot(
                [e.value for e in x],
                [e.value for e in y],
                color=colour,
                linestyle=LINES.get(alg, ""),
                alpha=1.0 if not several else 0.55 + 0.45 * number / max(len(curves(given)), 1),
                marker=MARKS.get(alg, "o"),
                markersize=10 if alg == "ar" else 5,
                linewidth=1.5,
                label=_words(label, alg, n, several),
            )
            if alg == "prob_conf" and len(sweeps) == 1:
                _name_points(axis, line, colour)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("tokens a pass", color=INK)
    axis.set_ylabel("exact answers", color=INK)
    axis.margins(x=0.05, y=0.08)
    axis.set_xlim(left=max(0.5, axis.get_xlim()[0]))  # an interval of few seeds may reach below what is possible
    legend(figure, loc="outside upper left", ncols=3)
    return figure


def _name_points(axis: Axes, line: Sequence[Point], colour: str) -> None:
    for point in line:
        axis.annotate(
            f"{point.threshold:g}",
            (point.speed.value, point.exact.value),
            xytext=(4, 5),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )


def threshold_figure(sweeps: Results) -> Figure:
    """Tokens a pass (above) and exact answers (below) by threshold, near 1 drawn apart; dotted what n = 1 gives."""
    figure, (upper, lower) = figure_of(7.2, 5.6, 2, sharex=True)
    thresholds: set[float] = set()
    for index, (label, seeds) in enumerate(sweeps.items()):
        given, colour = points(seeds), colour_of(index)
        for (alg, n), line in curves(given).items():
            if alg == "ar":
                lower.axhline(line[0].exact.value, color=colour, linewidth=1, linestyle=":")
            line = [p for p in line if p.threshold is not None and p.threshold < 1]
            if not line:
                continue
            x = [1 - (p.threshold or 0.0) for p in line]
            thresholds.update(p.threshold or 0.0 for p in line)
            for axis, values in ((upper, [p.speed for p in line]), (lower, [p.exact for p in line])):
                axis.errorbar(
                    x,
                    [e.value for e in values],
                    yerr=np.array([e.bars for e in values]).T,
                    color=colour,
                    linestyle=LINES.get(alg, "-"),
                    marker=MARKS.get(alg, "o"),
                    markersize=4.5,
                    linewidth=1.5,
                    elinewidth=0.9,
                    label=_words(label, alg, n, _several(given)) if axis is upper else None,
                )
    _threshold_axis(lower, thresholds)
    lower.yaxis.set_major_formatter(PercentFormatter(1.0))
    upper.set_ylabel("tokens a pass", color=INK)
    lower.set_ylabel("exact answers", color=INK)
    lower.set_xlabel("threshold τ", color=INK)
    legend(figure, loc="outside upper left", ncols=3)
    return figure


def _threshold_axis(axis: Axes, thresholds: set[float]) -> None:
    """1 - threshold by its logarithm, falling to the right, labelled by thresholds that have room."""
    axis.set_xscale("log")
    axis.invert_xaxis()
    shown: list[float] = []
    for value in sorted(thresholds, reverse=True):
        if not shown or np.log10((1 - value) / (1 - shown[-1])) >= LEAST_GAP:
            shown.append(value)
    axis.xaxis.set_major_locator(FixedLocator([1 - value for value in shown]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticklabels([f"{value:g}" for value in shown])


def wall_figure(speeds: Results) -> Figure:
    """Exact answers against tokens a second, one panel a batch size."""
    timed = {label: timings(seeds) for label, seeds in speeds.items()}
    batches = sorted({t.batch for rows in timed.values() for t in rows})
    figure, axes = figure_of(7.2, 1.2 + 2.6 * len(batches), len(batches))
    for axis, batch in zip(axes, batches, strict=True):
        for index, (label, rows) in enumerate(timed.items()):
            _wall_points(axis, label, [t for t in rows if t.batch == batch], colour_of(index))
        axis.set_xlim(left=0)
        axis.set_title(f"batch {batch}", fontsize=10, color=INK, loc="left")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylabel("exact answers", color=INK)
        axis.margins(y=0.12)
    axes[-1].set_xlabel("tokens a second", color=INK)
    legend_once(figure, axes)
    return figure


def _wall_points(axis: Axes, label: str, rows: Sequence[Timed], colour: str) -> None:
    for alg in dict.fromkeys(t.alg for t in rows):
        line = sorted((t for t in rows if t.alg == alg), key=lambda t: t.threshold or 0.0)
        axis.errorbar(
            [t.rate.value for t in line],
            [t.exact for t in line],
            xerr=np.array([t.rate.bars for t in line]).T,
            color=colour,
            linestyle=LINES.get(alg, ""),
            marker=MARKS.get(alg, "o"),
            markersize=10 if alg == "ar" else 5,
            linewidth=1.3,
            elinewidth=0.9,
            label=f"{label}: {WORDS.get(alg, alg)}",
        )


def legend_once(figure: Figure, axes: Sequence[Axes], **options: Any) -> None:
    """One legend for all panels: each name once."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    if named:
        options = {"loc": "outside upper left", "ncols": 3, **options}
        legend(figure, handles=list(named.values()), labels=list(named), **options)


def models_figure(
    values: Mapping[str, Mapping[str, Estimate]], *, percent: Sequence[str] = (), logarithmic: bool = False
) -> Figure:
    """Figures of several models below each other, as points with intervals.

    Args:
        values: by panel: the label of each model and its figure.
        percent: panels whose figures are shares.
        logarithmic: the scale of all panels.
    """
    labels = list(dict.fromkeys(label for panel in values.values() for label in panel))
    figure, axes = figure_of(7.2, 0.4 + len(values) * (0.6 + 0.25 * len(labels)), len(values))
    for axis, (name, panel) in zip(axes, values.items(), strict=True):
        for place, label in enumerate(labels):
            if label in panel:
                one, colour = panel[label], colour_of(place)
                bars = np.array([one.bars]).T
                axis.errorbar(one.value, place, xerr=bars, fmt="o", color=colour, markersize=5, elinewidth=1.4)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_title(fill(name, 80), fontsize=10, color=INK, loc="left")
        if name in percent:
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        if logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
    return figure
