"""Attention under boolean masks: the whole row at once (`Dense`), or document by document (`PerDocument`)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import block_rows, visible_row
from sdlm_megatron.diffusion.row import to_device
from sdlm_megatron.model.attention.contract import RowAttention

CHUNK_TOKENS = 128
"""Queries that attend together."""
KEPT_KEYS = 1024
"""With more keys than this the probabilities are not kept for the backward pass but computed again: what is kept
grows with the row, not with its square."""


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
    """Neighbouring queries, and all keys that any of them sees."""

    queries: slice
    """Tokens of the row."""
    prefix: slice
    """Clean tokens of their document that are keys."""
    own: slice
    """Block tokens that are keys: the queries themselves, or none."""
    shared: int
    """So many keys at the front are visible to every query."""
    bias: torch.Tensor
    """float (queries, 1, other keys): 0 where visible, -inf elsewhere."""

    def keys(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (kv_heads, S, d) -> (kv_heads, keys, d)."""
        prefix = tokens[:, self.prefix]
        return torch.cat([prefix, tokens[:, self.own]], dim=1) if self.own.stop > self.own.start else prefix

    def add_to_keys(self, tokens: torch.Tensor, found: torch.Tensor) -> None:
        """Inverse of `keys` for gradients: adds found (kv_heads, d, keys) to tokens (kv_heads, S, d)."""
        found = found.transpose(1, 2)
        count = self.prefix.stop - self.prefix.start
        tokens[:, self.prefix] += found[:, :count]
        tokens[:, self.own] += found[:, count:]

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (kv_heads, S, group, d) -> (kv_heads, queries * group, d), a view."""
        return tokens[:, self.queries].flatten(1, 2)

    def probabilities(self, q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """q (kv_heads, S, group, d), scaled, and key (kv_heads, keys, d) -> (kv_heads, queries * group, keys)."""
        scores = torch.bmm(self.rows(q), _turned(key))
        by_query = scores.unflatten(1, (-1, q.shape[2]))
        by_query[..., self.shared :].add_(self.bias.to(q.dtype))
        return scores.softmax(-1)


class PerDocument(RowAttention):
    """Attention over one row, split into pieces with a dense mask each.

    A piece is a chunk of a document's clean tokens or of its blocks. Its keys are the clean prefix up to its last
    query (or anchor) and, for blocks, the chunk itself. The largest mask is CHUNK_TOKENS x document length.
    """

    def __init__(self, layout: RowLayout, row_length: int, *, causal_attn: bool) -> None:
        self.pieces: list[_Piece] = []
        d, first = layout.block_size, np.cumsum(layout.n_blocks) - layout.n_blocks
        for clean_at, clean_len, block, n in zip(
            layout.clean_offsets().tolist(), layout.clean_lens.tolist(), first.tolist(), layout.n_blocks, strict=True
        ):
            self.pieces += _clean_pieces(clean_at, clean_len)
            starts = layout.starts[block : block + n]
            self.pieces += _block_pieces(clean_at, layout.n_clean + block * d, starts, d, causal_attn)

    def to(self, device: torch.device) -> Self:
        moved = object.__new__(type(self))
        moved.pieces = [replace(p, bias=to_device(p.bias, device)) for p in self.pieces]
        return moved

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See RowAttention."""
        return _PieceByPiece.apply(q, k, v, self.pieces, scale)


def _clean_pieces(at: int, length: int) -> Iterator[_Piece]:
    """Causal attention of `length` clean tokens that stand at `at`."""
    for i in range(0, length, CHUNK_TOKENS):
        end = min(length, i + CHUNK_TOKENS)
        seen = np.tri(end - i, dtype=bool)
        yield _Piece(slice(at + i, at + end), slice(at, at + end), slice(0, 0), i, _bias(seen))


def _block_pieces(clean_at: int, block_at: int, starts: np.ndarray, d: int, causal: bool) -> Iterator[_Piece]:
    """A document's blocks, which stand at `block_at`."""
    step = max(1, CHUNK_TOKENS // d)
    for i in range(0, len(starts), step):
        part = starts[i : i + step]
        shared, prefix = int(part[0]), int(part[-1])  # a block never sees its own anchor's clean copy
        seen = block_rows(prefix, part, block_size=d, causal_attn=causal)[:, shared:]
        own = slice(block_at + i * d, block_at + (i + len(part)) * d)
        yield _Piece(own, slice(clean_at, clean_at + prefix), own, shared, _bias(seen))


def _bias(seen: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))[:, None])


class _PieceByPiece(torch.autograd.Function):
    """All pieces of a row. The query heads that share a KV head are more queries of it: keys are never repeated.

    Matrix products take their wide operand as it lies in memory and turn the narrow one: on a CPU in fp32 a product
    with the wide one turned takes about 1.5 times as long (dev.bench.cpu_choices).
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: list[_Piece], scale: float
    ) -> torch.Tensor:
        kv_heads = k.shape[1]
        q = _by_kv_head(q * scale, kv_heads)
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        out = torch.zeros_like(q)  # padding stays so
        kept = []
        for piece in pieces:
            key = piece.keys(k)
            found = piece.probabilities(q, key)
            piece.rows(out).copy_(torch.bmm(found, piece.keys(v)))
            kept.append(found if key.shape[1] <= KEPT_KEYS else None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.pieces, ctx.scale = pieces, scale
        return _by_token(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grad = _by_kv_head(grad, k.shape[0])
        dq = torch.zeros_like(q)
        # many pieces add to a key: in bf16 each would round
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for piece, found in zip(ctx.pieces, kept, strict=True):
            key, rows, d_out = piece.keys(k), piece.rows(q), piece.rows(grad)
            if found is None:
                found = piece.probabilities(q, key)
            piece.add_to_keys(dv, torch.bmm(_turned(d_out), found))
            d_found = torch.bmm(d_out, _turned(piece.keys(v)))
            d_scores = torch._softmax_backward_data(d_found, found, -1, found.dtype)
            piece.rows(dq).copy_(torch.bmm(d_scores, key))
            piece.add_to_keys(dk, torch.bmm(_turned(rows), d_scores))
        dk, dv = (x.transpose(0, 1).to(k.dtype) for x in (dk, dv))
        return _by_token(dq) * ctx.scale, dk, dv, None, None


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous()


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(S, heads, d) -> (kv_heads, S, group, d)."""
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `_by_kv_head`."""
    return x.transpose(0, 1).flatten(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Softmax attention: q (Q, heads, d), k and v (K, kv_heads, d), mask bool (Q, K) or None for causal."""
    if not q.shape[0]:
        return q
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the kernels take one key head per query head
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return found[0].transpose(0, 1)
