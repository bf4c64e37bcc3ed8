"""Core attention of a packed SDLM row: exact, document by document, never an S x S tensor.

The contract of an attention backend is the class `RowAttention`: built once per micro-batch from the row's layout,
then called by every layer with that layer's q, k, v.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.mask import block_rows, visible

SMALL_DOCUMENT = 768
"""Documents up to this expanded length take one call with their own dense mask; longer ones go in chunks."""
CHUNK_TOKENS = 256
"""Block tokens of a long document that attend together."""


class RowAttention:
    """Attention over one row, split into pieces with a dense mask each.

    A short document is one piece (its clean and block tokens under `visible`). A long document is one causal piece
    for the clean tokens and one piece for each chunk of neighbouring blocks, whose keys are the clean prefix up to
    the chunk's last anchor and the chunk's own blocks. The largest mask is CHUNK_TOKENS x document length.
    """

    def __init__(self, layout: RowLayout, row_length: int, device: torch.device, *, causal_attn: bool) -> None:
        self.n_padding = row_length - layout.used
        self.clean_pieces: list[_Piece] = []
        self.block_pieces: list[_Piece] = []
        clean_at = layout.clean_offsets()
        first_block = np.cumsum(layout.n_blocks) - layout.n_blocks
        for doc in range(layout.n_docs):
            starts = layout.starts[first_block[doc] : first_block[doc] + layout.n_blocks[doc]]
            block_at = layout.n_clean + int(first_block[doc]) * layout.block_size
            self._add(
                int(clean_at[doc]),
                int(layout.clean_lens[doc]),
                block_at,
                starts,
                layout.block_size,
                causal_attn,
                device,
            )

    def _add(
        self,
        clean_at: int,
        clean_len: int,
        block_at: int,
        starts: np.ndarray,
        d: int,
        causal: bool,
        device: torch.device,
    ) -> None:
        """Adds the pieces of one document."""
        if clean_len + len(starts) * d <= SMALL_DOCUMENT:
            mask = torch.from_numpy(visible(clean_len, starts, block_size=d, causal_attn=causal)).to(device)
            clean, blocks = slice(clean_at, clean_at + clean_len), slice(block_at, block_at + len(starts) * d)
            self.clean_pieces.append(_Piece(clean, blocks, mask, joint=True))
            return
        self.clean_pieces.append(_Piece(slice(clean_at, clean_at + clean_len), slice(0, 0), None, joint=False))
        step = max(1, CHUNK_TOKENS // d)
        for i in range(0, len(starts), step):
            part = starts[i : i + step]
            prefix = int(part[-1])  # a block never sees its own anchor's clean copy
            own = block_rows(prefix, part, block_size=d, causal_attn=causal)
            blocks = slice(block_at + i * d, block_at + (i + len(part)) * d)
            piece = _Piece(slice(clean_at, clean_at + prefix), blocks, torch.from_numpy(own).to(device), joint=False)
            self.block_pieces.append(piece)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q (S, heads, d), k and v (S, kv_heads, d) -> (S, heads, d); padding gives zeros."""
        clean, blocks = [], []
        for piece in self.clean_pieces:
            if piece.joint:
                n_clean = piece.clean.stop - piece.clean.start
                keys, values = piece.both(k), piece.both(v)
                out = _attend(piece.both(q), keys, values, piece.mask, scale)
                clean.append(out[:n_clean])
                blocks.append(out[n_clean:])
            else:
                clean.append(_attend(q[piece.clean], k[piece.clean], v[piece.clean], None, scale))
        blocks += [_attend(q[p.blocks], p.both(k), p.both(v), p.mask, scale) for p in self.block_pieces]
        padding = 0 * q[q.shape[0] - self.n_padding :]
        if not clean:  # a row of padding only: keep the graph to k and v, every rank runs every backward collective
            padding = padding + 0 * (k.sum() + v.sum())
        return torch.cat([*clean, *blocks, padding])


class _Piece:
    """Slices of the row that attend together, and their mask (None: causal over the clean slice)."""

    def __init__(self, clean: slice, blocks: slice, mask: torch.Tensor | None, *, joint: bool) -> None:
        self.clean, self.blocks, self.mask, self.joint = clean, blocks, mask, joint

    def both(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[self.clean], x[self.blocks]])


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Softmax attention: q (Q, heads, d), k and v (K, kv_heads, d), mask bool (Q, K) or None for causal."""
    if not q.shape[0]:
        return q
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the kernels take one key head per query head
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if mask is not None and q.device.type == "cpu":
        # in bf16 less than half the time of torch's flash attention for CPU (python -m bench.cpu_choices)
        scores = torch.baddbmm(_bias(mask, q.dtype), q, k.transpose(1, 2), alpha=scale)
        return torch.bmm(scores.softmax(-1), v).transpose(0, 1)
    return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale)[
        0
    ].transpose(0, 1)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, else minus infinity: (1, Q, K)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)[None]


@dataclass
class SDLMRowParams(PackedSeqParams):
    """The row's attention on its way to every layer of every pipeline stage.

    Megatron-Core hands its PackedSeqParams unchanged to every layer, also under recompute, so this one carries ours.
    (The attention mask argument would not do: recompute saves tensors only, and a mask tensor would be S x S.)
    """

    attention: RowAttention = field(default=None)  # type: ignore[assignment]  # the base's fields have defaults

    @classmethod
    def of(cls, attention: RowAttention, row_length: int) -> "SDLMRowParams":
        return cls(attention=attention, qkv_format="sbhd", max_seqlen_q=row_length, max_seqlen_kv=row_length)


class SDLMCoreAttention(torch.nn.Module):
    """Megatron-Core's core attention module; the row's description arrives in `packed_seq_params`."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.scale = kwargs.get("softmax_scale") or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: SDLMRowParams,
        **_: Any,
    ) -> torch.Tensor:
        """query [S, 1, heads, d], key and value [S, 1, kv_heads, d] after RoPE -> [S, 1, heads * d]."""
        assert query.shape[1] == 1, "a micro-batch is one packed row"
        out = packed_seq_params.attention(query[:, 0], key[:, 0], value[:, 0], self.scale)
        return out.reshape(out.shape[0], 1, -1)
