"""Goodput of a whole job over all its attempts: seconds of steps that count, and seconds lost per cause.

Computed from RUN/events.jsonl and the times in metrics.jsonl. Each activity claims a span of time; where claims overlap
the more specific one wins, and each second counts once, so the parts add up to the whole. A step counts if its update
is in the final weights: steps after the checkpoint from which the next attempt starts are done again, and lost.

A job without a driver has fewer events: the time between two of its attempts then counts as the end of the first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sdlm_megatron.metrics.sinks import METRICS_FILE, REDONE, read_metrics
from sdlm_megatron.ops.attempt import read_events

USEFUL = "steps that count"
CAUSES = {
    USEFUL: "",
    "queue": "waiting for nodes, between a requeue and the next start of the job",
    "pre-flight": "checks of the nodes",
    "start": "from the start of the processes to the first step: imports, connections, weights",
    "first step": "its time above that of a usual step: compilation, memory, connections",
    "redone steps": "steps after the last checkpoint of a failed attempt, done again by the next one",
    "save": "training waited for a checkpoint",
    "validation and samples": "",
    "data wait": "training waited for the rows of a step",
    "hang or crash": "from the last record of a failed attempt to its end",
    "stop and restart": "from a stop, or the end of an attempt, to the next one",
    "other": "profiling, and time that no event explains",
}
"""Causes in the order of the report, with their explanations."""

# Activity that begins with an event and lasts until the next one.
_AFTER = {
    "job_start": "pre-flight",
    "preflight": "start",
    "train_start": "start",
    "start": "start",
    "stop": "stop and restart",
    "finished": "stop and restart",
    "train_end": "stop and restart",
    "requeue": "queue",
}
# Events that end an attempt in order, and those that show that it had ended without one.
_ORDERLY, _OVER = ("stop", "finished"), ("train_end", "start", "train_start", "job_end", "job_start", "requeue")
# Activities that end with an event: the field with their duration, and the cause.
_BEFORE = {
    "preflight": ("seconds", "pre-flight"),
    "validated": ("seconds", "validation and samples"),
    "sampled": ("seconds", "validation and samples"),
}


class Claim(NamedTuple):
    """Time from `start` to `end` (seconds since 1970) claimed by `cause`; the claim of the highest `rank` wins."""

    start: float
    end: float
    cause: str
    rank: int


@dataclass(frozen=True)
class Goodput:
    """Times of a job, in seconds."""

    start: float  # time of the first event or record, since 1970
    wall: float  # time from the first to the last event or record
    seconds: dict[str, float]  # time per cause, in the order of CAUSES, without zeros; the sum is `wall`
    spans: list[Claim]  # the same in the order of time, without gaps or overlaps

    @property
    def share(self) -> float:
        """Fraction of the wall time in steps that count, 0..1."""
        return self.seconds.get(USEFUL, 0.0) / self.wall if self.wall > 0 else 0.0


def goodput_of(run_dir: str | Path) -> Goodput | None:
    """Goodput of a run folder; None if no attempt has started, or no time has passed since."""
    run = Path(run_dir)
    files = (run / METRICS_FILE, (run / METRICS_FILE).with_suffix(REDONE + ".jsonl"))
    records = [record for file in files if file.exists() for record in read_metrics(file)]
    return goodput(read_events(run), records)


def goodput(events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> Goodput | None:
    """Goodput from events and log records, including those of redone steps; in any order."""
    events = sorted(_started_early(events), key=lambda e: e["time"])
    records = sorted((r for r in records if isinstance(r.get("time"), (int, float))), key=lambda r: r["time"])
    if not any(e["kind"] == "start" for e in events):
        return None
    times = [x["time"] for x in (*events, *records)]
    if min(times) == max(times):
        return None
    claims = [*_states(events, max(times)), *_steps(events, records), *_particulars(events, records)]
    spans = list(_settled(claims, min(times), max(times)))
    seconds = {cause: sum(s.end - s.start for s in spans if s.cause == cause) for cause in CAUSES}
    spent = {cause: x for cause, x in seconds.items() if x > 0}
    return Goodput(min(times), max(times) - min(times), spent, spans)


def _started_early(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The events; a `start` is moved to the start of its processes."""
    for event in events:
        begun = event.get("process_start") if event["kind"] == "start" else None
        yield {**event, "time": min(begun, event["time"])} if begun else event


def _states(events: Sequence[Mapping[str, Any]], end: float) -> Iterator[Claim]:
    """Activities between events: rank 0, for times without a more specific claim."""
    state, since = "other", events[0]["time"]
    for at, event in enumerate(events):
        yield Claim(since, event["time"], state, 0)
        since, kind = event["time"], event["kind"]
        if kind == "ready":  # time without records: the way the attempt ended tells its cause
            ends = (e["kind"] for e in events[at + 1 :] if e["kind"] in (*_ORDERLY, *_OVER))
            state = "hang or crash" if next(ends, "stop") in _OVER else "other"
        elif kind == "job_end":
            state = "queue" if state == "queue" else "stop and restart"
        else:
            state = _AFTER.get(kind, state)
    yield Claim(since, end, state, 0)


def _steps(events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    """Each record claims the time since the previous one of the same attempt."""
    begins = [e for e in events if e["kind"] in ("start", "ready")]
    starts = [(e["time"], int(e["step"])) for e in begins if e["kind"] == "start"]
    for since, end in pairwise([*(e["time"] for e in begins), float("inf")]):
        first = [0, *(step for time, step in starts if time <= since)][-1]
        # Steps after the start of a later attempt were done again; a step that two attempts repeat is lost twice.
        limit = min((step for time, step in starts if time > since), default=float("inf"))
        for record in (r for r in records if since <= r["time"] < end):
            now, steps = record["time"], max(1, int(record["step"]) - first)
            middle = since + (now - since) * min(max(limit - first, 0), steps) / steps
            yield Claim(since, middle, USEFUL, 1)
            yield Claim(middle, now, "redone steps", 1)
            yield Claim(now - steps * float(record.get("data_wait") or 0), now, "data wait", 3)
            since, first = now, int(record["step"])


def _particulars(events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    usual = median([r["step_time"] for r in records if r.get("step_time")] or [0.0])
    for event in events:
        now, kind = event["time"], event["kind"]
        if kind in _BEFORE:
            field, cause = _BEFORE[kind]
            yield Claim(now - float(event.get(field) or 0), now, cause, 2)
        elif kind == "saved":  # comes when all is written; training waited only at the beginning
            begun = now - float(event.get("total_s") or 0)
            yield Claim(begun, begun + float(event.get("blocked_s") or 0), "save", 2)
        elif kind == "first_step":
            yield Claim(now - float(event.get("seconds") or 0), now - usual, "first step", 2)


def _settled(claims: Sequence[Claim], start: float, end: float) -> Iterator[Claim]:
    """The time from `start` to `end`, cut where a claim begins or ends; each span belongs to its highest claim."""
    real = sorted(c for c in claims if c.end > c.start)
    cuts = sorted({start, end, *(t for c in real for t in (c.start, c.end) if start < t < end)})
    open_claims: list[Claim] = []
    at = 0
    last: Claim | None = None
    for since, until in pairwise(cuts):
        while at < len(real) and real[at].start <= since:
            open_claims.append(real[at])
            at += 1
        open_claims = [c for c in open_claims if c.end > since]
        best = max(open_claims, key=lambda c: (c.rank, c.start), default=None)
        cause = best.cause if best else "other"
        if last is not None and last.cause == cause:
            last = last._replace(end=until)
            continue
        if last is not None:
            yield last
        last = Claim(since, until, cause, 0)
    if last is not None:
        yield last
