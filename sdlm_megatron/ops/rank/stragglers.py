"""Who is slow: each rank's computing time before the reduction of gradients (parallel/step_clock.py), by host."""

import statistics
from collections.abc import Sequence
from typing import Any

IN_A_ROW = 3
"""Log steps in which a host must be slow to be named."""


class Stragglers:
    """Compares hosts, or on one host ranks, log step by log step.

    Args:
        hosts: name of the host of each rank.
        factor: times the median that is slow; 0: nobody is.
    """

    def __init__(self, hosts: Sequence[str], factor: float) -> None:
        self.hosts, self.factor = hosts, factor
        one_host = len(set(hosts)) == 1
        self._places = [f"rank {r} on {host}" if one_host else host for r, host in enumerate(hosts)]
        self._slow: dict[str, int] = {}

    def look(self, seconds: Sequence[float]) -> tuple[dict[str, float | str], list[dict[str, Any]]]:
        """The fields of the log record, and an event for each place that has just been slow for IN_A_ROW log steps.

        `seconds`: of each rank. A place takes as long as its slowest rank.
        """
        slowest: dict[str, int] = {}
        for rank, place in enumerate(self._places):
            if place not in slowest or seconds[rank] > seconds[slowest[place]]:
                slowest[place] = rank
        times = {place: seconds[rank] for place, rank in slowest.items()}
        median, worst = statistics.median_low(times.values()), max(times, key=lambda place: times[place])
        fields: dict[str, float | str] = {
            "compute_min": min(times.values()),
            "compute_median": median,
            "compute_max": times[worst],
            "slowest_host": self.hosts[slowest[worst]],
        }
        slow = {p for p, t in times.items() if self.factor and len(times) > 1 and t > self.factor * median}
        self._slow = {place: self._slow.get(place, 0) + 1 for place in slow}
        events = [
            {
                "host": self.hosts[slowest[place]],
                "rank": slowest[place],
                "seconds": times[place],
                "median": median,
                "ratio": times[place] / median if median else 0.0,
            }
            for place, count in self._slow.items()
            if count == IN_A_ROW
        ]
        return fields, events
