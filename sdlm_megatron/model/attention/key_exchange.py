"""Exchange of the clean tokens' keys and values between the ranks of context parallelism, and of their gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sdlm_megatron.diffusion.shard import RowShard


@dataclass(frozen=True)
class KeyExchange:
    """Collectives over the ranks that share a row; all of them call each function in the same order.

    A message holds keys and values together, (padded, 2, kv_heads, d).
    """

    group: Any
    size: int
    n_local: int
    """Clean tokens of this rank."""
    padded: int
    """Most clean tokens of any rank."""
    order: Tensor
    """int64 (n_clean,): place of each clean token of the row among the messages of all ranks, `padded` places each."""

    def gather(self, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Starts to send k and v (n_local, kv_heads, d); the function returned waits for those of all clean tokens.

        They come in the order of the row, (n_clean, kv_heads, d).
        """
        message = k.new_zeros(self.padded, 2, *k.shape[1:])
        message[: self.n_local, 0], message[: self.n_local, 1] = k, v
        gathered = k.new_empty(self.size * self.padded, 2, *k.shape[1:])
        work = dist.all_gather_into_tensor(gathered, message, group=self.group, async_op=True)

        def arrive() -> tuple[Tensor, Tensor]:
            work.wait()
            return gathered[:, 0][self.order], gathered[:, 1][self.order]

        return arrive

    def reduce(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's (n_local, kv_heads, d) of the sums over all ranks of dk and dv (n_clean, kv_heads, d)."""
        message = dk.new_zeros(self.size * self.padded, 2, *dk.shape[1:])
        message[self.order, 0], message[self.order, 1] = dk, dv
        own = dk.new_empty(self.padded, 2, *dk.shape[1:])
        dist.reduce_scatter_tensor(own, message, group=self.group)
        return own[: self.n_local, 0], own[: self.n_local, 1]


def key_exchange(shard: RowShard, group: Any) -> KeyExchange:
    """The exchange of a row's clean tokens over `group`."""
    by_rank = shard.clean_by_rank()
    padded = max(len(tokens) for tokens in by_rank)
    order = np.empty(shard.layout.n_clean, dtype=np.int64)
    for rank, tokens in enumerate(by_rank):
        order[tokens] = rank * padded + np.arange(len(tokens))
    return KeyExchange(group, shard.size, shard.n_clean, padded, torch.from_numpy(order))
