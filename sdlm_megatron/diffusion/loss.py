"""Loss and measures of a micro-batch, as sums on the device that the engine adds up over micro-batches and ranks."""

import torch

from sdlm_megatron.diffusion.decode_rules import confident_prefix
from sdlm_megatron.diffusion.layout import IGNORE

TAUS = (0.9, 0.98)
"""Thresholds at which the accepted length is reported."""


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


def loss_terms(
    total: torch.Tensor, targets: torch.Tensor, slots: torch.Tensor, block_size: int, *, by_row: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator (float, differentiable) and denominator (int32) that a micro-batch adds to the loss of the step.

    The loss of the step is the sum of the numerators over the sum of the denominators, over all micro-batches and
    data-parallel ranks:

    - by_row=False: sum of the losses and number of block targets, so the loss is a mean over the targets of the
      global batch;
    - by_row=True: the mean over the row's own targets, and 1, so the loss is a mean of rows' means. It is the nearest
      equivalent of the reference code, which averages over each rank's micro-batch.

    Targets of clean tokens add their weighted losses to the numerator and are not counted.

    Args:
        total: float (), sum of the weighted losses of the row's targets; 0 for a row without targets.
        targets: int64 (N,), IGNORE where there is none.
        slots: int64 (N,), slot of each label row, D for a clean token.
        block_size: D.
    """
    count = ((targets != IGNORE) & (slots < block_size)).sum()
    if by_row:
        return total / count.clamp(min=1), (count > 0).int()
    return total, count.int()


def slot_measures(
    confidence: torch.Tensor,
    correct: torch.Tensor,
    targets: torch.Tensor,
    slots: torch.Tensor,
    blocks: torch.Tensor,
    *,
    n_blocks: int,
    block_size: int,
) -> torch.Tensor:
    """Accuracy, confidence and accepted length of a row's blocks: float32 (3, D + 2). No host synchronization.

    A block in training equals a window of decoding whose past is correct, so its confidences are those of a decoding
    pass and give the prefix that prob_conf would keep. That prefix ends with the block's targets at the latest:
    decoding drops tokens after the end of a turn.

    Args:
        confidence: float32 (N,), probability of the most likely token of each label row.
        correct: bool (N,), whether that token is the target.
        targets: int64 (N,), IGNORE where there is none.
        slots: int64 (N,), slot of each label row, D for a clean token.
        blocks: int64 (N,), block of each label row; ignored for clean tokens.
        n_blocks: blocks of the row.
        block_size: D.

    Returns:
        Row 0: number of correct targets by slot, clean tokens in column D. Row 1: sum of confidences, likewise.
        Row 2: sum of the accepted lengths at each threshold in TAUS, then the number of blocks with a target.
    """
    real = targets != IGNORE
    both = torch.stack([(correct & real).float(), confidence * real])
    sums = torch.zeros(3, block_size + 2, dtype=torch.float32, device=confidence.device)
    sums[:2].index_add_(1, slots, both)
    # label rows that are no block targets go to a row and a column of their own: boolean indexing would synchronize
    block = torch.where(real & (slots < block_size), blocks, n_blocks)
    table = torch.zeros(n_blocks + 1, block_size + 1, dtype=torch.float32, device=confidence.device)
    table.index_put_((block, slots), confidence)
    table = table[:n_blocks, :block_size]
    has_target = table[:, :1] > 0  # a probability is above 0, slots without a target stay 0
    for i, tau in enumerate(TAUS):
        sums[2, i] = (confident_prefix(table, tau, product=False) * has_target[:, 0]).sum()
    sums[2, len(TAUS)] = has_target.sum()
    return sums
