"""What became of an attempt: one story out of the exit records, heartbeats, stacks and logs of its processes.

The job's driver decides by it, a person reads it. Nothing here needs torch.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdlm_megatron.files import write_json, write_text
from sdlm_megatron.ops.attempt import attempt_dir, rank_file

LOG_LINES = 20
LATE = 2.5
"""A heartbeat is old when the newest of the attempt is so many times fault.heartbeat_seconds younger."""
CONNECTION = re.compile(
    r"connection (closed|reset|refused|lost|was)|\bpeer\b|socket|broken pipe|timed? ?out|gloo/transport"
    r"|NCCL (error|comm)|ncclRemoteError|TCPStore|Dist(Network|Store|Backend)Error|recvbytes|sendbytes",
    re.I,
)
"""What a process says that lost another one."""
SRUN_LOG = "srun.log"
"""What srun itself said, written by the job's driver."""
SRUN_TASKS = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+)$", re.M)
WAITING = re.compile(r"/torch/distributed/|/p2p_communication\.py|/megatron/core/distributed/")


@dataclass
class Culprit:
    """A process that failed by itself, not because others did."""

    rank: int
    host: str
    """"" where it left neither record nor heartbeat."""
    step: int | None
    """The step that failed or was in work."""
    rows: list[int]
    """Rows of the run it had in work; [] where that is not known."""
    why: str
    log: list[str] = field(default_factory=list)
    """The last lines it printed."""


@dataclass
class Summary:
    """The end of an attempt."""

    outcome: str
    """finished | stopped | user_error | not_finite | hang | crash."""
    why: str
    """One line; of a stop its reason, of an error its first line."""
    step: int | None
    """The last step that is known to be done; of not_finite the step that was not."""
    culprits: list[Culprit]
    hosts: list[str] = field(default_factory=list)
    """Hosts that a crash or a hang is put down to; none where all of several have culprits."""
    text: str = ""
    """All of it, for a person."""


class _Attempt:
    """The files of an attempt."""

    def __init__(self, run_dir: Path, name: str, ranks: int, heartbeat_seconds: float) -> None:
        self.run_dir, self.name, self.ranks = run_dir, name, range(ranks)
        self.records = self._read("exit")
        self.beats = self._read("heartbeat")
        self.newest = max((b["time"] for b in self.beats.values()), default=0.0)
        self.old = {r for r, b in self.beats.items() if b["time"] < self.newest - LATE * heartbeat_seconds}
        self.silent = [r for r in self.ranks if r not in self.records]
        """Ranks without a record."""

    def _read(self, kind: str) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in self.ranks:
            try:
                content = json.loads(rank_file(self.run_dir, kind, rank, self.name).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(content, dict):
                found[rank] = content
        return found

    def text_of(self, kind: str, rank: int) -> str:
        try:
            return rank_file(self.run_dir, kind, rank, self.name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def of_reason(self, reason: str) -> list[int]:
        """Ranks whose record gives this reason, the earliest first."""
        return sorted((r for r, x in self.records.items() if x["reason"] == reason), key=self._time)

    def _time(self, rank: int) -> float:
        return self.records[rank]["time"]

    def culprit(self, rank: int, why: str = "") -> Culprit:
        record, beat = self.records.get(rank, {}), self.beats.get(rank, {})
        known = record or beat
        step = record.get("failed_step") if record else beat.get("step")
        log = self.text_of("log", rank).splitlines()[-LOG_LINES:]
        text = why or record.get("error") or record.get("why", "")
        return Culprit(rank, known.get("host", ""), step, known.get("rows", []), text, log)

    def died(self, rank: int) -> Culprit:
        beat = self.beats.get(rank)
        seen = (
            f"last seen {max(0.0, self.newest - beat['time']):.0f} s before the last sign of life of the attempt, in "
            f"phase {beat['phase']} of step {beat['step']}"
            if beat
            else "never seen"
        )
        known = self.said_by_srun(rank)
        why = f"srun says: {known}" if known else "killed by a signal, cut off, or its node was lost"
        culprit = self.culprit(rank, f"left no exit record: {why}; {seen}")
        if culprit.step is not None and culprit.step < self.in_work():
            culprit.step, culprit.rows = self.in_work(), []
        return culprit

    def said_by_srun(self, rank: int) -> str:
        """How a task ended, such as "Killed", "Out Of Memory", "Exited with exit code 42"; "" if srun did not say."""
        try:
            text = (attempt_dir(self.run_dir, self.name) / SRUN_LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        for tasks, said in SRUN_TASKS.findall(text):
            spans = [[int(n) for n in span.split("-")] for span in tasks.split(",")]
            if any(span[0] <= rank <= span[-1] for span in spans):
                return str(said)
        return ""

    def in_work(self) -> int:
        """The step that those who lost a process were in; a dead process's heartbeat may be older."""
        return max((r["failed_step"] or 0 for r in self.records.values()), default=0)


def summarize(run_dir: str | Path, attempt: str, expected_ranks: int, *, heartbeat_seconds: float = 10.0) -> Summary:
    """Reads the files of an attempt that has ended, and writes summary.txt and summary.json beside them.

    Args:
        run_dir: the run.
        attempt: its name, of SDLM_ATTEMPT.
        expected_ranks: processes that were started.
        heartbeat_seconds: the run's setting fault.heartbeat_seconds.
    """
    found = _Attempt(Path(run_dir), attempt, expected_ranks, heartbeat_seconds)
    summary = _judge(found)
    if summary.outcome in ("crash", "hang"):
        everywhere = {known["host"] for known in (found.beats | found.records).values()}
        hosts = {c.host for c in summary.culprits if c.host}
        summary.hosts = sorted(hosts) if len(everywhere) == 1 or hosts != everywhere else []
    summary.text = _text(summary, found)
    folder = attempt_dir(run_dir, attempt)
    with suppress(OSError):  # on a full disk the driver still has to know
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "summary.txt", summary.text)
        write_json(folder / "summary.json", asdict(summary))
    return summary


def _judge(found: _Attempt) -> Summary:
    done = max((r["step"] for r in found.records.values()), default=None)
    reasons = Counter(r["reason"] for r in found.records.values())
    for reason in ("finished", "stopped"):
        if reasons[reason] == len(found.ranks):
            whys = [r["why"] for r in found.records.values() if r["why"]]
            return Summary(reason, next(iter(whys), ""), done, [])
    for reason in ("not_finite", "user_error"):
        if ranks := found.of_reason(reason):
            first = found.culprit(ranks[0])
            return Summary(reason, first.why.splitlines()[0], first.step if reason == "not_finite" else done, [first])
    if not found.records and (said := _said_before_the_start(found)):
        return Summary("user_error", said.why, None, [said])
    if not reasons["hang"]:
        culprits = _crashed(found)
        return Summary("crash", culprits[0].why.splitlines()[0] if culprits else "no trace", done, culprits)
    why = found.culprit(found.of_reason("hang")[0]).why
    return Summary("hang", why, done, _hung(found))


def _said_before_the_start(found: _Attempt) -> Culprit | None:
    """An error in the configuration: said before the run folder was known, so without a record."""
    for rank in found.ranks:
        culprit = found.culprit(rank)
        said = [line for line in culprit.log if line.startswith("error: ")]
        if said and not any("Traceback" in line for line in culprit.log):
            culprit.why = said[-1].removeprefix("error: ")
            return culprit
    return None


def _crashed(found: _Attempt) -> list[Culprit]:
    """An error of its own is the cause; without one, those who died in silence, the longest silent first."""
    errors = [r for r in found.of_reason("error") if not CONNECTION.search(found.records[r]["error"] or "")]
    if blamed := next((ranks for r in errors if (ranks := found.records[r].get("ranks"))), None):
        return [found.culprit(r) for r in blamed]
    if errors:
        return [found.culprit(r) for r in errors]
    if not found.silent:  # all lost somebody, who had nothing to say: a network between them
        return [found.culprit(r) for r in found.of_reason("error")[:1]]
    longest = [r for r in found.silent if r in found.old or r not in found.beats]
    return [found.died(r) for r in longest or found.silent]


def _hung(found: _Attempt) -> list[Culprit]:
    """Who kept the others waiting: cut off, or in a place of its own."""
    if frozen := [r for r in found.silent if r in found.old or r not in found.beats]:
        return [found.died(r) for r in frozen]
    if still := {r: s for r in found.of_reason("hang") if (s := found.records[r].get("stood_still"))}:
        why = "stood still for {:.0f} s while the others waited: stopped, or its interpreter blocked"
        return [found.culprit(r, why.format(seconds)) for r, seconds in still.items()]
    stacks = {r: text for r in found.ranks if (text := found.text_of("stacks", r)).strip()}
    places = {r: main_stack(text) for r, text in stacks.items()}
    elsewhere = [r for r, stack in places.items() if stack and not any(WAITING.search(line) for line in stack[:4])]
    if len(elsewhere) == len(places):  # on a GPU all wait for the device: the place that is not the others'
        usual = Counter(tuple(stack[:4]) for stack in places.values()).most_common(1)
        elsewhere = [r for r in elsewhere if usual and tuple(places[r][:4]) != usual[0][0]]
    culprits = []
    for rank in elsewhere:
        top = places[rank][0].strip()
        culprits.append(found.culprit(rank, f"is elsewhere than the others: {top}"))
    if not culprits:
        last = min((b["step"] for b in found.beats.values()), default=0)
        behind = [r for r, b in found.beats.items() if b["step"] == last]
        if 0 < len(behind) < len(found.beats):
            culprits = [found.culprit(r, f"still in step {last}") for r in behind]
    return culprits


def main_stack(text: str) -> list[str]:
    """Lines of the main thread in a dump of faulthandler, innermost first; of the last dump if there are several."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.M)[1:]
    for thread in reversed(threads):
        lines = [line for line in thread.splitlines() if line.startswith("  File ")]
        if (lines and lines[-1].endswith("in <module>")) or any("_run_module_as_main" in line for line in lines):
            return lines
    return []


def _text(summary: Summary, found: _Attempt) -> str:
    reasons = Counter(r["reason"] for r in found.records.values())
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    lines = [
        f"attempt {found.name}: {summary.outcome}" + (f": {summary.why}" if summary.why else ""),
        f"  {len(found.ranks)} processes: {counts or 'no records'}"
        + (f"; no record of {_short(found.silent)}" if found.silent else ""),
        f"  last step done: {max((r['step'] for r in found.records.values()), default='unknown')}",
    ]
    for culprit in summary.culprits[:8]:
        lines += [
            f"rank {culprit.rank} on {culprit.host or 'an unknown host'}, step {culprit.step}, rows {culprit.rows}:",
            *(f"  {line}" for line in culprit.why.splitlines()),
        ]
        if culprit.log:
            lines += ["  the last it printed:", *(f"    | {line}" for line in culprit.log)]
    if more := summary.culprits[8:]:
        lines.append(f"and {_short([c.rank for c in more])}")
    return "\n".join(lines) + "\n"


def _short(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return f"{len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'} ({shown}{', …' if len(ranks) > 16 else ''})"
