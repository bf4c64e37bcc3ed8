"""Checks the nodes of a Slurm job before the run starts on them: GPUs, disks, same code and configuration, clocks,
and the speed of an all-reduce inside and between nodes.

Runs on the job's batch node and uses srun itself. Writes preflight.txt (one table) and preflight.json into
RUN/logs/JOB-RESTART, and bad nodes with date and reason into RUN/bad-nodes.txt. Ends with 0 if enough nodes are
healthy, with 3 if not, with 2 on a mistake of the user.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.files import write_json, write_text
from sdlm_megatron.ops.driver.agents import Agent
from sdlm_megatron.ops.driver.cluster_file import FIELD_ENVIRONMENT, ClusterFile, load_cluster
from sdlm_megatron.ops.driver.launch import on_nodes
from sdlm_megatron.ops.driver.limits import limits_from
from sdlm_megatron.ops.driver.preflight_run import Flight
from sdlm_megatron.ops.driver.verdict import Node, add_bad_nodes, at_fault_everywhere, table, to_blame

NOT_ENOUGH = 3
EXAMPLE = "sdlm preflight --run-dir RUN --nodes-needed 29 --cluster mine --config sdlm_32b_d4 --data.path=DATA"


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    notes = "Runs inside a Slurm job. The training's own settings may follow as --section.key=value."
    parser = make_parser("sdlm preflight", __doc__, example=EXAMPLE, notes=notes, settings=RunConfig)
    parser.add_argument("--run-dir", metavar="RUN", help="folder of the run")
    parser.add_argument("--nodes-needed", type=int, metavar="N", help="healthy nodes that the training takes")
    parser.add_argument("--nodes", metavar="LIST", help="such as node[01-32]; default: the whole allocation")
    parser.add_argument("--config", default="", help="file or preset of the training, compared on all nodes")
    parser.add_argument(
        "--cluster", default="default", metavar="NAME", help="slurm/clusters/NAME.yaml, or a file; holds the limits"
    )
    parser.add_argument("--quick", action="store_true", help="no measurements of speed: a retry on the same nodes")
    parser.add_argument("--node-only", action="store_true", help="what runs on each node; started by the above")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args, overrides = build_parser().parse_known_args(argv)
    if args.node_only:
        from sdlm_megatron.ops.driver.node_agent import serve

        _ignore_signals()
        serve()
        return
    if not args.run_dir or not args.nodes_needed or args.nodes_needed < 1:
        raise ConfigError("--run-dir and --nodes-needed (1 or more) are needed", "the command line", EXAMPLE)
    names = node_names(args.nodes)
    cluster = load_cluster(args.cluster)
    _ignore_signals()
    report = fly(
        Path(args.run_dir), names, args.nodes_needed, cluster, args.config, overrides, Progress(), quick=args.quick
    )
    print(report["table"], flush=True)
    if not report["ok"]:
        raise SystemExit(NOT_ENOUGH)


def _ignore_signals() -> None:
    """That the job's time is up is for its driver to act on; dying of the signal would look like a bad node."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def fly(
    run_dir: Path,
    names: Sequence[str],
    needed: int,
    cluster: ClusterFile,
    config: str,
    overrides: Sequence[str],
    say: Callable[[str], None],
    *,
    quick: bool = False,
) -> dict[str, Any]:
    """Runs the pre-flight of nodes and writes its report.

    Returns:
        preflight.json: {"ok", "needed", "seconds", "healthy": [node], "bad": {node: why}, "blamed": those of
        the bad that are to be replaced, "everywhere": what all failed and no other node would
        mend, "nodes": {node: checks}, "table": text}. A node that is bad but not blamed
        failed only what all nodes failed: other nodes would not help.
    """
    start = time.monotonic()
    logs = run_dir / "logs" / job_name()
    (logs / "preflight").mkdir(parents=True, exist_ok=True)
    nodes = _nodes(run_dir, names, cluster, config, overrides, logs / "preflight", say, quick)
    healthy = [node.name for node in nodes if not node.failed]
    blamed = to_blame(nodes)
    add_bad_nodes(run_dir, blamed)
    seconds = time.monotonic() - start
    lines = [table(nodes), f"{len(healthy)} of {len(nodes)} nodes are healthy, {needed} are needed; {seconds:.0f} s"]
    if blamed:
        lines.append(f"left out from now on (bad-nodes.txt of the run): {', '.join(blamed)}")
    everywhere = at_fault_everywhere(nodes)
    if everywhere:
        lines.append(f"not a matter of nodes, every one failed it: {everywhere}")
    report: dict[str, Any] = {
        "ok": len(healthy) >= needed,
        "needed": needed,
        "seconds": round(seconds, 1),
        "healthy": healthy,
        "bad": {node.name: node.why for node in nodes if node.failed},
        "blamed": blamed,
        "everywhere": everywhere,
        "nodes": {node.name: [vars(check) for check in node.checks] for node in nodes},
        "table": "\n".join(lines),
    }
    write_json(logs / "preflight.json", report)
    write_text(logs / "preflight.txt", report["table"] + "\n")
    return report


def _nodes(
    run_dir: Path,
    names: Sequence[str],
    cluster: ClusterFile,
    config: str,
    overrides: Sequence[str],
    logs: Path,
    say: Callable[[str], None],
    quick: bool,
) -> list[Node]:
    """Starts a program on each node, flies, and ends the programs."""
    limits = limits_from({"gpus": cluster.gpus_per_node, **cluster.preflight}, "the cluster file")
    environment = {**FIELD_ENVIRONMENT, **os.environ, **{key: str(value) for key, value in cluster.env.items()}}
    whole = replace(cluster, cpus_per_task=0)  # its processes share all CPUs of the node
    token, token_file = uuid.uuid4().hex, logs / "token"
    write_text(token_file, token)
    asked = {"config": config, "overrides": list(overrides), "run_dir": str(run_dir.resolve())}
    asked |= {"token_file": str(token_file.resolve()), "token": token}
    agents: dict[str, Agent] = {}
    try:
        for name in names:
            command = on_nodes(whole, [name], 1, ["-u", "-m", "sdlm_megatron.ops.driver.preflight", "--node-only"])
            agents[name] = Agent(name, command, environment, logs / f"{name}.log")
        return Flight(limits, asked, agents, say, quick).run()
    finally:
        for agent in agents.values():
            agent.let_go()
        for agent in agents.values():
            agent.close()


class Progress:
    """Says on stderr which stage begins, and after how many seconds."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"pre-flight {time.monotonic() - self.start:4.0f} s: {text}", file=sys.stderr, flush=True)


def job_name() -> str:
    """JOB-RESTART."""
    return f"{os.environ.get('SLURM_JOB_ID', 'local')}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def node_names(nodes: str | None) -> list[str]:
    """The nodes of a Slurm list, or of this job."""
    nodes = nodes or os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ConfigError(
            "no nodes: this runs inside a Slurm job", "SLURM_JOB_NODELIST", "start it from a batch script"
        )
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"scontrol does not run: {error.strerror}", "PATH", "start it where Slurm is") from None
    if done.returncode or not done.stdout.split():
        raise ConfigError(f"{nodes} is no list of nodes", "--nodes", done.stderr.strip())
    return done.stdout.split()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
