"""The loss in numbers: negative log likelihoods of the targets, summed over everything and by slot."""

import torch

from sdlm_megatron.diffusion.layout import IGNORE


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
