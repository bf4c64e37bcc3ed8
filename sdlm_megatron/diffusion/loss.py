"""Loss and metrics of a micro-batch, as sums on the device that the engine adds up over micro-batches and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdlm_megatron.diffusion.decode_rules import confident_prefix
from sdlm_megatron.diffusion.layout import IGNORE
from sdlm_megatron.diffusion.row import MicroBatch


def slot_sums(nll: torch.Tensor, targets: torch.Tensor, slots: torch.Tensor, n_slots: int) -> torch.Tensor:
    """Sum and count of the losses by slot: float32 (2, n_slots). The host does not wait for the device.

    Args:
        nll: float (N,), negative log likelihood of each label row, nats.
        targets: int64 (N,), IGNORE where there is none.
        slots: int64 (N,), slot 0..D-1 of each label row, D for a clean token.
        n_slots: D, or D + 1 to count clean tokens as well.
    """
    real = (targets != IGNORE).float()
    both = torch.stack([nll.detach().float() * real, real])
    return torch.zeros(2, n_slots, dtype=torch.float32, device=nll.device).index_add_(1, slots, both)


BALANCE_DECAY, MOST_BALANCE = 0.99, 10.0
"""Share of the running sums of losses that a step keeps: they cover about 100 steps. Limit of their ratio."""


def balanced_weights(
    weights: torch.Tensor, slots: torch.Tensor, block_size: int, running: torch.Tensor
) -> torch.Tensor:
    """Weights float32 (N,) of label rows, those of clean tokens scaled so that the two parts of the loss are balanced.

    The factor is the ratio of the running sums, from 1 / MOST_BALANCE to MOST_BALANCE, and 1 before the first step.
    The limits keep a loss near 0 from being amplified without bound. The host does not wait for the device.

    Args:
        weights: float32 (N,), `MicroBatch.label_weights`.
        slots: int64 (N,), slot of each label row, D for a clean token.
        block_size: D.
        running: float64 (2,), running sums of the losses of block targets and of clean targets before this step.
    """
    ratio = (running[0] / running[1]).clamp(1 / MOST_BALANCE, MOST_BALANCE)
    ratio = torch.where(running.min() > 0, ratio, 1.0).float()  # 0 / 0 before the first step
    return torch.where(slots == block_size, weights * ratio, weights)


def loss_terms(
    total: torch.Tensor, batch: MicroBatch, block_size: int, *, by_row: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator (float, differentiable) and denominator (int32) that a micro-batch adds to the loss of the step.

    The loss of the step is the sum of the numerators over the sum of the denominators, over all micro-batches and
    data-parallel ranks:

    - by_row=False: sum of the losses and number of block targets, so the loss is a mean over the targets of the
      global batch;
    - by_row=True: the mean over the row's own targets, and 1, so the loss is a mean of rows' means. It is the nearest
      equivalent of the reference code, which averages over each rank's micro-batch.

    Targets of clean tokens add their weighted losses to the numerator and are not counted. The terms of a row's shards
    add up to those of the row.

    Args:
        total: float (), sum of the weighted losses of the row's targets; 0 for a row without targets.
        batch: the row, or a shard of it.
        block_size: D.
    """
    if by_row and batch.shard:
        first = batch.row_targets > 0 and batch.shard.rank == 0  # a row counts once
        return total / max(1, batch.row_targets), torch.full_like(batch.label_targets[0], first, dtype=torch.int32)
    count = ((batch.label_targets != IGNORE) & (batch.label_slots < block_size)).sum()
    if by_row:
        return total / count.clamp(min=1), (count > 0).int()
    return total, count.int()


@dataclass(frozen=True)
class LabelRows:
    """Per-target results of one micro-batch on the last pipeline stage, on the device: the input of device metrics.

    Its methods return float32 (2, fields): sums in row 0, counts in row 1. The host does not wait for the device.
    """

    batch: MicroBatch
    nll: torch.Tensor
    """float32 (N,): negative log-likelihood of each target, in nats."""
    confidence: torch.Tensor
    """float32 (N,): probability of the most likely token."""
    correct: torch.Tensor
    """bool (N,): that token is the target."""
    block_size: int

    def by_slot(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of `values` float32 (N,) over the targets of each slot, clean tokens last: fields = D + 1."""
        return slot_sums(values, self.batch.label_targets, self.batch.label_slots, self.block_size + 1)

    def host_value(self, total: float, count: float = 1.0) -> torch.Tensor:
        """A value that the host knows, such as a size: fields = 1."""
        # filled on the device: a tensor made from host numbers would make the host wait for the copy
        return torch.stack([self.nll.new_full((1,), total), self.nll.new_full((1,), count)])

    def accepted_length(self, thresholds: Sequence[float]) -> torch.Tensor:
        """Tokens that decoding would accept of each block, by threshold, and the number of blocks with a target.

        A block in training is a decoding window with a correct context, so its confidences are those of a decoding
        pass. Decoding accepts the longest prefix of slots with a confidence above the threshold, at least the first
        slot. The prefix ends where the targets end, because decoding drops tokens after the end of a turn.
        """
        targets, slots = self.batch.label_targets, self.batch.label_slots
        n_blocks, size = self.batch.n_blocks, self.block_size
        in_block = (targets != IGNORE) & (slots < size)
        # label rows outside of blocks go to an extra row and column, which are cut off: no mask, so no host wait
        block = torch.where(in_block, (self.batch.label_index - self.batch.n_clean) // size, n_blocks)
        table = torch.zeros(n_blocks + 1, size + 1, dtype=torch.float32, device=self.confidence.device)
        table.index_put_((block, slots), self.confidence)
        table = table[:n_blocks, :size]
        counts = table[:, :1] > 0  # a probability is above 0, slots without a target stay 0
        lengths = [(confident_prefix(table, tau, product=False) * counts[:, 0]).sum() for tau in thresholds]
        return torch.stack([torch.stack(lengths).float(), counts.sum().float().expand(len(thresholds))])
