"""The safetensors files of a Hugging Face folder: read by region, planned from shapes, written block by block."""

import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import regular_file
from sdlm_megatron.weights.dtypes import SAFETENSORS_DTYPES, safetensors_name
from sdlm_megatron.weights.hf_config import NAME_A_MODEL, read_config_json, read_json
from sdlm_megatron.weights.resumable_folder import BLOCK, OutputFile, PlannedFile
from sdlm_megatron.weights.tensors import Index, TensorReader, file_stamps, is_finite, row_blocks

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
Contents = dict[str, tuple[torch.dtype, Index]]
"""dtype and shape of the tensors of a file, in the order of their bytes."""


class HFWeights:
    """The tensors of a folder, one file or many with their index (a `tensors.TensorReader`).

    Opening checks that every file exists and is readable, and that index and files name the same tensors.

    Args:
        file: name of the only file; "": as transformers finds the weights of a model.

    Raises:
        CheckpointError: no weights, a quantized model, a dtype other than bf16, fp16 and fp32, a missing, truncated or
            wrong file, or two files of which transformers reads another one. File and tensor are named.
    """

    def __init__(self, folder: Path | str, file: str = "") -> None:
        self.folder = Path(folder)
        if os.path.lexists(self.folder / "config.json"):
            read_config_json(self.folder)
        self._file_of = dict.fromkeys(_open(self.folder, file).keys(), file) if file else _locate(self.folder)
        self._open = {file: _open(self.folder, file) for file in sorted(set(self._file_of.values()))}
        # An index of another download does not name the tensors that its files hold; fail now, not half-way.
        present = [(name, file) for file, handle in self._open.items() for name in handle.keys()]  # noqa: SIM118  no dict
        for name, file in sorted(set(self._file_of.items()) ^ set(present)):
            there = (name, file) in present
            raise CheckpointError(
                f"'{name:.200}' is in {file}, but the index does not say so"
                if there
                else f"the index says that '{name:.200}' is in {file}, but it is not",
                str(self.folder / file),
                "copy or download the file and the index again",
            )
        for name in self.names():
            self.dtype(name)

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(
                f"the model folder has no tensor '{name}'",
                str(self.folder),
                "its weights and its config.json do not belong together; copy the folder again",
            )
        return self._open[self._file_of[name]].get_slice(name)

    def shape(self, name: str) -> Index:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """CheckpointError for a dtype other than bf16, fp16 and fp32."""
        stored = self._slice(name).get_dtype()
        if stored not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"'{name:.200}' is stored as {stored}, which this project does not read as weights",
                str(self.folder / self._file_of[name]),
                "use the model's bf16, fp16 or fp32 release; dequantize quantized weights (model.dequantize())",
            )
        return SAFETENSORS_DTYPES[stored]

    def read(self, name: str, start: Index, size: Index) -> torch.Tensor:
        """A region, in the stored dtype, on the CPU; only its own bytes are read."""
        tensor: torch.Tensor = self._slice(name)[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        return tensor

    def identity(self) -> dict[str, Any]:
        return file_stamps([self.folder / file for file in self._open])


def _open(folder: Path, file: str) -> Any:
    path = regular_file(folder, file, CheckpointError)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        what = f"a weight file cannot be read: {error!s:.200}"
        raise CheckpointError(what, str(path), "copy or download it again") from None


def _locate(folder: Path) -> dict[str, str]:
    """File of each tensor, from the index or from the only file."""
    index, single = (os.path.lexists(folder / name) for name in (INDEX_NAME, SINGLE_NAME))
    if not index:
        if not folder.is_dir():
            raise CheckpointError("no such folder", str(folder), NAME_A_MODEL)
        if not single:
            raise CheckpointError(
                f"the folder has neither {SINGLE_NAME} nor {INDEX_NAME}",
                str(folder),
                "weights must be safetensors; convert older *.bin files first",
            )
        return dict.fromkeys(_open(folder, SINGLE_NAME).keys(), SINGLE_NAME)
    weight_map: Any = read_json(folder, INDEX_NAME).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not isinstance(weight_map, dict) or not files or not all(f and isinstance(f, str) for f in files):
        where = f"{folder / INDEX_NAME}, field 'weight_map'"
        raise CheckpointError("weight_map does not name the file of each tensor", where, "copy the index again")
    if single and SINGLE_NAME not in files:
        raise CheckpointError(
            f"the folder has both {SINGLE_NAME} and {INDEX_NAME}: transformers reads the first",
            str(folder),
            f"remove {SINGLE_NAME}, or the index and its files, whichever is not the model",
        )
    return dict(weight_map)


# --- writing


def plan_safetensors(reader: TensorReader, dtype: torch.dtype | None, limit: int) -> dict[str, Contents]:
    """Divides tensors into files of at most `limit` bytes (a larger tensor gets a file of its own).

    Args:
        dtype: of every tensor in the files; None keeps each tensor's own.
    """
    groups: list[Contents] = [{}]
    filled = 0
    for name in reader.names():
        entry = (dtype or reader.dtype(name), reader.shape(name))
        if groups[-1] and filled + _size(entry) > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += _size(entry)
    count = len(groups)
    files = [SINGLE_NAME if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    # Wide elements first: safetensors wants each tensor aligned to its element size.
    ordered = [dict(sorted(group.items(), key=lambda item: -item[1][0].itemsize)) for group in groups]
    return dict(zip(files, ordered, strict=True))


def safetensors_files(reader: TensorReader, plan: dict[str, Contents]) -> list[PlannedFile]:
    """The files of `plan`, ready to be written from `reader`."""
    return [PlannedFile(file, contents_size(c), partial(_write, reader, c)) for file, c in plan.items()]


def contents_size(contents: Contents) -> int:
    """Bytes of the tensors of a file."""
    return sum(map(_size, contents.values()))


def index_json(plan: dict[str, Contents]) -> dict[str, Any]:
    """Content of the index, which names the file of each tensor."""
    files = {name: file for file, contents in plan.items() for name in contents}
    total = sum(map(contents_size, plan.values()))
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}


def _size(tensor: tuple[torch.dtype, Index]) -> int:
    dtype, shape = tensor
    return torch.Size(shape).numel() * dtype.itemsize


def _header(contents: Contents) -> bytes:
    """Start of a safetensors file: its length, then names, dtypes, shapes and byte ranges of the tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in contents.items():
        end = offset + _size((dtype, shape))
        entries[name] = {"dtype": safetensors_name(dtype), "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data that follows to 8 bytes
    return struct.pack("<Q", len(text)) + text


def _write(reader: TensorReader, contents: Contents, out: OutputFile) -> None:
    # safetensors' own save_file wants whole tensors in memory; blocks keep a worker at a few MiB for any model size.
    out.write(_header(contents))
    for name, (dtype, _) in contents.items():
        for block in row_blocks(reader, name, BLOCK):
            out.write(_bytes(_cast(block, dtype, name)))
            out.check()


def _cast(block: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if not is_finite(block):
        raise CheckpointError(f"'{name}' has values that are NaN or infinite", name, "export an earlier checkpoint")
    cast = block.to(dtype)
    if dtype is torch.float16 and block.dtype is not dtype and not is_finite(cast):
        raise CheckpointError(
            f"'{name}' has values that float16 cannot hold (largest {block.abs().max().item():g})",
            name,
            "use bfloat16 or float32",
        )
    return cast


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
