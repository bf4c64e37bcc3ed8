"""A folder that is written in parallel, file by file, and survives being killed at any moment.

OUT.partial/
  lock          held while a process works on it
  plan.json     what is being made, from what: the work goes on only where this is the same
  done/         one record for each file that is whole, written after it: its size, sha256 and notes
  files/        becomes OUT, in one rename, when everything is there
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import fsync, rename_whole, write_json

BLOCK = 8 * 1024**2
"""Bytes a worker reads and writes at a time."""


def default_workers() -> int:
    """One for each core this process may use, at most 8: beyond that disks are the limit."""
    return min(8, len(os.sched_getaffinity(0)))


def check_out(out: Path, workers: int) -> None:
    """Refuses an output folder that exists, and a number of workers that is none, before anything is read."""
    if out.exists() and not _root(out).is_dir():
        raise _exists(out)
    if workers < 1:
        raise CheckpointError(f"{workers} workers cannot do it", "workers", "use 1 or more")


def _exists(out: Path) -> CheckpointError:
    return CheckpointError("the output folder exists already", str(out), "choose another name or remove it")


def _root(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@dataclass(frozen=True)
class Unit:
    """One file to write."""

    file: str
    """Path in the folder."""
    size: int
    """Bytes of its tensors."""
    write: Callable[["Output"], Any]
    """Fills the file; what it returns, plain JSON, is kept with the record."""


class Output:
    """A file being written: counts, hashes and reports what passes through. OSError as a file's."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None], *, checksum: bool) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by `close`
        self._on_bytes = on_bytes
        self._hash = hashlib.sha256() if checksum else None
        self._size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._hash is not None:
            self._hash.update(view)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0
        self._size += done
        self._on_bytes(done)
        return done

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> dict[str, Any]:
        """Everything is on the disk afterwards; returns what identifies it."""
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._size} | ({} if self._hash is None else {"sha256": self._hash.hexdigest()})


class Progress:
    """A line on stderr now and then: bytes, MB/s, time left. To be used from several threads."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self._start = total, done, time.monotonic()
        self._kept, self._lock = done, threading.Lock()
        self._tty = sys.stderr.isatty()
        self._next = self._start + (0.2 if self._tty else 10)

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + (0.2 if self._tty else 10)
        self._print(f"  eta {(self.total - self.done) / max(1.0, self.rate()):.0f} s", end="\r" if self._tty else "\n")

    def rate(self) -> float:
        """Bytes a second of this process."""
        return (self.done - self._kept) / max(1e-9, time.monotonic() - self._start)

    def finish(self) -> None:
        self._print(f"  in {time.monotonic() - self._start:.1f} s", end="\n")

    def _print(self, text: str, end: str) -> None:
        share = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB"
        print(f"{share}  {self.rate() / 1e6:.0f} MB/s{text}   ", end=end, file=sys.stderr, flush=True)


class Partial:
    """OUT.partial while its lock is held; from `open_partial`."""

    def __init__(self, out: Path, root: Path) -> None:
        self.out, self.root, self.files, self.done = out, root, root / "files", root / "done"

    def write(self, units: Sequence[Unit], *, workers: int, checksum: bool) -> dict[str, dict[str, Any]]:
        """Writes the units that are not there yet; returns the records of all, by file.

        Raises CheckpointError where the disk is too small or fails.
        """
        records = self._records(units)
        missing = [unit for unit in units if unit.file not in records]
        self._check_room(sum(unit.size for unit in missing))
        progress = Progress(sum(u.size for u in units), sum(u.size for u in units if u.file in records))
        stop, errors = threading.Event(), []

        def work(unit: Unit) -> None:
            try:
                if not stop.is_set():
                    records[unit.file] = self._write(unit, progress, stop, checksum)
            except BaseException as error:  # noqa: BLE001  raised again below
                if not stop.is_set():
                    errors.append(error)
                stop.set()

        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(work, missing))
            finally:
                stop.set()  # Ctrl-C: the others need not finish
        if errors:
            raise errors[0]
        progress.finish()
        return {unit.file: records[unit.file] for unit in units}

    def _write(self, unit: Unit, progress: Progress, stop: threading.Event, checksum: bool) -> dict[str, Any]:
        def on_bytes(count: int) -> None:
            progress.add(count)
            if stop.is_set():
                raise CheckpointError("stopped because another file failed", unit.file)

        path = self.files / unit.file
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".partial")
        try:
            out = Output(beside, on_bytes, checksum=checksum)
            notes = unit.write(out)
            record = out.close() | {"notes": notes}
            os.replace(beside, path)
            fsync(path.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write: {error}", str(path), "free some space and run it again") from None
        write_json(self.done / f"{unit.file.replace('/', '--')}.json", record)
        return record

    def _records(self, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
        """Records of the units that are whole; everything else is removed from the folder."""
        records = {}
        for unit in units:
            file, record = self.files / unit.file, self.done / f"{unit.file.replace('/', '--')}.json"
            if record.is_file() and file.is_file():
                found = json.loads(record.read_text())
                if found["bytes"] == file.stat().st_size:
                    records[unit.file] = found
        for path in self.files.rglob("*"):
            if path.is_file() and str(path.relative_to(self.files)) not in records:
                path.unlink()
        return records

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise CheckpointError(
                f"{needed / 1e9:.1f} GB are needed, the disk has {free / 1e9:.1f} GB free",
                str(self.root),
                "free some space, or write to another disk",
            )

    def finish(self) -> None:
        """OUT appears; what was kept for a resumption goes."""
        rename_whole(self.files, self.out)
        self.clear()

    def clear(self) -> None:
        """Removes what is left when OUT is there; the plan last, by which this can be told from other work."""
        shutil.rmtree(self.done, ignore_errors=True)
        for name in ("lock", "plan.json"):
            (self.root / name).unlink(missing_ok=True)
        self.root.rmdir()


@contextmanager
def open_partial(out: Path, plan: dict[str, Any], *, workers: int) -> Iterator[Partial | None]:
    """OUT.partial, begun or gone on with; begun anew, with a notice, when it holds another plan.

    None when OUT is whole already, and only the clearing up had been interrupted.

    Args:
        plan: plain JSON that names the input and every option that matters for the result.

    Raises:
        CheckpointError: OUT exists; another process is at work on it.
    """
    check_out(out, workers)
    partial, plan = Partial(out, _root(out)), json.loads(json.dumps(plan))
    partial.root.mkdir(parents=True, exist_ok=True)
    with open(partial.root / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError("another process is writing it", str(partial.root), "wait for it or end it") from None
        file = partial.root / "plan.json"
        begun = json.loads(file.read_text()) if file.is_file() else None
        if out.exists():
            if begun not in (None, plan) or partial.files.exists():
                raise _exists(out)
            partial.clear()
            yield None
            return
        if begun not in (None, plan):
            print(f"{partial.root} was begun from other input or options: begun anew", file=sys.stderr)
            for folder in (partial.files, partial.done):
                shutil.rmtree(folder, ignore_errors=True)
        elif begun == plan:
            print(f"going on with {partial.root}", file=sys.stderr)
        write_json(file, plan)
        partial.files.mkdir(exist_ok=True)
        partial.done.mkdir(exist_ok=True)
        yield partial
