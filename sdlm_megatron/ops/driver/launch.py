"""Command lines and environment of a job's processes: srun for each rank or one torchrun per node, host or container.

As a program it runs one command of this package as a job of one node; the scripts of slurm/ other than train_*.sh end
in it.
"""

import argparse
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.ops.attempt import attempt_dir
from sdlm_megatron.ops.driver.cluster_file import CLUSTER_HELP, FIELD_ENVIRONMENT, ClusterFile, load_cluster
from sdlm_megatron.ops.driver.slurm_commands import SlurmJob, slurm_environment
from sdlm_megatron.ops.node.local_environment import cache_variables

LAUNCHERS = ("srun", "torchrun")
VARIABLES = {"DATA": "data.path", "BASE": "checkpoint.base", "RUN_DIR": "run_dir"}
"""Environment variables of the training scripts, and the settings that they set."""
TORCHRUN_LINE = (
    'exec "$0" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" '
    '--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0 "$@"'
)
"""Run by bash on each node; "$0" is Python."""
RANK_LINE = 'exec "$0" "$@" >"$SDLM_RANK_LOGS/rank-$(printf %05d "$RANK").log" 2>&1'


def variable_overrides(overrides: Sequence[str]) -> list[str]:
    """Settings of the environment variables DATA, BASE and RUN_DIR as `--data.path=...`; `overrides` take precedence.

    Raises:
        ConfigError: neither a variable nor a setting names the data or the base model.
    """
    settings = []
    for variable, key in VARIABLES.items():
        overridden = any(o.startswith(f"--{key}=") for o in overrides)
        value = os.environ.get(variable, "")
        if value and not overridden:
            settings.append(f"--{key}={Path(value).absolute()}")
        elif not value and not overridden and variable != "RUN_DIR":
            raise ConfigError(
                f"{variable} is not set",
                "the environment",
                f"{variable}=DIR before the command, or -- --{key}=DIR after it",
            )
    return settings


def training_environment(cluster: ClusterFile) -> dict[str, str]:
    """This shell's environment over FIELD_ENVIRONMENT, and the cluster file's `env` over both."""
    return {**FIELD_ENVIRONMENT, **slurm_environment(), **{key: str(value) for key, value in cluster.env.items()}}


def node_address(node: str) -> str:
    """The node's address, so that rank 0 listens on that interface only; the name where it has several, or none."""
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(node, None, type=socket.SOCK_STREAM)}
    except OSError:
        return node
    address = addresses.pop()
    return node if addresses or ipaddress.ip_address(address.partition("%")[0]).is_loopback else address


def attempt_environment(
    cluster: ClusterFile, job: SlurmJob, nodes: Sequence[str], run_dir: Path, attempt: str
) -> dict[str, str]:
    """Environment of one start of the training processes."""
    tries = int(attempt.rsplit("-", 1)[1])
    return {
        **training_environment(cluster),
        "MASTER_ADDR": node_address(nodes[0]),
        # Each job and each try has its own port: that of the try before may still be in TIME_WAIT.
        "MASTER_PORT": str(20000 + (int(job.id) * 16 + job.restart * 4 + tries) % 12000),
        "SDLM_ATTEMPT": attempt,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(attempt_dir(run_dir, attempt).resolve() / "nccl-trace-"),
    }


def on_nodes(cluster: ClusterFile, nodes: Sequence[str], tasks_per_node: int, arguments: Sequence[str]) -> list[str]:
    """srun command that runs Python with `arguments` on `nodes`, in the cluster's container if it has one."""
    cpus = cluster.cpus_per_task or max(1, int(os.environ.get("SLURM_CPUS_ON_NODE", 1)) // tasks_per_node)
    srun = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={cpus}",  # since Slurm 22.05 srun does not inherit it from the job
        "--distribution=block",  # consecutive ranks share a node
        "--mem=0",  # all of the job's memory
        "--overlap",  # do not wait for a step that is still ending on a lost node
        "--kill-on-bad-exit=1",
        "--unbuffered",
        "--export=ALL",
    ]
    if os.environ.get("SLURM_GPUS_PER_NODE") or os.environ.get("SLURM_JOB_GPUS"):
        srun.append(f"--gpus-per-node={cluster.gpus_per_node}")
    return [*srun, *container_prefix(cluster), python_of(cluster), *arguments]


def with_setup(cluster: ClusterFile, line: list[str]) -> list[str]:
    """The command after the cluster's `setup` lines, whose environment its processes inherit."""
    if not cluster.setup:
        return line
    return ["bash", "-c", "\n".join(["set -e", *cluster.setup, 'exec "$@"']), "bash", *line]


def python_of(cluster: ClusterFile) -> str:
    """Interpreter of the training processes."""
    return sys.executable if cluster.container.kind == "none" else cluster.container.python


def container_prefix(cluster: ClusterFile) -> list[str]:
    """Arguments between srun's own options and a command that is to run in the cluster's container."""
    container, mounts = cluster.container, ",".join(cluster.container.mounts)
    if container.kind == "pyxis":
        options = [f"--container-image={container.image}", f"--container-workdir={Path.cwd()}"]
        return [*options, *([f"--container-mounts={mounts}"] if mounts else [])]
    if container.kind == "apptainer":
        bind = ["--bind", mounts] if mounts else []
        return ["apptainer", "exec", "--nv", "--pwd", str(Path.cwd()), *bind, container.image]
    return []


def training_command(
    cluster: ClusterFile, launcher: str, nodes: Sequence[str], run_dir: Path, attempt: str, arguments: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Command that trains with one process per GPU of `nodes`, and further environment variables that it needs.

    The output of each rank goes to RUN/logs/ATTEMPT/rank-NNNNN.log.
    """
    logs, gpus = attempt_dir(run_dir, attempt).resolve(), cluster.gpus_per_node
    train = ["-m", "sdlm_megatron.train", *arguments]
    if launcher == "srun":
        line = on_nodes(cluster, nodes, gpus, train)
        line[1:1] = [f"--output={logs}/rank-%5t.log"]
        return line, {"SDLM_LAUNCH": "srun", "LOCAL_WORLD_SIZE": str(gpus)}
    python = python_of(cluster)
    ranks = [f"--nproc-per-node={gpus}", "--no-python", "bash", "-c", RANK_LINE, python, *train]
    line = on_nodes(cluster, nodes, 1, [])[:-1]  # bash takes the place of Python
    line[1:1] = [f"--output={logs}/node-%5t.log"]
    return [*line, "bash", "-c", TORCHRUN_LINE, python, *ranks], {"SDLM_RANK_LOGS": str(logs)}


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    name = "python -m sdlm_megatron.ops.driver.launch"
    parser = make_parser(name, __doc__, example=f"{name} --cluster NAME -- export --ckpt RUN --out DIR")
    parser.add_argument("--cluster", default="default", metavar="NAME", help=CLUSTER_HELP)
    parser.add_argument("program", nargs="+", help="command of sdlm, or module of Python, and its arguments, after --")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    cluster = load_cluster(args.cluster)
    program = args.program if "." in args.program[0] else ["sdlm_megatron.cli", *args.program]
    line = [*container_prefix(cluster), python_of(cluster), "-m", *program]
    if cluster.container.kind == "pyxis":  # srun creates the container
        cpus = os.environ.get("SLURM_CPUS_ON_NODE", "1")
        line[:0] = ["srun", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cpus}", "--mem=0", "--export=ALL"]
    caches = cache_variables() if cluster.container.kind == "none" else {}  # a container has other folders
    environment = {**caches, **slurm_environment(), **{key: str(value) for key, value in cluster.env.items()}}
    raise SystemExit(subprocess.run(with_setup(cluster, line), env=environment).returncode)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
