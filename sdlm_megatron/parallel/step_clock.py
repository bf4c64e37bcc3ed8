"""Where a step's time goes, without the host waiting for the device.

The first stretch of a step, forward and backward passes until the gradients of this process are there, is not the same
on all processes as the whole step is, because they wait for each other only after it: it shows who is slow. (Under
tensor or pipeline parallelism a process waits for the others of its copy of the model before that: then all of the slow
copy look slow.)
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


class StepClock:
    """Marks in the device's queue of work, or on a CPU points in time; the time between them is read later.

    On a GPU a stretch is what the device took from one mark to the next, its waiting for the host included.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """From here on time goes to `name`, until the next mark; to nothing if it is empty."""
        if not self._cuda:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def read(self) -> dict[str, float]:
        """Seconds by name since the last call, all steps together; it waits for the device."""
        marks, self._marks = self._marks, []
        found: dict[str, float] = {}
        for (name, begin), (_, end) in pairwise(marks):
            if name:
                found[name] = found.get(name, 0.0) + self._between(begin, end)
        return found

    def last(self, name: str) -> Callable[[], float]:
        """What tells the seconds of the newest stretch of that name, later; it waits for the device."""
        at = next(i for i in range(len(self._marks) - 2, -1, -1) if self._marks[i][0] == name)
        begin, end = self._marks[at][1], self._marks[at + 1][1]
        return lambda: self._between(begin, end)

    def _between(self, begin: Any, end: Any) -> float:
        if not self._cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000
