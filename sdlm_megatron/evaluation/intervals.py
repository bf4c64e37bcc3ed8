"""Confidence intervals, paired differences and calibration scores.

All intervals are at the 95 % level. With several seeds, each end is the wider of the interval over prompts and the
interval over seeds, because neither covers both sources of variation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
DRAWS = 1000  # bootstrap samples
BINS = 15


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; both ends equal the value where no interval is known."""

    value: float
    low: float
    high: float

    @property
    def bars(self) -> tuple[float, float]:
        """Lengths below and above the value, as matplotlib's error bars take them."""
        return max(self.value - self.low, 0.0), max(self.high - self.value, 0.0)

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


# --- one quantity


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's interval; a single seed has no interval. Three seeds have a factor of 4.30."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, mean, mean)
    half = float(stats.t.ppf(TAILS[1], len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def share(exact: Sequence[ArrayLike], *, distinct: bool = False) -> Estimate:
    """Share of correct answers, from 0 or 1 for each prompt of each seed, with Wilson's interval over prompts.

    `distinct`: the seeds were measured on different prompts, which then all count; otherwise on the same prompts.
    """
    seeds = over_seeds([float(np.asarray(answers, dtype=float).mean()) for answers in exact])
    n = len(np.asarray(exact[0])) * (len(exact) if distinct else 1)
    wilson = stats.binomtest(round(seeds.value * n), n).proportion_ci(LEVEL, "wilson")
    # Student's interval of few seeds can leave [0, 1]
    return Estimate(seeds.value, max(min(seeds.low, wilson.low), 0.0), min(max(seeds.high, wilson.high), 1.0))


def ratio(tokens: Sequence[ArrayLike], passes: Sequence[ArrayLike]) -> Estimate:
    """Tokens per pass, from the counts of each prompt of each seed: a ratio of sums, with a bootstrap over prompts."""
    above, below = np.asarray(tokens, dtype=float), np.asarray(passes, dtype=float)  # (seeds, prompts)
    seeds = over_seeds((above.sum(1) / below.sum(1)).tolist())
    counts = _resamples(above.shape[1])
    low, high = np.quantile((above @ counts / (below @ counts)).mean(0), TAILS)
    return Estimate(seeds.value, min(seeds.low, float(low)), max(seeds.high, float(high)))


@cache
def _resamples(n: int) -> np.ndarray:
    """Multiplicity of each of n prompts in each bootstrap sample, float (n, DRAWS).

    Multinomial counts turn the bootstrap of a ratio into two matrix products. The seed is fixed, so that a page does
    not change when it is made again.
    """
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).T.astype(float)


# --- differences


def difference(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Estimate:
    """Share of correct answers of `first` minus that of `second`, on the same prompts, seed by seed.

    The interval over prompts is Wald's after adding one discordant pair in each direction (Bonett and Price 2012),
    which keeps it from collapsing to zero width where no pair disagrees.
    """
    pairs = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)  # (seeds, prompts)
    seeds = over_seeds(pairs.mean(1).tolist())
    added = np.append(pairs.mean(0), [1.0, -1.0])
    half = stats.norm.ppf(TAILS[1]) * added.std() / np.sqrt(added.size)
    return Estimate(seeds.value, min(seeds.low, added.mean() - half), max(seeds.high, added.mean() + half))


def mcnemar(first: ArrayLike, second: ArrayLike) -> tuple[int, int, float]:
    """Prompts that only `first` answers correctly, those that only `second` does, and McNemar's exact p-value."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    if only_first + only_second == 0:
        return 0, 0, 1.0
    return only_first, only_second, float(stats.binomtest(only_first, only_first + only_second).pvalue)


# --- calibration


@dataclass(frozen=True)
class Bins:
    """Predictions grouped by confidence; empty bins are left out."""

    confidence: np.ndarray  # mean confidence, float (bins,)
    accuracy: np.ndarray  # share of correct predictions, float (bins,)
    count: np.ndarray  # int (bins,)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance between confidence and accuracy, weighted by count."""
        return float((np.abs(self.confidence - self.accuracy) * self.count).sum() / self.count.sum())


def bins_of(confidence: ArrayLike, correct: ArrayLike) -> Bins:
    """Groups predictions into `BINS` bins of equal width over [0, 1]; an edge belongs to the bin above it."""
    scores, outcomes = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    count, confidences, hits = (np.histogram(scores, BINS, (0, 1), weights=w)[0] for w in (None, scores, outcomes))
    filled = count > 0
    return Bins(confidences[filled] / count[filled], hits[filled] / count[filled], count[filled])


def brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Brier score: mean squared distance between confidence and outcome."""
    return float(np.mean((np.asarray(confidence, dtype=float) - np.asarray(correct, dtype=float)) ** 2))


def precision_recall(confidence: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds (every confidence that occurs, falling), and precision and recall of the predictions that reach them.

    Float arrays of one length; the recall is nan if no prediction is correct.
    """
    scores, outcomes = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # ties are kept together
    hits = np.cumsum(outcomes[order])
    recall = hits[last] / hits[-1] if hits[-1] else np.full(len(last), np.nan)
    return scores[order][last], hits[last] / (last + 1), recall


def average_precision(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Precision weighted by the increase in recall at each threshold, as scikit-learn defines it."""
    _, precision, recall = precision_recall(confidence, correct)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def kept_at(confidence: ArrayLike, correct: ArrayLike, threshold: float) -> tuple[float, float]:
    """Precision and recall of the predictions strictly above a threshold, as decoding keeps them; nan if undefined."""
    scores, outcomes = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    kept = scores > threshold
    hits = float(outcomes[kept].sum())
    return (
        hits / kept.sum() if kept.any() else float("nan"),
        hits / outcomes.sum() if outcomes.any() else float("nan"),
    )


def acceptance(confidences: Sequence[ArrayLike], threshold: float) -> tuple[list[float], list[float]]:
    """Acceptance rate of each slot, and the rate among positions at which all slots before it are kept (or nan).

    Slot 0 is always kept, any other if it and all slots before it pass the threshold.

    Args:
        confidences: for each slot, its confidence at each position of the text.
    """
    above = np.asarray(confidences, dtype=float) > threshold  # (slots, positions)
    kept = np.cumprod(above, axis=0).mean(1)
    kept[0] = 1.0
    conditional = [1.0, *(after / before if before else float("nan") for before, after in pairwise(kept))]
    return kept.tolist(), conditional
