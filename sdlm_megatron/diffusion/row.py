"""Micro-batch of training: one packed row as tensors, complete for every pipeline stage."""

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch

from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, next_token_targets, row_positions, row_targets
from sdlm_megatron.diffusion.shard import RowShard, shard_length


class Movable(Protocol):
    """Attention tables of a row, as far as this module needs to know them; see model.attention.contract."""

    def to(self, device: torch.device) -> Self:
        """A copy on `device`."""


@dataclass(frozen=True)
class MicroBatch:
    """A packed row of S tokens, N of them with a target (label rows). Index tensors are int64.

    For the example in diffusion.layout, padded to S = 16: label_index = [6, 7, 8, 9], label_targets =
    [13, 14, 99, 99], label_slots = [0, 1, 2, 0].
    """

    tokens: torch.Tensor
    """(1, S) token ids, padded."""
    positions: torch.Tensor
    """(1, S) position ids; 0 at padding."""
    label_index: torch.Tensor
    """(N,) indices of the label rows in the row. N >= 1: a row without targets has token 0 as a stand-in."""
    label_targets: torch.Tensor
    """(N,) targets; IGNORE for the stand-in."""
    label_slots: torch.Tensor
    """(N,) slot 0..D-1 of each label row; D for a clean token."""
    layout: RowLayout
    rows: tuple[int, ...] = ()
    """Number of the row of the run that each document of the layout comes from."""
    label_documents: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64), compare=False)
    """int64 (N,), on the host: index in the layout of each label row's document; -1 for the stand-in."""
    attention: Movable | None = None
    """Attention of the layers over this row; None: the model builds it from the layout."""
    label_weights: torch.Tensor | None = None
    """float32 (N,) weight of each label row's loss; None: 1."""
    logits: bool = False
    """Requests the logits of the label rows instead of their losses."""
    measure: bool = False
    """Requests confidence and correctness in addition to the losses."""
    shard: RowShard | None = None
    """Which part of the row the tensors hold; None: all of it. `layout`, `rows` stay those of the whole row."""
    label_numbers: np.ndarray | None = field(default=None, compare=False)
    """Of a shard, int64 on the host: numbers of its label rows among those of the whole row, without the stand-in."""
    row_targets: int = 0
    row_labels: int = 0
    """Of a shard: block targets, and label rows, of the whole row."""

    @property
    def n_clean(self) -> int:
        """Clean tokens among `tokens`, which come first."""
        return (self.shard or self.layout).n_clean

    @property
    def n_blocks(self) -> int:
        """Blocks among `tokens`, which follow."""
        return self.shard.n_blocks if self.shard else len(self.layout.starts)

    def to(self, device: torch.device | str) -> "MicroBatch":
        """A copy on `device`."""
        device = torch.device(device)
        moved: dict[str, Any] = {k: to_device(x, device) for k, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **moved, attention=self.attention and self.attention.to(device))


def to_device(value: Any, device: torch.device) -> Any:
    """A copy of a tensor on `device`, or of a list or dataclass with its tensors there; other values as they are.

    The host does not wait for the device.
    """
    if isinstance(value, torch.Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # from pageable memory, CUDA would first drain the stream
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: to_device(item, device) for name, item in vars(value).items()})
    return value


def make_micro_batch(
    tokens: np.ndarray,
    layout: RowLayout,
    *,
    row_length: int,
    pad_token_id: int,
    eos_token_id: int,
    rows: Sequence[int] = (),
    next_token_weight: float = 0.0,
) -> MicroBatch:
    """The tensors of one row.

    Args:
        tokens: int (used,), tokens of the row.
        layout: of the row.
        row_length: S; the row is padded to it.
        pad_token_id: token of the padding; any id will do, since padding has no target and no other token sees it.
        eos_token_id: token that closes a turn; see `row_targets`.
        rows: see MicroBatch.
        next_token_weight: above 0, clean tokens get targets with this weight too (`layout.next_token_targets`).
    """
    padded = np.full(row_length, pad_token_id, dtype=np.int64)
    padded[: layout.used] = tokens
    positions = np.zeros(row_length, dtype=np.int64)
    positions[: layout.used] = row_positions(layout)
    targets, weights = row_targets(tokens, layout, eos_token_id), None
    if next_token_weight:
        targets[: layout.n_clean] = next_token_targets(tokens, layout, eos_token_id)
    index = np.flatnonzero(targets != IGNORE)
    block = np.maximum(index - layout.n_clean, 0) // layout.block_size
    documents = np.where(
        index < layout.n_clean,
        np.searchsorted(np.cumsum(layout.clean_lens), index, side="right"),
        np.append(layout.block_documents(), 0)[block],
    )
    if len(index):
        label_targets, slots = targets[index].astype(np.int64), (index - layout.n_clean) % layout.block_size
        slots[index < layout.n_clean] = layout.block_size
    else:  # without label rows, the last stage would skip the collectives of the loss and the other ranks would hang
        index, label_targets, slots = np.zeros(1, np.int64), np.full(1, IGNORE, np.int64), np.zeros(1, np.int64)
        documents = np.full(1, -1)
    if next_token_weight:
        weights = torch.from_numpy(np.where(slots < layout.block_size, 1.0, next_token_weight).astype(np.float32))
    return MicroBatch(
        torch.from_numpy(padded[None]),
        torch.from_numpy(positions[None]),
        torch.from_numpy(index),
        torch.from_numpy(label_targets),
        torch.from_numpy(slots),
        layout,
        tuple(rows),
        documents,
        label_weights=weights,
    )


def shard_row(batch: MicroBatch, rank: int, size: int, *, multiple: int = 1) -> MicroBatch:
    """The part of a row that rank `rank` of `size` ranks has, padded to the same length on all of them.

    Its label rows keep the targets, slots and weights that they have in the row.

    Args:
        batch: a whole row, on the host.
        multiple: the length is a multiple of it.
    """
    shard = RowShard(batch.layout, rank, size)
    length = shard_length(batch.tokens.shape[1], batch.layout.block_size, size, multiple)
    tokens, positions = (torch.zeros(1, length, dtype=torch.int64) for _ in range(2))
    index = torch.from_numpy(shard.index)
    tokens[0, : shard.used], positions[0, : shard.used] = batch.tokens[0, index], batch.positions[0, index]
    place = np.full(batch.tokens.shape[1], -1)
    place[shard.index] = np.arange(shard.used)
    of_labels = place[batch.label_index.numpy()]
    numbers = np.flatnonzero((of_labels >= 0) & (batch.label_documents >= 0))
    picked = numbers if len(numbers) else np.zeros(1, np.int64)
    counted = (batch.label_targets != IGNORE) & (batch.label_slots < batch.layout.block_size)
    part = replace(
        batch,
        tokens=tokens,
        positions=positions,
        label_index=torch.from_numpy(of_labels[picked]),
        label_targets=batch.label_targets[picked],
        label_slots=batch.label_slots[picked],
        label_documents=batch.label_documents[picked],
        label_weights=None if batch.label_weights is None else batch.label_weights[picked],
        shard=shard,
        label_numbers=numbers,
        row_targets=int(counted.sum()),
        row_labels=len(batch.label_index),
    )
    if len(numbers):
        return part
    zero = torch.zeros(1, dtype=torch.int64)  # a stand-in, as in make_micro_batch
    alone = {"label_index": zero, "label_targets": zero + IGNORE, "label_slots": zero}
    return replace(part, **alone, label_documents=np.full(1, -1))
