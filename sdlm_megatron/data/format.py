"""Packed dataset on disk: the only module that writes and reads its files.

    DATASET/
      manifest.json                    settings, counts, accounting, sha256 of the other files
      epoch0.00000.rows.bin/.idx       Megatron-Core indexed dataset, int32: tokens of each row (clean, then blocks)
      epoch0.00000.layout.bin/.idx     indexed dataset, int32: crc32 of the row and RowLayout.to_ints()
      epoch0.00001.rows.bin…           next part of the epoch
      epoch0.sizes.bin/.idx            sizes of all documents of the epoch, derived from its layouts (sizes.py)

Padding is not stored; positions and targets are derived (diffusion.layout), so stored data cannot contradict them.
An epoch is split into parts so that several processes can write it. Each row carries a crc32 of its tokens and layout
that is verified on every read, so a flipped bit cannot reach training.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from sdlm_megatron.data.indexed import IndexedReader, IndexedWriter
from sdlm_megatron.data.sizes import CLEAN, EpochSizes, read_sizes, scan_layouts, sizes_prefix, write_sizes
from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, slot_targets
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import checked, most_open, read_json_object, regular_file, rename_whole, sha256, write_json

FORMAT = "sdlm-packed"
VERSION = 2
_TOKENS = ("mask_token_id", "eos_token_id", "pad_token_id", "vocab_size", "tokenizer")
REQUIRED = ("row_length", "max_document_length", "block_size", "repeat", "target_shift", *_TOKENS, "seed", "sources")
"""Manifest fields of every dataset. `mask_token`, the text, was added later and is optional."""
KINDS = ("rows", "layout")
MOST_TOKENS = 1 << 24
"""Largest row length and block size of a manifest; a row is held in memory several times."""
_OPEN_PARTS = 512
"""Parts that are open at once: a corpus may have more, with four files each, than a process may have open files."""
REBUILD = "the file is damaged or was replaced: copy it again or rebuild the dataset"


def prefix(folder: Path, epoch: int, part: int, kind: str) -> str:
    """Path, without suffix, of one indexed dataset; `kind` is "rows" or "layout"."""
    return str(folder / f"epoch{epoch}.{part:05d}.{kind}")


@dataclass
class RowCounts:
    """Totals over a set of rows. The field names are keys of the manifest."""

    rows: int = 0
    documents: int = 0
    clean: int = 0  # clean tokens
    block: int = 0  # block tokens
    targets: int = 0
    slots: list[int] = field(default_factory=list)  # targets of each slot; D entries

    def add(self, other: "RowCounts") -> None:
        """Adds `other` in place."""
        for key in ("rows", "documents", "clean", "block", "targets"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.slots = [a + b for a, b in zip(self.slots or [0] * len(other.slots), other.slots, strict=True)]


@dataclass
class PartInfo:
    """Counts and files ({name: {bytes, sha256}}) of a finished part."""

    counts: RowCounts
    files: dict[str, dict[str, Any]]


class PartWriter:
    """Writes one part of an epoch into `folder`. Its files are complete and on disk once `finish` returns. `meta` are
    manifest fields, of which row_length, block_size and eos_token_id are used."""

    def __init__(self, folder: Path, epoch: int, part: int, meta: dict[str, Any]) -> None:
        self.meta = meta
        self._counts = RowCounts(slots=[0] * meta["block_size"])
        self._writers = {kind: IndexedWriter(prefix(folder, epoch, part, kind)) for kind in KINDS}

    def add(self, tokens: np.ndarray, layout: RowLayout) -> None:
        """Appends a row: tokens int32 (used,) and its layout."""
        self.add_rows(tokens, layout, [layout.n_docs])

    def add_rows(self, tokens: np.ndarray, layout: RowLayout, docs_per_row: Sequence[int]) -> None:
        """Appends several rows, passed as one long row (all clean parts, then all block parts) and split after every
        `docs_per_row[i]` documents."""
        if len(tokens) != layout.used or sum(docs_per_row) != layout.n_docs:
            raise ValueError(f"{len(tokens)} tokens and {sum(docs_per_row)} documents do not match {layout}")
        # Targets of the whole batch at once: per row, numpy's call overhead would dominate.
        targets = slot_targets(tokens, layout, self.meta["eos_token_id"])
        slots = [int(np.count_nonzero(target != IGNORE)) for target in targets]
        edges = np.cumsum([0, *docs_per_row])
        clean = np.concatenate([[0], np.cumsum(layout.clean_lens)])[edges].tolist()
        blocks = np.concatenate([[0], np.cumsum(layout.n_blocks)])[edges].tolist()
        edges, size = edges.tolist(), layout.block_size
        rows, layouts = [], []
        for i, n_docs in enumerate(docs_per_row):
            docs = slice(edges[i], edges[i + 1])
            row = np.concatenate(
                [
                    tokens[clean[i] : clean[i + 1]],
                    tokens[layout.n_clean + blocks[i] * size : layout.n_clean + blocks[i + 1] * size],
                ]
            )
            if len(row) > self.meta["row_length"]:
                raise ValueError(f"row of {len(row)} tokens exceeds row_length {self.meta['row_length']}")
            starts = layout.starts[blocks[i] : blocks[i + 1]]
            ints = np.concatenate(
                [[0, n_docs], layout.doc_ids[docs], layout.clean_lens[docs], layout.n_blocks[docs], starts],
                dtype=np.int32,
                casting="unsafe",
            )
            ints[0] = _checksum(row, ints[1:])
            rows.append(row)
            layouts.append(ints)
        for kind, sequences in (("rows", rows), ("layout", layouts)):
            whole = np.concatenate([np.empty(0, np.int32), *sequences])
            self._writers[kind].add(whole, [len(ints) for ints in sequences])
        self._counts.add(
            RowCounts(len(docs_per_row), layout.n_docs, layout.n_clean, layout.n_block_tokens, sum(slots), slots)
        )

    def finish(self) -> PartInfo:
        """Closes the files and returns their description."""
        files: dict[str, dict[str, Any]] = {}
        for writer in self._writers.values():
            files.update(writer.finish())
        return PartInfo(self._counts, files)

    def abort(self) -> None:
        """Closes the files and leaves them incomplete."""
        for writer in self._writers.values():
            writer.abort()


def _checksum(tokens: np.ndarray, layout: np.ndarray) -> np.int32:
    # crc32 instead of a cryptographic hash: it is compared on every read, and only has to detect bit flips.
    crc = zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32).data)
    crc = zlib.crc32(np.ascontiguousarray(layout, dtype=np.int32).data, crc)
    return np.uint32(crc).astype(np.int32)


def seal(
    partial: Path,
    path: Path,
    *,
    meta: dict[str, Any],
    parts: Sequence[Sequence[PartInfo]],
    files: dict[str, dict[str, Any]],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Writes the manifest of a folder whose parts are finished, renames the folder, and returns the manifest.

    Args:
        meta: manifest fields; must contain REQUIRED.
        parts: the parts of each epoch.
        files: other files of the folder, {name: {bytes, sha256}}.
        extra: additional manifest fields.
    """
    counts = []
    for epoch in parts:
        counts.append(RowCounts(slots=[0] * meta["block_size"]))
        for part in epoch:
            counts[-1].add(part.counts)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **meta,
        "epochs": len(parts),
        "counts": [asdict(c) for c in counts],
        "part_rows": [[part.counts.rows for part in epoch] for epoch in parts],
        "mean_documents_per_row": sum(c.documents for c in counts) / sum(c.rows for c in counts),
        **extra,
        "files": {name: files[name] for name in sorted(files)}
        | {name: entry for epoch in parts for part in epoch for name, entry in sorted(part.files.items())},
    }
    for i in range(len(parts)):
        manifest["files"] |= write_sizes(sizes_prefix(partial, i), epoch_sizes(partial, i, manifest))
    # The rename is the last step: a folder with the final name is complete.
    manifest["checksum"] = manifest_checksum(manifest)
    write_json(partial / "manifest.json", manifest)
    rename_whole(partial, path)
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of a manifest without its `checksum` field."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def epoch_sizes(folder: Path, epoch: int, manifest: dict[str, Any]) -> EpochSizes:
    """Sizes of an epoch's documents, from its layouts. Raises DataError if they are damaged."""
    names = [prefix(folder, epoch, part, "layout") for part in range(len(manifest["part_rows"][epoch]))]
    try:
        return scan_layouts(map(IndexedReader, names))
    except (ValueError, IndexError) as error:
        raise DataError(f"the layouts cannot be read: {error}", f"{folder}, epoch {epoch}", REBUILD) from None


class PartReader:
    """One part of an epoch, memory-mapped. Raises DataError if the files are not a complete indexed dataset with the
    manifest's number of rows."""

    def __init__(self, folder: Path, epoch: int, part: int, manifest: dict[str, Any]) -> None:
        self._where, rows = f"{folder}, epoch {epoch}, part {part}", manifest["part_rows"][epoch][part]
        self._block_size, self._target_shift = manifest["block_size"], manifest["target_shift"]
        self._readers = {}
        # A layout has two numbers, three per document and one per block.
        longest = {"rows": MOST_TOKENS, "layout": 2 + 4 * MOST_TOKENS}
        for kind in KINDS:
            where = prefix(folder, epoch, part, kind)
            for suffix in (".bin", ".idx"):
                regular_file(folder, Path(where).name + suffix, DataError)
            try:
                self._readers[kind] = IndexedReader(where, longest[kind])
            except ValueError as error:  # an OSError of files that are there says nothing about them: it may pass
                raise DataError(f"the rows cannot be read: {error}", where, REBUILD) from None
        counts = {kind: len(reader) for kind, reader in self._readers.items()}
        if set(counts.values()) != {rows}:
            raise DataError(f"the files contain {counts} rows, the manifest says {rows}", self._where, REBUILD)

    def read(self, row: int) -> tuple[np.ndarray, RowLayout]:
        """Tokens int32 (used,) and layout of a row. Raises DataError if the stored bytes do not match the row's crc32
        or contradict each other."""
        try:
            tokens, ints = self._readers["rows"][row], self._readers["layout"][row]
            if not len(ints) or ints[0] != _checksum(tokens, ints[1:]):
                raise ValueError("checksum mismatch between its tokens and layout")
            layout = RowLayout.from_ints(ints[1:], self._block_size, self._target_shift)
            if layout.used != len(tokens):
                raise ValueError(f"it has {len(tokens)} tokens, its layout describes {layout.used}")
        except (ValueError, IndexError, OverflowError) as error:
            raise DataError(f"the row is damaged: {error}", f"{self._where}, row {row} of the part", REBUILD) from None
        return tokens, layout


class PackedDataset:
    """Memory-mapped reader. Opening it checks the size of every file; reading a row touches only that row's bytes.

    Args:
        path: dataset folder.

    Raises:
        DataError: the folder is missing, incomplete, truncated or of another format version.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.block_size: int = self.manifest["block_size"]
        self.target_shift: bool = self.manifest["target_shift"]
        self.mask_token_id: int = self.manifest["mask_token_id"]
        self.mask_token: str | None = self.manifest.get("mask_token")
        """Text of the mask token; None if the manifest, which needs only the id, does not name it."""
        self.row_length: int = self.manifest["row_length"]
        self.epochs: int = self.manifest["epochs"]
        self._edges = [np.cumsum([0, *self.part_rows(epoch)]) for epoch in range(self.epochs)]
        self._sizes: dict[int, EpochSizes] = {}
        # All files are checked, but none is opened before a row of it is read.
        for epoch in range(self.epochs):
            self._check_sizes(epoch)
        # without self: in a reference cycle the files would stay open until the garbage collector runs
        reader = partial(PartReader, self.path, manifest=self.manifest)
        self._part = lru_cache(maxsize=most_open(_OPEN_PARTS, 16))(reader)

    @property
    def mean_tokens(self) -> float:
        """Clean and block tokens of a row, over all prepared epochs."""
        counts = self.manifest["counts"]
        return sum(c["clean"] + c["block"] for c in counts) / max(1, sum(c["rows"] for c in counts))

    def rows(self, epoch: int) -> int:
        """Rows of an epoch. Epochs beyond the prepared ones reuse the prepared ones in turn."""
        return int(self._edges[epoch % self.epochs][-1])

    def part_rows(self, epoch: int) -> list[int]:
        """Rows of each part of a prepared epoch."""
        return self.manifest["part_rows"][epoch]

    def read(self, epoch: int, row: int) -> tuple[np.ndarray, RowLayout]:
        """Tokens int32 (used,) and layout of one row, in file order. Raises DataError if the row is damaged."""
        epoch %= self.epochs
        part = int(np.searchsorted(self._edges[epoch], row, side="right")) - 1
        tokens, layout = self._part(epoch, part).read(row - int(self._edges[epoch][part]))
        if layout.used > self.row_length:
            where = f"{self.path}, epoch {epoch}, row {row}"
            raise DataError(f"the row has {layout.used} tokens, the limit is {self.row_length}", where, REBUILD)
        return tokens, layout

    def sizes(self, epoch: int) -> EpochSizes:
        """Sizes of all documents of an epoch. Raises DataError if they cannot be read."""
        epoch %= self.epochs
        if epoch not in self._sizes:
            where = sizes_prefix(self.path, epoch)
            names = [Path(where).name + suffix for suffix in (".bin", ".idx")]
            if names[0] not in self.manifest["files"]:  # a dataset of an older version
                self._sizes[epoch] = epoch_sizes(self.path, epoch, self.manifest)
                return self._sizes[epoch]
            try:
                # every rank must see the same sizes: otherwise documents would be trained twice, or not at all
                for name in names:
                    if sha256(regular_file(self.path, name, DataError)) != self.manifest["files"][name].get("sha256"):
                        raise ValueError(f"the sha256 of {name} differs from the manifest")
                self._sizes[epoch] = read_sizes(where, self.rows(epoch))
            except ValueError as error:
                raise DataError(f"the sizes of documents cannot be read: {error}", where, REBUILD) from None
        return self._sizes[epoch]

    def longest_document(self, epoch: int) -> int:
        """Clean tokens of the longest document of an epoch. Raises DataError if the sizes cannot be read."""
        return int(self.sizes(epoch).table[:, CLEAN].max(initial=0))

    def _check_sizes(self, epoch: int) -> None:
        """Compares file sizes with the manifest, so that a truncated copy fails at start and not hours later."""
        names = [prefix(self.path, epoch, part, kind) for part in range(len(self.part_rows(epoch))) for kind in KINDS]
        if (sizes := sizes_prefix(self.path, epoch)) and f"{Path(sizes).name}.bin" in self.manifest["files"]:
            names.append(sizes)
        for file in (Path(name + suffix) for name in names for suffix in (".bin", ".idx")):
            expected = self.manifest["files"].get(file.name, {}).get("bytes")
            regular_file(self.path, file.name, DataError)
            if (size := file.stat().st_size) != expected:
                what = f"{file.name} has {size} bytes, the manifest says {expected}"
                raise DataError(what, str(file), REBUILD)


def origin(number: int, manifest: dict[str, Any]) -> str:
    """Input row of a document, such as "row 12 of smoltalk"."""
    for source in manifest.get("accounting", {}).get("by_source", []):
        copies = int(np.ceil(source["weight"]))
        copy, row = divmod(number - source["first_document"], max(1, source["rows"]))
        if 0 <= copy < copies:
            return f"row {row:,} of {source['name']}" + (f", copy {copy + 1} of {copies}" if copies > 1 else "")
    return "from an unknown source"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a dataset folder. Raises DataError if the manifest is missing, damaged or of another format
    version."""
    file, rebuild = path / "manifest.json", "rebuild the dataset with `sdlm prepare`"
    if not file.exists():
        unfinished = Path(f"{path}.partial").exists()  # `.` has no name
        absent = "not a packed dataset: no manifest.json" if path.is_dir() else "no such folder"
        what = "the dataset is unfinished" if unfinished else absent
        raise DataError(what, str(path), "name a folder that `sdlm prepare` has completed")
    manifest = read_json_object(regular_file(path, file.name, DataError), DataError, rebuild)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        actual = f"format {manifest.get('format')!r}, version {manifest.get('version')!r}"
        raise DataError(f"the manifest has {actual}, not {FORMAT} version {VERSION}", str(file), rebuild)
    if missing := [k for k in (*REQUIRED, "epochs", "counts", "part_rows", "files") if k not in manifest]:
        raise DataError(f"the manifest lacks {missing}", str(file), rebuild)
    # Last, because a manifest of another version may be checksummed differently.
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise DataError("the manifest was changed after it was written", str(file), REBUILD)
    _check_values(manifest, file)
    return manifest


def _check_values(manifest: dict[str, Any], file: Path) -> None:
    """Types and ranges of the fields that are used: a stranger's manifest has a valid checksum, too.

    Raises:
        DataError: names the field.
    """
    for key, least in (("row_length", 1), ("max_document_length", 1), ("block_size", 1), ("repeat", 0), ("epochs", 1)):
        if checked(manifest, key, int, file, DataError, least) > MOST_TOKENS:
            raise DataError(f"{key} is {manifest[key]}, above {MOST_TOKENS}", f"{file}, field {key}", REBUILD)
    for key in ("mask_token_id", "eos_token_id", "pad_token_id", "vocab_size", "seed"):
        if checked(manifest, key, int, file, DataError, 0 if key == "seed" else -1) >= 2**63:
            raise DataError(f"{key} is {manifest[key]}, above 64 bits", f"{file}, field {key}", REBUILD)
    kinds: dict[str, type] = {
        "target_shift": bool,
        "tokenizer": dict,
        "sources": list,
        "counts": list,
        "part_rows": list,
        "files": dict,
    }
    kinds["mean_documents_per_row"] = float
    optional = {"accounting": dict, "duplicates": dict, "build": dict}
    for key, kind in [*kinds.items(), *((k, v) for k, v in optional.items() if k in manifest)]:
        checked(manifest, key, kind, file, DataError)
    text = manifest.get("mask_token")
    origins = manifest.get("accounting", {}).get("by_source", [])
    wrong = {
        "accounting": not isinstance(origins, list) or not all(map(_is_origin, origins)),
        "mask_token": text is not None and not isinstance(text, str),
        "counts": not all(_is_counts(c, manifest["block_size"]) for c in manifest["counts"]),
        "part_rows": not all(isinstance(e, list) and all(map(_is_count, e)) for e in manifest["part_rows"]),
        "files": not all(isinstance(e, dict) and _is_count(e.get("bytes")) for e in manifest["files"].values()),
    }
    for key in filter(wrong.get, wrong):
        raise DataError(f"{key} has values of a wrong type or size", f"{file}, field {key}", REBUILD)
    lengths = {key: len(manifest[key]) for key in ("counts", "part_rows")}
    if {*lengths.values()} != {manifest["epochs"]}:
        raise DataError(f"epochs is {manifest['epochs']}, the numbers of entries are {lengths}", str(file), REBUILD)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_origin(value: Any) -> bool:
    """Whether a value has the fields that `origin` reads."""
    numbers = isinstance(value, dict) and all(_is_count(value.get(key)) for key in ("first_document", "rows"))
    weight: Any = value.get("weight") if numbers else None
    return numbers and isinstance(value.get("name"), str) and type(weight) in (int, float) and 0 <= weight <= 10_000


def _is_counts(value: Any, block_size: int) -> bool:
    """Whether a value has the fields of RowCounts."""
    if not isinstance(value, dict) or value.keys() != RowCounts.__dataclass_fields__.keys():
        return False
    slots = value["slots"]
    numbers = [number for key, number in value.items() if key != "slots"]
    return isinstance(slots, list) and len(slots) == block_size and all(map(_is_count, [*numbers, *slots]))
