"""Attention of a packed row: the contract that every backend keeps.

A `RowAttention` is built once for each row from its layout, moved to the device, then called by every layer with that
layer's q, k, v. The backends are in the modules attention_*; attention_choice picks one, core_attention hands it to
Megatron-Core.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch


class RowAttention(ABC):
    """Attention over one packed row: who sees whom is `diffusion.mask.visible_row`, forward and backward exact.

    A backend's constructor takes the row's layout and works on the host only, so it can run in a data loader;
    nothing after `to` waits for the device.
    """

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """A copy whose index tensors are on `device`."""

    @abstractmethod
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q (S, heads, d), k and v (S, kv_heads, d) of one dtype -> (S, heads, d); padding gives zeros.

        The result depends on q, k and v even in a row of padding only: every rank runs every backward collective.
        """
