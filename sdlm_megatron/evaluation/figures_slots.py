"""Figures of a window's slots: is a slot's confidence its accuracy, and how often is it kept?

Every function takes calibration results by label, several seeds of one label as a list (their predictions are put
together), and returns a matplotlib Figure.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sdlm_megatron.evaluation.figures import LINES, WORDS, colour_of, legend_once
from sdlm_megatron.evaluation.intervals import acceptance, bins_of, precision_recall
from sdlm_megatron.evaluation.results import Results, pooled
from sdlm_megatron.report.plots import INK, SERIES, SOFT, figure_of

MOST_SLOTS = 8
"""Panels of a figure at most; of a wider window the first slots."""
ACROSS = 4
MARKED = (0.9, 0.98)
"""Thresholds marked in the precision-recall figure."""
KEPT_AT = (0.5, 0.9, 0.98)
"""Thresholds of the acceptance figure."""


def reliability_figure(calibrations: Results, score: str = "prob") -> Figure:
    """Share of right tokens against confidence, a panel a slot; the strip above it counts the predictions.

    Args:
        score: "prob" or "entropy".
    """
    slots = {label: pooled(seeds) for label, seeds in calibrations.items()}
    shown = min(max(len(one) for one in slots.values()), MOST_SLOTS)
    across, down = min(shown, ACROSS), math.ceil(shown / ACROSS)
    figure, rows = figure_of(
        0.6 + 1.9 * max(across, 2), 0.6 + 2.7 * down, 2 * down, ncols=across, height_ratios=[1, 3] * down, sharex=True
    )
    axes = np.array(rows, dtype=object).reshape(2 * down, across)
    for axis in axes.flat:
        axis.set_visible(False)
    for slot in range(shown):
        strip, panel = axes[2 * (slot // across) : 2 * (slot // across) + 2, slot % across]
        for axis in (strip, panel):
            axis.set_visible(True)
            axis.set_xlim(0, 1)
        panel.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
        for index, (label, one) in enumerate(slots.items()):
            if slot < len(one):
                _reliability(strip, panel, one[slot], score, label, index)
        strip.set_yscale("log")
        strip.set_ylim(bottom=0.7)
        strip.yaxis.set_minor_locator(NullLocator())
        strip.set_title(f"slot {slot + 1}", fontsize=10, color=INK, loc="left")
        panel.set_ylim(-0.03, 1.03)
        if slot % across == 0:
            strip.set_ylabel("count", color=INK, fontsize=8)
            panel.set_ylabel("right", color=INK)
        panel.set_xlabel("probability" if score == "prob" else "1 - H / log V", color=INK)
    legend_once(figure, list(axes.flat))
    return figure


def _reliability(strip: Axes, panel: Axes, slot: dict[str, np.ndarray], score: str, label: str, index: int) -> None:
    bins, colour = bins_of(slot[score], slot["right"]), colour_of(index)
    panel.plot(bins.confidence, bins.right, color=colour, marker="o", markersize=4, linewidth=1.3, label=label)
    strip.step(bins.confidence, bins.count, where="mid", color=colour, linewidth=1.2, marker=".", markersize=3)


def precision_recall_figure(calibrations: Results) -> Figure:
    """Share right among the kept against share kept of the right, by slot; a panel a label.

    Full lines by probability, dashed by entropy; dots at the thresholds `MARKED` of the probability.
    """
    figure, axes = figure_of(7.2, 0.7 + 2.9 * len(calibrations), len(calibrations))
    for axis, (label, seeds) in zip(axes, calibrations.items(), strict=True):
        for slot, one in enumerate(pooled(seeds)[:MOST_SLOTS]):
            colour = SERIES[slot % len(SERIES)]
            for alg, score in (("prob_conf", "prob"), ("entropy_conf", "entropy")):
                thresholds, precision, recall = precision_recall(one[score], one["right"])
                name = f"slot {slot + 1}, {WORDS[alg]}"
                axis.plot(recall, precision, color=colour, linestyle=LINES[alg], linewidth=1.3, label=name)
                for value in MARKED if score == "prob" else ():
                    kept = np.flatnonzero(thresholds > value)
                    if len(kept):
                        axis.plot(recall[kept[-1]], precision[kept[-1]], "o", color=colour, markersize=4)
        axis.set_title(label, fontsize=10, color=INK, loc="left")
        axis.set_xlim(0, 1.02)
        axis.set_ylabel("right among the kept", color=INK)
    axes[-1].set_xlabel("kept among the right", color=INK)
    legend_once(figure, axes, ncols=4)
    return figure


def acceptance_figure(calibrations: Results) -> Figure:
    """How often a slot is kept, by threshold of the probability; a panel a label.

    Full lines: of all places. Dashed: of those where all slots before are kept. Dotted: where it and all before it
    are right, what a perfect confidence would keep.
    """
    figure, axes = figure_of(7.2, 0.7 + 2.6 * len(calibrations), len(calibrations), sharex=True)
    for axis, (label, seeds) in zip(axes, calibrations.items(), strict=True):
        slots = pooled(seeds)
        x = np.arange(1, len(slots) + 1)
        for index, threshold in enumerate(KEPT_AT):
            kept, given = acceptance([one["prob"] for one in slots], threshold)
            colour = colour_of(index)
            axis.plot(x, kept, color=colour, marker="o", markersize=4.5, label=f"τ = {threshold:g}")
            axis.plot(x, given, color=colour, linestyle=(0, (3, 2)), marker="o", markersize=3, linewidth=1)
        # slot 1 is kept right or wrong; the line is about the slots behind it
        right = np.cumprod([one["right"] for one in slots], axis=0).mean(1)
        axis.plot(x, right, color=SOFT, linestyle=":", linewidth=1.4, label="right up to here")
        axis.set_title(label, fontsize=10, color=INK, loc="left")
        axis.set_ylim(0, 1.04)
        axis.set_xticks(x)
        axis.set_ylabel("kept", color=INK)
    axes[-1].set_xlabel("slot", color=INK)
    legend_once(figure, axes, ncols=4)
    return figure
