"""Per-step metrics: accumulated on the device, reduced over all processes and read by the host for many steps at once.

A step is queued as a QueuedStep of tensors that the device may still be computing. `read` reduces any number of them
with one all-reduce, waits for the device, and checks that loss and gradient norm are finite.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

from sdlm_megatron.diffusion.loss import LabelRows
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.errors import TrainingError
from sdlm_megatron.metrics.metric_table import device_metrics
from sdlm_megatron.parallel.groups import Groups


@dataclass(frozen=True)
class StepResult:
    """Metrics of one step over the global batch, the same on every rank."""

    loss: float
    """Numerator over denominator of `diffusion.loss.loss_terms`."""
    slot_loss: list[float | None]
    """Mean loss by slot, in nats per target; None for a slot without targets."""
    next_token_loss: float | None
    """Mean unweighted loss of the clean tokens with a target; None without any."""
    targets: int
    """Targets of blocks."""
    next_token_targets: int
    """Targets of clean tokens."""
    grad_norm: float
    lr: float
    useful_tokens: int
    """Clean and block tokens, without padding."""
    documents: int
    visible_pairs: int
    """(query, key) pairs that attention had to compute."""
    running_losses: tuple[float, float] = (0.0, 0.0)
    """`Engine.running_losses` after the step."""
    stop: bool = False
    """Whether any process had been asked to stop the run when the step was read."""
    measured: dict[str, float] = field(default_factory=dict)
    """Device metrics of metrics/metric_table.py by field name; empty for steps that did not measure."""
    rank_seconds: list[float] = field(default_factory=list, compare=False)
    """Newest result only: compute time of each rank before the gradient reduction, in seconds per step, as the mean of
    all steps that were read together; see device.StepClock."""

    def fields(self) -> dict[str, float]:
        """Losses and device metrics as fields of a log record. Slots without a target are left out, not 0."""
        fields = {"loss": self.loss}
        fields |= {f"loss_pos_{i}": loss for i, loss in enumerate(self.slot_loss, 1) if loss is not None}
        if self.next_token_loss is not None:
            fields["loss_next_token"] = self.next_token_loss
        return fields | self.measured


@dataclass(frozen=True)
class QueuedStep:
    """Tensors of one step on this process, which the device may still be computing; `read` makes a StepResult."""

    step: int
    lr: float
    sums: torch.Tensor | None
    """float32 (micro-batches, 2, 1 + D + 1) on the device: sum and count of the loss terms, of each slot, and of clean
    tokens. None on processes whose sums do not count: all but the first TP rank of each last stage."""
    metrics: torch.Tensor | None
    """float32 (2, fields of the device metrics) on the device, over the micro-batches; None where `sums` is, and for
    steps that did not measure."""
    grad_norm: torch.Tensor
    """float64 scalar on the device."""
    running_losses: torch.Tensor
    """float64 (2,) on the device: `Engine.running_losses` after the step; 0 on all processes but one."""
    rows: tuple[int, int, int]
    """Useful tokens, documents and visible pairs of this process's micro-batches."""
    rows_of_documents: list[tuple[int, ...]]
    """Of each micro-batch, the number of the row of the run that each of its documents comes from."""
    documents: list[np.ndarray]
    """Of each micro-batch, int32 (docs,), the number of each document in the dataset."""
    targets: list[tuple[torch.Tensor, np.ndarray]]
    """Of each micro-batch, where `sums` is: loss of each label row, float (N,) on the device, and its document's index
    in the micro-batch, int64 (N,), -1 for none."""
    seconds: Callable[[], float]
    """Compute time before the gradient reduction, in seconds; see device.StepClock."""


def measure(rows: LabelRows) -> torch.Tensor:
    """The device metrics of one micro-batch: float32 (2, fields) of sums (or maxima) and counts."""
    return torch.cat([metric.measure(rows) for metric in device_metrics() if metric.measure is not None], dim=1)


def _sum_fields(block_size: int) -> int:
    """Number of leading metric fields that are summed; the remaining ones are maxima."""
    return sum(len(metric.fields(block_size)) for metric in device_metrics() if metric.reduction != "max")


def _combine(parts: Sequence[torch.Tensor], block_size: int) -> torch.Tensor:
    """Metrics (2, fields) of several micro-batches or steps as those of all of them."""
    together, summed = torch.stack(list(parts)), _sum_fields(block_size)
    total = together.sum(0)
    total[0, summed:] = together[:, 0, summed:].amax(0)
    return total


def joined(parts: Sequence[QueuedStep], block_size: int) -> QueuedStep:
    """Several queued steps as one, over the micro-batches of all."""
    sums = [part.sums for part in parts if part.sums is not None]
    metrics = [part.metrics for part in parts if part.metrics is not None]
    useful, documents, pairs = (sum(part.rows[i] for part in parts) for i in range(3))
    return replace(
        parts[0],
        sums=torch.cat(sums) if sums else None,
        metrics=_combine(metrics, block_size) if metrics else None,
        rows=(useful, documents, pairs),
        rows_of_documents=[rows for part in parts for rows in part.rows_of_documents],
        documents=[numbers for part in parts for numbers in part.documents],
        targets=[],
    )


def queued_step(
    step: int,
    lr: float,
    outputs: Sequence[dict[str, torch.Tensor]],
    grad_norm: torch.Tensor,
    batches: Sequence[MicroBatch],
    groups: Groups,
    *,
    causal_attn: bool,
    seconds: Callable[[], float] = float,  # 0.0
    running_losses: torch.Tensor | None = None,
) -> QueuedStep:
    """The QueuedStep of what forward_backward returned for each micro-batch. The host does not wait for the device."""
    sums, metrics, rows, targets = None, None, (0, 0, 0), []
    # the ranks of a TP group hold the same numbers: one of them counts
    if groups.last_stage and groups.tp_rank == 0:
        # under context parallelism each has the targets of its part of a row; the first counts the row itself
        sums = torch.stack([torch.cat([part["sums"][:, None], part["slots"]], dim=1) for part in outputs])
        if "metrics" in outputs[0]:
            metrics = _combine([part["metrics"] for part in outputs], sums.shape[2] - 2)
        pairs = sum(visible_pairs(b.layout, causal_attn=causal_attn) for b in batches)
        if groups.cp_rank == 0:
            rows = (sum(b.layout.used for b in batches), sum(b.layout.n_docs for b in batches), pairs)
        targets = [(part["nll"], b.label_documents) for part, b in zip(outputs, batches, strict=True)]
    if sums is None or groups.dp_cp_rank or running_losses is None:
        running_losses = torch.zeros(2, dtype=torch.float64, device=groups.device)
    origin = [b.rows for b in batches], [b.layout.doc_ids for b in batches]
    return QueuedStep(step, lr, sums, metrics, grad_norm, running_losses, rows, *origin, targets, seconds)


def read(
    queued: Sequence[QueuedStep], groups: Groups, block_size: int, *, stop: bool = False, check: bool = True
) -> list[StepResult]:
    """The results of queued steps over all processes, which all call it for the same steps. Waits for the device.

    Args:
        stop: whether this process was asked to stop the run; the newest result says whether any process was.
        check: raise TrainingError for results that are not finite.

    Raises:
        TrainingError: on every process, for the first step whose loss or gradient norm is not finite. The updates of
            that step and of all steps after it have been made by then: the weights in memory must not be used.
    """
    if not queued:
        return []
    device, summed = groups.device, _sum_fields(block_size)
    rows = torch.tensor([step.rows for step in queued], dtype=torch.float64).to(device)
    norms = torch.stack([step.grad_norm for step in queued])
    flags = torch.zeros(len(queued), 3, dtype=torch.float64, device=device)
    flags[:, 0] = (~norms.isfinite()).double()  # all processes must stop even if only one saw it
    if groups.main:
        flags[:, 1] = norms  # all decide by the same number, also if a faulty device computed another one
    flags[:, 2] = float(stop)
    losses = torch.stack([_loss_sums(step, block_size, device) for step in queued])
    metrics = torch.stack([_metric_sums(step, block_size, device) for step in queued])
    maxima = metrics[:, 0, summed:].clone()  # an all-reduce of their own: the others are summed
    metrics[:, 0, summed:] = 0.0
    seconds = torch.zeros(groups.world_size, dtype=torch.float64)
    # each rank fills its own place, so that the sum over ranks is the list of all
    seconds[groups.rank] = sum(step.seconds() for step in queued) / len(queued)
    # one all-reduce for everything: its latency counts, not its size
    running = torch.stack([step.running_losses for step in queued])
    parts = [losses, metrics, rows, flags, running, seconds.to(device)]
    shared = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(shared)
    if maxima.numel():
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
    split = shared.split([part.numel() for part in parts])
    losses, metrics, rows, flags, running, seconds = (x.view_as(part) for x, part in zip(split, parts, strict=True))
    metrics[:, 0, summed:] = maxima
    reduced = [x.tolist() for x in (losses, metrics, rows, flags, running)]
    results = [_result(step.lr, block_size, *sums) for step, *sums in zip(queued, *reduced, strict=True)]
    results[-1] = replace(results[-1], rank_seconds=seconds.tolist())
    if check:
        for step, result, (not_finite, *_) in zip(queued, results, flags.tolist(), strict=True):
            if not_finite or not math.isfinite(result.loss):
                raise _not_finite_error(step, result, groups)
    return results


def _loss_sums(step: QueuedStep, block_size: int, device: torch.device) -> torch.Tensor:
    """float64 (2, 1 + D + 1): this process's loss sums and counts of a step."""
    if step.sums is None:
        return torch.zeros(2, block_size + 2, dtype=torch.float64, device=device)
    return step.sums.double().sum(0)


def _metric_sums(step: QueuedStep, block_size: int, device: torch.device) -> torch.Tensor:
    """float64 (2, fields): this process's device metrics of a step, with the neutral element where it has none."""
    if step.metrics is not None:
        return step.metrics.double()
    width = sum(len(metric.fields(block_size)) for metric in device_metrics())
    neutral = torch.zeros(2, width, dtype=torch.float64, device=device)
    neutral[0, _sum_fields(block_size) :] = -math.inf
    return neutral


def _result(
    lr: float,
    block_size: int,
    losses: Sequence[Sequence[float]],
    metrics: Sequence[Sequence[float]],
    rows: Sequence[float],
    flags: Sequence[float],
    running: Sequence[float],
) -> StepResult:
    """A StepResult from sums over all processes."""
    (total, *slots), (count, *slot_counts) = losses
    means = [slot / targets if targets else None for slot, targets in zip(slots, slot_counts, strict=True)]
    return StepResult(
        loss=total / count if count else 0.0,
        slot_loss=means[:block_size],
        next_token_loss=means[block_size],
        targets=int(sum(slot_counts[:block_size])),
        next_token_targets=int(slot_counts[block_size]),
        grad_norm=flags[1],
        lr=lr,
        useful_tokens=int(rows[0]),
        documents=int(rows[1]),
        visible_pairs=int(rows[2]),
        running_losses=(running[0], running[1]),
        stop=flags[2] > 0,
        measured=_measured(block_size, *metrics),
    )


def _measured(block_size: int, values: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """Device metrics by field; fields that nothing was counted for are left out."""
    names = [(metric, name) for metric in device_metrics() for name in metric.fields(block_size)]
    return {
        name: value / count if metric.reduction == "mean" else value
        for (metric, name), value, count in zip(names, values, counts, strict=True)
        if count
    }


@dataclass(frozen=True, order=True)
class DocumentLoss:
    """A document of a step."""

    loss: float
    """Mean over its targets."""
    row: int
    """Number of the row of the run that it comes from."""
    document: int
    """Number in the dataset."""


def document_losses(queued: QueuedStep, groups: Groups) -> list[DocumentLoss]:
    """The documents of a step that have a target, by ascending loss, the same on all processes, which all call it.

    Waits for the device."""
    local: list[tuple[list[int], float, int]] = []
    where = zip(queued.targets, queued.rows_of_documents, queued.documents, strict=bool(queued.targets))
    for micro_batch, ((nll, owners), rows, numbers) in enumerate(where):
        values, real = nll.double().cpu().numpy(), owners >= 0
        sums = np.bincount(owners[real], values[real], len(rows))
        counts = np.bincount(owners[real], minlength=len(rows))
        local += [
            ([groups.dp_rank, micro_batch, i, row, int(number)], total, count)
            for i, (total, count, row, number) in enumerate(
                zip(sums.tolist(), counts.tolist(), rows, numbers, strict=True)
            )
            if count
        ]
    whole: dict[tuple[int, ...], list[tuple[float, int]]] = {}  # context parallelism splits documents over ranks
    for part in groups.gather(local):
        for place, total, count in part:
            whole.setdefault(tuple(place), []).append((total, count))
    means = ((sum(t for t, _ in parts) / sum(n for _, n in parts), *place[3:]) for place, parts in whole.items())
    losses = [DocumentLoss(*fields) for fields in means]
    return sorted(losses, key=lambda document: (not math.isfinite(document.loss), document))


def _not_finite_error(queued: QueuedStep, result: StepResult, groups: Groups) -> TrainingError:
    """The error for a step, with the rows that have a document whose loss is not finite, or all of its rows if only
    gradients are bad."""
    documents = document_losses(queued, groups)
    bad = [document for document in documents if not math.isfinite(document.loss)]
    named = sorted({document.row for document in bad or documents})
    numbers = f", documents {sorted({document.document for document in bad})}" if bad else ""
    return TrainingError(
        f"step {queued.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite; "
        "the weights in memory are lost",
        f"rows of the run {named}{numbers}",
        "start again to resume from the last checkpoint; use a lower optimizer.lr, or inspect the documents of "
        "these rows",
        queued.step,
    )
