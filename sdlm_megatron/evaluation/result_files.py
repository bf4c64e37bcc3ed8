"""Result files of `sdlm evaluate`: reading them back, and summaries over the seeds of a model.

A folder holds one file per kind, KIND.json: the kind, the model, "facts" about the command and the machine, and the
rows that the kind's module describes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdlm_megatron.chat.chat_model import DecodingRule
from sdlm_megatron.errors import DataError
from sdlm_megatron.evaluation import signatures
from sdlm_megatron.evaluation.intervals import Estimate, over_seeds, ratio, share
from sdlm_megatron.files import read_json_object

KINDS = ("sweep", "calibration", "speed", "context", "perplexity", "serving")
STOCK = "plain serving"
"""The rule of a server of vLLM without the plugin: one token per pass."""
Result = Mapping[str, Any]  # one result file
Results = Mapping[str, Sequence[Result]]  # result files of one kind by label; a label has one file per seed
RuleKey = tuple[str, int, float | None]  # Algorithm, n and threshold


@dataclass(frozen=True)
class MeasuredRule:
    """A decoding rule that results are about."""

    alg: str
    n: int
    threshold: float | None

    @property
    def name(self) -> str:
        return name_of((self.alg, self.n, self.threshold))


@dataclass(frozen=True)
class SweepPoint(MeasuredRule):
    """Quality and speed of a rule over the prompts of every seed."""

    exact: Estimate  # share of exact answers
    speed: Estimate  # tokens per pass


@dataclass(frozen=True)
class RuleTiming(MeasuredRule):
    """Wall time of a rule at one batch size."""

    batch: int
    prompts: int  # of all seeds together
    exact: float  # share of exact answers, mean over seeds
    rate: Estimate  # tokens per second
    seconds: Estimate  # seconds per prompt


@dataclass(frozen=True)
class ServedRate(MeasuredRule):
    """A server with some number of requests at a time."""

    at: int
    rate: float  # tokens per second of all requests together
    ratio: float | None  # to the rate of plain serving with as many requests at a time; None: not measured
    speed: float  # tokens per pass
    first: tuple[float, float]  # seconds until the first text, median and 90th percentile
    seconds: tuple[float, float]  # seconds of an answer
    tokens: float  # tokens of an answer, mean
    exact: float | None  # share of exact answers; None: the expected ones are unknown

    @property
    def cells(self) -> tuple[str, ...]:
        """Cells of a table: name, tokens/s, ratio, tokens per pass, first text, seconds, tokens, exact."""
        ratio, exact = (
            "–" if x is None else form.format(x) for x, form in ((self.ratio, "{:.2f}"), (self.exact, "{:.1%}"))
        )
        times = [f"{middle:.2f} ({high:.2f})" for middle, high in (self.first, self.seconds)]
        return self.name, f"{self.rate:,.1f}", ratio, f"{self.speed:.2f}", *times, f"{self.tokens:.1f}", exact


def name_of(key: RuleKey) -> str:
    """Label of a decoding rule, such as "prob 0.98, n = 4"."""
    alg, n, threshold = key
    if alg == STOCK:
        return STOCK
    return DecodingRule(alg, n, 1.0 if threshold is None else threshold).name


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of a folder by kind; kinds without a file are absent.

    Raises:
        DataError: the folder has no result file, or a file of another format.
    """
    results = {}
    for kind in KINDS:
        path = folder / f"{kind}.json"
        if not path.exists():
            continue
        fix = f"measure again: sdlm evaluate {kind} --help"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read JSON: {error}", str(path), fix) from None
        if not isinstance(value, dict) or value.get("kind") != kind:
            raise DataError(f'not a result file: it lacks "kind": "{kind}"', str(path), fix)
        results[kind] = value
    if not results:
        raise DataError(
            f"no result file: {', '.join(f'{kind}.json' for kind in KINDS)}",
            str(folder),
            "name the --out folder of sdlm evaluate",
        )
    return results


def read_kept(path: Path, kind: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result that was measured with these settings; None without a file.

    Raises:
        DataError: the file is no result of this kind, or was measured otherwise.
    """
    fix = "remove it, or use another --out"
    if not path.exists():
        return None
    value = read_json_object(path, DataError, fix)
    if value.get("kind") != kind:
        raise DataError(f'not a result file: it lacks "kind": "{kind}"', str(path), fix)
    former = value.get("settings", {})
    for name, wanted in settings.items():
        if name not in former:
            raise DataError(f"it does not say with which {name} it was measured", str(path), fix)
        if former[name] != wanted:
            what = f"it was measured with {name} {former[name]!r:.80}, not {wanted!r:.80}"
            raise DataError(what, str(path), fix)
    return value


def prompts_of(result: Result) -> str | None:
    """SHA-256 of the prompts behind a result; None in files of earlier versions."""
    value: str | None = result.get("settings", {}).get("prompts_sha256")
    return value


def _shared(seeds: Sequence[Sequence[Result]], *fields: str) -> list[tuple[tuple[Any, ...], list[Result]]]:
    """Rows that every seed has: their key (rule and `fields`) and the row of each seed, in the first seed's order."""
    names = ("alg", "n", "threshold", *fields)
    tables = [{tuple(row[name] for name in names): row for row in rows} for rows in seeds]
    return [(key, [table[key] for table in tables]) for key in tables[0] if all(key in table for table in tables)]


def _speed(rows: Sequence[Result]) -> Estimate:
    return ratio([row["tokens"] for row in rows], [row["passes"] for row in rows])


def points(sweeps: Sequence[Result]) -> list[SweepPoint]:
    """The rules that all sweeps of a label have, with intervals over prompts and seeds."""
    prompts = {prompts_of(sweep) or sweep.get("facts", {}).get("prompts") for sweep in sweeps}
    distinct = len(prompts) == len(sweeps)
    return [
        SweepPoint(alg, n, threshold, share([row["exact"] for row in rows], distinct=distinct), _speed(rows))
        for (alg, n, threshold), rows in _shared([sweep["rows"] for sweep in sweeps])
    ]


def exact_of(sweeps: Sequence[Result], alg: str, threshold: float | None) -> list[list[int]] | None:
    """0 or 1 for each prompt of each seed, at the widest window; None if a seed lacks the rule."""
    exact = []
    for sweep in sweeps:
        rows = [row for row in sweep["rows"] if (row["alg"], row["threshold"]) == (alg, threshold)]
        if not rows:
            return None
        exact.append(max(rows, key=lambda row: int(row["n"]))["exact"])
    return exact


def pick(measured: Sequence[SweepPoint], alg: str, threshold: float | None = None) -> SweepPoint | None:
    """The point of a rule at its widest window; None if it was not measured."""
    matching = [p for p in measured if (p.alg, p.threshold) == (alg, threshold)]
    return max(matching, key=lambda p: p.n, default=None)


def signatures_of(
    results: Sequence[Result], rows_name: str = "rows", *fields: str
) -> list[tuple[tuple[Any, ...], dict[str, signatures.Signatures]]]:
    """Key (name of the rule, `fields`) and signatures by length of the rows that all files of a label have, over the
    prompts of all of them.

    Empty for files written before the signatures were measured.
    """
    if not all("expected" in result for result in results):
        return []

    def pool(rows: Sequence[Result], *names: str) -> dict[str, list[int]]:
        return {name: [value for row in rows for value in row.get("answers", row)[name]] for name in names}

    expected = pool([result["expected"] for result in results], "tokens", "repeated")
    return [
        (
            (name_of(key[:3]), *key[3:]),
            signatures.by_length(pool(rows, "tokens", "passes", "repeated", "ended"), expected, several=key[1] > 1),
        )
        for key, rows in _shared([result[rows_name] for result in results], *fields)
    ]


def timings(speeds: Sequence[Result]) -> list[RuleTiming]:
    """The timed decodings that all files of a label have."""
    rows_of = [speed.get("decodes", []) for speed in speeds]
    timed = []
    for (alg, n, threshold, batch), rows in _shared(rows_of, "batch"):
        # repeated timings are stored as a list; the median is robust against a disturbed one
        seconds = [float(np.median(row["seconds"])) for row in rows]
        exact = float(np.mean([row["exact"] / row["prompts"] for row in rows]))
        rate = over_seeds([row["tokens"] / s for row, s in zip(rows, seconds, strict=True)])
        per_prompt = over_seeds([s / row["prompts"] for row, s in zip(rows, seconds, strict=True)])
        prompts = sum(row["prompts"] for row in rows)
        timed.append(RuleTiming(alg, n, threshold, batch, prompts, exact, rate, per_prompt))
    return timed


def served_rates(serving: Result) -> list[ServedRate]:
    """The measurements of serving.json, by requests at a time; plain serving first."""
    rates = {
        (row["alg"], row["n"], row["threshold"], row["at"]): sum(row["tokens"]) / row["wall"] for row in serving["rows"]
    }

    def middle_and_high(values: Sequence[float]) -> tuple[float, float]:
        middle, high = np.quantile(values, [0.5, 0.9]).tolist()
        return middle, high

    rows = []
    for row in sorted(serving["rows"], key=lambda row: (row["at"], row["alg"] != STOCK)):
        key, plain = (row["alg"], row["n"], row["threshold"]), rates.get((STOCK, 1, None, row["at"]))
        rows.append(
            ServedRate(
                *key,
                row["at"],
                rates[*key, row["at"]],
                None if plain is None else rates[*key, row["at"]] / plain,
                sum(row["tokens"]) / row["passes"],
                middle_and_high(row["first"]),
                middle_and_high(row["seconds"]),
                sum(row["tokens"]) / len(row["tokens"]),
                float(np.mean(row["exact"])) if "exact" in row else None,
            )
        )
    return rows


def served_comparison(rates: Sequence[ServedRate]) -> Iterator[str]:
    """A sentence about each rule of the plugin: where it is slower than plain serving, and where it is faster."""
    for name in dict.fromkeys(rate.name for rate in rates if rate.name != STOCK):
        compared = [(r.at, r.ratio) for r in rates if r.name == name and r.ratio is not None]
        for slower in (True, False):
            part = [f"{at} ({ratio:.2f} times its tokens/s)" for at, ratio in compared if (ratio < 1) == slower]
            if part:
                verb = "LOSES to" if slower else "is faster than"
                yield f"{name} {verb} plain serving at {', '.join(part)} at a time."


def context_rows(contexts: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows that all seeds have: alg, n, threshold, shots, mean context, and exact, speed and rate as estimates."""
    return [
        {
            **dict(zip(("alg", "n", "threshold", "shots"), key, strict=True)),
            "context": float(np.mean([row["context"] for row in rows])),
            "exact": share([row["exact"] for row in rows]),
            "speed": _speed(rows),
            "rate": over_seeds([sum(row["tokens"]) / float(np.median(row["seconds"])) for row in rows]),
        }
        for key, rows in _shared([context["rows"] for context in contexts], "shots")
    ]


def perplexities(results: Results) -> dict[str, dict[str, Estimate]]:
    """Perplexity by text and label, for the texts that all labels have; seeds are averaged in nats."""
    estimates: dict[tuple[str, str, int], dict[str, Estimate]] = {}
    for label, seeds in results.items():
        # texts of one name differ between machines, and their tokens with --most and --length
        tables = [{(t["name"], t["sha256"], t["tokens"]): t["perplexity"] for t in result["texts"]} for result in seeds]
        for key in tables[0]:
            if all(key in table for table in tables):
                nats = over_seeds([math.log(table[key]) for table in tables])
                mean = Estimate(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high))
                estimates.setdefault(key, {})[label] = mean
    shared = {key: row for key, row in estimates.items() if len(row) == len(results)}
    names = [name for name, *_ in shared]
    return {n if names.count(n) == 1 else f"{n} ({sha:.8})": row for (n, sha, _), row in shared.items()}


def pooled(calibrations: Sequence[Result]) -> list[dict[str, np.ndarray]]:
    """Predictions of all seeds together, by slot: "prob", "entropy" and "right", float arrays of equal length."""
    slots = min(len(result["slots"]) for result in calibrations)
    return [
        {
            field: np.concatenate([np.asarray(result["slots"][j][field], dtype=float) for result in calibrations])
            for field in ("prob", "entropy", "right")
        }
        for j in range(slots)
    ]
