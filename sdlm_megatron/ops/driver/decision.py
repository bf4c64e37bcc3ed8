"""What follows the end of a training attempt; a pure function, so that every case can be tested."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

REQUEUES = 3
"""Requeues in a row without a newer checkpoint, for the sake of other nodes."""


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    outcome: str
    """finished | stopped | user_error | not_finite | hang | crash | lost_node | too_few_nodes."""
    text: str = ""
    """Why, in one line."""
    step: int | None = None
    """Of not_finite: the step that was not."""
    hosts: list[str] = field(default_factory=list)
    """Hosts that it is put down to."""
    bad: dict[str, str] = field(default_factory=dict)
    """Hosts that cannot be used, with the reason: lost, or failed their checks."""


@dataclass(frozen=True)
class Situation:
    """What the job knows besides."""

    nodes: Sequence[str]
    """Nodes of the allocation."""
    needed: int
    """Nodes that training takes."""
    retries: int
    """Tries after a failed one without a newer checkpoint between them."""
    failures: int
    """Failed attempts since the newest checkpoint, this one included, over all restarts of the job."""
    requeues: int
    """Requeues since the newest checkpoint."""
    blamed: dict[str, int]
    """How many of these failures were put down to each host alone."""
    progressed: bool
    """There is a newer checkpoint than when Slurm started the job this time."""
    not_finite: int
    """Attempts since the newest checkpoint that ended by numbers that are not finite, this one included."""
    stop: str = ""
    """Why the job has to go: "time limit", "preemption", "operator", or ""."""
    stop_file: bool = False
    """RUN/STOP exists."""


@dataclass(frozen=True)
class Action:
    """What to do."""

    kind: str
    """done | stop | end | retry | requeue."""
    reason: str
    exclude: tuple[str, ...] = ()
    """Nodes to leave out from now on."""
    find_nan: bool = False
    """The next attempt looks for the place where numbers stop being finite."""


def decide(end: End, now: Situation) -> Action:
    """The rules, in their order."""
    if end.outcome == "finished":
        return Action("done", "training finished")
    if now.stop_file:
        return Action("stop", "RUN/STOP asked for it; remove the file to train on")
    if end.outcome == "user_error":
        return Action("end", f"a mistake that a retry does not mend: {end.text}")
    if now.stop or end.outcome == "stopped":
        why = now.stop or "operator"
        if now.progressed or (why == "preemption" and now.requeues < REQUEUES):  # that is no fault of the run's
            return Action("requeue", why, tuple(end.bad))
        return Action("end", f"{why}, and no newer checkpoint since the job began: a requeue would only go in circles")
    if end.outcome == "not_finite":
        if now.not_finite > 1:
            return Action("end", f"not finite again: {end.text}")
        return Action("retry", "not finite: once more, with a search for the place", find_nan=True)
    return _other_nodes(end, now)


def _other_nodes(end: End, now: Situation) -> Action:
    """After a crash, a hang or the loss of nodes."""
    if end.outcome != "too_few_nodes" and now.failures > now.retries:
        return Action("end", f"failed {now.failures} times without a newer checkpoint between, last: {end.text}")
    repeated = {host for host, count in now.blamed.items() if count > 1 and host in now.nodes}
    out = {**dict.fromkeys(sorted(repeated), "failed twice"), **end.bad}
    left = [node for node in now.nodes if node not in out]
    if len(left) >= now.needed:
        return Action("retry", f"{end.outcome}: {end.text}", tuple(out))
    if len([node for node in now.nodes if node not in end.bad]) >= now.needed and now.requeues >= REQUEUES:
        return Action("retry", f"{end.outcome}: {end.text}", tuple(end.bad))
    why = ", ".join(f"{host} ({reason})" for host, reason in out.items())
    if now.requeues >= REQUEUES:
        return Action("end", f"{now.requeues} requeues without progress, still too few good nodes: without {why}")
    return Action("requeue", f"too few good nodes: without {why}", tuple(out))


def since_checkpoint(events: Sequence[dict[str, Any]], job: str, step: int) -> dict[str, Any]:
    """Counts over the job's events since its newest checkpoint, that of `step`: the fields of Situation.

    `train_end` and `requeue` carry the step of the newest checkpoint at their time.
    """
    mine = [e for e in events if str(e.get("attempt", "")).split("-")[0] == job and e.get("checkpoint") == step]
    ends = [e for e in mine if e["kind"] == "train_end" and e.get("outcome") not in ("finished", "stopped")]
    blamed: dict[str, int] = {}
    for event in ends:
        hosts = event.get("hosts", [])
        if len(hosts) == 1:  # when all go down together, no host is to blame
            blamed[hosts[0]] = blamed.get(hosts[0], 0) + 1
    return {
        "failures": len(ends),
        "requeues": sum(e["kind"] == "requeue" for e in mine),
        "blamed": blamed,
        "not_finite": sum(e.get("outcome") == "not_finite" for e in ends),
    }
