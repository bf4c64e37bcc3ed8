"""Requeues a job whose first node, with the driver on it, was lost. Runs on another node.

With --no-kill Slurm keeps a job running without a lost node, even if the batch script ran there. The rest of the job
would then stay allocated until its time limit. The driver starts this program as a job step of its own.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.ops.attempt import patiently, read_events, record_event
from sdlm_megatron.ops.driver.decision import REQUEUES, since_checkpoint
from sdlm_megatron.ops.driver.slurm_commands import GUARDIAN, SlurmJob, lost_nodes
from sdlm_megatron.weights.checkpoint_folder import newest_step

POLL_SECONDS = 5
PROGRAM = "python -m sdlm_megatron.ops.driver.guardian"


def guardian_command(run_dir: Path, job: SlurmJob, node: str) -> list[str]:
    """srun command that starts the guardian on `node`."""
    step = ["srun", f"--job-name={GUARDIAN}", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--mem=0", "--overlap"]
    log = run_dir.resolve() / "logs" / job.name / "guardian.log"
    program = [sys.executable, "-m", "sdlm_megatron.ops.driver.guardian", f"--run-dir={run_dir}"]
    return [*step, f"--output={log}", "--open-mode=append", *program, f"--driver-node={job.batch_node}"]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(PROGRAM, __doc__, example=f"{PROGRAM} --run-dir RUN --driver-node node01")
    parser.add_argument("--run-dir", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--driver-node", required=True, metavar="NAME", help="node on which the job's driver runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    # Signals that announce the end of the job are for the driver. Slurm ends this step with SIGKILL.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    job, times_down = SlurmJob.current(), 0
    while times_down < 2:  # a node that is back at the next look was not lost
        time.sleep(POLL_SECONDS)
        state = lost_nodes([args.driver_node]).get(args.driver_node, "")
        times_down = times_down + 1 if state.startswith("down") else 0
    _restart_job(job, args.run_dir, args.driver_node)


def _restart_job(job: SlurmJob, run_dir: Path, lost: str) -> None:
    """Requeues the job without the node `lost`; cancels it where that is not possible, as its nodes would idle."""
    why = f"the driver's node {lost} was lost"
    try:
        step = patiently(newest_step, run_dir)
        requeues = since_checkpoint(patiently(read_events, run_dir), job.id, job.restart, step)["requeues"]
    except (OSError, CheckpointError) as problem:  # of the run folder, which may be back at the next start
        print(f"cannot count the requeues: {problem}", flush=True)
        step, requeues = -1, 0
    if requeues < REQUEUES:
        print(f"requeueing: {why}", flush=True)
        refusal = job.requeue()
        if not refusal:
            record_event(run_dir, "requeue", reason=why, checkpoint=step)
            record_event(run_dir, "job_end", reason=f"requeue: {why}")
            job.exclude([lost])
            return
        print(refusal, flush=True)
        why += f", and Slurm refused to requeue: {refusal}"
    else:
        why += f", after {REQUEUES} requeues without progress"
    record_event(run_dir, "job_end", reason=f"end: {why}")
    if refusal := job.end_with("scancel", job.id):
        print(f"scancel {job.id} failed: {refusal}", flush=True)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
