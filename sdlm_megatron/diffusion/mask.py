"""Who sees whom (paper section 3.3, figure 3): the dense definition that every attention backend is tested against."""

import numpy as np

from sdlm_megatron.diffusion.layout import RowLayout


def visible(clean_len: int, block_starts: np.ndarray, *, block_size: int, causal_attn: bool = False) -> np.ndarray:
    """Visibility inside one expanded document: bool (S, S), [query, key], S = clean_len + n*D.

    - a clean query sees clean keys up to itself;
    - a block token sees the clean keys strictly before its anchor p, and its own block: all of it, or with
      `causal_attn` only up to itself;
    - nobody else sees a block token.
    """
    clean = np.arange(clean_len)
    size = clean_len + len(block_starts) * block_size
    seen = np.zeros((size, size), dtype=bool)
    seen[:clean_len, :clean_len] = clean[None, :] <= clean[:, None]
    seen[clean_len:] = block_rows(clean_len, block_starts, block_size=block_size, causal_attn=causal_attn)
    return seen


def block_rows(clean_len: int, block_starts: np.ndarray, *, block_size: int, causal_attn: bool = False) -> np.ndarray:
    """The rows of `visible` that belong to block tokens: bool (n*D, clean_len + n*D).

    For some neighbouring blocks of a long document it is enough to pass these blocks' starts and, as `clean_len`,
    their last start: the clean keys beyond it are invisible to all of them.
    """
    starts = np.asarray(block_starts, dtype=np.int64)
    block = np.repeat(np.arange(len(starts)), block_size)
    slot = np.tile(np.arange(block_size), len(starts))
    prefix = np.arange(clean_len)[None, :] < starts[block][:, None]
    own = block[None, :] == block[:, None]
    if causal_attn:
        own &= slot[None, :] <= slot[:, None]
    return np.concatenate([prefix, own], axis=1)


def visible_row(layout: RowLayout, row_length: int, *, causal_attn: bool = False) -> np.ndarray:
    """Visibility of a packed row: bool (row_length, row_length). Documents are isolated; padding sees only itself."""
    seen = np.eye(row_length, dtype=bool)
    clean_at = layout.clean_offsets()
    block_at = layout.n_clean + (np.cumsum(layout.n_blocks) - layout.n_blocks) * layout.block_size
    first = np.cumsum(layout.n_blocks) - layout.n_blocks
    for doc in range(layout.n_docs):
        starts = layout.starts[first[doc] : first[doc] + layout.n_blocks[doc]]
        index = np.concatenate(
            [
                np.arange(clean_at[doc], clean_at[doc] + layout.clean_lens[doc]),
                np.arange(block_at[doc], block_at[doc] + layout.n_blocks[doc] * layout.block_size),
            ]
        )
        seen[np.ix_(index, index)] = visible(
            int(layout.clean_lens[doc]), starts, block_size=layout.block_size, causal_attn=causal_attn
        )
    return seen


def visible_pairs(layout: RowLayout, *, causal_attn: bool = False) -> int:
    """Number of (query, key) pairs of a row that attention uses, padding left out, without building the mask."""
    size = layout.block_size
    lens = layout.clean_lens.astype(np.int64)
    clean = int((lens * (lens + 1) // 2).sum())
    to_clean = size * int(layout.starts.astype(np.int64).sum())
    in_block = size * (size + 1) // 2 if causal_attn else size * size
    return clean + to_clean + in_block * len(layout.starts)
