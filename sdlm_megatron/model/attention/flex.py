"""Attention of a packed row through torch's FlexAttention, with its tiles counted from the layout.

Each query sees at most two ranges of keys: clean ones [lo, hi) and, for a block token, those of its own block. So four
integers per query describe the mask, and counting tells which 128 x 128 tiles are empty, partial or full: a range
[lo, hi) adds as many visible keys to a tile as [0, hi) minus [0, lo). No S x S array is created.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.row import to_device
from sdlm_megatron.model.attention.contract import RowAttention

TILE = 128
TILES = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
TILES_BACKWARD = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def key_ranges(layout: RowLayout, row_length: int, *, causal_attn: bool) -> np.ndarray:
    """Keys visible to each query: int32 (4, row_length), rows lo, hi, own_lo, own_hi; lo = hi for an empty range."""
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
    """FlexAttention. On a GPU it is compiled once, since all rows have the same shapes; on a CPU it builds S x S."""

    def __init__(self, layout: RowLayout, row_length: int, *, causal_attn: bool) -> None:
        ranges = key_ranges(layout, row_length, causal_attn=causal_attn)
        counts = tile_counts(ranges)
        full = counts == TILE * TILE
        tiles = [*_listed((counts > 0) & ~full), *_listed(full)]
        tiles_backward = [*_listed(((counts > 0) & ~full).T), *_listed(full.T)]
        self.length = row_length
        self._set(torch.from_numpy(ranges), dict(zip(TILES + TILES_BACKWARD, tiles + tiles_backward, strict=True)))

    def _set(self, ranges: Tensor, tiles: dict[str, Any]) -> None:
        self.ranges, self.tiles = ranges, tiles
        # BlockMask's own constructor, because create_block_mask would evaluate the mask for all S x S pairs
        self.mask = BlockMask(
            seq_lengths=(self.length, self.length), BLOCK_SIZE=(TILE, TILE), mask_mod=_mask_mod(ranges), **tiles
        )

    def to(self, device: torch.device) -> Self:
        moved = object.__new__(type(self))
        moved.length = self.length
        moved._set(to_device(self.ranges, device), {key: to_device(x, device) for key, x in self.tiles.items()})
        return moved

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See RowAttention."""
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attend: Any = _compiled() if q.device.type == "cuda" else flex_attention
        return attend(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=grouped)[0].transpose(0, 1)


def _mask_mod(ranges: Tensor) -> Callable[..., Tensor]:
    lo, hi, own_lo, own_hi = ranges

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        clean = (key >= lo[query]) & (key < hi[query])
        return clean | ((key >= own_lo[query]) & (key < own_hi[query]))

    return seen


def _listed(tiles: np.ndarray) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a bool matrix (rows, columns): number of marked columns per row, and their indices."""
    order = np.argsort(~tiles, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(tiles.sum(1).astype(np.int32))[None, None], torch.from_numpy(order)[None, None]


@cache
def _compiled() -> Callable[..., Tensor]:
    """flex_attention, compiled on first use on a GPU."""
    return torch.compile(flex_attention, dynamic=False)
