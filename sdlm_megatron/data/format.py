"""The packed dataset on disk, written and read here only.

    DATASET/
      manifest.json             what was packed, with which settings, how much; checksums of the other files
      epoch0.rows.bin/.idx      Megatron-Core indexed dataset, int32: a row's used tokens (clean parts, block parts)
      epoch0.layout.bin/.idx    Megatron-Core indexed dataset, int32: a row's RowLayout.to_ints()

Padding is not stored, positions and targets are derived (diffusion.layout): nothing on disk can disagree with them.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sdlm_megatron.data.indexed import IndexedReader, IndexedWriter
from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, row_targets
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import rename_whole, write_json

FORMAT = "sdlm-packed"
VERSION = 1
REQUIRED = (
    "row_length",
    "max_document_length",
    "block_size",
    "repeat",
    "mask_token_id",
    "eos_token_id",
    "pad_token_id",
    "vocab_size",
    "tokenizer",
    "seed",
    "sources",
)


def prefix(folder: Path, epoch: int, part: str) -> str:
    """Path without ending of one of the indexed datasets; `part` is "rows" or "layout"."""
    return str(folder / f"epoch{epoch}.{part}")


class DatasetWriter:
    """Writes a dataset whole or not at all: into PATH.partial, renamed to PATH by `finish`.

    Args:
        path: folder to create; DataError if it exists.
        meta: manifest fields, all of REQUIRED.
        epochs: number of epochs that will be written.
    """

    def __init__(self, path: str | os.PathLike, *, meta: dict[str, Any], epochs: int = 1) -> None:
        self.path = Path(path)
        if missing := [key for key in REQUIRED if key not in meta]:
            raise ValueError(f"manifest fields missing: {missing}")
        if self.path.exists():
            raise DataError("the dataset folder exists already", str(self.path), "name another folder, or remove it")
        self.partial = self.path.with_name(self.path.name + ".partial")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        self.meta, self.epochs = meta, epochs
        self.counts = [dict.fromkeys(("rows", "documents", "clean", "block", "targets"), 0) for _ in range(epochs)]
        self._writers = [
            {part: IndexedWriter(prefix(self.partial, epoch, part)) for part in ("rows", "layout")}
            for epoch in range(epochs)
        ]

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.partial.exists():  # not finished: leave nothing behind
            for writers in self._writers:
                for writer in writers.values():
                    writer.abort()
            shutil.rmtree(self.partial)

    def add(self, epoch: int, tokens: np.ndarray, layout: RowLayout) -> None:
        """Appends a row: tokens int32 (used,) and its layout."""
        if len(tokens) != layout.used or layout.used > self.meta["row_length"]:
            raise ValueError(f"row of {len(tokens)} tokens, layout of {layout.used}, limit {self.meta['row_length']}")
        self._writers[epoch]["rows"].add(tokens)
        self._writers[epoch]["layout"].add(layout.to_ints())
        targets = row_targets(tokens, layout, self.meta["eos_token_id"])
        counts = self.counts[epoch]
        counts["rows"] += 1
        counts["documents"] += layout.n_docs
        counts["clean"] += layout.n_clean
        counts["block"] += layout.n_block_tokens
        counts["targets"] += int((targets != IGNORE).sum())

    def finish(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Closes the files, writes the manifest, renames the folder into place; returns the manifest."""
        for writers in self._writers:
            for writer in writers.values():
                writer.finish()
        rows, documents = (sum(c[k] for c in self.counts) for k in ("rows", "documents"))
        if not rows:
            raise DataError("no row to write: every document was dropped or rejected", str(self.path))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **self.meta,
            "epochs": self.epochs,
            "counts": self.counts,
            "mean_documents_per_row": documents / rows,
            **(extra or {}),
            "files": {p.name: _describe(p) for p in sorted(self.partial.iterdir())},
        }
        write_json(self.partial / "manifest.json", manifest)
        rename_whole(self.partial, self.path)
        return manifest


class PackedDataset:
    """Memory-mapped reader. Opening costs O(rows of the index), reading a row touches only its bytes.

    Args:
        path: the dataset folder. DataError when it is missing, incomplete, truncated or of another version.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.block_size: int = self.manifest["block_size"]
        self.row_length: int = self.manifest["row_length"]
        self.epochs: int = self.manifest["epochs"]
        self._parts: list[dict[str, IndexedReader]] = []
        for epoch in range(self.epochs):
            self._check_sizes(epoch)
            self._parts.append({p: self._open(epoch, p) for p in ("rows", "layout")})
            counts = {p: len(d) for p, d in self._parts[-1].items()}
            if set(counts.values()) != {self.manifest["counts"][epoch]["rows"]}:
                raise DataError(
                    f"the files hold {counts}, the manifest says {self.manifest['counts'][epoch]['rows']} rows",
                    str(self.path),
                    "build the dataset again",
                )

    def rows(self, epoch: int) -> int:
        """Rows of an epoch; epochs beyond the prepared ones use the prepared ones again."""
        return self.manifest["counts"][epoch % self.epochs]["rows"]

    def read(self, epoch: int, row: int) -> tuple[np.ndarray, RowLayout]:
        """Tokens int32 (used,) and layout of one row in file order; DataError when the two do not fit."""
        parts = self._parts[epoch % self.epochs]
        tokens = parts["rows"][row]
        where = f"{self.path}, epoch {epoch % self.epochs}, row {row}"
        try:
            layout = RowLayout.from_ints(parts["layout"][row], self.block_size)
        except (ValueError, IndexError) as error:
            raise DataError(f"the row's layout is damaged: {error}", where, "build the dataset again") from None
        if layout.used != len(tokens) or layout.used > self.row_length:
            raise DataError(
                f"the row has {len(tokens)} tokens, its layout describes {layout.used}",
                where,
                "build the dataset again",
            )
        return tokens, layout

    def _open(self, epoch: int, part: str) -> IndexedReader:
        try:
            return IndexedReader(prefix(self.path, epoch, part))
        except (ValueError, OSError) as error:
            where = prefix(self.path, epoch, part)
            raise DataError(f"the rows cannot be read: {error}", where, "build the dataset again") from None

    def _check_sizes(self, epoch: int) -> None:
        for part in ("rows", "layout"):
            for ending in (".bin", ".idx"):
                file = Path(prefix(self.path, epoch, part) + ending)
                said = self.manifest["files"].get(file.name, {}).get("bytes")
                found = file.stat().st_size if file.exists() else None
                if found != said:
                    raise DataError(
                        f"{file.name} has {found} bytes, the manifest says {said}"
                        if found is not None
                        else f"{file.name} is missing",
                        str(file),
                        "the file was cut short or replaced: copy it again or build the dataset again",
                    )


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
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
    except ValueError as error:
        raise DataError(f"the manifest is not JSON: {error}", str(file), "build the dataset again") from None
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')} version {manifest.get('version')}"
        raise DataError(f"this is {found}, not {FORMAT} version {VERSION}", str(file), "build the dataset again")
    if missing := [k for k in (*REQUIRED, "epochs", "counts", "files") if k not in manifest]:
        raise DataError(f"the manifest lacks {missing}", str(file), "build the dataset again")
    return manifest
