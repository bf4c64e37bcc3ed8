"""Attention of a packed row as three causal or tiny parts that fast kernels know, merged exactly.

    (1) clean tokens among themselves: causal attention over the documents;
    (2) blocks to the clean tokens before them. All D tokens of a block at p see the same keys [0, p), so they count as
        D more query heads of one query. Put at row p of their document, these queries form causal attention aligned
        at the end, over the same keys as (1): row p sees p keys, the last row L sees all L. Rows between a document's
        first block and its end that have no block hold zeros, and nobody reads them;
    (3) blocks to themselves: D x D.

A softmax over the union of (2) and (3) is their outputs weighted by their log-sum-exp. Backward, each part's gradient
is that of the probabilities exp(score - merged lse) with the merged output, so each part's own backward kernel gives
it when it is handed those two.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.row import to_device
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.varlen import Sequences, VarlenKernel


@dataclass(frozen=True)
class _Index:
    """Where the parts of a row lie."""

    n_clean: int
    used: int
    block_size: int
    causal: bool
    """Inside a block a slot sees only itself and earlier ones."""
    clean: Sequences
    """Part (1)."""
    prefix: Sequences
    """Part (2)."""
    n_prefix: int
    """Queries of part (2), over all documents."""
    place: torch.Tensor
    """int64 (blocks,): the query of part (2) that a block is; n_prefix for a block that has no clean key."""
    has_orphans: bool
    """Some block begins at position 0: it has no clean key."""

    def to(self, device: torch.device) -> "_Index":
        def moved(at: Sequences) -> Sequences:
            return replace(at, cu_q=to_device(at.cu_q, device), cu_k=to_device(at.cu_k, device))

        place = to_device(self.place, device)
        return replace(self, clean=moved(self.clean), prefix=moved(self.prefix), place=place)

    @property
    def orphans(self) -> torch.Tensor:
        """bool (blocks,)."""
        return self.place == self.n_prefix


def _index(layout: RowLayout, causal: bool) -> _Index:
    """O(documents + blocks)."""
    documents = np.flatnonzero(layout.clean_lens)  # a document without tokens has no blocks either
    lens = layout.clean_lens[documents].astype(np.int64)
    block_document = np.searchsorted(documents, layout.block_documents())
    starts = layout.starts.astype(np.int64)
    first = lens.copy()  # a document without blocks keeps one query: no kernel meets an empty sequence
    np.minimum.at(first, block_document, np.maximum(starts, 1))
    rows = lens + 1 - first
    offset = np.cumsum(rows) - rows
    place = np.where(starts > 0, (offset - first)[block_document] + starts, rows.sum())
    return _Index(
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
    """From the lengths (documents,) of the sequences."""
    cu_q, cu_k = (torch.from_numpy(np.concatenate([[0], np.cumsum(x)]).astype(np.int32)) for x in (queries, keys))
    return Sequences(cu_q, cu_k, int(queries.max(initial=0)), int(keys.max(initial=0)))


class Decomposed(RowAttention):
    """Three parts over one varlen kernel, see the module's text."""

    def __init__(self, layout: RowLayout, kernel: VarlenKernel, *, causal_attn: bool) -> None:
        self.kernel, self.index = kernel, _index(layout, causal_attn)

    def to(self, device: torch.device) -> Self:
        moved = object.__new__(type(self))
        moved.kernel, moved.index = self.kernel, self.index.to(device)
        return moved

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See RowAttention."""
        return _Attention.apply(q, k, v, self.index, self.kernel, scale)


class _Attention(torch.autograd.Function):
    """The three parts forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        index: _Index,
        kernel: VarlenKernel,
        scale: float,
    ) -> torch.Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        n = index.n_clean
        out, lse = torch.empty_like(q), q.new_empty(0)
        out[index.used :] = 0
        states: list[tuple[torch.Tensor, ...]] = [(), ()]
        lse_clean = lse
        if n:
            out[:n], lse_clean, states[0] = kernel.forward(q[:n], k[:n], v[:n], index.clean, scale)
        if len(index.place):
            out[n : index.used], lse, states[1] = _blocks_forward(q, k, v, index, kernel, scale)
        ctx.save_for_backward(q, k, v, out, lse_clean, lse, *states[0], *states[1])
        ctx.index, ctx.kernel, ctx.scale, ctx.n_state = index, kernel, scale, len(states[0])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        q, k, v, out, lse_clean, lse, *state = ctx.saved_tensors
        index, kernel, scale = ctx.index, ctx.kernel, ctx.scale
        n, do = index.n_clean, grads[0].contiguous()
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        if n:
            dq[:n], dk[:n], dv[:n] = kernel.backward(
                do[:n], q[:n], k[:n], v[:n], out[:n], lse_clean, tuple(state[: ctx.n_state]), index.clean, scale
            )
        if len(index.place):
            _blocks_backward(do, q, k, v, out, lse, tuple(state[ctx.n_state :]), (dq, dk, dv), index, kernel, scale)
        return dq, dk, dv, None, None, None


def _blocks_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: _Index, kernel: VarlenKernel, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output (block tokens, heads, d) of parts (2) and (3), merged lse (blocks, kv_heads, groups * D), kernel state."""
    n, kv_heads = index.n_clean, k.shape[1]
    folded = _fold(q[n : index.used], kv_heads, index.block_size)
    queries = _to_prefix(folded, index)
    prefix_out, prefix_lse, state = kernel.forward(queries, k[:n], v[:n], index.prefix, scale)
    prefix_out = _from_prefix(prefix_out, index, 0.0).view(folded.shape)
    prefix_lse = _from_prefix(prefix_lse, index, -torch.inf).view(folded.shape[:-1])
    scores, _, own_v = _own_scores(folded, k, v, index, scale)
    lse = torch.logaddexp(prefix_lse.to(scores.dtype), scores.logsumexp(-1))
    probabilities = (scores - lse[..., None]).exp()
    share = (prefix_lse - lse).exp()
    merged = prefix_out.to(scores.dtype) * share[..., None] + probabilities @ own_v
    return _unfold(merged.to(q.dtype), index.block_size), lse, state


def _blocks_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    state: tuple[torch.Tensor, ...],
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    index: _Index,
    kernel: VarlenKernel,
    scale: float,
) -> None:
    """Gradients of parts (2) and (3), written or added to `into` = dq, dk, dv."""
    n, kv_heads, size = index.n_clean, k.shape[1], index.block_size
    dq, dk, dv = into
    folded, d_out, o = (_fold(x[n : index.used], kv_heads, size) for x in (q, do, out))
    queries, prefix_do, prefix_out, prefix_lse = (_to_prefix(x, index) for x in (folded, d_out, o, lse[..., None]))
    prefix_dq, prefix_dk, prefix_dv = kernel.backward(
        prefix_do, queries, k[:n], v[:n], prefix_out, prefix_lse[..., 0], state, index.prefix, scale
    )
    dk[:n] += prefix_dk
    dv[:n] += prefix_dv
    scores, own_k, own_v = _own_scores(folded, k, v, index, scale)
    wide = scores.dtype
    probabilities = (scores - lse[..., None]).exp()
    d_out = d_out.to(wide)
    delta = (d_out * o.to(wide)).sum(-1, keepdim=True)
    d_scores = scale * probabilities * (d_out @ own_v.transpose(-1, -2) - delta)
    d_folded = _from_prefix(prefix_dq, index, 0.0).view(folded.shape).to(wide) + d_scores @ own_k
    dq[n : index.used] = _unfold(d_folded.to(q.dtype), size)
    own_dk, own_dv = d_scores.transpose(-1, -2) @ folded.to(wide), probabilities.transpose(-1, -2) @ d_out
    dk[n : index.used] = own_dk.transpose(1, 2).flatten(0, 1).to(k.dtype)
    dv[n : index.used] = own_dv.transpose(1, 2).flatten(0, 1).to(v.dtype)


def _own_scores(
    folded: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: _Index, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Part (3): scores (blocks, kv_heads, groups * D, D), keys and values (blocks, kv_heads, D, d); fp32 or better."""
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


def _fold(x: torch.Tensor, kv_heads: int, size: int) -> torch.Tensor:
    """Block tokens (blocks * D, heads, d) -> (blocks, kv_heads, groups * D, d): slots become query heads."""
    return x.unflatten(0, (-1, size)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(x: torch.Tensor, size: int) -> torch.Tensor:
    """Inverse of `_fold`."""
    return x.unflatten(2, (-1, size)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _to_prefix(folded: torch.Tensor, index: _Index) -> torch.Tensor:
    """(blocks, kv_heads, groups * D, d) -> queries of part (2), (n_prefix, heads * D, d), zero where no block is.

    For the lse a zero there is as good as any: query and gradient of such a row are zero, so it adds zero.
    """
    rows = folded.new_zeros(index.n_prefix + 1, folded.shape[1] * folded.shape[2], folded.shape[3])
    rows[index.place] = folded.flatten(1, 2)
    return rows[: index.n_prefix]


def _from_prefix(rows: torch.Tensor, index: _Index, orphan: float) -> torch.Tensor:
    """What part (2) found for each block, (n_prefix, heads * D, …) -> (blocks, heads * D, …); `orphan` without keys."""
    if not index.has_orphans:
        return rows[index.place]
    found = rows[index.place.clamp(max=index.n_prefix - 1)]
    return found.masked_fill(index.orphans.view(-1, *[1] * (rows.ndim - 1)), orphan)
