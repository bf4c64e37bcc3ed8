"""A folder whose files are written in parallel and survive a kill at any moment.

OUT.partial/
  lock          held while a process works on it
  plan.json     input and options; work continues only where they are the same
  done/         a record for each complete file, written after it: size, sha256 and notes
  files/        becomes OUT in one rename when everything is there
"""

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
from sdlm_megatron.files import HashedFile, fsync, lock_file, make_folder, read_json_object, rename_whole, write_json

BLOCK = 8 * 1024**2
"""Bytes a worker reads and writes at a time."""
Record = dict[str, Any]
"""{"size", "sha256", "notes"} of a complete file."""


def default_workers() -> int:
    """One per core this process may use, at most 8: beyond that disks are the limit."""
    return min(8, len(os.sched_getaffinity(0)))


def check_out(out: Path, workers: int) -> None:
    """CheckpointError where the output folder exists or there is no worker; called before anything is read."""
    if out.exists() and not (out.name and _root(out).is_dir()):  # no name: `.`
        raise _exists(out)
    make_folder(_root(out), dry=True)
    if workers < 1:
        raise CheckpointError(f"{workers} workers cannot write anything", "workers", "use 1 or more")


def _exists(out: Path) -> CheckpointError:
    return CheckpointError("the output folder exists already", str(out), "choose another name or remove it")


def _root(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@dataclass(frozen=True)
class PlannedFile:
    """A file to write."""

    file: str
    """Path in the folder."""
    size: int
    """Bytes of its tensors."""
    write: Callable[["OutputFile"], Any]
    """Writes the content, with `check` after each tensor; the return value, plain JSON, becomes the record's notes."""


class OutputFile(HashedFile):
    """A hashed file that reports each write.

    Args:
        on_bytes: called with the number of bytes; may raise to stop the writing.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def write(self, data: Any) -> int:
        count = super().write(data)
        self._on_bytes(count)
        return count


class ByteProgress:
    """A line on stderr now and then: bytes, MB/s, time left. Thread-safe."""

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
        self._print(f"  eta {(self.total - self.done) / max(1.0, self._rate()):.0f} s", end="\r" if self._tty else "\n")

    def finish(self) -> None:
        self._print(f"  in {time.monotonic() - self._start:.1f} s", end="\n")

    def _rate(self) -> float:
        return (self.done - self._kept) / max(1e-9, time.monotonic() - self._start)

    def _print(self, text: str, end: str) -> None:
        share = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB"
        print(f"{share}  {self._rate() / 1e6:.0f} MB/s{text}   ", end=end, file=sys.stderr, flush=True)


class PartialFolder:
    """OUT.partial while its lock is held; made by `open_partial`."""

    def __init__(self, out: Path, root: Path) -> None:
        self.out, self.root, self.files, self.done = out, root, root / "files", root / "done"

    def begin(self, plan: dict[str, Any], earlier: dict[str, Any] | None) -> None:
        """Makes the folders and the plan; starts over where there is an `earlier` one that is another."""
        if earlier not in (None, plan):
            print(f"{self.root} was started with other input or options: starting over", file=sys.stderr)
            for folder in (self.files, self.done):
                shutil.rmtree(folder, ignore_errors=True)
        elif earlier == plan:
            print(f"continuing with {self.root}", file=sys.stderr)
        write_json(self.root / "plan.json", plan)
        self.files.mkdir(exist_ok=True)
        self.done.mkdir(exist_ok=True)

    def write(self, planned: Sequence[PlannedFile], *, workers: int) -> dict[str, Record]:
        """Writes the files that are missing; returns the records of all, by file.

        Raises CheckpointError where the disk is too small or fails.
        """
        records = self._records(planned)
        missing = [file for file in planned if file.file not in records]
        self._check_room(sum(file.size for file in missing))
        progress = ByteProgress(sum(f.size for f in planned), sum(f.size for f in planned if f.file in records))
        stop, errors = threading.Event(), []

        def work(file: PlannedFile) -> None:
            try:
                if not stop.is_set():
                    records[file.file] = self._write(file, progress, stop)
            except BaseException as error:  # noqa: BLE001  raised again below
                if not stop.is_set():  # only the first error is the cause; the others are files it stopped
                    errors.append(error)
                stop.set()

        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(work, missing))
            finally:
                stop.set()  # on Ctrl-C the other workers stop at their next block
        if errors:
            raise errors[0]
        progress.finish()
        return {file.file: records[file.file] for file in planned}

    def _write(self, planned: PlannedFile, progress: ByteProgress, stop: threading.Event) -> Record:
        path = self.files / planned.file
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".partial")

        def on_bytes(count: int) -> None:
            progress.add(count)
            if stop.is_set():
                raise CheckpointError("stopped because another file failed", planned.file, "see the other error")

        try:
            out = OutputFile(unfinished, on_bytes)
            notes = planned.write(out)
            record = out.close() | {"notes": notes}
            # Renamed only when it is on the disk: a name never stands for half a file.
            os.replace(unfinished, path)
            fsync(path.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write: {error}", str(path), "free some space and run it again") from None
        # After the file: a record must never describe bytes that are not on the disk.
        write_json(self.done / f"{planned.file.replace('/', '--')}.json", record)
        return record

    def _records(self, planned: Sequence[PlannedFile]) -> dict[str, Record]:
        """Records of the complete files; everything else is removed from the folder."""
        records = {}
        for name in (planned_file.file for planned_file in planned):
            file, record_file = self.files / name, self.done / f"{name.replace('/', '--')}.json"
            if record_file.is_file() and file.is_file():
                record = read_json_object(record_file, CheckpointError, f"remove {record_file}")
                if record.get("size") == file.stat().st_size:
                    records[name] = record
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
        """Makes OUT appear; `open_partial` then removes OUT.partial."""
        rename_whole(self.files, self.out)

    def clear(self) -> None:
        """Removes OUT.partial once OUT exists; the plan last, because it tells this work from other work."""
        shutil.rmtree(self.done, ignore_errors=True)
        for name in ("lock", "plan.json"):
            (self.root / name).unlink(missing_ok=True)
        self.root.rmdir()


@contextmanager
def open_partial(out: Path, plan: dict[str, Any], *, workers: int) -> Iterator[PartialFolder | None]:
    """OUT.partial, new or continued; started over, with a message, when it holds another plan.

    Yields None when OUT is complete already and only the clean-up had been interrupted.

    Args:
        plan: plain JSON that names the input and every option that affects the result.

    Raises:
        CheckpointError: OUT exists, or another process is writing it.
    """
    check_out(out, workers)
    # Through JSON, so that the plan compares equal to the one read back: tuples become lists.
    partial, plan = PartialFolder(out, _root(out)), json.loads(json.dumps(plan))
    partial.root.mkdir(parents=True, exist_ok=True)
    with open(partial.root / "lock", "w", encoding="utf-8") as lock:
        # Released by the kernel however the process ends, unlike a file that has to be removed.
        lock_file(lock, CheckpointError("another process is writing it", str(partial.root), "wait for it or end it"))
        file = partial.root / "plan.json"
        fix = f"remove {partial.root}: the work then starts over"
        earlier = read_json_object(file, CheckpointError, fix) if file.is_file() else None
        if out.exists():
            if earlier not in (None, plan) or partial.files.exists():
                raise _exists(out)
            yield None
        else:
            partial.begin(plan, earlier)
            yield partial
    if out.exists():  # not before the lock is closed: on NFS an open file stays, and so its folder
        partial.clear()
