"""Writes checkpoints while training goes on.

What blocks a step is the copy of this process's part to host memory. A thread then writes it to a file of its own; the
processes meet over a group of theirs (gloo), so that a checkpoint appears only when all parts are on the disk. A save
that the disk refuses is given up on all processes, loudly, and training goes on; the one that ends a run must succeed.
"""

import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdlm_megatron.checkpoint.local_disk import copy_file, keep_only, local_root
from sdlm_megatron.checkpoint.sharding import held
from sdlm_megatron.config.schema import CheckpointConfig
from sdlm_megatron.errors import CheckpointError, UserError
from sdlm_megatron.files import HashedFile, rename_whole, write_json
from sdlm_megatron.ops.attempt import record_event
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.weights.checkpoint_folder import TrainState, checksums, copy_assets, prune, step_folder
from sdlm_megatron.weights.torch_dist import Entry, write_index, write_tensor

RETRY_SECONDS = (10, 60)
"""Pauses before the save that ends a run is tried again."""
MOST_REFUSED = 5
"""Saves in a row that may fail before training ends: it would go on for nothing."""
_LONGEST = timedelta(hours=3)
"""A process that waits so long for the others' files takes the save for lost."""
_ALIGN = 64
_SMALL_FILES = 64 * 1024**2
"""Room for what is not weights: index, tokenizer."""


@dataclass(frozen=True)
class _Part:
    """A box in the host's copy."""

    key: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.size).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Written:
    """A file of weights."""

    entries: list[Entry]
    checksum: dict[str, Any]


@dataclass
class _Save:
    """One checkpoint on its way."""

    folder: Path
    parts: list[_Part]
    state: TrainState
    assets: Path | None
    facts: dict[str, Any] | None
    final: bool
    blocked: float
    """Seconds that training has waited for it, all told."""
    started: float = field(default_factory=time.perf_counter)
    size: int = 0
    """Bytes of all processes."""
    refused: str = ""
    """Why it was given up, the same on all processes; "" for a checkpoint that is there."""


class CheckpointWriter:
    """Owns the copy in host memory and the thread that writes it; all processes call its methods for the same steps.

    Args:
        engine: what is saved.
        run_dir: checkpoints go to RUN/ckpt.
        config: what to keep, and whether to write in the background.
    """

    def __init__(self, engine: Engine, run_dir: Path, config: CheckpointConfig) -> None:
        self.engine, self.run_dir, self.config = engine, run_dir, config
        self._local = local_root(config, run_dir)
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST)
        self._host = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._save: _Save | None = None
        self._error: BaseException | None = None
        self._refused = 0
        """Saves in a row that were given up."""

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """A save under way is of good weights, also where training found a later step not to be finite."""
        if kind is None or isinstance(error, UserError):
            self.wait()

    def save(
        self, state: TrainState, assets: Path | None, facts: dict[str, Any] | None = None, *, final: bool = False
    ) -> None:
        """Saves the engine as it is now. Returns when that is copied; with `final`, or synchronous, when it is there.

        Args:
            state: becomes state.json; its step names the folder.
            assets: folder of the base's config and tokenizer files.
            facts: becomes run.json; only the main process's counts.
            final: nothing follows: if the disk refuses, it is tried again, then CheckpointError is raised on all.
        """
        began = time.perf_counter()
        if self.busy and self._main:
            print("the last checkpoint is still being written: waiting for it", flush=True)
        self.wait()
        folder = step_folder(self.run_dir, state.step)
        save = _Save(folder, self._copy(), state, assets, facts, final, 0.0, began)
        save.blocked = time.perf_counter() - began
        self._begin(save)
        if final or not self.config.async_save:
            self.wait()
        for pause in RETRY_SECONDS if final else ():
            if not save.refused:
                break
            if self._main:
                print(f"trying again in {pause} s", flush=True)
            time.sleep(pause)
            save.refused = ""
            self._begin(save)
            self.wait()
        if final and save.refused:
            raise _not_written(save, "the last checkpoint could not be written")

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises what went wrong in the thread; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Returns when no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    @property
    def _main(self) -> bool:
        return self.engine.groups.main

    def _begin(self, save: _Save) -> None:
        self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True)
        self._thread.start()

    def _copy(self) -> list[_Part]:
        """Copies what this process saves to the host: memory that is taken once, pinned where there is a GPU."""
        parts, moves, offset = [], [], 0
        for one in held(self.engine, with_optimizer=True):
            low, high = one.saved
            offset = -(-offset // _ALIGN) * _ALIGN
            moves.append((one.flat[low - one.low : high - one.low], offset))
            for piece, box in one.boxes(low, high):
                at = offset + (box.at - low) * one.flat.itemsize
                parts.append(_Part(one.prefix + piece.key, piece.shape, box.start, box.size, one.flat.dtype, at))
            offset += (high - low) * one.flat.itemsize
        cuda = self.engine.groups.device.type == "cuda"
        if self._host.numel() < offset:
            self._host = torch.empty(offset, dtype=torch.uint8, pin_memory=cuda)
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
        """All processes' threads go through this together; what one cannot write, all give up."""
        partial = save.folder.with_name(save.folder.name + ".partial")
        place = partial if self._local is None else self._local / save.folder.name
        name, written = _file(self.engine.groups.rank), []
        save.size = sum(self._gather(sum(p.nbytes for p in save.parts)))
        save.refused = self._on_main(lambda: self._prepare(save, partial), partial)
        if not save.refused:
            refused = self._attempt(lambda: written.append(self._write_parts(save.parts, place / name)))
            everyone = self._gather((refused, written, {p.key: (p.shape, p.dtype) for p in save.parts}))
            save.refused = self._on_main(lambda: self._describe(save, place, everyone), partial)
        if not save.refused and self._local is not None:
            everyone = self._gather(self._attempt(lambda: self._copy_home(place, partial, {name: written[0].checksum})))
            save.refused = self._on_main(lambda: _raise(everyone), partial)
        if not save.refused:
            save.refused = self._on_main(lambda: self._appear(save.folder, partial), partial)
        if not save.refused and self._local is not None:
            keep_only(self._local, place)
        self._refused = self._refused + 1 if save.refused else 0
        if self._refused >= MOST_REFUSED and not save.final:
            self._error = _not_written(save, f"{self._refused} checkpoints in a row could not be written")
        if self._main:
            self._report(save)

    def _prepare(self, save: _Save, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "weights").mkdir(parents=True)
        needed, free = save.size + _SMALL_FILES, shutil.disk_usage(partial).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free", str(partial))

    def _write_parts(self, parts: Sequence[_Part], path: Path) -> _Written:
        memory, entries = self._host.numpy(), []
        path.parent.mkdir(parents=True, exist_ok=True)
        file = HashedFile(path)
        for part in parts:
            numel = torch.Size(part.size).numel()
            # a tensor with a storage of its own: torch.save would write all of the host's copy
            tensor = torch.frombuffer(memory, dtype=part.dtype, count=numel, offset=part.offset).view(part.size)
            entries.append(write_tensor(file, part.key, part.start, tensor))
            file.check()
        return _Written(entries, file.close())

    def _describe(self, save: _Save, place: Path, everyone: Sequence[tuple[str, list[_Written], dict]]) -> None:
        """Writes everything but the weights, complete.json last; the main process does it when all are written."""
        _raise([refused for refused, _, _ in everyone])
        files = {_file(rank): written for rank, (_, mine, _) in enumerate(everyone) for written in mine}
        tensors = {key: tensor for _, _, mine in everyone for key, tensor in mine.items()}
        write_index(place / "weights", {Path(name).name: w.entries for name, w in files.items()}, tensors)
        copy_assets(save.assets, place / "hf")
        write_json(place / "state.json", asdict(save.state))
        if save.facts:
            write_json(place / "run.json", save.facts)
        (place / "complete.json").unlink(missing_ok=True)  # of another attempt, on a local disk
        known = {name: written.checksum for name, written in files.items()}
        found = checksums(place, known)
        others = {name: entry for name, entry in found.items() if not name.endswith(".distcp")}
        write_json(place / "complete.json", known | others)

    def _copy_home(self, place: Path, partial: Path, mine: dict[str, dict[str, Any]]) -> None:
        """From the local disk to the run folder: this process's weights, and of the main process the rest."""
        if self._main:
            listed = json.loads((place / "complete.json").read_text())
            mine = mine | {name: entry for name, entry in listed.items() if not name.endswith(".distcp")}
        for name, wanted in mine.items():
            copy_file(place / name, partial / name, wanted)
        if self._main:
            shutil.copyfile(place / "complete.json", partial / "complete.json")

    def _appear(self, folder: Path, partial: Path) -> None:
        replaced = folder.with_name(folder.name + ".replaced.partial")
        if folder.exists():  # of this step, but not what the run resumed from: cut short
            os.rename(folder, replaced)
        rename_whole(partial, folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _report(self, save: _Save) -> None:
        total = time.perf_counter() - save.started
        blocked = total if save.final or not self.config.async_save else save.blocked
        if not save.refused:
            print(f"saved {save.folder}", flush=True)
            record_event(self.run_dir, "saved", step=save.state.step, blocked_s=blocked, total_s=total, bytes=save.size)
            if said := self._attempt(lambda: prune(save.folder.parent, self.config.keep_last, self.config.keep_every)):
                print(f"old checkpoints cannot be removed: {said}", flush=True)
            return
        print(f"NO CHECKPOINT of step {save.state.step}: {save.refused}", flush=True)
        if not save.final:
            print("  training goes on; the next save tries again", flush=True)
        record_event(self.run_dir, "save_failed", step=save.state.step, reason=save.refused)

    def _on_main(self, action: Callable[[], None], partial: Path) -> str:
        """Runs `action` on the main process; why it failed, "" if it did not, on all. Then `partial` is removed."""
        said = [self._attempt(action) if self._main else ""]
        if said[0]:
            shutil.rmtree(partial, ignore_errors=True)
        dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def _gather(self, mine: Any) -> list[Any]:
        """An object of each process, on the main one."""
        everyone: list[Any] | None = [None] * self.engine.groups.world_size if self._main else None
        dist.gather_object(mine, everyone, dst=0, group=self._group)
        return everyone or []

    def _attempt(self, action: Callable[[], None]) -> str:
        try:
            action()
        except _RefusedError as error:
            return str(error)
        except OSError as error:
            return f"process {self.engine.groups.rank} on {socket.gethostname()}: {error}"
        return ""


def _not_written(save: _Save, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: {save.refused}",
        str(save.folder),
        "make room (checkpoint.keep_last says how many are kept) and start again: training goes on from the "
        "checkpoint before",
    )


def _file(rank: int) -> str:
    return f"weights/__{rank}_0.distcp"


class _RefusedError(Exception):
    """What some processes could not do, in their words."""


def _raise(refused: Sequence[str]) -> None:
    if texts := [text for text in refused if text]:
        raise _RefusedError("; ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else ""))
