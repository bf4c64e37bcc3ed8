"""Summary of an attempt that has ended: outcome, cause and culprits, from exit records, heartbeats, stacks and logs.

The job's driver decides by it; an operator reads it as summary.txt. Nothing here needs torch.
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
_EVERY = {"host": str, "rows": list, "time": (int, float)}
_FIELDS: dict[str, dict[str, Any]] = {
    "exit": _EVERY | {"reason": str, "why": str, "step": int, "error": str | None, "ranks": list | None},
    "heartbeat": _EVERY | {"step": int, "phase": str},
}
"""Fields that are read, with their types; a file without them, as one that a full disk has cut, counts as absent."""
LATE_HEARTBEATS = 2.5  # a heartbeat is late when it is this many intervals older than the newest of the attempt
CONNECTION = re.compile(
    r"connection (closed|reset|refused|lost|was)|\bpeer\b|socket|broken pipe|timed? ?out|gloo/transport"
    r"|NCCL (error|comm)|ncclRemoteError|TCPStore|Dist(Network|Store|Backend)Error|recvbytes|sendbytes",
    re.I,
)
"""Errors of a process that lost its connection to another one: a consequence, not a cause."""
OWN = re.compile(
    r"ncclUnhandledCudaError|ncclInvalid|Cuda failure|creating shared memory|No space left|cannot be read: ", re.I
)
"""Errors of NCCL and of a file server that are a process's own all the same. ncclInternalError is not: it also follows
another's end."""
SRUN_LOG = "srun.log"  # output of srun itself, written by the job's driver
SRUN_TASKS = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+)$", re.M)
WAITING = re.compile(r"/torch/distributed/|/p2p_communication\.py|/megatron/core/distributed/")
"""Stack frames of a process that waits for others."""


@dataclass
class Culprit:
    """A process that failed by itself, not because others did."""

    rank: int
    host: str  # "" if it left neither a record nor a heartbeat
    step: int | None  # the step that failed or was in progress
    rows: list[int]  # rows of the run that were in progress; [] if unknown
    why: str
    log: list[str] = field(default_factory=list)  # the last lines of its output


@dataclass
class AttemptSummary:
    """The end of an attempt."""

    outcome: str  # finished | stopped | user_error | not_finite | hang | crash
    why: str  # one line: the reason of a stop, or the first line of an error
    step: int | None  # the last step that is known to be done; of not_finite the step with the value that is not finite
    culprits: list[Culprit]
    hosts: list[str] = field(default_factory=list)  # of the culprits; empty if every one of several hosts has some
    text: str = ""  # the whole summary for an operator


class _AttemptFiles:
    """Records, heartbeats, stacks and logs of an attempt."""

    def __init__(self, run_dir: Path, name: str, ranks: int, heartbeat_seconds: float) -> None:
        self.run_dir, self.name, self.ranks = run_dir, name, range(ranks)
        self.records = self._read("exit")
        self.beats = self._read("heartbeat")
        self.newest = max((b["time"] for b in self.beats.values()), default=0.0)
        limit = self.newest - LATE_HEARTBEATS * heartbeat_seconds
        self.late = {rank for rank, beat in self.beats.items() if beat["time"] < limit}
        self.silent = [rank for rank in self.ranks if rank not in self.records]  # ranks without an exit record

    def _read(self, kind: str) -> dict[int, dict[str, Any]]:
        contents = {}
        for rank in self.ranks:
            try:
                content = json.loads(rank_file(self.run_dir, kind, rank, self.name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(content, dict) and all(
                isinstance(content.get(key), types) and not isinstance(content.get(key), bool)
                for key, types in _FIELDS[kind].items()
            ):
                contents[rank] = content
        return contents

    def text_of(self, kind: str, rank: int) -> str:
        return _text_in(rank_file(self.run_dir, kind, rank, self.name))

    def ranks_with(self, reason: str) -> list[int]:
        """Ranks whose exit record has this reason, the earliest first."""
        ranks = [rank for rank, record in self.records.items() if record["reason"] == reason]
        return sorted(ranks, key=lambda rank: self.records[rank]["time"])

    def vanished(self) -> list[int]:
        """Silent ranks that were gone before the others ended; not those that the launcher killed afterwards."""
        return [r for r in self.silent if r in self.late or r not in self.beats]

    def culprit(self, rank: int, why: str = "") -> Culprit:
        record, beat = self.records.get(rank, {}), self.beats.get(rank, {})
        known = record or beat
        step = record.get("failed_step") if record else beat.get("step")
        log = self.text_of("log", rank).splitlines()[-LOG_LINES:]
        text = why or record.get("error") or record.get("why", "")
        return Culprit(rank, known.get("host", ""), step, known.get("rows", []), text, log)

    def dead_culprit(self, rank: int) -> Culprit:
        """A culprit without an exit record."""
        beat = self.beats.get(rank)
        last_seen = (
            f"last heartbeat {max(0.0, self.newest - beat['time']):.0f} s before the newest of the attempt, in "
            f"phase {beat['phase']} of step {beat['step']}"
            if beat
            else "no heartbeat"
        )
        reported = self.srun_report(rank)
        why = f"srun reports: {reported}" if reported else "killed by a signal, cut off, or its node was lost"
        culprit = self.culprit(rank, f"no exit record: {why}; {last_seen}")
        # The dead process's heartbeat may be of an earlier step than the one in which the others lost it.
        step = max((r["failed_step"] or 0 for r in self.records.values()), default=0)
        if culprit.step is not None and culprit.step < step:
            culprit.step, culprit.rows = step, []
        return culprit

    def srun_report(self, rank: int) -> str:
        """End of a task as srun reports it, such as "Killed" or "Exited with exit code 42"; "" if it does not."""
        for tasks, report in SRUN_TASKS.findall(_text_in(attempt_dir(self.run_dir, self.name) / SRUN_LOG)):
            spans = [[int(n) for n in span.split("-")] for span in tasks.split(",")]
            if any(span[0] <= rank <= span[-1] for span in spans):
                return str(report)
        return ""


def summarize(
    run_dir: str | Path, attempt: str, expected_ranks: int, *, heartbeat_seconds: float = 10.0
) -> AttemptSummary:
    """Reads the files of an attempt that has ended, and writes summary.txt and summary.json beside them.

    Args:
        run_dir: folder of the run.
        attempt: name of the attempt (SDLM_ATTEMPT).
        expected_ranks: number of processes that were started.
        heartbeat_seconds: the run's setting fault.heartbeat_seconds.
    """
    files = _AttemptFiles(Path(run_dir), attempt, expected_ranks, heartbeat_seconds)
    summary = _judge(files)
    if summary.outcome in ("crash", "hang"):
        all_hosts = {known["host"] for known in (files.beats | files.records).values()}
        hosts = {c.host for c in summary.culprits if c.host}
        summary.hosts = sorted(hosts) if len(all_hosts) == 1 or hosts != all_hosts else []
    summary.text = _text(summary, files)
    folder = attempt_dir(run_dir, attempt)
    with suppress(OSError):  # on a full disk the driver still needs the result
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "summary.txt", summary.text)
        write_json(folder / "summary.json", asdict(summary))
    return summary


def _judge(files: _AttemptFiles) -> AttemptSummary:
    done = max((r["step"] for r in files.records.values()), default=None)
    reasons = Counter(r["reason"] for r in files.records.values())
    for reason in ("finished", "stopped"):
        if reasons[reason] == len(files.ranks):
            whys = [r["why"] for r in files.records.values() if r["why"]]
            return AttemptSummary(reason, next(iter(whys), ""), done, [])
    for reason in ("not_finite", "user_error"):
        if ranks := files.ranks_with(reason):
            first = files.culprit(ranks[0])
            step = first.step if reason == "not_finite" else done
            return AttemptSummary(reason, first.why.splitlines()[0], step, [first])
    if not files.records and (culprit := _early_error(files)):
        return AttemptSummary("user_error", culprit.why, None, [culprit])
    if not reasons["hang"]:
        culprits = _crash_culprits(files)
        return AttemptSummary("crash", culprits[0].why.splitlines()[0] if culprits else "no trace", done, culprits)
    why = files.culprit(files.ranks_with("hang")[0]).why
    return AttemptSummary("hang", why, done, _hang_culprits(files))


def _early_error(files: _AttemptFiles) -> Culprit | None:
    """A user error before the run folder was known, as one in the configuration: only the log has it."""
    for rank in files.ranks:
        culprit = files.culprit(rank)
        errors = [line for line in culprit.log if line.startswith("error: ")]
        if errors and not any("Traceback" in line for line in culprit.log):
            culprit.why = errors[-1].removeprefix("error: ")
            return culprit
    return None


def _crash_culprits(files: _AttemptFiles) -> list[Culprit]:
    """Ranks with an error of their own; without any, those that died silently, gone before the others ended."""
    texts = {r: files.records[r]["error"] or "" for r in files.ranks_with("error")}
    errors = [r for r, text in texts.items() if OWN.search(text) or not CONNECTION.search(text)]
    if blamed := next((ranks for r in errors if (ranks := files.records[r].get("ranks"))), None):
        return [files.culprit(r) for r in blamed]
    if errors:
        return [files.culprit(r) for r in errors]
    if not files.silent:  # every rank lost a connection and none died: the network between them
        return [files.culprit(r) for r in list(texts)[:1]]
    return [files.dead_culprit(r) for r in files.vanished() or files.silent]


def _hang_culprits(files: _AttemptFiles) -> list[Culprit]:
    """Ranks that kept the others waiting: cut off, stopped, or at another place in the code."""
    if vanished := files.vanished():
        return [files.dead_culprit(r) for r in vanished]
    if still := {r: s for r in files.ranks_with("hang") if (s := files.records[r].get("stood_still"))}:
        why = "did not run for {:.0f} s while the others waited: stopped, or its interpreter was blocked"
        return [files.culprit(r, why.format(seconds)) for r, seconds in still.items()]
    stacks = {r: text for r in files.ranks if (text := files.text_of("stacks", r)).strip()}
    places = {r: main_stack(text) for r, text in stacks.items()}
    elsewhere = [r for r, stack in places.items() if stack and not any(WAITING.search(line) for line in stack[:4])]
    # On a GPU every rank waits for its device, not for others: then the rank at an unusual place is the culprit.
    if len(elsewhere) == len(places):
        usual = Counter(tuple(stack[:4]) for stack in places.values()).most_common(1)
        elsewhere = [r for r in elsewhere if usual and tuple(places[r][:4]) != usual[0][0]]
    culprits = [files.culprit(r, f"is at another place than the others: {places[r][0].strip()}") for r in elsewhere]
    if not culprits:
        last = min((b["step"] for b in files.beats.values()), default=0)
        behind = [r for r, b in files.beats.items() if b["step"] == last]
        if 0 < len(behind) < len(files.beats):
            culprits = [files.culprit(r, f"still in step {last}") for r in behind]
    return culprits


def main_stack(text: str) -> list[str]:
    """Frames of the main thread in a dump of faulthandler, innermost first; of the last dump if there are several."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.M)[1:]
    for thread in reversed(threads):
        lines = [line for line in thread.splitlines() if line.startswith("  File ")]
        if (lines and lines[-1].endswith("in <module>")) or any("_run_module_as_main" in line for line in lines):
            return lines
    return []


def _text(summary: AttemptSummary, files: _AttemptFiles) -> str:
    reasons = Counter(r["reason"] for r in files.records.values())
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    lines = [
        f"attempt {files.name}: {summary.outcome}" + (f": {summary.why}" if summary.why else ""),
        f"  {len(files.ranks)} processes: {counts or 'no exit records'}"
        + (f"; no exit record from {_short(files.silent)}" if files.silent else ""),
        f"  last step done: {max((r['step'] for r in files.records.values()), default='unknown')}",
    ]
    for culprit in summary.culprits[:8]:
        lines += [
            f"rank {culprit.rank} on {culprit.host or 'an unknown host'}, step {culprit.step}, rows {culprit.rows}:",
            *(f"  {line}" for line in culprit.why.splitlines()),
        ]
        if culprit.log:
            lines += ["  the last lines of its output:", *(f"    | {line}" for line in culprit.log)]
    if more := summary.culprits[8:]:
        lines.append(f"and {_short([c.rank for c in more])}")
    errors = files.ranks_with("error")
    if errors and not any(culprit.rank in files.records for culprit in summary.culprits):
        first = files.culprit(errors[0])  # a consequence, or a cause that its text does not show
        lines.append(f"first error on record, of rank {first.rank} on {first.host}:")
        lines += [f"  {line}" for line in first.why.splitlines()]
    return "\n".join(lines) + "\n"


def _text_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _short(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return f"{len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'} ({shown}{', …' if len(ranks) > 16 else ''})"
