"""What a pass keeps of its proposals: which token a slot proposes, how sure it is, and where the kept prefix ends.

The exporter copies this file into the model folder as it is, so it imports nothing but torch. Shapes: B rows,
W windows of n slots, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Warp = Callable[[Tensor], Tensor]
"""(N, V) logits -> (N, V) logits: temperature, top-k, top-p; must not look at the tokens so far."""


def choose(logits: Tensor, warp: Warp | None, uniform: Tensor | None) -> Tensor:
    """The token of every slot, int64 (…), from float32 logits (…, V).

    Greedy without `warp`. With it the token is drawn by inversion: the first whose cumulated probability passes
    `uniform` (…, float32 in [0, 1)).
    """
    if warp is None:
        return logits.argmax(-1)
    assert uniform is not None
    up_to = warp(logits.flatten(0, -2)).view(logits.shape).softmax(-1).cumsum(-1)
    # scaled by the total, which rounding keeps from being 1: a token without probability is never drawn
    tokens = torch.searchsorted(up_to, (uniform * up_to[..., -1])[..., None], right=True)[..., 0]
    return tokens.clamp(max=logits.shape[-1] - 1)


def confidence(tokens: Tensor, logits: Tensor, alg: str) -> Tensor:
    """How sure each slot is, float32 in [0, 1]: its token's probability, or 1 - H / log V for entropy_conf.

    Of the model's own distribution also where tokens are drawn from a warped one: top-k 1 leaves no doubt about any
    token, and is to keep what greedy decoding keeps.

    Args:
        tokens: int64 (B, n).
        logits: float32 (B, n, V).
    """
    if alg == "entropy_conf":
        return 1 - torch.special.entr(logits.softmax(-1)).sum(-1) / math.log(logits.shape[-1])
    return (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)).exp()


def sure_prefix(sure: Tensor, threshold: float, product: bool) -> Tensor:
    """Slots of the longest prefix that is sure enough, int64 (B,), at least 1: an unsure slot 0 is taken alone.

    Every slot of it is strictly above the threshold, or with `product` the product of all up to it is (the
    paper's rule).
    """
    if product:
        sure = sure.cumprod(-1)
    return (sure > threshold).long().cumprod(-1).sum(-1).clamp(min=1)


def verified_prefix(tokens: Tensor, drafts: Tensor) -> Tensor:
    """Tokens that self-speculation keeps, int64 (B,), at least 1.

    Args:
        tokens: int64 (B, n); token j is slot 0 of the window behind draft j, made as if drafts 0..j were kept.
        drafts: int64 (B, n); draft 0 is kept already. Token j holds while draft j equals token j-1.
    """
    return 1 + (tokens[:, :-1] == drafts[:, 1:]).long().cumprod(-1).sum(-1)


def cut(kept: Tensor, ends: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts a kept prefix after the first token that ends its row, and at the budget.

    Args:
        kept: int64 (B,).
        ends: bool (B, n), whether the row ends with this token.
        budget: int64 (B,), tokens the row may still produce; 0 for an ended row.

    Returns:
        kept int64 (B,); the budget left int64 (B,), 0 after an end.
    """
    up_to_end = (ends.long().cumsum(1) - ends.long() == 0).sum(1)
    kept = torch.minimum(torch.minimum(kept, up_to_end), budget)
    slot = torch.arange(ends.shape[1], device=ends.device)
    ended = (ends & (slot < kept[:, None])).any(1)
    return kept, torch.where(ended, 0, budget - kept)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Random numbers in [0, 1), float32 (B, …), a pure function of a row's seed and a token's position.

    A position keeps its number in every pass: a draw that was not kept does not bias the next one, draft and
    verification meet, and neither batch, window nor algorithm change what a row draws. (SplitMix64's mixing.)

    Args:
        seeds: int64 (B,).
        positions: int64 (B, …).
    """
    seeds = seeds.view(-1, *[1] * (positions.dim() - 1))
    z = _mix(_mix(seeds) + positions)
    return _shift(z, 40).float() * 2.0**-24


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = z + -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number; products wrap around
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)
