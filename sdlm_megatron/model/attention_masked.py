"""Attention under boolean masks: the whole row at once (`Dense`), or document by document (`PerDocument`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import block_rows, visible, visible_row
from sdlm_megatron.diffusion.row import to_device
from sdlm_megatron.model.attention import RowAttention

SMALL_DOCUMENT = 768
"""Documents up to this expanded length take one call with their own dense mask; longer ones go in chunks."""
CHUNK_TOKENS = 256
"""Block tokens of a long document that attend together."""


class Dense(RowAttention):
    """The definition itself, an S x S mask and S x S scores: for comparisons at small sizes."""

    def __init__(self, layout: RowLayout, row_length: int, *, causal_attn: bool) -> None:
        self.used = layout.used
        self.mask = torch.from_numpy(visible_row(layout, row_length, causal_attn=causal_attn))

    def to(self, device: torch.device) -> Self:
        moved = object.__new__(type(self))
        moved.used, moved.mask = self.used, to_device(self.mask, device)
        return moved

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See RowAttention."""
        out = attend(q, k, v, self.mask, scale)  # padding sees itself, which keeps its softmax finite
        return torch.cat([out[: self.used], 0 * out[self.used :]])


@dataclass(frozen=True)
class _Piece:
    """Tokens that attend together."""

    document: int
    prefix: int
    """Clean tokens of the document that are keys."""
    blocks: int | None
    """Which run of block tokens belongs here, as queries and keys; None: none."""
    mask: torch.Tensor | None
    """bool (queries, keys); None: causal over the clean tokens."""
    clean_queries: bool

    def to(self, device: torch.device) -> "_Piece":
        return self if self.mask is None else replace(self, mask=to_device(self.mask, device))


class PerDocument(RowAttention):
    """Attention over one row, split into pieces with a dense mask each.

    A short document is one piece (its clean and block tokens under `visible`). A long document is one causal piece
    for the clean tokens and one piece for each chunk of neighbouring blocks, whose keys are the clean prefix up to
    the chunk's last anchor and the chunk's own blocks. The largest mask is CHUNK_TOKENS x document length.
    """

    def __init__(self, layout: RowLayout, row_length: int, *, causal_attn: bool) -> None:
        self.n_docs = layout.n_docs
        self.pieces: list[_Piece] = []
        self.sizes = layout.clean_lens.tolist()
        """Tokens of each document's clean part, then of each run of blocks, then padding."""
        first_block = np.cumsum(layout.n_blocks) - layout.n_blocks
        for document, first in enumerate(first_block):
            starts = layout.starts[first : first + layout.n_blocks[document]]
            self._add(document, starts, layout.block_size, causal_attn)
        self.sizes.append(row_length - layout.used)

    def _add(self, document: int, starts: np.ndarray, d: int, causal: bool) -> None:
        """Adds the pieces of one document, and its runs of blocks."""
        clean_len, run = self.sizes[document], len(self.sizes)
        if clean_len + len(starts) * d <= SMALL_DOCUMENT:
            mask = torch.from_numpy(visible(clean_len, starts, block_size=d, causal_attn=causal))
            self.pieces.append(_Piece(document, clean_len, run, mask, clean_queries=True))
            self.sizes.append(len(starts) * d)
            return
        self.pieces.append(_Piece(document, clean_len, None, None, clean_queries=True))
        step = max(1, CHUNK_TOKENS // d)
        for i in range(0, len(starts), step):
            part = starts[i : i + step]
            prefix = int(part[-1])  # a block never sees its own anchor's clean copy
            mask = torch.from_numpy(block_rows(prefix, part, block_size=d, causal_attn=causal))
            self.pieces.append(_Piece(document, prefix, len(self.sizes), mask, clean_queries=False))
            self.sizes.append(len(part) * d)

    def to(self, device: torch.device) -> Self:
        moved = object.__new__(type(self))
        moved.n_docs, moved.sizes = self.n_docs, self.sizes
        moved.pieces = [p.to(device) for p in self.pieces]
        return moved

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See RowAttention."""
        # One split each, not many slices: the gradient of a slice is a row of zeros as long as the whole.
        queries, keys, values = (x.split(self.sizes) for x in (q, k, v))
        out = list(queries)
        for piece in self.pieces:
            asked = [queries[piece.document]] if piece.clean_queries else []
            asked += _run(queries, piece.blocks)
            key, value = (
                torch.cat([x[piece.document][: piece.prefix], *_run(x, piece.blocks)]) for x in (keys, values)
            )
            found = attend(torch.cat(asked), key, value, piece.mask, scale)
            parts = found.split([len(x) for x in asked])
            if piece.clean_queries:
                out[piece.document] = parts[0]
            if piece.blocks is not None:
                out[piece.blocks] = parts[-1]
        padding = 0 * out[-1]
        if not self.n_docs:  # keep the graph to k and v
            padding = padding + 0 * (k.sum() + v.sum())
        return torch.cat([*out[:-1], padding])


def _run(parts: Sequence[torch.Tensor], number: int | None) -> list[torch.Tensor]:
    return [] if number is None else [parts[number]]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Softmax attention: q (Q, heads, d), k and v (K, kv_heads, d), mask bool (Q, K) or None for causal."""
    if not q.shape[0]:
        return q
    if mask is not None and q.device.type == "cpu":
        return _attend_on_cpu(q, k, v, mask, scale)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the kernels take one key head per query head
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return found[0].transpose(0, 1)


def _attend_on_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Two matrix products: in bf16 less than half the time of torch's flash attention for CPU (bench.cpu_choices).

    The query heads that share a KV head are more queries of it, so that keys and values are not repeated.
    """
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (kv_heads, groups)).permute(1, 2, 0, 3).reshape(kv_heads, groups * len(q), -1)
    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf).repeat(groups, 1)
    scores = torch.baddbmm(hidden[None], queries, k.permute(1, 2, 0), alpha=scale)
    found = torch.bmm(scores.softmax(-1), v.transpose(0, 1))
    return found.unflatten(1, (groups, -1)).permute(2, 0, 1, 3).flatten(1, 2)
