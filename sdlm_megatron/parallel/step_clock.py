"""How long a process computes in a step before it meets the others to reduce gradients.

The time of a whole step is the same on all processes, because they wait for each other there; this one is not, and
shows who is slow. (Under tensor or pipeline parallelism a process waits for the others of its copy of the model
before that: then all of the slow copy look slow.)
"""

import time
from collections.abc import Callable
from typing import Any

import torch


class StepClock:
    """Marks begin and end of that stretch, on the device's own clock where there is one: the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin = self._end = self._mark()

    def begin(self) -> None:
        """A step begins."""
        self._begin = self._mark()

    def end(self) -> None:
        """Its gradients are ready to be reduced."""
        self._end = self._mark()

    def seconds(self) -> Callable[[], float]:
        """What tells the seconds of the last stretch, later; it waits for the device."""
        begin, end = self._begin, self._end
        if not self._cuda:
            return lambda: end - begin

        def wait() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1000

        return wait

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
