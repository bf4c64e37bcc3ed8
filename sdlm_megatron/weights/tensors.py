"""The interface of both kinds of weight files, and views that present one kind in the form of the other.

A Hugging Face folder (`hf_weights.HFWeights`) and a training checkpoint (`torch_dist.TorchDist`) are read through
`TensorReader`. `HFAsCheckpoint` presents the former under a checkpoint's keys, `CheckpointAsHF` the latter under
Hugging Face names. Import, export, loading a base and resuming are copies from one of these four readers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.names import (
    VOCABULARY,
    Rows,
    checkpoint_key,
    checkpoint_names,
    columns,
    hf_rows,
    inverse_rows,
    padded_vocab,
)
from sdlm_megatron.weights.shape import NewMaskToken, mean_row

Index = tuple[int, ...]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IGNORED = "rotary_emb.inv_freq"
"""End of the names of buffers that old folders store and every loader computes from rope_theta."""
_BLOCK = 8 * 1024**2
MEAN_COLUMNS = 256
"""Columns of the embedding averaged at a time: bounds the fp32 copy without changing a bit of the sums."""


class TensorReader(Protocol):
    """Named tensors in files, read on demand, from several threads."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> Index: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: Index, size: Index) -> torch.Tensor:
        """The region of `size` elements from `start`, on the CPU; read-only, possibly a view of the file."""

    def identity(self) -> dict[str, Any]:
        """Plain JSON that changes when the weights do, taken from sizes and times of the files."""


def file_stamps(files: Sequence[Path]) -> dict[str, Any]:
    """Size in bytes and modification time in ns of files, by name."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def read_rows(reader: TensorReader, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor."""
    rest = reader.shape(name)[1:]
    return reader.read(name, (start, *(0 for _ in rest)), (stop - start, *rest))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. `isfinite` would be fifty times as slow: it writes a tensor of its own."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in tensor.aminmax())


def row_blocks(reader: TensorReader, name: str, size: int) -> Iterator[torch.Tensor]:
    """A whole tensor in blocks of at most `size` bytes, but at least one row."""
    rows, *rest = reader.shape(name)
    step = max(1, size // max(1, torch.Size(rest).numel() * reader.dtype(name).itemsize))
    for start in range(0, rows, step):
        yield read_rows(reader, name, start, min(rows, start + step))


def tensor_bytes(reader: TensorReader, name: str) -> int:
    """Size of a whole tensor in bytes."""
    return torch.Size(reader.shape(name)).numel() * reader.dtype(name).itemsize


def _gather(
    read: Callable[[str, Index, Index], torch.Tensor], segments: Sequence[Rows], start: Index, size: Index
) -> list[torch.Tensor]:
    """The region (start, size) of a tensor whose rows are `segments` one after another; a part for each segment."""
    parts, offset = [], 0
    for name, first, last in segments:
        low, high = max(start[0], offset), min(start[0] + size[0], offset + last - first)
        if low < high:
            parts.append(read(name, (first + low - offset, *start[1:]), (high - low, *size[1:])))
        offset += last - first
    return parts


def _without(shape: Index, axis: int) -> Index:
    return shape[:axis] + shape[axis + 1 :]


class CheckpointAsHF:
    """A checkpoint's model under Hugging Face names: layers apart, q/k/v and gate/up apart, no padding rows.

    Args:
        checkpoint: tensors of the checkpoint, saved under any parallel layout.
        shape: of the model.
        where: the checkpoint's folder, for errors.

    Raises CheckpointError when a tensor is missing or smaller than `shape` says.
    """

    def __init__(self, checkpoint: TensorReader, shape: ModelConfig, where: Path) -> None:
        self._checkpoint = checkpoint
        present = set(checkpoint.names())
        # Before the rows of all layers are listed: a damaged state.json may name far more than are stored.
        for name in checkpoint_names(replace(shape, num_layers=1)):
            key, layer = checkpoint_key(name)
            if key not in present:
                raise CheckpointError(f"the checkpoint has no '{key}'", str(where), "use another checkpoint")
            stored = checkpoint.shape(key)
            rows = sum(stop - start for _, start, stop in hf_rows(name, shape))
            expected = (*(() if layer is None else (shape.num_layers,)), rows, *columns(name, shape))
            at = len(expected) - len(columns(name, shape)) - 1  # padding may have added rows
            if len(stored) != len(expected) or stored[at] < rows or _without(stored, at) != _without(expected, at):
                what = f"'{key}' is {stored}, the state.json says {expected}"
                raise CheckpointError(what, str(where), "use another checkpoint")
        self._segments = inverse_rows({name: hf_rows(name, shape) for name in checkpoint_names(shape)})

    def names(self) -> list[str]:
        return list(self._segments)

    def shape(self, name: str) -> Index:
        key, layer = checkpoint_key(self._segments[name][0][0])
        rows = sum(stop - start for _, start, stop in self._segments[name])
        return (rows, *self._checkpoint.shape(key)[1 if layer is None else 2 :])

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(checkpoint_key(self._segments[name][0][0])[0])

    def read(self, name: str, start: Index, size: Index) -> torch.Tensor:
        parts = _gather(self._read_layer, self._segments[name], start, size)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_layer(self, inner: str, start: Index, size: Index) -> torch.Tensor:
        key, layer = checkpoint_key(inner)
        if layer is None:
            return self._checkpoint.read(key, start, size)
        return self._checkpoint.read(key, (layer, *start), (1, *size))[0]

    def identity(self) -> dict[str, Any]:
        return self._checkpoint.identity()


def _check_tensors(folder: TensorReader, shape: ModelConfig, where: Path) -> None:
    """CheckpointError unless the tensors of a Hugging Face folder are those of `shape`, in name and shape."""
    fix = "config.json and weights do not belong together; copy the folder again"
    present = {name for name in folder.names() if not name.endswith(IGNORED)}
    expected: set[str] = set()
    for name in checkpoint_names(shape):
        rest = columns(name, shape)
        for hf, rows in {hf: stop for hf, _, stop in hf_rows(name, shape)}.items():  # ascending: the last stop counts
            if hf not in present:
                raise CheckpointError(f"the weights lack '{hf}', which the config.json names", str(where), fix)
            if folder.shape(hf) != (rows, *rest):
                what = f"'{hf}' is {folder.shape(hf)}, the config.json says {(rows, *rest)}"
                raise CheckpointError(what, str(where), fix)
            expected.add(hf)
    surplus = sorted(present - expected)
    if shape.tied_embeddings and surplus == [HEAD]:
        # Some trainers store the tied matrix under both names.
        if not same_tensor(folder, HEAD, EMBEDDING):
            what = f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}"
            raise CheckpointError(what, str(where), "set tie_word_embeddings to false, or remove the wrong tensor")
    elif surplus:
        more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
        names = ", ".join(f"{name:.200}" for name in surplus[:3])
        what = f"the weights have {len(surplus)} tensors that the config.json does not name: {names}{more}"
        raise CheckpointError(what, str(where), fix)


def same_tensor(reader: TensorReader, a: str, b: str) -> bool:
    """Whether two tensors are equal bit for bit."""
    blocks = (row_blocks(reader, name, _BLOCK) for name in (a, b))
    return (reader.shape(a), reader.dtype(a)) == (reader.shape(b), reader.dtype(b)) and all(
        torch.equal(left.view(torch.uint8), right.view(torch.uint8)) for left, right in zip(*blocks, strict=True)
    )


class HFAsCheckpoint:
    """A Hugging Face folder's model under a checkpoint's keys: layers stacked, q/k/v and gate/up fused, vocabulary
    padded with zero rows, and the row of a new mask token filled with the mean of the other tokens' rows.

    Args:
        folder: tensors of the Hugging Face folder.
        shape: of the model according to its config.json.
        new_mask: a mask token the folder does not know yet; may lie beyond the folder's vocabulary.
        where: the folder, for errors.

    Raises CheckpointError when tensors are missing, are not named by `shape`, or have another shape than it says, and
    when a value that is read is not finite.
    """

    def __init__(
        self, folder: TensorReader, shape: ModelConfig, new_mask: NewMaskToken | None = None, *, where: Path
    ) -> None:
        _check_tensors(folder, shape, where)
        self._folder, self._shape, self._new_mask, self._where = folder, shape, new_mask, where
        # A new mask token can lie beyond the rows of the folder.
        vocabulary = max(shape.vocab_size, new_mask.row + 1 if new_mask else 0)
        self._padded = padded_vocab(vocabulary, 1)
        self._keys: dict[str, Index] = {}
        for name in checkpoint_names(shape):
            key, layer = checkpoint_key(name)
            segments, rest = hf_rows(name, shape), columns(name, shape)
            count = self._padded if name in VOCABULARY else sum(stop - first for _, first, stop in segments)
            self._keys[key] = (*(() if layer is None else (shape.num_layers,)), count, *rest)

    def names(self) -> list[str]:
        return list(self._keys)

    def shape(self, name: str) -> Index:
        return self._keys[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._folder.dtype(self._rows(name, 0)[0][0])

    def _rows(self, key: str, layer: int) -> list[Rows]:
        stacked = key.startswith("decoder.layers.")
        return hf_rows(key.replace("layers.", f"layers.{layer}.", 1) if stacked else key, self._shape)

    def read(self, name: str, start: Index, size: Index) -> torch.Tensor:
        if name in VOCABULARY:
            return self._read_vocabulary(name, start, size)
        if not name.startswith("decoder.layers."):
            return torch.cat(_gather(self._read_finite, self._rows(name, 0), start, size))
        # Megatron-Core stacks the layers in its files; a Hugging Face folder has a tensor for each.
        layers = [
            torch.cat(_gather(self._read_finite, self._rows(name, layer), start[1:], size[1:]))
            for layer in range(start[0], start[0] + size[0])
        ]
        return layers[0][None] if len(layers) == 1 else torch.stack(layers)

    def _read_finite(self, name: str, start: Index, size: Index) -> torch.Tensor:
        region = self._folder.read(name, start, size)
        if not is_finite(region):
            what = f"'{name:.200}' has values that are NaN or infinite"
            raise CheckpointError(what, str(self._where), "download the model again, or use another base")
        return region

    def _read_vocabulary(self, name: str, start: Index, size: Index) -> torch.Tensor:
        parts = _gather(self._read_finite, self._rows(name, 0), start, size)
        missing = size[0] - sum(len(part) for part in parts)
        rows = torch.cat([*parts, torch.zeros(missing, *size[1:], dtype=self.dtype(name))])
        mask = self._new_mask
        if mask is not None and start[0] <= mask.row < start[0] + size[0]:
            rows[mask.row - start[0]] = self._mean(name, mask, start[1], size[1]).to(rows.dtype)
        return rows

    def _mean(self, name: str, mask: NewMaskToken, first: int, count: int) -> torch.Tensor:
        ((hf, _, _),) = self._rows(name, 0)
        rows = min(self._shape.vocab_size, mask.n_tokens)
        widths = [(at, min(MEAN_COLUMNS, first + count - at)) for at in range(first, first + count, MEAN_COLUMNS)]
        return torch.cat([mean_row(self._folder.read(hf, (0, at), (rows, width)), mask) for at, width in widths])

    def identity(self) -> dict[str, Any]:
        return self._folder.identity()
