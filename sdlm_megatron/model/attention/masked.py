"""Attention with explicit masks: over the whole row at once (`Dense`), or in regions of each document (`PerDocument`).

`PerDocument` is the fastest backend on a CPU. Its products put the wide operand in its memory layout and transpose the
narrow one: on a CPU in fp32, a product with the wide operand transposed takes about 1.5 times as long (measured).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import block_rows, visible_row
from sdlm_megatron.model.attention.contract import RowAttention

CHUNK_TOKENS = 128
"""Queries of a region."""
KEPT_KEYS = 1024
"""Regions with more keys recompute their probabilities in the backward pass, so that the memory kept grows with the
length of the row, not with its square."""


class Dense(RowAttention):
    """The definition itself, with an S x S mask and S x S scores; a reference for small sizes."""

    def __init__(self, layout: RowLayout, row_length: int, *, causal_attn: bool) -> None:
        self.used = layout.used
        self.mask = torch.from_numpy(visible_row(layout, row_length, causal_attn=causal_attn))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See RowAttention."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale, enable_gqa=True)
        out = out[0].transpose(0, 1)
        return torch.cat([out[: self.used], 0 * out[self.used :]])  # 0 * keeps padding in the graph


@dataclass(frozen=True)
class _Region:
    """Neighboring queries, and all keys that any of them sees."""

    queries: slice
    """Indices in the row."""
    prefix: slice
    """Clean tokens that are keys."""
    own: slice
    """Block tokens that are keys: the queries themselves, or none."""
    shared: int
    """Number of keys at the front that are visible to every query and so need no mask."""
    bias: Tensor
    """float (queries, 1, other keys): 0 where visible, -inf elsewhere."""

    def keys(self, tokens: Tensor) -> Tensor:
        """The region's keys of tokens (kv_heads, S, d): (kv_heads, keys, d)."""
        prefix = tokens[:, self.prefix]
        return torch.cat([prefix, tokens[:, self.own]], dim=1) if self.own.stop > self.own.start else prefix

    def add_to_keys(self, tokens: Tensor, gradient: Tensor) -> None:
        """Adds gradient (kv_heads, d, keys) to the region's keys of tokens (kv_heads, S, d)."""
        gradient = gradient.transpose(1, 2)
        count = self.prefix.stop - self.prefix.start
        tokens[:, self.prefix] += gradient[:, :count]
        tokens[:, self.own] += gradient[:, count:]

    def rows(self, tokens: Tensor) -> Tensor:
        """The region's queries of tokens (kv_heads, S, group, d): a view (kv_heads, queries * group, d)."""
        return tokens[:, self.queries].flatten(1, 2)

    def probabilities(self, q: Tensor, key: Tensor) -> Tensor:
        """Probabilities (kv_heads, queries * group, keys) of scaled q (kv_heads, S, group, d) and key (…, keys, d)."""
        scores = torch.bmm(self.rows(q), _transposed(key))
        by_query = scores.unflatten(1, (-1, q.shape[2]))
        by_query[..., self.shared :].add_(self.bias.to(q.dtype))
        return scores.softmax(-1)


class PerDocument(RowAttention):
    """Attention over one row, split into regions with a dense mask each.

    A region is a chunk of a document's clean tokens or of its blocks. Its keys are the clean prefix up to its last
    query (or the start of its last block) and, for blocks, the chunk itself. The largest mask is CHUNK_TOKENS x
    document length.
    """

    def __init__(self, layout: RowLayout, row_length: int, *, causal_attn: bool) -> None:
        self.regions: list[_Region] = []
        d, first = layout.block_size, np.cumsum(layout.n_blocks) - layout.n_blocks
        for clean_at, clean_len, block, n in zip(
            layout.clean_offsets().tolist(), layout.clean_lens.tolist(), first.tolist(), layout.n_blocks, strict=True
        ):
            self.regions += _clean_regions(clean_at, clean_len)
            starts = layout.starts[block : block + n]
            self.regions += _block_regions(clean_at, layout.n_clean + block * d, starts, d, causal_attn)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See RowAttention."""
        return _RegionAttention.apply(q, k, v, self.regions, scale)


def _clean_regions(at: int, length: int) -> Iterator[_Region]:
    """Causal attention of the clean tokens [at, at + length)."""
    for i in range(0, length, CHUNK_TOKENS):
        end = min(length, i + CHUNK_TOKENS)
        seen = np.tri(end - i, dtype=bool)
        yield _Region(slice(at + i, at + end), slice(at, at + end), slice(0, 0), i, _bias(seen))


def _block_regions(clean_at: int, block_at: int, starts: np.ndarray, d: int, causal: bool) -> Iterator[_Region]:
    """The blocks of a document whose clean tokens begin at `clean_at`, block tokens at `block_at`."""
    step = max(1, CHUNK_TOKENS // d)
    for i in range(0, len(starts), step):
        part = starts[i : i + step]
        shared, prefix = int(part[0]), int(part[-1])  # exclusive: a block does not see the clean copy of its anchor
        seen = block_rows(prefix, part, block_size=d, causal_attn=causal)[:, shared:]
        own = slice(block_at + i * d, block_at + (i + len(part)) * d)
        yield _Region(own, slice(clean_at, clean_at + prefix), own, shared, _bias(seen))


def _bias(seen: np.ndarray) -> Tensor:
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))[:, None])


class _RegionAttention(torch.autograd.Function):
    """All regions of a row. Query heads that share a KV head become more queries of it, so keys are never repeated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, regions: list[_Region], scale: float) -> Tensor:
        kv_heads = k.shape[1]
        q = _by_kv_head(q * scale, kv_heads)
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        out = torch.zeros_like(q)  # padding stays zero
        kept = []
        for region in regions:
            key = region.keys(k)
            probabilities = region.probabilities(q, key)
            region.rows(out).copy_(torch.bmm(probabilities, region.keys(v)))
            kept.append(probabilities if key.shape[1] <= KEPT_KEYS else None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.regions, ctx.scale = regions, scale
        return _by_token(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grad = _by_kv_head(grad, k.shape[0])
        dq = torch.zeros_like(q)
        # many regions add to the same key, so sum in fp32: in bf16 each addition would round
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for region, probabilities in zip(ctx.regions, kept, strict=True):
            key, rows, d_out = region.keys(k), region.rows(q), region.rows(grad)
            if probabilities is None:
                probabilities = region.probabilities(q, key)
            region.add_to_keys(dv, torch.bmm(_transposed(d_out), probabilities))
            d_probabilities = torch.bmm(d_out, _transposed(region.keys(v)))
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            region.rows(dq).copy_(torch.bmm(d_scores, key))
            region.add_to_keys(dk, torch.bmm(_transposed(rows), d_scores))
        dk, dv = (x.transpose(0, 1).to(k.dtype) for x in (dk, dv))
        return _by_token(dq) * ctx.scale, dk, dv, None, None


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """(S, heads, d) -> (kv_heads, S, group, d)."""
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()


def _by_token(x: Tensor) -> Tensor:
    """Inverse of `_by_kv_head`."""
    return x.transpose(0, 1).flatten(1, 2)
