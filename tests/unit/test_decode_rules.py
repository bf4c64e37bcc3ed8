"""Acceptance rules of a pass on hand-made cases; statistics of the random draws."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sdlm_megatron.diffusion.decode_rules import (
    ACCEPT,
    REDRAW,
    accept_drafts,
    choose,
    confidence,
    confident_prefix,
    cut,
    drawn,
    uniforms,
    verified_prefix,
)


def test_confident_prefix() -> None:
    """Keeps the longest prefix strictly above the threshold, and always slot 0."""
    confidences = torch.tensor([[0.9, 0.9, 0.4, 0.9], [0.4, 0.9, 0.9, 0.9], [0.9] * 4, [0.5, 0.9, 0.9, 0.9]])
    assert confident_prefix(confidences, 0.5, False).tolist() == [2, 1, 4, 1]
    assert confident_prefix(confidences, 0.8, True).tolist() == [2, 1, 2, 1]  # .9, .81, .729
    assert confident_prefix(confidences, 0.7, True).tolist() == [2, 1, 3, 1]


def test_verified_prefix() -> None:
    drafts = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 0, 7, 8], [5, 6, 0, 8]])
    tokens = torch.tensor([[6, 7, 8, 9], [6, 7, 1, 9], [6, 7, 8, 9], [6, 7, 8, 9]])
    assert verified_prefix(tokens, drafts).tolist() == [4, 3, 1, 2]


def test_cut_at_end_token_and_budget() -> None:
    ends = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    kept, left = cut(torch.tensor([4, 4, 3, 4, 4]), ends, torch.tensor([9, 9, 9, 3, 0]))
    assert kept.tolist() == [4, 2, 3, 3, 0]
    assert left.tolist() == [5, 0, 6, 0, 0]


def test_confidence_is_probability_or_certainty() -> None:
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(1))
    probs = logits.double().softmax(-1)
    tokens = logits.argmax(-1)
    actual = confidence(tokens, logits, "prob_conf")
    torch.testing.assert_close(actual, probs.max(-1).values.float(), rtol=1e-5, atol=1e-6)
    entropy = -(probs * probs.log()).sum(-1)
    expected = (1 - entropy / np.log(50)).float()
    torch.testing.assert_close(confidence(tokens, logits, "entropy_conf"), expected, rtol=1e-5, atol=1e-6)
    cut_off = logits.masked_fill(logits < logits.max(-1, keepdim=True).values, -torch.inf)
    assert confidence(tokens, cut_off, "entropy_conf").eq(1).all()  # a single remaining token: no NaN


def test_uniforms() -> None:
    """Uniform, independent of neighbors, a pure function of seed and position, valid for negative and large seeds."""
    seeds, positions = torch.arange(400), torch.arange(500).expand(400, -1)
    u = uniforms(seeds, positions)
    assert u.dtype == torch.float32
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert ((counts - 3125).pow(2) / 3125).sum() < 110  # chi square, 63 degrees: 1 in 5,000
    flat = u.double() - 0.5
    for a, b in ((flat[:, 1:], flat[:, :-1]), (flat[1:], flat[:-1]), (flat[1:, :-1], flat[:-1, 1:])):
        assert abs((a * b).mean() * 12) < 4 / np.sqrt(a.numel())
    assert uniforms(seeds[7:8], positions[:1, 3:9]).equal(u[7:8, 3:9])
    assert uniforms(torch.tensor([-1, 2**62]), torch.zeros(2, 2, 2, dtype=torch.long)).shape == (2, 2, 2)


@pytest.mark.parametrize("warps", [[], [TemperatureLogitsWarper(0.7), TopKLogitsWarper(4), TopPLogitsWarper(0.8)]])
def test_draws_follow_the_distribution(warps: list) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(2))

    def warp(x: torch.Tensor) -> torch.Tensor:
        for w in warps:
            x = w(None, x)
        return x

    u = uniforms(torch.tensor([3]), torch.arange(40_000)[None])
    tokens = choose(logits.expand(1, 40_000, 9), warp, u)
    expected = warp(logits[None])[0].softmax(-1)
    frequencies = torch.bincount(tokens[0], minlength=9) / 40_000
    assert (frequencies[expected == 0] == 0).all()
    assert (frequencies - expected).abs().max() < 4 * np.sqrt(0.25 / 40_000)
    edge = torch.tensor([[0.0, 1 - 2**-24]])  # ends of the range: first and last possible token
    first, last = choose(logits.expand(1, 2, 9), warp, edge)[0].tolist()
    assert (first, last) == (expected.nonzero()[0].item(), expected.nonzero()[-1].item())


def test_accepted_drafts_follow_p() -> None:
    """Tokens follow p, drafts are kept with the probability Σ min(p, q), and drafts from p itself always."""
    rows, size = 40_000, 6
    p, q = torch.randn(2, 2, size, generator=torch.Generator().manual_seed(3)).mul(1.5).softmax(-1)
    q[0, 2] = p[0, 4] = 0  # drafts that are never made, or never kept
    p, q = p / p.sum(-1, keepdim=True), q[:1] / q[:1].sum(-1, keepdim=True)
    seeds, positions = torch.arange(rows), torch.arange(2).expand(rows, 2)
    accept, redraw = (uniforms(seeds, positions, stream) for stream in (ACCEPT, REDRAW))
    drafts = drawn(q.expand(rows, 1, size), uniforms(seeds, positions[:, :1]))
    tokens, kept = accept_drafts(p.expand(rows, 2, size), q.expand(rows, 1, size), drafts, accept, redraw)
    noise = 4 * np.sqrt(0.25 / rows)
    assert (torch.bincount(tokens[:, 0], minlength=size) / rows - p[0]).abs().max() < noise
    assert (torch.bincount(tokens[kept == 2, 1], minlength=size) / (kept == 2).sum() - p[1]).abs().max() < 1.5 * noise
    assert abs((kept == 2).float().mean() - torch.minimum(p[0], q[0]).sum()) < noise
    same = p[:1].expand(rows, 1, size)
    drafts = drawn(same, uniforms(seeds, positions[:, :1]))
    assert accept_drafts(p.expand(rows, 2, size), same, drafts, accept, redraw)[1].eq(2).all()


def test_streams_are_independent() -> None:
    seeds, positions = torch.arange(300), torch.arange(300).expand(300, -1)
    draw, accept, redraw = (uniforms(seeds, positions, s).double() - 0.5 for s in range(3))
    for a, b in ((draw, accept), (draw, redraw), (accept, redraw)):
        assert abs((a * b).mean() * 12) < 4 / np.sqrt(a.numel())
