"""Watchdog of one process: its heartbeat, the end of hangs, and an exit record with the reason of its end.

A thread writes the heartbeat, and ends the process if it stays at one place far longer than usual, after writing all
Python stacks. A process that leaves no exit record was killed. ops/driver/attempt_summary.py reads the files:

    exit/rank-N.json        rank, host, local_rank, pid, reason (finished | stopped | error | hang | not_finite |
                            user_error), why, step (last one whose results were read), failed_step (or null), rows (of
                            the run, in progress), error ("Type: message" or null), ranks (that caused the error, or
                            null: this one), stood_still (seconds), code, time
    heartbeat/rank-N.json   rank, host, pid, step (in progress), phase, since (start of the phase), time, rows; at each
                            new step, at most once per second
    stacks/rank-N.txt       empty unless the process hung or got SIGTERM
    nccl-trace-N            torch's record of the last collectives, if the process hung

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
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdlm_megatron.config.schema import FaultConfig
from sdlm_megatron.config.validate import process_number
from sdlm_megatron.errors import ReplicaError, TrainingError, UserError, print_error
from sdlm_megatron.files import write_json
from sdlm_megatron.ops.attempt import attempt_dir, rank_file, record_event
from sdlm_megatron.ops.rank.owner import RunOwner
from sdlm_megatron.ops.rank.stop import StopRequests

HANG = 75  # exit code of a process that hung
GRACE = 5.0
"""Seconds from the detection of a hang to the end of the process, in which the other ranks write their stacks too."""
BEHIND = 60.0
"""Seconds after the deadline at which the interpreter's timer ends a process whose watchdog thread cannot run."""
STILL = 5.0  # seconds without the watchdog thread running that mean the process was stopped or its interpreter blocked
STEP_TIMES = 100  # number of steps that define the usual step time


class Watch:
    """Watches this process from entering to leaving the context. Leaving with an error ends the process at once.

    Destroying process groups after an error can block for ever while all other ranks wait for this one. So no `finally`
    of the callers runs, and no thread is joined.

    Args:
        run_dir: folder of the run. If it is not writable, training continues without records.
        settings: the section `fault` of the configuration.
        requests: stop requests, listening since the start of the process.
        owner: of the run folder, on rank 0: kept alive here, and released at the end.
    """

    def __init__(
        self, run_dir: str | Path, settings: FaultConfig, requests: StopRequests, owner: RunOwner | None = None
    ) -> None:
        self.run_dir, self.settings, self.requests, self.owner = Path(run_dir), settings, requests, owner
        self.rank, self.local_rank = process_number("RANK", 0), process_number("LOCAL_RANK", 0)
        self.host = host_name()
        self.step, self.done = 0, 0  # the step in progress, and the last one whose results were read
        self.rows: list[int] = []  # rows of the run in progress
        self.reason, self.why = "finished", ""  # reason for the exit record if no error occurs
        self._phase, self._phase_since = "start", time.time()
        # Start of the current activity and its time limit. One tuple, so that the thread never sees half of a change.
        self._clock = (time.monotonic(), settings.start_seconds)
        self._begun = 0
        self._times: deque[float] = deque(maxlen=STEP_TIMES)
        self._first_seconds = 0.0  # of the first step; 0: it is not done
        self._stood_still = 0.0
        """Longest pause of the watchdog thread since the last progress, in seconds; 0: none above STILL."""
        self._ended = threading.Event()
        self._recording = threading.Lock()
        self._recorded = False
        self._stacks: Any = None

    # ------------------------------------------------------------------ calls of the trainer

    def at(self, phase: str) -> None:
        """Begins an activity other than a step: load, save, validate, sample, end."""
        self._set_phase(phase)
        self._clock = (time.monotonic(), self.settings.start_seconds)

    def begin_step(self, step: int) -> None:
        """Begins `step`, or its submission to the device."""
        since = self._clock[0]
        if self._phase not in ("step", "read"):
            self._begun, since = 0, time.monotonic()
        self._begun += 1
        self.step, self.rows = step, []
        self._set_phase("step")
        self._clock = (since, self._allowed())

    def begin_read(self) -> None:
        """Begins to wait for the results of all steps begun."""
        self._set_phase("read")

    def end_read(self) -> None:
        """All steps begun are done."""
        now = time.monotonic()
        if not self._first_seconds:  # includes compilation and connections, so it is not the usual time
            self._first_seconds = now - self._clock[0]
            self.event("first_step", step=self.step, seconds=self._first_seconds)
        else:
            self._times.append((now - self._clock[0]) / max(1, self._begun))
        self._begun, self.done, self._stood_still = 0, self.step, 0.0
        self._set_phase("step")
        self._clock = (now, self._allowed())

    def asked_to_stop(self) -> bool:
        """Whether this process got a stop request; rank 0 looks for the files too."""
        if self.rank == 0:
            self.requests.look(self.run_dir)
        return self.requests.why is not None

    def event(self, kind: str, **fields: Any) -> None:
        """Records an event of the run, on rank 0 only; see attempt.record_event."""
        if self.rank == 0:
            record_event(self.run_dir, kind, **fields)

    def _set_phase(self, phase: str) -> None:
        self._phase, self._phase_since = phase, time.time()

    def _allowed(self) -> float:
        if not self._times:  # the second read comes with the first log record, several steps after the first
            return self.settings.start_seconds + self._first_seconds * self._begun
        usual = statistics.median(self._times)
        return max(self.settings.hang_factor * usual * max(1, self._begun), self.settings.hang_min_seconds)

    # ------------------------------------------------------------------ the thread

    def __enter__(self) -> Self:
        for kind in ("exit", "heartbeat", "stacks"):
            with suppress(OSError):
                rank_file(self.run_dir, kind, self.rank).parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            rank_file(self.run_dir, "exit", self.rank).unlink(missing_ok=True)  # of an earlier attempt called "local"
        try:
            self._stacks = open(rank_file(self.run_dir, "stacks", self.rank), "w", encoding="utf-8")
        except OSError:
            self._stacks = sys.__stderr__
        faulthandler.enable(all_threads=True)  # the log shows where a library crashed
        # The launcher ends a process that hangs at another place than the others with SIGTERM: keep its stacks too.
        faulthandler.register(signal.SIGTERM, file=self._stacks, all_threads=True, chain=True)
        self._beat()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def _watch(self) -> None:
        due, tick, reported, last = 0.0, min(1.0, self.settings.heartbeat_seconds), 0, time.monotonic()
        while True:
            pause, last = time.monotonic() - last, time.monotonic()
            if pause > STILL:
                self._stood_still = max(self._stood_still, pause)
            if time.monotonic() >= due or (self.rows and self.step != reported):
                due, reported = time.monotonic() + self.settings.heartbeat_seconds, self.step
                self._beat()
            if self.owner is not None and not self.owner.beat():
                self._replaced()
            since, allowed = self._clock
            left = since + allowed - time.monotonic()
            # Armed anew at each tick: it fires only if this thread stops running, as when a C extension holds the GIL.
            faulthandler.dump_traceback_later(max(left, 0.0) + BEHIND, exit=True, file=self._stacks)
            if left < 0:
                self._hang(allowed)
            if self._ended.wait(tick):
                return

    def _beat(self) -> None:
        file = rank_file(self.run_dir, "heartbeat", self.rank)
        beat = {**self._state(), "step": self.step, "phase": self._phase, "since": self._phase_since}
        partial = file.with_name(file.name + ".partial")
        # Without fsync: a heartbeat that is lost with its node is no loss. A full disk must not end the run.
        with suppress(OSError):
            partial.write_text(json.dumps(beat), encoding="utf-8")
            os.replace(partial, file)

    def _state(self) -> dict[str, Any]:
        return {"rank": self.rank, "host": self.host, "pid": os.getpid(), "rows": self.rows, "time": time.time()}

    def _hang(self, allowed: float) -> None:
        place = f"phase {self._phase}, step {self.step}"
        usual = f", usually {statistics.median(self._times):.1f} s per step" if self._times else ""
        why = f"{place}: no progress for {allowed:.0f} s{usual}"
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        self._record("hang", why, code=HANG, failed_step=self.step, stood_still=self._stood_still)
        print(f"error: rank {self.rank} on {self.host} hangs ({why}); exiting", file=sys.stderr, flush=True)
        with suppress(Exception):  # best effort; should it block, the interpreter's timer ends the process
            write_collectives(attempt_dir(self.run_dir) / f"nccl-trace-{self.rank}")
        time.sleep(GRACE)
        os._exit(HANG)

    def _replaced(self) -> None:
        """Ends the process at once: nothing more may be written to the run folder."""
        error = "another training has taken over the run folder"
        self._record("user_error", error, code=2, error=error, failed_step=self.step)
        print(f"error: {error}\n  where: {self.run_dir}", file=sys.stderr, flush=True)
        os._exit(2)

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

    def _record(self, reason: str, why: str, *, code: int = 0, **details: Any) -> None:
        """Writes the exit record. Only the first one counts: later errors are its consequences."""
        with self._recording:
            if self._recorded:
                return
            self._recorded = True
            defaults = {"failed_step": None, "error": None, "ranks": None, "stood_still": 0.0}
            record = {
                **self._state(),
                "local_rank": self.local_rank,
                "reason": reason,
                "why": why,
                "step": self.done,
                "code": code,
                **defaults,
                **details,
            }
            try:
                write_json(rank_file(self.run_dir, "exit", self.rank), record)
            except OSError as problem:
                print(f"cannot write the exit record: {problem}: {record}", file=sys.stderr, flush=True)
            if self.owner is not None:
                self.owner.release()


def write_collectives(file: Path) -> None:
    """Writes what torch's flight recorder holds, the last collectives and their states; nothing without torch.

    NCCL's own dump comes only after its timeout, half an hour later. `torchfrtrace` compares the files of all ranks.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return
    # two recorders: that of NCCL, and that of gloo and others (torch 2.9 and later)
    name = "_dump_fr_trace" if torch.distributed.get_backend() == "gloo" else "_dump_nccl_trace"
    if dump := getattr(sys.modules["torch._C._distributed_c10d"], name, None):
        file.write_bytes(dump())


def host_name() -> str:
    """Name of this node in the scheduler, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 1
