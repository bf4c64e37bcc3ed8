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
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


def attempt() -> str:
    """Name of this start of the run, the same on all its processes."""
    return os.environ.get("SDLM_ATTEMPT") or "local"


def adopt_slurm_ranks() -> None:
    """Sets the variables of torchrun in a process that srun started as a rank (SDLM_LAUNCH=srun)."""
    if os.environ.get("SDLM_LAUNCH") == "srun":
        for name, source in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "NTASKS")):
            os.environ[name] = os.environ[f"SLURM_{source}"]


def attempt_dir(run_dir: str | Path, name: str | None = None) -> Path:
    """RUN/logs/ATTEMPT."""
    return Path(run_dir) / "logs" / (name or attempt())


def rank_file(run_dir: str | Path, kind: str, rank: int, name: str | None = None) -> Path:
    """File of one rank; `kind` is "log", "exit", "heartbeat" or "stacks"."""
    folder = attempt_dir(run_dir, name)
    if kind == "log":
        return folder / f"rank-{rank:05d}.log"
    return folder / kind / f"rank-{rank:05d}.{'txt' if kind == 'stacks' else 'json'}"


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
    """All events in the order of the file; [] without a file. A line that a crash cut short is skipped."""
    try:
        text = (Path(run_dir) / EVENTS_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events
