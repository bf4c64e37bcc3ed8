"""Attention of a packed row through torch's FlexAttention, its tiles counted from the layout.

Every query sees at most two ranges of keys: clean ones [lo, hi) and, for a block token, its own block's. So a mask of
four integers a query says it all, and which 128 x 128 tiles are empty, partly or fully visible follows from counting:
a range [lo, hi) adds as many visible keys to tile t as [0, hi) less [0, lo) do. No S x S array is ever made.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.row import to_device
from sdlm_megatron.model.attention.contract import RowAttention

TILE = 128
TILES = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
TILES_BACKWARD = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def key_ranges(layout: RowLayout, row_length: int, *, causal_attn: bool) -> np.ndarray:
    """What each query sees: int32 (4, row_length), rows lo, hi, own_lo, own_hi; empty ranges where nothing."""
    n, size = layout.n_clean, layout.block_size
    ranges = np.zeros((4, row_length), dtype=np.int32)
    first = layout.clean_offsets()
    ranges[0, :n] = np.repeat(first, layout.clean_lens)
    ranges[1, :n] = np.arange(n) + 1
    block_first = first[layout.block_documents()]
    ranges[0, n : layout.used] = np.repeat(block_first, size)
    ranges[1, n : layout.used] = np.repeat(block_first + layout.starts, size)
    own = n + np.repeat(np.arange(len(layout.starts)) * size, size)
    ranges[2, n : layout.used] = own
    ranges[3, n : layout.used] = np.arange(n, layout.used) + 1 if causal_attn else own + size
    return ranges


def tile_counts(ranges: np.ndarray) -> np.ndarray:
    """Visible pairs in each tile: int64 (tiles, tiles), [query tile, key tile]."""
    length = ranges.shape[1]
    tiles = -(-length // TILE)
    query_tile = np.arange(length) // TILE
    partial = np.zeros((tiles, tiles + 1), dtype=np.int64)  # pairs in the tile where a range [0, x) ends
    before = np.zeros((tiles, tiles + 1), dtype=np.int64)  # 128 for each tile before it, as differences
    for bounds, sign in ((ranges[0], -1), (ranges[1], 1), (ranges[2], -1), (ranges[3], 1)):
        end = bounds // TILE
        np.add.at(partial, (query_tile, end), sign * (bounds % TILE))
        np.add.at(before[:, 0], query_tile, sign * TILE)
        np.add.at(before, (query_tile, end), -sign * TILE)
    return (partial + before.cumsum(axis=1))[:, :tiles]


class Flex(RowAttention):
    """FlexAttention; on a GPU compiled once, since every row has the same shapes (on a CPU it makes S x S scores)."""

    def __init__(self, layout: RowLayout, row_length: int, *, causal_attn: bool) -> None:
        ranges = key_ranges(layout, row_length, causal_attn=causal_attn)
        counts = tile_counts(ranges)
        full = counts == TILE * TILE
        tiles = [*_listed((counts > 0) & ~full), *_listed(full)]
        tiles_backward = [*_listed(((counts > 0) & ~full).T), *_listed(full.T)]
        self.length = row_length
        self._set(torch.from_numpy(ranges), dict(zip(TILES + TILES_BACKWARD, tiles + tiles_backward, strict=True)))

    def _set(self, ranges: torch.Tensor, tiles: dict[str, Any]) -> None:
        self.ranges, self.tiles = ranges, tiles
        self.mask = BlockMask(
            seq_lengths=(self.length, self.length), BLOCK_SIZE=(TILE, TILE), mask_mod=_mask_mod(ranges), **tiles
        )

    def to(self, device: torch.device) -> Self:
        moved = object.__new__(type(self))
        moved.length = self.length
        moved._set(to_device(self.ranges, device), {key: to_device(x, device) for key, x in self.tiles.items()})
        return moved

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See RowAttention."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attend: Any = _compiled() if q.device.type == "cuda" else flex_attention
        return attend(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(
            0, 1
        )


def _mask_mod(ranges: torch.Tensor) -> Callable[..., torch.Tensor]:
    lo, hi, own_lo, own_hi = ranges

    def seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        clean = (key >= lo[query]) & (key < hi[query])
        return clean | ((key >= own_lo[query]) & (key < own_hi[query]))

    return seen


def _listed(tiles: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (rows, columns) in FlexAttention's form: how many are marked in a row, and which, those first."""
    order = np.argsort(~tiles, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(tiles.sum(1).astype(np.int32))[None, None], torch.from_numpy(order)[None, None]


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    """flex_attention, compiled when a GPU first needs it."""
    return torch.compile(flex_attention, dynamic=False)
