"""Results of the pre-flight: the checks of each node, the nodes to replace, one table, and the list of bad nodes."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from sdlm_megatron.files import write_text
from sdlm_megatron.ops.node.limits import Check

BAD_NODES = "bad-nodes.txt"
BAD_NODES_HEADER = (
    "# Later submissions of this run leave these nodes out (sbatch --exclude). Delete the line of a repaired node.\n"
)
EXTERNAL_CHECKS = ("run disk", "config", "code", "packages", "data", "clock", "network", "checks")
"""Checks that can fail for a reason outside the node. They count against a node only if another node passed them."""

ANSWERS = "answers"  # last word of the checks for a result of the node's program; the later stages have their own
FAILED = "failed"  # value of such a check where the program ended with an error
ELSEWHERE = "not shared"  # value of the check "run disk" of a node whose run folder is not the batch node's


@dataclass
class NodeReport:
    """Checks of one node."""

    name: str
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.ok is False]

    @property
    def why(self) -> str:
        """Reasons of all failed checks; "" for a healthy node."""
        return "; ".join(f"{check.name}: {check.why}" for check in self.failed)

    def add(self, name: str, ok: bool | None, value: str, why: str = "") -> None:
        """Appends a check."""
        self.checks.append(Check(name, ok, value, why))


def compare_values(name: str, values: Mapping[str, str], batch_value: str) -> dict[str, Check]:
    """Checks that each node has the most frequent value; in a tie the batch node's value is the expected one."""
    counts = Counter(values.values())
    highest = max(counts.values(), default=0)
    expected = next((v for v in [batch_value, *counts] if counts[v] == highest), batch_value)
    checks = {}
    for node, value in values.items():
        same = value == expected
        short = value if len(value) <= 12 else value[:8]
        example = next((n for n, v in values.items() if v == expected), "")
        why = "" if same else f"{short} here, {expected[:8]} on {counts[expected]} nodes such as {example}"
        checks[node] = Check(name, same, short, why)
    return checks


def pair_rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """All neighboring pairs of a ring of nodes, in rounds in which each node appears at most once."""
    count = len(nodes)
    if count < 2:
        return []
    edges = [(nodes[i], nodes[(i + 1) % count]) for i in range(count if count > 2 else 1)]
    even = edges[0 : count - 1 : 2]
    odd = edges[1 : count - (count % 2) : 2]
    last = [[edges[-1]]] if count % 2 else []  # the closing edge of an odd ring fits into neither round
    return [pairs for pairs in (even, odd, *last) if pairs]


def best_speeds(pairs: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Speed of the fastest pair of each node, GB/s. One fast pair shows that the node's own link is good."""
    best: dict[str, float] = {}
    for pair, speed in pairs.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), speed)
    return best


def speed_floor(speeds: Sequence[float], minimum: float, factor: float) -> float:
    """Lowest accepted speed: `minimum`, and `factor` times the median where three or more were measured."""
    return max(minimum, factor * median(speeds)) if len(speeds) > 2 else minimum


def nodes_to_replace(nodes: Sequence[NodeReport]) -> dict[str, str]:
    """Bad nodes with the reasons, except those that failed only what every node failed.

    A full shared disk or a limit that is too high fails everywhere, and another node would do no better. Where only the
    batch node sees its run folder, it is the one to replace.
    """
    answered = [node for node in nodes if not any(check.name == ANSWERS for check in node.failed)]
    seeing = [node for node in answered if not any(check.value == ELSEWHERE for check in node.failed)]
    if len(answered) > 2 and len(seeing) == 1:
        return {seeing[0].name: "run disk: no other node sees its run folder"}
    bad, passed = {}, {check.name for node in nodes for check in node.checks if check.ok}
    for node in nodes:
        own = [c for c in node.failed if not _may_be_external(c.name, nodes) or c.name in passed]
        if own:
            bad[node.name] = "; ".join(f"{check.name}: {check.why}" for check in own)
    return bad


def common_failures(nodes: Sequence[NodeReport]) -> str:
    """Failures of every node that no other node would avoid, such as a run folder on a full disk; "" if there are none.

    A slow network and nodes that do not answer are not among them: other nodes may do better. A program that ends with
    an error on every node is.
    """
    failed = [{check.name: check.why for check in node.failed} for node in nodes]
    names = [name for name in failed[0] if all(name in checks for checks in failed)]
    silent = {c.name for node in nodes for c in node.failed if c.name.endswith(ANSWERS) and c.value != FAILED}
    avoidable = {"network", *silent}
    external = [name for name in names if _may_be_external(name, nodes) and name not in avoidable]
    return "; ".join(f"{name}: {failed[0][name]}" for name in external)


def _may_be_external(name: str, nodes: Sequence[NodeReport]) -> bool:
    # Three or more nodes hardly break at the same time: more likely the cluster file promises too much.
    # Where two nodes do not answer, the image or Python is more likely missing on both than each broken by itself, and
    # so it is where the program of a single node ends with an error.
    if name.endswith(ANSWERS):
        return len(nodes) > 1 or any(check.name == name and check.value == FAILED for check in nodes[0].checks)
    return name in EXTERNAL_CHECKS or len(nodes) > 2


def format_table(nodes: Sequence[NodeReport]) -> str:
    """Table of all nodes and checks, "!" after a value that failed, with the reasons below it."""
    names = list(dict.fromkeys(check.name for node in nodes for check in node.checks))
    lines = [["node", *names, ""]]
    for node in nodes:
        values = {check.name: f"{check.value}{'!' if check.ok is False else ''}" for check in node.checks}
        lines.append([node.name, *(values.get(name, "-") for name in names), "BAD" if node.failed else "ok"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(names) + 2)]
    text = ["  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"bad      {node.name}: {check.name}: {check.why}" for node in nodes for check in node.failed]
    skipped: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        for check in node.checks:
            if check.ok is None:
                skipped.setdefault((check.name, check.why), []).append(node.name)
    for (name, why), where in skipped.items():
        places = "all nodes" if len(where) == len(nodes) else ", ".join(where)
        text.append(f"skipped  {name} on {places}: {why}")
    return "\n".join(text)


def read_bad_nodes(run_dir: str | Path) -> dict[str, str]:
    """Nodes of RUN/bad-nodes.txt with the reasons; {} without the file. The user may delete lines."""
    try:
        lines = (Path(run_dir) / BAD_NODES).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    parts = [line.partition(" ") for line in lines if line and not line.startswith(("#", " "))]
    return {node: reason.strip() for node, _, reason in parts}


def add_bad_nodes(run_dir: str | Path, bad: Mapping[str, str]) -> None:
    """Adds nodes with date and reason to RUN/bad-nodes.txt; a node that is already there gets the new reason."""
    if not bad:
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    merged = {**read_bad_nodes(run_dir), **{node: f"{now} {' '.join(why.split())}" for node, why in bad.items()}}
    text = BAD_NODES_HEADER + "".join(f"{node} {why}\n" for node, why in merged.items())
    write_text(Path(run_dir) / BAD_NODES, text)
