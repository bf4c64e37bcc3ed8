"""Watches an attempt from the start of its processes to their end: stop requests, silent ranks, lost nodes."""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from sdlm_megatron.files import write_json
from sdlm_megatron.ops.driver.attempt_summary import AttemptSummary
from sdlm_megatron.ops.driver.decision import AttemptEnd
from sdlm_megatron.ops.driver.slurm_commands import SlurmJob, lost_nodes

POLL_SECONDS = 0.5
NODES_SECONDS = 10  # interval between questions to the controller about lost nodes
AFTER_FAILURE = 60  # seconds for the other ranks after the first failure record: in a hang they write their stacks
AFTER_SUCCESS = 600  # seconds for the other ranks after the first has ended well
STACKS_SECONDS = 3  # seconds from SIGTERM to SIGKILL, in which the ranks write their stacks
SILENT_HEARTBEATS = 12
SILENT_SECONDS = 120
"""A rank is silent when its heartbeat is this many intervals, and this many seconds, behind the newest one."""
LAST_SECONDS = 45  # seconds before the time limit that the driver keeps for requeueing the job


def watch_attempt(
    process: subprocess.Popen,
    job: SlurmJob,
    nodes: Sequence[str],
    folder: Path,
    heartbeat_seconds: float,
    stop_reason: Callable[[], str],
    keep_guardian: Callable[[], None],
    log: Callable[[str], None],
) -> None:
    """Waits until srun has ended, and ends it when the attempt cannot go on.

    Args:
        process: srun.
        job: the job of this process.
        nodes: nodes of the attempt.
        folder: log folder of the attempt; a stop request is written there once, as stop.json.
        heartbeat_seconds: the run's setting fault.heartbeat_seconds.
        stop_reason: returns why training has to stop, or "".
        keep_guardian: makes sure that a guardian runs; called every NODES_SECONDS.
        log: receives messages.
    """
    deadline, first_exit, last_check, requested, why = 0.0, 0.0, time.monotonic(), False, ""
    beats = Heartbeats(folder, max(SILENT_HEARTBEATS * heartbeat_seconds, SILENT_SECONDS))
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if not deadline and (why := stop_reason()):
            deadline = job.end_time() - LAST_SECONDS
            log(f"{why}: asking training to save and stop")
        if deadline and not requested:
            with suppress(OSError):  # a full disk: there may be room at the next look
                write_json(folder / "stop.json", {"reason": why})
                requested = True
        grace = _grace_seconds(folder)
        if grace is not None and not first_exit:
            first_exit = time.monotonic()
        if first_exit and grace is not None and time.monotonic() - first_exit > grace:
            log("some processes have ended and others have not; ending them")
            _end(process, job)
        elif deadline and time.time() > deadline:
            log("training did not stop before the time limit; ending it, the last checkpoint counts")
            _end(process, job)
        elif time.monotonic() - last_check > NODES_SECONDS:
            last_check = time.monotonic()
            keep_guardian()
            if silent := beats.silent():
                log(f"no heartbeat from rank {', '.join(silent)}; ending all processes, which write their stacks")
                _end(process, job)
                continue
            # A node "not responding" may come back, and its ranks may still train. One that is down has lost them.
            if down := {n: s for n, s in lost_nodes(nodes).items() if s.startswith("down")}:
                log(f"lost nodes: {', '.join(f'{n} is {s}' for n, s in down.items())}; ending the other processes")
                _end(process, job)


class Heartbeats:
    """Heartbeats of an attempt, and when this process saw each of them change.

    The times of the files are only compared with themselves: some shared file systems set them by the clock of the
    node that writes, others by that of a server.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        """
        Args:
            folder: log folder of the attempt.
            seconds: a rank is silent when its heartbeat is this much behind the newest one.
        """
        self.folder, self.seconds = folder, seconds
        self._changed: dict[str, tuple[float, float]] = {}  # rank -> time of its file, and when that was new here

    def silent(self) -> list[str]:
        """Silent ranks; all ranks if the newest heartbeat is twice as old. Ranks with an exit record do not count."""
        now, times = time.monotonic(), {}
        try:
            for file in (self.folder / "heartbeat").glob("rank-*.json"):
                if not (self.folder / "exit" / file.name).exists():
                    times[file.stem.removeprefix("rank-")] = file.stat().st_mtime
        except OSError:  # the ranks may not have been able to write either: count from the next look on
            self._changed = {}
            return []
        old = self._changed
        self._changed = {r: old[r] if r in old and old[r][0] == beat else (beat, now) for r, beat in times.items()}
        seen = {rank: when for rank, (_, when) in self._changed.items()}
        newest = max(seen.values(), default=now)
        if now - newest > 2 * self.seconds:
            return sorted(seen)
        return sorted(rank for rank, when in seen.items() if newest - when > self.seconds)


def _grace_seconds(folder: Path) -> float | None:
    """Seconds that the other ranks have after the first exit record; None without one, or if they cannot be read."""
    try:
        codes = ['"code": 0' in file.read_text(encoding="utf-8") for file in (folder / "exit").glob("rank-*.json")]
    except OSError:  # a shared file system whose server fails over: there is a next look
        return None
    return (AFTER_SUCCESS if all(codes) else AFTER_FAILURE) if codes else None


def _end(process: subprocess.Popen, job: SlurmJob) -> None:
    """Ends srun and its step, also where a node does not respond."""
    job.end_steps(STACKS_SECONDS)
    # srun itself waits for every node of the step; one that is cut off never reports, so srun is ended too.
    for give_up in (process.terminate, process.kill):
        try:
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            give_up()
    process.wait()


def attempt_end(summary: AttemptSummary, nodes: Sequence[str]) -> AttemptEnd:
    """The end of an attempt on `nodes`, from its summary and the controller's view of the nodes."""
    lost = lost_nodes(nodes)
    if lost and summary.outcome not in ("finished", "stopped"):
        return AttemptEnd("lost_node", f"lost {', '.join(lost)}; {summary.why}", summary.step, sorted(lost), lost)
    return AttemptEnd(summary.outcome, summary.why, summary.step, summary.hosts, lost)
