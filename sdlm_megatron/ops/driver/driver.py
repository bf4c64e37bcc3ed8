"""Batch script of a training job, from pre-flight to requeue. The scripts slurm/train_*.sh end in it.

    pre-flight -> choose nodes -> srun -> watch -> read why it ended -> decide -> retry, requeue, or end

Needs no torch. Reads only files of the training processes: exit records, heartbeats, checkpoints.
Exit code: 0 training finished, 2 user error, 3 stopped by RUN/STOP, 1 otherwise.
"""

import argparse
import errno
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.config.secret_text import is_secret_name, mask_text, masked_command
from sdlm_megatron.config.validate import check_run
from sdlm_megatron.errors import CheckpointError, ConfigError, UserError, run_cli
from sdlm_megatron.files import make_folder, write_text
from sdlm_megatron.ops.attempt import attempt_dir, patiently, read_events, record_event
from sdlm_megatron.ops.driver.attempt_summary import summarize
from sdlm_megatron.ops.driver.attempt_watch import attempt_end, watch_attempt
from sdlm_megatron.ops.driver.cluster_file import CLUSTER_HELP, load_cluster
from sdlm_megatron.ops.driver.decision import REQUEUES, Action, AttemptEnd, Situation, decide, since_checkpoint
from sdlm_megatron.ops.driver.guardian import guardian_command
from sdlm_megatron.ops.driver.launch import (
    LAUNCHERS,
    attempt_environment,
    training_command,
    variable_overrides,
    with_setup,
)
from sdlm_megatron.ops.driver.preflight import run_preflight
from sdlm_megatron.ops.driver.slurm_commands import RETRY_SECONDS, SlurmJob, lost_nodes, slurm_environment
from sdlm_megatron.ops.driver.verdict import ANSWERS, add_bad_nodes, read_bad_nodes
from sdlm_megatron.weights.checkpoint_folder import newest_step

EXAMPLE = "DATA=DIR BASE=DIR sbatch --mem=0 slurm/train_32b_d4.sh -- --train.steps=1000"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
FILE_PAUSE = 60  # seconds from an attempt that ended for an I/O error of the driver to the next
HURRY_SECONDS = 120  # before the time limit: no more patience with the run folder
GUARDIAN_SECONDS = 60  # a guardian that lives less than this cannot run
GUARDIAN_PAUSE = 3600  # longest time in seconds from the start of such a guardian to that of the next
EXIT_CODES = {"done": 0, "stop": 3}
T = TypeVar("T")


class StopSignal:
    """The last signal to this process that asks the job to stop; 0 if there was none."""

    def __init__(self) -> None:
        self.number, self.preempted = 0, False
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def reason(self, job: SlurmJob, margin: float) -> str:
        """ "time limit", "preemption" or "operator" after a signal, "" before.

        Args:
            job: the job of this process.
            margin: seconds before the time limit at which Slurm was asked to send its signal.
        """
        if not self.number:
            return ""
        # Slurm moves the end time of a preempted job, and may send it the signal of the time limit. Once it ends the
        # job, it does not tell any more.
        self.preempted = self.preempted or job.preempted()
        if self.preempted:
            return "preemption"
        if job.end_time() - time.time() < margin + 120:  # Slurm may send its signal up to a minute early
            return "time limit"
        return "preemption" if self.number == signal.SIGTERM else "operator"


class Driver:
    """One start of the job by Slurm."""

    def __init__(self, args: argparse.Namespace, overrides: Sequence[str], stop: StopSignal) -> None:
        self.job, self.stop = SlurmJob.current(), stop
        self.cluster = load_cluster(args.cluster)
        self.preset, self.settings = args.config, [*variable_overrides(overrides), *overrides]
        config = load_config(RunConfig, self.preset, self.settings, PRESETS)
        self.run_dir = Path(config.run_dir)
        self.heartbeat = config.fault.heartbeat_seconds
        self.launcher, self.retries = args.launcher, args.retries
        self.spares = self.cluster.spares if args.spares is None else args.spares
        self.needed = len(self.job.nodes) - self.spares
        if self.needed < 1:
            raise ConfigError(
                f"{self.spares} spares of {len(self.job.nodes)} nodes leave none to train on",
                "--spares",
                "ask for more nodes, or fewer spares",
            )
        check_run(config, self.needed * self.cluster.gpus_per_node)
        self.logs = self.run_dir / "logs" / self.job.name
        make_folder(self.logs)
        # In the environment only, which srun passes on: parallel/exchange.py. env.txt hides it, as every token.
        os.environ["SDLM_JOB_TOKEN"] = secrets.token_hex(32)
        self.tries = 0
        self.crashed = False
        """Whether the last attempt crashed. Its nodes need no new measurement of their speed."""
        self.excluded: dict[str, str] = {}  # nodes that are not used any more, with the reason
        self.unblamed: set[str] = set()  # those that failed only what every node failed: a requeue may use them
        self.file_errors = 0  # attempts in a row that ended for an I/O error of the driver
        self.unanswered = False  # whether the node program ended with an error on every node in the last pre-flight
        self.guardian: subprocess.Popen | None = None
        self.guardian_node, self.guardian_start, self.guardian_failures = "", float("-inf"), 0
        self.first_step = self.newest = patiently(newest_step, self.run_dir)

    def log(self, text: str) -> None:
        """Prints to the job's output, and appends to driver.log."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        with suppress(OSError):  # both may be on a disk that is full
            print(line, flush=True)
        with suppress(OSError), open(self.logs / "driver.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def event(self, kind: str, **fields: object) -> None:
        """Records an event of the run."""
        record_event(self.run_dir, kind, **fields)

    def run(self) -> int:
        """Makes attempts until none is left to make; returns the exit code."""
        try:
            return self._make_attempts()
        except (OSError, CheckpointError) as error:  # the run folder fails for longer than `patiently` waits
            why = f"the driver on {self.job.batch_node} cannot use the run folder: {error}"
        self._exit_if_replaced()
        self.log(why)
        # Events cannot be counted. Requeues after progress do not loop.
        again = self.newest > self.first_step or self.job.restart < REQUEUES
        action = Action("requeue" if again else "end", why, (self.job.batch_node,))  # the mount may be lost here only
        self.log(f"{action.kind}: {action.reason}")
        return self._leave(AttemptEnd("crash", why), action)

    def _make_attempts(self) -> int:
        self._patiently(self._name_attempt)
        self.event("job_start", nodes=self.job.nodes, restart=self.job.restart)
        self._write_environment()
        self.log(
            f"job {self.job.id}, restart {self.job.restart}: {len(self.job.nodes)} nodes ({self.spares} spare), run "
            f"{self.run_dir}, newest checkpoint {'none' if self.first_step < 0 else f'step {self.first_step}'}"
        )
        find_nan: list[str] = []
        while True:
            self._patiently(self._name_attempt)
            end = self._attempt_or_error(find_nan)
            action = self._patiently(self._decide, end)
            if not self.file_errors:  # the search for NaN is not made yet
                find_nan = ["--find-nan", str(end.step)] if action.find_nan and end.step is not None else []
            suspects = {host: "its processes failed twice" for host in action.exclude if host not in end.bad}
            with suppress(OSError):  # they are excluded in this job all the same
                add_bad_nodes(self.run_dir, suspects)
            self.excluded.update({**suspects, **end.bad})
            self.log(f"{action.kind}: {action.reason}")
            if action.kind == "retry":
                self.tries += 1
                self.crashed = end.outcome == "crash" and not self.file_errors
                continue
            return self._leave(end, action)

    def _patiently(self, read: Callable[..., T], *arguments: Any) -> T:
        return patiently(read, *arguments, hurried=self._hurried)

    def _hurried(self) -> bool:
        return bool(self.stop.number) and self.job.end_time() - time.time() < HURRY_SECONDS

    def _name_attempt(self) -> None:
        # Slurm may number its jobs anew: an older job's stop request and exit records must not count.
        while attempt_dir(self.run_dir, f"{self.job.name}-{self.tries}").exists():
            self.tries += 1
        # Events and file names of this process and of the training processes use the name.
        os.environ["SDLM_ATTEMPT"] = f"{self.job.name}-{self.tries}"

    def _attempt_or_error(self, arguments: Sequence[str]) -> AttemptEnd:
        """`_attempt`; an error of the operating system, as of a shared disk, ends the attempt and not the job."""
        try:
            end = self._attempt(arguments)
            self.file_errors = 0
            return end
        except (OSError, CheckpointError) as error:
            why = f"the driver cannot continue the attempt: {error}"
            self.log(why)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return AttemptEnd("user_error", f"{why}; free some space and submit again")
            self.file_errors += 1
            if not self.stop.number:
                time.sleep(FILE_PAUSE)
            return AttemptEnd("crash", why)

    def _attempt(self, arguments: Sequence[str]) -> AttemptEnd:
        """Checks the nodes, and trains once on those that are good."""
        if self.stop.number or (self.run_dir / "STOP").exists():
            return AttemptEnd("stopped", "asked to stop before training began")
        nodes = [node for node in self.job.nodes if node not in self.excluded]
        self._keep_guardian()
        start = time.monotonic()
        try:
            what = (self.run_dir, self.logs, nodes, self.needed, self.cluster, self.preset, self.settings)
            report = run_preflight(*what, self.log, quick=self.crashed)
        except UserError as error:
            return AttemptEnd("user_error", f"the pre-flight cannot run: {error}")
        self.log(f"pre-flight:\n{report['table']}")
        self._exit_if_replaced()
        bad: dict[str, str] = report["bad"]
        # Plain sbatch does not exclude the nodes of bad-nodes.txt: they come last, and train only as a last resort.
        known = read_bad_nodes(self.run_dir)
        good = sorted((node for node in nodes if node not in bad), key=lambda node: node in known)
        chosen = good[: self.needed]
        self.event("preflight", seconds=time.monotonic() - start, ok=len(good) >= self.needed, bad=bad)
        for node, why in bad.items():
            self.log(f"excluded: {node}: {why}")
        if self.stop.number:
            return AttemptEnd("stopped", "asked to stop before training began")
        before, self.unanswered = self.unanswered, report["everywhere"].partition(":")[0].endswith(ANSWERS)
        if report["everywhere"]:
            why = f"the pre-flight failed on every node: {report['everywhere']}"
            if self.unanswered and not before:  # a wrong image, or a shared disk that failed for a moment
                raise OSError(why)
            return AttemptEnd("user_error", why)
        self.excluded.update(bad)
        self.unblamed |= set(bad) - set(report["blamed"])
        if len(good) < self.needed:
            return AttemptEnd("too_few_nodes", f"{len(good)} good nodes, {self.needed} needed", bad=bad)
        # Rank 0 is on the first node in the allocation's order, which srun keeps whatever order it is asked for.
        return self._train([node for node in nodes if node in chosen], arguments)

    def _exit_if_replaced(self) -> None:
        """Ends this driver if Slurm has restarted the job elsewhere. Waits until the controller answers.

        A node that was cut off cannot know, and anything that it still wrote into the run would mislead the new driver.
        """
        last = None
        while not (fields := self.job.show()):
            if last is None:
                self.log("Slurm does not answer; waiting for it")
                last = self.job.last_question()
            if time.time() > last:
                self.log(f"the last answer of Slurm: {self.job.ask().streams}")
                break
            time.sleep(RETRY_SECONDS)
        if fields.get("Restarts") != str(self.job.restart):
            self.log("the job was restarted elsewhere, or Slurm does not answer: this driver exits")
            raise SystemExit(1)

    def _keep_guardian(self) -> None:
        """Makes sure that a guardian runs on another node than this one, and that this node is up."""
        now = time.monotonic()
        if self.guardian is not None:
            code, lived = self.guardian.poll(), now - self.guardian_start
            if code is None and not lost_nodes([self.guardian_node]).get(self.guardian_node, "").startswith("down"):
                return
            self.guardian.kill()  # srun waits for its lost node
            self.guardian.poll()
            self.guardian = None
            failed = code is not None and lived < GUARDIAN_SECONDS
            self.guardian_failures = self.guardian_failures + 1 if failed else 0
            if failed:
                what = f"the guardian on {self.guardian_node} ended with code {code} after {lived:.0f} s"
                self.log(f"{what}; another node is next: see {self.logs}/guardian.log")
        if now - self.guardian_start < min(10 << self.guardian_failures, GUARDIAN_PAUSE):
            return
        others = [node for node in self.job.nodes if node not in self.excluded and node != self.job.batch_node]
        down = lost_nodes(others) if others else {}
        if others := [node for node in others if not down.get(node, "").startswith("down")]:
            self.guardian_node, self.guardian_start = others[-1 - self.guardian_failures % len(others)], now
            with suppress(OSError):  # this is called again
                line = guardian_command(self.run_dir, self.job, self.guardian_node)
                self.guardian = subprocess.Popen(
                    line, env=slurm_environment(), stdin=subprocess.DEVNULL, start_new_session=True
                )

    def _train(self, nodes: list[str], arguments: Sequence[str]) -> AttemptEnd:
        attempt = os.environ["SDLM_ATTEMPT"]
        folder = attempt_dir(self.run_dir, attempt)
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--config", self.preset, *self.settings, *arguments]
        line, variables = training_command(self.cluster, self.launcher, nodes, self.run_dir, attempt, arguments)
        environment = {**attempt_environment(self.cluster, self.job, nodes, self.run_dir, attempt), **variables}
        with suppress(OSError):  # for the reader only
            write_text(folder / "command.txt", masked_command(line) + "\n")
        ranks = len(nodes) * self.cluster.gpus_per_node
        self.event("train_start", nodes=nodes, **{"try": self.tries})
        self.log(f"try {self.tries}: {ranks} processes on {','.join(nodes)}, logs in {folder}")
        launcher_log = folder / f"{self.launcher}.log"  # output of srun or torchrun itself; ranks have their own logs
        with open(launcher_log, "wb") as file:
            process = subprocess.Popen(
                with_setup(self.cluster, line), env=environment, stdin=subprocess.DEVNULL, stderr=file
            )
            watch_attempt(
                process, self.job, nodes, folder, self.heartbeat, self._stop_reason, self._keep_guardian, self.log
            )
        self._exit_if_replaced()
        if text := self._patiently(launcher_log.read_text, "utf-8", "replace").strip():
            self.log(f"output of {self.launcher}:\n{text}")
        summary = summarize(self.run_dir, attempt, ranks, heartbeat_seconds=self.heartbeat)
        end = attempt_end(summary, nodes)
        self.log(f"try {self.tries} ended, srun with {process.returncode}: {end.outcome}\n{summary.text}")
        self.event(
            "train_end",
            outcome=end.outcome,
            summary=end.text,
            hosts=end.hosts,
            checkpoint=self._patiently(newest_step, self.run_dir),
        )
        return end

    def _stop_reason(self) -> str:
        return self.stop.reason(self.job, self.cluster.signal_seconds)

    def _decide(self, end: AttemptEnd) -> Action:
        self.newest = newest_step(self.run_dir)
        counts = since_checkpoint(read_events(self.run_dir), self.job.id, self.job.restart, self.newest)
        counts["failures"] = max(counts["failures"], self.file_errors)  # these may not have been recorded
        situation = Situation(
            nodes=[node for node in self.job.nodes if node not in self.excluded],
            needed=self.needed,
            retries=self.retries,
            progressed=self.newest > self.first_step,
            stop=self._stop_reason(),
            stop_file=(self.run_dir / "STOP").exists(),
            **counts,
        )
        return decide(end, situation)

    def _leave(self, end: AttemptEnd, action: Action) -> int:
        self.event("job_end", reason=f"{action.kind}: {action.reason}")
        if action.kind != "requeue":
            return 2 if end.outcome == "user_error" else EXIT_CODES.get(action.kind, 1)
        # A preempted or cancelled job is COMPLETING; requeueing it here would undo an operator's scancel.
        if self.job.show().get("JobState") not in ("RUNNING", None):
            self.log("Slurm is already ending the job, and requeues it itself if it was preempted")
            return 1
        if refusal := self.job.requeue():
            self.log(f"no requeue: {refusal}")
            self.event("job_end", reason=f"end: Slurm refused to requeue: {refusal}")
            return 1
        self.event("requeue", reason=action.reason, checkpoint=self.newest)
        self.job.exclude(sorted({*self.excluded, *action.exclude} - self.unblamed))
        time.sleep(300)  # Slurm ends this process; exiting first would let Slurm record the job as failed
        return 1

    def _write_environment(self) -> None:
        shown = {
            name: "(hidden)" if SECRET.search(name) or is_secret_name(name) else mask_text(value)
            for name, value in sorted(os.environ.items())
        }
        with suppress(OSError):  # for the reader only
            write_text(self.logs / "env.txt", "".join(f"{name}={value}\n" for name, value in shown.items()))


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m sdlm_megatron.ops.driver.driver", __doc__, example=EXAMPLE, settings=RunConfig)
    add = parser.add_argument
    add("--config", required=True, metavar="PRESET", help="configuration of the training: a preset or a file")
    add("--cluster", default="default", metavar="NAME", help=CLUSTER_HELP)
    add(
        "--spares", type=int, metavar="N", help="nodes of the allocation that replace bad ones (default: the cluster's)"
    )
    add("--launcher", choices=LAUNCHERS, default="srun", help="one srun task per rank, or one torchrun per node")
    add("--retries", type=int, default=3, metavar="N", help="retries after failures without a newer checkpoint")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    stop = StopSignal()  # before anything slow: until then the shell's trap ignores the signals
    args, overrides = build_parser().parse_known_args(argv)
    raise SystemExit(Driver(args, [o for o in overrides if o != "--"], stop).run())


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
