"""Order of the communication of all ranks of a job, from the dumps of NCCL's flight recorder.

Three checks: each group's members call the same collectives in the same order; each message that is sent is received;
and the job does not stop if every rank works strictly in the order of its calls (a stricter rule than that of a GPU,
whose groups have queues of their own).
"""

import ast
import pickle
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

_MESSAGE = re.compile(r"(send|recv) (\d+)(?:->|<-)(\d+)")


@dataclass(frozen=True)
class Operation:
    """A call of a collective, or of one side of a message between two ranks."""

    kind: str
    """Such as "all_reduce"; "send" and "recv" for messages."""
    group: str
    """Description and members of the process group."""
    ranks: tuple[int, ...]
    """Ranks that take part; of a message, sender and receiver."""
    data: str
    """Sizes and dtypes."""

    @property
    def message(self) -> bool:
        return self.kind in ("send", "recv")

    def __str__(self) -> str:
        between = f" {self.ranks[0]} -> {self.ranks[1]}" if self.message else ""
        return f"{self.kind}{between} of {self.data} in {self.group}"


Calls = Mapping[int, Sequence[Operation]]
"""The calls of each rank in their order."""


def read_dump(dump: bytes) -> list[Operation]:
    """The calls of one rank, from `torch._C._distributed_c10d._dump_nccl_trace`."""
    content = pickle.loads(dump)
    if content["entries"] and content["entries"][0]["record_id"]:
        raise ValueError("the flight recorder has dropped calls: raise TORCH_FR_BUFFER_SIZE")
    return [_operation(entry, content["pg_config"]) for entry in content["entries"]]


def _operation(entry: dict[str, Any], groups: dict[str, dict]) -> Operation:
    name, description = entry["process_group"]
    members = ast.literal_eval(groups[name]["ranks"])
    kind = entry["profiling_name"].removeprefix("nccl:")
    sizes = entry["input_sizes"]
    # values as JSON are padded to the longest of a job, which a process on the null GPU does not know
    if entry["input_dtypes"] == ["Byte"]:
        sizes = "JSON"
    data = f"{entry['input_dtypes']} {sizes}"
    if match := _MESSAGE.match(kind):
        # ranks of a message are those of the group
        own, other = members[int(match[2])], members[int(match[3])]
        ranks = (own, other) if match[1] == "send" else (other, own)
        return Operation(match[1], f"{description} {members}", ranks, data)
    return Operation(kind, f"{description} {members}", tuple(members), data)


def problems(calls: Calls) -> list[str]:
    """All differences, unpaired messages, and where the job stops; empty if all is well."""
    return [*different_collectives(calls), *unpaired_messages(calls), *deadlock(calls)]


def different_collectives(calls: Calls) -> list[str]:
    """The first difference between the members of each group."""
    groups: dict[str, dict[int, list[Operation]]] = defaultdict(dict)
    for rank, operations in calls.items():
        for operation in operations:
            if not operation.message:
                groups[operation.group].setdefault(rank, []).append(operation)
    differences = []
    for group, members in groups.items():
        ranks = next(iter(members.values()))[0].ranks
        lists = [members.get(rank, []) for rank in ranks if rank in calls]
        for number, row in enumerate(zip_longest(*lists)):
            if len(set(row)) > 1:
                seen = "; ".join(f"rank {r}: {x or 'nothing'}" for r, x in zip(ranks, row, strict=False))
                differences.append(f"call {number} of {group} differs: {seen}")
                break
    return differences


def unpaired_messages(calls: Calls) -> list[str]:
    """The first message of each sender and receiver that the other side does not expect."""
    sides: dict[tuple[int, ...], dict[str, list[str]]] = defaultdict(lambda: {"send": [], "recv": []})
    for operations in calls.values():
        for operation in operations:
            if operation.message:
                sides[operation.ranks][operation.kind].append(operation.data)
    unpaired = []
    for (sender, receiver), side in sides.items():
        for number, (sent, received) in enumerate(zip_longest(side["send"], side["recv"])):
            if sent != received and sender in calls and receiver in calls:
                unpaired.append(f"message {number} from rank {sender} to {receiver}: sent {sent}, received {received}")
                break
    return unpaired


def deadlock(calls: Calls) -> list[str]:
    """The calls in which the ranks wait for each other; empty if all of them finish.

    A call is finished when all ranks that take part are in it.
    """
    at = dict.fromkeys(calls, 0)
    waiting = set(calls)
    while waiting:
        moved: set[int] = set()
        for rank in sorted(waiting):
            if at[rank] == len(calls[rank]):
                continue
            ranks = calls[rank][at[rank]].ranks
            if all(r not in calls or _meets(calls, at, rank, r) for r in ranks):
                for r in ranks:
                    if r in calls:
                        at[r] += 1
                        moved.add(r)
        if not moved:
            break
        waiting = {r for r in calls if at[r] < len(calls[r])}
    stopped: dict[Operation, list[int]] = defaultdict(list)
    for rank in sorted(waiting):
        if at[rank] < len(calls[rank]):
            stopped[calls[rank][at[rank]]].append(rank)
    return [f"ranks {ranks} wait for {sorted({*x.ranks} - {*ranks})} in {x}" for x, ranks in stopped.items()]


def _meets(calls: Calls, at: Mapping[int, int], rank: int, other: int) -> bool:
    """Whether the other rank is in the same call."""
    if at[other] == len(calls[other]):
        return False
    own, theirs = calls[rank][at[rank]], calls[other][at[other]]
    if own.message:
        return rank == other or (theirs.message and own.kind != theirs.kind and own.ranks == theirs.ranks)
    return (own.kind, own.group) == (theirs.kind, theirs.group)
