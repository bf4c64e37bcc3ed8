"""Slurm's commands as the driver uses them: the job it runs in, its steps, requeueing, lost nodes."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from sdlm_megatron.config.secret_text import masked_command
from sdlm_megatron.errors import UserError

GUARDIAN = "guardian"  # name of the job step that outlives the driver (guardian.py)
COMMAND_SECONDS = 60
"""Time limit of a command. A controller that is busy or down may not answer; that counts as a failure."""
RETRY_SECONDS = 10  # between two questions to a controller that is busy or down
WAIT_SECONDS = 3600  # for such a controller, at most
REQUEUE_SECONDS = 15  # before the time limit: the last moment to requeue the job
BUSY = re.compile(r"contact slurm|connection|timed? ?out|zero bytes|message \w+ failure|standby", re.IGNORECASE)
"""Errors of commands whose controller is busy, down, or hands over to another one."""
_CHANGES_COMMANDS = re.compile(
    "(SQUEUE|SINFO|SCONTROL|SCANCEL|SRUN)_|SLURM_(TIME_FORMAT|MEM_|NTASKS|NPROCS|TASKS_PER_|TRES_|GPUS|GPU_BIND|"
    "CPUS_PER_|CPU_BIND|HOSTFILE|OVERCOMMIT|EXACT|EXCLUSIVE|WHOLE|THREADS$|TIMELIMIT|WAIT$|EXPORT_ENV|LABELIO|"
    "MULTI_PROG|OPEN_MODE|STD(IN|OUT|ERR)MODE|PTY|WORKING_DIR|REMOTE_CWD)"
)
"""Variables of a shell, a site or a surrounding job that filter or format answers, or that shape and label steps."""
NODE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def slurm_environment() -> dict[str, str]:
    """This process's environment for Slurm's commands: without the variables that change what our options mean."""
    kept = {name: value for name, value in os.environ.items() if not _CHANGES_COMMANDS.match(name)}
    return {**kept, "SLURM_TIME_FORMAT": "%Y-%m-%dT%H:%M:%S"}


class SlurmAnswer(NamedTuple):
    """Result of a Slurm command. Only `text`, its standard output, is an answer: sites print notes on stderr."""

    code: int  # exit code; 124 on a timeout, 126 if the program could not be started
    text: str
    stderr: str

    @property
    def busy(self) -> bool:
        """Whether the same command may work later."""
        return self.code in (124, 126) or (self.code != 0 and bool(BUSY.search(self.stderr)))

    @property
    def streams(self) -> str:
        """Both streams, for messages."""
        parts = (f"{name}: {part}" for name, part in (("stdout", self.text), ("stderr", self.stderr)) if part)
        return "; ".join(parts) or f"nothing, exit code {self.code}"


def command(*arguments: str) -> SlurmAnswer:
    """Runs a Slurm command."""
    streams: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(arguments, env=slurm_environment(), timeout=COMMAND_SECONDS, **streams)
    except subprocess.TimeoutExpired:
        return SlurmAnswer(124, "", f"{arguments[0]} did not answer in {COMMAND_SECONDS} s")
    except OSError as error:  # no memory or processes left, or the file system of the program is away for a moment
        return SlurmAnswer(126, "", f"{arguments[0]} cannot be started: {error}")
    return SlurmAnswer(done.returncode, done.stdout.strip(), done.stderr.strip())


def _installed_command(*arguments: str) -> SlurmAnswer:
    """`command` at the start of a program, where a missing command is an error of the user's."""
    answer = command(*arguments)
    if answer.code == 126 and shutil.which(arguments[0]) is None:
        fix = "run this on a login or compute node"
        raise UserError(f"Slurm's command {arguments[0]} is not installed here", "PATH", fix)
    return answer


def submit_job(line: Sequence[str]) -> tuple[str, str]:
    """Runs `sbatch --parsable ...`; returns the job's number, and the name of its cluster ("": this one)."""
    answer = _installed_command(*line)
    if answer.code:
        raise UserError(
            f"sbatch refused: {answer.streams}",
            masked_command(line),
            "change the cluster file or the options",
        )
    if not (job := re.fullmatch(r"(\d+)(?:;(\S+))?", answer.text)):
        fix = "look with squeue --me whether the job exists before you submit again"
        raise UserError(f"sbatch did not answer with a job number ({answer.streams})", masked_command(line), fix)
    if answer.stderr:
        print(answer.stderr, file=sys.stderr, flush=True)
    return job[1], job[2] or ""


def expand_nodes(names: str, count: int | None = None) -> list[str]:
    """Nodes of a list such as node[01-32]; `count`: the number that it must have."""
    answer = _installed_command("scontrol", "show", "hostnames", names)
    nodes = answer.text.splitlines()
    if answer.code or not nodes or not all(map(NODE_NAME.fullmatch, nodes)) or count not in (None, len(nodes)):
        expected = "" if count is None else f" of {count} nodes"
        raise UserError(
            f"Slurm cannot expand the list{expected}: scontrol show hostnames answered {answer.streams}",
            names,
            "write it as node[01-32] or a,b,c; if a wrapper of scontrol prints notes, have them printed on stderr",
        )
    return nodes


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process is part of."""

    id: str
    restart: int  # number of times that Slurm has requeued the job
    nodes: list[str] = field(hash=False)

    @classmethod
    def current(cls) -> "SlurmJob":
        """The job of the environment of a batch script; UserError outside of one."""
        job, names = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
        if not job or not names:
            raise UserError(
                "not inside a Slurm job", "SLURM_JOB_ID", "start it from a batch script, as sdlm submit does"
            )
        count = os.environ.get("SLURM_JOB_NUM_NODES")
        nodes = expand_nodes(names, int(count) if count else None)
        return cls(job, int(os.environ.get("SLURM_RESTART_COUNT", 0)), nodes)

    @property
    def batch_node(self) -> str:
        """Node of the batch script."""
        return self.nodes[0]

    @property
    def name(self) -> str:
        """JOB-RESTART, the name of the log folder of this start."""
        return f"{self.id}-{self.restart}"

    def ask(self) -> SlurmAnswer:
        """Answer of `scontrol show job`."""
        return command("scontrol", "--oneliner", "show", "job", self.id)

    def show(self) -> dict[str, str]:
        """Fields of `scontrol show job`; {} when the controller does not answer."""
        answer = self.ask()
        fields = re.findall(r"(\S+?)=(\S*)", answer.text)
        # the first one counts: comments, at the end, may contain anything
        return dict(reversed(fields)) if answer.code == 0 and ("JobId", self.id) in fields else {}

    def end_time(self) -> float:
        """Time of the time limit, in seconds since 1970; infinity if there is none or it is unknown."""
        try:
            return datetime.fromisoformat(self.show().get("EndTime", "")).timestamp()
        except ValueError:  # Slurm 23.02 and later also tell the job at its start
            return float(os.environ.get("SLURM_JOB_END_TIME", "inf"))

    def last_question(self) -> float:
        """Time until which a controller without an answer is asked again, in seconds since 1970."""
        return min(self.end_time() - REQUEUE_SECONDS, time.time() + WAIT_SECONDS)

    def end_steps(self, seconds: float) -> None:
        """Ends all steps of this job except the guardian: SIGTERM, and after `seconds` SIGKILL.

        On SIGTERM the ranks write their Python stacks.
        """
        listing = ("squeue", "--all", "--noheader", "--steps", "--jobs", self.id, "--format", "%i %j")
        for signal in ("TERM", "KILL"):
            for line in command(*listing).text.splitlines():
                step, _, name = line.strip().partition(" ")
                if re.fullmatch(r"\d+\.\d+", step) and name != GUARDIAN:
                    command("scancel", f"--signal={signal}", step)
            time.sleep(seconds if signal == "TERM" else 0)

    def preempted(self) -> bool:
        """Whether Slurm has announced that another job takes the nodes. The end time is then that of the grace time."""
        fields = self.show()
        when = fields.get("PreemptTime", "")
        # of this start: times of one format can be compared as text
        return when[:1].isdigit() and when >= fields.get("StartTime", "")

    def end_with(self, *arguments: str) -> str:
        """Runs a command that ends this start of the job, again while the controller is busy.

        Returns:
            "" once the job is ending, or why Slurm refused.
        """
        last = self.last_question()
        while (answer := command(*arguments)).code:
            # A command without an answer may have worked all the same, and so may that of another process.
            fields = self.show()
            if fields.get("JobState", "RUNNING") != "RUNNING" or int(fields.get("Restarts", 0)) > self.restart:
                return ""
            if not answer.busy or time.time() > last:
                return answer.streams
            time.sleep(RETRY_SECONDS)
        return ""

    def requeue(self) -> str:
        """Puts the job back into the queue; returns "" or why Slurm refused.

        Slurm then ends the batch script with SIGTERM and, KillWait (30 s) later, SIGKILL.
        """
        return self.end_with("scontrol", "requeue", self.id)

    def exclude(self, nodes: Sequence[str]) -> None:
        """Has the next start of the job leave out `nodes`.

        Slurm refuses to change the excluded nodes of a running job, so this comes after the requeue, in the seconds
        before Slurm kills this process.
        """
        if not nodes:
            return
        known = self.show().get("ExcNodeList", "")
        names = [*([] if known in ("", "(null)") else [known]), *nodes]
        answer = command("scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(names)}")
        if answer.code:
            print(f"could not exclude {','.join(nodes)}: {answer.streams}", flush=True)


def lost_nodes(nodes: Sequence[str]) -> dict[str, str]:
    """Nodes that Slurm marks as down or as not responding (a state that ends in *), with their states."""
    answer = command("sinfo", "--all", "--noheader", "--Node", "--nodes", ",".join(nodes), "--format", "%N %T")
    states = dict(words for line in answer.text.splitlines() if len(words := line.split()) == 2)
    return {n: s for n, s in states.items() if n in nodes and (s.startswith("down") or s.endswith("*"))}
