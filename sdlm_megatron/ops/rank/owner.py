"""Owner of a run folder: one training at a time writes to it.

    RUN/owner.json    host, place, pid, started, job, attempt, seconds, token; touched at each heartbeat

Works on a shared file system without locks of its own: the file is created exclusively, and replaced when its owner has
ended. An owner on this machine has ended when its process is gone; one of this Slurm job when the job has started
another attempt; any other when its file was not touched for SILENT_HEARTBEATS. An owner whose file was replaced ends.
"""

import json
import os
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.attempt import attempt

SILENT_HEARTBEATS, SILENT_SECONDS = 12, 120.0
"""An owner is taken for dead after this many heartbeats, and this many seconds, without a touch of its file."""
POLL_SECONDS, SETTLE_SECONDS = 1.0, 1.0
"""Interval between looks at the file of an owner; time until a replacement by a process of the same moment shows."""


class RunOwner:
    """This process as the owner of a run folder.

    Args:
        run_dir: the folder; created if it is missing.
        seconds: interval of the heartbeat.
    """

    def __init__(self, run_dir: Path, seconds: float) -> None:
        self.path, self._seconds, self._touched = run_dir / "owner.json", seconds, time.monotonic()
        self._me: dict[str, Any] = {
            "host": os.uname().nodename,
            "place": _place(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "attempt": f"{attempt()} {os.environ.get('SLURM_RESTART_COUNT', '0')}",
            "seconds": seconds,
            "token": secrets.token_hex(8),
        }

    def take(self, *, take_over: bool = False) -> None:
        """Becomes the owner. Waits while it is not known whether an earlier owner has ended.

        Args:
            take_over: replace an owner that still trains; it ends at its next heartbeat.

        Raises:
            ConfigError: another training owns the folder.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create(self.path):
                if (seen := self._read()) is not None:
                    self._replace(seen, take_over)
                    return
        except OSError as problem:  # a folder that cannot be written is reported by whatever needs it
            print(
                f"WARNING: {self.path} cannot be written, nothing keeps other trainings out: {problem}", file=sys.stderr
            )

    def beat(self) -> bool:
        """Touches the file if it is time to; whether this process still owns the folder."""
        if time.monotonic() - self._touched < self._seconds:
            return True
        self._touched = time.monotonic()
        with suppress(OSError):
            seen = self._read()
            if seen is None:
                self._create(self.path)
            elif seen[0].get("token") == self._me["token"]:
                os.utime(self.path)
            else:
                return "token" not in seen[0]
        return True

    def release(self) -> None:
        """Removes the file if it is this process's."""
        with suppress(OSError):
            if (seen := self._read()) is not None and seen[0].get("token") == self._me["token"]:
                self.path.unlink()

    def _create(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self._me, file)
        return True

    def _read(self) -> tuple[dict[str, Any], int] | None:
        """Content and time of the file; {} for content that cannot be read, None without a file."""
        try:  # opened each time: only then a network file system asks its server
            with open(self.path, encoding="utf-8", errors="replace") as file:
                text, when = file.read(1 << 16), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        return (content if isinstance(content, dict) else {}), when

    def _replace(self, seen: tuple[dict[str, Any], int], take_over: bool) -> None:
        own = self.path.with_name(f"{self.path.name}.{self._me['token']}.partial")
        self._create(own)
        try:
            # both times are the file system's: the clocks of the nodes may differ
            age = (own.stat().st_mtime_ns - seen[1]) / 1e9
            if not (take_over or self._ended(seen[0])):
                self._wait(seen, age)
            os.replace(own, self.path)
        finally:
            own.unlink(missing_ok=True)
        time.sleep(SETTLE_SECONDS)
        now = self._read()
        if now is not None and now[0].get("token") not in (None, self._me["token"]):
            raise self._refusal(now[0])

    def _ended(self, owner: dict[str, Any]) -> bool:
        """Whether the owner is known to have ended."""
        if owner.get("place") == self._me["place"] and type(owner.get("pid")) is int:
            return _started(owner["pid"]) != owner.get("started")  # the number may have passed to another process
        # attempts of a job follow each other, also on other nodes
        return owner.get("job") == self._me["job"] != "" and owner.get("attempt") != self._me["attempt"]

    def _wait(self, seen: tuple[dict[str, Any], int], age: float) -> None:
        """Returns once the owner is silent for too long or has left; ConfigError when it gives a sign of life."""
        stated = seen[0].get("seconds")
        interval = float(stated) if isinstance(stated, (int, float)) and 0 < stated < 3600 else self._seconds
        left = max(SILENT_HEARTBEATS * interval, SILENT_SECONDS) - age
        if left > 0:
            print(f"{self.path}: waiting up to {left:.0f} s for a sign of life of {_who(seen[0])}", flush=True)
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            now = self._read()
            if now is None:
                return
            if now != seen:
                raise self._refusal(now[0])

    def _refusal(self, owner: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"another training writes to this run folder: {_who(owner)}",
            str(self.path),
            "stop it (RUN/STOP), or use another --run_dir; --take-over ends it at its next heartbeat",
        )


def _who(owner: dict[str, Any]) -> str:
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}{job}"


def _started(pid: int) -> str:
    """Start of a process in clock ticks since the machine's own; "" for one that is gone."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(errors="replace", encoding="utf-8").rpartition(")")[2].split()
        )
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _place() -> str:
    """Identity of the process numbers that this process sees: containers of one host have their own."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{os.uname().nodename} {boot} {os.readlink('/proc/self/ns/pid')}"
    return os.uname().nodename
