"""LM head and cross entropy of the label rows, in chunks, with the gradients made in the forward pass.

Plain autograd keeps the logits of all label rows (and their softmax) from forward to backward: 152k numbers a row.
Here a chunk's logits live until its part of the gradients is known, and are gone before the next chunk's. That the
gradients are known so early is a property of this loss: the sum of the rows' losses enters the step's loss with one
factor, so the backward pass has only to multiply by it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sdlm_megatron.diffusion.layout import IGNORE

CACHED_ROWS = 8
"""Rows of logits that a CPU turns into gradients at a time: what several passes read stays in its cache."""
BYTES = 8
"""A logit of a chunk with everything made from it: logit and gradient in the weights' type, log-probability in fp32."""


class LabelLosses(NamedTuple):
    """What the last pipeline stage gives."""

    total: torch.Tensor
    """float32 (): sum of `nll` over the real targets, by their weights; differentiable."""
    nll: torch.Tensor
    """float32 (N,): negative log likelihood of each label row, nats; no gradient."""
    sure: torch.Tensor | None
    """float32 (N,): probability of each label row's likeliest token; None unless it was asked for."""
    right: torch.Tensor | None
    """bool (N,): that token is the target; None unless it was asked for."""


@dataclass(frozen=True)
class Vocabulary:
    """The part of the vocabulary that this process holds."""

    first: int
    """Token id of its first row."""
    real: int
    """How many of its rows are tokens; those above pad the embedding and take no part in the softmax."""
    group: dist.ProcessGroup | None
    """The TP group; None if there is one part only."""


def label_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: Vocabulary,
    *,
    logits_mb: float,
    counts: torch.Tensor | None = None,
    measure: bool = False,
) -> LabelLosses:
    """Losses of label rows.

    Args:
        hidden: (N, hidden), the same on every TP rank; its gradient is summed over TP here.
        weight: (V/TP, hidden), rows of the head on this process.
        targets: int64 (N,); IGNORE counts as nothing.
        logits_mb: most memory of a chunk, in MB.
        counts: float32 (N,), what each row's loss counts in the total; None: 1 each.
        measure: also give `sure` and `right`: one more pass over each chunk's probabilities.
    """
    # not vocabulary.real, which is less where the padding lies: all TP ranks have to cut the same chunks
    rows = max(1, int(logits_mb * 1e6) // (BYTES * len(weight)))
    gradients = torch.is_grad_enabled()
    return LabelLosses(*_LabelLoss.apply(hidden, weight, targets, counts, vocabulary, rows, gradients, measure))


def label_logits(hidden: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Logits (N, V) of hidden states (N, hidden) over the whole vocabulary, padding included, on all of `group`."""
    mine = hidden @ weight.t()
    if group is None:
        return mine
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts, dim=1)


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        counts: torch.Tensor | None,
        vocabulary: Vocabulary,
        rows: int,
        with_gradients: bool,
        measure: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        real = targets != IGNORE
        used = weight[: vocabulary.real]
        # one buffer for every chunk: on a CPU, fresh memory costs more than what is computed in it
        buffer = hidden.new_empty(min(rows, len(hidden)), len(used))
        product = _Product(used) if with_gradients else None
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        parts = []
        for begin in range(0, len(hidden), rows):
            chunk = slice(begin, begin + rows)
            inputs = hidden[chunk]
            gradient = torch.mm(inputs, used.t(), out=buffer[: len(inputs)])  # the logits, as yet
            together = len(inputs) if inputs.is_cuda or vocabulary.group is not None else CACHED_ROWS
            for logits, some in zip(gradient.split(together), targets[chunk].split(together), strict=True):
                parts.append(_cross_entropy(logits, some, vocabulary, with_gradients, measure))
            if grad_hidden is not None and product is not None:
                # rows without a target are zeroed here and not in the gradient, which is 100 times as large
                inputs = inputs.masked_fill(~real[chunk, None], 0)
                grad_hidden[chunk] = (gradient @ used).masked_fill_(~real[chunk, None], 0)
                if counts is not None:  # in fp32: a weight of 0.1 rounded to bf16 would be another weight
                    grad_hidden[chunk].mul_(counts[chunk, None])
                    inputs.mul_(counts[chunk, None])
                product.add(gradient, inputs, last=begin + rows >= len(hidden))
        nlls, *measured = zip(*parts, strict=True)
        all_nll = torch.cat(nlls)
        sure, right = (torch.cat(p) if measure else None for p in measured)
        ctx.group, ctx.weight_rows = vocabulary.group, len(weight)
        ctx.save_for_backward(grad_hidden, product and product.total)
        ctx.mark_non_differentiable(*(t for t in (all_nll, sure, right) if t is not None))
        losses = torch.where(real, all_nll, 0.0)
        return (losses if counts is None else losses * counts).sum(), all_nll, sure, right

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # in place: these two are nobody else's, and the second is as large as the head
        grad_hidden.mul_(grad_total)
        if ctx.group is not None:  # each rank's rows of the vocabulary gave a part
            dist.all_reduce(grad_hidden, group=ctx.group)
        grad_weight.mul_(grad_total)
        if len(grad_weight) < ctx.weight_rows:
            padding = grad_weight.new_zeros(ctx.weight_rows - len(grad_weight), grad_weight.shape[1])
            grad_weight = torch.cat([grad_weight, padding])
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary: Vocabulary, with_gradient: bool, measure: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """nll float32 (n,) of logits (n, real), whose place the gradient of its sum takes; `sure` and `right`."""
    local = targets - vocabulary.first
    here = (local >= 0) & (local < vocabulary.real)
    index = local.clamp(0, max(0, vocabulary.real - 1))[:, None]
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    if vocabulary.group is not None:
        log_p += _share_of_this_part(logits[:, :1].float() - log_p[:, :1], vocabulary.group)
    picked = log_p.gather(1, index)[:, 0] if vocabulary.real else log_p.new_zeros(len(targets))
    nll = -picked.masked_fill(~here, 0)
    if vocabulary.group is not None:
        dist.all_reduce(nll, group=vocabulary.group)
    sure, right = _likeliest(log_p, targets, vocabulary) if measure else (None, None)
    if with_gradient and vocabulary.real:
        if logits.is_cuda:
            torch.exp(log_p, out=logits)
        else:  # torch's conversion inside exp is four times slower on a CPU than one after it
            logits.copy_(log_p.exp_())
        # p - 1 by expm1, not as a difference of rounded numbers
        at_target = torch.where(here, torch.expm1(picked), picked.exp()).to(logits.dtype)
        logits.index_put_((torch.arange(len(logits), device=logits.device), index[:, 0]), at_target)
    return nll, sure, right


def _likeliest(log_p: torch.Tensor, targets: torch.Tensor, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability of the likeliest token, float32 (n,), and whether it is the target; of several the first id counts,
    as in decoding.
    """
    if vocabulary.real:
        top, token = log_p.max(-1)
        token += vocabulary.first
    else:
        top, token = log_p.new_full((len(targets),), -torch.inf), torch.zeros_like(targets)
    if vocabulary.group is not None:
        mine = top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=vocabulary.group)
        token = token.masked_fill(mine < top, torch.iinfo(token.dtype).max)
        dist.all_reduce(token, dist.ReduceOp.MIN, group=vocabulary.group)
    return top.exp(), token == targets


def _share_of_this_part(here: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """log of the probability of this process's part of the vocabulary, (n, 1): from log-softmax here to over all.

    `here` is the log of the sum of exp(logits), (n, 1), or (n, 0) where the part is padding only.
    """
    if not here.shape[1]:
        here = torch.full((len(here), 1), -torch.inf, device=here.device)
    peak = here.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    total = (here - peak).exp()
    dist.all_reduce(total, group=group)
    return here - peak - total.log()


class _Product:
    """Sum over chunks of gradient.T @ inputs, shaped as the weight: float32, or of its type for one chunk alone."""

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
        elif inputs.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # adds bf16 products up in fp32
            torch.ops.aten.addmm.dtype_out(self.total, left, inputs, torch.float32, out=self.total)
        else:
            self.part = torch.empty_like(self.weight) if self.part is None else self.part
            self.total += torch.mm(left, inputs, out=self.part)
