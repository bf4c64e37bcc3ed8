"""Figures of the slots of a window: calibration of their confidence, precision and recall, acceptance.

Every function takes calibration results by label, several seeds of a label as a list (their predictions are pooled),
and returns a matplotlib Figure.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sdlm_megatron.evaluation.figures import DASHED, LINES, NAMES, color_of, label_axis, legend_once
from sdlm_megatron.evaluation.intervals import acceptance, bins_of, precision_recall
from sdlm_megatron.evaluation.result_files import Results, pooled
from sdlm_megatron.report.plots import SOFT, figure_of

MOST_SLOTS = 8  # largest number of panels; of a wider window, the first slots are shown
COLUMNS = 4
MARKED = (0.9, 0.98)  # thresholds that are marked in the precision-recall figure
KEPT_AT = (0.5, 0.9, 0.98)  # thresholds of the acceptance figure


def reliability_figure(calibrations: Results, score: str = "prob") -> Figure:
    """Accuracy against confidence, one panel per slot; the strip above a panel counts the predictions.

    Args:
        score: "prob" or "entropy".
    """
    slots = {label: pooled(seeds) for label, seeds in calibrations.items()}
    shown = min(max(map(len, slots.values())), MOST_SLOTS)
    columns, rows = min(shown, COLUMNS), math.ceil(shown / COLUMNS)
    figure, flat = figure_of(
        0.6 + 1.9 * max(columns, 2), 0.6 + 2.7 * rows, 2 * rows, ncols=columns, height_ratios=[1, 3] * rows, sharex=True
    )
    axes = np.array(flat, dtype=object).reshape(2 * rows, columns)
    for axis in flat:
        axis.set_visible(False)  # the last row may have fewer panels
    for slot in range(shown):
        strip, panel = axes[2 * (slot // columns) : 2 * (slot // columns) + 2, slot % columns]
        for axis in (strip, panel):
            axis.set_visible(True)
            axis.set_xlim(0, 1)
        panel.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
        for index, (label, predictions) in enumerate(slots.items()):
            if slot < len(predictions):
                _reliability(strip, panel, predictions[slot], score, label, color_of(index))
        strip.set_yscale("log")
        strip.set_ylim(bottom=0.7)
        strip.yaxis.set_minor_locator(NullLocator())
        panel.set_ylim(-0.03, 1.03)
        first = slot % columns == 0
        label_axis(strip, title=f"slot {slot + 1}", y="count" if first else "")
        label_axis(panel, x="probability" if score == "prob" else "1 - H / log V", y="accuracy" if first else "")
    legend_once(figure, flat)
    return figure


def _reliability(strip: Axes, panel: Axes, slot: dict[str, np.ndarray], score: str, label: str, color: str) -> None:
    bins = bins_of(slot[score], slot["right"])
    panel.plot(bins.confidence, bins.accuracy, color=color, marker="o", markersize=4, linewidth=1.3, label=label)
    strip.step(bins.confidence, bins.count, where="mid", color=color, linewidth=1.2, marker=".", markersize=3)


def precision_recall_figure(calibrations: Results) -> Figure:
    """Precision against recall by slot, one panel per label.

    Solid lines use the probability, dashed lines the entropy; dots mark the thresholds `MARKED` of the probability.
    """
    figure, axes = figure_of(7.2, 0.7 + 2.9 * len(calibrations), len(calibrations))
    for axis, (label, seeds) in zip(axes, calibrations.items(), strict=True):
        for slot, predictions in enumerate(pooled(seeds)[:MOST_SLOTS]):
            color = color_of(slot)
            for alg, score in (("prob_conf", "prob"), ("entropy_conf", "entropy")):
                thresholds, precision, recall = precision_recall(predictions[score], predictions["right"])
                name = f"slot {slot + 1}, {NAMES[alg]}"
                axis.plot(recall, precision, color=color, linestyle=LINES[alg], linewidth=1.3, label=name)
                for value in MARKED if score == "prob" else ():
                    kept = np.flatnonzero(thresholds > value)
                    if len(kept):
                        axis.plot(recall[kept[-1]], precision[kept[-1]], "o", color=color, markersize=4)
        axis.set_xlim(0, 1.02)
        label_axis(axis, title=label, y="precision")
    label_axis(axes[-1], x="recall")
    legend_once(figure, axes, ncols=4)
    return figure


def acceptance_figure(calibrations: Results) -> Figure:
    """Acceptance rate of each slot by threshold of the probability, one panel per label.

    Solid: share of all positions. Dashed: share of the positions at which all slots before it are kept. Dotted: the
    slot and all before it are correct, which is what a perfect confidence would keep.
    """
    figure, axes = figure_of(7.2, 0.7 + 2.6 * len(calibrations), len(calibrations), sharex=True)
    for axis, (label, seeds) in zip(axes, calibrations.items(), strict=True):
        slots = pooled(seeds)
        x = np.arange(1, len(slots) + 1)
        for index, threshold in enumerate(KEPT_AT):
            kept, conditional = acceptance([slot["prob"] for slot in slots], threshold)
            color = color_of(index)
            axis.plot(x, kept, color=color, marker="o", markersize=4.5, label=f"τ = {threshold:g}")
            axis.plot(x, conditional, color=color, linestyle=DASHED, marker="o", markersize=3, linewidth=1)
        # decoding keeps slot 1 whether it is correct or not, so the line can lie below the kept share there
        correct = np.cumprod([slot["right"] for slot in slots], axis=0).mean(1)
        axis.plot(x, correct, color=SOFT, linestyle=":", linewidth=1.4, label="correct up to here")
        axis.set_ylim(0, 1.04)
        axis.set_xticks(x)
        label_axis(axis, title=label, y="share kept")
    label_axis(axes[-1], x="slot")
    legend_once(figure, axes, ncols=4)
    return figure
