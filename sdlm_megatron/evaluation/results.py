"""Result files of this package, read back and summed up over seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdlm_megatron.errors import DataError
from sdlm_megatron.evaluation.decoding import Setting
from sdlm_megatron.evaluation.intervals import Estimate, over_seeds, ratio, share

KINDS = ("sweep", "calibration", "speed", "context", "perplexity")
Result = Mapping[str, Any]
"""One result file."""
Results = Mapping[str, Sequence[Result]]
"""By label: the same file of several seeds."""
Key = tuple[str, int, float | None]
"""Algorithm, n, threshold."""


@dataclass(frozen=True)
class Point:
    """One way to decode, measured on prompts with every seed."""

    alg: str
    n: int
    threshold: float | None
    exact: Estimate
    speed: Estimate
    """Tokens a pass."""

    @property
    def name(self) -> str:
        return name_of((self.alg, self.n, self.threshold))


@dataclass(frozen=True)
class Timed:
    """One way to decode, timed with every seed at one batch size."""

    alg: str
    n: int
    threshold: float | None
    batch: int
    prompts: int
    """Of all seeds together."""
    exact: float
    """Share, mean over seeds."""
    rate: Estimate
    """Tokens a second."""
    seconds: Estimate
    """For a prompt."""

    @property
    def name(self) -> str:
        return name_of((self.alg, self.n, self.threshold))


def name_of(key: Key) -> str:
    """A way to decode in words."""
    alg, n, threshold = key
    return Setting(alg, n, 1.0 if threshold is None else threshold).name


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of a folder by kind; those that are there.

    Raises:
        DataError: there is none, or one that is no result file.
    """
    found = {}
    for kind in KINDS:
        path = folder / f"{kind}.json"
        if not path.exists():
            continue
        fix = f"measure again: python -m evaluation.{kind} --help"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read JSON: {error}", str(path), fix) from None
        if not isinstance(value, dict) or value.get("kind") != kind:
            raise DataError(f'no result file: it does not say "kind": "{kind}"', str(path), fix)
        found[kind] = value
    if not found:
        raise DataError(
            f"no result file: {', '.join(f'{kind}.json' for kind in KINDS)}",
            str(folder),
            "name the --out folder of sdlm_megatron.evaluation.sweep, .calibration, .speed, .context or .perplexity",
        )
    return found


def _by_key(rows: Sequence[Result], *more: str) -> dict[tuple[Any, ...], Result]:
    return {(row["alg"], row["n"], row["threshold"], *(row[name] for name in more)): row for row in rows}


def _shared(seeds: Sequence[Sequence[Result]], *more: str) -> list[tuple[tuple[Any, ...], list[Result]]]:
    """What every seed has: its key, and its row of each seed; in the order of the first seed."""
    tables = [_by_key(rows, *more) for rows in seeds]
    return [(key, [t[key] for t in tables]) for key in tables[0] if all(key in t for t in tables)]


def points(sweeps: Sequence[Result]) -> list[Point]:
    """The settings that all sweeps of a label have, with intervals over prompts and seeds."""
    distinct = len({sweep.get("facts", {}).get("prompts") for sweep in sweeps}) == len(sweeps)
    return [
        Point(
            key[0],
            key[1],
            key[2],
            share([row["exact"] for row in rows], distinct=distinct),
            ratio([row["tokens"] for row in rows], [row["passes"] for row in rows]),
        )
        for key, rows in _shared([sweep["rows"] for sweep in sweeps])
    ]


def exact_of(sweeps: Sequence[Result], alg: str, threshold: float | None) -> list[list[int]] | None:
    """0 or 1 for each prompt, seed by seed, with the widest window; None when a seed lacks the setting."""
    found = []
    for sweep in sweeps:
        rows = [row for row in sweep["rows"] if (row["alg"], row["threshold"]) == (alg, threshold)]
        if not rows:
            return None
        found.append(max(rows, key=lambda row: int(row["n"]))["exact"])
    return found


def pick(given: Sequence[Point], alg: str, threshold: float | None = None) -> Point | None:
    """The point of a setting with the widest window; None when it was not measured."""
    found = [p for p in given if (p.alg, p.threshold) == (alg, threshold)]
    return max(found, key=lambda p: p.n, default=None)


def timings(speeds: Sequence[Result]) -> list[Timed]:
    """The timed decodes that all files of a label have."""
    found = []
    for key, rows in _shared([speed.get("decodes", []) for speed in speeds], "batch"):
        seconds = [float(np.median(row["seconds"])) for row in rows]
        found.append(
            Timed(
                *(key[0], key[1], key[2], key[3], sum(row["prompts"] for row in rows)),
                float(np.mean([row["exact"] / row["prompts"] for row in rows])),
                over_seeds([row["tokens"] / s for row, s in zip(rows, seconds, strict=True)]),
                over_seeds([s / row["prompts"] for row, s in zip(rows, seconds, strict=True)]),
            )
        )
    return found


def pooled(calibrations: Sequence[Result]) -> list[dict[str, np.ndarray]]:
    """By slot the predictions of all seeds together: "prob", "entropy", "right", float arrays of one length."""
    slots = min(len(one["slots"]) for one in calibrations)
    return [
        {
            field: np.concatenate([np.asarray(one["slots"][j][field], dtype=float) for one in calibrations])
            for field in ("prob", "entropy", "right")
        }
        for j in range(slots)
    ]
