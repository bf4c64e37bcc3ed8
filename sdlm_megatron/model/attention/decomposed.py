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

Under context parallelism a rank has the queries of its shard (diffusion/shard.py): two chunks of clean tokens, each
causal attention aligned at the bottom right over the keys from its first document's start to the chunk's end, and two
runs of blocks, each part (2) over the keys from its first document's start to its last block's start. The keys of clean
tokens come from all ranks, in both passes (key_exchange.py).
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.shard import RowShard
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.key_exchange import KeyExchange, key_exchange
from sdlm_megatron.model.attention.varlen import KernelOutput, Sequences, VarlenKernel


@dataclass(frozen=True)
class _Chunk:
    """Consecutive clean tokens, for part (1)."""

    queries: slice
    """Among this process's tokens."""
    keys: slice
    """Among the clean tokens of the row."""
    at: Sequences


@dataclass(frozen=True)
class _Run:
    """Consecutive blocks, for part (2)."""

    blocks: slice
    """Among this process's blocks."""
    keys: slice
    """Among the clean tokens of the row."""
    at: Sequences
    n_queries: int
    """Over all documents."""
    place: Tensor
    """int64 (blocks,): each block's query; n_queries for a block without clean keys."""
    has_orphans: bool
    """Whether some block starts at position 0 and so has no clean keys."""

    @property
    def orphans(self) -> Tensor:
        """bool (blocks,): the block has no clean keys."""
        return self.place == self.n_queries


@dataclass(frozen=True)
class _RowIndex:
    """Location of the three parts among this process's tokens."""

    n_clean: int
    used: int
    block_size: int
    causal: bool
    """A slot sees only itself and earlier slots of its block."""
    chunks: list[_Chunk]
    runs: list[_Run]
    exchange: KeyExchange | None
    """None: this process has all clean tokens."""


def _row_index(part: RowLayout | RowShard, causal: bool, group: Any) -> _RowIndex:
    """The index of a row or shard, in O(documents + blocks)."""
    shard = part if isinstance(part, RowShard) else RowShard(part, 0, 1)
    documents, whole = _Documents(shard.layout), shard.size == 1
    chunks, runs, begin = [], [], 0
    for clean in shard.clean:
        if clean.stop > clean.start:
            chunks.append(_chunk(documents, clean, begin))
            begin = chunks[-1].queries.stop
    begin = 0
    for blocks in shard.blocks:
        if blocks.stop > blocks.start:
            runs.append(_run(documents, blocks, begin, whole=whole))
            begin = runs[-1].blocks.stop
    exchange = None if whole or not shard.layout.n_clean else key_exchange(shard, group)
    return _RowIndex(shard.n_clean, shard.used, shard.layout.block_size, causal, chunks, runs, exchange)


class _Documents:
    """The documents of a row that have tokens; the others have no blocks either."""

    def __init__(self, layout: RowLayout) -> None:
        numbers = np.flatnonzero(layout.clean_lens)
        self.lens = layout.clean_lens[numbers].astype(np.int64)
        self.ends = np.cumsum(self.lens)
        self.starts = layout.starts.astype(np.int64)
        self.of_blocks = np.searchsorted(numbers, layout.block_documents())


def _chunk(documents: _Documents, clean: slice, begin: int) -> _Chunk:
    """The clean tokens `clean` of a row; the first of them is token `begin` of this process."""
    first, last = np.searchsorted(documents.ends, [clean.start, clean.stop - 1], side="right")
    touched = slice(first, last + 1)
    heads = documents.ends[touched] - documents.lens[touched]
    ends = np.minimum(documents.ends[touched], clean.stop)
    at = _sequences(ends - np.maximum(heads, clean.start), ends - heads)
    return _Chunk(slice(begin, begin + clean.stop - clean.start), slice(int(heads[0]), clean.stop), at)


def _run(documents: _Documents, blocks: slice, begin: int, *, whole: bool) -> _Run:
    """The blocks `blocks` of a row; the first of them is block `begin` of this process.

    Args:
        whole: the keys are all clean tokens of the row, as in part (1), and not only those that some block sees.
    """
    starts, owners = documents.starts[blocks], documents.of_blocks[blocks]
    first, last = (0, len(documents.lens) - 1) if whole else (int(owners[0]), int(owners[-1]))
    lens, owners = documents.lens[first : last + 1].copy(), owners - first
    if not whole:
        lens[-1] = max(1, int(starts[-1]))
    earliest = lens.copy()  # a document without blocks keeps one query, since kernels reject empty sequences
    np.minimum.at(earliest, owners, np.maximum(starts, 1))
    rows = lens + 1 - earliest
    offset = np.cumsum(rows) - rows
    place = np.where(starts > 0, (offset - earliest)[owners] + starts, rows.sum())
    head = int(documents.ends[first] - documents.lens[first])
    return _Run(
        blocks=slice(begin, begin + len(starts)),
        keys=slice(head, head + int(lens.sum())),
        at=_sequences(rows, lens),
        n_queries=int(rows.sum()),
        place=torch.from_numpy(place),
        has_orphans=bool((starts == 0).any()),
    )


def _sequences(queries: np.ndarray, keys: np.ndarray) -> Sequences:
    """Sequences with these numbers of queries and keys, int (documents,)."""
    cu_q, cu_k = (torch.from_numpy(np.concatenate([[0], np.cumsum(x)]).astype(np.int32)) for x in (queries, keys))
    return Sequences(cu_q, cu_k, int(queries.max(initial=0)), int(keys.max(initial=0)))


class Decomposed(RowAttention):
    """The three parts over one varlen kernel.

    Args:
        part: the row, or this process's shard of it.
        group: process group of the ranks that share the row; they call the attention together.
    """

    def __init__(
        self, part: RowLayout | RowShard, kernel: VarlenKernel, *, causal_attn: bool, group: Any = None
    ) -> None:
        self.kernel, self.index = kernel, _row_index(part, causal_attn, group)

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
        keys, values, scores = k[:n], v[:n], None
        folded = _fold(q[n : index.used], k.shape[1], index.block_size) if index.runs else None
        if index.exchange is not None:
            arrive = index.exchange.gather(keys, values)
            scores = None if folded is None else _own_scores(folded, k, v, index, scale)  # while the keys travel
            keys, values = arrive()
        out, lse, saved = torch.empty_like(q), q.new_empty(0), []
        out[index.used :] = 0
        for chunk in index.chunks:
            part = kernel.forward(q[chunk.queries], keys[chunk.keys], values[chunk.keys], chunk.at, scale)
            out[chunk.queries] = part.out
            saved.append((part.lse, *part.state))
        if folded is not None:
            prefix = []
            for run in index.runs:
                queries = _to_prefix(folded[run.blocks], run)
                prefix.append(kernel.forward(queries, keys[run.keys], values[run.keys], run.at, scale))
                saved.append(prefix[-1].state)
            scores = scores or _own_scores(folded, k, v, index, scale)
            merged, lse = _merge(prefix, index.runs, scores, folded)
            out[n : index.used] = _unfold(merged.to(q.dtype), index.block_size)
        # other ranks' keys are fetched again, so that what is kept shrinks with the number of ranks
        ctx.save_for_backward(q, k, v, out, lse, *(x for tensors in saved for x in tensors))
        ctx.index, ctx.kernel, ctx.scale, ctx.counts = index, kernel, scale, [len(tensors) for tensors in saved]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        index, kernel, scale = ctx.index, ctx.kernel, ctx.scale
        left, n, grad = iter(tensors), index.n_clean, grads[0].contiguous()
        saved = iter([tuple(islice(left, count)) for count in ctx.counts])
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        keys, values, d_keys, d_values, own = k[:n], v[:n], dk[:n], dv[:n], None
        blocks: Any = None  # queries, gradient and output of the blocks
        if index.runs:
            blocks = [_fold(x[n : index.used], k.shape[1], index.block_size) for x in (q, grad, out)]
        if index.exchange is not None:
            arrive = index.exchange.gather(keys, values)
            own = _own_backward(*blocks, lse, k, v, (dk, dv), index, scale) if blocks else None
            keys, values = arrive()
            wide = torch.promote_types(k.dtype, torch.float32)  # up to four parts are added
            d_keys, d_values = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        for chunk in index.chunks:
            chunk_lse, *state = next(saved)
            output = KernelOutput(out[chunk.queries], chunk_lse, tuple(state))
            given = (grad[chunk.queries], q[chunk.queries], keys[chunk.keys], values[chunk.keys])
            dq[chunk.queries], dk_chunk, dv_chunk = kernel.backward(*given, output, chunk.at, scale)
            d_keys[chunk.keys] += dk_chunk
            d_values[chunk.keys] += dv_chunk
        if blocks:
            parts = []
            for run in index.runs:
                rows = (_to_prefix(x[run.blocks], run) for x in (*blocks, lse[..., None]))
                queries, d_out, o, run_lse = rows
                output = KernelOutput(o, run_lse[..., 0], next(saved))
                given = (d_out, queries, keys[run.keys], values[run.keys])
                dq_run, dk_run, dv_run = kernel.backward(*given, output, run.at, scale)
                d_keys[run.keys] += dk_run
                d_values[run.keys] += dv_run
                parts.append(_from_prefix(dq_run, run, 0.0))
            own = own if own is not None else _own_backward(*blocks, lse, k, v, (dk, dv), index, scale)
            d_folded = _joined(parts).view(own.shape).to(own.dtype) + own
            dq[n : index.used] = _unfold(d_folded.to(q.dtype), index.block_size)
        if index.exchange is not None:
            dk[:n], dv[:n] = index.exchange.reduce(d_keys.to(k.dtype), d_values.to(v.dtype))
        return dq, dk, dv, None, None, None


def _merge(
    prefix: list[KernelOutput], runs: list[_Run], scores: tuple[Tensor, Tensor, Tensor], folded: Tensor
) -> tuple[Tensor, Tensor]:
    """Parts (2) and (3): output and merged lse (blocks, kv_heads, groups * D[, d]), both in fp32 or fp64."""
    # a block without clean keys gets lse = -inf, so that part (2) has weight 0 in the merge
    outs = [_from_prefix(part.out, run, 0.0) for part, run in zip(prefix, runs, strict=True)]
    lses = [_from_prefix(part.lse, run, -torch.inf) for part, run in zip(prefix, runs, strict=True)]
    prefix_out, prefix_lse = _joined(outs).view(folded.shape), _joined(lses).view(folded.shape[:-1])
    own, _, own_v = scores
    lse = torch.logaddexp(prefix_lse.to(own.dtype), own.logsumexp(-1))
    probabilities = (own - lse[..., None]).exp()
    share = (prefix_lse - lse).exp()
    return prefix_out.to(own.dtype) * share[..., None] + probabilities @ own_v, lse


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _own_backward(
    folded: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    into: tuple[Tensor, Tensor],
    index: _RowIndex,
    scale: float,
) -> Tensor:
    """Part (3)'s gradient of the folded queries, fp32 or fp64; those of its keys and values are written to `into`."""
    dk, dv = into
    scores, own_k, own_v = _own_scores(folded, k, v, index, scale)
    wide = scores.dtype
    probabilities = (scores - lse[..., None]).exp()
    d_out = d_out.to(wide)
    delta = (d_out * out.to(wide)).sum(-1, keepdim=True)
    d_scores = scale * probabilities * (d_out @ own_v.transpose(-1, -2) - delta)
    own_dk, own_dv = d_scores.transpose(-1, -2) @ folded.to(wide), probabilities.transpose(-1, -2) @ d_out
    dk[index.n_clean : index.used] = own_dk.transpose(1, 2).flatten(0, 1).to(k.dtype)
    dv[index.n_clean : index.used] = own_dv.transpose(1, 2).flatten(0, 1).to(v.dtype)
    return d_scores @ own_k


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


def _to_prefix(folded: Tensor, run: _Run) -> Tensor:
    """(blocks, kv_heads, groups * D, d) -> queries of part (2), (n_queries, heads * D, d), zero where no block is."""
    # also right for the lse: the query and gradient of such a row are zero, so any lse contributes zero
    rows = folded.new_zeros(run.n_queries + 1, folded.shape[1] * folded.shape[2], folded.shape[3])
    rows[run.place] = folded.flatten(1, 2)
    return rows[: run.n_queries]


def _from_prefix(rows: Tensor, run: _Run, orphan: float) -> Tensor:
    """Each block's query: (n_queries, heads * D, …) -> (blocks, heads * D, …); `orphan` for one without clean keys."""
    if not run.has_orphans:
        return rows[run.place]
    of_blocks = rows[run.place.clamp(max=run.n_queries - 1)]
    return of_blocks.masked_fill(run.orphans.view(-1, *[1] * (rows.ndim - 1)), orphan)
