"""Where tensors come from, row by row: a Hugging Face folder, or a checkpoint seen as one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.weights.checkpoint_folder import TrainState
from sdlm_megatron.weights.hf_reader import HFConfig, file_stamps
from sdlm_megatron.weights.names import checkpoint_key, checkpoint_rows
from sdlm_megatron.weights.torch_dist import TorchDist


class Tensors(Protocol):
    """Tensors in Hugging Face names and shapes, read when they are used, from several threads.

    `sdlm_megatron.weights.hf_reader.HFTensors` is one.
    """

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), on the CPU, not to be written to."""

    def identity(self) -> dict[str, Any]:
        """Plain JSON that tells these weights from others."""


def blocks(tensors: Tensors, name: str, size: int) -> Iterator[torch.Tensor]:
    """A whole tensor in blocks of at most `size` bytes (but at least a row)."""
    rows, *rest = tensors.shape(name)
    step = max(1, size // max(1, torch.Size(rest).numel() * tensors.dtype(name).itemsize))
    for start in range(0, rows, step):
        yield tensors.rows(name, start, min(rows, start + step))


class CheckpointTensors:
    """The model's tensors of a checkpoint, whatever layout it was saved under.

    Raises CheckpointError when one is missing or has another shape than state.json says.
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        self.folder, self.state = folder, state
        self._weights = TorchDist(folder / "weights")
        self._rows = checkpoint_rows(state.shape)
        for name, parts in self._rows.items():
            for megatron, _, stop in parts:
                key, layer = checkpoint_key(megatron)
                if key not in self._weights:
                    raise CheckpointError(f"the checkpoint has no '{key}'", str(folder), "use another checkpoint")
                shape = self._weights.shape(key)
                rows = shape[0] if layer is None else shape[1]
                if rows < stop or (layer is not None and shape[0] != state.shape.num_layers):
                    raise CheckpointError(
                        f"'{key}' is {shape}, too small for '{name}'", str(folder), "use another checkpoint"
                    )

    def names(self) -> list[str]:
        return list(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        key, layer = checkpoint_key(self._rows[name][0][0])
        rows = sum(stop - start for _, start, stop in self._rows[name])
        return (rows, *self._weights.shape(key)[1 if layer is None else 2 :])

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(checkpoint_key(self._rows[name][0][0])[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        parts, at = [], 0
        for megatron, first, last in self._rows[name]:
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                parts.append(self._read(megatron, first + low - at, first + high - at))
            at += last - first
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, megatron: str, start: int, stop: int) -> torch.Tensor:
        key, layer = checkpoint_key(megatron)
        columns = self._weights.shape(key)[1 if layer is None else 2 :]
        if layer is None:
            return self._weights.read(key, (start, *(0 for _ in columns)), (stop - start, *columns))
        return self._weights.read(key, (layer, start, *(0 for _ in columns)), (1, stop - start, *columns))[0]

    def identity(self) -> dict[str, Any]:
        """Sizes and times of the files; `.metadata` also holds an id of the save."""
        files = [self.folder / "state.json", *(self.folder / "weights").iterdir()]
        return {"step": self.state.step, "files": file_stamps(files)}


class WithBiases:
    """`tensors` with zero biases of q, k and v where it has none (llama): as Qwen2 they are the same function."""

    def __init__(self, tensors: Tensors, config: HFConfig) -> None:
        self.tensors = tensors
        self._weight_of = {
            name.removesuffix("weight") + "bias": name
            for name in tensors.names()
            if not config.qkv_bias and name.endswith(tuple(f"self_attn.{x}_proj.weight" for x in "qkv"))
        }

    def names(self) -> list[str]:
        return [*self.tensors.names(), *self._weight_of]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self._weight_of[name])[:1] if name in self._weight_of else self.tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors.dtype(self._weight_of.get(name, name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._weight_of:
            return torch.zeros(stop - start, dtype=self.dtype(name))
        return self.tensors.rows(name, start, stop)

    def identity(self) -> dict[str, Any]:
        return self.tensors.identity()
