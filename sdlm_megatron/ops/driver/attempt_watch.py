"""From the start of the training processes to the reason of their end."""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from sdlm_megatron.files import write_json
from sdlm_megatron.ops.driver.attempt_summary import Summary
from sdlm_megatron.ops.driver.decision import End
from sdlm_megatron.ops.driver.slurm_commands import Job, lost_nodes

POLL_SECONDS = 0.5
NODES_SECONDS = 10
"""Between questions to the controller about lost nodes."""
AFTER_FAILURE = 60
"""Seconds that the other ranks have once the first has said that it failed: a hang's stacks take a few."""
AFTER_SUCCESS = 600
"""Seconds that the others have once the first has ended well."""
STACKS_SECONDS = 3
"""From SIGTERM to SIGKILL, for the ranks to write their stacks."""
SILENT = 12
"""A rank is silent when its heartbeat is so many of its intervals, and SILENT_SECONDS, older than the others'."""
SILENT_SECONDS = 120
LAST_SECONDS = 45
"""Before the time limit, for the driver to put the job back into the queue."""


def watch(
    process: subprocess.Popen,
    job: Job,
    nodes: Sequence[str],
    folder: Path,
    heartbeat_seconds: float,
    stop: Callable[[], str],
    say: Callable[[str], None],
) -> None:
    """Waits until srun has ended, and sees to it that it does.

    Args:
        process: srun.
        nodes: those that it uses.
        folder: the attempt's; `stop.json` is written there once.
        heartbeat_seconds: the run's fault.heartbeat_seconds.
        stop: why training has to stop, or "".
        say: for what happens meanwhile.
    """
    deadline, since, looked, asked, why = 0.0, 0.0, time.monotonic(), False, ""
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if not deadline and (why := stop()):
            deadline = job.end_time() - LAST_SECONDS
            say(f"{why}: training is asked to save and stop")
        if deadline and not asked:
            with suppress(OSError):  # a full disk: there may be room at the next look
                write_json(folder / "stop.json", {"reason": why})
                asked = True
        if not since and any((folder / "exit").glob("rank-*.json")):
            since = time.monotonic()
        if since and time.monotonic() - since > _patience(folder):
            say("some processes have ended, others have not: they are ended now")
            _end(process, job)
        elif deadline and time.time() > deadline:
            say("the time limit is near and training has not stopped: it is ended, the last checkpoint counts")
            _end(process, job)
        elif time.monotonic() - looked > NODES_SECONDS:
            looked = time.monotonic()
            if silent := silent_ranks(folder, max(SILENT * heartbeat_seconds, SILENT_SECONDS)):
                say(f"no sign of life of rank {', '.join(silent)}: all write their stacks and are ended")
                _end(process, job)
                continue
            lost = lost_nodes(nodes)
            if down := {n: s for n, s in lost.items() if s.startswith("down")}:
                say(f"lost: {', '.join(f'{n} is {s}' for n, s in down.items())}; the others are ended")
                _end(process, job)


def silent_ranks(folder: Path, seconds: float) -> list[str]:
    """Numbers of the ranks whose heartbeat stopped so long before the newest one; all, if that is twice as old.

    The shared file system's own times are compared, so clocks need not agree. A rank with an exit record is not meant.
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


def _patience(folder: Path) -> float:
    failed = any('"code": 0' not in file.read_text() for file in (folder / "exit").glob("rank-*.json"))
    return AFTER_FAILURE if failed else AFTER_SUCCESS


def _end(process: subprocess.Popen, job: Job) -> None:
    """Ends srun and its step; a node that does not answer cannot hold it up."""
    job.end_steps(STACKS_SECONDS)
    for give_up in (process.terminate, process.kill):
        try:
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            give_up()
    process.wait()


def end_of(summary: Summary, nodes: Sequence[str]) -> End:
    """What a summary and the controller say of an attempt on `nodes`."""
    lost = lost_nodes(nodes)
    if lost and summary.outcome not in ("finished", "stopped"):
        return End("lost_node", f"lost {', '.join(lost)}; {summary.why}", summary.step, sorted(lost), lost)
    return End(summary.outcome, summary.why, summary.step, summary.hosts, lost)
