"""Weights in Megatron-Core's torch_dist format without Megatron-Core: read by region, written tensor by tensor.

A folder holds `*.distcp` files, each a sequence of `torch.save` archives, and `.metadata`: a pickle that says which
region of which tensor lies at which byte. Both are read by unpicklers that know only the classes these files consist
of. An archive stores its tensor uncompressed, so any region is a range of bytes of a memory-mapped file.
"""

import io
import math
import mmap
import pickle
import pickletools
import random
import struct
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import regular_file, write_json
from sdlm_megatron.weights.dtypes import PRECISIONS, STORAGE_DTYPES
from sdlm_megatron.weights.resumable_folder import OutputFile, PlannedFile
from sdlm_megatron.weights.tensors import Index, TensorReader, file_stamps

warnings.filterwarnings("ignore", message="The given buffer is not writable")  # the views are only read

_CLASSES = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "Metadata",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
}
_PLANS = ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType", "BytesIOWriteData", "MCoreSavePlan")
"""Classes of the save plan, which Megatron-Core caches in the file for its next save; not used here."""


class _Ignored:
    """Placeholder for an object that is not used: accepts any arguments and state."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ("ChunkStorageMetadata", "MetadataIndex"):
            return _ListedRegion if name == "ChunkStorageMetadata" else _RegionIndex
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if name in _PLANS:
            return _Ignored
        if name == "MCoreMetadata":  # Megatron-Core's subclass
            return Metadata
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")


class _TensorUnpickler(pickle.Unpickler):
    """Reads data.pkl of an archive, the description of its tensor: (dtype, offset in elements, size, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, size, stride, *_: (dtype, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
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
    ArithmeticError,
    RuntimeError,  # zipfile: an encrypted record; NotImplementedError: an unknown compression
)
MOST_METADATA_BYTES, MOST_TENSOR_PICKLE_BYTES = 256 << 20, 64 << 10
"""Largest pickles that are read: of a checkpoint (7 MB for 50,000 regions), and of one tensor (some 200 bytes)."""


MOST_REACHED = 10_000_000
"""Elements of tuples that may be reached through references; the list of a large checkpoint has thousands."""


class _ListedRegion(metadata.ChunkStorageMetadata):
    __hash__ = None  # type: ignore[assignment]  # of a frozen dataclass: it would visit whatever a file puts into it


class _RegionIndex(MetadataIndex):
    def __hash__(self) -> int:
        if not isinstance(self.fqn, str):
            raise TypeError("the name of a tensor is not text")
        return hash((self.fqn, None if self.offset is None else torch.Size(self.offset)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _RegionIndex) and (self.fqn, self.offset) == (other.fqn, other.offset)


def _checked_pickle(source: Any, size: int, most: int) -> io.BytesIO:
    """A pickle for an unpickler; ValueError where loading it would take far more memory than its bytes.

    Args:
        source: with a method read_bytes.
        size: of the pickle.
        most: larger ones are not read.
    """
    if size > most:
        raise ValueError(f"its pickle has {size:,} bytes, more than the {most:,} that are read")
    data = source.read_bytes()
    tuples: dict[int, int] = {}  # by memo number: elements, counted as often as they are reached
    last, count, reached = "", 0, [0]  # the latter by open mark
    # Python's unpickler allocates an array up to the largest number of a PUT, and lengths before it reads their bytes.
    for opcode, argument, _ in pickletools.genops(data):
        # The hash of a tuple visits each element as often as it is reached: 2^n times in n tuples of twice the last.
        if pickletools.markobject in opcode.stack_before:
            within = reached.pop()
            reached[-1] += within if opcode.name == "TUPLE" else 0
        else:
            within = reached[-1]
        reached += [0] if opcode.name == "MARK" else []
        if opcode.name == "MEMOIZE" or "PUT" in opcode.name:
            tuples[len(tuples) if argument is None else int(argument)] = 1 + count if last.startswith("TUPLE") else 0
        elif "GET" in opcode.name:
            reached[-1] += tuples.get(int(argument or 0), 0)
        last, count = opcode.name, within
        if opcode.name == "DUP" or reached[-1] > MOST_REACHED:
            raise ValueError("its pickle holds tuples within tuples without end")
        if "PUT" in opcode.name and int(argument or 0) > len(data):
            raise ValueError(f"its pickle stores object {argument} of at most {len(data)}")
        if opcode.name == "FRAME" and int(argument or 0) > len(data):
            raise ValueError("its pickle has a frame beyond its end")
    return io.BytesIO(data)


def read_metadata(weights: Path) -> Metadata:
    """`.metadata` of a weights folder; CheckpointError when it is missing, damaged or names an unknown class."""
    path = regular_file(weights, ".metadata", CheckpointError)
    try:
        content = _MetadataUnpickler(_checked_pickle(path, path.stat().st_size, MOST_METADATA_BYTES)).load()
        if not isinstance(content, Metadata) or not all(
            isinstance(part, dict) for part in (content.storage_data, content.state_dict_metadata)
        ):
            raise TypeError("it holds something else")
        return content
    except _UNREADABLE as error:
        what = f"the list of tensors cannot be read: {error!s:.200}"
        raise CheckpointError(what, str(path), "use a checkpoint written by Megatron-Core") from None


@dataclass(frozen=True)
class _Chunk:
    """A region of a tensor, stored as one archive."""

    start: Index
    size: Index
    file: str
    offset: int
    """First byte of the archive in the file."""
    length: int
    """Bytes of the archive."""


class TorchDist:
    """The tensors of a weights folder by checkpoint key (a `tensors.TensorReader`).

    Raises CheckpointError, also when reading later, where a file is damaged or truncated; the file is named.
    """

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._chunks: dict[str, dict[int, list[_Chunk]]] = {}
        """By key, then by the layer (first axis) of a chunk of one layer, else -1: a linear search over all chunks of
        a large model would dominate loading."""
        self._maps: dict[str, mmap.mmap] = {}
        self._data_offset: dict[_Chunk, int] = {}
        content = read_metadata(weights)
        for key, entry in content.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                try:
                    self._add(key, entry, content.storage_data)
                except _UNREADABLE as error:
                    what = f"the entry of '{key!s:.200}' cannot be used: {error!s:.200}"
                    where = str(self.weights / ".metadata")
                    raise CheckpointError(what, where, "copy the checkpoint again or use another") from None

    def _add(self, key: str, entry: TensorStorageMetadata, places: dict) -> None:
        """Adds a tensor and its chunks. Raises one of _UNREADABLE unless they are regions of it, and bytes of files.

        Later reads then allocate no more than the files hold.
        """
        size, dtype = tuple(entry.size), entry.properties.dtype
        # Regions are measured by random numbers in place of their edges: the sum equals that of the whole only where
        # they cover each element once, and no file can foresee the numbers.
        edges: defaultdict[tuple[int, int], int] = defaultdict(lambda: random.getrandbits(64))
        covered = 0
        if dtype not in PRECISIONS.values():
            raise TypeError(f"it is stored as {str(dtype).removeprefix('torch.')}, not in bf16, fp16 or fp32")
        if not size or not isinstance(key, str):
            raise ValueError("it is no named vector or matrix")
        layers = self._chunks[key] = {}
        self._tensors[key] = entry
        for region in entry.chunks:
            start, shape, place = tuple(region.offsets), tuple(region.sizes), places[_RegionIndex(key, region.offsets)]
            for low, count, whole in zip(start, shape, size, strict=True):
                if not (low >= 0 and count > 0 and low + count <= whole):
                    raise ValueError(f"region {shape} at {start} is not inside {size}")
            chunk = _Chunk(start, shape, place.relative_path, place.offset, place.length)
            end, elements = len(self._map(chunk.file)), math.prod(shape)
            if not (0 <= place.offset <= end - place.length and elements * dtype.itemsize <= place.length):
                raise ValueError(
                    f"bytes {place.offset} to {place.offset + place.length} of {chunk.file} cannot hold it"
                )
            layers.setdefault(start[0] if shape[0] == 1 else -1, []).append(chunk)
            covered += math.prod(edges[i, start[i] + shape[i]] - edges[i, start[i]] for i in range(len(size)))
        if covered != math.prod(edges[i, size[i]] - edges[i, 0] for i in range(len(size))):
            raise ValueError("its regions overlap or leave a part of it out")

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            path = regular_file(self.weights, file, CheckpointError)
            if not path.stat().st_size:
                raise CheckpointError("a weight file is empty", str(path), "copy the checkpoint again or use another")
            with open(path, "rb") as source:
                self._maps[file] = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> Index:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._tensors[name].properties.dtype
        return dtype

    def identity(self) -> dict[str, Any]:
        # A checkpoint's state.json belongs to it: the same weights under another state are another input.
        files = [self.weights / name for name in (".metadata", *self._maps)]
        return file_stamps([*self.weights.parent.glob("state.json"), *files])

    def read(self, name: str, start: Index, size: Index) -> torch.Tensor:
        """The region of `size` from `start`: a read-only view of the file where one archive holds all of it."""
        dtype, missing = self.dtype(name), math.prod(size)
        whole, layers = None, self._chunks[name]
        wanted = [-1, *(range(start[0], start[0] + size[0]) if len(layers) > 1 or -1 not in layers else ())]
        for chunk in (chunk for layer in wanted for chunk in layers.get(layer, ())):
            low = [max(a, b) for a, b in zip(start, chunk.start, strict=True)]
            ends = zip(start, size, chunk.start, chunk.size, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self._bytes(chunk, dtype)[_byte_index(low, high, chunk.start, dtype.itemsize)]
            missing -= part.numel() // dtype.itemsize
            if not missing and whole is None:
                aligned = part.is_contiguous() and part.data_ptr() % dtype.itemsize == 0
                return (part if aligned else part.clone(memory_format=torch.contiguous_format)).view(dtype)
            if whole is None:
                whole = torch.empty(*size[:-1], size[-1] * dtype.itemsize, dtype=torch.uint8)
            whole[_byte_index(low, high, start, dtype.itemsize)] = part
        if whole is None or missing:
            raise CheckpointError(f"parts of '{name}' are not in the checkpoint", str(self.weights), "use another one")
        return whole.view(dtype)

    def _bytes(self, chunk: _Chunk, dtype: torch.dtype) -> torch.Tensor:
        """A chunk as uint8 (…, n * itemsize): as bytes, because its offset in the file need not be aligned to dtype."""
        if chunk not in self._data_offset:
            self._data_offset[chunk] = self._locate(chunk, dtype)
        size = (*chunk.size[:-1], chunk.size[-1] * dtype.itemsize)
        offset, source = self._data_offset[chunk], self._maps[chunk.file]
        return torch.frombuffer(source, dtype=torch.uint8, count=math.prod(size), offset=offset).view(size)

    def _locate(self, chunk: _Chunk, dtype: torch.dtype) -> int:
        """Offset of a chunk's first element in its file; CheckpointError where the archive is not what is expected."""
        view = _Range(self._maps[chunk.file], chunk.offset, chunk.length)
        try:
            with zipfile.ZipFile(view) as archive:
                records = {record.filename.split("/", 1)[1]: record for record in archive.infolist()}
                record, description = records["data/0"], records["data.pkl"]
                if any(r.compress_type != zipfile.ZIP_STORED for r in (record, description)):
                    raise TypeError("it is compressed")
                member = zipfile.Path(archive, description.filename)
                pickled = _checked_pickle(member, description.file_size, MOST_TENSOR_PICKLE_BYTES)
                stored, first, size, stride = _TensorUnpickler(pickled).load()
            # The record's own header (ZIP, local file header) ends with the lengths of name and padding at byte 26.
            view.seek(record.header_offset + 26)
            at = record.header_offset + 30 + sum(struct.unpack("<2H", view.read(4)))
            plain = torch.empty(chunk.size, device="meta").stride()
            if (stored, size, type(first)) != (dtype, chunk.size, int) or stride != plain:
                raise TypeError(f"it holds {size} in {stored} with strides {stride}, not {chunk.size} in {dtype}")
            needed, room = (first + math.prod(size)) * dtype.itemsize, min(record.file_size, chunk.length - at)
            if not (first >= 0 and needed <= room):
                raise EOFError("its bytes end too early")
        except _UNREADABLE as error:
            raise CheckpointError(
                f"a tensor cannot be read: {error!s:.200}",
                f"{self.weights / chunk.file}, byte {chunk.offset}",
                "copy the checkpoint again or use another",
            ) from None
        return chunk.offset + at + first * dtype.itemsize


def _byte_index(low: Sequence[int], high: Sequence[int], origin: Sequence[int], itemsize: int) -> tuple[slice, ...]:
    """Index of the region [low, high) in a tensor of bytes that begins at `origin`."""
    scale = [1] * (len(low) - 1) + [itemsize]
    return tuple(slice((a - o) * n, (b - o) * n) for a, b, o, n in zip(low, high, origin, scale, strict=True))


class _Range(io.RawIOBase):
    """Bytes [start, start + length) of a mapped file, as a file object for zipfile."""

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
        data = self.source[self.start + self.at : self.start + stop]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


# --- writing


@dataclass(frozen=True)
class Entry:
    """A region that was written, and the bytes [offset, offset + length) of its archive."""

    key: str
    start: Index
    size: Index
    offset: int
    length: int


Regions = list[tuple[str, Index, Index]]
"""(key, start, size) of the regions of a file, in the order of their bytes."""


def plan_torch_dist(reader: TensorReader, itemsize: int, limit: int, most: int) -> dict[str, Regions]:
    """Divides tensors into files of at most `limit` bytes, and large tensors into regions of at most `most` bytes.

    A layer of a stacked tensor is a region of its own, as in a checkpoint of a run.
    """
    groups: list[Regions] = [[]]
    filled = 0
    for key, start, size in _regions(reader, itemsize, min(most, limit)):
        count = math.prod(size) * itemsize
        if groups[-1] and filled + count > limit:
            groups.append([])
            filled = 0
        groups[-1].append((key, start, size))
        filled += count
    return {f"__0_{i}.distcp": group for i, group in enumerate(groups)}


def _regions(reader: TensorReader, itemsize: int, most: int) -> Iterator[tuple[str, Index, Index]]:
    for key in reader.names():
        stacked = key.startswith("decoder.layers.")
        layers, (rows, *rest) = (reader.shape(key)[0], reader.shape(key)[1:]) if stacked else (1, reader.shape(key))
        step = max(1, most // (math.prod(rest) * itemsize))
        for layer in range(layers):
            for row in range(0, rows, step):
                start, size = (row, *(0 for _ in rest)), (min(step, rows - row), *rest)
                yield (key, (layer, *start), (1, *size)) if stacked else (key, start, size)


def torch_dist_files(reader: TensorReader, plan: Mapping[str, Regions], dtype: torch.dtype) -> list[PlannedFile]:
    """The files of `plan`, ready to be written from `reader`; their records' notes are for `entries_of`."""
    return [
        PlannedFile(f"weights/{file}", regions_size(regions, dtype), partial(_write, reader, regions, dtype))
        for file, regions in plan.items()
    ]


def regions_size(regions: Regions, dtype: torch.dtype) -> int:
    """Bytes of the tensors of a file."""
    return sum(math.prod(size) for _, _, size in regions) * dtype.itemsize


def _write(reader: TensorReader, regions: Regions, dtype: torch.dtype, out: OutputFile) -> list[tuple]:
    entries = []
    for key, start, size in regions:
        tensor = reader.read(key, start, size)
        if tensor.dtype is not dtype or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = torch.empty(size, dtype=dtype).copy_(tensor)  # not a view: see write_tensor
        entries.append(astuple(write_tensor(out, key, start, tensor)))
        out.check()
    return entries


def entries_of(notes: Sequence[Sequence[Any]]) -> list[Entry]:
    """The entries of a written file from its record's notes, which JSON has turned into lists."""
    return [Entry(key, tuple(start), tuple(size), offset, length) for key, start, size, offset, length in notes]


def write_tensor(file: Any, key: str, start: Index, tensor: torch.Tensor) -> Entry:
    """Appends one archive to an open file, of which write, tell and flush are used.

    `tensor` must own its storage: `torch.save` writes the whole storage, also of a view.
    """
    offset = file.tell()
    torch.save(tensor, file)
    return Entry(key, start, tuple(tensor.shape), offset, file.tell() - offset)


def write_index(
    weights: Path, files: Mapping[str, Iterable[Entry]], tensors: Mapping[str, tuple[Index, torch.dtype]]
) -> None:
    """Writes the metadata that make the files of `weights` a checkpoint that Megatron-Core loads.

    Args:
        files: the regions in each file.
        tensors: shape and dtype of each tensor, by key.
    """
    regions: dict[str, list[metadata.ChunkStorageMetadata]] = {key: [] for key in tensors}
    places: dict[MetadataIndex, Any] = {}
    # One string object per key: pickle stores equal but distinct strings twice, and the bytes would depend on that.
    same = {key: key for key in tensors}
    for file, entries in files.items():
        for entry in entries:
            start = torch.Size(entry.start)
            regions[entry.key].append(metadata.ChunkStorageMetadata(start, torch.Size(entry.size)))
            places[MetadataIndex(same[entry.key], start)] = filesystem._StorageInfo(file, entry.offset, entry.length)
    listed: dict[str, Any] = {
        key: TensorStorageMetadata(metadata.TensorProperties(dtype=dtype), torch.Size(shape), regions[key])
        for key, (shape, dtype) in tensors.items()
    }
    with open(weights / ".metadata", "wb") as out:
        pickle.dump(Metadata(state_dict_metadata=listed, storage_data=places), out)
    common = io.BytesIO()  # torch.save into a file would hide an error of the disk behind one of its own
    torch.save({"content_metadata": {}}, common)
    (weights / "common.pt").write_bytes(common.getvalue())
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    write_json(weights / "metadata.json", backends | versions)
