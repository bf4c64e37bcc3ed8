"""Attention of a packed row in Triton kernels: one forward, three backward, whatever the row holds.

Clean tokens and blocks need the same loop: a query sees at most two ranges of keys (`flex.key_ranges`). The tables of
tiles that the kernels go through are built here, on the host, from the layout. Tiles are sorted by work, the longest
first, because a GPU starts programs in order and a long one at the end would run alone.

The sum over queries in the gradients of a key tile is split into parts of similar work: the first keys of a document
are seen by all its queries, and with few KV heads per GPU there would be too few programs to fill it. The parts are
added in a fixed order, so a backward pass gives the same bits each time.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.flex import key_ranges


@dataclass(frozen=True)
class TileSizes:
    """Sizes of the kernels' tiles. The defaults fill tensor cores and registers on Hopper without spilling."""

    rows: int = 128
    """Queries: tokens x query heads of a KV head."""
    keys: int = 64
    part: int = 8
    """Fewest steps over the queries of a part of a key tile."""
    parts: int = 128
    """Parts that the key tiles of a row are split into, about, if each is long enough."""


def query_tiles(ranges: np.ndarray, ends: np.ndarray, tokens: int) -> np.ndarray:
    """Table of query tiles, int32 (tiles, 6): see `triton_kernels.QUERY_COLUMNS`.

    Args:
        ranges: int32 (4, S), keys visible to each query.
        ends: int (segments,), ends of the segments that a tile may not cross.
        tokens: of a tile.
    """
    first, end, _ = _tiles(ends, tokens)
    # inside a segment, the ranges' ends ascend
    table = np.stack([first, end, ranges[0, first], ranges[1, end - 1], ranges[2, first], ranges[3, end - 1]], 1)
    return _longest_first(table, table[:, 3] - table[:, 2] + table[:, 5] - table[:, 4]).astype(np.int32)


def key_tiles(
    layout: RowLayout, ranges: np.ndarray, ends: np.ndarray, tokens: int, sizes: TileSizes
) -> tuple[np.ndarray, np.ndarray]:
    """Tables of key tiles: see `triton_kernels.KEY_COLUMNS`, int32 (tiles, 10), and SUM_COLUMNS, int32 (tiles, 4).

    Args:
        layout: of the row.
        ranges: int32 (4, S), keys visible to each query.
        ends: int (segments,), ends of the segments that a tile may not cross.
        tokens: of a step over the queries.
        sizes: of tiles and parts.
    """
    first, end, segment = _tiles(ends, sizes.keys)
    n, size, docs = layout.n_clean, layout.block_size, layout.n_docs
    seen_by = np.zeros((4, len(first)), dtype=np.int64)
    clean = segment < docs
    document, key = segment[clean], first[clean]
    # a block sees the keys before its start: those blocks follow that start after the tile's first key
    place = layout.clean_offsets()[layout.block_documents()] + layout.starts  # ascends, also from document to document
    blocks = np.searchsorted(place, key, side="right")
    seen_by[:, clean] = key, ends[document], n + blocks * size, ends[docs + document]
    own = (segment >= docs) & (segment < 2 * docs)
    seen_by[:2, own] = ranges[2, first[own]], n + ((end[own] - 1 - n) // size + 1) * size
    steps = sum(-(-(seen_by[i + 1] - seen_by[i]) // tokens) for i in (0, 2))
    parts = np.maximum(1, -(-steps // max(sizes.part, -(-int(steps.sum()) // sizes.parts))))
    tile, part = np.repeat(np.arange(len(first)), parts), _counted(parts)
    begin, stop = (steps[tile] * i // parts[tile] for i in (part, part + 1))
    several = parts > 1
    slots = np.cumsum(np.where(several, parts, 0))
    slot = np.where(several[tile], (slots - parts)[tile] + part, -1)
    table = np.column_stack([first[tile], end[tile], *seen_by[:, tile], own[tile], begin, stop, slot])
    sums = np.column_stack([first, end, slots - parts, slots])[several]
    return _longest_first(table, stop - begin).astype(np.int32), sums.astype(np.int32)


def _tiles(ends: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token, end and segment of tiles of at most `size` tokens, each inside one segment."""
    starts = np.concatenate([[0], ends[:-1]])
    tiles = -(-(ends - starts) // size)
    segment = np.repeat(np.arange(len(ends)), tiles)
    first = starts[segment] + _counted(tiles) * size
    return first, np.minimum(first + size, ends[segment]), segment


def _counted(counts: np.ndarray) -> np.ndarray:
    """0, 1, …, count - 1 for each count, concatenated."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _longest_first(table: np.ndarray, work: np.ndarray) -> np.ndarray:
    return table[np.argsort(-work, kind="stable")]


class Fused(RowAttention):
    """The row in Triton kernels. CUDA; bf16, fp16 or fp32.

    Args:
        layout, row_length: of the row.
        causal_attn: a slot sees only itself and earlier slots of its block.
        group: query heads per KV head.
        sizes: of the kernels' tiles.
    """

    def __init__(
        self, layout: RowLayout, row_length: int, *, causal_attn: bool, group: int, sizes: TileSizes | None = None
    ) -> None:
        self.sizes, self.group = sizes or TileSizes(), group
        if group > self.sizes.rows:
            raise ValueError(f"{group} query heads per KV head; the kernels take up to {self.sizes.rows}")
        ranges = key_ranges(layout, row_length, causal_attn=causal_attn)
        padding = [row_length - layout.used]
        ends = np.cumsum(np.concatenate([layout.clean_lens, layout.n_blocks * layout.block_size, padding]))
        queries = query_tiles(ranges, ends, self.sizes.rows // group)
        keys, sums = key_tiles(layout, ranges, ends, self.sizes.rows // group, self.sizes)
        self.slots = int(keys[:, 9].max(initial=-1)) + 1
        self.ranges, self.queries, self.keys, self.sums = map(torch.from_numpy, (ranges, queries, keys, sums))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See RowAttention."""
        return _FusedAttention.apply(q, k, v, self, scale)


MOST_TILES = 65535  # CUDA's limit of the second size of a grid


def check_reach(tokens: int, stride: int, tiles: int) -> None:
    """ConfigError for a row, `stride` numbers per token, beyond the kernels' int32 offsets or tiles of a launch."""
    if tiles > MOST_TILES:
        what = f"a row of {tokens:,} tokens has {tiles:,} tiles, the Triton kernels take {MOST_TILES:,}"
        raise ConfigError(what, "train.attention", "parallel.context above 1")
    if tokens * stride >= 2**31:
        what = f"a row of {tokens:,} tokens has {tokens * stride:,} numbers per GPU, the Triton kernels reach 2^31"
        raise ConfigError(what, "train.attention", "a larger parallel.tensor, or parallel.context above 1")


@cache
def _kernels() -> Any:
    """The module of the kernels; ImportError without triton."""
    return import_module("sdlm_megatron.model.attention.triton_kernels")


def constants(q: Tensor, group: int, sizes: TileSizes) -> dict[str, Any]:
    """Constants of the kernels for queries (S, heads, d), and how they are launched."""
    dim = q.shape[-1]
    return {
        "GROUP": group,
        "ROWS": sizes.rows,
        "KEYS": sizes.keys,
        "DIM": dim,
        "WIDTH": max(16, 1 << (dim - 1).bit_length()),  # tensor cores take 16 and more
        "PRECISION": "ieee",  # tensor cores would round fp32 to TF32
        "num_warps": 8,
        "num_stages": 2,
    }


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: Fused, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v if v.stride(-1) == 1 else v.contiguous()
        length, heads = q.shape[:2]
        check_reach(length, max(q.stride(0), v.stride(0)), max(len(row.queries), len(row.keys)))
        kv_heads = k.shape[1]
        out, lse = torch.empty_like(q), q.new_empty((kv_heads, length * row.group), dtype=torch.float32)
        kept = v if v.is_contiguous() else torch.empty_like(k)
        _kernels().attend[kv_heads, len(row.queries)](
            *(q, k, v, out, lse, kept, row.queries, row.ranges, scale, length, heads, *v.stride()[:2]),
            **constants(q, row.group, row.sizes),
            COPY=kept is not v,
        )
        ctx.save_for_backward(q, k, kept, out, lse)
        ctx.row, ctx.fixed = row, (scale, length, heads)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        row, kv_heads, kernels = ctx.row, k.shape[1], _kernels()
        grad, fixed = grad.contiguous(), constants(q, row.group, row.sizes)
        dq, dk, dv, delta = map(torch.empty_like, (q, k, v, lse))
        partial = lse.new_empty((max(1, row.slots), kv_heads, 2, row.sizes.keys, fixed["WIDTH"]))
        kernels.query_gradients[kv_heads, len(row.queries)](
            *(q, k, v, out, grad, lse, delta, dq, row.queries, row.ranges, *ctx.fixed), **fixed
        )
        kernels.key_gradients[kv_heads, len(row.keys)](
            *(q, k, v, grad, lse, delta, dk, dv, partial, row.keys, row.ranges, *ctx.fixed), **fixed
        )
        if row.slots:
            sizes = {key: fixed[key] for key in ("KEYS", "DIM", "WIDTH")}
            kernels.add_parts[kv_heads, len(row.sums)](partial, dk, dv, row.sums, kv_heads, **sizes)
        return dq, dk, dv, None, None
