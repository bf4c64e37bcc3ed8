"""`python checkpoint_faults.py DATA BASE OUT WHAT…`: checkpoints under kill -9, and on disks that refuse."""

import errno
import os
import random
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from checkpoint_chain import Layout, Run, forked

from sdlm_megatron.checkpoint import async_writer as checkpoint_writer
from sdlm_megatron.checkpoint.async_writer import MAX_FAILED_SAVES, CheckpointWriter
from sdlm_megatron.checkpoint.local_disk import carry_over
from sdlm_megatron.config.schema import CheckpointConfig
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import sha256
from sdlm_megatron.ops.attempt import read_events
from sdlm_megatron.weights.checkpoint_folder import check_files, newest, step_of
from sdlm_megatron.weights.torch_dist import TorchDist

DP2 = Layout(2, {})
KILLS = 20
LIMIT = 40_000
"""Bytes a file may have where a test wants the disk to refuse; each process writes more."""


def save_for_ever(run: Run, out: Path) -> None:
    """Checkpoint after checkpoint, each number in it the step."""
    engine, state = run.engine(DP2)
    writer = CheckpointWriter(engine, out, CheckpointConfig(keep_last=2))
    found = newest(out / "ckpt", lambda text: None)
    step = step_of(found) if found else 0
    while True:
        step += 1
        for parameter in engine.module.parameters():
            parameter.data.fill_(step)
        engine.weights_changed()
        writer.save(replace(state, step=step), None)


def kill(run: Run, out: Path) -> None:
    moments, last = random.Random(), 0
    for _ in range(KILLS):
        children = forked(2, save_for_ever, run, out, wait=False)
        wanted, limit = out / "ckpt" / f"step-{last + 3:07d}.partial", time.monotonic() + 60
        while not wanted.exists() and time.monotonic() < limit:
            time.sleep(0.003)
        time.sleep(moments.uniform(0, 0.08))
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        for child in children:
            child.join()
        said = [e["step"] for e in read_events(out) if e["kind"] == "saved"]
        found = newest(out / "ckpt", lambda text: None)
        assert found is not None
        check_files(found)
        last = step_of(found)
        assert last >= said[-1] > 1, "what was called saved is there"
        files = TorchDist(found / "weights")
        for key in files.names():
            tensor, adam = files.read(key, (0,) * len(files.shape(key)), files.shape(key)), ".exp_avg" in key
            assert (tensor == (0 if adam else torch.tensor(last, dtype=tensor.dtype))).all(), key
    print(f"killed {KILLS} times, {last} checkpoints")


def refused(run: Run, out: Path) -> None:
    """One process cannot write: all give up and go on; when it can, there is a checkpoint."""
    engine, state = run.engine(DP2)
    steps = {"first": 1, "again": 2, "last": 3}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        if engine.groups.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    with CheckpointWriter(engine, out, CheckpointConfig()) as writer:
        limit(LIMIT)
        writer.save(replace(state, step=steps["first"]), None)
        writer.wait()
        assert not list((out / "ckpt").iterdir()), "nothing is left of it"
        limit(soft)
        writer.save(replace(state, step=steps["again"]), None)
        writer.wait()
        limit(LIMIT)
        try:
            writer.save(replace(state, step=steps["last"]), None, final=True)
        except CheckpointError as error:
            assert f"[Errno {errno.EFBIG}]" in error.what, error.what
        else:
            raise AssertionError("the last save went wrong and nobody was told")
        finally:
            limit(soft)
    found = newest(out / "ckpt", print)
    assert found is not None and step_of(found) == steps["again"]
    if engine.groups.main:
        events = [(e["kind"], e["step"]) for e in read_events(out)]
        assert events == [("save_failed", 1), ("saved", 2), *[("save_failed", 3)] * 3], events


def no_room(run: Run, out: Path) -> None:
    """OUT/ckpt is too small, or takes no more files: training goes on, but not for ever."""
    engine, state = run.engine(DP2)
    with CheckpointWriter(engine, out, CheckpointConfig()) as writer:
        for step in range(1, MAX_FAILED_SAVES + 1):
            writer.save(replace(state, step=step), None)  # waits for the one before, which raises nothing
        try:
            writer.wait()
        except CheckpointError as error:
            assert f"{MAX_FAILED_SAVES} checkpoints in a row" in error.what, error.what
        else:
            raise AssertionError("no save went well and nobody was told")
    assert newest(out / "ckpt", print) is None


def local(run: Run, out: Path) -> None:
    """Each process has a disk of its own; the run folder loses what only they have."""
    engine, state = run.engine(DP2)
    groups, config = engine.groups, CheckpointConfig(local_dir=str(out / "node-$LOCAL_RANK"))
    with CheckpointWriter(engine, out, config) as writer:
        for step in (1, 2):
            writer.save(replace(state, step=step), None)
    groups.gather(None)
    steps = [sorted(int(p.name[5:]) for p in folder.glob("step-*")) for folder in (out / "ckpt", *_disks(out))]
    assert steps == [[1, 2], [2], [2]], steps
    groups.gather(None)
    assert not carry_over(config, out, groups, print), "the run folder has it"
    home = out / "ckpt" / "step-0000002"
    before = {p.name: sha256(p) for p in home.rglob("*") if p.is_file()}
    groups.gather(None)
    for change in (None, "flip", "lose"):
        if groups.main:
            home.rename(home.with_name(f"was-{change}"))
            (home.with_name("step-0000002.partial") / "weights").mkdir(parents=True)  # killed while it was copied
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


def _disks(out: Path) -> list[Path]:
    return sorted(p for disk in out.glob("node-*") for p in disk.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    checkpoint_writer.RETRY_SECONDS = (0, 0)
    data, base, out = map(Path, sys.argv[1:4])
    run = Run(data, base, "bf16")
    for what in sys.argv[4:]:
        (out / what).mkdir(parents=True, exist_ok=True)
        if what == "kill":
            kill(run, out / what)
        else:
            action = {"refused": refused, "local": local}.get(what, no_room)
            forked(2, action, run, out / what)
