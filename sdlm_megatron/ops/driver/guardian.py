"""Stands by on another node than the driver's, and requeues the job when that one is lost.

With --no-kill Slurm lets a job live on without a lost node, even if its batch script ran there: nobody would end the
job before its time limit. The driver starts this as a step of its own.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli
from sdlm_megatron.ops.attempt import read_events, record_event
from sdlm_megatron.ops.driver.decision import REQUEUES, since_checkpoint
from sdlm_megatron.ops.driver.slurm_commands import GUARDIAN, Job, lost_nodes
from sdlm_megatron.weights.checkpoint_folder import newest_step

POLL_SECONDS = 5


def command(run_dir: Path, job: Job, node: str) -> list[str]:
    """srun that starts it on `node`."""
    step = ["srun", f"--job-name={GUARDIAN}", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap"]
    log = run_dir.resolve() / "logs" / job.name / "guardian.log"
    program = [sys.executable, "-m", "sdlm_megatron.ops.driver.guardian", f"--run-dir={run_dir}"]
    return [*step, f"--output={log}", *program, f"--driver-node={job.batch_node}"]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m sdlm_megatron.ops.driver.guardian",
        __doc__,
        example="python -m sdlm_megatron.ops.driver.guardian --run-dir RUN --driver-node node01",
    )
    parser.add_argument("--run-dir", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--driver-node", required=True, metavar="NAME", help="node on which the job's driver runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # its end comes by SIGKILL, with the job's
        signal.signal(number, signal.SIG_IGN)
    job, seen = Job.current(), 0
    while seen < 2:  # a node that is back at once is not lost
        time.sleep(POLL_SECONDS)
        state = lost_nodes([args.driver_node]).get(args.driver_node, "")
        seen = seen + 1 if state.startswith("down") else 0
    step = newest_step(args.run_dir)
    why = f"the driver's node {args.driver_node} was lost"
    if since_checkpoint(read_events(args.run_dir), job.id, step)["requeues"] >= REQUEUES:
        record_event(args.run_dir, "job_end", reason=f"end: {why}, after {REQUEUES} requeues without progress")
        job.cancel()
        return
    record_event(args.run_dir, "job_end", reason=f"requeue: {why}")
    record_event(args.run_dir, "requeue", reason=why, checkpoint=step)
    print(f"{why}: requeue", flush=True)
    if refused := job.requeue([args.driver_node]):
        print(refused, flush=True)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
