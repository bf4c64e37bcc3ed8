"""Intervals and scores against closed forms, published examples and brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from sdlm_megatron.evaluation.intervals import (
    Estimate,
    acceptance,
    average_precision,
    bins_of,
    brier,
    difference,
    kept_at,
    mcnemar,
    over_seeds,
    precision_recall,
    ratio,
    share,
)


def test_share_of_one_seed_is_the_wilson_interval():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    interval = share([[1] * 81 + [0] * 182])
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    none = share([[0] * 20])
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 0.1611), abs=5e-5)


def test_interval_over_three_seeds_uses_student_t_if_wider():
    far = [[1] * 50 + [0] * 50, [1] * 70 + [0] * 30, [1] * 90 + [0] * 10]
    interval = share(far)
    half = 4.3027 * 0.2 / 3**0.5
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.7, 0.7 - half, 1.0), abs=1e-4)
    same = share([[1] * 100] * 3)  # identical seeds do not increase the number of prompts
    assert same.low == pytest.approx(share([[1] * 100]).low) and same.low < 0.97
    assert share([[1] * 100] * 3, distinct=True).low == pytest.approx(
        share([[1] * 300]).low
    )  # unless each seed has its own prompts
    assert over_seeds([3.0]) == Estimate(3.0, 3.0, 3.0)


def test_ratio_of_sums_interval_has_nominal_coverage():
    assert ratio([[1, 9]], [[1, 1]]).value == 5
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        passes = rng.integers(5, 30, 80)
        tokens = passes * rng.choice([1, 2, 3], 80)
        interval = ratio([tokens], [passes])
        covered += interval.low <= 2 <= interval.high
    assert 180 <= covered <= 199


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5
    first, second = hard.copy(), hard.copy()
    second[:20] = False
    first[:20] = True
    gap = difference([first], [second])
    unpaired = 1.96 * np.sqrt(2 * 0.25 / 500)
    assert gap.value == pytest.approx(0.04) and gap.excludes(0) and gap.high - gap.low < unpaired
    only = 20  # Bonett and Price: add one to each count, two pairs in total
    middle = (only + 1 - 1) / 502
    spread = np.sqrt(((only + 2) / 502 - middle**2) / 502)
    assert gap.low == pytest.approx(min(gap.value, middle - 1.959964 * spread))
    nothing = difference([first], [first])
    assert nothing.low < 0 < nothing.high


def test_mcnemar_is_the_binomial_test_of_discordant_pairs():
    first, second = [1] * 10 + [0] * 2 + [1] * 30, [0] * 10 + [1] * 2 + [1] * 30
    assert mcnemar(first, second) == (10, 2, pytest.approx(2 * stats.binom.cdf(2, 12, 0.5)))
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_calibration_of_known_predictions():
    confidence, correct = [0.05, 0.05, 0.95, 0.95, 1.0], [0, 1, 1, 1, 0]
    bins = bins_of(confidence, correct)
    assert bins.count.tolist() == [2, 3] and bins.accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    assert bins.ece == pytest.approx((2 * 0.45 + 3 * (2.9 / 3 - 2 / 3)) / 5)
    assert brier(confidence, correct) == pytest.approx((0.05**2 + 0.95**2 + 2 * 0.05**2 + 1) / 5)
    rng = np.random.default_rng(0)
    confidence = rng.random(40000)
    assert (
        bins_of(confidence, rng.random(40000) < confidence).ece
        < 0.02
        < bins_of(confidence, rng.random(40000) < confidence**2).ece
    )


def test_precision_recall_matches_brute_force():
    rng = np.random.default_rng(3)
    confidence = rng.integers(0, 12, 60) / 11  # with ties
    correct = rng.random(60) < confidence
    thresholds, precision, recall = precision_recall(confidence, correct)
    assert thresholds.tolist() == sorted(set(confidence.tolist()), reverse=True)
    for tau, p, r in zip(thresholds, precision, recall, strict=True):
        kept = confidence >= tau
        assert (p, r) == pytest.approx((correct[kept].mean(), correct[kept].sum() / correct.sum()))
    steps = [0.0, *recall]
    area = sum((b - a) * p for (a, b), p in zip(itertools.pairwise(steps), precision, strict=True))
    assert average_precision(confidence, correct) == pytest.approx(area)
    assert kept_at(confidence, correct, 10 / 11)[0] == pytest.approx(
        correct[confidence > 10 / 11].mean()
    )  # strictly above


def test_acceptance_follows_the_rule_of_decoding():
    import torch

    from sdlm_megatron.diffusion.decode_rules import confident_prefix

    confidence = np.random.default_rng(5).random((4, 300)).astype(np.float32)
    kept, conditional = acceptance(confidence.tolist(), 0.3)
    lengths = confident_prefix(torch.from_numpy(confidence.T.copy()), 0.3, False)
    reached = [(lengths > slot).float().mean().item() for slot in range(4)]
    assert kept == pytest.approx(reached)
    assert conditional == pytest.approx([1.0, *(b / a for a, b in itertools.pairwise(reached))])
