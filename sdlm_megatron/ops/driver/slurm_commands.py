"""Slurm's commands as the driver uses them: the job it runs in, its steps, requeueing, lost nodes."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sdlm_megatron.errors import UserError

GUARDIAN = "guardian"  # name of the job step that outlives the driver (guardian.py)
COMMAND_SECONDS = 60
"""Time limit of a command. A controller that is busy or down may not answer; that counts as a failure."""


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a Slurm command; 124 on a timeout."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return 124, f"{arguments[0]} did not answer in {COMMAND_SECONDS} s"
    except FileNotFoundError:
        raise UserError(
            f"Slurm's command {arguments[0]} is not installed here", "PATH", "run this on a login or compute node"
        ) from None
    return done.returncode, (done.stdout + done.stderr).strip()


def expand_nodes(names: str) -> list[str]:
    """Nodes of a list such as node[01-32]."""
    code, text = command("scontrol", "show", "hostnames", names)
    if code or not text:
        raise UserError(f"Slurm cannot expand the list of nodes: {text}", names, "write it as node[01-32] or a,b,c")
    return text.split()


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
        return cls(job, int(os.environ.get("SLURM_RESTART_COUNT", 0)), expand_nodes(names))

    @property
    def batch_node(self) -> str:
        """Node of the batch script."""
        return self.nodes[0]

    @property
    def name(self) -> str:
        """JOB-RESTART, the name of the log folder of this start."""
        return f"{self.id}-{self.restart}"

    def show(self) -> dict[str, str]:
        """Fields of `scontrol show job`; {} when the controller does not answer."""
        code, text = command("scontrol", "--oneliner", "show", "job", self.id)
        return dict(re.findall(r"(\S+?)=(\S*)", text)) if code == 0 else {}

    def end_time(self) -> float:
        """Time of the time limit, in seconds since 1970; infinity if there is none or it is unknown."""
        try:
            return datetime.fromisoformat(self.show().get("EndTime", "")).timestamp()
        except ValueError:
            return float("inf")

    def end_steps(self, seconds: float) -> None:
        """Ends all steps of this job except the guardian: SIGTERM, and after `seconds` SIGKILL.

        On SIGTERM the ranks write their Python stacks.
        """
        listing = ("squeue", "--noheader", "--steps", "--jobs", self.id, "--format", "%i %j")
        for signal in ("TERM", "KILL"):
            for line in command(*listing)[1].splitlines():
                step, _, name = line.strip().partition(" ")
                if re.fullmatch(r"\d+\.\d+", step) and name != GUARDIAN:
                    command("scancel", f"--signal={signal}", step)
            time.sleep(seconds if signal == "TERM" else 0)

    def requeue(self, exclude: Sequence[str]) -> str:
        """Puts the job back into the queue, without the nodes of `exclude`; returns "" or why Slurm refused.

        Slurm then ends the batch script with SIGTERM and, KillWait (30 s) later, SIGKILL.
        """
        code, text = command("scontrol", "requeue", self.id)
        if code:
            return text or f"scontrol requeue ended with {code}"
        if exclude:
            # Slurm refuses to change the excluded nodes of a running job, so this comes after the requeue, in the
            # seconds before Slurm kills this process.
            known = self.show().get("ExcNodeList", "")
            names = [*([] if known in ("", "(null)") else [known]), *exclude]
            code, text = command("scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(names)}")
            if code:
                print(f"could not exclude {','.join(exclude)}: {text}", flush=True)
        return ""


def lost_nodes(nodes: Sequence[str]) -> dict[str, str]:
    """Nodes that Slurm marks as down or as not responding (a state that ends in *), with their states."""
    _, text = command("sinfo", "--noheader", "--Node", "--nodes", ",".join(nodes), "--format", "%N %T")
    states = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) >= 2)
    return {n: s for n, s in states.items() if s.startswith("down") or s.endswith("*")}
