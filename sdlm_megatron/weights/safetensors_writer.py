"""Weights as safetensors files: planned from shapes alone, then each written tensor by tensor, block by block."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.hf_reader import DTYPES, SINGLE_NAME
from sdlm_megatron.weights.resumable_folder import BLOCK, Output, Unit
from sdlm_megatron.weights.tensor_sources import Tensors, blocks

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One weight file to be."""

    file: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """dtype and shape in the file, by name, in the order of their bytes."""

    @property
    def size(self) -> int:
        return sum(_size(*tensor) for tensor in self.tensors.values())


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def plan_shards(tensors: Tensors, dtype: torch.dtype | None, limit: int) -> list[Shard]:
    """Divides tensors into files of at most `limit` bytes (a larger tensor has a file of its own).

    dtype: of every tensor in the files; None keeps each one's own.
    """
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name in tensors.names():
        entry = (dtype or tensors.dtype(name), tensors.shape(name))
        if groups[-1] and filled + _size(*entry) > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += _size(*entry)
    count = len(groups)
    files = [SINGLE_NAME if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    # wide elements first: safetensors wants every tensor aligned to its own
    ordered = [dict(sorted(group.items(), key=lambda item: -item[1][0].itemsize)) for group in groups]
    return [Shard(file, group) for file, group in zip(files, ordered, strict=True)]


def shard_units(tensors: Tensors, shards: Sequence[Shard]) -> list[Unit]:
    """The work of writing the shards."""
    return [Unit(shard.file, shard.size, partial(_write, tensors, shard)) for shard in shards]


def index_json(shards: Sequence[Shard]) -> dict[str, Any]:
    """Content of the index, which says what file holds each tensor."""
    where = {name: shard.file for shard in shards for name in shard.tensors}
    return {"metadata": {"total_size": sum(s.size for s in shards)}, "weight_map": dict(sorted(where.items()))}


def header(shard: Shard) -> bytes:
    """What a safetensors file begins with: its length, then names, dtypes, shapes and places of the tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in shard.tensors.items():
        size = _size(dtype, shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(tensors: Tensors, shard: Shard, out: Output) -> None:
    out.write(header(shard))
    for name, (dtype, _) in shard.tensors.items():
        for block in blocks(tensors, name, BLOCK):
            out.write(_bytes(_cast(block, dtype, name)))


def _cast(block: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    cast = block.to(dtype)
    if dtype is torch.float16 and block.dtype is not dtype and not cast.isfinite().all() and block.isfinite().all():
        raise CheckpointError(
            f"'{name}' has values that float16 cannot hold (largest {block.abs().max().item():g})",
            name,
            "use bfloat16 or float32",
        )
    return cast


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
