"""What a pass of decoding asks of a model.

The exporter copies this file into the model folder as it is, so it imports nothing but torch. Shapes: B rows, T
columns, W windows of n slots, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What a pass proposes from. `width` and `longest` are known to the host, so that shapes need no sync."""

    ids: Tensor
    """int64 (B, T): each row's tokens at column = position; what stands from `end` on means nothing."""
    end: Tensor
    """int64 (B,): tokens of the row: prompt, kept tokens, and with self_speculative the drafts."""
    cached: Tensor
    """int64 (B,): how many of these earlier passes have written to the cache."""
    width: int
    """The most new tokens, end - cached, of any row."""
    longest: int
    """The largest `end`."""
    anchors: Tensor
    """int64 (B, W): position of the token before each window's first proposal; slot 0 repeats it, see decode."""
    window: int
    """n. 1: no mask tokens: the proposal is the plain causal one of the last token (W = 1)."""
    kept_rows: Tensor | None
    """int64 (B,): which rows of the last pass these are; None: all of them."""


class Proposer(Protocol):
    """A model as the loop needs it; a training engine can be one."""

    def __call__(self, step: Step) -> Tensor:
        """Logits (B, W, n, V) of the windows' proposals, any float dtype."""
