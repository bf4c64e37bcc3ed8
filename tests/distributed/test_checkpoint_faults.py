"""Checkpoints under kill -9, full disks and corrupted bytes: each is complete, or ignored with a reason."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import REPO, make_dataset, make_hf, read_metrics, run_python, train

from sdlm_megatron.ops.attempt import read_events

pytestmark = pytest.mark.distributed

SCRIPT = REPO / "tests" / "distributed" / "checkpoint_faults.py"


def faults(folder: Path, *cases: str) -> str:
    data, base = make_dataset(folder / "data", rows=4), make_hf(folder / "hf", layers=1)
    return run_python(str(SCRIPT), str(data), str(base), str(folder), *cases).stdout


def test_checkpoints_survive_kills_failed_writes_and_local_disks(tmp_path: Path) -> None:
    output = faults(tmp_path, "kill", "refused", "local", "adapters")
    assert "killed 8 times" in output
    assert output.count("NO CHECKPOINT of step 3") == 3
    assert "NO CHECKPOINT of step 1: process 1 on " in output and "File too large" in output
    assert "training continues; the next save tries again" in output
    assert output.count("local checkpoint of step 2: copied to") == 2, "expected a report from each process"
    assert output.count("local checkpoint of step 7: copied to") == 2, "the last save's repetitions lost it"
    assert re.search(r"NO CHECKPOINT of step 6: process 0 on .*'.*/node-0/.*/__0_0.distcp'", output), "no file is named"
    assert "could not be copied: [Errno 5] the local disk returned other bytes than were written" in output
    assert "local checkpoint of step 2: incomplete on these nodes, ignored" in output
    assert "local checkpoint of step 2: ignored, " in output, "it was removed from the run folder"


def test_full_disks_are_reported(tmp_path: Path) -> None:
    """File systems that are too small: detected before writing, or while writing if inodes run out."""
    disks = {tmp_path / "space" / "ckpt": "size=4M", tmp_path / "files" / "ckpt": "size=1G,nr_inodes=7"}
    try:
        for disk, options in disks.items():
            disk.mkdir(parents=True)
            mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
            done = subprocess.run(mount, capture_output=True, text=True)
            if done.returncode:
                if os.environ.get("CI") == "true" and os.geteuid() == 0:
                    pytest.fail(done.stderr)
                pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        output = faults(tmp_path, "space", "files")
        assert "GB are needed, 0.00 GB are free" in output
        assert "No space left on device" in output
        assert not [path for disk in disks for path in disk.iterdir()]
    finally:
        for disk in disks:
            if disk.is_mount():
                subprocess.run(["umount", str(disk)], check=True)


def test_damaged_checkpoints_fall_back_to_the_previous_one(tmp_path: Path) -> None:
    """A flipped bit or missing file is reported, the checkpoint set aside, and the run ends like an undisturbed one.

    So it does beside interrupted saves: without complete.json, with a short file, or with the name of a partial one.
    """
    common = {
        "data.path": make_dataset(tmp_path / "data"),
        "checkpoint.base": make_hf(tmp_path / "hf"),
        "model.num_layers": 0,
        "train.steps": 5,
        "train.global_batch": 4,
        "checkpoint.keep_last": 0,
        "observe.tensorboard": False,
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    train({**common, "run_dir": whole, "checkpoint.save_every": 1})
    for step in (2, 3, 4):
        shutil.copytree(whole / "ckpt" / f"step-{step:07d}", run / "ckpt" / f"step-{step:07d}")
    weights = run / "ckpt" / "step-0000003" / "weights" / "__0_0.distcp"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (run / "ckpt" / "step-0000004" / "weights" / "__0_0.distcp").unlink()
    interrupted = ("step-0000005", "step-0000006", "step-0000007.partial")
    for name in interrupted:
        shutil.copytree(run / "ckpt" / "step-0000002", run / "ckpt" / name)
    (run / "ckpt" / "step-0000005" / "complete.json").unlink()
    short = run / "ckpt" / "step-0000006" / "weights" / "__0_0.distcp"
    short.write_bytes(short.read_bytes()[:-100])
    done = train({**common, "run_dir": run, "checkpoint.save_every": 0})
    for name in interrupted:
        assert f"ignored {run}/ckpt/{name}" in done.stdout
    assert f"ignored {run}/ckpt/step-0000004: weights/__0_0.distcp is missing" in done.stdout
    assert "DAMAGED CHECKPOINT: weights/__0_0.distcp is damaged" in done.stdout
    names = {p.name for p in (run / "ckpt").iterdir()}
    aside = {f"step-{step:07d}.damaged" for step in (3, 4, 5, 6)}
    assert names == {"step-0000002", *aside, "step-0000005", "step-0000007.partial"}
    assert [e["step"] for e in read_events(run) if e["kind"] == "checkpoint_damaged"] == [3]
    for resumed, undisturbed in zip(read_metrics(run), read_metrics(whole)[2:], strict=True):
        assert (resumed["step"], resumed["loss"], resumed["grad_norm"]) == (
            undisturbed["step"],
            undisturbed["loss"],
            undisturbed["grad_norm"],
        )
    last = "ckpt/step-0000005/weights/__0_0.distcp"
    assert (run / last).read_bytes() == (whole / last).read_bytes()

    # without any that can be used, only interrupted saves let the run start from the base
    for name in names:
        shutil.rmtree(run / "ckpt" / name) if name != "step-0000002" else None
    weights, before = run / "ckpt" / "step-0000002" / "weights" / "__0_0.distcp", (run / "metrics.jsonl").read_bytes()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    for _ in range(2):  # also where it was set aside before
        refused = train({**common, "run_dir": run}, check=False)
        assert refused.returncode == 2 and (run / "metrics.jsonl").read_bytes() == before
        assert "none of the run's checkpoints can be used: step-0000002.damaged" in refused.stderr
    dry = train({**common, "run_dir": run}, check=False, entry=("-m", "sdlm_megatron.train", "--dry-run"))
    assert dry.returncode == 2 and "can be used: step-0000002.damaged" in dry.stderr and "starts from" not in dry.stdout
    (run / "ckpt" / "step-0000002.damaged").rename(run / "ckpt" / "step-0000002.partial")
    assert "starts from" in train({**common, "run_dir": run, "train.stop_after": 1}).stdout
    assert [record["step"] for record in read_metrics(run)] == [1]
