"""Figures of what decoding costs, of long contexts, and of what a model forgot.

Every function takes results by label, several seeds of one label as a list, and returns a matplotlib Figure.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from sdlm_megatron.evaluation.figures import LINES, WORDS, colour_of, legend_once
from sdlm_megatron.evaluation.intervals import Estimate, over_seeds, ratio, share
from sdlm_megatron.evaluation.results import Result, Results
from sdlm_megatron.report.plots import INK, SOFT, figure_of

PASSES = {
    "window": ("-", "n kept tokens and a window"),
    "window_one": ((0, (3, 2)), "one kept token and a window"),
    "self_speculative": ("", "self-speculation, a pass"),
}
"""Kinds of passes in speed.json: line and words."""


def overhead_figure(speeds: Results) -> Figure:
    """A pass over a window of n slots in causal steps, a panel a label and batch, a colour a context length.

    From so many kept tokens a pass on the window is a gain. Dotted: n, what it replaces when all of it is kept.
    Quartiles over the repetitions; of several seeds the first.
    """
    panels = [
        (f"{label}, batch {batch}", [row for row in seeds[0]["break_even"] if row["batch"] == batch])
        for label, seeds in speeds.items()
        for batch in sorted({row["batch"] for row in seeds[0].get("break_even", [])})
    ]
    figure, axes = figure_of(7.2, 0.8 + 2.5 * max(len(panels), 1), max(len(panels), 1))
    for axis, (title, rows) in zip(axes, panels, strict=False):
        for index, context in enumerate(sorted({row["context"] for row in rows})):
            for what, (style, words) in PASSES.items():
                line = sorted((r for r in rows if (r["context"], r["what"]) == (context, what)), key=lambda r: r["n"])
                if line:
                    axis.errorbar(
                        [row["n"] for row in line],
                        [row["tokens"] for row in line],
                        yerr=np.array([Estimate(row["tokens"], row["low"], row["high"]).bars for row in line]).T,
                        color=colour_of(index),
                        linestyle=style,
                        marker="D" if what == "self_speculative" else "o",
                        markersize=4.5 if what != "window_one" else 3,
                        linewidth=1.4,
                        label=f"at {context} tokens: {words}",
                    )
        _steps_axis(axis, sorted({row["n"] for row in rows}))
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.set_ylabel("causal steps", color=INK)
    axes[-1].set_xlabel("n, slots of the window", color=INK)
    legend_once(figure, axes, ncols=2)
    return figure


def _steps_axis(axis: Axes, widths: Sequence[int]) -> None:
    axis.plot(widths, widths, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), label="n causal steps")
    for scale, ticks in (("x", list(widths)), ("y", [2**k for k in range(-1, 8)])):
        getattr(axis, f"set_{scale}scale")("log", base=2)
        line = getattr(axis, f"{scale}axis")
        line.set_major_locator(FixedLocator(ticks))
        line.set_minor_locator(NullLocator())
        line.set_major_formatter(lambda value, _: f"{value:g}")


def context_rows(contexts: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows that all seeds have: alg, n, threshold, shots, context (mean), exact, speed, seconds (Estimate each)."""
    tables = [{(r["alg"], r["n"], r["threshold"], r["shots"]): r for r in one["rows"]} for one in contexts]
    found = []
    for key in tables[0]:
        if all(key in table for table in tables):
            rows = [table[key] for table in tables]
            found.append(
                {
                    **dict(zip(("alg", "n", "threshold", "shots"), key, strict=True)),
                    "context": float(np.mean([row["context"] for row in rows])),
                    "exact": share([row["exact"] for row in rows]),
                    "speed": ratio([row["tokens"] for row in rows], [row["passes"] for row in rows]),
                    "rate": over_seeds([sum(row["tokens"]) / float(np.median(row["seconds"])) for row in rows]),
                }
            )
    return found


def context_figure(contexts: Results) -> Figure:
    """Exact answers, tokens a pass and tokens a second against the length of the context before the answer."""
    figure, axes = figure_of(7.2, 7.0, 3, sharex=True)
    shown: set[float] = set()
    for index, (label, seeds) in enumerate(contexts.items()):
        lines: dict[tuple[str, int, float | None], list[dict[str, Any]]] = {}
        for row in sorted(context_rows(seeds), key=lambda r: r["context"]):
            lines.setdefault((row["alg"], row["n"], row["threshold"]), []).append(row)
            shown.add(row["context"])
        for number, ((alg, _, threshold), rows) in enumerate(lines.items()):
            words = f"{WORDS.get(alg, alg)}{'' if threshold is None else f' {threshold:g}'}"
            for axis, field in zip(axes, ("exact", "speed", "rate"), strict=True):
                axis.errorbar(
                    [row["context"] for row in rows],
                    [row[field].value for row in rows],
                    yerr=np.array([row[field].bars for row in rows]).T,
                    color=colour_of(number if len(contexts) == 1 else index),
                    linestyle=":" if alg == "ar" else LINES.get(alg, (0, (5, 1, 1, 1))),
                    marker="osD^v"[number % 5],
                    markersize=4.5,
                    linewidth=1.4,
                    elinewidth=0.9,
                    label=f"{label}: {words}",
                )
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis, name in zip(axes, ("exact answers", "tokens a pass", "tokens a second"), strict=True):
        axis.set_ylabel(name, color=INK)
    axes[2].set_xscale("log", base=2)
    axes[2].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[2].set_xlabel("tokens before the answer", color=INK)
    legend_once(figure, axes)
    return figure


def perplexities(results: Results) -> dict[str, dict[str, Estimate]]:
    """By text, then label: perplexity, over seeds (of its logarithm); texts that all labels have."""
    found: dict[str, dict[str, Estimate]] = {}
    for label, seeds in results.items():
        tables = [{text["name"]: text["perplexity"] for text in one["texts"]} for one in seeds]
        for name in tables[0]:
            if all(name in table for table in tables):
                nats = over_seeds([math.log(table[name]) for table in tables])
                mean = Estimate(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high))
                found.setdefault(name, {})[label] = mean
    return {name: row for name, row in found.items() if len(row) == len(results)}
