"""What steps did: kept on the device while they run, read by the host for many steps at once, and checked there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.errors import TrainingError
from sdlm_megatron.parallel.groups import Groups


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Numerator over denominator of `diffusion.loss.loss_terms`, over the global batch."""
    slot_loss: list[float | None]
    """Mean loss by slot, nats a target; None where the step had no target in that slot."""
    next_token_loss: float | None
    """Mean loss of the clean tokens with a target, unweighted; None where there was none."""
    targets: int
    """Of blocks."""
    next_token_targets: int
    """Of clean tokens."""
    grad_norm: float
    lr: float
    useful_tokens: int
    """Clean and block tokens of the global batch, padding excluded."""
    documents: int
    visible_pairs: int
    """(query, key) pairs that attention had to look at."""
    stop: bool = False
    """Some process was asked to stop the run when this was read."""


@dataclass(frozen=True)
class QueuedStep:
    """A step that was handed to the device, of this process alone; `read` makes a StepResult of it."""

    step: int
    lr: float
    sums: torch.Tensor | None
    """float32 (micro-batches, 2, 1 + D + 1) on the device: sum and count of the loss terms, by slot, and of clean
    tokens. None where this process has no part in the sum (every process but one of each last stage's TP group)."""
    grad_norm: torch.Tensor
    """float64 scalar on the device."""
    rows: tuple[int, int, int]
    """Useful tokens, documents and visible pairs of this process's micro-batches."""
    numbers: list[int | None]
    """The rows of the run, in micro-batch order."""


def queued_step(
    step: int,
    lr: float,
    seen: Sequence[dict],
    grad_norm: torch.Tensor,
    batches: Sequence[MicroBatch],
    groups: Groups,
    *,
    causal_attn: bool,
) -> QueuedStep:
    """The record of a step, from what forward_backward returned; the host does not wait for the device."""
    sums, rows = None, (0, 0, 0)
    if groups.last_stage and groups.tp_rank == 0:
        sums = torch.stack([torch.cat([part["sums"][:, None], part["slots"]], dim=1) for part in seen])
        pairs = sum(visible_pairs(b.layout, causal_attn=causal_attn) for b in batches)
        rows = (sum(b.layout.used for b in batches), sum(b.layout.n_docs for b in batches), pairs)
    return QueuedStep(step, lr, sums, grad_norm, rows, [b.number for b in batches])


def read(queued: Sequence[QueuedStep], groups: Groups, block_size: int, *, stop: bool = False) -> list[StepResult]:
    """The results of steps, over all processes, which all call it for the same steps; waits for the device.

    `stop`: this process was asked to stop the run; the newest result says whether any process was.

    Raises TrainingError, on every process, for the first step whose loss or gradient norm was not finite. The update
    of that step and of all after it has been made by then: the weights in memory are worth nothing.
    """
    if not queued:
        return []
    width = 1 + max(block_size + 1, 5)
    sums = torch.zeros(len(queued), 3, width, dtype=torch.float64, device=groups.device)
    for total, one in zip(sums, queued, strict=True):
        if one.sums is not None:
            total[:2, : 2 + block_size] = one.sums.double().sum(0)
    sums[:, 2, 1:4] = torch.tensor([one.rows for one in queued], dtype=torch.float64).to(groups.device)
    norms = torch.stack([one.grad_norm for one in queued])
    sums[:, 2, 0] = (~norms.isfinite()).double()  # one process that saw it is enough, all have to stop
    if groups.main:
        sums[:, 2, 4] = norms  # all decide by the same number, even where a broken device made another one
    sums[:, 2, 5] = float(stop)
    dist.all_reduce(sums)
    results = [_result(total, one.lr, block_size) for total, one in zip(sums.tolist(), queued, strict=True)]
    bad = [
        i
        for i, (total, result) in enumerate(zip(sums.tolist(), results, strict=True))
        if total[2][0] or not math.isfinite(result.loss)
    ]
    if bad:
        raise _not_finite(queued[bad[0]], results[bad[0]], groups)
    return results


def _result(sums: Sequence[Sequence[float]], lr: float, block_size: int) -> StepResult:
    (total, *slots), (count, *slot_counts), (_, *rows, norm, stop) = sums[0], sums[1], sums[2][:6]
    means = [t / c if c else None for t, c in zip(slots, slot_counts, strict=True)]
    return StepResult(
        loss=total / count if count else 0.0,
        slot_loss=means[:block_size],
        next_token_loss=means[block_size],
        targets=int(sum(slot_counts[:block_size])),
        next_token_targets=int(slot_counts[block_size]),
        grad_norm=norm,
        lr=lr,
        useful_tokens=int(rows[0]),
        documents=int(rows[1]),
        visible_pairs=int(rows[2]),
        stop=stop > 0,
    )


def _not_finite(queued: QueuedStep, result: StepResult, groups: Groups) -> TrainingError:
    """Names the rows: those with a loss that is not finite, or all of the step if only gradients are bad."""
    mine = [n for n in queued.numbers if n is not None]
    bad = []
    if queued.sums is not None:
        finite = queued.sums[:, :, 0].isfinite().all(1).tolist()
        bad = [n for n, ok in zip(queued.numbers, finite, strict=True) if not ok]
    everyone = groups.gather((bad, mine))
    rows = sorted({r for b, _ in everyone for r in b}) or sorted({r for _, m in everyone for r in m})
    return TrainingError(
        f"step {queued.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite; "
        "the weights in memory are lost",
        f"rows of the run {rows}",
        "start again: training goes on from the last checkpoint; with a lower optimizer.lr, or look at these rows' "
        "documents",
        queued.step,
    )
