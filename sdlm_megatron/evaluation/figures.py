"""Figures of quality, speed, cost and perplexity, for several models side by side.

Every function takes result files by label, several seeds of a label as a list, and returns a matplotlib Figure in the
style of report/plots.py. Each label keeps its color in every figure.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

from sdlm_megatron.evaluation.intervals import Estimate
from sdlm_megatron.evaluation.result_files import (
    STOCK,
    Result,
    Results,
    RuleTiming,
    SweepPoint,
    context_rows,
    points,
    served_rates,
    timings,
)
from sdlm_megatron.report.plots import INK, SERIES, SOFT, figure_of, legend

DASHED = (0, (3, 2))
LINES = {"prob_conf": "-", "entropy_conf": DASHED}
NAMES = {"prob_conf": "prob", "entropy_conf": "entropy", "self_speculative": "self-speculative", "ar": "n = 1"}
MARKERS = {"prob_conf": "o", "entropy_conf": "s", "self_speculative": "D", "lossless": "P", "ar": "*"}
TICK_GAP = 0.16  # smallest distance between two labeled thresholds, in decades of 1 - threshold
# Line style and label of each kind of pass in speed.json.
PASS_STYLES = {
    "window": ("-", "n kept tokens and a window"),
    "window_one": (DASHED, "one kept token and a window"),
    "self_speculative": ("", "self-speculation, a pass"),
    "lossless": ("", "lossless, a pass"),
}
Values = Sequence[float] | Sequence[Estimate]


# --- style


def color_of(index: int) -> str:
    """Color of the label with this number."""
    return SERIES[index % len(SERIES)]


def draw_line(axis: Axes, x: Values, y: Values, **style: Any) -> None:
    """A line through points, with error bars along every axis whose values are estimates."""

    def split(values: Values) -> tuple[list[float], np.ndarray | None]:
        bars = [v.bars for v in values if isinstance(v, Estimate)]
        return [v.value if isinstance(v, Estimate) else v for v in values], np.array(bars).T if bars else None

    (x_values, x_bars), (y_values, y_bars) = split(x), split(y)
    defaults = {"markersize": 4.5, "linewidth": 1.4, "elinewidth": 0.9}
    axis.errorbar(x_values, y_values, xerr=x_bars, yerr=y_bars, **defaults | style)


def label_axis(axis: Axes, *, title: str = "", x: str = "", y: str = "", percent: bool = False) -> None:
    """Title and axis labels; `percent` formats the y axis as shares."""
    if title:
        axis.set_title(title, fontsize=10, color=INK, loc="left")
    if x:
        axis.set_xlabel(x, color=INK)
    if y:
        axis.set_ylabel(y, color=INK)
    if percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def legend_once(figure: Figure, axes: Sequence[Axes], ncols: int = 3) -> None:
    """One legend above all panels, with each name once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        entries = {"handles": list(handles.values()), "labels": list(handles)}
        legend(figure, loc="outside upper left", ncols=ncols, **entries)


def _plain_numbers(value: float, _: float) -> str:
    return f"{value:g}"


# --- sweep


def curves(measured: Sequence[SweepPoint]) -> dict[tuple[str, int], list[SweepPoint]]:
    """Points by algorithm and n, in the order of rising thresholds."""
    lines: dict[tuple[str, int], list[SweepPoint]] = {}
    for point in sorted(measured, key=lambda p: p.threshold or 0.0):
        lines.setdefault((point.alg, point.n), []).append(point)
    return lines


def _series_name(label: str, alg: str, n: int, measured: Sequence[SweepPoint]) -> str:
    """Legend entry of a curve; n is named only where several window widths were measured."""
    several = len({p.n for p in measured if p.alg != "ar"}) > 1
    return f"{label}: {NAMES.get(alg, alg)}{f', n = {n}' if several and alg != 'ar' else ''}"


def quality_figure(sweeps: Results) -> Figure:
    """Exact answers against tokens per pass: a curve per confidence measure, a point per threshold, with intervals."""
    figure, (axis,) = figure_of(7.2, 4.4)
    for index, (label, seeds) in enumerate(sweeps.items()):
        measured, color = points(seeds), color_of(index)
        lines = curves(measured)
        several = len({n for alg, n in lines if alg != "ar"}) > 1
        for number, ((alg, n), line) in enumerate(lines.items()):
            draw_line(
                axis,
                [p.speed for p in line],
                [p.exact for p in line],
                # curves of several window widths share a color and differ in strength
                color=to_rgba(color, 0.55 + 0.45 * number / len(lines) if several else 1.0),
                ecolor=to_rgba(color, 0.55),
                linestyle=LINES.get(alg, ""),
                marker=MARKERS.get(alg, "o"),
                markersize=10 if alg == "ar" else 5,
                linewidth=1.5,
                label=_series_name(label, alg, n, measured),
            )
            if alg == "prob_conf" and len(sweeps) == 1:
                _name_points(axis, line, color)
    label_axis(axis, x="tokens per pass", y="exact answers", percent=True)
    axis.margins(x=0.05, y=0.08)
    axis.set_xlim(left=max(0.5, axis.get_xlim()[0]))  # an interval over few seeds can reach below what is possible
    legend(figure, loc="outside upper left", ncols=3)
    return figure


def _name_points(axis: Axes, line: Sequence[SweepPoint], color: str) -> None:
    for point in line:
        axis.annotate(
            f"{point.threshold:g}",
            (point.speed.value, point.exact.value),
            xytext=(4, 5),
            textcoords="offset points",
            fontsize=8,
            color=color,
        )


def threshold_figure(sweeps: Results) -> Figure:
    """Tokens per pass (above) and exact answers (below) by threshold; a dotted line shows the quality of n = 1.

    The x axis is logarithmic in 1 - threshold, which spreads the thresholds near 1.
    """
    figure, (upper, lower) = figure_of(7.2, 5.6, 2, sharex=True)
    thresholds: set[float] = set()
    for index, (label, seeds) in enumerate(sweeps.items()):
        measured, color = points(seeds), color_of(index)
        for (alg, n), line in curves(measured).items():
            if alg == "ar":
                lower.axhline(line[0].exact.value, color=color, linewidth=1, linestyle=":")
            known = [(p.threshold, p) for p in line if p.threshold is not None and p.threshold < 1]
            if not known:
                continue
            thresholds.update(threshold for threshold, _ in known)
            x = [1 - threshold for threshold, _ in known]
            style = {
                "color": color,
                "linestyle": LINES.get(alg, "-"),
                "marker": MARKERS.get(alg, "o"),
                "linewidth": 1.5,
            }
            draw_line(upper, x, [p.speed for _, p in known], label=_series_name(label, alg, n, measured), **style)
            draw_line(lower, x, [p.exact for _, p in known], **style)
    _threshold_axis(lower, thresholds)
    label_axis(upper, y="tokens per pass")
    label_axis(lower, x="threshold τ", y="exact answers", percent=True)
    legend(figure, loc="outside upper left", ncols=3)
    return figure


def _threshold_axis(axis: Axes, thresholds: set[float]) -> None:
    """1 - threshold on a logarithmic axis that falls to the right, labeled with the thresholds that have room."""
    axis.set_xscale("log")
    axis.invert_xaxis()
    shown: list[float] = []
    for value in sorted(thresholds, reverse=True):
        if not shown or np.log10((1 - value) / (1 - shown[-1])) >= TICK_GAP:
            shown.append(value)
    axis.xaxis.set_major_locator(FixedLocator([1 - value for value in shown]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticklabels([f"{value:g}" for value in shown])


# --- speed and context


def wall_figure(speeds: Results) -> Figure:
    """Exact answers against tokens per second, one panel per batch size."""
    timed = {label: timings(seeds) for label, seeds in speeds.items()}
    batches = sorted({t.batch for rows in timed.values() for t in rows})
    figure, axes = figure_of(7.2, 1.2 + 2.6 * len(batches), len(batches))
    for axis, batch in zip(axes, batches, strict=True):
        for index, (label, rows) in enumerate(timed.items()):
            _wall_lines(axis, label, [t for t in rows if t.batch == batch], color_of(index))
        axis.set_xlim(left=0)
        axis.margins(y=0.12)
        label_axis(axis, title=f"batch {batch}", y="exact answers", percent=True)
    label_axis(axes[-1], x="tokens per second")
    legend_once(figure, axes)
    return figure


def _wall_lines(axis: Axes, label: str, rows: Sequence[RuleTiming], color: str) -> None:
    for alg in dict.fromkeys(t.alg for t in rows):
        line = sorted((t for t in rows if t.alg == alg), key=lambda t: t.threshold or 0.0)
        draw_line(
            axis,
            [t.rate for t in line],
            [t.exact for t in line],
            color=color,
            linestyle=LINES.get(alg, ""),
            marker=MARKERS.get(alg, "o"),
            markersize=10 if alg == "ar" else 5,
            linewidth=1.3,
            label=f"{label}: {NAMES.get(alg, alg)}",
        )


def overhead_figure(speeds: Results) -> Figure:
    """Cost of a window pass in causal steps against n, one panel per label and batch size, a color per context length.

    A pass is a gain if it keeps more tokens than its cost. The dotted line is n, the cost of the steps it replaces if
    all its tokens are kept. Medians and quartiles of the repetitions; with several seeds, those of the first.
    """
    panels = [
        (f"{label}, batch {batch}", [row for row in seeds[0]["break_even"] if row["batch"] == batch])
        for label, seeds in speeds.items()
        for batch in sorted({row["batch"] for row in seeds[0].get("break_even", [])})
    ]
    figure, axes = figure_of(7.2, 0.8 + 2.5 * max(len(panels), 1), max(len(panels), 1))
    for axis, (title, rows) in zip(axes, panels, strict=False):
        for index, context in enumerate(sorted({row["context"] for row in rows})):
            _cost_lines(axis, [row for row in rows if row["context"] == context], context, color_of(index))
        _steps_axis(axis, sorted({row["n"] for row in rows}))
        label_axis(axis, title=title, y="causal steps")
    label_axis(axes[-1], x="n, slots of the window")
    legend_once(figure, axes, ncols=2)
    return figure


def _cost_lines(axis: Axes, rows: Sequence[Result], context: int, color: str) -> None:
    for what, (style, name) in PASS_STYLES.items():
        line = sorted((row for row in rows if row["what"] == what), key=lambda row: row["n"])
        if line:
            draw_line(
                axis,
                [row["n"] for row in line],
                [Estimate(row["tokens"], row["low"], row["high"]) for row in line],
                color=color,
                linestyle=style,
                marker=MARKERS.get(what, "o"),
                markersize=3 if what == "window_one" else 4.5,
                label=f"at {context} tokens: {name}",
            )


def _steps_axis(axis: Axes, widths: Sequence[int]) -> None:
    axis.plot(widths, widths, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), label="n causal steps")
    for scale, ticks in (("x", list(widths)), ("y", [2**k for k in range(-1, 8)])):
        getattr(axis, f"set_{scale}scale")("log", base=2)
        line = getattr(axis, f"{scale}axis")
        line.set_major_locator(FixedLocator(ticks))
        line.set_minor_locator(NullLocator())
        line.set_major_formatter(_plain_numbers)


def context_figure(contexts: Results) -> Figure:
    """Exact answers, tokens per pass and tokens per second against the number of tokens before the answer."""
    figure, axes = figure_of(7.2, 7.0, 3, sharex=True)
    for index, (label, seeds) in enumerate(contexts.items()):
        lines: dict[tuple[str, int, float | None], list[dict[str, Any]]] = {}
        for row in sorted(context_rows(seeds), key=lambda r: r["context"]):
            lines.setdefault((row["alg"], row["n"], row["threshold"]), []).append(row)
        for number, ((alg, _, threshold), rows) in enumerate(lines.items()):
            for axis, field in zip(axes, ("exact", "speed", "rate"), strict=True):
                draw_line(
                    axis,
                    [row["context"] for row in rows],
                    [row[field] for row in rows],
                    # a single model has a color per rule, several models have one each
                    color=color_of(number if len(contexts) == 1 else index),
                    linestyle=":" if alg == "ar" else LINES.get(alg, (0, (5, 1, 1, 1))),
                    marker="osD^v"[number % 5],
                    label=f"{label}: {NAMES.get(alg, alg)}{'' if threshold is None else f' {threshold:g}'}",
                )
    label_axis(axes[0], y="exact answers", percent=True)
    label_axis(axes[1], y="tokens per pass")
    label_axis(axes[2], x="tokens before the answer", y="tokens per second")
    axes[2].set_xscale("log", base=2)
    axes[2].xaxis.set_major_formatter(_plain_numbers)
    legend_once(figure, axes)
    return figure


def serving_figure(servings: Results) -> Figure:
    """Tokens per second (above) and their ratio to plain serving (below) against the number of requests at a time."""
    figure, (upper, lower) = figure_of(7.2, 5.6, 2, sharex=True)
    for index, (label, seeds) in enumerate(servings.items()):
        rates = served_rates(seeds[0])
        for number, name in enumerate(dict.fromkeys(rate.name for rate in rates)):
            line = [rate for rate in rates if rate.name == name]
            style: dict[str, Any] = {
                "color": SOFT if name == STOCK else color_of(number - 1 if len(servings) == 1 else index),
                "linestyle": DASHED if name == STOCK else "-",
                "marker": "*" if name == STOCK else "osD^v"[number % 5],
            }
            draw_line(upper, [r.at for r in line], [r.rate for r in line], label=f"{label}: {name}", **style)
            compared = [(r.at, r.ratio) for r in line if r.ratio is not None]
            if compared and name != STOCK:
                draw_line(lower, *zip(*compared, strict=True), **style)
    lower.axhline(1, color=SOFT, linewidth=1, linestyle=":")
    for axis in (upper, lower):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(_plain_numbers)
        axis.set_ylim(bottom=0)
    label_axis(upper, y="tokens per second")
    label_axis(lower, x="requests at a time", y="times plain serving")
    legend(figure, loc="outside upper left", ncols=2)
    return figure


# --- any quantity


def models_figure(
    values: Mapping[str, Mapping[str, Estimate]], *, percent: Sequence[str] = (), logarithmic: bool = False
) -> Figure:
    """A panel per quantity with the models below each other, as points with intervals.

    Args:
        values: the estimate of each model, by panel and label.
        percent: panels that show shares.
        logarithmic: use a logarithmic x axis in all panels.
    """
    labels = list(dict.fromkeys(label for panel in values.values() for label in panel))
    figure, axes = figure_of(7.2, 0.4 + len(values) * (0.6 + 0.25 * len(labels)), len(values))
    for axis, (name, panel) in zip(axes, values.items(), strict=True):
        for row, label in enumerate(labels):
            if label in panel:
                style = {"fmt": "o", "color": color_of(row), "markersize": 5, "elinewidth": 1.4}
                draw_line(axis, [panel[label]], [row], **style)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        label_axis(axis, title=fill(name, 80))
        if name in percent:
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        if logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(_plain_numbers)
            axis.xaxis.set_minor_formatter(NullFormatter())
    return figure
