"""Watchdog: end of a process and its files. Each case is a real process; none imports torch."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import ENV

from sdlm_megatron.config.schema import FaultConfig
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.attempt import rank_file, record_event
from sdlm_megatron.ops.rank.stop import StopRequests, refuse_to_start
from sdlm_megatron.ops.rank.watchdog import Watch

HEAD = """
import os, signal, sys, time
from sdlm_megatron.config.schema import FaultConfig
from sdlm_megatron.errors import ConfigError, TrainingError
from sdlm_megatron.ops.rank import watchdog as module
from sdlm_megatron.ops.rank.stop import StopRequests
from sdlm_megatron.ops.rank.watchdog import Watch
module.GRACE, module.BEHIND = 0.1, 1.0
requests = StopRequests()
settings = FaultConfig(heartbeat_seconds=0.1, hang_factor=3, hang_min_seconds=0.5, start_seconds=STARTUP)
with Watch(sys.argv[1], settings, requests) as watch:
    for step in (1, 2, 3):
        watch.begin_step(step)
        watch.rows = [step, step + 10]
        if step == 3:
            os.write(1, b"in step 3")
BODY
        watch.begin_read()
        watch.end_read()
    watch.at("end")
assert "torch" not in sys.modules
"""
CASES = {
    "fine": "pass",
    "error": "raise ValueError('a defect')",
    "exits 42": "sys.exit(42)",
    "a mistake": "raise ConfigError('wrong', 'here', 'do this')",
    "not finite": "raise TrainingError('no number', step=2)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "time.sleep(60)",
    "hangs with the interpreter's lock": "time.sleep(0.3); import re; re.match('(a+)+b', 'a' * 40)",
    "receives SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); watch.why = requests.why",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, int, str]]]:
    """Run folder, exit code and stderr of every case; the cases run concurrently."""
    folder, started = tmp_path_factory.mktemp("watch"), {}
    for case, body in CASES.items():
        run = folder / case.replace(" ", "-")
        run.mkdir()
        script = HEAD.replace("BODY", "            " + body).replace("STARTUP", "60")
        started[case] = subprocess.Popen(
            [sys.executable, "-c", script, str(run)],
            env={**os.environ, **ENV, "RANK": "0", "SDLM_ATTEMPT": "7-0-1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    results = {}
    for case, process in started.items():
        _, stderr = process.communicate(timeout=60)
        results[case] = (folder / case.replace(" ", "-"), process.returncode, stderr)
    yield results


def exit_record(run: Path) -> dict:
    return json.loads(rank_file(run, "exit", 0, "7-0-1").read_text())


@pytest.mark.parametrize(
    ("case", "code", "reason", "step", "failed"),
    [
        ("fine", 0, "finished", 3, None),
        ("error", 1, "error", 2, 3),
        ("exits 42", 42, "error", 2, 3),
        ("a mistake", 2, "user_error", 2, 3),
        ("not finite", 3, "not_finite", 2, 2),
        ("hangs", 75, "hang", 2, 3),
        ("receives SIGTERM", 0, "finished", 3, None),
    ],
)
def test_exit_record_has_reason_and_steps(
    ended: dict, case: str, code: int, reason: str, step: int, failed: int | None
) -> None:
    run, exit_code, _ = ended[case]
    record = exit_record(run)
    assert exit_code == code == record["code"]
    assert (record["reason"], record["step"], record["failed_step"]) == (reason, step, failed)
    assert record["rows"] == [3, 13] and record["pid"] > 0 and record["host"]


def test_error_output_and_recorded_reason(ended: dict) -> None:
    assert "ValueError: a defect" in ended["error"][2] and "Traceback" in ended["error"][2]
    assert exit_record(ended["error"][0])["error"] == "ValueError: a defect"
    assert ended["a mistake"][2] == "error: wrong\n  where: here\n  fix:   do this\n"
    run = ended["receives SIGTERM"][0]
    assert exit_record(run)["why"] == "signal SIGTERM"
    assert "in <module>" in rank_file(run, "stacks", 0, "7-0-1").read_text()


def test_killed_process_leaves_only_a_heartbeat(ended: dict) -> None:
    run, code, _ = ended["killed"]
    assert code == -signal.SIGKILL
    assert not rank_file(run, "exit", 0, "7-0-1").exists()
    beat = json.loads(rank_file(run, "heartbeat", 0, "7-0-1").read_text())
    assert beat["phase"] in ("start", "step") and abs(beat["time"] - time.time()) < 60


def test_hang_writes_its_stack(ended: dict) -> None:
    run, _, stderr = ended["hangs"]
    stack = rank_file(run, "stacks", 0, "7-0-1").read_text()
    assert 'File "<string>"' in stack and "in <module>" in stack
    assert (
        "hangs (phase step, step 3: no progress for 0 s" in stderr
        or "phase step, step 3: no progress for 1 s" in stderr
    )
    beat = json.loads(rank_file(run, "heartbeat", 0, "7-0-1").read_text())
    assert (beat["step"], beat["phase"], beat["rows"]) == (3, "step", [3, 13])


def test_hang_that_holds_the_gil_is_ended(ended: dict) -> None:
    """No Python code can run: faulthandler's timer dumps the stacks and ends the process."""
    run, code, _ = ended["hangs with the interpreter's lock"]
    assert code == 1
    stack = rank_file(run, "stacks", 0, "7-0-1").read_text()
    assert stack.startswith("Timeout") and "in match" in stack


HANG = """
import os, sys, time
import torch, torch.distributed as dist
from sdlm_megatron.config.schema import FaultConfig
from sdlm_megatron.ops.rank import watchdog as module
from sdlm_megatron.ops.rank.stop import StopRequests
module.GRACE = 0.1
# rank 1 is ended later: without its peer, rank 0 would get an error instead of a hang
rank, backend = int(os.environ["RANK"]), sys.argv[2]
device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, store=dist.FileStore(sys.argv[1] + "/store"), rank=rank, world_size=int(sys.argv[3]))
dist.all_reduce(torch.ones(3, device=device))
with module.Watch(sys.argv[1], FaultConfig(heartbeat_seconds=0.1, start_seconds=1 + 3 * rank), StopRequests()):
    if rank == 0:
        dist.all_reduce(torch.ones(5, device=device))
    time.sleep(60)
"""


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_hang_writes_the_last_collectives(backend: str, tmp_path: Path) -> None:
    """Rank 0 waits in an all-reduce that rank 1 never begins. (NCCL: one GPU, so one rank, which only sleeps.)"""
    import torch

    if backend == "nccl" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    world = 2 if backend == "gloo" else 1
    buffer = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "100", "SDLM_ATTEMPT": "7-0-1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HANG, str(tmp_path), backend, str(world)],
            env={**os.environ, **ENV, **buffer, "RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [rank.wait(60) for rank in ranks] == [75] * world
    sizes = []
    for rank in range(world):
        file = tmp_path / "logs" / "7-0-1" / f"nccl-trace-{rank}"
        entries = pickle.loads(file.read_bytes())["entries"]  # written by the processes above
        assert {entry["profiling_name"] for entry in entries} == {f"{backend}:all_reduce"}
        sizes.append([entry["input_sizes"] for entry in entries])
    assert sizes == [[[[3]], [[5]]], [[[3]]]][:world]


def test_slow_steps_before_the_first_log_record_are_no_hang(tmp_path: Path) -> None:
    """They are read together: each gets the time of the first step on top."""
    watch = Watch(tmp_path, FaultConfig(start_seconds=100), object.__new__(StopRequests))
    watch.begin_step(1)
    watch._clock = (watch._clock[0] - 90, watch._clock[1])  # the first step took 90 s
    watch.begin_read()
    watch.end_read()
    for step in range(2, 11):
        watch.begin_step(step)
    assert 910 <= watch._clock[1] <= 920
    watch.begin_read()
    watch.end_read()
    assert watch._clock[1] == FaultConfig().hang_min_seconds


def test_a_new_step_never_shows_a_time_limit_of_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of the watchdog may look at any time."""
    watch = Watch(tmp_path, FaultConfig(), object.__new__(StopRequests))  # pytest keeps its own signal handlers
    seen: list[float] = []
    monkeypatch.setattr(watch, "_allowed", lambda *_: seen.append(watch._clock[1]) or 180.0)
    for step in (1, 2):
        watch.at("save")
        watch.begin_step(step)
        watch.end_read()
    assert min(seen) == 180.0 == watch._clock[1]


def test_stop_request_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's file also prevents a start; the driver's applies to one attempt."""

    def look() -> str | None:
        requests = object.__new__(StopRequests)  # pytest keeps its own signal handlers
        requests.why = None
        requests.look(tmp_path)
        return requests.why

    monkeypatch.setenv("SDLM_ATTEMPT", "7-0-1")
    refuse_to_start(tmp_path)
    assert look() is None
    (tmp_path / "STOP").write_text("for today\n")
    assert look() == "STOP: for today"
    with pytest.raises(ConfigError, match=r"stopped by a user \(STOP: for today\)") as caught:
        refuse_to_start(tmp_path)
    assert caught.value.where == str(tmp_path / "STOP")
    (tmp_path / "STOP").unlink()
    request = tmp_path / "logs" / "7-0-1" / "stop.json"
    request.parent.mkdir(parents=True)
    request.write_text('{"reason": "time limit"}')
    assert look() == "time limit"
    refuse_to_start(tmp_path)
    request.write_text("{")
    assert look() == "stop.json without a reason"
    request.unlink()
    request.parent.rmdir()
    request.parent.write_text("a folder that cannot be read")
    (tmp_path / "STOP").write_text("")
    assert look() == "STOP"
    (tmp_path / "STOP").unlink()
    (tmp_path / "STOP").mkdir()
    assert "Is a directory" in str(look())
    (tmp_path / "STOP").rmdir()
    fails, waits = Mock(side_effect=OSError(errno.EIO, "Input/output error")), Mock()
    monkeypatch.setattr("time.sleep", waits)
    monkeypatch.setattr(Path, "read_text", fails)
    assert look() is None  # a shared disk that fails is no request
    with pytest.raises(OSError, match="Input/output error"):
        refuse_to_start(tmp_path)
    assert waits.call_count == 12


def test_unwritable_event_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "events.jsonl").mkdir()
    record_event(tmp_path, "saved", step=5)
    assert "cannot write event saved {'step': 5}" in capsys.readouterr().err
