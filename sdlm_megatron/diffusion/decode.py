"""Confidence decoding (`prob_conf`): several tokens a forward pass, each as sure as the threshold asks.

One pass feeds the newly committed tokens once, causally, which writes their keys and values, followed by a
window: a copy of the last committed token and n-1 mask tokens, at positions p..p+n-1 (p: the last committed
token's). Slot j of the window proposes token p+1+j. The window sees the committed tokens before p (not p
itself: its copy in slot 0 stands for it) and itself, in both directions or, with `causal_attn`, backwards
only. The longest prefix of slots that are sure enough is kept, the window leaves the cache, and so on. n =
1 is plain next-token prediction: no window at all, one ordinary causal step.

The exporter copies this file into the model folder as it is, so it imports nothing but torch (and, when no
cache is given, the cache class of transformers). Shapes: B rows, P prompt tokens, C newly committed tokens
of this pass (the longest row's, shorter rows padded on the left), K cached columns, n window slots, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREFILL_FROM = 2048
"""Prompts longer than this first go through the model causally, so that no P x P mask is made."""


@dataclass(frozen=True)
class Decoded:
    """What was generated, and in how many passes."""

    tokens: list[list[int]]
    """New tokens of each row; the token that ended the row, if any, is the last one."""
    accepted: list[list[int]]
    """For each row, the tokens it kept in each of its passes; they add up to len(tokens[row])."""
    passes: int
    """Forward passes that proposed tokens: the most any row needed."""
    prefill_passes: int
    """Forward passes before those: 1 for a prompt above PREFILL_FROM, else 0."""

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of all rows over the passes each of them took part in."""
        return sum(map(len, self.tokens)) / max(1, sum(map(len, self.accepted)))


@dataclass
class _Rows:
    """A batch between two passes; `ids` and `real` are what the next pass commits to the cache."""

    ids: Tensor
    """int64 (B, C): newly committed tokens, the last committed one in the last column."""
    real: Tensor
    """bool (B, C): False where a row has fewer than C of them."""
    seen: Tensor
    """bool (B, K): which cached columns hold a token of the row."""
    budget: Tensor
    """int64 (B,): tokens a row may still produce; 0 once it ended."""
    padded: bool
    """Whether some column, cached or new, is not real."""

    def positions(self) -> Tensor:
        """int64 (B, C): position of each new token, counted over the real tokens of its row."""
        return (self.seen.sum(1, keepdim=True) + self.real.cumsum(1) - 1).clamp(min=0)


def window_mask(seen: Tensor, real: Tensor, window: int, causal_attn: bool) -> Tensor:
    """Visibility of one pass: bool (B, C+n, K+C+n), [row, query, key], True = may attend.

    Args:
        seen: bool (B, K), real columns of the cache.
        real: bool (B, C), real columns among the newly committed tokens; the last one is the window's anchor.
        window: n, slots of the window.
        causal_attn: slots see only themselves and earlier slots.
    """
    (rows, cached), new = seen.shape, real.shape[1]
    mask = torch.zeros(rows, new + window, cached + new + window, dtype=torch.bool, device=seen.device)
    chunk, slots = mask[:, :new], mask[:, new:]
    chunk[:, :, :cached] = seen[:, None]
    causal = torch.ones(new, new, dtype=torch.bool, device=seen.device).tril()
    itself = torch.eye(new, dtype=torch.bool, device=seen.device)  # a row of the mask must not be empty
    chunk[:, :, cached : cached + new] = (causal & real[:, None]) | itself
    slots[:, :, :cached] = seen[:, None]
    slots[:, :, cached : cached + new - 1] = real[:, None, :-1]
    own = torch.ones(window, window, dtype=torch.bool, device=seen.device)
    slots[:, :, cached + new :] = own.tril() if causal_attn else own
    return mask


def accept(logits: Tensor, threshold: float, budget: Tensor, eos_token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which proposals of a pass are kept.

    Args:
        logits: (B, n, V), slot j proposes the j-th next token.
        threshold: a slot is sure when the probability of its token is strictly above this.
        budget: int64 (B,), tokens a row may still produce.
        eos_token_ids: int64 (E,), tokens that end a row.

    Returns:
        tokens int64 (B, n); kept int64 (B,): the longest prefix of sure slots, at least one (an unsure slot 0
        is taken alone), cut after an end token and at the budget; the budget int64 (B,) left, 0 after an end.
    """
    confidence, tokens = logits.float().softmax(-1).max(-1)
    sure = (confidence > threshold).long().cumprod(1).sum(1).clamp(min=1)
    ends = torch.isin(tokens, eos_token_ids)
    up_to_end = (ends.long().cumsum(1) - ends.long() == 0).sum(1)
    kept = torch.minimum(torch.minimum(sure, up_to_end), budget)
    slot = torch.arange(tokens.shape[1], device=tokens.device)
    ended = (ends & (slot < kept[:, None])).any(1)
    return tokens, kept, torch.where(ended, 0, budget - kept)


def _forward(model: Any, rows: _Rows, cache: Any, window: int, mask_token_id: int, causal_attn: bool) -> Tensor:
    """One pass: logits (B, n, V) of the proposals. The cache then holds the new tokens, not the window."""
    positions, args = rows.positions(), {"past_key_values": cache, "use_cache": True}
    if window == 1:
        if rows.padded:
            args |= {"attention_mask": torch.cat([rows.seen, rows.real], 1).long(), "position_ids": positions}
        return model(input_ids=rows.ids, logits_to_keep=1, **args).logits
    slots = torch.full((len(rows.ids), window), mask_token_id, dtype=torch.long, device=rows.ids.device)
    slots[:, 0] = rows.ids[:, -1]
    mask = window_mask(rows.seen, rows.real, window, causal_attn)[:, None]
    if model.config._attn_implementation == "eager":  # adds the mask to the scores instead of selecting by it
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, lowest)
    ahead = torch.arange(window, device=positions.device)
    logits = model(
        input_ids=torch.cat([rows.ids, slots], 1),
        position_ids=torch.cat([positions, positions[:, -1:] + ahead], 1),
        attention_mask=mask,
        logits_to_keep=window,
        **args,
    ).logits
    cache.crop(-window)  # minus: "so many off the end" in every version; a positive length means two things
    return logits


def _prefill(model: Any, rows: _Rows, cache: Any) -> _Rows:
    """Sends all but the last prompt token through the plain causal path."""
    args: dict[str, Any] = {}
    if rows.padded:
        args = {"attention_mask": rows.real[:, :-1].long(), "position_ids": rows.positions()[:, :-1]}
    model(input_ids=rows.ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1, **args)
    seen = torch.cat([rows.seen, rows.real[:, :-1]], 1)
    return _Rows(rows.ids[:, -1:], rows.real[:, -1:], seen, rows.budget, rows.padded)


def _start(input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> _Rows:
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    padded = not bool(real.all())
    if padded and not bool(real[:, -1].all()):
        raise ValueError("prompts of different length must be padded on the left (padding_side='left')")
    budget = torch.full((len(input_ids),), max_new_tokens, device=input_ids.device)
    return _Rows(input_ids, real, real[:, :0], budget, padded)


def _check(model: Any, input_ids: Tensor, window: int, max_new_tokens: int) -> None:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be (rows, tokens) with at least one token, got {tuple(input_ids.shape)}")
    if window < 1 or max_new_tokens < 1:
        raise ValueError(f"window and max_new_tokens must be at least 1, got {window} and {max_new_tokens}")
    backend = model.config._attn_implementation
    if window > 1 and backend not in ("sdpa", "eager"):
        raise ValueError(f"a window needs attn_implementation 'sdpa' or 'eager' (dense masks), not '{backend}'")


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    *,
    mask_token_id: int,
    window: int,
    max_new_tokens: int,
    threshold: float = 0.9,
    eos_token_ids: Sequence[int] = (),
    attention_mask: Tensor | None = None,
    causal_attn: bool = False,
    cache: Any = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Decoded:
    """Continues each prompt greedily until an end token or exactly `max_new_tokens` tokens: one sync a pass.

    Args:
        model: a causal LM of transformers whose attention is full and stock (Qwen2, Llama), in eval mode.
        input_ids: int64 (B, P) prompts, padded on the left when their lengths differ.
        mask_token_id: the token that fills the slots 1..n-1.
        window: n, tokens proposed in one pass; may differ from the block size of training.
        threshold: keep a token when its probability is strictly above this; the first is always kept.
        eos_token_ids: tokens that end a row.
        attention_mask: (B, P), 0 where padding.
        causal_attn: the model was trained with causal attention inside a block.
        cache: an empty cache of transformers; None = a DynamicCache.
        on_tokens: called with (row, kept tokens) after each pass.

    Raises:
        ValueError: right padding, an attention backend without dense masks, a size below 1.
    """
    _check(model, input_ids, window, max_new_tokens)
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    rows = _start(input_ids, attention_mask, max_new_tokens)
    prefill_passes = int(window > 1 and input_ids.shape[1] > PREFILL_FROM)
    if prefill_passes:
        rows = _prefill(model, rows, cache)
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=input_ids.device)
    new_tokens: list[list[int]] = [[] for _ in input_ids]
    accepted: list[list[int]] = [[] for _ in input_ids]
    passes, running = 0, True
    while running:
        logits = _forward(model, rows, cache, window, mask_token_id, causal_attn)
        tokens, kept, budget = accept(logits, threshold, rows.budget, eos)
        table = torch.cat([tokens, kept[:, None], budget[:, None]], 1).tolist()  # the one host sync of a pass
        passes += 1
        for row, (*proposed, count, _) in enumerate(table):
            if count:
                new_tokens[row] += proposed[:count]
                accepted[row].append(count)
                if on_tokens is not None:
                    on_tokens(row, proposed[:count])
        running = any(left for *_, left in table)
        rows = _next_rows(rows, tokens, kept, budget, [count for *_, count, _ in table])
    return Decoded(new_tokens, accepted, passes, prefill_passes)


def _next_rows(rows: _Rows, tokens: Tensor, kept: Tensor, budget: Tensor, counts: list[int]) -> _Rows:
    """Lays each row's first kept[b] tokens against the right edge of max(counts) columns."""
    longest = max(counts)
    column = torch.arange(longest, device=tokens.device)
    index = column - longest + kept[:, None]  # below 0: this row kept fewer
    ids = tokens.gather(1, index.clamp(min=0))
    seen = torch.cat([rows.seen, rows.real], 1)
    return _Rows(ids, index >= 0, seen, budget, rows.padded or min(counts) < longest)
