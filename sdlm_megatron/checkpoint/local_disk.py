"""Checkpoints on the nodes' own disks: written there first, then copied to the run folder.

    LOCAL_DIR/RUN-1a2b3c4d/step-0000500/     the files this node's processes wrote, of the newest checkpoint only

A job that ends between the two steps leaves a checkpoint that is complete only as the union of the nodes' disks; the
next start on the same nodes copies it to the run folder. RUN/ckpt/step-….partial says so: it is made before the first
file of the local checkpoint, and one rename makes it the checkpoint. Without it the local checkpoint was complete in
the run folder and has been removed since, or is of an earlier run in a folder of this path: it is not copied.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlm_megatron.config.load import expand_variables
from sdlm_megatron.config.schema import CheckpointConfig
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import HashedFile, named, read_json_object, rename_whole
from sdlm_megatron.ops.attempt import record_event
from sdlm_megatron.parallel.groups import Groups
from sdlm_megatron.weights.checkpoint_folder import PARTIAL, newest_step, step_folders

_BLOCK = 8 * 1024**2
_MARKER = "complete.json"


def local_root(config: CheckpointConfig, run_dir: Path) -> Path | None:
    """This run's folder on this node's disk; None if checkpoint.local_dir is empty."""
    if not config.local_dir:
        return None
    # The hash keeps runs of the same name in different folders apart.
    name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    return Path(expand_variables(config.local_dir)) / f"{run_dir.resolve().name}-{name}"


def copy_file(source: Path, target: Path, expected: Mapping[str, Any]) -> None:
    """Copies a file to the disk; OSError also where size or sha256 of the copy are not those of `expected`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    out = HashedFile(target)
    with named(source), open(source, "rb") as file:
        while block := file.read(_BLOCK):
            out.write(block)
            out.check()
    if out.close() != expected:
        raise OSError(errno.EIO, "the local disk returned other bytes than were written", str(source))


def empty(partial: Path) -> None:
    """Removes the content of a .partial folder, but not the folder: its local checkpoint is still to be copied."""
    with suppress(OSError):
        for path in partial.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def keep_only(root: Path, folder: Path) -> None:
    """Removes all checkpoints of this node but `folder`."""
    for _, old, _ in step_folders(root):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)  # races with the node's other processes


def carry_over(config: CheckpointConfig, run_dir: Path, groups: Groups, log: Callable[[str], None]) -> bool:
    """Copies the newest checkpoint that is complete on the nodes to the run folder, if it is newer than those there.

    Only one whose save was interrupted is copied, see the module. All processes call it. Returns whether one was.
    """
    root = local_root(config, run_dir)
    if root is None:
        return False
    ckpt = run_dir / "ckpt"
    interrupted = [step for step, _, suffix in step_folders(ckpt) if suffix == PARTIAL]
    everyone = groups.gather((max(0, newest_step(run_dir)), interrupted, _listing(root)))
    done, interrupted, _ = everyone[0]
    newer = {step for _, _, listing in everyone for step in map(int, listing) if step > done}
    for step in sorted(newer, reverse=True):
        if step not in interrupted:
            log(
                f"local checkpoint of step {step}: ignored, {ckpt} has no step-{step:07d}{PARTIAL}: it was saved there "
                "and removed since, or is of an earlier run in this folder"
            )
            continue
        holders = [listing.get(str(step), ({}, None)) for _, _, listing in everyone]
        marker = next((text for _, text in holders if text), None)
        files = json.loads(marker) if marker else {}
        rank_of = {name: _holder(holders, name, entry["size"]) for name, entry in files.items()}
        if not files or None in rank_of.values():
            log(f"local checkpoint of step {step}: incomplete on these nodes, ignored")
            continue
        local = {name: files[name] for name, rank in rank_of.items() if rank == groups.rank}
        if _copy(root, ckpt, step, local, marker or "", groups, log):
            if groups.main:
                record_event(run_dir, "carried_over", step=step)
            return True
    return False


def _listing(root: Path) -> dict[str, tuple[dict[str, int], str | None]]:
    """By step, as text: sizes of this node's files by name, and the text of complete.json if it is on this node."""
    listing = {}
    for step, folder, suffix in step_folders(root):
        if suffix:
            continue
        files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        text = None
        with suppress(CheckpointError, OSError):  # such a file makes the checkpoint incomplete, and stops no start
            read_json_object(folder / _MARKER, CheckpointError)
            text = (folder / _MARKER).read_text(encoding="utf-8")
        listing[str(step)] = (files, text)
    return listing


def _holder(holders: list[tuple[dict[str, int], str | None]], name: str, size: int) -> int | None:
    """First rank whose node has the file in full."""
    return next((rank for rank, (files, _) in enumerate(holders) if files.get(name) == size), None)


def _copy(
    root: Path,
    ckpt: Path,
    step: int,
    files: Mapping[str, Mapping[str, Any]],
    marker: str,
    groups: Groups,
    log: Callable[[str], None],
) -> bool:
    """Copies this process's `files` of a checkpoint; the main process completes the folder and renames it."""
    folder = ckpt / f"step-{step:07d}"
    partial, problem = folder.with_name(folder.name + PARTIAL), ""
    if groups.main:
        empty(partial)
    groups.gather(None)  # a barrier: no process copies into the folder before it is cleared
    try:
        for name, expected in files.items():
            copy_file(root / folder.name / name, partial / name, expected)
    except OSError as error:
        problem = str(error)
    problem = next((text for text in groups.gather(problem) if text), "")
    if groups.main and not problem:
        try:
            (partial / _MARKER).write_text(marker, encoding="utf-8")
            rename_whole(partial, folder)
        except OSError as error:
            problem = str(error)
    if groups.main and problem:
        empty(partial)
    problem = groups.gather(problem)[0]
    what = f"could not be copied: {problem}" if problem else f"copied to {folder}"
    log(f"local checkpoint of step {step}: {what}")
    return not problem
