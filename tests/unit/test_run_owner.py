"""Owner of a run folder: a second training is refused, an owner that has ended is replaced."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ENV

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.attempt import refuse_lone_tasks
from sdlm_megatron.ops.rank import owner as module
from sdlm_megatron.ops.rank.owner import RunOwner

ELSEWHERE = {
    "host": "n7",
    "place": "n7 boot pid",
    "pid": 4,
    "started": "1",
    "job": "",
    "attempt": "local 0",
    "token": "t",
}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SDLM_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.3)


def owned(run: Path, **changes: Any) -> Path:
    """A run folder whose owner is on another host, unless the changes say otherwise."""
    run.mkdir(exist_ok=True)
    (run / "owner.json").write_text(json.dumps({**ELSEWHERE, "seconds": 0.01, **changes}))
    return run


def token(run: Path) -> str:
    return str(json.loads((run / "owner.json").read_text())["token"])


def test_an_owner_is_recorded_and_released(tmp_path: Path) -> None:
    owner = RunOwner(tmp_path / "new" / "run", 10)
    owner.take()
    content = json.loads(owner.path.read_text())
    assert (content["pid"], content["host"], content["job"]) == (os.getpid(), os.uname().nodename, "")
    assert owner.beat()
    owner.release()
    assert list(owner.path.parent.iterdir()) == []


def test_a_living_process_on_this_host_is_not_replaced(tmp_path: Path) -> None:
    first, second = RunOwner(tmp_path, 0.02), RunOwner(tmp_path, 0.02)
    first.take()
    stop = threading.Event()
    beats = threading.Thread(target=lambda: [first.beat() for _ in iter(lambda: stop.wait(0.03), True)])
    beats.start()
    try:
        with pytest.raises(ConfigError, match=f"another training writes to this run folder: process {os.getpid()} on"):
            second.take()
    finally:
        stop.set()
        beats.join()
    assert token(tmp_path) == first._me["token"]
    second.release()
    assert [p.name for p in tmp_path.iterdir()] == ["owner.json"], "neither a rest nor the other's file removed"


def test_a_process_of_this_host_that_is_gone_is_replaced_at_once(tmp_path: Path) -> None:
    first = RunOwner(tmp_path, 10)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    owned(tmp_path, place=first._me["place"], pid=done.pid, seconds=1000)
    first.take()
    assert token(tmp_path) == first._me["token"]
    owned(tmp_path, place=first._me["place"], pid=os.getpid(), started="1", seconds=1000)  # the number was used again
    first.take()
    assert token(tmp_path) == first._me["token"]


def test_another_host_is_waited_for(tmp_path: Path) -> None:
    owned(tmp_path)
    began, owner = time.monotonic(), RunOwner(tmp_path, 0.01)
    owner.take()
    assert 0.2 < time.monotonic() - began < 5 and token(tmp_path) == owner._me["token"]
    owned(tmp_path)
    os.utime(tmp_path / "owner.json", (1, 1))
    began = time.monotonic()
    owner.take()  # silent for long
    assert time.monotonic() - began < 0.2 and token(tmp_path) == owner._me["token"]


def test_attempts_of_one_job_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 1000.0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SDLM_ATTEMPT", "17-0-1")
    owned(tmp_path, job="17", attempt="17-0-0 0")
    RunOwner(tmp_path, 10).take()
    monkeypatch.delenv("SDLM_ATTEMPT")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a requeue without the driver
    owned(tmp_path, job="17", attempt="local 0")
    owner = RunOwner(tmp_path, 10)
    owner.take()
    assert token(tmp_path) == owner._me["token"]


def test_an_owner_that_was_replaced_notices(tmp_path: Path) -> None:
    first, second = RunOwner(tmp_path, 0), RunOwner(tmp_path, 0)
    first.take()
    second.take(take_over=True)
    assert second.beat() and not first.beat()
    first.release()
    assert token(tmp_path) == second._me["token"]
    (tmp_path / "owner.json").unlink()
    assert second.beat() and token(tmp_path) == second._me["token"]


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 50_000, '{"pid": "x", "place": 3, "seconds": "y"}', '{"seconds": NaN}']
)
def test_a_file_that_cannot_be_read_is_replaced_when_it_is_old(tmp_path: Path, text: str) -> None:
    (tmp_path / "owner.json").write_text(text)
    owner = RunOwner(tmp_path, 0.01)
    assert owner.beat()
    owner.take()
    assert token(tmp_path) == owner._me["token"]


def test_only_one_of_many_becomes_the_owner(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from sdlm_megatron.ops.rank.owner import RunOwner\n"
        "owner = RunOwner(Path(sys.argv[1]), 0.1); owner.take(); print('mine', flush=True)\n"
        "for _ in range(60): time.sleep(0.1); owner.beat()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    started = [subprocess.Popen(command, env={**os.environ, **ENV}, stdout=-1, stderr=-1, text=True) for _ in range(4)]
    results = [process.communicate(timeout=60) for process in started]
    assert sum("mine" in out for out, _ in results) == 1
    assert sum("another training writes to this run folder" in err for _, err in results) == 3


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("SLURM_NTASKS", "2", True),
        ("SLURM_STEP_NUM_TASKS", "2", True),
        ("OMPI_COMM_WORLD_SIZE", "2", True),
        ("PMI_SIZE", "2", True),
        ("SLURM_NTASKS", "1", False),
        ("SLURM_NTASKS", "", False),
    ],
)
def test_tasks_of_srun_without_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, refused: bool
) -> None:
    for other in ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(other, raising=False)
    refuse_lone_tasks()
    monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(ConfigError, match="(Slurm|mpirun) has started 2 tasks, and each would train"):
            refuse_lone_tasks()
    monkeypatch.setenv("WORLD_SIZE", "2")  # ranks of torchrun or of the driver
    refuse_lone_tasks()
