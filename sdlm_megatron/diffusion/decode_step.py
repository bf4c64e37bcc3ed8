"""Interface between the decoding loop and a model: one `Step` in, one tensor of logits out.

The exporter copies this file into the model folder unchanged, so it imports nothing but torch. Shapes: B rows, T
columns, W windows of n slots, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Input of one forward pass. `width` and `longest` are host integers, so that shapes need no synchronization."""

    ids: Tensor
    """int64 (B, T): tokens of each row, column = position; columns from `end` on are undefined."""
    end: Tensor
    """int64 (B,): tokens of the row: prompt, kept tokens and, with self_speculative and lossless, drafts."""
    cached: Tensor
    """int64 (B,): tokens of the row whose keys and values are already in the cache."""
    width: int
    """Largest end - cached of any row: new tokens of the pass."""
    longest: int
    """Largest `end` of any row."""
    anchors: Tensor
    """int64 (B, W): position of each window's anchor, the token before its first proposal; slot 0 repeats it."""
    window: int
    """n. With n = 1 there are no mask tokens: the proposal is the causal prediction of the last token (W = 1)."""
    kept_rows: Tensor | None
    """int64 (B,): indices of these rows in the batch of the previous pass; None: all rows are still there."""
    clean_anchors: bool = False
    """Slot 0 of a window is the clean token of its anchor, fed once, and the window holds only the n-1 mask tokens
    behind it. The anchors are the last W tokens of each row. Only for models whose slot 0 sees what that token sees
    (`causal_attn` with the target shift); a proposer may feed whole windows all the same."""


class Proposer(Protocol):
    """A model as the decoding loop sees it: `decode_model.TransformersProposer`, `parallel.engine.EngineProposer`."""

    def __call__(self, step: Step) -> Tensor:
        """Logits (B, W, n, V) of the windows' proposals, any float dtype: slot j of an anchor p proposes x[p+1+j]."""
