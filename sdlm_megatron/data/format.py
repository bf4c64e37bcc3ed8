"""The packed dataset on disk, written and read here only.

    DATASET/
      manifest.json                    what was packed, with which settings, how much; checksums of the other files
      epoch0.00000.rows.bin/.idx       Megatron-Core indexed dataset, int32: used tokens (clean parts, block parts)
      epoch0.00000.layout.bin/.idx     the same: a row's checksum and RowLayout.to_ints()
      epoch0.00001.rows.bin…           the next part of the epoch

Padding is not stored, positions and targets are derived (diffusion.layout): nothing on disk can disagree with them.
An epoch is cut into parts so that many processes can write it and no file grows without end. The checksum, a crc32 of
the row's tokens and layout, is compared whenever a row is read: a flipped bit never reaches training.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sdlm_megatron.data.indexed import IndexedReader, IndexedWriter
from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, slot_targets
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import rename_whole, write_json

FORMAT = "sdlm-packed"
VERSION = 2
REQUIRED = (
    "row_length",
    "max_document_length",
    "block_size",
    "repeat",
    "target_shift",
    "mask_token_id",
    "eos_token_id",
    "pad_token_id",
    "vocab_size",
    "tokenizer",
    "seed",
    "sources",
)
KINDS = ("rows", "layout")
_OPEN_PARTS = 64
"""Parts a reader keeps mapped: a corpus may have more than a process may have open files."""


def prefix(folder: Path, epoch: int, part: int, kind: str) -> str:
    """Path without ending of one of the indexed datasets; `kind` is "rows" or "layout"."""
    return str(folder / f"epoch{epoch}.{part:05d}.{kind}")


@dataclass
class Counts:
    """What some rows hold."""

    rows: int = 0
    documents: int = 0
    clean: int = 0
    """Clean tokens."""
    block: int = 0
    """Block tokens."""
    targets: int = 0
    slots: list[int] = field(default_factory=list)
    """Targets of each slot, D numbers."""

    def add(self, other: "Counts") -> None:
        """Adds another count to this one."""
        for key in ("rows", "documents", "clean", "block", "targets"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.slots = [a + b for a, b in zip(self.slots or [0] * len(other.slots), other.slots, strict=True)]


@dataclass
class PartInfo:
    """A finished part: what it holds, and {file name: {bytes, sha256}}."""

    counts: Counts
    files: dict[str, dict[str, Any]]


class PartWriter:
    """Writes one part of an epoch into `folder`. Its files are whole and on the disk once `finish` returns.

    Args:
        meta: manifest fields; of these row_length, block_size and eos_token_id are used.
    """

    def __init__(self, folder: Path, epoch: int, part: int, meta: dict[str, Any]) -> None:
        self.meta = meta
        self._counts = Counts(slots=[0] * meta["block_size"])
        self._writers = {kind: IndexedWriter(prefix(folder, epoch, part, kind)) for kind in KINDS}

    def add(self, tokens: np.ndarray, layout: RowLayout) -> None:
        """Appends a row: tokens int32 (used,) and its layout."""
        self.add_rows(tokens, layout, [layout.n_docs])

    def add_rows(self, tokens: np.ndarray, layout: RowLayout, docs_per_row: Sequence[int]) -> None:
        """Appends rows given as one long row (clean parts of all, block parts of all) that is cut after every
        `docs_per_row` documents."""
        if len(tokens) != layout.used or sum(docs_per_row) != layout.n_docs:
            raise ValueError(f"{len(tokens)} tokens and {sum(docs_per_row)} documents do not fit {layout}")
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
                raise ValueError(f"a row of {len(row)} tokens, the limit is {self.meta['row_length']}")
            starts = layout.starts[blocks[i] : blocks[i + 1]]
            ints = np.concatenate(
                [[0, n_docs], layout.doc_ids[docs], layout.clean_lens[docs], layout.n_blocks[docs], starts],
                dtype=np.int32,
                casting="unsafe",
            )
            ints[0] = _checksum(row, ints[1:])
            rows.append(row)
            layouts.append(ints)
        for kind, found in (("rows", rows), ("layout", layouts)):
            whole = np.concatenate([np.empty(0, np.int32), *found])
            self._writers[kind].add_many(whole, [len(ints) for ints in found])
        self._counts.add(
            Counts(len(docs_per_row), layout.n_docs, layout.n_clean, layout.n_block_tokens, sum(slots), slots)
        )

    def finish(self) -> PartInfo:
        """Closes the files."""
        files: dict[str, dict[str, Any]] = {}
        for writer in self._writers.values():
            files.update(writer.finish())
        return PartInfo(self._counts, files)

    def abort(self) -> None:
        """Closes the files, which are of no use then."""
        for writer in self._writers.values():
            writer.abort()


def _checksum(tokens: np.ndarray, layout: np.ndarray) -> np.int32:
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
    """Writes the manifest of a folder whose parts are finished, and renames it into place; returns the manifest.

    Args:
        partial: the folder with all files; path: its final name.
        meta: manifest fields, all of REQUIRED.
        parts: of each epoch, its parts.
        files: other files of the folder, {name: {bytes, sha256}}.
        extra: more manifest fields.
    """
    counts = []
    for epoch in parts:
        counts.append(Counts(slots=[0] * meta["block_size"]))
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
        | {name: found for epoch in parts for part in epoch for name, found in sorted(part.files.items())},
    }
    manifest["checksum"] = manifest_checksum(manifest)
    write_json(partial / "manifest.json", manifest)
    rename_whole(partial, path)
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's content, but for its field `checksum`."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class PartReader:
    """One part of an epoch, memory-mapped.

    DataError when its files are not a whole indexed dataset of `rows` rows.
    """

    def __init__(self, folder: Path, epoch: int, part: int, *, rows: int, block_size: int, target_shift: bool) -> None:
        self._where = f"{folder}, epoch {epoch}, part {part}"
        self._block_size, self._target_shift = block_size, target_shift
        self._readers = {}
        for kind in KINDS:
            where = prefix(folder, epoch, part, kind)
            try:
                self._readers[kind] = IndexedReader(where)
            except (ValueError, OSError) as error:
                raise DataError(f"the rows cannot be read: {error}", where, REBUILD) from None
        counts = {kind: len(reader) for kind, reader in self._readers.items()}
        if set(counts.values()) != {rows}:
            raise DataError(f"the files hold {counts}, the manifest says {rows} rows", self._where, REBUILD)

    def read(self, row: int) -> tuple[np.ndarray, RowLayout]:
        """Tokens int32 (used,) and layout of a row; DataError when its bytes are not those that were written."""
        try:
            tokens, ints = self._readers["rows"][row], self._readers["layout"][row]
            if not len(ints) or ints[0] != _checksum(tokens, ints[1:]):
                raise ValueError("its checksum is not that of its tokens and layout")
            layout = RowLayout.from_ints(ints[1:], self._block_size, self._target_shift)
            if layout.used != len(tokens):
                raise ValueError(f"it has {len(tokens)} tokens, its layout describes {layout.used}")
        except (ValueError, IndexError, OverflowError) as error:
            raise DataError(f"the row is damaged: {error}", f"{self._where}, row {row} of the part", REBUILD) from None
        return tokens, layout


class PackedDataset:
    """Memory-mapped reader. Opening looks at the size of every file, reading a row touches only its bytes.

    Args:
        path: the dataset folder. DataError when it is missing, incomplete, truncated or of another version.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.block_size: int = self.manifest["block_size"]
        self.row_length: int = self.manifest["row_length"]
        self.epochs: int = self.manifest["epochs"]
        self._edges = [np.cumsum([0, *self.part_rows(epoch)]) for epoch in range(self.epochs)]
        for epoch in range(self.epochs):
            for part in range(len(self.part_rows(epoch))):
                self._check_sizes(epoch, part)
        self._part = lru_cache(maxsize=_OPEN_PARTS)(self._open)

    def rows(self, epoch: int) -> int:
        """Rows of an epoch; epochs beyond the prepared ones use the prepared ones again."""
        return int(self._edges[epoch % self.epochs][-1])

    def part_rows(self, epoch: int) -> list[int]:
        """Rows of each part of a prepared epoch."""
        return self.manifest["part_rows"][epoch]

    def read(self, epoch: int, row: int) -> tuple[np.ndarray, RowLayout]:
        """Tokens int32 (used,) and layout of one row in file order.

        DataError when the row's bytes are not those that were written.
        """
        epoch %= self.epochs
        part = int(np.searchsorted(self._edges[epoch], row, side="right")) - 1
        tokens, layout = self._part(epoch, part).read(row - int(self._edges[epoch][part]))
        if layout.used > self.row_length:
            where = f"{self.path}, epoch {epoch}, row {row}"
            raise DataError(f"the row has {layout.used} tokens, the limit is {self.row_length}", where, REBUILD)
        return tokens, layout

    def _open(self, epoch: int, part: int) -> PartReader:
        rows = self.part_rows(epoch)[part]
        return PartReader(
            self.path,
            epoch,
            part,
            rows=rows,
            block_size=self.block_size,
            target_shift=self.manifest["target_shift"],
        )

    def _check_sizes(self, epoch: int, part: int) -> None:
        for kind in KINDS:
            for ending in (".bin", ".idx"):
                file = Path(prefix(self.path, epoch, part, kind) + ending)
                said = self.manifest["files"].get(file.name, {}).get("bytes")
                found = file.stat().st_size if file.exists() else None
                if found != said:
                    raise DataError(
                        f"{file.name} has {found} bytes, the manifest says {said}"
                        if found is not None
                        else f"{file.name} is missing",
                        str(file),
                        REBUILD,
                    )


REBUILD = "the file was damaged or replaced: copy it again or build the dataset again"


def origin(number: int, manifest: dict[str, Any]) -> str:
    """Which input row a document is: "row 12 of smoltalk"."""
    for source in manifest.get("accounting", {}).get("by_source", []):
        copies = int(np.ceil(source["weight"]))
        copy, row = divmod(number - source["first_document"], max(1, source["rows"]))
        if 0 <= copy < copies:
            return f"row {row:,} of {source['name']}" + (f", copy {copy + 1} of {copies}" if copies > 1 else "")
    return "of no known source"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a dataset folder; DataError when it is missing, damaged or of another version."""
    file = path / "manifest.json"
    hint = "name the folder that `python -m data_prep.build` wrote"
    if not file.exists():
        unfinished = path.with_name(path.name + ".partial").exists()
        raise DataError(
            "an unfinished dataset" if unfinished else "not a packed dataset: no manifest.json",
            str(path),
            hint,
        )
    try:
        manifest = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"the manifest is not JSON: {error}", str(file), "build the dataset again") from None
    if not isinstance(manifest, dict):
        raise DataError("the manifest is no JSON object", str(file), "build the dataset again")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')} version {manifest.get('version')}"
        raise DataError(f"this is {found}, not {FORMAT} version {VERSION}", str(file), "build the dataset again")
    if missing := [k for k in (*REQUIRED, "epochs", "counts", "part_rows", "files") if k not in manifest]:
        raise DataError(f"the manifest lacks {missing}", str(file), "build the dataset again")
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise DataError("the manifest is not as it was written", str(file), REBUILD)
    return manifest
