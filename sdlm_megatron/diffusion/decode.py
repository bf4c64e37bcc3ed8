"""Decoding: several tokens per forward pass. The only decoding loop of this project.

A window of n slots equals a training block: slot 0 repeats the anchor x[p], slots 1..n-1 are mask tokens, at positions
p..p+n-1. Slot j proposes x[p+1+j]. A slot sees the clean tokens before p and the window, in both directions, or with
`causal_attn` only the slots up to itself. A pass feeds the tokens that are new since the previous pass, causally, which
writes their keys and values, and beside them

- prob_conf, entropy_conf: one window at the last token; the longest confident prefix of its proposals is kept
  (longest prefix decoding, see decode_rules.py);
- self_speculative: the last kept token, n-1 drafts, and a window behind each of these n tokens. Slot 0 of window j
  predicts the token after draft j. Drafts that agree with these predictions are kept, and the window behind the last
  kept token supplies the next drafts. The output is what slot 0 alone would produce token by token;
- lossless, for models trained with `causal_attn`: the same with clean tokens in place of slots 0, so n * n tokens per
  pass. Their logits p are those of next-token decoding. Greedy, drafts that agree with them are kept; sampled, draft
  and p are compared by speculative sampling (`decode_rules.accept_drafts`). The output is that of `ar`;
- ar, or n = 1: no window, one causal step.

Example, n = 3, prompt x[0..4], prob_conf:

    pass 1 feeds x[0..4] and the window [x[4] M M]; it keeps x[5], x[6] of the proposals x[5], x[6], x[7]
    pass 2 feeds x[5], x[6] and the window [x[6] M M]; its proposals are x[7], x[8], x[9]

A model trained without the target shift (diffusion.layout) has its window one position later, of mask tokens only;
slot j proposes the same x[p+1+j].

The exporter copies this file and its neighbors decode_*.py into the model folder unchanged, so they import nothing but
torch and transformers. Shapes: B rows, P prompt tokens, T columns, W windows, n slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .decode_rules import (
    ACCEPT,
    REDRAW,
    Warp,
    accept_drafts,
    choose,
    confidence,
    confident_prefix,
    cut,
    drawn,
    uniforms,
    verified_prefix,
    warped,
)
from .decode_step import Proposer, Step
from .settings import MOST_BLOCK, MOST_DRAFTS, lossless_fault

FIXED_COLUMNS = 256
"""With `fixed_shape`, T is a multiple of this, so that prompts of similar lengths share compiled shapes."""

SPECULATIVE = ("self_speculative", "lossless")
ALGORITHMS = ("prob_conf", "entropy_conf", *SPECULATIVE, "ar")

Stop = Callable[[Tensor], Tensor]
"""int64 (B, P + k) prompts as the caller gave them and k kept tokens of each row -> bool (B,): the row ends here."""


class LogitsError(ValueError):
    """Logits that are NaN or infinite, from which no token can be drawn."""


@dataclass(frozen=True)
class Decoded:
    """Generated tokens and the number of passes that produced them."""

    tokens: list[list[int]]
    """New tokens of each row, including the token that ended it."""
    accepted: list[list[int]]
    """Accepted lengths of each row, one per pass; their sum is len(tokens[row])."""
    passes: int
    """Forward passes that proposed tokens: the maximum over the rows."""
    prefill_passes: int
    """Forward passes before those: 1 for prompts longer than PREFILL_FROM, else 0."""

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of all rows over the sum of the passes of each row."""
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
    sample: bool
    use_cache: bool

    @property
    def speculates(self) -> bool:
        return self.alg in SPECULATIVE and self.window > 1


@dataclass
class _Rows:
    """State of a batch between two passes, on the device."""

    ids: Tensor
    """int64 (B, T); see Step."""
    length: Tensor
    """int64 (B,): number of prompt and kept tokens."""
    budget: Tensor
    """int64 (B,): tokens a row may still produce; 0 once it has ended."""
    cached: Tensor
    """int64 (B,); see Step."""
    seeds: Tensor
    """int64 (B,); see uniforms."""
    drafts: int = 0
    """Draft tokens behind the kept ones."""
    draft_probs: Tensor | None = None
    """float32 (B, n-1, V): what the drafts were drawn from, when lossless decoding samples."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "_Rows":
        """A copy with `change` applied to each tensor."""
        changed: dict[str, Any] = {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **changed)


def _one_pass(
    propose: Proposer, settings: _Settings, now: _Rows, width: int, longest: int, kept_rows: Tensor | None
) -> tuple[_Rows, Tensor]:
    """One pass, entirely on the device.

    Returns:
        The rows after it, and int64 (B, n + 2) for the host: proposed tokens, number kept, remaining budget.
    """
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
        clean_anchors=settings.alg == "lossless" and settings.window > 1,
    )
    logits = propose(step).float()
    # of the tokens at the positions length, length + 1, …: slots 0 of all windows, or all slots of the only window
    own = logits[:, :, 0] if now.drafts else logits[:, 0]
    scores = warped(own, settings.warp)
    tokens, kept = _kept_tokens(settings, now, own, scores)
    ids = now.ids.scatter(1, now.length[:, None] + ahead, tokens)
    ends = torch.isin(tokens, settings.eos)
    kept, budget = cut(kept, ends, now.budget)
    length = now.length + kept
    cached, drafts, draft_probs = now.length, 0, None
    if settings.speculates:
        window = (kept - 1).clamp(min=0) if now.drafts else torch.zeros_like(kept)
        behind = logits[torch.arange(len(logits), device=logits.device), window, 1:]  # (B, n-1, V)
        tokens_next, draft_probs = _drafts(settings, behind, now.seeds, length[:, None] + ahead[:-1])
        ids = ids.scatter(1, length[:, None] + ahead[:-1], tokens_next)
        cached, drafts = length - 1, settings.window - 1
    if not settings.use_cache:
        cached = torch.zeros_like(cached)
    # -1: nothing can be drawn from NaN; the most likely token is that of argmax all the same, as in transformers
    shown = torch.where(scores.amax(-1).isfinite(), tokens, -1) if settings.sample else tokens
    table = torch.cat([shown, kept[:, None], budget[:, None]], 1)
    return _Rows(ids, length, budget, cached, now.seeds, drafts, draft_probs), table


def _kept_tokens(settings: _Settings, now: _Rows, logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 (B, n) from the logits (B, n, V) of their positions, and the number int64 (B,) that are kept.

    `scores`: the logits after the warp.
    """
    positions = now.length[:, None] + torch.arange(settings.window, device=logits.device)
    if now.draft_probs is not None:
        accept, redraw = (uniforms(now.seeds, positions, stream) for stream in (ACCEPT, REDRAW))
        drafts = now.ids.gather(1, positions[:, :-1])
        return accept_drafts(scores.softmax(-1), now.draft_probs, drafts, accept, redraw)
    tokens = choose(scores, None, uniforms(now.seeds, positions) if settings.sample else None)
    if now.drafts:
        return tokens, verified_prefix(tokens, now.ids.gather(1, positions - 1))
    if settings.alg not in SPECULATIVE and settings.window > 1:  # a single token is kept whatever its confidence
        confidences = confidence(tokens, logits, settings.alg)
        return tokens, confident_prefix(confidences, settings.threshold, settings.product)
    return tokens, torch.ones_like(now.length)


def _drafts(settings: _Settings, logits: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drafts int64 (B, n-1) from logits (B, n-1, V), and their distributions where they are accepted by these."""
    uniform = uniforms(seeds, positions) if settings.sample else None
    if uniform is None or settings.alg != "lossless":
        return choose(logits, settings.warp, uniform), None
    probs = warped(logits, settings.warp).softmax(-1)
    return drawn(probs, uniform), probs


def _columns(needed: int, fixed: bool) -> int:
    return -(-needed // FIXED_COLUMNS) * FIXED_COLUMNS if fixed else needed


def _start(
    input_ids: Tensor, attention_mask: Tensor | None, columns: int, budget: int, seed: int | None
) -> tuple[_Rows, list[int]]:
    """Rows aligned at column 0, wherever their padding was, with room for the tokens to come; and their lengths."""
    device = input_ids.device
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device).ne(0).long()
    order = real.argsort(dim=1, descending=True, stable=True)
    ids = torch.nn.functional.pad(input_ids.gather(1, order), (0, columns - input_ids.shape[1]))
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    length = real.sum(1)
    lengths = length.tolist()
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} of attention_mask has no token")
    rows = _Rows(
        ids=ids,
        length=length,
        budget=torch.full_like(length, budget),
        cached=torch.zeros_like(length),
        seeds=seed + torch.arange(len(real), device=device),
    )
    return rows, lengths


def _check(
    input_ids: Tensor, attention_mask: Tensor | None, settings: _Settings, max_new_tokens: int, trained: dict[str, bool]
) -> None:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be (rows, tokens) with at least one token, got {tuple(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}"
        )
    if settings.alg not in ALGORITHMS:
        raise ValueError(f"alg must be one of {', '.join(ALGORITHMS)}, got {settings.alg!r}")
    if settings.alg == "lossless" and (fault := lossless_fault(**trained)):
        raise ValueError(f"alg 'lossless' {fault}; use 'self_speculative'")
    most = MOST_DRAFTS if settings.speculates else MOST_BLOCK
    if not 1 <= settings.window <= most or max_new_tokens < 1:
        what = f"window must be from 1 to {most}, max_new_tokens at least 1"
        raise ValueError(f"{what}; got {settings.window} and {max_new_tokens}")
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
    sample: bool | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    pad_token_id: int | None = 0,
    use_cache: bool = True,
    fixed_shape: bool | Callable[[Any], Any] = False,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Decoded:
    """Continues each prompt, independent of the others, to an end token or exactly `max_new_tokens` tokens.

    Args:
        model: a causal LM of transformers with full, stock attention, in eval mode, or a Proposer.
        input_ids: int64 (B, P) prompts, padded on either side when their lengths differ.
        mask_token_id: token of the slots 1..n-1.
        window: n, tokens proposed per pass; may differ from the block size D of training.
        alg: one of ALGORITHMS; "ar" is window = 1.
        max_new_tokens: limit per row.
        threshold: tau; slots with a confidence above it are kept, slot 0 always. Unused by SPECULATIVE algorithms.
        product: compare the product of a prefix's confidences with the threshold instead of each confidence.
        eos_token_ids: tokens that end a row.
        attention_mask: (B, P), 0 at padding.
        causal_attn: the model was trained with causal attention inside a block.
        target_shift: False: the model was trained without the shift, so never for n = 1.
        warp: changes the logits that tokens are chosen by, not their confidence; see decode_rules.Warp.
        sample: draw tokens instead of taking the most likely ones; None: where there is a `warp`.
        seed: row b samples with seed + b, see decode_rules.uniforms; None: a seed from torch's generator.
        stop: ends a row early, e.g. at a string; called for k = 1, 2, … once every row has k tokens or has ended.
        pad_token_id: continues ended rows in what `stop` sees; None: rows go on until `stop` has ended all of them.
        use_cache: False feeds the whole row in every pass: the same tokens, slower.
        fixed_shape: True: all shapes stay from the second pass on; a callable (torch.compile) compiles a pass, too.
        on_tokens: called with (row, kept tokens) after each pass.

    Raises:
        ValueError: a setting out of range or unfit for the model, wrong shapes, an empty prompt, no dense masks, NaN.
    """
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=input_ids.device)
    n, sample = 1 if alg == "ar" else window, warp is not None if sample is None else sample
    settings = _Settings(alg, n, threshold, product, mask_token_id, eos, warp, sample, use_cache)
    trained = {"causal_attn": causal_attn, "target_shift": target_shift}
    _check(input_ids, attention_mask, settings, max_new_tokens, trained)
    columns = _columns(input_ids.shape[1] + max_new_tokens + 2 * n, bool(fixed_shape))
    now, lengths = _start(input_ids, attention_mask, columns, max_new_tokens, seed if sample else 0)
    propose, prefilled = _proposer(model, now, settings, max(lengths), trained, bool(fixed_shape))
    rule = stop and _StopRule(stop, input_ids, pad_token_id)
    return _Loop(propose, settings, lengths, fixed_shape, rule, on_tokens).run(now, prefilled)


def _proposer(
    model: Any, now: _Rows, settings: _Settings, longest: int, trained: dict[str, bool], fixed: bool
) -> tuple[Proposer, bool]:
    """The model as a Proposer, and whether a prefill pass has cached all but the last token of each prompt."""
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


class _StopRule:
    """The caller's stop rule, asked about one more token of all rows at a time, as in next-token decoding.

    Rows keep different numbers of tokens per pass: the tokens that a row has ahead of the slowest one wait, and are
    dropped where the rule ends the row before them.
    """

    def __init__(self, stop: Stop, input_ids: Tensor, pad_token_id: int | None) -> None:
        self.stop, self.pad_token_id, self.so_far = stop, pad_token_id, input_ids
        self.stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.open = list(range(len(input_ids)))
        self.shown = 0

    def cut(self, tokens: list[list[int]], complete: list[bool]) -> None:
        """Cuts `tokens` of the rows that end; `complete` tells which ones end at their last token anyway."""
        while self.open and all(len(tokens[row]) > self.shown for row in self.open):
            column = [tokens[row][self.shown] if row in self.open else self.pad_token_id for row in range(len(tokens))]
            self.so_far = torch.cat([self.so_far, self.so_far.new_tensor(column)[:, None]], 1)
            self.shown += 1
            self.stopped |= self.stop(self.so_far)
            stopped = self.stopped.tolist()
            may_end = self.pad_token_id is not None or all(stopped)
            for row in list(self.open):
                if (stopped[row] and may_end) or (complete[row] and len(tokens[row]) == self.shown):
                    del tokens[row][self.shown :]
                    self.open.remove(row)


class _Loop:
    """Host side of a batch: the kept tokens as Python integers."""

    def __init__(
        self,
        propose: Proposer,
        settings: _Settings,
        lengths: list[int],
        fixed_shape: bool | Callable[[Any], Any],
        rule: _StopRule | None,
        on_tokens: Callable[[int, list[int]], None] | None,
    ) -> None:
        self.settings, self.lengths, self.rule, self.on_tokens = settings, lengths, rule, on_tokens
        self.first = partial(_one_pass, propose, settings)
        self.next = _keeping_outputs(fixed_shape(self.first)) if callable(fixed_shape) else self.first
        self.fixed = bool(fixed_shape)
        self.rows = list(range(len(lengths)))  # original index of each row that is still in the batch
        self.tokens: list[list[int]] = [[] for _ in lengths]
        self.accepted: list[list[int]] = [[] for _ in lengths]
        self.complete = [False] * len(lengths)
        self.reported = [0] * len(lengths)  # tokens of each row that were passed to on_tokens

    def run(self, now: _Rows, prefilled: bool) -> Decoded:
        """Runs passes until every row has ended."""
        width, passes = 1 if prefilled else max(self.lengths), 0
        run, kept_rows = self.first, None
        while True:
            longest = now.ids.shape[1] if self.fixed else max(self.lengths) + now.drafts
            now, table = run(now, width if self.settings.use_cache else longest, longest, kept_rows)
            passes, run = passes + 1, self.next
            counts, left = self._take(table.tolist())  # the only transfer to the host
            if not any(left):
                accepted = [_first_tokens(*row) for row in zip(self.accepted, self.tokens, strict=True)]
                return Decoded(self.tokens, accepted, passes, int(prefilled))
            if self.rule is not None:
                now.budget = now.budget.new_tensor(left)
            now, kept_rows = self._drop_ended(now, left)
            width = self.settings.window if self.fixed or now.drafts else max(counts)

    def _take(self, table: list[list[int]]) -> tuple[list[int], list[int]]:
        """Records the tokens that a pass kept; returns their number and the remaining budget of each row."""
        left = [line[-1] for line in table]
        for i, (*proposed, count, _) in enumerate(table):
            row = self.rows[i]
            self.lengths[i] += count
            if -1 in proposed[:count]:
                raise LogitsError("no token can be drawn from logits that are NaN or infinite: use bf16 or fp32")
            if count:
                self.tokens[row] += proposed[:count]
                self.accepted[row].append(count)
                self.complete[row] = not left[i]
        if self.rule is not None:
            self.rule.cut(self.tokens, self.complete)
            left = [budget if row in self.rule.open else 0 for row, budget in zip(self.rows, left, strict=True)]
        if self.on_tokens is not None:
            self._report(self.on_tokens)
        return [line[-2] for line in table], left

    def _report(self, on_tokens: Callable[[int, list[int]], None]) -> None:
        """Passes on the new tokens that the stop rule can no longer cut."""
        for row, tokens in enumerate(self.tokens):
            final = self.rule.shown if self.rule is not None and row in self.rule.open else len(tokens)
            if new := tokens[self.reported[row] : final]:
                self.reported[row] = final
                on_tokens(row, new)

    def _drop_ended(self, now: _Rows, left: list[int]) -> tuple[_Rows, Tensor | None]:
        """Removes ended rows from the batch; also returns the indices of those that stay, None if all do."""
        alive = [i for i, budget in enumerate(left) if budget]
        # removal copies the cache, so it waits until a quarter of the batch has ended
        if self.fixed or 4 * len(alive) > 3 * len(left):
            return now, None
        self.rows, self.lengths = [self.rows[i] for i in alive], [self.lengths[i] for i in alive]
        index = torch.tensor(alive, device=now.ids.device)
        return now.map(lambda x: x[index]), index


def _first_tokens(accepted: list[int], tokens: list[int]) -> list[int]:
    """Accepted lengths of a row, one per pass, that add up to its tokens after a cut."""
    passes = zip(accepted, accumulate(accepted), strict=True)
    return [min(count, len(tokens) - total + count) for count, total in passes if total - count < len(tokens)]


def _keeping_outputs(one_pass: Any) -> Any:
    """A compiled pass with results that survive its next run; a CUDA graph writes to the same memory every time."""

    def run(*args: Any) -> tuple[_Rows, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        now, table = one_pass(*args)
        return now.map(Tensor.clone), table.clone()

    return run
