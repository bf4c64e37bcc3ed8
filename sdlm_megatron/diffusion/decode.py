"""Decoding: several tokens a forward pass, as many as the algorithm finds sure. The one loop of this project.

A window of n slots is a training block: slot 0 repeats a token x[p], its anchor, slots 1..n-1 are mask tokens, at
positions p..p+n-1; slot j proposes x[p+1+j]; it sees the clean tokens before p and itself, in both directions or,
with `causal_attn`, backwards only. Each pass feeds the tokens that are new since the last one, causally, which
writes their keys and values, and beside them

- prob_conf, entropy_conf: one window at the last token. Its longest sure prefix is kept (decode_rules.py);
- self_speculative: the kept token and n-1 drafts, and a window behind each of these n tokens. Slot 0 of window j
  says what follows draft j; drafts that agree are kept, and the window behind the last kept token has the next
  drafts. What comes out is what slot 0 alone would say, token by token;
- ar, and n = 1: no window, one plain causal step.

A model trained without the target shift (diffusion.layout) has its window behind the anchor, of mask tokens only;
slot j proposes the same x[p+1+j].

The exporter copies this file and its three neighbours into the model folder as they are, so they import nothing but
torch and transformers. Shapes: B rows, P prompt tokens, T columns, W windows, n slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .decode_rules import Warp, choose, confidence, cut, sure_prefix, uniforms, verified_prefix
from .decode_step import Proposer, Step

FIXED_COLUMNS = 256
"""The fixed form's rows are a multiple of this long, so that prompts of other lengths meet the same shapes."""

ALGORITHMS = ("prob_conf", "entropy_conf", "self_speculative", "ar")

Stop = Callable[[Tensor], Tensor]
"""int64 (B, T) tokens of each row so far, filled on the left with the mask token -> bool (B,): the row ends here."""


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
    """Forward passes before those: 1 for long prompts, else 0."""

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of all rows over the passes each of them took part in."""
        return sum(map(len, self.tokens)) / max(1, sum(map(len, self.accepted)))


@dataclass(frozen=True)
class _Settings:
    alg: str
    window: int
    threshold: float
    product: bool
    mask_token_id: int
    eos: Tensor
    warp: Warp | None
    stop: Stop | None
    use_cache: bool

    @property
    def speculates(self) -> bool:
        return self.alg == "self_speculative" and self.window > 1

    @property
    def by_confidence(self) -> bool:
        return self.alg != "self_speculative" and self.window > 1  # a window of one token is kept, however sure


@dataclass
class _Rows:
    """A batch between two passes."""

    ids: Tensor
    """int64 (B, T), see Step."""
    length: Tensor
    """int64 (B,): prompt and kept tokens."""
    budget: Tensor
    """int64 (B,): tokens a row may still produce; 0 once it ended."""
    cached: Tensor
    """int64 (B,), see Step."""
    seeds: Tensor
    """int64 (B,)."""
    drafts: int = 0
    """How many draft tokens stand behind the kept ones."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "_Rows":
        """The same with every tensor changed."""
        tensors = (self.ids, self.length, self.budget, self.cached, self.seeds)
        ids, length, budget, cached, seeds = (change(x) for x in tensors)
        return _Rows(ids, length, budget, cached, seeds, self.drafts)


def _one_pass(
    propose: Proposer, settings: _Settings, now: _Rows, width: int, longest: int, kept_rows: Tensor | None
) -> tuple[_Rows, Tensor]:
    """One pass, without the host: the rows after it, and int64 (B, n + 2): tokens, how many are kept, budget left."""
    ahead = torch.arange(settings.window, device=now.ids.device)
    anchors = now.length[:, None] - 1 + (ahead if now.drafts else ahead[:1])
    step = Step(
        ids=now.ids,
        end=now.length + now.drafts,
        cached=now.cached,
        width=width,
        longest=longest,
        anchors=anchors,
        window=settings.window,
        kept_rows=kept_rows,
    )
    uniform = None if settings.warp is None else uniforms(now.seeds, anchors[:, :, None] + 1 + ahead)
    logits = propose(step).float()
    every = choose(logits, settings.warp, uniform)  # (B, W, n)
    if now.drafts:
        tokens = every[:, :, 0]
        kept = verified_prefix(tokens, now.ids.gather(1, anchors))
    else:
        tokens, kept = every[:, 0], torch.ones_like(now.length)
        if settings.by_confidence:
            sure = confidence(tokens, logits[:, 0], settings.alg)
            kept = sure_prefix(sure, settings.threshold, settings.product)
    ids = now.ids.scatter(1, now.length[:, None] + ahead, tokens)
    ends = torch.isin(tokens, settings.eos)
    if settings.stop is not None:
        ends |= _stopped(settings, ids, now.length, longest)
    kept, budget = cut(kept, ends, now.budget)
    length = now.length + kept
    cached, drafts = now.length, 0
    if settings.speculates:
        window = (kept - 1).clamp(min=0) if now.drafts else torch.zeros_like(kept)
        best = every[torch.arange(len(every), device=every.device), window, 1:]
        ids = ids.scatter(1, length[:, None] + ahead[:-1], best)
        cached, drafts = length - 1, settings.window - 1
    if not settings.use_cache:
        cached = torch.zeros_like(cached)
    return _Rows(ids, length, budget, cached, now.seeds, drafts), torch.cat([tokens, kept[:, None], budget[:, None]], 1)


def _stopped(settings: _Settings, ids: Tensor, length: Tensor, longest: int) -> Tensor:
    """bool (B, n): whether the caller's rule ends the row after each of the proposals."""
    assert settings.stop is not None
    found, size = [], longest + settings.window
    for slot in range(settings.window):
        column = length[:, None] + slot + 1 - size + torch.arange(size, device=ids.device)
        so_far = torch.where(column < 0, settings.mask_token_id, ids.gather(1, column.clamp(min=0)))
        found.append(settings.stop(so_far))
    return torch.stack(found, 1)


def _columns(needed: int, fixed: bool) -> int:
    return -(-needed // FIXED_COLUMNS) * FIXED_COLUMNS if fixed else needed


def _start(input_ids: Tensor, attention_mask: Tensor | None, columns: int, budget: int, seed: int | None) -> _Rows:
    """Rows aligned at column 0, whichever side their padding was on, with room for what is to come."""
    device = input_ids.device
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device).ne(0).long()
    order = real.argsort(dim=1, descending=True, stable=True)
    ids = torch.nn.functional.pad(input_ids.gather(1, order), (0, columns - input_ids.shape[1]))
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    length = real.sum(1)
    return _Rows(
        ids=ids,
        length=length,
        budget=torch.full_like(length, budget),
        cached=torch.zeros_like(length),
        seeds=seed + torch.arange(len(real), device=device),
    )


def _check(input_ids: Tensor, attention_mask: Tensor | None, settings: _Settings, max_new_tokens: int) -> None:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be (rows, tokens) with at least one token, got {tuple(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}"
        )
    if settings.alg not in ALGORITHMS:
        raise ValueError(f"alg must be one of {', '.join(ALGORITHMS)}, got {settings.alg!r}")
    if settings.window < 1 or max_new_tokens < 1:
        raise ValueError(f"window and max_new_tokens must be at least 1, got {settings.window} and {max_new_tokens}")
    if not 0 <= settings.threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, got {settings.threshold}")


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    *,
    mask_token_id: int,
    window: int,
    max_new_tokens: int,
    alg: str = "prob_conf",
    threshold: float = 0.9,
    product: bool = False,
    eos_token_ids: Sequence[int] = (),
    attention_mask: Tensor | None = None,
    causal_attn: bool = False,
    target_shift: bool = True,
    warp: Warp | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    use_cache: bool = True,
    fixed_shape: bool | Callable[[Any], Any] = False,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Decoded:
    """Continues each prompt until an end token or exactly `max_new_tokens` tokens; each row as if it were alone.

    One transfer to the host a pass. Finished rows leave the batch. Raises ValueError for a setting out of range, wrong
    shapes, an attention backend without dense masks.

    Args:
        model: a causal LM of transformers with full, stock attention (Qwen2, Llama), in eval mode, or a Proposer.
        input_ids: int64 (B, P) prompts, padded on either side when their lengths differ.
        mask_token_id: the token that fills the slots 1..n-1.
        window: n, tokens proposed in one pass; may differ from the block size of training.
        alg: one of ALGORITHMS; "ar" is window = 1.
        threshold: keep a slot that is surer than this; the first is always kept. Unused by self_speculative.
        product: the product of a prefix's confidences must be above the threshold, not each by itself.
        eos_token_ids: tokens that end a row.
        attention_mask: (B, P), 0 where padding.
        causal_attn: the model was trained with causal attention inside a block.
        target_shift: False: the model was trained without; n = 1 is then not what it was trained for.
        warp: draw tokens instead of taking the likeliest, from softmax(warp(logits)); see decode_rules.Warp. How sure
            a slot is does not depend on it.
        seed: row b draws with seed + b, a position always with the same number; None: from torch's generator.
        stop: ends a row early, e.g. at a string; asked about every proposed token. See Stop.
        use_cache: False feeds the whole row in every pass: the same tokens, slowly.
        fixed_shape: True keeps every shape the same from the second pass on and finished rows in the batch; a
            callable (torch.compile) is also given the function of one pass and returns what is run instead.
        on_tokens: called with (row, kept tokens) after each pass.
    """
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=input_ids.device)
    n = 1 if alg == "ar" else window
    settings = _Settings(alg, n, threshold, product, mask_token_id, eos, warp, stop, use_cache)
    _check(input_ids, attention_mask, settings, max_new_tokens)
    seed = 0 if warp is None else seed  # nothing is drawn: the caller's generator stays as it is
    columns = _columns(input_ids.shape[1] + max_new_tokens + 2 * n, bool(fixed_shape))
    now = _start(input_ids, attention_mask, columns, max_new_tokens, seed)
    lengths = now.length.tolist()
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} of attention_mask has no token")
    trained = {"causal_attn": causal_attn, "target_shift": target_shift}
    propose, prefilled = _proposer(model, now, settings, max(lengths), trained, bool(fixed_shape))
    return _Loop(propose, settings, lengths, fixed_shape, on_tokens).run(now, prefilled)


def _proposer(
    model: Any, now: _Rows, settings: _Settings, longest: int, trained: dict[str, bool], fixed: bool
) -> tuple[Proposer, bool]:
    """The model as a Proposer, and whether it has taken all but the last token of each prompt already."""
    if not isinstance(model, torch.nn.Module):
        return model, False
    from .decode_model import PREFILL_FROM, TransformersProposer

    capacity = now.ids.shape[1] + settings.window**2 + 1 if fixed else 0
    propose = TransformersProposer(model, mask_token_id=settings.mask_token_id, capacity=capacity, **trained)
    prefilled = settings.use_cache and longest > PREFILL_FROM
    if prefilled:
        propose.prefill(now.ids[:, : longest - 1])
        now.cached = now.length - 1
    return propose, prefilled


class _Loop:
    """What the host keeps of a batch: plain numbers."""

    def __init__(
        self,
        propose: Proposer,
        settings: _Settings,
        lengths: list[int],
        fixed_shape: bool | Callable[[Any], Any],
        on_tokens: Callable[[int, list[int]], None] | None,
    ) -> None:
        self.settings, self.lengths, self.on_tokens = settings, lengths, on_tokens
        self.first = partial(_one_pass, propose, settings)
        self.next = _keeping_outputs(fixed_shape(self.first)) if callable(fixed_shape) else self.first
        self.fixed = bool(fixed_shape)
        self.rows = list(range(len(lengths)))  # number of each row that is still in the batch
        self.tokens: list[list[int]] = [[] for _ in lengths]
        self.accepted: list[list[int]] = [[] for _ in lengths]

    def run(self, now: _Rows, prefilled: bool) -> Decoded:
        """Passes until every row has ended."""
        width, passes = 1 if prefilled else max(self.lengths), 0
        run, kept_rows = self.first, None
        while True:
            longest = now.ids.shape[1] if self.fixed else max(self.lengths) + now.drafts
            now, table = run(now, width if self.settings.use_cache else longest, longest, kept_rows)
            passes, run = passes + 1, self.next
            counts, left = self._take(table.tolist())  # the one transfer to the host
            if not any(left):
                return Decoded(self.tokens, self.accepted, passes, int(prefilled))
            now, kept_rows = self._drop_ended(now, left)
            width = self.settings.window if self.fixed or now.drafts else max(counts)

    def _take(self, table: list[list[int]]) -> tuple[list[int], list[int]]:
        """Notes what a pass kept; returns how many tokens of each row, and its budget left."""
        for i, (*proposed, count, _) in enumerate(table):
            row = self.rows[i]
            self.lengths[i] += count
            if count:
                self.tokens[row] += proposed[:count]
                self.accepted[row].append(count)
                if self.on_tokens is not None:
                    self.on_tokens(row, proposed[:count])
        return [line[-2] for line in table], [line[-1] for line in table]

    def _drop_ended(self, now: _Rows, left: list[int]) -> tuple[_Rows, Tensor | None]:
        """Takes ended rows out when a quarter of the batch is done: each time the cache is copied."""
        alive = [i for i, budget in enumerate(left) if budget]
        if self.fixed or 4 * len(alive) > 3 * len(left):
            return now, None
        self.rows, self.lengths = [self.rows[i] for i in alive], [self.lengths[i] for i in alive]
        index = torch.tensor(alive, device=now.ids.device)
        return now.map(lambda x: x[index]), index


def _keeping_outputs(one_pass: Any) -> Any:
    """A compiled pass whose results stay when it runs again: a CUDA graph writes to the same memory every time."""

    def run(*args: Any) -> tuple[_Rows, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        now, table = one_pass(*args)
        return now.map(Tensor.clone), table.clone()

    return run
