"""Summary of a torch.profiler trace of training steps: compute by part, communication, idle time, waits of the host.

On a GPU, kernels are counted for the part of the step whose code launched them; on a CPU, operators by their own time.
A backward operator belongs to the part of its forward operator.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

LINEAR, REST = "linear layers", "elementwise and the rest"
RANGES = {
    "sdlm::attention": "attention",
    "sdlm::head": "head and loss",
    "sdlm::optimizer": "optimizer",
    "sdlm::data": "data",
}
"""Part of each record_function range in the code."""
PARTS = ("attention", LINEAR, "head and loss", REST, "optimizer", "data")
GEMM = ("gemm", "nvjet", "cutlass", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_scaled_mm")
GROUPS = {
    "TENSOR_MODEL": "TP",
    "PIPELINE_MODEL": "PP",
    "DATA_PARALLEL": "DP",
    "CONTEXT_PARALLEL": "CP",
    "EMBEDDING": "embeddings",
    "MODEL_PARALLEL": "TP x PP",
    "INTRA_DISTRIBUTED": "all",
    "default_pg": "all",
}
"""Short names of process groups by the beginning of their description; the first match counts."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
Interval = tuple[float, float]


@dataclass(frozen=True)
class TraceSummary:
    """Times in milliseconds over all profiled steps of one process."""

    steps: int
    wall: float
    parts: dict[str, float]
    """Compute time by part; concurrent kernels are counted in full."""
    communication: dict[tuple[str, str], tuple[int, float, float]]
    """By kind and group: calls, their time, and the part of it in which no compute kernel ran."""
    exposed: float
    """Time in which only communication ran. It includes waiting for other processes, and so pipeline bubbles."""
    idle: float
    """Time in which nothing ran."""
    waits: dict[str, int]
    """Number of waits of the host for the device, by call and caller."""
    top: list[tuple[str, str, int, float]]
    """The longest kernels (CPU: operators): name, part, calls, time."""


@dataclass
class _Host:
    """An event of a host thread, with the events nested in it."""

    name: str
    start: float
    end: float
    parent: "_Host | None"
    children: list["_Host"] = field(default_factory=list)
    part: str | None = None
    """Set on the events that begin a part: named ranges and backward operators."""

    def find_part(self) -> str | None:
        node: _Host | None = self
        while node is not None:
            if node.part is not None:
                return node.part
            node = node.parent
        return None


def summarize(events: Iterable[dict[str, Any]]) -> TraceSummary:
    """Summarizes the `traceEvents` of a Chrome trace."""
    complete, links = [], []
    for event in events:
        if event.get("ph") == "X":
            complete.append(event)
        elif event.get("cat") == "fwdbwd":
            links.append(event)
    steps = [_span(e) for e in complete if e["name"].startswith("ProfilerStep#") and e["cat"] == "user_annotation"]
    host = _host_threads(complete)
    _mark_parts(host, links)
    device = [e for e in complete if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if device:
        # from the first to the last kernel: the host runs ahead of the device, so host steps do not bound its work
        work, talk = _device_work(device, complete, host)
        spans = [(s, e) for _, _, s, e in work] + [(s, e) for _, _, s, e in talk]
        window = [(min(s for s, _ in spans), max(e for _, e in spans))]
    else:
        work, talk = _host_work(host, complete)
        window = _union(steps)
    return _summary(window, len(steps), work, talk, _waits(host, steps))


def _summary(
    window: list[Interval],
    steps: int,
    work: list[tuple[str, str, float, float]],
    talk: list[tuple[str, str, float, float]],
    waits: dict[str, int],
) -> TraceSummary:
    """Sums over work (name, part, start, end) and communication (kind, group, start, end)."""
    inside = _Inside(window)
    busy, talking = _union(inside.cut(work)), _union(inside.cut(talk))
    wall, together = _length(window), _length(_union([*busy, *talking]))
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    top: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for name, part, start, end in work:
        if inside.holds(start):
            parts[part] = parts.get(part, 0.0) + (end - start) / 1e3
            entry = top[name, part]
            entry[0], entry[1] = entry[0] + 1, entry[1] + (end - start) / 1e3
    kinds: dict[tuple[str, str], list[Interval]] = defaultdict(list)
    for kind, group, start, end in talk:
        if inside.holds(start):
            kinds[kind, group].append((start, end))
    communication = {}
    for key, spans in sorted(kinds.items()):
        # the time that this kind adds to the compute kernels
        exposed = _length(_union([*busy, *spans])) - _length(busy)
        communication[key] = (len(spans), sum(e - s for s, e in spans) / 1e3, exposed / 1e3)
    longest = sorted(top.items(), key=lambda item: -item[1][1])[:15]
    return TraceSummary(
        steps=steps,
        wall=wall / 1e3,
        parts=parts,
        communication=communication,
        exposed=(together - _length(busy)) / 1e3,
        idle=(wall - together) / 1e3,
        waits=waits,
        top=[(name, part, int(n), ms) for (name, part), (n, ms) in longest],
    )


def _span(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event.get("dur", 0.0)


def _union(spans: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same time."""
    merged: list[Interval] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(spans: Iterable[Interval]) -> float:
    return sum(end - start for start, end in spans)


class _Inside:
    """Membership in the profiled steps, which do not overlap."""

    def __init__(self, window: Sequence[Interval]) -> None:
        self._starts, self._window = [s for s, _ in window], window

    def holds(self, at: float) -> bool:
        i = bisect_right(self._starts, at) - 1
        return i >= 0 and at <= self._window[i][1]

    def cut(self, spans: Iterable[tuple[str, str, float, float]]) -> list[Interval]:
        inside = [(s, e, self._window[bisect_right(self._starts, s) - 1]) for _, _, s, e in spans if self.holds(s)]
        return [(s, min(e, step[1])) for s, e, step in inside]


def _host_threads(complete: Iterable[dict[str, Any]]) -> dict[Any, list[_Host]]:
    """Events of each host thread by start time, nested."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in complete:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads[event["tid"]].append(event)
    nested: dict[Any, list[_Host]] = {}
    for tid, events in threads.items():
        # of two events with the same start, the longer one encloses the other
        events.sort(key=lambda e: (e["ts"], -e.get("dur", 0.0)))
        nodes: list[_Host] = []
        open_nodes: list[_Host] = []
        for event in events:
            start, end = _span(event)
            if event["name"].startswith(("gloo:", "nccl", "record_param_comms")):
                continue  # lasts until the peer arrives, so it overlaps later events instead of nesting
            while open_nodes and open_nodes[-1].end <= start:
                open_nodes.pop()
            node = _Host(
                event["name"], start, end, open_nodes[-1] if open_nodes else None, part=RANGES.get(event["name"])
            )
            if node.parent is not None:
                node.parent.children.append(node)
            open_nodes.append(node)
            nodes.append(node)
        nested[tid] = nodes
    return nested


def _mark_parts(host: dict[Any, list[_Host]], links: Iterable[dict[str, Any]]) -> None:
    """Gives backward operators the part of their forward operator; a link leads from the one to the other."""
    starts = {tid: [n.start for n in nodes] for tid, nodes in host.items()}

    def at(event: dict[str, Any]) -> _Host | None:
        i = bisect_right(starts.get(event["tid"], []), event["ts"]) - 1
        return host[event["tid"]][i] if i >= 0 else None

    forward = {event["id"]: at(event) for event in links if event["ph"] == "s"}
    # by time: with recomputation, a forward operator may itself lie inside a backward operator
    for event in sorted((e for e in links if e["ph"] == "f"), key=lambda e: e["ts"]):
        node, origin = at(event), forward.get(event["id"])
        if node is not None and origin is not None:
            node.part = node.part or origin.find_part() or ""


def _part(host: _Host | None, name: str) -> str:
    """The part of a kernel or operator: by its caller, otherwise by its name."""
    part = host.find_part() if host is not None else None
    return part or (LINEAR if any(word in name.lower() for word in GEMM) else REST)


def _host_work(host: dict[Any, list[_Host]], complete: Iterable[dict[str, Any]]) -> tuple[list, list]:
    """Operators' own time, without that of their children, and the spans of communication."""
    work = []
    for nodes in host.values():
        if not any(node.name.startswith("ProfilerStep#") for node in nodes):
            continue  # a communication thread
        for node in nodes:
            if not node.name.startswith("aten::") and (node.children or "::" in node.name or "#" in node.name):
                continue  # a range around operators: its own time is Python, or waiting
            at, part = node.start, _part(node, node.name)
            for child in [*node.children, None]:
                until = child.start if child is not None else node.end
                if until > at:
                    work.append((node.name, part, at, until))
                at = max(at, child.end) if child is not None else at
    talk = [
        (e["name"].removeprefix("gloo:"), "", *_span(e))
        for e in complete
        if e.get("cat") == "user_annotation" and e["name"].startswith("gloo:")
    ]
    return work, talk


def _device_work(device: Iterable[dict[str, Any]], complete: Iterable[dict[str, Any]], host: dict) -> tuple[list, list]:
    """Compute kernels with their parts, and communication kernels with kind and group."""
    calls = {
        e["args"]["correlation"]: e
        for e in complete
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    starts = {tid: [n.start for n in nodes] for tid, nodes in host.items()}
    work, talk = [], []
    for event in device:
        arguments, name = event.get("args", {}), event["name"]
        if name.startswith("nccl"):
            kind = str(arguments.get("Collective name", name.split("(")[0].removeprefix("ncclDevKernel_")))
            talk.append((kind, _group(str(arguments.get("Process Group Description", ""))), *_span(event)))
            continue
        call = calls.get(arguments.get("correlation"))
        node = None
        if call is not None and call["tid"] in host:
            node = host[call["tid"]][bisect_right(starts[call["tid"]], call["ts"]) - 1]
        work.append((name, _part(node, name), *_span(event)))
    return work, talk


def _group(description: str) -> str:
    return next((name for start, name in GROUPS.items() if description.startswith(start)), description)


def _waits(host: dict[Any, list[_Host]], steps: Sequence[Interval]) -> dict[str, int]:
    inside = _Inside(sorted(steps))
    waits = [n for nodes in host.values() for n in nodes if n.name in WAITS and inside.holds(n.start)]
    return dict(Counter(n.name if n.parent is None else f"{n.name} in {n.parent.name}" for n in waits))
