"""Megatron-Core's torch_dist weights without Megatron-Core: tensors read by byte range, files written one by one.

A folder holds `*.distcp` files, each a run of `torch.save` archives, and `.metadata`: a pickle that says which rows of
which tensor stand where. It is read by an unpickler that knows only the classes it is made of. Nothing is loaded whole:
an archive stores its tensor uncompressed, so a part of it is a range of bytes of the file.
"""

import io
import math
import mmap
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import write_json

warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes to it

_CLASSES = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
}
_PLANS = ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType", "BytesIOWriteData", "MCoreSavePlan")
"""How the save was planned: kept in the file for the next save, of no use here."""
_DTYPES = {"BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "FloatStorage": torch.float32}


class _Ignored:
    """Stands for an object nobody reads: takes any arguments and state."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if name in _PLANS:
            return _Ignored
        if name == "MCoreMetadata":  # Megatron-Core's own kind of it
            return Metadata
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")


class _Tensor(pickle.Unpickler):
    """data.pkl of an archive: what the tensor in it looks like, as (dtype, offset in elements, size, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, size, stride, *_: (dtype, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}: not a plain tensor")

    def persistent_load(self, key: Any) -> Any:
        return key[1]


_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
)


def read_metadata(weights: Path) -> Metadata:
    """`.metadata` of a weights folder; CheckpointError when it is missing, damaged or names any foreign class."""
    path = weights / ".metadata"
    try:
        with open(path, "rb") as file:
            found = _Metadata(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise TypeError("it holds something else")
        return found
    except FileNotFoundError:
        raise CheckpointError("the weights have no .metadata", str(path), "use another checkpoint") from None
    except _UNREADABLE as error:
        raise CheckpointError(
            f"the list of tensors cannot be read: {error}", str(path), "use a checkpoint written by Megatron-Core"
        ) from None


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor, and its place in a file."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    offset: int
    """Of the archive, in bytes."""
    length: int


class TorchDist:
    """The tensors of a weights folder by Megatron-Core's key; to be used from several threads.

    Raises CheckpointError, also later, when a file is damaged or cut short; the file is named.
    """

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._chunks: dict[str, dict[int, list[_Chunk]]] = {}
        """By key, then by the layer (first axis) of a box that is of one layer, else -1: there are very many."""
        self._maps: dict[str, mmap.mmap] = {}
        self._at: dict[_Chunk, int] = {}
        found = read_metadata(weights)
        for key, entry in found.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self._tensors[key] = entry
                layers = self._chunks[key] = {}
                for box in entry.chunks:
                    chunk = self._chunk(key, found.storage_data, box)
                    layers.setdefault(chunk.start[0] if chunk.size[:1] == (1,) else -1, []).append(chunk)
        for file in sorted({c.file for key in self._chunks.values() for chunks in key.values() for c in chunks}):
            self._maps[file] = _map(weights / file)

    def _chunk(self, key: str, places: dict, box: Any) -> _Chunk:
        place = places.get(MetadataIndex(key, box.offsets))
        if place is None or "/" in place.relative_path:
            raise CheckpointError(f"'{key}' is listed but not stored", str(self.weights / ".metadata"), "use another")
        return _Chunk(tuple(box.offsets), tuple(box.sizes), place.relative_path, place.offset, place.length)

    def keys(self) -> list[str]:
        return sorted(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        dtype: torch.dtype = self._tensors[key].properties.dtype
        return dtype

    def read(self, key: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of `size` from `start`, not to be written to: a view of the file where one archive holds it all."""
        dtype, missing = self.dtype(key), math.prod(size)
        whole, layers = None, self._chunks[key]
        wanted = [-1, *(range(start[0], start[0] + size[0]) if len(layers) > 1 or -1 not in layers else ())]
        for chunk in (chunk for layer in wanted for chunk in layers.get(layer, ())):
            low = [max(a, b) for a, b in zip(start, chunk.start, strict=True)]
            ends = zip(start, size, chunk.start, chunk.size, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self._bytes(chunk, dtype)[_box(low, high, chunk.start, dtype.itemsize)]
            missing -= part.numel() // dtype.itemsize
            if not missing and whole is None:
                aligned = part.is_contiguous() and part.data_ptr() % dtype.itemsize == 0
                return (part if aligned else part.clone(memory_format=torch.contiguous_format)).view(dtype)
            if whole is None:
                whole = torch.empty(*size[:-1], size[-1] * dtype.itemsize, dtype=torch.uint8)
            whole[_box(low, high, start, dtype.itemsize)] = part
        if whole is None or missing:
            raise CheckpointError(f"parts of '{key}' are not in the checkpoint", str(self.weights), "use another one")
        return whole.view(dtype)

    def _bytes(self, chunk: _Chunk, dtype: torch.dtype) -> torch.Tensor:
        """A chunk as bytes, uint8 (…, n * itemsize): in the file it need not be aligned."""
        if chunk not in self._at:
            self._at[chunk] = self._find(chunk, dtype)
        size = (*chunk.size[:-1], chunk.size[-1] * dtype.itemsize)
        at, source = self._at[chunk], self._maps[chunk.file]
        return torch.frombuffer(source, dtype=torch.uint8, count=math.prod(size), offset=at).view(size)

    def _find(self, chunk: _Chunk, dtype: torch.dtype) -> int:
        """Where the elements of a chunk begin in its file."""
        view = _Range(self._maps[chunk.file], chunk.offset, chunk.length)
        try:
            with zipfile.ZipFile(view) as archive:
                names = {name.split("/", 1)[1]: name for name in archive.namelist()}
                stored, first, size, stride = _Tensor(io.BytesIO(archive.read(names["data.pkl"]))).load()
                record = archive.getinfo(names["data/0"])
            view.seek(record.header_offset + 26)  # lengths of name and padding in the record's own header
            at = record.header_offset + 30 + sum(struct.unpack("<2H", view.read(4)))
            plain = torch.empty(chunk.size, device="meta").stride()
            if (stored, size) != (dtype, chunk.size) or stride != plain or record.compress_type != zipfile.ZIP_STORED:
                raise TypeError(f"it holds {size} in {stored} with strides {stride}, not {chunk.size} in {dtype}")
            if (first + math.prod(size)) * dtype.itemsize > record.file_size:
                raise EOFError("its bytes end too early")
        except _UNREADABLE as error:
            raise CheckpointError(
                f"a tensor cannot be read: {error}",
                f"{self.weights / chunk.file}, byte {chunk.offset}",
                "copy the checkpoint again or use another",
            ) from None
        return chunk.offset + at + first * dtype.itemsize


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int], itemsize: int) -> tuple[slice, ...]:
    """Index of a box in a tensor of bytes that begins at `origin`."""
    scale = [1] * (len(low) - 1) + [itemsize]
    return tuple(slice((a - o) * n, (b - o) * n) for a, b, o, n in zip(low, high, origin, scale, strict=True))


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"a weight file cannot be read: {error}", str(path), "copy it again") from None


class _Range(io.RawIOBase):
    """Bytes [start, start + length) of a mapped file, as a file."""

    def __init__(self, source: mmap.mmap, start: int, length: int) -> None:
        self.source, self.start, self.length, self.at = source, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        self.at = max(0, base + offset)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        stop = min(self.length, self.at + len(buffer))
        found = self.source[self.start + self.at : self.start + stop]
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


# --- writing


@dataclass(frozen=True)
class Entry:
    """A box of a tensor that was written: plain numbers, so that it can wait in a JSON file."""

    key: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    offset: int
    length: int


def write_tensor(file: Any, key: str, start: tuple[int, ...], tensor: torch.Tensor) -> Entry:
    """Appends one archive to an open file, of which write, tell and flush are used.

    `tensor` must own its bytes: `torch.save` writes all of its storage.
    """
    offset = file.tell()
    torch.save(tensor, file)
    return Entry(key, start, tuple(tensor.shape), offset, file.tell() - offset)


def write_index(
    weights: Path, files: Mapping[str, Iterable[Entry]], tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Writes what makes the files of `weights` a checkpoint that Megatron-Core loads: `tensors` by key, with shape."""
    boxes: dict[str, list[metadata.ChunkStorageMetadata]] = {key: [] for key in tensors}
    places, same = (
        {},
        {key: key for key in tensors},
    )  # one object a name: a pickle tells equal strings from the same one
    for file, entries in files.items():
        for entry in entries:
            start = torch.Size(entry.start)
            boxes[entry.key].append(metadata.ChunkStorageMetadata(start, torch.Size(entry.size)))
            places[MetadataIndex(same[entry.key], start)] = filesystem._StorageInfo(file, entry.offset, entry.length)
    listed: dict[str, Any] = {
        key: TensorStorageMetadata(metadata.TensorProperties(dtype=dtype), torch.Size(shape), boxes[key])
        for key, (shape, dtype) in tensors.items()
    }
    with open(weights / ".metadata", "wb") as out:
        pickle.dump(Metadata(state_dict_metadata=listed, storage_data=places), out)
    common = io.BytesIO()  # torch.save itself hides what the disk says
    torch.save({"content_metadata": {}}, common)
    (weights / "common.pt").write_bytes(common.getvalue())
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    write_json(weights / "metadata.json", backends | versions)
