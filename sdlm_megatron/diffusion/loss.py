"""The loss in numbers: negative log likelihoods of the targets, summed over everything and by slot."""

import torch

from sdlm_megatron.diffusion.decode_rules import sure_prefix
from sdlm_megatron.diffusion.layout import IGNORE

TAUS = (0.9, 0.98)
"""Thresholds that the accepted length is told for."""


def slot_sums(nll: torch.Tensor, targets: torch.Tensor, slots: torch.Tensor, n_slots: int) -> torch.Tensor:
    """Sum and count of the losses by slot: float32 (2, n_slots), no host synchronisation.

    Args:
        nll: float (N,) negative log likelihoods in nats.
        targets: int64 (N,), IGNORE where there is none.
        slots: int64 (N,) slot of each.
        n_slots: D, or D + 1 where clean tokens are counted too, which have slot D.
    """
    real = (targets != IGNORE).float()
    both = torch.stack([nll.detach().float() * real, real])
    return torch.zeros(2, n_slots, dtype=torch.float32, device=nll.device).index_add_(1, slots, both)


def loss_terms(
    total: torch.Tensor, targets: torch.Tensor, slots: torch.Tensor, block_size: int, *, by_row: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator (float, differentiable) and denominator (int32) of a micro-batch's part of the loss.

    The step's loss is the sum of the numerators over the sum of the denominators, over all micro-batches and
    data-parallel ranks:
    - by_row=False: sum of the losses over the number of targets, the mean over all targets of the global batch;
    - by_row=True: the row's own mean over 1, the mean of the rows' means, as the reference weighs its
      micro-batches.

    Targets of clean tokens add their weighted losses and are not counted.

    Args:
        total: float (), sum of the weighted losses of the row's targets, 0 for a row without any.
        targets: int64 (N,), IGNORE where there is none.
        slots: int64 (N,) slot of each, D for a clean token.
    """
    count = ((targets != IGNORE) & (slots < block_size)).sum()
    if by_row:
        return total / count.clamp(min=1), (count > 0).int()
    return total, count.int()


def slot_measures(
    sure: torch.Tensor,
    right: torch.Tensor,
    targets: torch.Tensor,
    slots: torch.Tensor,
    blocks: torch.Tensor,
    *,
    n_blocks: int,
    block_size: int,
) -> torch.Tensor:
    """What decoding would make of a row whose every block follows the true tokens: float32 (3, D + 2), no host sync.

    A block in training is a window of decoding whose past is right, so its confidences are those of a decoding pass,
    and the prefix that decoding would keep can be read off: every slot in it surer than the threshold, the first
    always. It ends where the targets end (decoding drops what follows the end of a turn).

    Args:
        sure: float32 (N,), probability of the likeliest token.
        right: bool (N,), whether that is the target.
        targets: int64 (N,), IGNORE where there is none.
        slots: int64 (N,), slot of each, D for a clean token.
        blocks: int64 (N,), block of each; of a clean token it may be anything.

    Returns:
        Row 0: targets that were the likeliest token, by slot, clean tokens last. Row 1: sum of the confidences, the
        same way. Row 2: sum of the kept prefixes' lengths for each of TAUS, then the number of blocks with a target.
    """
    real = targets != IGNORE
    both = torch.stack([(right & real).float(), sure * real])
    found = torch.zeros(3, block_size + 2, dtype=torch.float32, device=sure.device)
    found[:2].index_add_(1, slots, both)
    # what is no target of a block goes to a row and a column of their own
    block = torch.where(real & (slots < block_size), blocks, n_blocks)
    table = torch.zeros(n_blocks + 1, block_size + 1, dtype=torch.float32, device=sure.device)
    table.index_put_((block, slots), sure)
    table = table[:n_blocks, :block_size]
    counts = table[:, :1] > 0
    for i, tau in enumerate(TAUS):
        found[2, i] = (sure_prefix(table, tau, product=False) * counts[:, 0]).sum()
    found[2, len(TAUS)] = counts.sum()
    return found
