"""Where the time of a whole job went, over all its attempts: steps that count, and what was lost to what.

Told by RUN/events.jsonl and the times in metrics.jsonl. Every stretch of time is claimed by what was going on; where
claims overlap the more particular one has it, and each second is counted once, so the parts add up to the whole. A
step counts if its update is in the weights at the end: what came after the checkpoint that an attempt left behind was
done again and is lost.

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
    "pre-flight": "looking at the nodes",
    "start": "from the start of the processes to the first step: imports, connections, weights",
    "first step": "what it took longer than the others: compilation, memory, connections",
    "redone steps": "after the last checkpoint of an attempt that died, and so done again",
    "save": "training stood still for a checkpoint",
    "validation and samples": "",
    "data wait": "a step's rows were not there yet",
    "hang or crash": "from an attempt's last record until it was over",
    "stop and restart": "from a stop, or the end of an attempt, to the next one",
    "other": "profiling, and what no event tells",
}
"""What time goes to, in the order in which it is shown, with what it means."""

# what is going on after an event, until another says something else
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
_ORDERLY, _OVER = ("stop", "finished"), ("train_end", "start", "train_start", "job_end", "job_start", "requeue")
# what an event says about the seconds before it: the field that counts them, and what they were
_BEFORE = {
    "preflight": ("seconds", "pre-flight"),
    "validated": ("seconds", "validation and samples"),
    "sampled": ("seconds", "validation and samples"),
}


class Claim(NamedTuple):
    """From `start` to `end` (seconds since 1970) the time went to `cause`; the higher `rank` has it."""

    start: float
    end: float
    cause: str
    rank: int


@dataclass(frozen=True)
class Goodput:
    """Seconds."""

    start: float
    """Since 1970: the first thing known of the job."""
    wall: float
    """From there to the last."""
    seconds: dict[str, float]
    """By cause, in the order of CAUSES, those above 0; they add up to `wall`."""
    spans: list[Claim]
    """The same along the time, without gaps or overlaps."""

    @property
    def share(self) -> float:
        """Of the wall time that went to steps that count, 0..1."""
        return self.seconds.get(USEFUL, 0.0) / self.wall if self.wall > 0 else 0.0


def goodput_of(run_dir: str | Path) -> Goodput | None:
    """Goodput of a run folder; None where no attempt is known to have started."""
    run = Path(run_dir)
    files = (run / METRICS_FILE, (run / METRICS_FILE).with_suffix(REDONE + ".jsonl"))
    records = [record for file in files if file.exists() for record in read_metrics(file)]
    return goodput(read_events(run), records)


def goodput(events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> Goodput | None:
    """Goodput from events and log records, of steps that were done again too; in any order."""
    events = sorted(_started_early(events), key=lambda e: e["time"])
    records = sorted((r for r in records if isinstance(r.get("time"), (int, float))), key=lambda r: r["time"])
    if not any(e["kind"] == "start" for e in events):
        return None
    times = [x["time"] for x in (*events, *records)]
    claims = [*_states(events, max(times)), *_steps(events, records), *_particulars(events, records)]
    spans = list(_settled(claims, min(times), max(times)))
    seconds = {cause: sum(s.end - s.start for s in spans if s.cause == cause) for cause in CAUSES}
    found = {cause: x for cause, x in seconds.items() if x > 0}
    return Goodput(min(times), max(times) - min(times), found, spans)


def _started_early(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The events; a `start` counts from when its processes began."""
    for event in events:
        begun = event.get("process_start") if event["kind"] == "start" else None
        yield {**event, "time": min(begun, event["time"])} if begun else event


def _states(events: Sequence[Mapping[str, Any]], end: float) -> Iterator[Claim]:
    """What was going on between the events, where nothing more particular is known."""
    state, since = "other", events[0]["time"]
    for at, event in enumerate(events):
        yield Claim(since, event["time"], state, 0)
        since, kind = event["time"], event["kind"]
        if kind == "ready":  # what the records leave over: how the attempt ended tells what it was
            ends = (e["kind"] for e in events[at + 1 :] if e["kind"] in (*_ORDERLY, *_OVER))
            state = "hang or crash" if next(ends, "stop") in _OVER else "other"
        elif kind == "job_end":
            state = "queue" if state == "queue" else "stop and restart"
        else:
            state = _AFTER.get(kind, state)
    yield Claim(since, end, state, 0)


def _steps(events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    """Each record claims the time since the one before it in the same attempt."""
    begins = [e for e in events if e["kind"] in ("start", "ready")]
    starts = [(e["time"], int(e["step"])) for e in begins if e["kind"] == "start"]
    for since, end in pairwise([*(e["time"] for e in begins), float("inf")]):
        first = [0, *(step for time, step in starts if time <= since)][-1]
        # what a later attempt began behind was done again; a step that two of them repeat is lost twice
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
        elif kind == "saved":  # the event comes when all is written: training stood still at the beginning of that
            begun = now - float(event.get("total_s") or 0)
            yield Claim(begun, begun + float(event.get("blocked_s") or 0), "save", 2)
        elif kind == "first_step":
            yield Claim(now - float(event.get("seconds") or 0), now - usual, "first step", 2)


def _settled(claims: Sequence[Claim], start: float, end: float) -> Iterator[Claim]:
    """The time from `start` to `end` cut where a claim begins or ends, each piece given to its highest claim."""
    real = sorted(c for c in claims if c.end > c.start)
    cuts = sorted({start, end, *(t for c in real for t in (c.start, c.end) if start < t < end)})
    open_claims: list[Claim] = []
    at = 0
    last: Claim | None = None
    for piece, until in pairwise(cuts):
        while at < len(real) and real[at].start <= piece:
            open_claims.append(real[at])
            at += 1
        open_claims = [c for c in open_claims if c.end > piece]
        best = max(open_claims, key=lambda c: (c.rank, c.start), default=None)
        cause = best.cause if best else "other"
        if last is not None and last.cause == cause:
            last = last._replace(end=until)
            continue
        if last is not None:
            yield last
        last = Claim(piece, until, cause, 0)
    if last is not None:
        yield last
