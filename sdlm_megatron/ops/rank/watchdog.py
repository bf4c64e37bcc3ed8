"""One process under watch: its heartbeat, the end of its hangs, and a record of why it ended.

A thread writes where the process stands (heartbeat), and ends the process if it stays there far longer than usual:
all Python stacks go to the attempt's folder first. The last act of a process is its exit record; one that left none
was killed. ops/driver/attempt_summary.py makes one story of all processes' files. The forms of the files:

    exit/rank-N.json        rank, host, local_rank, pid, reason (finished | stopped | error | hang | not_finite |
                            user_error), why, step (last one whose results were read), failed_step (the one that went
                            wrong, or null), rows (of the run, in work), error ("Type: message" or null), ranks (to
                            blame for the error, or null: this one), code, time
    heartbeat/rank-N.json   rank, host, pid, step (in work), phase, since (of the phase), time, rows; at each new step,
                            but once a second at most
    stacks/rank-N.txt       empty unless the process hung or got SIGTERM

Times are seconds since 1970. Nothing here needs torch.
"""

import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdlm_megatron.config.schema import FaultConfig
from sdlm_megatron.errors import ReplicaError, TrainingError, UserError, print_error
from sdlm_megatron.files import write_json
from sdlm_megatron.ops.attempt import rank_file, record_event
from sdlm_megatron.ops.rank.stop import StopRequests

HANG = 75
"""Exit code of a process that hung."""
GRACE = 5.0
"""Seconds from the first sign of a hang to the end of the process: the others write down their stacks too."""
BEHIND = 60.0
"""Seconds after which the interpreter's own timer ends a process whose watching thread cannot run any more."""
STILL = 5.0
"""A pause of the watching thread that is no ordinary one: the process was stopped, or its interpreter blocked."""
REMEMBERED = 100
"""Steps whose usual time is meant."""


class Watch:
    """Watches this process from entering to leaving. Leaving with an error ends the process, at once.

    Destroying process groups after an error can wait for ever, and everybody else waits for this process: so no
    `finally` of what lies above is run, and no thread is waited for.

    Args:
        run_dir: the run's folder; where it cannot be written, training goes on without records.
        settings: the configuration's section `fault`.
        requests: to stop; listening since the start of the process.
    """

    def __init__(self, run_dir: str | Path, settings: FaultConfig, requests: StopRequests) -> None:
        self.run_dir, self.settings, self.requests = Path(run_dir), settings, requests
        self.rank = int(os.environ.get("RANK", 0))
        self.host = host_name()
        self.step, self.done = 0, 0
        """The step in work, and the last one whose results were read."""
        self.rows: list[int] = []
        """Rows of the run in work."""
        self.reason, self.why = "finished", ""
        """What the exit record will say if no error comes."""
        self._phase, self._phase_since = "start", time.time()
        self._clock = (time.monotonic(), settings.start_seconds)
        """Since when the process is at one thing, and how long it may be; replaced as a whole."""
        self._begun = 0
        self._times: deque[float] = deque(maxlen=REMEMBERED)
        self._first = True
        self._stood_still = 0.0
        """Longest pause of the watching thread since the last progress, seconds; 0: none above STILL."""
        self._ended = threading.Event()
        self._recording = threading.Lock()
        self._recorded = False
        self._stacks: Any = None

    # ------------------------------------------------------------------ what the trainer tells

    def at(self, phase: str) -> None:
        """The process begins something that is no step: load, save, validate, sample, end."""
        self._set_phase(phase)
        self._clock = (time.monotonic(), self.settings.start_seconds)

    def begin_step(self, step: int) -> None:
        """The process begins `step`, or hands it to the device."""
        if self._phase not in ("step", "read"):
            self._begun, self._clock = 0, (time.monotonic(), 0.0)
        self._begun += 1
        self.step, self.rows = step, []
        self._set_phase("step")
        self._clock = (self._clock[0], self._allowed())

    def begin_read(self) -> None:
        """The process waits for the device to finish all steps begun."""
        self._set_phase("read")

    def end_read(self) -> None:
        """The steps begun are done."""
        now = time.monotonic()
        if self._first:  # it compiles and connects: no usual time
            self.event("first_step", step=self.step, seconds=now - self._clock[0])
        else:
            self._times.append((now - self._clock[0]) / max(1, self._begun))
        self._first, self._begun, self.done, self._stood_still = False, 0, self.step, 0.0
        self._set_phase("step")
        self._clock = (now, self._allowed())

    def asked_to_stop(self) -> bool:
        """Whether this process was; rank 0 looks for the files too."""
        if self.rank == 0:
            self.requests.look(self.run_dir)
        return self.requests.why is not None

    def event(self, kind: str, **fields: Any) -> None:
        """Rank 0 records an event of the run; see attempt.record_event."""
        if self.rank == 0:
            record_event(self.run_dir, kind, **fields)

    def _set_phase(self, phase: str) -> None:
        self._phase, self._phase_since = phase, time.time()

    def _allowed(self) -> float:
        if not self._times:
            return self.settings.start_seconds
        usual = statistics.median(self._times)
        return max(self.settings.hang_factor * usual * max(1, self._begun), self.settings.hang_min_seconds)

    # ------------------------------------------------------------------ the thread

    def __enter__(self) -> Self:
        for kind in ("exit", "heartbeat", "stacks"):
            with suppress(OSError):
                rank_file(self.run_dir, kind, self.rank).parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            rank_file(self.run_dir, "exit", self.rank).unlink(missing_ok=True)  # of an earlier "local" attempt
        try:
            self._stacks = open(rank_file(self.run_dir, "stacks", self.rank), "w")
        except OSError:
            self._stacks = sys.__stderr__
        faulthandler.enable(all_threads=True)  # a crash inside a library shows where, in the process's log
        # a process that hangs elsewhere than the others is ended by the launcher: its stacks are wanted too
        faulthandler.register(signal.SIGTERM, file=self._stacks, all_threads=True, chain=True)
        self._beat()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def _watch(self) -> None:
        due, tick, told, last = 0.0, min(1.0, self.settings.heartbeat_seconds), 0, time.monotonic()
        while True:
            pause, last = time.monotonic() - last, time.monotonic()
            if pause > STILL:
                self._stood_still = max(self._stood_still, pause)
            if time.monotonic() >= due or (self.rows and self.step != told):
                due, told = time.monotonic() + self.settings.heartbeat_seconds, self.step
                self._beat()
            since, allowed = self._clock
            left = since + allowed - time.monotonic()
            faulthandler.dump_traceback_later(max(left, 0.0) + BEHIND, exit=True, file=self._stacks)
            if left < 0:
                self._hang(allowed)
            if self._ended.wait(tick):
                return

    def _beat(self) -> None:
        file = rank_file(self.run_dir, "heartbeat", self.rank)
        beat = {
            "rank": self.rank,
            "host": self.host,
            "pid": os.getpid(),
            "step": self.step,
            "phase": self._phase,
            "since": self._phase_since,
            "time": time.time(),
            "rows": self.rows,
        }
        partial = file.with_name(file.name + ".partial")
        with suppress(OSError):  # a full disk is no reason to end a run
            partial.write_text(json.dumps(beat))
            os.replace(partial, file)

    def _hang(self, allowed: float) -> None:
        where = f"phase {self._phase}, step {self.step}"
        usual = f", usually {statistics.median(self._times):.1f} s a step" if self._times else ""
        why = f"{where}: no progress for {allowed:.0f} s{usual}"
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        self._record("hang", why, code=HANG, failed_step=self.step, stood_still=self._stood_still)
        print(f"error: rank {self.rank} on {self.host} hangs ({why}); it ends now", file=sys.stderr, flush=True)
        time.sleep(GRACE)
        os._exit(HANG)

    # ------------------------------------------------------------------ the end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._record(self.reason, self.why)
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGTERM)
            return
        code = _exit_code(error)
        reason = {2: "user_error", 3: "not_finite"}.get(code, "error") if isinstance(error, UserError) else "error"
        failed = error.step if isinstance(error, TrainingError) else self.step
        text = f"{type(error).__name__}: {error}"
        ranks = error.ranks if isinstance(error, ReplicaError) else None
        self._record(reason, text.splitlines()[0], code=code, error=text, failed_step=failed, ranks=ranks)
        if isinstance(error, UserError):
            print_error(error)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _record(
        self,
        reason: str,
        why: str,
        *,
        code: int = 0,
        error: str | None = None,
        failed_step: int | None = None,
        ranks: Sequence[int] | None = None,
        stood_still: float = 0.0,
    ) -> None:
        """The first record is kept: what comes after it follows from it."""
        with self._recording:
            if self._recorded:
                return
            self._recorded = True
            record = {
                "rank": self.rank,
                "host": self.host,
                "local_rank": int(os.environ.get("LOCAL_RANK", 0)),
                "pid": os.getpid(),
                "reason": reason,
                "why": why,
                "step": self.done,
                "failed_step": failed_step,
                "rows": self.rows,
                "error": error,
                "ranks": ranks,
                "stood_still": stood_still,
                "code": code,
                "time": time.time(),
            }
            try:
                write_json(rank_file(self.run_dir, "exit", self.rank), record)
            except OSError as problem:
                print(f"the exit record cannot be written: {problem}: {record}", file=sys.stderr, flush=True)


def host_name() -> str:
    """The node's name as the scheduler knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 1
