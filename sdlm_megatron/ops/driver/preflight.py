"""Check the nodes of a Slurm job before training starts on them: GPUs, disks, equal code and configuration, clocks,
and the speed of an all-reduce inside and between nodes.

Runs on the batch node and starts a short program on each node with srun (ops/node/node_program.py). Writes
preflight.txt (one table) and preflight.json into RUN/logs/JOB-RESTART, and bad nodes with date and reason into
RUN/bad-nodes.txt. Exit code: 0 enough nodes are healthy, 3 too few are, 2 user error.
"""

import argparse
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median_high, median_low
from typing import Any

from sdlm_megatron.config.command_line import make_parser, parse_with_settings
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.files import write_json, write_text
from sdlm_megatron.ops.driver.cluster_file import CLUSTER_HELP, ClusterFile, load_cluster
from sdlm_megatron.ops.driver.launch import on_nodes, training_environment, with_setup
from sdlm_megatron.ops.driver.slurm_commands import BUSY, SlurmJob, expand_nodes
from sdlm_megatron.ops.driver.verdict import (
    ANSWERS,
    ELSEWHERE,
    FAILED,
    NodeReport,
    add_bad_nodes,
    best_speeds,
    common_failures,
    compare_values,
    format_table,
    nodes_to_replace,
    pair_rounds,
    speed_floor,
)
from sdlm_megatron.ops.node.limits import CLOCK, CPU_RANKS, MEASURE_SECONDS, MINIMUM_SPEEDS, NOT_SHARED, Check, Limits
from sdlm_megatron.ops.node.node_checks import hash_environment

EXAMPLE = "sdlm preflight --run-dir RUN --nodes-needed 29 --cluster mine --config sdlm_32b_d4 --data.path=DATA"
TOO_FEW_NODES = 3
POLL_SECONDS = 0.1

PROGRAM = "sdlm_megatron.ops.node.node_program"
"""Named, not imported: it reaches torch, which takes seconds to import and is not needed on the batch node."""
Pair = tuple[str, str]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    notes = "Runs inside a Slurm job. The training's own settings may follow as --section.key=value."
    parser = make_parser("sdlm preflight", __doc__, example=EXAMPLE, notes=notes, settings=RunConfig)
    parser.add_argument("--run-dir", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--nodes-needed", type=int, required=True, metavar="N", help="nodes that the training takes")
    parser.add_argument("--nodes", metavar="LIST", help="such as node[01-32]; default: all nodes of the job")
    parser.add_argument("--config", default="", help="file or preset of the training, compared on all nodes")
    parser.add_argument("--cluster", default="default", metavar="NAME", help=f"{CLUSTER_HELP}; holds the limits")
    parser.add_argument("--quick", action="store_true", help="skip the measurements of speed")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args, overrides = parse_with_settings(build_parser(), argv)
    if args.nodes_needed < 1:
        raise ConfigError(f"--nodes-needed is {args.nodes_needed}", "the command line", "give 1 or more")
    cluster, job = load_cluster(args.cluster), SlurmJob.current()
    names = expand_nodes(args.nodes) if args.nodes else job.nodes
    report = run_preflight(
        args.run_dir,
        args.run_dir / "logs" / job.name,
        names,
        args.nodes_needed,
        cluster,
        args.config,
        overrides,
        partial(print, file=sys.stderr, flush=True),
        quick=args.quick,
    )
    print(report["table"], flush=True)
    if not report["ok"]:
        raise SystemExit(TOO_FEW_NODES)


def run_preflight(
    run_dir: Path,
    logs: Path,
    names: Sequence[str],
    needed: int,
    cluster: ClusterFile,
    config: str,
    overrides: Sequence[str],
    notify: Callable[[str], None],
    *,
    quick: bool = False,
) -> dict[str, Any]:
    """Checks the nodes `names` and writes the report into `logs` (RUN/logs/JOB-RESTART).

    Args:
        needed: number of nodes that the training takes.
        config: file or preset of the training; "": no configuration is compared.
        overrides: settings of the training, `--a.b=c`.
        notify: receives a line when a stage begins.
        quick: skip the measurements of speed.

    Returns:
        The content of preflight.json: {"ok", "needed", "seconds", "healthy": [node], "bad": {node: reason},
        "blamed": the bad nodes to replace, "everywhere": failures of all nodes that other nodes would share,
        "nodes": {node: checks}, "table": text}.
    """
    start = time.monotonic()
    whole_node = replace(cluster, cpus_per_task=0)  # one task, which shares all CPUs of the node among its processes
    stages = NodeStages(
        limits=replace(cluster.preflight, gpus=cluster.expected_gpus),
        task={"run_dir": str(run_dir.resolve()), "config": config, "overrides": list(overrides)},
        folder=_new_folder(logs),
        command=lambda node, arguments: with_setup(whole_node, on_nodes(whole_node, [node], 1, arguments)),
        environment=training_environment(cluster),
        notify=notify,
    )
    report = _report(stages.run(names, quick=quick), needed, time.monotonic() - start)
    add_bad_nodes(run_dir, report["blamed"])
    write_json(logs / "preflight.json", report)
    write_text(logs / "preflight.txt", report["table"] + "\n")
    return report


def _report(nodes: Sequence[NodeReport], needed: int, seconds: float) -> dict[str, Any]:
    blamed, everywhere = nodes_to_replace(nodes), common_failures(nodes)
    bad = {node.name: node.why for node in nodes if node.failed} | blamed
    healthy = [node.name for node in nodes if node.name not in bad]
    count = f"{len(healthy)} of {len(nodes)} nodes are healthy, {needed} are needed; {seconds:.0f} s"
    lines = [format_table(nodes), count]
    if blamed:
        lines.append(f"excluded from now on (bad-nodes.txt of the run): {', '.join(blamed)}")
    if everywhere:
        lines.append(f"failed on every node, so not a fault of single nodes: {everywhere}")
    return {
        "ok": len(healthy) >= needed,
        "needed": needed,
        "seconds": round(seconds, 1),
        "healthy": healthy,
        "bad": bad,
        "blamed": blamed,
        "everywhere": everywhere,
        "nodes": {node.name: [vars(check) for check in node.checks] for node in nodes},
        "table": "\n".join(lines),
    }


def _new_folder(logs: Path) -> Path:
    """A folder for the files of the nodes. Each pre-flight has its own, so that old results are never read."""
    number = 0
    while (folder := logs / f"preflight-{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


class NodeRun:
    """The node program on one node, started by srun; its output is in a log, its result in a file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, result: Path) -> None:
        self.log, self.result_file, self.started = log, result, time.time()
        self.clock: tuple[float, float] | None = None  # the node's time, and this node's when it arrived
        with open(log, "w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # signals to the job's batch shell are for the driver only
            )

    def ended(self) -> bool:
        """Whether the program has ended; also looks for its clock line."""
        code = self.process.poll()
        # srun writes the log on this node, so a line shows here without the delay of a shared file system.
        if self.clock is None:
            with suppress(OSError):  # there is a next look
                for line in self.log.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True):
                    if line.startswith(CLOCK) and line.endswith("\n"):
                        self.clock = float(line[len(CLOCK) :]), time.time()
                        break
        return code is not None

    def stop(self) -> None:
        """Ends srun, also that of a node that is cut off."""
        for end in (self.process.terminate, self.process.kill):
            if self.process.poll() is None:
                end()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=2)

    @property
    def answer(self) -> str:
        """Value of the check "answers" of a node without a result."""
        busy = any(BUSY.search(line) for line in self._lines() if line.startswith("srun:"))
        code = self.process.poll() or 0  # above 127 a signal ended it; with 0 its result does not show here
        return FAILED if 0 < code < 128 and not busy else "no"

    def _lines(self) -> list[str]:
        text = self.log.read_text(errors="replace", encoding="utf-8")
        return [line.strip() for line in text.splitlines() if line.strip()]

    def result(self) -> dict[str, Any] | str:
        """The result, or the reason why there is none."""
        lines = self._lines()
        last = f": {lines[-1][:300]}" if lines else ""
        code = self.process.poll()
        if code is None:
            return f"no result in time{last}"
        for _ in range(50 if code == 0 else 1):
            try:
                return dict(json.loads(self.result_file.read_text(encoding="utf-8")))
            except FileNotFoundError:
                time.sleep(0.1)  # a shared file system may show another node's new file late
        return f"the program on the node ended with code {code}{last}"


@dataclass
class NodeStages:
    """The two stages of a pre-flight: each node by itself, then the network pair by pair.

    A node that has failed a check takes no part in what follows.
    """

    limits: Limits
    task: dict[str, Any]  # arguments of the stage "checks" besides the limits
    folder: Path
    command: Callable[[str, list[str]], list[str]]  # builds the command that runs Python with arguments on a node
    environment: Mapping[str, str]
    notify: Callable[[str], None]
    reports: dict[str, NodeReport] = field(default_factory=dict)
    backend: str = "gloo"
    ports: dict[str, int] = field(default_factory=dict)  # a free port of each node

    def run(self, names: Sequence[str], *, quick: bool = False) -> list[NodeReport]:
        """Runs the stages; `quick` skips the measurements of speed."""
        self.reports = {name: NodeReport(name) for name in names}
        self.notify(f"pre-flight of {len(names)} nodes: GPUs, disks, code, configuration")
        speeds = self._check_each(measure_speed=not quick)
        if not quick:
            self._judge_speeds(speeds)
            self.notify("pre-flight: all-reduce between nodes")
            self._measure_network()
        return list(self.reports.values())

    def _healthy(self) -> list[str]:
        return [name for name, node in self.reports.items() if not node.failed]

    def _run_programs(
        self, stage: str, tasks: Mapping[str, dict[str, Any]], seconds: float
    ) -> tuple[dict[str, dict[str, Any]], dict[str, NodeRun]]:
        """Runs the node program on all nodes of `tasks` at the same time.

        Returns:
            results of the nodes that wrote one, and all runs. A node without a result gets a failed check.
        """
        # The token proves that both sides see the same folder.
        token = uuid.uuid4().hex
        write_text(self.folder / "token", token)
        runs: dict[str, NodeRun] = {}
        try:
            for name, task in tasks.items():
                log, result = self.folder / f"{stage}-{name}.log", self.folder / f"{stage}-{name}.json"
                text = json.dumps({**task, "token": token})
                program = ["-u", "-m", PROGRAM, str(self.folder.resolve()), result.name, stage.split("-")[0], text]
                runs[name] = NodeRun(self.command(name, program), self.environment, log, result)
            deadline, waiting = time.monotonic() + seconds, list(runs.values())
            while waiting and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                waiting = [run for run in waiting if not run.ended()]
            results = {}
            # nodes that take no part in a later stage have passed the first one: that is no better answer
            check = ANSWERS if stage == "checks" else f"{stage} {ANSWERS}"
            for name, run in runs.items():
                result_or_reason = run.result()
                if isinstance(result_or_reason, dict):
                    results[name] = result_or_reason
                elif run.process.returncode == NOT_SHARED:
                    why = "the run folder on this node is not the batch node's"
                    self.reports[name].add("run disk", False, ELSEWHERE, why)
                else:
                    self.reports[name].add(check, False, run.answer, result_or_reason)
            if stage == "checks" or len(results) < len(tasks):
                for name in results:
                    self.reports[name].add(check, True, "yes")
        finally:
            for run in runs.values():
                run.stop()
        return results, runs

    def _check_each(self, *, measure_speed: bool) -> dict[str, dict[str, Any]]:
        """Runs the stage "checks", and compares what must be equal; returns the in-node speeds."""
        seconds = self.limits.answer_seconds + (MEASURE_SECONDS if measure_speed else 0)
        task = {**self.task, "limits": asdict(self.limits), "measure_speed": measure_speed}
        results, runs = self._run_programs("checks", dict.fromkeys(self.reports, task), seconds)
        compared: dict[str, dict[str, str]] = {}
        clocks = clock_checks({name: runs[name] for name in results}, self.limits.clock_seconds)
        for name, result in results.items():
            self.ports[name] = result["port"]
            checks = [Check(**check) for check in result["checks"]]
            self.reports[name].checks += [clocks[name], *checks]
            for key, value in result["shared_values"].items():
                compared.setdefault(key, {})[name] = value
        batch_values = hash_environment(self.task["config"], self.task["overrides"])
        for key, values in compared.items():
            for name, check in compare_values(key, values, batch_values.get(key, "")).items():
                self.reports[name].checks.append(check)
        return {name: results[name]["speed"] for name in self._healthy() if results[name]["speed"]}

    def _judge_speeds(self, speeds: Mapping[str, dict[str, Any]]) -> None:
        """Compares the in-node all-reduces and the GPUs' speeds with the limits and the medians."""
        self.backend = "nccl" if any(speed.get("backend") == "nccl" for speed in speeds.values()) else "gloo"
        minimum, factor = self._limits_of(self.limits.node_gbs, 0)
        floor = speed_floor([speed["gbs"] for speed in speeds.values() if speed.get("gbs")], minimum, factor)
        tflops = sorted(t for speed in speeds.values() for t in speed.get("tflops", []))
        for name, speed in speeds.items():
            node = self.reports[name]
            if "error" in speed:
                node.add("in node", False, "error", speed["error"])
                continue
            if speed["gbs"] is None:
                node.add("in node", None, "skipped", "the node has a single GPU")
            else:
                slow = speed["gbs"] < floor
                why = f"all-reduce inside the node at {speed['gbs']:.3g} GB/s, the minimum is {floor:.3g} GB/s"
                node.add("in node", not slow, f"{speed['gbs']:.3g} GB/s", why if slow else "")
            if speed["tflops"]:
                node.checks.append(gpu_speed_check(speed["tflops"], factor * tflops[len(tflops) // 2]))

    def _limits_of(self, minimum: float | None, place: int) -> tuple[float, float]:
        """Minimum bandwidth and slow_factor, with the backend's defaults where the cluster file sets none."""
        defaults, factor = MINIMUM_SPEEDS[self.backend], self.limits.slow_factor
        return defaults[place] if minimum is None else minimum, defaults[2] if factor is None else factor

    def _measure_network(self) -> None:
        names = self._healthy()
        if len(names) < 2:
            for name in names:
                self.reports[name].add("network", None, "skipped", "no other healthy node to measure with")
            return
        minimum, factor = self._limits_of(self.limits.network_gbs, 1)
        speeds: dict[Pair, float] = {}
        errors: dict[Pair, str] = {}
        self._measure_pairs("network", pair_rounds(names), speeds, errors)
        floor = speed_floor(list(speeds.values()), minimum, factor)
        # A slow node makes both of its pairs slow, but its neighbors are cleared by their other pairs. Only a node
        # between two slow ones is not: each node that is slow in all its pairs is measured again with a good one.
        good = [name for name, speed in best_speeds(speeds).items() if speed >= floor]
        suspects = [name for name, speed in best_speeds(speeds).items() if speed < floor]
        pairs = list(zip(suspects, cycle(good), strict=False))
        if pairs:
            for name, partner in pairs:
                self.notify(f"pre-flight: {name} is slow; measuring it again with {partner}")
            rounds = [pairs[at : at + len(good)] for at in range(0, len(pairs), len(good))]
            self._measure_pairs("network-again", rounds, speeds, errors)
        for name, speed in best_speeds(speeds).items():
            self.reports[name].checks.append(network_check(name, speed, floor, speeds, errors, bool(good)))

    def _measure_pairs(
        self, stage: str, rounds: Sequence[Sequence[Pair]], speeds: dict[Pair, float], errors: dict[Pair, str]
    ) -> None:
        """Measures pairs of nodes, the rounds one after the other; adds to `speeds` (GB/s) and `errors`."""
        ranks = self.limits.gpus if self.backend == "nccl" else CPU_RANKS
        tasks: dict[str, dict[str, Any]] = {}
        for number, pairs in enumerate(rounds):
            for pair in pairs:
                for name in pair:
                    task = tasks.setdefault(name, {"ranks": ranks, "rounds": [None] * len(rounds)})
                    task["rounds"][number] = {"host": pair[0], "port": self.ports[pair[0]], "first": name == pair[0]}
        results, _ = self._run_programs(stage, tasks, len(rounds) * MEASURE_SECONDS + self.limits.answer_seconds)
        for number, pairs in enumerate(rounds):
            for pair in pairs:
                sides = [results[name]["speeds"][number] for name in pair if name in results]
                side: dict[str, Any] = next((s for s in sides if "gbs" in s), next(iter(sides), {"error": "no answer"}))
                speeds[pair] = max(speeds.get(pair, 0.0), side.get("gbs", 0.0))
                errors.pop(pair, None)
                if "error" in side:
                    errors[pair] = side["error"]


def clock_checks(runs: Mapping[str, NodeRun], maximum: float) -> dict[str, Check]:
    """The nodes' clocks against their median; where two clocks disagree, against this node's.

    A node took its time after `started` and before the line arrived, so only a difference beyond these counts.
    """
    spans = {  # least and greatest difference of the node's clock from this one
        name: (run.clock[0] - run.clock[1], run.clock[0] - run.started) for name, run in runs.items() if run.clock
    }
    nearest = [_clamp(0.0, *span) for span in spans.values()]
    reference = _clamp(0.0, median_low(nearest), median_high(nearest)) if nearest else 0.0
    checks = {}
    for name in runs:
        if name not in spans:
            checks[name] = Check("clock", None, "skipped", "the node sent no time")
            continue
        least, greatest = (difference - reference for difference in spans[name])
        certain = max(least, -greatest)
        why = f"{least:+.1f} s against the median of the nodes" if certain > maximum else ""
        checks[name] = Check("clock", certain <= maximum, f"{least:+.2f} s", why)
    return checks


def _clamp(value: float, least: float, greatest: float) -> float:
    return min(max(value, least), greatest)


def gpu_speed_check(tflops: Sequence[float], floor: float) -> Check:
    """Speed of a node's GPUs in a matrix product; a slow one runs at reduced clocks."""
    slow = [
        f"GPU {i}: {speed:.0f} TFLOP/s, the minimum is {floor:.0f}" for i, speed in enumerate(tflops) if speed < floor
    ]
    return Check("clocks", not slow, f"{min(tflops):.0f} TFLOP/s", "; ".join(slow))


def network_check(
    name: str, speed: float, floor: float, speeds: Mapping[Pair, float], errors: Mapping[Pair, str], others_good: bool
) -> Check:
    """Whether a node's fastest pair is fast enough; the reason lists all pairs of a slow node."""
    if speed >= floor:
        return Check("network", True, f"{speed:.3g} GB/s")
    parts = []
    for pair, pair_speed in speeds.items():
        if name in pair:
            other = pair[0] if pair[1] == name else pair[1]
            parts.append(f"with {other} {errors.get(pair) or f'{pair_speed:.3g} GB/s'}")
    why = f"all-reduce {', '.join(parts)}; the minimum is {floor:.3g} GB/s"
    if not others_good:
        why += "; no pair of nodes is faster: check the limit, the network interface and the network, not one node"
    return Check("network", False, f"{speed:.3g} GB/s", why)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
