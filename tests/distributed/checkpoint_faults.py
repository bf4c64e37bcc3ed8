"""`python checkpoint_faults.py DATA BASE OUT CASE…`: checkpoints under kill -9, full disks and failing local disks."""

import errno
import os
import random
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoint_chain import Layout, Run, forked

from sdlm_megatron.checkpoint import async_writer as checkpoint_writer
from sdlm_megatron.checkpoint.async_writer import MAX_FAILED_SAVES, CheckpointWriter
from sdlm_megatron.checkpoint.local_disk import carry_over, local_root
from sdlm_megatron.checkpoint.sharding import local_shards
from sdlm_megatron.config.schema import CheckpointConfig, LoraConfig
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import sha256
from sdlm_megatron.ops.attempt import read_events
from sdlm_megatron.weights.checkpoint_folder import TrainState, check_files, newest, step_of
from sdlm_megatron.weights.torch_dist import TorchDist

DP2 = Layout(2, {})
KILLS = 8
LIMIT = 40_000
"""File size limit in bytes that makes a write fail; each process writes more."""


def save_forever(run: Run, out: Path) -> None:
    """Saves one checkpoint after another; every value in a checkpoint is the number of its step."""
    engine, state = run.engine(DP2)
    writer = CheckpointWriter(engine, out, CheckpointConfig(keep_last=2))
    latest = newest(out / "ckpt", lambda text: None)
    step = step_of(latest) if latest else 0
    while True:
        step += 1
        for parameter in engine.module.parameters():
            parameter.data.fill_(step)
        engine.weights_changed()
        writer.save(replace(state, step=step))


def kill(run: Run, out: Path) -> None:
    moments, last = random.Random(), 0
    for _ in range(KILLS):
        children = forked(2, save_forever, run, out, wait=False)
        expected, limit = out / "ckpt" / f"step-{last + 3:07d}.partial", time.monotonic() + 60
        while not expected.exists() and time.monotonic() < limit:
            time.sleep(0.003)
        time.sleep(moments.uniform(0, 0.08))
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        for child in children:
            child.join()
        saved_steps = [e["step"] for e in read_events(out) if e["kind"] == "saved"]
        latest = newest(out / "ckpt", lambda text: None)
        assert latest is not None
        check_files(latest)
        last = step_of(latest)
        assert last >= saved_steps[-1] > 1, "a checkpoint reported as saved is missing"
        files = TorchDist(latest / "weights")
        for key in files.names():
            tensor, adam = files.read(key, (0,) * len(files.shape(key)), files.shape(key)), ".exp_avg" in key
            assert (tensor == (0 if adam else torch.tensor(last, dtype=tensor.dtype))).all(), key
    print(f"killed {KILLS} times, {last} checkpoints")


def refused(run: Run, out: Path) -> None:
    """One process cannot write: all processes give up this save and continue; the next save succeeds."""
    engine, state = run.engine(DP2)
    steps = {"first": 1, "again": 2, "last": 3}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        if engine.groups.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    with CheckpointWriter(engine, out, CheckpointConfig()) as writer:
        limit(LIMIT)
        writer.save(replace(state, step=steps["first"]))
        writer.wait()
        assert not list((out / "ckpt").iterdir()), "the failed save left files behind"
        limit(soft)
        writer.save(replace(state, step=steps["again"]))
        writer.wait()
        limit(LIMIT)
        try:
            writer.save(replace(state, step=steps["last"]), final=True)
        except CheckpointError as error:
            assert f"[Errno {errno.EFBIG}]" in error.what, error.what
        else:
            raise AssertionError("the final save failed without an error")
        finally:
            limit(soft)
    latest = newest(out / "ckpt", print)
    assert latest is not None and step_of(latest) == steps["again"]
    if engine.groups.main:
        events = [(e["kind"], e["step"]) for e in read_events(out)]
        assert events == [("save_failed", 1), ("saved", 2), *[("save_failed", 3)] * 3], events


def few_adapters(run: Run, out: Path) -> None:
    """The last of three optimizer shards is padding only: its rank owns no element of an adapter."""
    engine, state = replace(run, lora=LoraConfig(rank=1, targets=["down_proj"])).engine(Layout(3, {}))
    CheckpointWriter(engine, out, CheckpointConfig()).save(replace(state, step=1), final=True)
    owned = [sum(not shard.replicated for shard in local_shards(engine, with_optimizer=True))]
    assert engine.groups.gather(owned)[2] == [0], "the case needs a rank without any"
    TorchDist(out / "ckpt" / "step-0000001" / "weights")


def no_room(run: Run, out: Path) -> None:
    """OUT/ckpt is too small or out of inodes: training continues until MAX_FAILED_SAVES saves in a row have failed."""
    engine, state = run.engine(DP2)
    with CheckpointWriter(engine, out, CheckpointConfig()) as writer:
        for step in range(1, MAX_FAILED_SAVES + 1):
            writer.save(replace(state, step=step))  # waits for the previous save, whose failure raises nothing
        try:
            writer.wait()
        except CheckpointError as error:
            assert f"{MAX_FAILED_SAVES} checkpoints in a row" in error.what, error.what
        else:
            raise AssertionError("all saves failed without an error")
    assert newest(out / "ckpt", print) is None


def local(run: Run, out: Path) -> None:
    """Each process has its own local disk; a checkpoint lost from the run folder is copied back from intact ones."""
    engine, state = run.engine(DP2)
    groups, config = engine.groups, CheckpointConfig(local_dir=str(out / "node-$LOCAL_RANK"))
    root = local_root(config, out)
    assert root is not None
    (root / "step-0000001").mkdir(parents=True)
    (root / "step-0000001" / "stale").write_text("of an earlier run in this folder")
    with CheckpointWriter(engine, out, config) as writer:
        for step in (1, 2):
            writer.save(replace(state, step=step))
    groups.gather(None)
    steps = [sorted(int(p.name[5:]) for p in folder.glob("step-*")) for folder in (out / "ckpt", *_disks(out))]
    assert steps == [[1, 2], [2], [2]], steps
    assert not (out / "ckpt" / "step-0000001" / "stale").exists()
    groups.gather(None)
    assert not carry_over(config, out, groups, print), "copied although the run folder has it"
    home = out / "ckpt" / "step-0000002"
    before = {p.name: sha256(p) for p in home.rglob("*") if p.is_file()}
    groups.gather(None)
    for change in ("undo", None, "flip", "lose"):
        if groups.main:
            home.rename(home.with_name(f"was-{change}"))
            if change != "undo":  # as if killed during the copy
                (home.with_name("step-0000002.partial") / "weights").mkdir(parents=True)
            damaged = next(_disks(out)[1].rglob("*.distcp"))
            if change == "flip":
                damaged.write_bytes(b"\1" + damaged.read_bytes()[1:])
            elif change == "lose":
                damaged.unlink()
        groups.gather(None)
        assert carry_over(config, out, groups, print) == (change is None)
        assert home.exists() == (change is None)
        groups.gather(None)
        if change is None:
            assert {p.name: sha256(p) for p in home.rglob("*") if p.is_file()} == before
            check_files(home)
        elif groups.main:
            home.mkdir()
        groups.gather(None)
    _lost_home(out, config, CheckpointWriter(engine, out, config), state)


def _lost_home(out: Path, config: CheckpointConfig, writer: CheckpointWriter, state: TrainState) -> None:
    """The run folder fails after the local disks have a checkpoint, and at each repetition of the last save.

    A save that fails on a local disk comes between. These disks keep the newest complete checkpoint only.
    """
    groups, mkdir, copy = writer.engine.groups, Path.mkdir, checkpoint_writer.copy_file
    partial, made, left = out / "ckpt" / "step-0000007.partial", [], []

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the run folder is lost")

    def mkdir_once(path: Path, *arguments: Any, **options: Any) -> None:
        if path == partial and made:
            left.extend(partial.iterdir())  # of the copy that failed
        if path.parent == partial:
            fail() if made else made.append(path)
        mkdir(path, *arguments, **options)

    def saved(step: int) -> list[str]:
        writer.save(replace(state, step=step), final=step == 7)
        writer.wait()
        groups.gather(None)
        return sorted(p.name for disk in out.glob("node-*") for p in disk.glob("*/step-*"))

    checkpoint_writer.copy_file = fail  # type: ignore[assignment]
    assert [saved(step) for step in (4, 5)] == [["step-0000004"] * 2, ["step-0000005"] * 2]
    fsync, os.fsync = os.fsync, fail if groups.main else os.fsync
    assert saved(6) == ["step-0000005"] * 2
    os.fsync, Path.mkdir = fsync, mkdir_once  # type: ignore[method-assign]
    try:
        saved(7)
    except CheckpointError as error:
        assert "the run folder is lost" in error.what, error.what
    else:
        raise AssertionError("the final save failed without an error")
    Path.mkdir, checkpoint_writer.copy_file = mkdir, copy  # type: ignore[method-assign]
    assert not [*left, *partial.iterdir()] and list(out.glob("node-*/*/step-0000007/complete.json"))
    groups.gather(None)
    assert carry_over(config, out, groups, print)
    check_files(out / "ckpt" / "step-0000007")


def _disks(out: Path) -> list[Path]:
    return sorted(p for disk in out.glob("node-*") for p in disk.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    checkpoint_writer.RETRY_SECONDS = (0, 0)
    data, base, out = map(Path, sys.argv[1:4])
    run = Run(data, base, "bf16")
    for case in sys.argv[4:]:
        (out / case).mkdir(parents=True, exist_ok=True)
        if case == "kill":
            kill(run, out / case)
        else:
            action = {"refused": refused, "local": local, "adapters": few_adapters}.get(case, no_room)
            forked(3 if case == "adapters" else 2, action, run, out / case)
