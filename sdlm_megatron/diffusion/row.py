"""One micro-batch: one packed row as tensors, with everything a pipeline stage needs."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch

from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, next_token_targets, row_positions, row_targets


class Movable(Protocol):
    """What the layers need of a row besides its tensors; see model.attention.RowAttention."""

    def to(self, device: torch.device) -> Self:
        """A copy on `device`."""


@dataclass(frozen=True)
class MicroBatch:
    """A packed row of S tokens. Index tensors are int64."""

    tokens: torch.Tensor
    """(1, S) token ids, padded."""
    positions: torch.Tensor
    """(1, S) position ids; padding counts as 0."""
    label_index: torch.Tensor
    """(N,) row indices of the tokens with a target; N >= 1: a row without any names token 0."""
    label_targets: torch.Tensor
    """(N,) the targets; IGNORE for the stand-in of a row without any."""
    label_slots: torch.Tensor
    """(N,) slot 0..D-1 of each of them; D for a clean token."""
    layout: RowLayout
    number: int | None
    """The row's number in the run, None for an empty row."""
    attention: Movable | None = None
    """How the layers attend over this row; None: the model builds it from the layout."""
    label_weights: torch.Tensor | None = None
    """float32 (N,) what each target's loss counts; None: 1 each."""
    logits: bool = False
    """Asks the model for the logits of the label rows, not for their losses."""
    measure: bool = False
    """Asks for confidence and correctness beside the losses."""

    def to(self, device: torch.device | str) -> "MicroBatch":
        """A copy on `device`."""
        device = torch.device(device)
        moved: dict[str, Any] = {k: to_device(x, device) for k, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **moved, attention=self.attention and self.attention.to(device))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` that does not make the host wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory first waits for all work of the stream
    return tensor.to(device, non_blocking=True)


def make_micro_batch(
    tokens: np.ndarray,
    layout: RowLayout,
    *,
    row_length: int,
    pad_token_id: int,
    eos_token_id: int,
    number: int | None,
    next_token_weight: float = 0.0,
) -> MicroBatch:
    """Tokens (used,) and layout of a row to the tensors of a micro-batch of `row_length` tokens.

    With a `next_token_weight` the clean tokens of `layout.next_token_targets` have targets too, which count so much.
    """
    padded = np.full(row_length, pad_token_id, dtype=np.int64)
    padded[: layout.used] = tokens
    positions = np.zeros(row_length, dtype=np.int64)
    positions[: layout.used] = row_positions(layout)
    targets, weights = row_targets(tokens, layout, eos_token_id), None
    if next_token_weight:
        targets[: layout.n_clean] = next_token_targets(tokens, layout, eos_token_id)
    index = np.flatnonzero(targets != IGNORE)
    if len(index):
        wanted, slots = targets[index].astype(np.int64), (index - layout.n_clean) % layout.block_size
        slots[index < layout.n_clean] = layout.block_size
    else:  # the last stage still has to take part in every collective of the loss
        index, wanted, slots = np.zeros(1, np.int64), np.full(1, IGNORE, np.int64), np.zeros(1, np.int64)
    if next_token_weight:
        weights = torch.from_numpy(np.where(slots < layout.block_size, 1.0, next_token_weight).astype(np.float32))
    return MicroBatch(
        torch.from_numpy(padded[None]),
        torch.from_numpy(positions[None]),
        torch.from_numpy(index),
        torch.from_numpy(wanted),
        torch.from_numpy(slots),
        layout,
        number,
        label_weights=weights,
    )


def empty_layout(block_size: int) -> RowLayout:
    """A row of padding only."""
    none = np.empty(0, dtype=np.int32)
    return RowLayout(none, none, none, none, block_size)
