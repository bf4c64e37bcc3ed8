"""Losses and gradient norms far outside of what the run was used to, and the rows that may have caused them."""

import json
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdlm_megatron.data.format import PackedDataset, origin
from sdlm_megatron.data.order import locate

SPIKES_FILE = "spikes.jsonl"
WINDOW, ENOUGH = 100, 20
"""Steps that say what is usual, and how many it takes at least."""
FLOOR = 0.02
"""Least spread, as a share of the median: a run that has converged is still no clockwork."""
ROWS = 4
"""Rows named at most."""


class Outliers:
    """Whether a value lies far above the ones before it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._seen: deque[float] = deque(maxlen=WINDOW)

    def usual(self) -> float | None:
        """Median of the window; None as long as too little is known."""
        return statistics.median(self._seen) if len(self._seen) >= ENOUGH else None

    def far(self, value: float) -> bool:
        """Whether `value` is a spike; from now on it belongs to what was seen."""
        limit = outlier_limit(self._seen, self.factor) if len(self._seen) >= ENOUGH else value
        self._seen.append(value)
        return value > limit


def outlier_limit(values: Sequence[float] | deque[float], factor: float) -> float:
    """Median plus `factor` robust standard deviations (1.4826 x the median distance from the median)."""
    median = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(v - median) for v in values)
    return median + factor * max(spread, FLOOR * abs(median))


def suspects(losses: Sequence[tuple[int, float]], factor: float) -> list[tuple[int, float]]:
    """Of the rows of a step (number, own loss), ascending by loss, those far above the others, worst first; at least
    the worst one, at most ROWS."""
    if not losses:
        return []
    limit = outlier_limit([loss for _, loss in losses], factor)
    return [row for i, row in enumerate(reversed(losses)) if i == 0 or row[1] > limit][:ROWS]


def describe_row(number: int, loss: float, dataset: PackedDataset, *, seed: int) -> dict[str, Any]:
    """Where a row of the run comes from: epoch, row of the dataset's file, documents and their sources."""
    place = locate(number, dataset.rows, seed=seed)
    _, layout = dataset.read(place.epoch, place.row)
    documents = [{"document": int(n), "origin": origin(int(n), dataset.manifest)} for n in np.asarray(layout.doc_ids)]
    return {"row": number, "loss": loss, "epoch": place.epoch, "file_row": place.row, "documents": documents}


def write_spike(run_dir: Path, spike: dict[str, Any]) -> None:
    """Appends a spike to RUN/spikes.jsonl."""
    with open(run_dir / SPIKES_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(spike, ensure_ascii=False) + "\n")
