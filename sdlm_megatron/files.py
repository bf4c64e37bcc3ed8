"""Atomic file writes (write beside, fsync, rename) and checksums."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replaces the content of `path` atomically; a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)  # after the fsync: a crash must not leave the name on an empty file


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync(path: Path | str) -> None:
    """Flushes a file, or the directory entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flushes every file below `folder`, and the folders themselves, to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            fsync(os.path.join(root, name))
        fsync(root)


def rename_whole(partial: Path, final: Path) -> None:
    """Moves a finished folder to its final name once all of its content is on disk."""
    fsync_tree(partial)
    os.rename(partial, final)
    fsync(final.parent)  # the rename itself is an entry of the parent folder


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashedFile:
    """A file for torch.save that is written sequentially and hashed on the way.

    A disk error is stored, and raised by `check` and `close`: raised in `write`, torch.save would replace it by one of
    its own that does not name the cause.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by `close`
        self._hash, self._size = hashlib.sha256(), 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        self._hash.update(view)
        try:
            while done < len(view) and self._error is None:
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self._error = error
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Does nothing: the file is unbuffered."""

    def check(self) -> None:
        """Raises the OSError of a write that failed."""
        if self._error is not None:
            self._file.close()
            raise self._error

    def close(self) -> dict[str, Any]:
        """Flushes to disk and closes; returns {"size": bytes, "sha256": hex}."""
        self.check()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "sha256": self._hash.hexdigest()}
