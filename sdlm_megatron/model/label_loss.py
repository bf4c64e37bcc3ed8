"""LM head and cross entropy of the label rows, in chunks, with gradients computed in the forward pass.

Plain autograd would keep the logits of all label rows and their softmax until the backward pass: 152k numbers per row
for Qwen2.5. Here the logits of a chunk exist only until its share of the gradients is known. That is possible because
the sum of the losses enters the loss of the step with a single factor, by which the backward pass multiplies.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sdlm_megatron.diffusion.layout import IGNORE

CACHED_ROWS = 8
"""Rows of logits processed at a time on a CPU, so that the passes over them hit the cache."""
BYTES = 8
"""Memory per logit of a chunk: logit and gradient in bf16, log-probability in fp32."""


class LabelLosses(NamedTuple):
    """Output of the last pipeline stage for one row with N label rows."""

    total: torch.Tensor
    """float32 (): weighted sum of `nll` over the real targets; differentiable."""
    nll: torch.Tensor
    """float32 (N,): negative log likelihood of each label row, nats; no gradient."""
    confidence: torch.Tensor | None
    """float32 (N,): probability of the most likely token; None unless measured."""
    correct: torch.Tensor | None
    """bool (N,): whether that token is the target; None unless measured."""


@dataclass(frozen=True)
class Vocabulary:
    """Shard of the vocabulary on this TP rank."""

    first: int
    """Token id of the shard's first row."""
    real: int
    """Number of its rows that are tokens; the rest pads the embedding and takes no part in the softmax."""
    group: dist.ProcessGroup | None
    """TP group; None without tensor parallelism."""


def label_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: Vocabulary,
    *,
    logits_mb: float,
    loss_weights: torch.Tensor | None = None,
    measure: bool = False,
    trained_row: torch.Tensor | None = None,
    trained_index: int = -1,
) -> LabelLosses:
    """Losses of the label rows.

    Args:
        hidden: (N, hidden), equal on all TP ranks; its gradient is summed over TP here.
        weight: (V/TP, hidden), this rank's rows of the head.
        targets: int64 (N,); IGNORE adds no loss.
        vocabulary: describes the rows of `weight`.
        logits_mb: memory limit of a chunk, MB.
        loss_weights: float32 (N,), weight of each row's loss in `total`; None: 1.
        measure: also compute `confidence` and `correct`, which costs another pass over the probabilities.
        trained_row: (1, hidden), the only row of a frozen `weight` that has a gradient; None: none has, or all have.
        trained_index: its index in `weight`; outside of it the gradient is 0.
    """
    # len(weight) and not vocabulary.real, which is smaller on the last rank: TP ranks must cut the same chunks,
    # since each chunk takes part in collectives
    rows = max(1, int(logits_mb * 1e6) // (BYTES * len(weight)))
    gradients = torch.is_grad_enabled()
    local = slice(0, vocabulary.real) if weight.requires_grad else slice(0, 0)
    if trained_row is not None and 0 <= trained_index < vocabulary.real:
        local = slice(trained_index, trained_index + 1)
    options = (vocabulary, rows, local, gradients, measure)
    return LabelLosses(*_LabelLoss.apply(hidden, weight, trained_row, targets, loss_weights, *options))


def label_logits(hidden: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Logits (N, V) of hidden states (N, hidden) over the padded vocabulary, on every rank of `group`."""
    local = hidden @ weight.t()
    if group is None:
        return local
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local, group=group)
    return torch.cat(parts, dim=1)


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        trained_row: torch.Tensor | None,
        targets: torch.Tensor,
        loss_weights: torch.Tensor | None,
        vocabulary: Vocabulary,
        rows: int,
        trained: slice,
        with_gradients: bool,
        measure: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        real = targets != IGNORE
        used = weight[: vocabulary.real]
        # one buffer for all chunks: on a CPU, touching fresh memory costs more than the arithmetic on it
        buffer = hidden.new_empty(min(rows, len(hidden)), len(used))
        product = _WeightGradient(used[trained]) if with_gradients else None
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        parts = []
        for begin in range(0, len(hidden), rows):
            chunk = slice(begin, begin + rows)
            inputs = hidden[chunk]
            gradient = torch.mm(inputs, used.t(), out=buffer[: len(inputs)])  # the logits, replaced by their gradient
            together = len(inputs) if inputs.is_cuda or vocabulary.group is not None else CACHED_ROWS
            for logits, part in zip(gradient.split(together), targets[chunk].split(together), strict=True):
                parts.append(_cross_entropy(logits, part, vocabulary, with_gradients, measure))
            if grad_hidden is not None and product is not None:
                # rows without a target are zeroed in inputs and output, not in the gradient, which is 100 times larger
                inputs = inputs.masked_fill(~real[chunk, None], 0)
                grad_hidden[chunk] = (gradient @ used).masked_fill_(~real[chunk, None], 0)
                if loss_weights is not None:  # multiplied by an fp32 tensor: bf16 would round a weight of 0.1
                    grad_hidden[chunk].mul_(loss_weights[chunk, None])
                    inputs.mul_(loss_weights[chunk, None])
                if trained.stop > trained.start:
                    product.add(gradient[:, trained], inputs, last=begin + rows >= len(hidden))
        nlls, *measured = zip(*parts, strict=True)
        all_nll = torch.cat(nlls)
        confidence, correct = (torch.cat(p) if measure else None for p in measured)
        ctx.group, ctx.row = vocabulary.group, trained_row is not None
        # rows of the gradient that is returned; 0: of none
        ctx.weight_rows = 1 if trained_row is not None else len(weight) if weight.requires_grad else 0
        ctx.save_for_backward(grad_hidden, product and product.total)
        ctx.mark_non_differentiable(*(t for t in (all_nll, confidence, correct) if t is not None))
        losses = torch.where(real, all_nll, 0.0)
        total = (losses if loss_weights is None else losses * loss_weights).sum()
        return total, all_nll, confidence, correct

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # in place: no other code sees these tensors, and grad_weight is as large as the head
        grad_hidden.mul_(grad_total)
        if ctx.group is not None:  # each rank has the contribution of its shard of the vocabulary
            dist.all_reduce(grad_hidden, group=ctx.group)
        if grad_weight is None:  # frozen, or the trained row is on another rank
            grad_weight = grad_hidden.new_zeros(0, grad_hidden.shape[1])
        grad_weight.mul_(grad_total)
        if len(grad_weight) < ctx.weight_rows:
            padding = grad_weight.new_zeros(ctx.weight_rows - len(grad_weight), grad_weight.shape[1])
            grad_weight = torch.cat([grad_weight, padding])
        gradients = (None, grad_weight) if ctx.row else (grad_weight if ctx.weight_rows else None, None)
        return grad_hidden, *gradients, None, None, None, None, None, None, None


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary: Vocabulary, with_gradient: bool, measure: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """nll, confidence and correct (n,) of logits (n, real), which are overwritten by the gradient of the nll's sum."""
    local = targets - vocabulary.first
    here = (local >= 0) & (local < vocabulary.real)
    index = local.clamp(0, max(0, vocabulary.real - 1))[:, None]
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    if vocabulary.group is not None:
        log_p += _log_share(logits[:, :1].float() - log_p[:, :1], vocabulary.group)
    picked = log_p.gather(1, index)[:, 0] if vocabulary.real else log_p.new_zeros(len(targets))
    nll = -picked.masked_fill(~here, 0)
    if vocabulary.group is not None:
        dist.all_reduce(nll, group=vocabulary.group)
    confidence, correct = _most_likely(log_p, targets, vocabulary) if measure else (None, None)
    if with_gradient and vocabulary.real:
        if logits.is_cuda:
            torch.exp(log_p, out=logits)
        else:  # on a CPU, converting inside exp is four times slower than converting its result
            logits.copy_(log_p.exp_())
        # p - 1 by expm1: the difference of rounded numbers loses all digits when p is close to 1
        at_target = torch.where(here, torch.expm1(picked), picked.exp()).to(logits.dtype)
        logits.index_put_((torch.arange(len(logits), device=logits.device), index[:, 0]), at_target)
    return nll, confidence, correct


def _most_likely(
    log_p: torch.Tensor, targets: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability of the most likely token, float32 (n,), and whether it is the target; ties go to the lowest id."""
    if vocabulary.real:
        top, token = log_p.max(-1)
        token += vocabulary.first
    else:
        top, token = log_p.new_full((len(targets),), -torch.inf), torch.zeros_like(targets)
    if vocabulary.group is not None:
        local_top = top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=vocabulary.group)
        token = token.masked_fill(local_top < top, torch.iinfo(token.dtype).max)
        dist.all_reduce(token, dist.ReduceOp.MIN, group=vocabulary.group)
    return top.exp(), token == targets


def _log_share(here: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """log probability (n, 1) of this rank's shard; added to a log-softmax over the shard it gives one over all shards.

    `here` is the logsumexp of the shard's logits, (n, 1), or (n, 0) where the shard is padding only.
    """
    if not here.shape[1]:
        here = torch.full((len(here), 1), -torch.inf, device=here.device)
    peak = here.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    total = (here - peak).exp()
    dist.all_reduce(total, group=group)
    return here - peak - total.log()


class _WeightGradient:
    """Sum over chunks of gradient.T @ inputs, shaped as the weight: float32, or of its dtype with a single chunk."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.total: torch.Tensor | None = None
        self.part: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor, inputs: torch.Tensor, *, last: bool) -> None:
        """Adds a chunk: gradient (n, rows of the weight), inputs (n, hidden)."""
        left = gradient.t()
        if self.total is None:
            self.total = left @ inputs
            if not last:
                self.total = self.total.float()
        elif inputs.dtype is torch.float32:
            self.total.addmm_(left, inputs)
        elif inputs.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # bf16 product accumulated in fp32
            torch.ops.aten.addmm.dtype_out(self.total, left, inputs, torch.float32, out=self.total)
        else:
            self.part = torch.empty_like(self.weight) if self.part is None else self.part
            self.total += torch.mm(left, inputs, out=self.part)
