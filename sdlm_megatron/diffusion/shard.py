"""Split of a packed row over the ranks of context parallelism: which of its tokens each rank has.

The clean tokens are cut into 2 N pieces, and rank r of N has pieces r and 2 N - 1 - r. A token sees all before it, so
that early pieces are cheap and late ones expensive; in these pairs every rank gets as much work. The blocks, in their
order in the row, are dealt in the same way; none is cut.

Example, N = 2, 8 clean tokens and 4 blocks of D = 2:

    row       c0 c1 c2 c3 c4 c5 c6 c7 | A A | B B | C C | D D
    rank 0    c0 c1 c6 c7 A A D D
    rank 1    c2 c3 c4 c5 B B C C

Everything follows from the row's layout, so that the ranks agree without exchanging anything.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sdlm_megatron.diffusion.layout import RowLayout


@dataclass(frozen=True)
class RowShard:
    """What one rank has of a row: clean tokens, then block tokens, both in the order of the row, then padding."""

    layout: RowLayout
    """Of the whole row."""
    rank: int
    size: int
    """N, ranks that share the row."""

    @cached_property
    def clean(self) -> tuple[slice, slice]:
        """Indices in the row of this rank's clean tokens: an early and a late piece, each possibly empty."""
        return pieces(self.layout.n_clean, self.rank, self.size)

    @cached_property
    def blocks(self) -> tuple[slice, slice]:
        """Numbers of this rank's blocks, as `clean`."""
        return pieces(len(self.layout.starts), self.rank, self.size)

    @property
    def n_clean(self) -> int:
        """Clean tokens of this rank."""
        return sum(x.stop - x.start for x in self.clean)

    @property
    def n_blocks(self) -> int:
        """Blocks of this rank."""
        return sum(x.stop - x.start for x in self.blocks)

    @property
    def used(self) -> int:
        """Tokens of this rank without padding."""
        return self.n_clean + self.n_blocks * self.layout.block_size

    @cached_property
    def index(self) -> np.ndarray:
        """Index in the row of each token of this rank: int64 (used,), ascending."""
        n, size = self.layout.n_clean, self.layout.block_size
        blocks = (slice(n + x.start * size, n + x.stop * size) for x in self.blocks)
        return np.concatenate([np.arange(x.start, x.stop) for x in (*self.clean, *blocks)])

    def clean_by_rank(self) -> list[np.ndarray]:
        """Index in the row of each rank's clean tokens: int64, by rank."""
        parts = (pieces(self.layout.n_clean, rank, self.size) for rank in range(self.size))
        return [np.concatenate([np.arange(x.start, x.stop) for x in part]) for part in parts]


def pieces(count: int, rank: int, size: int) -> tuple[slice, slice]:
    """The early and the late part of [0, count) that rank `rank` of `size` has; together at most ceil(count / size)."""
    ends = np.arange(size + 1) * count // size
    totals = np.diff(ends)
    early = (totals + 1) // 2
    first, last = int(early[:rank].sum()), count - int((totals - early)[:rank].sum())
    return slice(first, first + int(early[rank])), slice(last - int(totals[rank] - early[rank]), last)


def shard_length(row_length: int, block_size: int, size: int, multiple: int) -> int:
    """Tokens of a rank's shard with padding: the same for all rows of `row_length` tokens, so that stages agree.

    Args:
        row_length: S.
        block_size: D.
        size: N.
        multiple: the length is a multiple of it.
    """
    # at most ceil(clean / N) clean tokens and ceil(blocks / N) blocks of a row with clean + blocks * D <= S
    most = (row_length + (size - 1) * (1 + block_size)) // size
    return -(-most // multiple) * multiple
