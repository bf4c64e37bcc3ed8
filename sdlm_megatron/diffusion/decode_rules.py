"""Rules of decoding: the token a slot proposes, its confidence, and the prefix of a window that is kept.

Example of one row, n = 4, threshold 0.9, p = 10 (`confident_prefix`):

    slot          0      1      2      3
    proposes    x[11]  x[12]  x[13]  x[14]
    confidence   0.99   0.95   0.91   0.50      keeps x[11], x[12], x[13]
    cumulative   0.99   0.94   0.86   0.43      with `product`: keeps x[11], x[12]

The exporter copies this file into the model folder unchanged, so it imports nothing but torch and its neighbors.
Shapes: B rows, W windows of n slots, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .decode_random import mix64, unit_interval

Warp = Callable[[Tensor], Tensor]
"""Logits (N, V) -> logits (N, V): temperature, top-k, suppressed tokens. Must not depend on the tokens so far."""


def choose(logits: Tensor, warp: Warp | None, uniform: Tensor | None) -> Tensor:
    """The token each slot proposes, int64 (…).

    Args:
        logits: float32 (…, V).
        warp: applied to the logits first, if there is one.
        uniform: None: the most likely token. Otherwise float32 (…) in [0, 1): a token is drawn from the softmax by
            inversion, the first one whose cumulative probability exceeds `uniform`.
    """
    if uniform is None:
        return warped(logits, warp).argmax(-1)
    return drawn(warped(logits, warp).softmax(-1), uniform)


def warped(logits: Tensor, warp: Warp | None) -> Tensor:
    """Logits (…, V) after `warp`, if there is one."""
    return logits if warp is None else warp(logits.flatten(0, -2)).view(logits.shape)


def drawn(weights: Tensor, uniform: Tensor) -> Tensor:
    """Tokens int64 (…), drawn by inversion.

    Args:
        weights: float32 (…, V), proportional to the probabilities.
        uniform: float32 (…) in [0, 1).
    """
    cumulative = weights.cumsum(-1)
    # the total differs from 1 by rounding; scaled by it, a token of probability 0 can never be drawn
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[..., 0]
    return tokens.clamp(max=weights.shape[-1] - 1)


def confidence(tokens: Tensor, logits: Tensor, alg: str) -> Tensor:
    """Confidence of each slot, float32 (B, n) in [0, 1].

    prob_conf: probability of the proposed token. entropy_conf: 1 - H / log V, with H the entropy of the slot.

    Args:
        tokens: int64 (B, n), proposed tokens.
        logits: float32 (B, n, V) of the model, before any warp: under top-k 1 every warped probability is 1, and
            sampling should keep the same prefixes as greedy decoding.
        alg: "prob_conf" or "entropy_conf".
    """
    if alg == "entropy_conf":
        # entr(0) = 0, where -p log p would be NaN
        return 1 - torch.special.entr(logits.softmax(-1)).sum(-1) / math.log(logits.shape[-1])
    return (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)).exp()


def confident_prefix(confidences: Tensor, threshold: float, product: bool) -> Tensor:
    """Length of the longest prefix of slots above the threshold, int64 (B,), at least 1 (longest prefix decoding).

    Args:
        confidences: float (B, n).
        threshold: tau; each slot of the prefix has to be strictly above it.
        product: compare the product of all confidences up to a slot instead (the rule of the paper; the reference
            code compares each slot).
    """
    if product:
        confidences = confidences.cumprod(-1)
    return (confidences > threshold).long().cumprod(-1).sum(-1).clamp(min=1)


def verified_prefix(tokens: Tensor, drafts: Tensor) -> Tensor:
    """Number of tokens that self-speculation keeps, int64 (B,), at least 1.

    Args:
        tokens: int64 (B, n); token j is slot 0 of the window behind draft j, computed as if drafts 0..j were kept.
        drafts: int64 (B, n); draft 0 is already kept. Token j is valid while draft j equals token j-1.
    """
    return 1 + (tokens[:, :-1] == drafts[:, 1:]).long().cumprod(-1).sum(-1)


def accept_drafts(p: Tensor, q: Tensor, drafts: Tensor, accept: Tensor, redraw: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192): tokens that are distributed as p whatever q is.

    Draft j with the probabilities p and q is kept with the probability min(1, p / q). The first draft that is not kept
    is drawn again from max(0, p - q); behind the last draft a token is drawn from p. Of all rules that follow p, this
    one keeps a draft most often: with the probability Σ min(p, q).

    Args:
        p: float32 (B, n, V), distribution j of the token after drafts 0..j-1.
        q: float32 (B, n-1, V), the distribution that draft j was drawn from.
        drafts: int64 (B, n-1).
        accept, redraw: float32 (B, n) in [0, 1), random numbers, independent of each other and of the drafts.

    Returns:
        Tokens int64 (B, n), of which the first `kept` int64 (B,), at least 1, are valid.
    """
    here = drafts[..., None]
    agrees = accept[:, :-1] * q.gather(-1, here)[..., 0] < p[:, :-1].gather(-1, here)[..., 0]
    rest = (p[:, :-1] - q).clamp(min=0)
    # where p equals q up to rounding nothing may be left to draw from; then p itself is as good
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, :-1])
    again = drawn(torch.cat([rest, p[:, -1:]], 1), redraw)
    tokens = torch.cat([torch.where(agrees, drafts, again[:, :-1]), again[:, -1:]], 1)
    return tokens, 1 + agrees.long().cumprod(-1).sum(-1)


def cut(kept: Tensor, ends: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Limits the kept prefix to the first token that ends its row, and to the row's budget.

    Args:
        kept: int64 (B,), length of the prefix.
        ends: bool (B, n), whether the row ends with this token.
        budget: int64 (B,), tokens the row may still produce; 0 for a row that has ended.

    Returns:
        Length of the prefix, int64 (B,), and the remaining budget, int64 (B,), 0 for rows that end here.
    """
    up_to_end = (ends.long().cumsum(1) - ends.long() == 0).sum(1)
    kept = torch.minimum(torch.minimum(kept, up_to_end), budget)
    slot = torch.arange(ends.shape[1], device=ends.device)
    ended = (ends & (slot < kept[:, None])).any(1)
    return kept, torch.where(ended, 0, budget - kept)


DRAW, ACCEPT, REDRAW = range(3)
"""Streams of random numbers: a token is drawn or drafted; a draft is accepted; it is drawn again (`accept_drafts`)."""


def uniforms(seeds: Tensor, positions: Tensor, stream: int = DRAW) -> Tensor:
    """Random numbers in [0, 1), float32 (B, …), a pure function of a row's seed and a token's position.

    A position has the same number in every pass. So drawing again after a rejected proposal adds no bias, drafts and
    their verification agree, and neither batch, window nor algorithm changes the text that a seed gives.

    Args:
        seeds: int64 (B,).
        positions: int64 (B, …), below 2**40.
        stream: the streams are independent of each other.
    """
    seeds = seeds.view(-1, *[1] * (positions.dim() - 1))
    return unit_interval(mix64(mix64(seeds) + positions + (stream << 40)))
