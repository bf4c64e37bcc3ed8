"""Contract of an attention backend over a packed row; `choice` picks a backend, `model.gpt` applies it per layer."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from sdlm_megatron.diffusion.row import to_device


class RowAttention(ABC):
    """Attention over one packed row with the visibility of `diffusion.mask.visible_row`, exact forward and backward.

    Built once per row from its layout, moved to the device, then called by each layer. The constructor works on the
    host only, so it can run in a data loader; nothing after `to` waits for the device.
    """

    def to(self, device: torch.device) -> Self:
        """A copy whose index tensors are on `device`."""
        moved = copy.copy(self)
        vars(moved).update({name: to_device(value, device) for name, value in vars(self).items()})
        return moved

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (S, heads, d), k and v (S, kv_heads, d) of one dtype -> (S, heads, d), zero at padding.

        The result depends on q, k and v in the autograd graph even for a row of padding only, because every rank has
        to take part in every collective of the backward pass.
        """


BuildAttention = Callable[[Any, int], RowAttention]
"""Builds the attention of a row, on the host, from its RowLayout and length; under context parallelism from this rank's
RowShard and its length."""
