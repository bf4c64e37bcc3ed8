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
        log: receives messages.
    """
    deadline, first_exit, last_check, requested, why = 0.0, 0.0, time.monotonic(), False, ""
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if not deadline and (why := stop_reason()):
            deadline = job.end_time() - LAST_SECONDS
            log(f"{why}: asking training to save and stop")
        if deadline and not requested:
            with suppress(OSError):  # a full disk: there may be room at the next look
                write_json(folder / "stop.json", {"reason": why})
                requested = True
        if not first_exit and any((folder / "exit").glob("rank-*.json")):
            first_exit = time.monotonic()
        if first_exit and time.monotonic() - first_exit > _grace_seconds(folder):
            log("some processes have ended and others have not; ending them")
            _end(process, job)
        elif deadline and time.time() > deadline:
            log("training did not stop before the time limit; ending it, the last checkpoint counts")
            _end(process, job)
        elif time.monotonic() - last_check > NODES_SECONDS:
            last_check = time.monotonic()
            if silent := silent_ranks(folder, max(SILENT_HEARTBEATS * heartbeat_seconds, SILENT_SECONDS)):
                log(f"no heartbeat from rank {', '.join(silent)}; ending all processes, which write their stacks")
                _end(process, job)
                continue
            # A node "not responding" may come back, and its ranks may still train. One that is down has lost them.
            if down := {n: s for n, s in lost_nodes(nodes).items() if s.startswith("down")}:
                log(f"lost nodes: {', '.join(f'{n} is {s}' for n, s in down.items())}; ending the other processes")
                _end(process, job)


def silent_ranks(folder: Path, seconds: float) -> list[str]:
    """Ranks whose heartbeat is more than `seconds` behind the newest one; all ranks if that one is twice as old.

    Compares the times of the files, which the shared file system sets, so clocks need not agree. Ranks with an exit
    record do not count.
    """
    beats = {}
    for file in (folder / "heartbeat").glob("rank-*.json"):
        if not (folder / "exit" / file.name).exists():
            beats[file.stem.removeprefix("rank-")] = file.stat().st_mtime
    if not beats:
        return []
    newest = max(beats.values())
    if time.time() - newest > 2 * seconds:
        return sorted(beats)
    return sorted(rank for rank, beat in beats.items() if newest - beat > seconds)


def _grace_seconds(folder: Path) -> float:
    failed = any('"code": 0' not in file.read_text(encoding="utf-8") for file in (folder / "exit").glob("rank-*.json"))
    return AFTER_FAILURE if failed else AFTER_SUCCESS


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
