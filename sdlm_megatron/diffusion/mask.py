"""Visibility of a packed row (paper, section 3.3 and figure 3): the dense definition every attention backend is
tested against.

Example: L = 4, D = 2, one block at p = 2. Rows are queries, columns keys, 1 = visible:

                 clean     block
                 0 1 2 3   4 5
    clean   0    1 . . .   . .
            1    1 1 . .   . .
            2    1 1 1 .   . .
            3    1 1 1 1   . .
    block   4    1 1 . .   1 1      slot 0 stands for x[2], so the clean copy of x[2] is hidden from the block
            5    1 1 . .   1 1      with causal_attn, row 4 does not see column 5
"""

import numpy as np

from sdlm_megatron.diffusion.layout import RowLayout


def visible(clean_len: int, block_starts: np.ndarray, *, block_size: int, causal_attn: bool = False) -> np.ndarray:
    """Visibility inside one expanded document: bool (S, S), [query, key], S = L + n*D.

    - A clean token i sees the clean tokens k <= i.
    - A token of a block with start p sees the clean tokens k < p, and all D tokens of its own block; with
      `causal_attn` only itself and the slots before it.
    - No other token sees a block token.
    """
    clean = np.arange(clean_len)
    size = clean_len + len(block_starts) * block_size
    seen = np.zeros((size, size), dtype=bool)
    seen[:clean_len, :clean_len] = clean[None, :] <= clean[:, None]
    seen[clean_len:] = block_rows(clean_len, block_starts, block_size=block_size, causal_attn=causal_attn)
    return seen


def block_rows(clean_len: int, block_starts: np.ndarray, *, block_size: int, causal_attn: bool = False) -> np.ndarray:
    """The rows of `visible` that belong to block tokens: bool (n*D, clean_len + n*D).

    For a few neighboring blocks of a long document it is enough to pass their starts and, as `clean_len`, the last of
    these starts: clean keys from there on are invisible to all of them.
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
    # a query without any key would make softmax NaN, so padding sees itself
    seen = np.eye(row_length, dtype=bool)
    clean_at = layout.clean_offsets()
    first = np.cumsum(layout.n_blocks) - layout.n_blocks
    block_at = layout.n_clean + first * layout.block_size
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
    """Number of visible (query, key) pairs of a row without padding, computed in O(documents + blocks)."""
    size = layout.block_size
    lens = layout.clean_lens.astype(np.int64)
    clean = int((lens * (lens + 1) // 2).sum())
    to_clean = size * int(layout.starts.astype(np.int64).sum())  # a block at p sees p clean tokens from each slot
    in_block = size * (size + 1) // 2 if causal_attn else size * size
    return clean + to_clean + in_block * len(layout.starts)
