"""Attempts: the log folder of one start of a run, and the run's list of events.

    RUN/logs/ATTEMPT/rank-00003.log             what the rank printed (written by the launcher)
                     exit/rank-00003.json       why it ended
                     heartbeat/rank-00003.json  its last sign of life
                     stacks/rank-00003.txt      its Python stacks, if it hung
    RUN/events.jsonl                            events of the run over all its attempts, one JSON object per line

A launcher names the attempt in SDLM_ATTEMPT, on Slurm "JOB-RESTART-TRY"; without one the name is "local". Nothing here
needs torch, as the job's driver uses it too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sdlm_megatron.errors import CheckpointError, ConfigError

EVENTS_FILE = "events.jsonl"
T = TypeVar("T")
_NUMBERS, _MOST = ("time", "process_start", "step", "checkpoint", "seconds", "blocked_s", "total_s"), 1e11
"""Fields of events that hold numbers, and the largest one: seconds of a year that a calendar has."""


def attempt() -> str:
    """Name of this start of the run, the same on all its processes."""
    return os.environ.get("SDLM_ATTEMPT") or "local"


def adopt_slurm_ranks() -> None:
    """Sets the variables of torchrun in a process that srun started as a rank (SDLM_LAUNCH=srun)."""
    if os.environ.get("SDLM_LAUNCH") == "srun":
        for name, source in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "NTASKS")):
            if not (value := os.environ.get(f"SLURM_{source}")):
                fix = "start with sdlm submit, or unset SDLM_LAUNCH"
                raise ConfigError(f"SDLM_LAUNCH=srun without SLURM_{source}", "the environment", fix)
            os.environ[name] = value


def refuse_lone_tasks() -> None:
    """Raises ConfigError in one of several tasks of srun or mpirun that do not know of each other."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    name = next((name for name in names if os.environ.get(name)), "")
    tasks = os.environ.get(name, "")
    if "WORLD_SIZE" not in os.environ and tasks.isdigit() and int(tasks) > 1:
        starter = "Slurm" if name.startswith("SLURM") else "mpirun"
        raise ConfigError(
            f"{starter} has started {tasks} tasks, and each would train everything alone",
            f"{name} without WORLD_SIZE",
            "`sdlm submit`; one torchrun per node: srun --ntasks-per-node=1 torchrun --nnodes=N --nproc-per-node=GPUS "
            "--rdzv-backend=c10d --rdzv-endpoint=HOST:PORT -m sdlm_megatron.train …; or one process: srun --ntasks=1 …",
        )


def attempt_dir(run_dir: str | Path, name: str | None = None) -> Path:
    """RUN/logs/ATTEMPT."""
    return Path(run_dir) / "logs" / (name or attempt())


def rank_file(run_dir: str | Path, kind: str, rank: int, name: str | None = None) -> Path:
    """File of one rank; `kind` is "log", "exit", "heartbeat" or "stacks"."""
    folder = attempt_dir(run_dir, name)
    if kind == "log":
        return folder / f"rank-{rank:05d}.log"
    return folder / kind / f"rank-{rank:05d}.{'txt' if kind == 'stacks' else 'json'}"


def patiently(read: Callable[..., T], *arguments: Any, hurried: Callable[[], bool] = lambda: False) -> T:
    """`read(*arguments)`, called again for a minute while it fails, or until `hurried()`.

    The servers of a shared file system answer with errors while one of them takes over from another.
    """
    for _ in range(12):
        with suppress(OSError, CheckpointError):  # the latter: RUN/ckpt cannot be listed
            return read(*arguments)
        if hurried():
            break
        time.sleep(5)
    return read(*arguments)


def record_event(run_dir: str | Path, kind: str, **fields: Any) -> None:
    """Appends an event with the time (seconds since 1970) and the attempt. A failure to write is only printed."""
    line = json.dumps({"time": time.time(), "attempt": attempt(), "kind": kind, **fields}, ensure_ascii=False) + "\n"
    try:
        # One write with O_APPEND: lines of several processes never mix.
        handle = os.open(Path(run_dir) / EVENTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
    except OSError as problem:  # a full disk must not end a run
        print(f"cannot write event {kind} {fields}: {problem}", file=sys.stderr, flush=True)


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """All events in the order of the file; [] without a file. A line that is no event, as one that a crash cut, is
    skipped."""
    try:
        text = (Path(run_dir) / EVENTS_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [event for line in text.split("\n") if (event := _event(line)) is not None]


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str) or "time" not in event:
        return None
    numbers = [event[key] for key in _NUMBERS if event.get(key) is not None]
    # written so that NaN, which compares false with everything, is refused
    valid = all(type(x) in (int, float) and -1 <= x <= _MOST for x in numbers) and event["time"] is not None
    valid = valid and isinstance(event.get("attempt", ""), str)
    hosts = event.get("hosts", [])
    valid = valid and isinstance(hosts, list) and all(isinstance(host, str) for host in hosts)
    return event if valid and (event["kind"] not in ("start", "ready") or "step" in event) else None
