"""The pre-flight's program on one node: checks the node, or measures its network, and writes one result file.

The batch node starts it with srun (ops/driver/preflight.py). The result is written whole (write, fsync, rename), so the
batch node reads it complete or not at all. Exit code: 0 the result is written, 4 the run folder is not the batch
node's, anything else a failure whose reason is the last line of the output.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import UserError, run_cli
from sdlm_megatron.files import write_json
from sdlm_megatron.ops.node.bandwidth import RankGroup, free_port, measure
from sdlm_megatron.ops.node.limits import CLOCK, CPU_RANKS, MEASURE_SECONDS, NOT_SHARED, Check, Limits
from sdlm_megatron.ops.node.local_environment import set_local_environment
from sdlm_megatron.ops.node.node_checks import check_node

DRIVER = Path("/proc/driver/nvidia/version")  # there while NVIDIA's driver is loaded


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m sdlm_megatron.ops.node.node_program",
        __doc__,
        example="python -m sdlm_megatron.ops.node.node_program RUN/logs/JOB/preflight-0 checks-node01.json checks TASK",
    )
    parser.add_argument("folder", type=Path, help="folder for the result, written by the batch node")
    parser.add_argument("result", help="name of the result file")
    parser.add_argument("stage", choices=("checks", "network"), help="work to do")
    parser.add_argument("task", type=json.loads, help="its arguments, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    # The first line, before anything slow: the batch node compares it with its own clock when the line arrives.
    print(f"{CLOCK}{time.time()}", flush=True)
    # A signal that announces the end of the job is for the driver; a node that dies of it would look broken.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    args = build_parser().parse_args(argv)
    token = args.task.pop("token")
    try:
        shared = (args.folder / "token").read_text(encoding="utf-8") == token
    except OSError:
        shared = False
    if not shared:
        print(f"{args.folder} on this node is not the batch node's folder", flush=True)
        raise SystemExit(NOT_SHARED)
    stage = run_checks if args.stage == "checks" else run_network
    write_json(args.folder / args.result, stage(**args.task))
    sys.stdout.flush()
    os._exit(0)  # skips the slow shutdown of helper processes


def run_checks(
    limits: dict[str, Any], run_dir: str, config: str, overrides: Sequence[str], measure_speed: bool
) -> dict[str, Any]:
    """Checks of this node, then the all-reduce over its own ranks if the checks passed.

    Returns:
        {"checks", "shared_values", "speed": result of `measure` or null, "port": a free port for the network stage}.
    """
    print("checking GPUs, disks, code and configuration", flush=True)
    node_limits = Limits(**limits)
    checks, shared_values = check_node(node_limits, run_dir, config, overrides)
    try:
        set_local_environment()
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        checks.append(Check("environment", True, f"gloo on {interface}" if interface else "ok"))
    except UserError as error:
        checks.append(Check("environment", False, "wrong", f"{error.what}; {error.fix}"))
    speed = None
    if measure_speed and not any(check.ok is False for check in checks):
        # The check "ecc" exists only where NVML answered. /dev/nvidia* may be there without usable GPUs.
        real = any(check.name == "ecc" for check in checks) or DRIVER.exists()
        ranks = (node_limits.gpus if real else None) or CPU_RANKS
        print(f"measuring an all-reduce over {ranks} ranks of this node", flush=True)
        speed = measure(RankGroup("127.0.0.1", free_port(), 0, ranks, ranks, matmul=True), MEASURE_SECONDS)
    return {
        "checks": [asdict(check) for check in checks],
        "shared_values": shared_values,
        "speed": speed,
        "port": free_port(),
    }


def run_network(ranks: int, rounds: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """All-reduces with one other node after another.

    Args:
        ranks: ranks on each node.
        rounds: for each round the pair, {"host", "port", "first": whether this node has rank 0}, or None.

    Returns:
        {"speeds": results of `measure`, one per round, null where this node had no pair}.
    """
    set_local_environment()
    start = time.monotonic()
    speeds: list[dict[str, Any] | None] = []
    for number, pair in enumerate(rounds, 1):
        if pair is None:
            speeds.append(None)
            continue
        print(f"measuring an all-reduce in round {number}, meeting at {pair['host']}", flush=True)
        group = RankGroup(pair["host"], pair["port"], 0 if pair["first"] else ranks, ranks, 2 * ranks, matmul=False)
        # Deadlines count from the start: a partner that lost its earlier rounds to a hang is still waited for.
        speeds.append(measure(group, number * MEASURE_SECONDS - (time.monotonic() - start)))
    return {"speeds": speeds}


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
