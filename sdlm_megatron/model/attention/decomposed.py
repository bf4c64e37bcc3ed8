"""Attention of a packed row in three parts that fast kernels support, merged exactly.

    (1) clean to clean: causal attention over the documents;
    (2) blocks to clean: all D tokens of a block with start p see the same keys [0, p), so its slots become D times as
        many query heads of one query. Placed at row p of their document, these queries form causal attention aligned
        at the bottom right over the keys of (1): row p sees p keys, the last row L sees all L. Rows between a
        document's first block and its end that have no block are zero and ignored;
    (3) blocks to themselves: D x D per block.

A softmax over the union of (2) and (3) equals their outputs weighted by exp(lse of the part - merged lse). In the
backward pass, the gradient of each part is that of the probabilities exp(score - merged lse) with the merged output,
so a part's own backward kernel computes it from those two.

Example: L = 6, blocks at 2 and 4. Part (2) has the queries of rows 2..6: row 2 = block 0 (keys 0, 1), row 4 = block 1
(keys 0..3), rows 3, 5, 6 = zeros.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.varlen import Gradients, KernelOutput, Sequences, VarlenKernel


@dataclass(frozen=True)
class _RowIndex:
    """Location of the three parts in a row."""

    n_clean: int
    used: int
    block_size: int
    causal: bool
    """A slot sees only itself and earlier slots of its block."""
    clean: Sequences
    """Part (1)."""
    prefix: Sequences
    """Part (2)."""
    n_prefix: int
    """Queries of part (2), over all documents."""
    place: Tensor
    """int64 (blocks,): each block's query in part (2); n_prefix for a block without clean keys."""
    has_orphans: bool
    """Whether some block starts at position 0 and so has no clean keys."""

    @property
    def orphans(self) -> Tensor:
        """bool (blocks,): the block has no clean keys."""
        return self.place == self.n_prefix


def _row_index(layout: RowLayout, causal: bool) -> _RowIndex:
    """The index of a row, in O(documents + blocks)."""
    documents = np.flatnonzero(layout.clean_lens)  # a document without tokens has no blocks either
    lens = layout.clean_lens[documents].astype(np.int64)
    block_document = np.searchsorted(documents, layout.block_documents())
    starts = layout.starts.astype(np.int64)
    first = lens.copy()  # a document without blocks keeps one query, since kernels reject empty sequences
    np.minimum.at(first, block_document, np.maximum(starts, 1))
    rows = lens + 1 - first
    offset = np.cumsum(rows) - rows
    place = np.where(starts > 0, (offset - first)[block_document] + starts, rows.sum())
    return _RowIndex(
        n_clean=layout.n_clean,
        used=layout.used,
        block_size=layout.block_size,
        causal=causal,
        clean=_sequences(lens, lens),
        prefix=_sequences(rows, lens),
        n_prefix=int(rows.sum()),
        place=torch.from_numpy(place),
        has_orphans=bool((starts == 0).any()),
    )


def _sequences(queries: np.ndarray, keys: np.ndarray) -> Sequences:
    """Sequences with these numbers of queries and keys, int (documents,)."""
    cu_q, cu_k = (torch.from_numpy(np.concatenate([[0], np.cumsum(x)]).astype(np.int32)) for x in (queries, keys))
    return Sequences(cu_q, cu_k, int(queries.max(initial=0)), int(keys.max(initial=0)))


class Decomposed(RowAttention):
    """The three parts over one varlen kernel."""

    def __init__(self, layout: RowLayout, kernel: VarlenKernel, *, causal_attn: bool) -> None:
        self.kernel, self.index = kernel, _row_index(layout, causal_attn)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See RowAttention."""
        return _Attention.apply(q, k, v, self.index, self.kernel, scale)


class _Attention(torch.autograd.Function):
    """Forward and backward pass of all parts."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: _RowIndex, kernel: VarlenKernel, scale: float
    ) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        n = index.n_clean
        out, empty = torch.empty_like(q), q.new_empty(0)
        out[index.used :] = 0
        clean = blocks = KernelOutput(empty, empty)
        if n:
            clean = kernel.forward(q[:n], k[:n], v[:n], index.clean, scale)
            out[:n] = clean.out
        if len(index.place):
            blocks = _blocks_forward(q, k, v, index, kernel, scale)
            out[n : index.used] = blocks.out
        ctx.save_for_backward(q, k, v, out, clean.lse, blocks.lse, *clean.state, *blocks.state)
        ctx.index, ctx.kernel, ctx.scale, ctx.n_state = index, kernel, scale, len(clean.state)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        q, k, v, out, lse_clean, lse_blocks, *state = ctx.saved_tensors
        index, kernel, scale = ctx.index, ctx.kernel, ctx.scale
        n, grad = index.n_clean, grads[0].contiguous()
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        if n:
            clean = KernelOutput(out[:n], lse_clean, tuple(state[: ctx.n_state]))
            dq[:n], dk[:n], dv[:n] = kernel.backward(grad[:n], q[:n], k[:n], v[:n], clean, index.clean, scale)
        if len(index.place):
            blocks = KernelOutput(out[n : index.used], lse_blocks, tuple(state[ctx.n_state :]))
            _blocks_backward(grad, q, k, v, blocks, (dq, dk, dv), index, kernel, scale)
        return dq, dk, dv, None, None, None


def _blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, index: _RowIndex, kernel: VarlenKernel, scale: float
) -> KernelOutput:
    """Parts (2) and (3): output (block tokens, heads, d), merged lse (blocks, kv_heads, groups * D), kernel state."""
    n, kv_heads = index.n_clean, k.shape[1]
    folded = _fold(q[n : index.used], kv_heads, index.block_size)
    prefix = kernel.forward(_to_prefix(folded, index), k[:n], v[:n], index.prefix, scale)
    # a block without clean keys gets lse = -inf, so that part (2) has weight 0 in the merge
    prefix_out = _from_prefix(prefix.out, index, 0.0).view(folded.shape)
    prefix_lse = _from_prefix(prefix.lse, index, -torch.inf).view(folded.shape[:-1])
    scores, _, own_v = _own_scores(folded, k, v, index, scale)
    lse = torch.logaddexp(prefix_lse.to(scores.dtype), scores.logsumexp(-1))
    probabilities = (scores - lse[..., None]).exp()
    share = (prefix_lse - lse).exp()
    merged = prefix_out.to(scores.dtype) * share[..., None] + probabilities @ own_v
    return KernelOutput(_unfold(merged.to(q.dtype), index.block_size), lse, prefix.state)


def _blocks_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: KernelOutput,
    into: Gradients,
    index: _RowIndex,
    kernel: VarlenKernel,
    scale: float,
) -> None:
    """Gradients of parts (2) and (3), written or added to `into`."""
    n, kv_heads, size = index.n_clean, k.shape[1], index.block_size
    dq, dk, dv = into
    folded, d_out, o = (_fold(x, kv_heads, size) for x in (q[n : index.used], grad[n : index.used], output.out))
    queries, prefix_grad, prefix_out, prefix_lse = (
        _to_prefix(x, index) for x in (folded, d_out, o, output.lse[..., None])
    )
    prefix = KernelOutput(prefix_out, prefix_lse[..., 0], output.state)
    prefix_dq, prefix_dk, prefix_dv = kernel.backward(prefix_grad, queries, k[:n], v[:n], prefix, index.prefix, scale)
    dk[:n] += prefix_dk
    dv[:n] += prefix_dv
    scores, own_k, own_v = _own_scores(folded, k, v, index, scale)
    wide = scores.dtype
    probabilities = (scores - output.lse[..., None]).exp()
    d_out = d_out.to(wide)
    delta = (d_out * o.to(wide)).sum(-1, keepdim=True)
    d_scores = scale * probabilities * (d_out @ own_v.transpose(-1, -2) - delta)
    d_folded = _from_prefix(prefix_dq, index, 0.0).view(folded.shape).to(wide) + d_scores @ own_k
    dq[n : index.used] = _unfold(d_folded.to(q.dtype), size)
    own_dk, own_dv = d_scores.transpose(-1, -2) @ folded.to(wide), probabilities.transpose(-1, -2) @ d_out
    dk[n : index.used] = own_dk.transpose(1, 2).flatten(0, 1).to(k.dtype)
    dv[n : index.used] = own_dv.transpose(1, 2).flatten(0, 1).to(v.dtype)


def _own_scores(folded: Tensor, k: Tensor, v: Tensor, index: _RowIndex, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Part (3): scores (blocks, kv_heads, groups * D, D), keys and values (blocks, kv_heads, D, d), fp32 or fp64."""
    wide, size = torch.promote_types(k.dtype, torch.float32), index.block_size
    own_k, own_v = (
        x[index.n_clean : index.used]
        .unflatten(0, (-1, size))
        .transpose(1, 2)
        .to(wide, memory_format=torch.contiguous_format)
        for x in (k, v)
    )
    scores = scale * (folded.to(wide) @ own_k.transpose(-1, -2))
    if index.causal:
        slot = torch.arange(size, device=k.device)
        query_slot = slot.repeat(scores.shape[2] // size)
        scores.masked_fill_(slot > query_slot[:, None], -torch.inf)
    return scores, own_k, own_v


def _fold(x: Tensor, kv_heads: int, size: int) -> Tensor:
    """Block tokens (blocks * D, heads, d) -> (blocks, kv_heads, groups * D, d): slots become query heads."""
    return x.unflatten(0, (-1, size)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(x: Tensor, size: int) -> Tensor:
    """Inverse of `_fold`."""
    return x.unflatten(2, (-1, size)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _to_prefix(folded: Tensor, index: _RowIndex) -> Tensor:
    """(blocks, kv_heads, groups * D, d) -> queries of part (2), (n_prefix, heads * D, d), zero where no block is."""
    # also right for the lse: the query and gradient of such a row are zero, so any lse contributes zero
    rows = folded.new_zeros(index.n_prefix + 1, folded.shape[1] * folded.shape[2], folded.shape[3])
    rows[index.place] = folded.flatten(1, 2)
    return rows[: index.n_prefix]


def _from_prefix(rows: Tensor, index: _RowIndex, orphan: float) -> Tensor:
    """Each block's row of part (2): (n_prefix, heads * D, …) -> (blocks, heads * D, …); `orphan` without clean keys."""
    if not index.has_orphans:
        return rows[index.place]
    of_blocks = rows[index.place.clamp(max=index.n_prefix - 1)]
    return of_blocks.masked_fill(index.orphans.view(-1, *[1] * (rows.ndim - 1)), orphan)
