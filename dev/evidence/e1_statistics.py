"""Estimates of experiment E1: seeds and prompts crossed, non-inferiority, Holm, and the power of the design.

Every seed of every arm answers the same prompts. For a value d[s, p] of each seed s and prompt p the estimate is the
mean, and its squared standard error the sum of the variance of the seeds' means over the number of seeds and of the
prompts' means over the number of prompts. Their common part (seed x prompt) is counted twice, which makes the interval
a little too wide, never too narrow by that. Degrees of freedom: Satterthwaite.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from sdlm_megatron.evaluation.intervals import Estimate

LEVEL = 0.95
ALPHA = 0.05
"""Family-wise error rate of the one-sided tests."""
MARGIN = 0.03
SEEDS, PROMPTS = 4, 1797


@dataclass(frozen=True)
class Crossed:
    """A mean over seeds and prompts."""

    value: float
    error: float
    """Standard error."""
    freedom: float

    @property
    def interval(self) -> Estimate:
        """Two-sided, at LEVEL."""
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.error
        return Estimate(self.value, self.value - half, self.value + half)

    def above(self, bound: float) -> float:
        """One-sided p-value of "the value is at most `bound`"."""
        if self.error == 0:
            return float(self.value <= bound)
        return float(stats.t.sf((self.value - bound) / self.error, self.freedom))


def crossed(values: ArrayLike) -> Crossed:
    """Estimate from values (seeds, prompts); ValueError with one seed, which has no standard error."""
    d = np.asarray(values, dtype=float)
    seeds, prompts = d.shape
    mean = float(d.mean())
    if seeds < 2:
        raise ValueError(f"{seeds} seed: an interval over seeds and prompts needs two")
    by_seed, by_prompt = d.mean(1).var(ddof=1) / seeds, d.mean(0).var(ddof=1) / prompts
    variance = by_seed + by_prompt
    if variance == 0:
        return Crossed(mean, 0.0, float("inf"))
    freedom = variance**2 / (by_seed**2 / (seeds - 1) + by_prompt**2 / (prompts - 1))
    return Crossed(mean, float(np.sqrt(variance)), float(freedom))


def gap(first: ArrayLike, second: ArrayLike) -> Crossed:
    """Share of exact answers of `first` minus that of `second`, from 0 or 1, both (seeds, prompts)."""
    return crossed(np.asarray(first, dtype=float) - np.asarray(second, dtype=float))


def tokens_per_pass(tokens: ArrayLike, passes: ArrayLike) -> Crossed:
    """Mean over seeds of the ratio of sums, from counts (seeds, prompts), by linearizing each seed's ratio."""
    above, below = np.asarray(tokens, dtype=float), np.asarray(passes, dtype=float)
    ratios = above.sum(1, keepdims=True) / below.sum(1, keepdims=True)
    return crossed(ratios + (above - ratios * below) / below.mean(1, keepdims=True))


def holm(p_values: Mapping[str, float], alpha: float = ALPHA) -> dict[str, tuple[float, bool]]:
    """Holm's adjusted p-value of each hypothesis, and whether it is rejected at the family-wise level `alpha`."""
    result, adjusted = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        adjusted = max(adjusted, min(1.0, (len(p_values) - rank) * p_values[name]))
        result[name] = (adjusted, adjusted <= alpha)
    return result


def simulated_gaps(
    rng: np.random.Generator, difference: float, seed_sd: float, discordant: float, common: float
) -> np.ndarray:
    """Differences -1, 0, 1 of two arms, (SEEDS, PROMPTS).

    Args:
        difference: true difference of the shares.
        seed_sd: standard deviation of a seed's true difference.
        discordant: share of the prompts that one arm alone answers.
        common: share of the prompts at which all seeds have the same outcome.
    """

    shifts = rng.normal(difference, seed_sd, (SEEDS, 1))
    # One draw for all seeds of a prompt, or one for each: below the first edge -1, above the second 1.
    draws = np.where(rng.random(PROMPTS) < common, rng.random(PROMPTS), rng.random((SEEDS, PROMPTS)))
    return (draws > 1 - (discordant + shifts) / 2).astype(int) - (draws < (discordant - shifts) / 2)


def power_rows(draws: int = 2000) -> Iterator[Sequence[object]]:
    """Rows of the table of the pre-registration: assumptions, power at the last and first step of Holm, half width."""
    for seed_sd in (0.005, 0.01, 0.015, 0.02):
        for discordant, difference in ((0.15, 0.0), (0.15, -0.01), (0.15, -MARGIN), (0.3, 0.0)):
            rng = np.random.default_rng(0)
            estimates = [crossed(simulated_gaps(rng, difference, seed_sd, discordant, 0.5)) for _ in range(draws)]
            p = np.array([estimate.above(-MARGIN) for estimate in estimates])
            half = np.mean([estimate.interval.bars[0] for estimate in estimates])
            texts = (f"{100 * seed_sd:g}", f"{discordant:.0%}", f"{100 * difference:+.0f}")
            yield *texts, f"{np.mean(p < ALPHA):.0%}", f"{np.mean(p < ALPHA / 4):.0%}", f"{100 * half:.1f}"
