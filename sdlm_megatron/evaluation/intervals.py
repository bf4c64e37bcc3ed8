"""Intervals, differences and calibration of what was measured.

Every interval is at 95 %. Over several seeds it is the wider, at either end, of what the prompts and what the seeds
leave open: neither alone covers both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95
DRAWS = 1000
"""Bootstrap samples."""
BINS = 15


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; without one, `low` and `high` are `value`."""

    value: float
    low: float
    high: float

    @property
    def bars(self) -> tuple[float, float]:
        """Lengths below and above the value, as matplotlib's error bars want them."""
        return max(self.value - self.low, 0.0), max(self.high - self.value, 0.0)

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


# ---------------------------------------------------------------------------------------------- one figure
def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of seeds, with Student's interval; of one seed, the value alone. Three seeds have a factor of 4.30."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, mean, mean)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def share(exact: Sequence[ArrayLike], *, distinct: bool = False) -> Estimate:
    """Share of right answers.

    Args:
        exact: for each seed 0 or 1 for each prompt. Prompts leave open what Wilson's interval says of the mean share
            among so many prompts.
        distinct: each seed has prompts of its own, so that there are seeds times as many; else all have the same.
    """
    seeds = over_seeds([float(np.asarray(one, dtype=float).mean()) for one in exact])
    n = len(np.asarray(exact[0])) * (len(exact) if distinct else 1)
    right = stats.binomtest(round(seeds.value * n), n).proportion_ci(LEVEL, "wilson")
    return Estimate(seeds.value, max(min(seeds.low, right.low), 0.0), min(max(seeds.high, right.high), 1.0))


def ratio(tokens: Sequence[ArrayLike], passes: Sequence[ArrayLike]) -> Estimate:
    """Tokens a pass: of each seed all tokens by all passes, then the mean.

    Args:
        tokens, passes: for each seed one number for each prompt. Prompts leave open what a bootstrap over them says.
    """
    above, below = np.asarray(tokens, dtype=float), np.asarray(passes, dtype=float)  # (seeds, prompts)
    seeds = over_seeds((above.sum(1) / below.sum(1)).tolist())
    drawn = _drawn(above.shape[1])
    low, high = np.quantile((above @ drawn / (below @ drawn)).mean(0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(seeds.value, min(seeds.low, float(low)), max(seeds.high, float(high)))


@cache
def _drawn(n: int) -> np.ndarray:
    """How often each of n prompts is in each bootstrap sample, float (n, DRAWS); the same samples always."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).T.astype(float)


# --------------------------------------------------------------------------------------------- differences
def difference(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Estimate:
    """Share of right answers of `first` less that of `second`, on the same prompts, seed by seed.

    Prompts leave open what Wald's interval says after one pair each way was added to the pairs (Bonett and Price
    2012): it does not shrink to nothing where no pair disagrees.
    """
    pairs = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)  # (seeds, prompts)
    seeds = over_seeds(pairs.mean(1).tolist())
    added = np.append(pairs.mean(0), [1.0, -1.0])
    half = stats.norm.ppf((1 + LEVEL) / 2) * added.std() / np.sqrt(added.size)
    return Estimate(seeds.value, min(seeds.low, added.mean() - half), max(seeds.high, added.mean() + half))


def mcnemar(first: ArrayLike, second: ArrayLike) -> tuple[int, int, float]:
    """Prompts that only `first` answers right, those that only `second` does, and the exact p of so uneven a split."""
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_one, only_two = int((one & ~two).sum()), int((two & ~one).sum())
    if only_one + only_two == 0:
        return 0, 0, 1.0
    return only_one, only_two, float(stats.binomtest(only_one, only_one + only_two).pvalue)


# --------------------------------------------------------------------------------------------- calibration
@dataclass(frozen=True)
class Bins:
    """Predictions by confidence; one entry for each bin that holds any."""

    confidence: np.ndarray
    """Mean, float (bins,)."""
    right: np.ndarray
    """Share, float (bins,)."""
    count: np.ndarray
    """int (bins,)."""

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of confidence and share, weighted by count."""
        return float((np.abs(self.confidence - self.right) * self.count).sum() / self.count.sum())


def bins_of(confidence: ArrayLike, right: ArrayLike) -> Bins:
    """`BINS` bins of equal width over [0, 1]; a confidence on an edge belongs to the bin above, 1 to the last."""
    sure, correct = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    held = count > 0
    mean, hit = (np.bincount(place, weights=w, minlength=BINS)[held] / count[held] for w in (sure, correct))
    return Bins(mean, hit, count[held])


def brier(confidence: ArrayLike, right: ArrayLike) -> float:
    """Mean squared distance of confidence and outcome."""
    return float(np.mean((np.asarray(confidence, dtype=float) - np.asarray(right, dtype=float)) ** 2))


def precision_recall(confidence: ArrayLike, right: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What keeping all predictions of at least some confidence gives, for each confidence that occurs.

    Returns:
        thresholds, falling; precision: share of the kept that is right; recall: share of the right that is kept
        (nan without any right one). Float, (distinct confidences,).
    """
    sure, correct = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    order = np.argsort(-sure, kind="stable")
    last = np.append(np.flatnonzero(np.diff(sure[order])), len(sure) - 1)  # equal confidences are kept together
    hits = np.cumsum(correct[order])
    recall = hits[last] / hits[-1] if hits[-1] else np.full(len(last), np.nan)
    return sure[order][last], hits[last] / (last + 1), recall


def average_precision(confidence: ArrayLike, right: ArrayLike) -> float:
    """Precision averaged over recall, each step of recall by the precision there (as scikit-learn has it)."""
    _, precision, recall = precision_recall(confidence, right)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def kept_at(confidence: ArrayLike, right: ArrayLike, threshold: float) -> tuple[float, float, float]:
    """Precision, recall and share of predictions strictly above a threshold, as decoding keeps; nan of none."""
    sure, correct = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    kept = sure > threshold
    hits = float(correct[kept].sum())
    return (
        hits / kept.sum() if kept.any() else float("nan"),
        hits / correct.sum() if correct.any() else float("nan"),
        float(kept.mean()),
    )


def acceptance(confidences: Sequence[ArrayLike], threshold: float) -> tuple[list[float], list[float]]:
    """How often decoding keeps each slot: slot 0 always, another when it and all before are above the threshold.

    Args:
        confidences: for each slot the confidence at each place of the text, the same places in the same order.

    Returns:
        By slot: the share of places where it is kept; the share among those where all before it are (nan of none).
    """
    sure = np.asarray(confidences, dtype=float) > threshold  # (slots, places)
    kept = np.cumprod(sure, axis=0).mean(1)
    kept[0] = 1.0
    given = [1.0, *(now / before if before else float("nan") for before, now in pairwise(kept))]
    return kept.tolist(), given
