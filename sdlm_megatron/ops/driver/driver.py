"""The batch script of a training job, from pre-flight to requeue: slurm/train_*.sh end in it.

    pre-flight -> choose nodes -> srun -> watch -> read why it ended -> decide -> again, requeue, or the end

It imports no torch, and asks nothing of the training processes but their files: exit records, heartbeats, checkpoints.
Exit code: 0 training finished, 2 a user's mistake, 3 stopped by RUN/STOP, 1 otherwise.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.files import write_text
from sdlm_megatron.ops.attempt import attempt_dir, read_events, record_event
from sdlm_megatron.ops.driver import guardian
from sdlm_megatron.ops.driver.attempt_summary import summarize
from sdlm_megatron.ops.driver.attempt_watch import end_of, watch
from sdlm_megatron.ops.driver.cluster_file import load_cluster
from sdlm_megatron.ops.driver.decision import Action, End, Situation, decide, since_checkpoint
from sdlm_megatron.ops.driver.gate import preflight
from sdlm_megatron.ops.driver.launch import LAUNCHERS, environment, training, with_setup
from sdlm_megatron.ops.driver.script_options import environment_overrides
from sdlm_megatron.ops.driver.slurm_commands import Job
from sdlm_megatron.ops.driver.verdict import add_bad_nodes, read_bad_nodes
from sdlm_megatron.weights.checkpoint_folder import newest_step

EXAMPLE = "DATA=DIR BASE=DIR sbatch slurm/train_32b_d4.sh -- --train.steps=1000"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
CONTROLLER_TRIES = 20
"""Questions to a controller that does not answer, 10 s apart and more."""
EXIT_CODES = {"done": 0, "stop": 3}


class StopRequest:
    """Set by a signal to this process; everything that waits looks at it."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def reason(self, job: Job, margin: float) -> str:
        """ "time limit", "preemption" or "operator" once a signal has come, "" before."""
        if not self.signal:
            return ""
        if job.end_time() - time.time() < margin + 120:  # Slurm may send its signal up to a minute early
            return "time limit"
        return "preemption" if self.signal == signal.SIGTERM else "operator"


class Driver:
    """One start of the job by Slurm."""

    def __init__(self, args: argparse.Namespace, overrides: Sequence[str], stop: StopRequest) -> None:
        self.job, self.stop = Job.current(), stop
        self.name, self.cluster = args.cluster, load_cluster(args.cluster)
        self.arguments = ["--config", args.config, *environment_overrides(overrides), *overrides]
        config = load_config(RunConfig, args.config, self.arguments[2:], PRESETS)
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
        self.logs = self.run_dir / "logs" / self.job.name
        self.logs.mkdir(parents=True, exist_ok=True)
        self.tries = 0
        self.crashed = False
        """Whether the last attempt ended by a crash: its nodes need no new measurement of their speed."""
        self.out: dict[str, str] = {}  # nodes not to use any more, with why
        self.guardian: subprocess.Popen | None = None
        self.first_step = newest_step(self.run_dir)

    def say(self, text: str) -> None:
        """To the job's output and to driver.log."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        with suppress(OSError):  # both may lie on a disk that is full
            print(line, flush=True)
        with suppress(OSError), open(self.logs / "driver.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def event(self, kind: str, **fields: object) -> None:
        record_event(self.run_dir, kind, **fields)

    def run(self) -> int:
        """Until there is nothing more to do here; returns the exit code."""
        self._name_attempt()
        self.event("job_start", nodes=self.job.nodes, restart=self.job.restart)
        self._write_env()
        self.say(
            f"job {self.job.id}, restart {self.job.restart}: {len(self.job.nodes)} nodes ({self.spares} spare), run "
            f"{self.run_dir}, newest checkpoint {'none' if self.first_step < 0 else f'step {self.first_step}'}"
        )
        find_nan: list[str] = []
        while True:
            self._name_attempt()
            end = self._attempt(find_nan)
            action = self._decide(end)
            find_nan = ["--find-nan", str(end.step)] if action.find_nan and end.step is not None else []
            twice = {host: "its processes failed twice" for host in action.exclude if host not in end.bad}
            add_bad_nodes(self.run_dir, twice)
            self.out.update({**twice, **end.bad})
            self.say(f"{action.kind}: {action.reason}")
            if action.kind == "retry":
                self.tries += 1
                self.crashed = end.outcome == "crash"
                continue
            return self._leave(end, action)

    def _name_attempt(self) -> None:
        os.environ["SDLM_ATTEMPT"] = f"{self.job.name}-{self.tries}"

    def _attempt(self, more: Sequence[str]) -> End:
        """Checks the nodes and trains on those that are good, once."""
        if self.stop.signal or (self.run_dir / "STOP").exists():
            return End("stopped", "asked to stop before training began")
        nodes = [node for node in self.job.nodes if node not in self.out]
        self._guard(nodes)
        started = time.monotonic()
        bad, everywhere = preflight(
            self.name, self.cluster, self.job, nodes, self.needed, self.run_dir, self.arguments, quick=self.crashed
        )
        self._fence()
        known = read_bad_nodes(self.run_dir)  # plain sbatch does not exclude them: those wait first
        good = sorted((node for node in nodes if node not in bad), key=lambda node: node in known)
        self.event("preflight", seconds=time.monotonic() - started, ok=len(good) >= self.needed, bad=bad)
        for node, why in bad.items():
            self.say(f"left out: {node}: {why}")
        if self.stop.signal:
            return End("stopped", "asked to stop before training began")
        self.out.update(bad)
        if everywhere:
            return End("user_error", f"the pre-flight failed on every node: {everywhere}")
        if len(good) < self.needed:
            return End("too_few_nodes", f"{len(good)} good nodes, {self.needed} needed", bad=bad)
        return self._train(good[: self.needed], more)

    def _fence(self) -> None:
        """Ends this driver if Slurm has started the job anew elsewhere, or does not answer for minutes: its node is cut
        off then, and whatever it still wrote into the run would mislead the driver that has taken over."""
        for _ in range(CONTROLLER_TRIES):
            if shown := self.job.show():
                if shown.get("Restarts") == str(self.job.restart):
                    return
                break
            time.sleep(10)
        self.say("the job was started anew elsewhere, or Slurm does not answer: this driver ends")
        raise SystemExit(1)

    def _guard(self, nodes: Sequence[str]) -> None:
        """Sees to it that a guardian stands by on another node."""
        others = [node for node in nodes if node != self.job.batch_node]
        if others and (self.guardian is None or self.guardian.poll() is not None):
            # sizes of the job do not fit a step of one task
            environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_NTASKS", "SLURM_TASKS_PER"))}
            line = guardian.command(self.run_dir, self.job, others[-1])
            self.guardian = subprocess.Popen(line, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)

    def _train(self, nodes: list[str], more: Sequence[str]) -> End:
        attempt = os.environ["SDLM_ATTEMPT"]
        folder = attempt_dir(self.run_dir, attempt)
        folder.mkdir(parents=True, exist_ok=True)
        line, extra = training(self.cluster, self.launcher, nodes, self.run_dir, attempt, [*self.arguments, *more])
        environ = {**environment(self.cluster, self.job, nodes, self.run_dir, attempt), **extra}
        write_text(folder / "command.txt", shlex.join(line) + "\n")
        ranks = len(nodes) * self.cluster.gpus_per_node
        self.event("train_start", nodes=nodes, **{"try": self.tries})
        self.say(f"try {self.tries}: {ranks} processes on {','.join(nodes)}, logs in {folder}")
        said = folder / f"{self.launcher}.log"  # of the launcher itself; ranks have their own
        with open(said, "wb") as log:
            process = subprocess.Popen(
                with_setup(self.cluster, line), env=environ, stdin=subprocess.DEVNULL, stderr=log
            )
            watch(process, self.job, nodes, folder, self.heartbeat, self._asked_to_stop, self.say)
        if text := said.read_text(errors="replace").strip():
            self.say(f"the launcher said:\n{text}")
        self._fence()
        summary = summarize(self.run_dir, attempt, ranks, heartbeat_seconds=self.heartbeat)
        end = end_of(summary, nodes)
        self.say(f"try {self.tries} ended, srun with {process.returncode}: {end.outcome}\n{summary.text}")
        self.event(
            "train_end", outcome=end.outcome, summary=end.text, hosts=end.hosts, checkpoint=newest_step(self.run_dir)
        )
        return end

    def _asked_to_stop(self) -> str:
        return self.stop.reason(self.job, self.cluster.signal_seconds)

    def _decide(self, end: End) -> Action:
        now = newest_step(self.run_dir)
        counts = since_checkpoint(read_events(self.run_dir), self.job.id, now)
        situation = Situation(
            nodes=[node for node in self.job.nodes if node not in self.out],
            needed=self.needed,
            retries=self.retries,
            progressed=now > self.first_step,
            stop=self._asked_to_stop(),
            stop_file=(self.run_dir / "STOP").exists(),
            **counts,
        )
        return decide(end, situation)

    def _leave(self, end: End, action: Action) -> int:
        self.event("job_end", reason=f"{action.kind}: {action.reason}")
        if action.kind != "requeue":
            return 2 if end.outcome == "user_error" else EXIT_CODES.get(action.kind, 1)
        if self.job.show().get("JobState") not in ("RUNNING", None):
            self.say("Slurm is already taking the job away; it puts it back into the queue itself, or was told not to")
            return 1
        self.event("requeue", reason=action.reason, checkpoint=newest_step(self.run_dir))
        refused = self.job.requeue(sorted({*self.out, *action.exclude}))
        if refused:
            self.say(f"no requeue: {refused}")
            self.event("job_end", reason=f"end: Slurm refused to requeue: {refused}")
            return 1
        time.sleep(300)  # Slurm ends this process
        return 1

    def _write_env(self) -> None:
        shown = {k: "(hidden)" if SECRET.search(k) else v for k, v in sorted(os.environ.items())}
        write_text(self.logs / "env.txt", "".join(f"{k}={v}\n" for k, v in shown.items()))


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m sdlm_megatron.ops.driver.driver", __doc__, example=EXAMPLE, settings=RunConfig)
    add = parser.add_argument
    add("--config", required=True, metavar="PRESET", help="configuration of sdlm_megatron.train")
    add("--cluster", default="default", metavar="NAME", help="slurm/clusters/NAME.yaml, or a file")
    add("--spares", type=int, metavar="N", help="nodes of the allocation that wait to replace bad ones")
    add("--launcher", choices=LAUNCHERS, default="srun", help="how processes are started (default: srun for each)")
    add("--retries", type=int, default=3, metavar="N", help="after failures without a newer checkpoint (default 3)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    stop = StopRequest()
    args, overrides = build_parser().parse_known_args(argv)
    raise SystemExit(Driver(args, [o for o in overrides if o != "--"], stop).run())


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
