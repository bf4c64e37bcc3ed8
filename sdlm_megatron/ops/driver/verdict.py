"""From what the nodes found to which of them are fit, one table, and the list of bad nodes of a run."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from sdlm_megatron.files import write_text

BAD_NODES = "bad-nodes.txt"
SHARED = ("run disk", "config", "code", "packages", "data", "clock", "network", "checks")
"""Checks that fail for reasons outside of a node as well: only a node that differs from others is to blame."""


@dataclass(frozen=True)
class Check:
    """One check of one node."""

    name: str
    ok: bool | None
    """None: skipped, `why` says for what reason."""
    value: str
    """A few characters, for the table."""
    why: str = ""


@dataclass
class Node:
    """What is known of one node."""

    name: str
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.ok is False]

    @property
    def silent(self) -> bool:
        """It stopped answering."""
        return any(check.name == "answers" for check in self.failed)

    @property
    def why(self) -> str:
        """Why it is bad; "" of a healthy one."""
        return "; ".join(f"{check.name}: {check.why}" for check in self.failed)

    def add(self, name: str, ok: bool | None, value: str, why: str = "") -> None:
        """Appends a check."""
        self.checks.append(Check(name, ok, value, why))


def agree(name: str, values: Mapping[str, str], own: str) -> dict[str, Check]:
    """A check for each node that its value is the one most nodes have; in a tie, that of the batch node (`own`)."""
    counts = Counter(values.values())
    most = max(counts.values(), default=0)
    usual = next((v for v in [own, *counts] if counts[v] == most), own)
    found = {}
    for node, value in values.items():
        same = value == usual
        short = value if len(value) <= 12 else value[:8]
        holders = [n for n, v in values.items() if v == usual]
        why = f"{short} here, {usual[:8]} on {counts[usual]} nodes such as {holders[0]}" if not same else ""
        found[node] = Check(name, same, short, why)
    return found


def pair_rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The nodes as a ring: every neighbouring pair once, in rounds in which no node takes part twice."""
    count = len(nodes)
    if count < 2:
        return []
    edges = [(nodes[i], nodes[(i + 1) % count]) for i in range(count if count > 2 else 1)]
    even = edges[0 : count - 1 : 2]
    odd = edges[1 : count - (count % 2) : 2]
    last = [[edges[-1]]] if count % 2 else []  # an odd ring has one pair that fits into neither round
    return [found for found in (even, odd, *last) if found]


def best_of(pairs: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """The faster of a node's pairs, GB/s: one good pair shows that its own link is good."""
    best: dict[str, float] = {}
    for pair, speed in pairs.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), speed)
    return best


def floor_of(speeds: Sequence[float], least: float, factor: float) -> float:
    """Slowest speed that is accepted: `least`, and `factor` of the median where three or more were measured."""
    return max(least, factor * median(speeds)) if len(speeds) > 2 else least


def to_blame(nodes: Sequence[Node]) -> dict[str, str]:
    """Bad nodes and why, without those that only failed what every node failed (a full shared disk, a limit too high):
    another node would do no better."""
    found = {}
    for node in nodes:
        own = [c for c in node.failed if not _shared(c.name, nodes) or _passed(c.name, nodes)]
        if own:
            found[node.name] = "; ".join(f"{check.name}: {check.why}" for check in own)
    return found


def at_fault_everywhere(nodes: Sequence[Node]) -> str:
    """What every node failed although no node is to blame, such as a run folder on a full disk; "" if nothing is.

    Silence and a slow network are not among it: other nodes may do better.
    """
    failed = [{check.name: check.why for check in node.failed} for node in nodes]
    names = [name for name in failed[0] if all(name in checks for checks in failed)]
    shared = [name for name in names if _shared(name, nodes) and name not in ("network", "answers")]
    return "; ".join(f"{name}: {failed[0][name]}" for name in shared)


def _shared(name: str, nodes: Sequence[Node]) -> bool:
    """Whether all nodes may fail a check without being broken: three or more hardly break at once."""
    return name in SHARED or len(nodes) > 2


def _passed(name: str, nodes: Sequence[Node]) -> bool:
    return any(check.ok for node in nodes for check in node.checks if check.name == name)


def table(nodes: Sequence[Node]) -> str:
    """All nodes and checks; a value with ! failed. Below it, why."""
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
    """RUN/bad-nodes.txt: why a node is not to be used; {} without the file. The user may delete lines."""
    try:
        lines = (Path(run_dir) / BAD_NODES).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        node, _, rest = line.partition(" ")
        if node and not node.startswith("#"):
            found[node] = rest.strip()
    return found


def add_bad_nodes(run_dir: str | Path, bad: Mapping[str, str]) -> None:
    """Adds nodes with the date and why to RUN/bad-nodes.txt; a node that is there already gets the new reason."""
    if not bad:
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    merged = {**read_bad_nodes(run_dir), **{node: f"{now} {' '.join(why.split())}" for node, why in bad.items()}}
    head = (
        "# Left out by later submissions of this run (sbatch --exclude). Delete the line of a node that was repaired.\n"
    )
    write_text(Path(run_dir) / BAD_NODES, head + "".join(f"{node} {why}\n" for node, why in merged.items()))
