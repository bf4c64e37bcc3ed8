"""How the processes of a job are started: srun for each task, or one torchrun a node; on the host or in a container."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.ops.attempt import attempt_dir
from sdlm_megatron.ops.driver.cluster_file import FIELD_ENVIRONMENT, ClusterFile
from sdlm_megatron.ops.driver.slurm_commands import Job

LAUNCHERS = ("srun", "torchrun")
TORCHRUN_LINE = (
    'exec "$0" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" '
    '--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0 "$@"'
)
"""Run by bash on each node; "$0" is Python."""
RANK_LINE = 'exec "$0" "$@" >"$SDLM_RANK_LOGS/rank-$(printf %05d "$RANK").log" 2>&1'


def environment(cluster: ClusterFile, job: Job, nodes: Sequence[str], run_dir: Path, attempt: str) -> dict[str, str]:
    """Environment of a launch: the field's settings, over them this shell's, over them the cluster file's."""
    tries = int(attempt.rsplit("-", 1)[1])
    return {
        **FIELD_ENVIRONMENT,
        **os.environ,
        **{key: str(value) for key, value in cluster.env.items()},
        "MASTER_ADDR": nodes[0],
        # another port for each job and each of its tries: the last one's may still be taken
        "MASTER_PORT": str(20000 + (int(job.id) * 16 + job.restart * 4 + tries) % 12000),
        "SDLM_ATTEMPT": attempt,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(attempt_dir(run_dir, attempt).resolve() / "nccl-trace-"),
    }


def on_nodes(cluster: ClusterFile, nodes: Sequence[str], tasks_per_node: int, command: Sequence[str]) -> list[str]:
    """srun of a Python command (without the interpreter) on `nodes`, in the cluster's container if it has one."""
    cpus = cluster.cpus_per_task or max(1, int(os.environ.get("SLURM_CPUS_ON_NODE", 1)) // tasks_per_node)
    srun = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={cpus}",  # srun does not take it from the job
        "--mem=0",
        "--overlap",  # a step that is still ending on a lost node must not hold this one up
        "--kill-on-bad-exit=1",
        "--unbuffered",
        "--export=ALL",
    ]
    if os.environ.get("SLURM_GPUS_PER_NODE") or os.environ.get("SLURM_JOB_GPUS"):
        srun.append(f"--gpus-per-node={cluster.gpus_per_node}")
    return [*srun, *container_prefix(cluster), python_of(cluster), *command]


def with_setup(cluster: ClusterFile, line: list[str]) -> list[str]:
    """The command after the cluster's `setup` lines, which its processes inherit."""
    if not cluster.setup:
        return line
    return ["bash", "-c", "\n".join(["set -e", *cluster.setup, 'exec "$@"']), "bash", *line]


def python_of(cluster: ClusterFile) -> str:
    """The interpreter of the training processes."""
    return sys.executable if cluster.container.kind == "none" else cluster.container.python


def container_prefix(cluster: ClusterFile) -> list[str]:
    """What stands between srun's own options and a command that is to run in the cluster's container."""
    container, mounts = cluster.container, ",".join(cluster.container.mounts)
    if container.kind == "pyxis":
        given = [f"--container-image={container.image}", f"--container-workdir={Path.cwd()}"]
        return [*given, *([f"--container-mounts={mounts}"] if mounts else [])]
    if container.kind == "apptainer":
        bind = ["--bind", mounts] if mounts else []
        return ["apptainer", "exec", "--nv", "--pwd", str(Path.cwd()), *bind, container.image]
    return []


def training(
    cluster: ClusterFile, launcher: str, nodes: Sequence[str], run_dir: Path, attempt: str, arguments: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Command that trains with one process a GPU of `nodes`, and what it needs in its environment.

    Every rank's output goes to RUN/logs/ATTEMPT/rank-NNNNN.log.
    """
    logs, gpus = attempt_dir(run_dir, attempt).resolve(), cluster.gpus_per_node
    train = ["-m", "sdlm_megatron.train", *arguments]
    if launcher == "srun":
        line = on_nodes(cluster, nodes, gpus, train)
        line[1:1] = [f"--output={logs}/rank-%5t.log"]
        return line, {"SDLM_LAUNCH": "srun", "LOCAL_WORLD_SIZE": str(gpus)}
    python = python_of(cluster)
    ranks = [f"--nproc-per-node={gpus}", "--no-python", "bash", "-c", RANK_LINE, python, *train]
    line = on_nodes(cluster, nodes, 1, [])[:-1]  # bash in the place of Python
    line[1:1] = [f"--output={logs}/node-%5t.log"]
    return [*line, "bash", "-c", TORCHRUN_LINE, python, *ranks], {"SDLM_RANK_LOGS": str(logs)}
