"""Saves checkpoints while training continues.

Only the copy of this process's shards to host memory blocks a step. A thread then writes the copy to a file of its own;
the processes synchronize over their own gloo group, so that a checkpoint appears only when every file is on the disk.
If a file cannot be written, all processes give up that checkpoint, log why, and training continues; the checkpoint at
the end of a run must succeed.
"""

import errno
import json
import os
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdlm_megatron.checkpoint.local_disk import copy_file, empty, keep_only, local_root
from sdlm_megatron.checkpoint.sharding import local_shards
from sdlm_megatron.config.schema import CheckpointConfig
from sdlm_megatron.errors import CheckpointError, UserError
from sdlm_megatron.files import HashedFile, rename_whole, write_json
from sdlm_megatron.ops.attempt import record_event
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.exchange import gather, gather_on_first
from sdlm_megatron.weights.checkpoint_folder import TrainState, checksums, prune, read_assets, step_folder, write_assets
from sdlm_megatron.weights.dtypes import HF_DTYPES, hf_name
from sdlm_megatron.weights.torch_dist import Entry, entries_of, write_index, write_tensor

RETRY_SECONDS = (10, 60)
"""Pauses before the attempts to repeat a failed save at the end of a run."""
MAX_FAILED_SAVES = 5
"""Consecutive failed saves after which training ends, because its progress could not be kept."""
_TIMEOUT = timedelta(hours=3)
"""For the slowest process to write its file."""
_LAZY = "TORCH_GLOO_LAZY_INIT"
"""Environment variable with which gloo connects two processes when they first exchange something."""
_ALIGN = 64
"""Bytes; torch.frombuffer needs each tensor aligned to its element size."""
_SMALL_FILES = 64 * 1024**2
"""Disk space reserved for the index, the tokenizer and other small files."""


@dataclass(frozen=True)
class _Part:
    """A region of a tensor in the host copy."""

    key: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """First byte in the host copy."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.size).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _WrittenFile:
    """A file of weights on the disk."""

    entries: list[Entry]
    checksum: dict[str, Any]


@dataclass
class _Save:
    """One checkpoint being saved."""

    folder: Path
    parts: list[_Part]
    state: TrainState
    facts: dict[str, Any] | None
    final: bool
    blocked: float
    """Seconds that training waited for it."""
    started: float = field(default_factory=time.perf_counter)
    size: int = 0
    """Bytes over all processes."""
    failure: str = ""
    """Reason for abandoning it, the same on all processes; "" for a checkpoint that exists."""


def pinned(nbytes: int) -> torch.Tensor:
    """Page-locked host memory of `nbytes` (uint8), until the tensor itself is freed."""
    # pin_memory=True would round up to a power of two: 34.4 GB for 28.7 GB
    memory, cudart = torch.empty(nbytes, dtype=torch.uint8), torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), nbytes, 0))
    # the allocator may hand out the same address again, and memory cannot be registered twice
    weakref.finalize(memory, cudart.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


def _lazy_group() -> dist.ProcessGroup:
    """A gloo group of all processes, which connects only those that exchange something.

    A save exchanges in a ring and with the first process. By default gloo connects each process with each other one:
    26,796 connections for 232 processes.
    """
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    finally:
        os.environ.pop(_LAZY)
        os.environ.update({_LAZY: before} if before is not None else {})
    # a network interface that gloo cannot use must end the start of a run, not its first save
    gather_on_first(None, group)
    return group


class CheckpointWriter:
    """Owns the host copy and the thread that writes it; all processes call its methods for the same steps.

    Args:
        engine: source of the weights and the optimizer state.
        run_dir: checkpoints go to RUN/ckpt.
        config: retention, and whether to write in the background.
        assets: folder of the base's config and tokenizer files, which travel with each checkpoint.
    """

    def __init__(self, engine: Engine, run_dir: Path, config: CheckpointConfig, assets: Path | None = None) -> None:
        self.engine, self.run_dir, self.config = engine, run_dir, config
        # Read now: after a resume the folder is that of a checkpoint, which is removed when newer ones exist.
        self._assets = read_assets(assets) if self._main else {}
        self._local = local_root(config, run_dir)
        # A group of its own: NCCL allows no collectives of a second thread beside those of training.
        self._group = _lazy_group()
        self._host = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._save: _Save | None = None
        self._error: BaseException | None = None
        self._failed_saves = 0
        """Consecutive."""

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A save in progress holds weights of a checked step, also where a later step turned out not to be finite.
        if kind is None or isinstance(error, UserError):
            self.wait()

    def save(self, state: TrainState, facts: dict[str, Any] | None = None, *, final: bool = False) -> None:
        """Saves the engine's current state. Returns once it is copied; if `final` or synchronous, once it is written.

        Args:
            state: becomes state.json; its step names the folder.
            facts: becomes run.json; the main process's are used.
            final: last save of the run: retried on failure, then raises CheckpointError on all processes.
        """
        began = time.perf_counter()
        if self.busy and self._main:
            print("waiting for the previous checkpoint, which is still being written", flush=True)
        self.wait()
        folder = step_folder(self.run_dir, state.step)
        save = _Save(folder, self._copy(), state, facts, final, 0.0, began)
        if self._local is not None:
            # One of this step, of an earlier run: with the .partial folder it would count as this one. Not again before
            # a repetition, whose failure would leave nothing of what the first attempt has written in full.
            shutil.rmtree(self._local / folder.name, ignore_errors=True)
        save.blocked = time.perf_counter() - began
        self._begin(save)
        if final or not self.config.async_save:
            self.wait()
        for pause in RETRY_SECONDS if final else ():
            if not save.failure:
                break
            if self._main:
                print(f"trying again in {pause} s", flush=True)
            time.sleep(pause)
            save.failure = ""
            self._begin(save)
            self.wait()
        if final and save.failure:
            raise _not_written(save, "the last checkpoint could not be written")

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises the error of the writing thread, if any; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits for the save in progress, and raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    @property
    def _main(self) -> bool:
        return self.engine.groups.main

    def _begin(self, save: _Save) -> None:
        # A daemon: a trainer that fails must not wait hours for a slow disk.
        self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True)
        self._thread.start()

    def _copy(self) -> list[_Part]:
        """Copies the elements this process saves to host memory, allocated once and pinned where there is a GPU."""
        parts, moves, offset = [], [], 0
        for shard in local_shards(self.engine, with_optimizer=True):
            low, high = shard.saved
            itemsize, dtype = shard.flat.itemsize, shard.flat.dtype
            offset = -(-offset // _ALIGN) * _ALIGN
            moves.append((shard.flat[low - shard.low : high - shard.low], offset))
            for placed, region in shard.regions(low, high):
                at = offset + (region.offset - low) * itemsize
                parts.append(_Part(shard.prefix + placed.key, placed.shape, region.start, region.size, dtype, at))
            offset += (high - low) * itemsize
        cuda = self.engine.groups.device.type == "cuda"
        # Kept from save to save: allocating pinned memory takes seconds per process.
        if self._host.numel() < offset:
            self._host = pinned(offset) if cuda else torch.empty(offset, dtype=torch.uint8)
        for source, at in moves:
            self._host[at : at + source.nbytes].view(source.dtype).copy_(source, non_blocking=True)
        if cuda:
            torch.cuda.current_stream().synchronize()
        return parts

    # --- the thread

    def _run(self, save: _Save) -> None:
        try:
            self._write(save)
        except Exception as error:  # noqa: BLE001  raised by the next `check`
            self._error = error

    def _write(self, save: _Save) -> None:
        """Runs in step on all processes' threads; a failure of one makes all give up this checkpoint."""
        partial = save.folder.with_name(save.folder.name + ".partial")
        place = partial if self._local is None else self._local / save.folder.name
        name, written = _file(self.engine.groups.rank), []
        # Every phase ends with a broadcast of its failure, so that no process enters a collective the others skip.
        save.size = sum(gather_on_first(sum(p.nbytes for p in save.parts), self._group))
        save.failure = self._on_main(lambda: self._prepare(save, partial), partial)
        if not save.failure:
            failure = self._attempt(lambda: written.append(self._write_parts(save.parts, place / name)))
            tensors = {p.key: (p.shape, hf_name(p.dtype)) for p in save.parts}
            everyone = gather_on_first((failure, [asdict(file) for file in written], tensors), self._group)
            save.failure = self._on_main(lambda: self._describe(save, place, everyone), partial)
            if self._local is not None and not save.failure:
                keep_only(self._local, place)  # also if the copy fails: the newest complete one is what a start takes
            elif self._local is not None and not save.final:  # a repetition may have spoiled less than all of its files
                shutil.rmtree(place, ignore_errors=True)
        if not save.failure and self._local is not None:
            failure = self._attempt(lambda: self._copy_home(place, partial, {name: written[0].checksum}))
            everyone = gather_on_first(failure, self._group)
            save.failure = self._on_main(lambda: _raise(everyone), partial)
        if not save.failure:
            save.failure = self._on_main(lambda: self._appear(save.folder, partial), partial)
        self._failed_saves = self._failed_saves + 1 if save.failure else 0
        if self._failed_saves >= MAX_FAILED_SAVES and not save.final:
            self._error = _not_written(save, f"{self._failed_saves} checkpoints in a row could not be written")
        if self._main:
            self._report(save)

    def _prepare(self, save: _Save, partial: Path) -> None:
        # The folder itself stays: as long as it exists, the next start copies what is complete on the local disks.
        partial.mkdir(parents=True, exist_ok=True)
        empty(partial)
        (partial / "weights").mkdir()
        # All processes' bytes at once: a disk that fills up half-way would waste the whole write.
        needed, free = save.size + _SMALL_FILES, shutil.disk_usage(partial).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free", str(partial))

    def _write_parts(self, parts: Sequence[_Part], path: Path) -> _WrittenFile:
        memory, entries = self._host.numpy(), []
        path.parent.mkdir(parents=True, exist_ok=True)
        file = HashedFile(path)
        for part in parts:
            numel = torch.Size(part.size).numel()
            # A tensor with its own storage: torch.save of a view would write the whole host copy.
            tensor = torch.frombuffer(memory, dtype=part.dtype, count=numel, offset=part.offset).view(part.size)
            entries.append(write_tensor(file, part.key, part.start, tensor))
            file.check()
        return _WrittenFile(entries, file.close())

    def _describe(self, save: _Save, place: Path, everyone: Sequence[Any]) -> None:
        """Writes all other files, complete.json last; on the main process, once all weights are written.

        Args:
            everyone: from each process its failure, its _WrittenFile as a dict in a list, and {key: [shape, dtype]}.
        """
        _raise([failure for failure, _, _ in everyone])
        files = {_file(rank): file for rank, (_, written, _) in enumerate(everyone) for file in written}
        tensors = {
            key: (tuple(shape), HF_DTYPES[dtype]) for _, _, local in everyone for key, (shape, dtype) in local.items()
        }
        entries = {Path(name).name: entries_of([e.values() for e in file["entries"]]) for name, file in files.items()}
        write_index(place / "weights", entries, tensors)
        write_assets(self._assets, place / "hf")
        write_json(place / "state.json", asdict(save.state))
        if save.facts:
            write_json(place / "run.json", save.facts)
        known = {name: file["checksum"] for name, file in files.items()}
        # With a local disk per node the main process does not see the other nodes' weight files.
        others = {n: entry for n, entry in checksums(place, known).items() if not n.endswith(".distcp")}
        write_json(place / "complete.json", known | others)

    def _copy_home(self, place: Path, partial: Path, files: dict[str, dict[str, Any]]) -> None:
        """Copies from the local disk to the run folder: this process's weights; on the main process also the rest."""
        if self._main:
            listed = json.loads((place / "complete.json").read_text(encoding="utf-8"))
            files = files | {name: entry for name, entry in listed.items() if not name.endswith(".distcp")}
        for name, expected in files.items():
            copy_file(place / name, partial / name, expected)
        if self._main:
            shutil.copyfile(place / "complete.json", partial / "complete.json")

    def _appear(self, folder: Path, partial: Path) -> None:
        replaced = folder.with_name(folder.name + ".replaced.partial")
        if folder.exists():  # a truncated checkpoint of the same step, which the run did not resume from
            os.rename(folder, replaced)
        rename_whole(partial, folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _report(self, save: _Save) -> None:
        total = time.perf_counter() - save.started
        blocked = total if save.final or not self.config.async_save else save.blocked
        if not save.failure:
            print(f"saved {save.folder}", flush=True)
            record_event(self.run_dir, "saved", step=save.state.step, blocked_s=blocked, total_s=total, bytes=save.size)
            keep_last, keep_every = self.config.keep_last, self.config.keep_every
            if failure := self._attempt(lambda: prune(save.folder.parent, keep_last, keep_every)):
                print(f"old checkpoints cannot be removed: {failure}", flush=True)
            return
        print(f"NO CHECKPOINT of step {save.state.step}: {save.failure}", flush=True)
        if not save.final:
            print("  training continues; the next save tries again", flush=True)
        record_event(self.run_dir, "save_failed", step=save.state.step, reason=save.failure)

    def _on_main(self, action: Callable[[], None], partial: Path) -> str:
        """Runs `action` on the main process; returns its failure ("" for none) on all.

        A failure removes `partial`, or with a local disk its content: the next start may copy what is complete there.
        """
        failure = self._attempt(action) if self._main else ""
        if failure and self._local is None:
            shutil.rmtree(partial, ignore_errors=True)
        elif failure:
            empty(partial)
        return gather(failure, torch.device("cpu"), self._group)[0]

    def _attempt(self, action: Callable[[], None]) -> str:
        """Runs `action`; returns why it failed, "" for success."""
        try:
            action()
        except _SaveError as error:
            return str(error)
        except OSError as error:
            return f"process {self.engine.groups.rank} on {socket.gethostname()}: {error}"
        return ""


def _not_written(save: _Save, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: {save.failure}",
        str(save.folder),
        "free some space on that disk (RUN/ckpt: checkpoint.keep_last is the number of checkpoints kept) and start "
        "again: training resumes from the newest checkpoint that is complete",
    )


def _file(rank: int) -> str:
    return f"weights/__{rank}_0.distcp"


class _SaveError(Exception):
    """Failures of one or several processes."""


def _raise(failures: Sequence[str]) -> None:
    if texts := [text for text in failures if text]:
        raise _SaveError("; ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else ""))
