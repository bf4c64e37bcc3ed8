"""The next action of a job after a training attempt has ended: a pure function, so that tests cover every case."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

REQUEUES = 3  # maximum number of requeues in a row without a newer checkpoint


@dataclass(frozen=True)
class AttemptEnd:
    """End of an attempt."""

    outcome: str  # finished | stopped | user_error | not_finite | hang | crash | lost_node | too_few_nodes
    text: str = ""  # reason in one line
    step: int | None = None  # of not_finite: the step with the value that is not finite
    hosts: list[str] = field(default_factory=list)  # those that caused it
    bad: dict[str, str] = field(default_factory=dict)  # hosts that were lost or failed their checks, with the reason


@dataclass(frozen=True)
class Situation:
    """State of the job when an attempt has ended."""

    nodes: Sequence[str]  # usable nodes of the allocation
    needed: int  # number of nodes that training takes
    retries: int  # maximum number of retries without a newer checkpoint
    failures: int  # failed attempts since the newest checkpoint, including this one, over all restarts of the job
    requeues: int  # requeues since the newest checkpoint
    blamed: dict[str, int]  # number of these failures per host, where a single host caused one
    progressed: bool  # whether there is a newer checkpoint than when Slurm last started the job
    not_finite: int  # attempts since the newest checkpoint that ended as not_finite, including this one
    stop: str = ""  # reason why the job must stop: "time limit", "preemption", "operator", or ""
    stop_file: bool = False  # whether RUN/STOP exists


@dataclass(frozen=True)
class Action:
    """Next action of the job."""

    kind: str  # done | stop | end | retry | requeue
    reason: str
    exclude: tuple[str, ...] = ()  # nodes to leave out from now on
    find_nan: bool = False  # the next attempt searches for the place where values stop being finite


def decide(end: AttemptEnd, now: Situation) -> Action:
    """Applies the rules in their order: a finished run first, then requests to stop, then failures."""
    if end.outcome == "finished":
        return Action("done", "training finished")
    if now.stop_file:
        return Action("stop", "RUN/STOP exists; remove the file to continue training")
    if end.outcome == "user_error":
        return Action("end", f"user error; not retrying: {end.text}")
    if now.stop or end.outcome == "stopped":
        why = now.stop or "operator"
        # A preemption is not the run's fault, so it may requeue a few times before the first new checkpoint.
        if now.progressed or (why == "preemption" and now.requeues < REQUEUES):
            return Action("requeue", why, tuple(end.bad))
        return Action("end", f"{why}: no new checkpoint since the job started; requeueing would loop")
    if end.outcome == "not_finite":
        if now.not_finite > 1:
            return Action("end", f"not finite again: {end.text}")
        return Action("retry", "values were not finite; repeating the step with a search for the place", find_nan=True)
    return _after_failure(end, now)


def _after_failure(end: AttemptEnd, now: Situation) -> Action:
    """After a crash, a hang or the loss of nodes: the same nodes, other nodes, or a requeue for new ones."""
    if end.outcome != "too_few_nodes" and now.failures > now.retries:
        return Action("end", f"{now.failures} failures without a new checkpoint, the last: {end.text}")
    repeated = {host for host, count in now.blamed.items() if count > 1 and host in now.nodes}
    excluded = {**dict.fromkeys(sorted(repeated), "failed twice"), **end.bad}
    usable = [node for node in now.nodes if node not in excluded]
    if len(usable) >= now.needed:
        return Action("retry", f"{end.outcome}: {end.text}", tuple(excluded))
    # Nodes that failed twice are only suspects: without requeues left they are better than no training.
    if len([node for node in now.nodes if node not in end.bad]) >= now.needed and now.requeues >= REQUEUES:
        return Action("retry", f"{end.outcome}: {end.text}", tuple(end.bad))
    why = ", ".join(f"{host} ({reason})" for host, reason in excluded.items())
    if now.requeues >= REQUEUES:
        what = f"{now.requeues} requeues without progress and still too few good nodes, or RUN is a node's own disk"
        return Action("end", f"{what}: without {why}")
    return Action("requeue", f"too few good nodes: without {why}", tuple(excluded))


def since_checkpoint(events: Sequence[dict[str, Any]], job: str, restart: int, step: int) -> dict[str, Any]:
    """Counts over the job's events since its newest checkpoint, that of `step` (-1: none): fields of Situation.

    The events `train_end` and `requeue` carry the step of the newest checkpoint at their time.

    Args:
        restart: number of times that Slurm has requeued the job. Without a checkpoint none of them made progress, also
            where the events do not say so: a run folder on a node's own disk is new at each batch node.
    """
    recent = [e for e in events if str(e.get("attempt", "")).split("-")[0] == job and e.get("checkpoint") == step]
    ends = [e for e in recent if e["kind"] == "train_end" and e.get("outcome") not in ("finished", "stopped")]
    blamed: dict[str, int] = {}
    for event in ends:
        hosts = event.get("hosts", [])
        if len(hosts) == 1:  # when several hosts fail together, the cause is not one of them
            blamed[hosts[0]] = blamed.get(hosts[0], 0) + 1
    # The driver and a guardian may both have recorded the requeue of a start JOB-RESTART.
    requeued = {e["attempt"].rpartition("-")[0] for e in recent if e["kind"] == "requeue"}
    return {
        "failures": len(ends),
        "requeues": max(len(requeued), restart if step < 0 else 0),
        "blamed": blamed,
        "not_finite": sum(e.get("outcome") == "not_finite" for e in ends),
    }
