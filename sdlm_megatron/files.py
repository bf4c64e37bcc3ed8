"""Files: atomic writes (write beside, fsync, rename), checksums, and checked reads of files that others wrote."""

import errno
import fcntl
import hashlib
import json
import math
import os
import resource
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from sdlm_megatron.errors import UserError

MOST_JSON_BYTES = 256 << 20
"""Largest JSON file that is read whole; a tokenizer of 256,000 entries takes 33 MB."""
_LFS = b"version https://git-lfs.github.com/spec/"
T = TypeVar("T")


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Replaces the content of `path` atomically; a reader sees the old file or the new one.

    Args:
        shared: several processes may write it at once, each by a temporary name of its own. Of a killed one that name
            stays, while PATH.partial is written again.
    """
    partial = own_partial(path) if shared else path.with_name(path.name + ".partial")
    # a file name may hold bytes that are no text: \udcXX, which JSON reads back as it was
    with open(partial, "w", encoding="utf-8", errors="backslashreplace", opener=_open_no_link) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)  # after the fsync: a crash must not leave the name on an empty file


def own_partial(path: Path) -> Path:
    """Temporary name of a file that several machines, processes and threads may write at once."""
    return path.with_name(f"{path.name}.{os.uname().nodename}-{threading.get_native_id()}.partial")


def _open_no_link(path: str, flags: int) -> int:
    """`os.open` that fails on a link: in a stranger's folder this name could lead to any file of the user."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def make_folder(path: Path, *, dry: bool = False) -> None:
    """Creates an output folder and its parents; `dry`: only tries to write to what exists. UserError if it cannot."""
    try:
        if not dry:
            path.mkdir(parents=True, exist_ok=True)
        # the permissions alone do not tell, such as those of /proc
        os.rmdir(tempfile.mkdtemp(dir=next(p for p in (path, *path.parents) if os.path.lexists(p))))
    except OSError as problem:
        what = f"the output folder cannot be created or written to: {problem.strerror}"
        raise UserError(what, str(path), "name another folder") from None


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """`write_text` of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", shared=shared)


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


def lock_file(file: IO[str], busy: UserError) -> None:
    """Locks an open file until it is closed or the process ends; raises `busy` where another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError as error:
        fix = "mount it with locks (Lustre: -o flock), or write to another file system"
        raise type(busy)(f"the file system has no locks: {error.strerror}", file.name, fix) from None


def most_open(most: int, share: int) -> int:
    """Files that one cache may keep open: `most`, or a `share`-th of the process's limit where that is lower."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, limit // share))


def need_open_files(least: int = 256) -> None:
    """UserError where this process may not open `least` files: torch's own errors do not name the limit."""
    if 0 <= (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < least:  # -1: no limit
        what = f"a process may open {limit} files, and {least} are needed"
        raise UserError(what, "ulimit -n, the limit of open files", "ulimit -n 4096, in the shell before the start")


_LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}


def raise_passing(problem: Exception, path: Path | str) -> None:
    """Raises an OSError that may pass: it says nothing about the file, and the driver of a job tries again."""
    if isinstance(problem, OSError) and problem.errno not in _LASTING:
        problem.filename = problem.filename or str(path)
        raise problem


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Adds the name of a file to the errors of its disk, which reading and writing leave without."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with named(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, error: type[UserError], fix: str = "", most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Content of a JSON file that may come from a stranger.

    Args:
        error: class of the error, such as CheckpointError.
        fix: last line of the message; "": a sentence about replacing the file.
        most_bytes: larger files are refused before they are read.

    Raises:
        error: the file is absent, too large, not UTF-8, not JSON, nested too deeply, or holds NaN or infinity.
    """
    fix = fix or f"replace {path.name} by an intact copy"

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise error(f"{path.name} has {size:,} bytes, more than the {most_bytes:,} that are read", str(path), fix)
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant, parse_float=_finite)
    except FileNotFoundError:
        raise error(f"{path.name} is missing", str(path), fix) from None
    except RecursionError:
        raise error(f"{path.name} is nested too deeply", str(path), fix) from None
    except OSError as problem:
        raise_passing(problem, path)
        raise error(f"{path.name} cannot be read: {problem.strerror}", str(path), fix) from None
    except ValueError as problem:  # JSONDecodeError, UnicodeDecodeError, a number of too many digits
        raise error(f"{path.name} is not valid JSON: {problem}", str(path), fix) from None


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def read_json_object(
    path: Path, error: type[UserError], fix: str = "", most_bytes: int = MOST_JSON_BYTES
) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    content = read_json(path, error, fix, most_bytes)
    if not isinstance(content, dict):
        raise error(f"{path.name} holds {_kind(content)}, not an object", str(path), fix)
    return content


def checked(
    content: dict[str, Any], key: str, kind: type[T], path: Path, error: type[UserError], least: float | None = None
) -> T:
    """A field of a JSON object, if it has the type `kind` and is at least `least`.

    A bool is no int, an int is a float.

    Raises:
        error: the field is absent or has another type or a smaller value; the message names file and field.
    """
    where, fix = f"{path}, field {key}", f"replace {path.name} by an intact copy"
    if key not in content:
        raise error(f"the field {key} is missing", where, fix)
    value = content[key]
    number = kind is float and type(value) is int
    if not (number or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))):
        raise error(f"{key} is {_kind(value)}, not {_NAMES.get(kind, kind.__name__)}", where, fix)
    if kind is float and abs(value) > 1e300:  # an int that no float holds
        raise error(f"{key} is too large a number", where, fix)
    if least is not None and value < least:
        raise error(f"{key} is {value}, below {least:g}", where, fix)
    return value


_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number"} | {
    float: "a number",
    type(None): "null",
}


def _kind(value: Any) -> str:
    """The type of a JSON value in words, with the value where it is short."""
    name = _NAMES.get(type(value), type(value).__name__)
    return name if isinstance(value, (dict, list)) or value is None else f"{name} ({str(value)[:40]!r})"


def regular_file(folder: Path, name: str, error: type[UserError]) -> Path:
    """Path of a file of a folder that may come from a stranger. Links that lead out of the folder are not followed.

    A link to a file inside the folder is fine, and so is a link of a Hugging Face cache from snapshots/REVISION to the
    blobs beside it.

    Args:
        name: relative path of the file.

    Raises:
        error: the file is absent or unreadable, leads out of the folder, is a device, pipe, socket or folder, or
            is the pointer that git-lfs leaves in its place.
    """
    path, root = folder / name, Path(os.path.realpath(folder))
    try:
        target = Path(os.path.realpath(path))
        allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
        if Path(name).is_absolute() or not any(target.is_relative_to(place) for place in allowed):
            fix = "if you trust it, replace the link by a copy (cp -L), or correct the name"
            raise error(f"{name:.200} leads out of its folder, to {target}", str(folder), fix)
        if not stat.S_ISREG(target.stat().st_mode):  # before it is opened: opening a pipe waits for its writer
            raise error(f"{name} is not a regular file", str(path), "put a file in its place, or use another folder")
        with open(target, "rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{name} is missing", str(path), "copy the folder again, with all its files") from None
    except (OSError, ValueError) as problem:  # ValueError: a name with a null byte
        raise_passing(problem, path)
        fix = "give yourself permission to read it, or copy the folder again"
        raise error(f"{name:.100} cannot be read: {problem.args[-1]}", str(folder), fix) from None
    if pointer:
        fix = "run `git lfs pull` in the repository it comes from, or download the file itself"
        raise error(f"{name} is a git-lfs pointer, not the file itself", str(path), fix)
    return path


def optional_file(folder: Path, name: str, error: type[UserError]) -> Path | None:
    """`regular_file`, or None where the folder has no entry of this name."""
    return regular_file(folder, name, error) if os.path.lexists(folder / name) else None


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
            error.filename = self._file.name
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
        with named(self._file.name):
            os.fsync(self._file.fileno())
            self._file.close()
        return {"size": self._size, "sha256": self._hash.hexdigest()}
