"""The commands of Slurm that a job uses about itself."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sdlm_megatron.errors import UserError

GUARDIAN = "guardian"
"""Name of the step that outlives the driver."""
COMMAND_SECONDS = 60
"""A controller that is busy or down may take long; a command that takes longer counts as failed."""


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command of Slurm; 124 if it took too long."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return 124, f"{arguments[0]} did not answer in {COMMAND_SECONDS} s"
    except FileNotFoundError:
        raise UserError(
            f"{arguments[0]} is not here", "PATH", "run this where Slurm's commands are: a login or compute node"
        ) from None
    return done.returncode, (done.stdout + done.stderr).strip()


@dataclass(frozen=True)
class Job:
    """The job that this process is part of."""

    id: str
    restart: int
    """How often Slurm has requeued it."""
    nodes: list[str] = field(hash=False)

    @classmethod
    def current(cls) -> "Job":
        """From the environment of a batch script; UserError outside of one."""
        job, names = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
        if not job or not names:
            raise UserError("not inside a Slurm job", "SLURM_JOB_ID", "start it with sbatch, as slurm/train_*.sh do")
        code, text = command("scontrol", "show", "hostnames", names)
        if code:
            raise UserError(f"the job's nodes are unknown: {text}", names)
        return cls(job, int(os.environ.get("SLURM_RESTART_COUNT", 0)), text.split())

    @property
    def batch_node(self) -> str:
        """Where the batch script runs."""
        return self.nodes[0]

    @property
    def name(self) -> str:
        """JOB-RESTART: the folder of this start's logs."""
        return f"{self.id}-{self.restart}"

    def show(self) -> dict[str, str]:
        """What `scontrol show job` knows, by field; {} when the controller does not answer."""
        code, text = command("scontrol", "--oneliner", "show", "job", self.id)
        return dict(re.findall(r"(\S+?)=(\S*)", text)) if code == 0 else {}

    def end_time(self) -> float:
        """When the time limit strikes (seconds since 1970); infinity when there is none or it is unknown."""
        try:
            return datetime.fromisoformat(self.show().get("EndTime", "")).timestamp()
        except ValueError:
            return float("inf")

    def end_steps(self, seconds: float) -> None:
        """Ends what srun started in this job, but not the guardian: SIGTERM, on which ranks write their Python stacks,
        and after `seconds` SIGKILL."""
        listed = ("squeue", "--noheader", "--steps", "--jobs", self.id, "--format", "%i %j")
        for number in ("TERM", "KILL"):
            for line in command(*listed)[1].splitlines():
                step, _, name = line.strip().partition(" ")
                if re.fullmatch(r"\d+\.\d+", step) and name != GUARDIAN:
                    command("scancel", f"--signal={number}", step)
            time.sleep(seconds if number == "TERM" else 0)

    def cancel(self) -> None:
        """Ends the job."""
        command("scancel", self.id)

    def requeue(self, exclude: Sequence[str]) -> str:
        """Puts the job back into the queue, not to run on `exclude`; "" or why Slurm refused.

        Slurm then ends the batch script with SIGTERM and, KillWait (30 s) later, SIGKILL. The nodes can only be
        excluded once the job is no longer running, which is in between.
        """
        code, text = command("scontrol", "requeue", self.id)
        if code:
            return text or f"scontrol requeue ended with {code}"
        if exclude:
            known = self.show().get("ExcNodeList", "")
            names = [*([] if known in ("", "(null)") else [known]), *exclude]
            code, text = command("scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(names)}")
            if code:
                print(f"could not exclude {','.join(exclude)}: {text}", flush=True)
        return ""


def lost_nodes(nodes: Sequence[str]) -> dict[str, str]:
    """Nodes that Slurm calls down or does not hear from, with the state."""
    _, text = command("sinfo", "--noheader", "--Node", "--nodes", ",".join(nodes), "--format", "%N %T")
    states = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) >= 2)
    return {n: s for n, s in states.items() if s.startswith("down") or s.endswith("*")}
