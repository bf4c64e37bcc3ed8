"""The pre-flight of a job's nodes: asks each for its checks, compares them, and measures the network pair by pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any

from sdlm_megatron.ops.driver.agents import Agent, ask_all
from sdlm_megatron.ops.driver.limits import FLOORS, Limits
from sdlm_megatron.ops.driver.node_checks import same_values
from sdlm_megatron.ops.driver.verdict import Check, Node, agree, best_of, floor_of, pair_rounds

CPU_PROCESSES = 2  # a node in an all-reduce without GPUs
MEASURE_SECONDS = 120.0
"""Longest time of one all-reduce measurement, with the start of its processes."""


@dataclass
class Flight:
    """One pre-flight. `nodes` grows its checks as it goes; a node that failed one takes no part in the next stage."""

    limits: Limits
    asked: Mapping[str, Any]
    """Arguments of `check_node` beside the limits."""
    agents: dict[str, Agent]
    say: Callable[[str], None]
    quick: bool = False
    """No measurements: these nodes have trained a moment ago, and what ended it was no node."""
    nodes: dict[str, Node] = field(default_factory=dict)
    backend: str = "gloo"

    def run(self) -> list[Node]:
        """All stages."""
        self.nodes = {name: Node(name) for name in self.agents}
        self.say(f"{len(self.nodes)} nodes: starting")
        self._start()
        self.say("GPUs, disks, code, configuration")
        self._checks()
        if self.quick:
            return list(self.nodes.values())
        self.say("all-reduce inside each node")
        self._inside()
        self.say("all-reduce between nodes")
        self._between()
        return list(self.nodes.values())

    def _healthy(self) -> list[str]:
        return [name for name, node in self.nodes.items() if not node.failed]

    def _ask(self, questions: Mapping[str, Mapping[str, Any]], seconds: float) -> dict[str, dict[str, Any]]:
        """Answers of the nodes that gave one; a silent node fails here, once and for all."""
        found = ask_all(self.agents, questions, seconds)
        for name, answer in found.items():
            if "silent" in answer:
                self.nodes[name].add("answers", False, "no", answer["silent"])
        return {name: answer for name, answer in found.items() if "silent" not in answer}

    def _start(self) -> None:
        """Waits for the programs, then compares the clocks."""
        ready = self._ask({name: {"ask": "time"} for name in self.nodes}, self.limits.answer_seconds)
        for name, answer in self._ask({name: {"ask": "time"} for name in ready}, 30).items():
            self.nodes[name].checks += [Check("answers", True, "yes"), clock_check(answer, self.limits.clock_seconds)]

    def _checks(self) -> None:
        question = {"ask": "checks", "limits": asdict(self.limits), **self.asked}
        answers = self._ask(dict.fromkeys(self._healthy(), question), self.limits.answer_seconds)
        own = same_values(self.asked["config"], self.asked["overrides"])
        compared: dict[str, dict[str, str]] = {}
        for name, answer in answers.items():
            if "error" in answer:
                self.nodes[name].add("checks", False, "error", answer["error"])
                continue
            self.nodes[name].checks += [Check(**check) for check in answer["checks"]]
            for key, value in answer["same"].items():
                compared.setdefault(key, {})[name] = value
        for key, values in compared.items():
            for name, check in agree(key, values, own.get(key, "")).items():
                self.nodes[name].checks.append(check)

    def _processes(self) -> int:
        """Of each node in an all-reduce."""
        gpus = any(c.name == "ecc" for node in self.nodes.values() for c in node.checks)  # nvidia-smi answered
        return self.limits.gpus if gpus else CPU_PROCESSES

    def _inside(self) -> None:
        names = self._healthy()
        found = self._measure({(name,): name for name in names}, inside=True)
        self.backend = next((r["backend"] for r in found.values() if "backend" in r), "gloo")
        least, _, factor = FLOORS[self.backend]
        least = least if self.limits.node_gbs is None else self.limits.node_gbs
        factor = factor if self.limits.slow_factor is None else self.limits.slow_factor
        speeds = [answer["gbs"] for answer in found.values() if "gbs" in answer]
        floor = floor_of(speeds, least, factor)
        usual = sorted(t for answer in found.values() for t in answer.get("tflops", []))
        for (name,), answer in found.items():
            node = self.nodes[name]
            if "error" in answer:
                node.add("in node", False, "error", answer["error"])
                continue
            slow = answer["gbs"] < floor
            why = f"all-reduce at {answer['gbs']:.3g} GB/s inside the node, {floor:.3g} are needed" if slow else ""
            node.add("in node", not slow, f"{answer['gbs']:.3g} GB/s", why)
            if answer["tflops"]:
                self._gpu_speed(node, answer["tflops"], factor * usual[len(usual) // 2])

    def _gpu_speed(self, node: Node, tflops: Sequence[float], floor: float) -> None:
        slow = [
            f"GPU {i}: {speed:.0f} TFLOP/s, {floor:.0f} are needed" for i, speed in enumerate(tflops) if speed < floor
        ]
        node.add("clocks", not slow, f"{min(tflops):.0f} TFLOP/s", "; ".join(slow))

    def _between(self) -> None:
        names = self._healthy()
        if len(names) < 2:
            for name in names:
                self.nodes[name].add("network", None, "skipped", "no other healthy node to measure with")
            return
        _, least, factor = FLOORS[self.backend]
        least = least if self.limits.network_gbs is None else self.limits.network_gbs
        factor = factor if self.limits.slow_factor is None else self.limits.slow_factor
        speeds: dict[tuple[str, str], float] = {}
        errors: dict[tuple[str, str], str] = {}
        for pairs in pair_rounds(names):
            self._pairs(pairs, speeds, errors)
        floor = floor_of(list(speeds.values()), least, factor)
        # Both neighbours of a slow node are good if their other pair is. A node between two slow ones has no such
        # pair: who is slow in all is measured again, alone with a good node.
        good = [name for name, speed in best_of(speeds).items() if speed >= floor]
        suspects = [name for name, speed in best_of(speeds).items() if speed < floor]
        for name, partner in zip(suspects, cycle(good), strict=False):
            self.say(f"{name} is slow; once more with {partner}")
            self._pairs([(name, partner)], speeds, errors)
        for name, speed in best_of(speeds).items():
            self.nodes[name].checks.append(network_check(name, speed, floor, speeds, errors, bool(good)))

    def _pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        speeds: dict[tuple[str, str], float],
        errors: dict[tuple[str, str], str],
    ) -> None:
        """Measures pairs at the same time; no node is in two."""
        alive = [pair for pair in pairs if not any(self.nodes[name].silent for name in pair)]
        for pair, answer in self._measure({pair: pair[0] for pair in alive}, inside=False).items():
            assert len(pair) == 2
            speeds[pair] = max(speeds.get(pair, 0.0), answer.get("gbs", 0.0))
            if "error" in answer:
                errors[pair] = answer["error"]

    def _measure(self, groups: Mapping[tuple[str, ...], str], *, inside: bool) -> dict[tuple[str, ...], dict[str, Any]]:
        """All-reduces of groups of nodes at the same time; `groups` gives the node on which the group meets."""
        stores = self._ask({host: {"ask": "store"} for host in groups.values()}, self.limits.answer_seconds)
        questions, processes = {}, self._processes()
        for members, host in groups.items():
            if "port" not in stores.get(host, {}):
                continue
            for i, member in enumerate(members):
                group = {
                    "host": "127.0.0.1" if inside else host,
                    "port": stores[host]["port"],
                    "first_rank": i * processes,
                    "ranks": processes,
                    "world": len(members) * processes,
                    "matmul": inside,
                }
                questions[member] = {"ask": "measure", "group": group, "seconds": MEASURE_SECONDS}
        # torch is imported with the first measurement, which on a slow file system takes its time
        answers = self._ask(questions, MEASURE_SECONDS + self.limits.answer_seconds)
        found = {}
        for members, host in groups.items():
            said = [answers[member] for member in members if member in answers]
            wrong = {"error": stores.get(host, {}).get("error", "no answer")}
            found[members] = next((a for a in said if "gbs" in a), next(iter(said), wrong))
        return found


def clock_check(answer: Mapping[str, Any], most: float) -> Check:
    """A node's clock against this one's: it answered somewhere between question and answer."""
    difference = answer["time"] - (answer["asked"] + answer["took"] / 2)
    surely = max(0.0, abs(difference) - answer["took"] / 2)
    why = f"{difference:+.1f} s against the batch node" if surely > most else ""
    return Check("clock", surely <= most, f"{difference:+.2f} s", why)


def network_check(
    name: str,
    speed: float,
    floor: float,
    speeds: Mapping[tuple[str, str], float],
    errors: Mapping[tuple[str, str], str],
    others_good: bool,
) -> Check:
    """Whether a node's best pair is fast enough; says with which nodes it was slow."""
    if speed >= floor:
        return Check("network", True, f"{speed:.3g} GB/s")
    parts = []
    for pair, found in speeds.items():
        if name in pair:
            other = pair[0] if pair[1] == name else pair[1]
            said = errors.get(pair)
            parts.append(f"with {other} {said or f'{found:.3g} GB/s'}")
    why = f"all-reduce {', '.join(parts)}; {floor:.3g} GB/s are needed"
    if not others_good:
        why += "; no pair of nodes is faster: the limit, the network interface or the network itself, not one node"
    return Check("network", False, f"{speed:.3g} GB/s", why)
