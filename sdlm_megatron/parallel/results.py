"""What steps did: kept on the device while they run, read by the host for many steps at once, and checked there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from sdlm_megatron.diffusion.loss import TAUS
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
    measures: "Measures | None" = None
    """Of steps that were asked to measure."""
    rank_seconds: list[float] = field(default_factory=list, compare=False)
    """Of the newest result: seconds that each rank computed before the reduction of gradients, mean of all steps read
    together; see device.StepClock."""

    def learned(self) -> dict[str, float]:
        """Losses and measures as fields of a log record; slots without a target are left out, not written as 0."""
        found = {"loss": self.loss}
        found |= {f"loss_pos_{i}": x for i, x in enumerate(self.slot_loss, 1) if x is not None}
        if self.next_token_loss is not None:
            found["loss_next_token"] = self.next_token_loss
        if self.measures is not None:
            for name, (*slots, clean) in (
                ("accuracy", self.measures.accuracy),
                ("confidence", self.measures.confidence),
            ):
                found |= {f"{name}_pos_{i}": x for i, x in enumerate(slots, 1) if x is not None}
                found |= {f"{name}_next_token": clean} if clean is not None else {}
            found |= {f"accepted_{tau:g}": x for tau, x in self.measures.accepted.items()}
        return found


@dataclass(frozen=True)
class Measures:
    """How sure and how right a step was, before its update; see `diffusion.loss.slot_measures`."""

    accuracy: list[float | None]
    """Share of the targets that were the likeliest token, by slot, clean tokens last; None without any target."""
    confidence: list[float | None]
    """Mean probability of the likeliest token, the same way."""
    accepted: dict[float, float]
    """Mean tokens that decoding would keep of a block whose past is right, by threshold."""

    @classmethod
    def of(cls, sums: Sequence[Sequence[float]], counts: Sequence[float]) -> "Measures":
        """From the sums of `slot_measures` and the targets by slot."""
        right, sure, (*kept, blocks) = sums[0], sums[1], sums[2][: len(TAUS) + 1]
        return cls(
            accuracy=_means(right, counts),
            confidence=_means(sure, counts),
            accepted={tau: total / blocks for tau, total in zip(TAUS, kept, strict=True)} if blocks else {},
        )


@dataclass(frozen=True)
class QueuedStep:
    """A step that was handed to the device, of this process alone; `read` makes a StepResult of it."""

    step: int
    lr: float
    sums: torch.Tensor | None
    """float32 (micro-batches, 2, 1 + D + 1) on the device: sum and count of the loss terms, by slot, and of clean
    tokens. None where this process has no part in the sum (every process but one of each last stage's TP group)."""
    measured: torch.Tensor | None
    """float32 (3, D + 2) on the device, of `slot_measures`; None where `sums` is, or if nobody asked."""
    grad_norm: torch.Tensor
    """float64 scalar on the device."""
    rows: tuple[int, int, int]
    """Useful tokens, documents and visible pairs of this process's micro-batches."""
    numbers: list[int | None]
    """The rows of the run, in micro-batch order."""
    seconds: Callable[[], float]
    """Computing time before the reduction of gradients; see device.StepClock."""


def joined(parts: Sequence[QueuedStep]) -> QueuedStep:
    """Several as one, whose result is over the micro-batches of all."""
    sums = [p.sums for p in parts if p.sums is not None]
    measured = [p.measured for p in parts if p.measured is not None]
    useful, documents, pairs = (sum(p.rows[i] for p in parts) for i in range(3))
    return replace(
        parts[0],
        sums=torch.cat(sums) if sums else None,
        measured=torch.stack(measured).sum(0) if measured else None,
        rows=(useful, documents, pairs),
        numbers=[n for p in parts for n in p.numbers],
    )


def queued_step(
    step: int,
    lr: float,
    seen: Sequence[dict],
    grad_norm: torch.Tensor,
    batches: Sequence[MicroBatch],
    groups: Groups,
    *,
    causal_attn: bool,
    seconds: Callable[[], float] = float,  # 0.0
) -> QueuedStep:
    """The record of a step, from what forward_backward returned; the host does not wait for the device."""
    sums, measured, rows = None, None, (0, 0, 0)
    if groups.last_stage and groups.tp_rank == 0:
        sums = torch.stack([torch.cat([part["sums"][:, None], part["slots"]], dim=1) for part in seen])
        if "measured" in seen[0]:
            measured = torch.stack([part["measured"] for part in seen]).sum(0)
        pairs = sum(visible_pairs(b.layout, causal_attn=causal_attn) for b in batches)
        rows = (sum(b.layout.used for b in batches), sum(b.layout.n_docs for b in batches), pairs)
    return QueuedStep(step, lr, sums, measured, grad_norm, rows, [b.number for b in batches], seconds)


def read(
    queued: Sequence[QueuedStep], groups: Groups, block_size: int, *, stop: bool = False, check: bool = True
) -> list[StepResult]:
    """The results of steps, over all processes, which all call it for the same steps; waits for the device.

    `stop`: this process was asked to stop the run; the newest result says whether any process was.

    Raises TrainingError, on every process, for the first step whose loss or gradient norm was not finite. The update
    of that step and of all after it has been made by then: the weights in memory are worth nothing. Not with
    `check` off.
    """
    if not queued:
        return []
    width = 1 + max(block_size + 1, 5)
    sums = torch.zeros(len(queued), 6, width, dtype=torch.float64, device=groups.device)
    for total, one in zip(sums, queued, strict=True):
        if one.sums is not None:
            total[:2, : 2 + block_size] = one.sums.double().sum(0)
        if one.measured is not None:
            total[3:, : 2 + block_size] = one.measured
    sums[:, 2, 1:4] = torch.tensor([one.rows for one in queued], dtype=torch.float64).to(groups.device)
    norms = torch.stack([one.grad_norm for one in queued])
    sums[:, 2, 0] = (~norms.isfinite()).double()  # one process that saw it is enough, all have to stop
    if groups.main:
        sums[:, 2, 4] = norms  # all decide by the same number, even where a broken device made another one
    sums[:, 2, 5] = float(stop)
    seconds = torch.zeros(groups.world_size, dtype=torch.float64)
    seconds[groups.rank] = sum(one.seconds() for one in queued) / len(queued)
    shared = torch.cat([sums.flatten(), seconds.to(groups.device)])
    dist.all_reduce(shared)
    sums, seconds = shared[: sums.numel()].view_as(sums), shared[sums.numel() :]
    results = [_result(total, one.lr, block_size) for total, one in zip(sums.tolist(), queued, strict=True)]
    results[-1] = replace(results[-1], rank_seconds=seconds.tolist())
    bad = [
        i
        for i, (total, result) in enumerate(zip(sums.tolist(), results, strict=True))
        if check and (total[2][0] or not math.isfinite(result.loss))
    ]
    if bad:
        raise _not_finite(queued[bad[0]], results[bad[0]], groups)
    return results


def _result(sums: Sequence[Sequence[float]], lr: float, block_size: int) -> StepResult:
    (total, *slots), (count, *slot_counts) = sums[:2]
    (_, *rows, norm, stop), measured = sums[2][:6], sums[3:]
    means = _means(slots, slot_counts)
    asked = any(measured[1])  # no row with a target has a confidence of 0
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
        measures=Measures.of(measured, slot_counts[: block_size + 1]) if asked else None,
    )


def _means(totals: Sequence[float], counts: Sequence[float]) -> list[float | None]:
    return [total / count if count else None for total, count in zip(totals, counts, strict=False)]


def row_losses(queued: QueuedStep, groups: Groups) -> list[tuple[int, float]]:
    """Each row of a step, by its number in the run, and its own loss, ascending; all processes call it."""
    mine = []
    if queued.sums is not None:
        sums = queued.sums[:, :, 0].tolist()
        mine = [(n, t / c) for n, (t, c) in zip(queued.numbers, sums, strict=True) if n is not None and c]
    return sorted((row for rows in groups.gather(mine) for row in rows), key=lambda row: row[1])


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
