"""Results of a campaign (runs/evidence/ARM-SEED) and the Markdown tables of docs/evidence.md made from them."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dev.evidence import experiment
from dev.evidence.experiment import ARMS, TASKS
from sdlm_megatron.errors import DataError
from sdlm_megatron.evaluation.intervals import (
    Estimate,
    acceptance,
    average_precision,
    bins_of,
    brier,
    difference,
    over_seeds,
)
from sdlm_megatron.evaluation.page import change, number, percent
from sdlm_megatron.evaluation.result_files import (
    KINDS,
    Result,
    Results,
    context_rows,
    exact_of,
    name_of,
    perplexities,
    pick,
    points,
    pooled,
    timings,
)

BASE = "base"
"""The untouched model, which has no seeds."""
LEADING = [arm.name for arm in experiment.MAIN]
BLOCKS = [arm.name for arm in experiment.MAIN if arm.block_size > 1]
VARIANTS = [arm.name for arm in experiment.VARIANTS]
RATES = ["ar", "d4", *(arm.name for arm in experiment.RATES)]
SENSITIVE = [*LEADING, *(arm.name for arm in experiment.SENSITIVITY)]
SETTINGS: list[tuple[str, float | None]] = [("ar", None), ("prob_conf", 0.98), ("prob_conf", 0.9)]
THRESHOLDS = (0.9, 0.98)
PASSES = {"window": "n accepted tokens", "window_one": "one accepted token", "self_speculative": "self-speculation"}
Rows = Iterator[Sequence[object]]


@dataclass
class Campaign:
    """Results by arm and seed."""

    measured: dict[tuple[str, str], dict[str, dict[int, Result]]] = field(default_factory=dict)
    """(task, kind) -> arm -> seed -> result; perplexity has the task ""."""
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    """arm -> seed -> seconds of preparing, training and exporting."""

    def seeds(self, task: str, kind: str, arm: str) -> dict[int, Result]:
        return self.measured.get((task, kind), {}).get(arm, {})

    def of(self, task: str, kind: str, arms: Sequence[str]) -> Results:
        """Results of the arms that were measured, under the arms' texts."""
        results = {text_of(arm): list(self.seeds(task, kind, arm).values()) for arm in arms}
        return {text: seeds for text, seeds in results.items() if seeds}

    def each(self, kind: str, arms: Sequence[str]) -> Iterator[tuple[str, str, list[Result]]]:
        """(text of the task, text of the arm, results of its seeds), for every task and every arm with results."""
        for task, task_text in TASKS.items():
            for arm_text, seeds in self.of(task, kind, arms).items():
                yield task_text, arm_text, list(seeds)


def text_of(arm: str) -> str:
    """Name of an arm in tables and figures."""
    return ARMS[arm].text if arm in ARMS else "untouched"


def read_campaign(folder: Path) -> Campaign:
    """Reads everything that dev.evidence.train_arms and dev.evidence.run_measurements wrote below `folder`.

    Raises:
        DataError: there are no results, or a file is not the result that its name says.
    """
    campaign = Campaign()
    for model in sorted(folder.glob("*")):
        name = re.fullmatch(r"(\w+)-(\d+)", model.name)
        arm, seed = (name[1], int(name[2])) if name else (model.name, 0)
        # Other folders of the campaign: tasks, and the random base.
        if arm not in (ARMS if name else (BASE,)):
            continue
        if name and (model / "facts.json").exists():
            campaign.seconds.setdefault(arm, {})[seed] = float(_read(model / "facts.json")["seconds"])
        files = [(task, model / task / f"{kind}.json") for task in TASKS for kind in KINDS if kind != "perplexity"]
        for task, path in [*files, ("", model / "perplexity.json")]:
            if path.exists():
                value = _read(path)
                campaign.measured.setdefault((task, path.stem), {}).setdefault(arm, {})[seed] = value
    if not campaign.measured:
        fix = "measure first: python -m dev.evidence.run_measurements"
        raise DataError("no results in the campaign's folder", str(folder), fix)
    return campaign


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read JSON: {error}", str(path), "remove it, and measure again") from None
    if not isinstance(value, dict) or value.get("kind", path.stem) != path.stem:
        raise DataError(f'"kind" is not {path.stem!r}', str(path), "remove it, and measure again")
    return value


# ----------------------------------------------------------------------------------------------- quality
def run_rows(campaign: Campaign) -> Rows:
    for arm in ARMS.values():
        if taken := campaign.seconds.get(arm.name):
            minutes = f"{np.mean(list(taken.values())) / 60:.0f}"
            yield arm.name, arm.text, len(taken), f"{arm.share:g}", arm.block_size, f"{arm.lr:g}", minutes


def prompt_count(sweeps: Sequence[Result]) -> int:
    """Prompts of all seeds."""
    return sum(len(sweep["rows"][0]["exact"]) for sweep in sweeps)


def model_rows(campaign: Campaign, arms: Sequence[str]) -> Rows:
    for task, arm, seeds in campaign.each("sweep", arms):
        measured = points(seeds)
        chosen = [pick(measured, alg, tau) for alg, tau in SETTINGS]
        exact = ["–" if p is None else percent(p.exact) for p in chosen]
        speed = ["–" if p is None else number(p.speed) for p in [*chosen[1:], pick(measured, "self_speculative")]]
        yield task, arm, len(seeds), prompt_count(seeds), *exact, *speed


def verdict(gap: Estimate) -> str:
    """Conclusion that the interval of a difference supports."""
    if not gap.excludes(0.0):
        return "not distinguishable"
    return "better" if gap.value > 0 else "worse"


def difference_rows(campaign: Campaign, pairs: Sequence[tuple[str, str]]) -> Rows:
    """Exact answers of an arm minus those of a reference arm on the same prompts, seed by seed.

    The reference is taken at the same setting, or at n = 1 if it has no other.
    """
    for task, task_text in TASKS.items():
        for arm, other in pairs:
            ours, theirs = (campaign.seeds(task, "sweep", name) for name in (arm, other))
            common = sorted(ours.keys() & theirs.keys())
            for alg, tau in SETTINGS if common else ():
                reference = [theirs[seed] for seed in common]
                left = exact_of([ours[seed] for seed in common], alg, tau)
                right = exact_of(reference, alg, tau) or exact_of(reference, "ar", None)
                if left is None or right is None:
                    continue
                # Variants are measured on the first prompts of the list only.
                count = min(len(left[0]), len(right[0]))
                left, right = ([answers[:count] for answers in seeds] for seeds in (left, right))
                gap, gaps = difference(left, right), np.asarray(left) - np.asarray(right)
                setting = name_of((alg, 1, tau)).split(", n")[0]
                wins = f"{(gaps > 0).sum()} / {(gaps < 0).sum()}"
                texts = (task_text, text_of(arm), text_of(other), setting)
                yield *texts, len(common), gaps.size, change(gap), wins, verdict(gap)


def curve_rows(campaign: Campaign) -> Rows:
    for task, arm, seeds in campaign.each("sweep", BLOCKS):
        for p in points(seeds):
            yield task, arm, p.name, len(seeds), percent(p.exact), number(p.speed)


# -------------------------------------------------------------------------------------------- confidence
def _shares(values: Sequence[float]) -> Estimate:
    """Estimate over seeds, cut to 0..1: Student's interval knows no bounds."""
    estimate = over_seeds(values)
    return Estimate(estimate.value, max(estimate.low, 0.0), min(estimate.high, 1.0))


def _ece(confidence: Sequence[float], right: Sequence[int]) -> float:
    return bins_of(confidence, right).ece


def calibration_rows(campaign: Campaign) -> Rows:
    for task, arm, seeds in campaign.each("calibration", BLOCKS):
        for slot in range(len(seeds[0]["slots"])):
            slots = [result["slots"][slot] for result in seeds]
            scores = [
                number(_shares([score(values[name], values["right"]) for values in slots]), 3)
                for name in ("prob", "entropy")
                for score in (_ece, brier, average_precision)
            ]
            right = _shares([float(np.mean(values["right"])) for values in slots])
            yield task, arm, slot + 1, percent(right), *scores


def kept_rows(campaign: Campaign) -> Rows:
    for task, arm, seeds in campaign.each("calibration", BLOCKS):
        slots = pooled(seeds)
        columns = [acceptance([values["prob"] for values in slots], tau) for tau in THRESHOLDS]
        for j, slot in enumerate(slots):
            cells = [f"{share[j]:.1%} ({'–' if np.isnan(rest[j]) else f'{rest[j]:.1%}'})" for share, rest in columns]
            yield task, arm, j + 1, len(slot["right"]), *cells


# -------------------------------------------------------------------------------------------------- cost
def _gain(speed: Result, alg: str, threshold: float | None, batch: int) -> float:
    """Tokens per second relative to n = 1 of the same model and batch."""
    rate = {
        (row["alg"], row["threshold"]): row["tokens"] / float(np.median(row["seconds"]))
        for row in speed["decodes"]
        if row["batch"] == batch
    }
    return float(rate[alg, threshold] / rate["ar", None])


def walltime_rows(campaign: Campaign) -> Rows:
    for task, arm, seeds in campaign.each("speed", LEADING):
        for t in timings(seeds):
            gain = number(over_seeds([_gain(speed, t.alg, t.threshold, t.batch) for speed in seeds]))
            cells = (len(seeds), t.prompts, f"{t.exact:.1%}", number(t.rate, 1), number(t.seconds, 3), gain)
            yield task, arm, t.batch, t.name, *cells


def overhead_rows(campaign: Campaign) -> Rows:
    for arm in BLOCKS:
        # The cost of a pass depends on neither task nor weights: the first measured model stands for all.
        seeds = next((s for task in TASKS if (s := campaign.seeds(task, "speed", arm))), {})
        for speed in list(seeds.values())[:1]:
            for r in speed.get("break_even", []):
                cost = number(Estimate(r["tokens"], r["low"], r["high"]))
                yield text_of(arm), r["batch"], r["context"], r["n"], PASSES[r["what"]], cost


def context_table_rows(campaign: Campaign) -> Rows:
    for task, arm, seeds in campaign.each("context", LEADING):
        for r in context_rows(seeds):
            setting = name_of((r["alg"], r["n"], r["threshold"]))
            cells = (len(seeds), prompt_count(seeds), percent(r["exact"]), number(r["speed"]), number(r["rate"], 1))
            yield task, arm, r["shots"], f"{r['context']:.0f}", setting, *cells


def perplexity_table(campaign: Campaign) -> tuple[Sequence[str], Rows]:
    results = campaign.of("", "perplexity", [BASE, *LEADING, *VARIANTS[1:], *RATES[2:]])
    # The columns are the texts that were measured, so the head depends on the campaign.
    texts = perplexities(results) if results else {}
    rows = ((label, len(results[label]), *(number(row[label]) for row in texts.values())) for label in results)
    return ("", "seeds", *texts), rows


# ------------------------------------------------------------------------------------------------ tables
_RUNS = ("arm", "", "seeds", "share of the conversations", "D", "learning rate", "minutes per model")
_MODELS = (
    *("task", "", "seeds", "prompts", "exact, n = 1", "exact, τ = .98", "exact, τ = .9"),
    *("tokens per pass, τ = .98", "τ = .9", "self-speculative"),
)
_DIFFERENCES = (
    *("task", "", "against", "decoding", "seeds", "prompts"),
    *("points", "only this / only the other correct", ""),
)
_SCORES = [f"{name}, {score}" for score in ("prob", "entropy") for name in ("ECE", "Brier", "AP")]
_KEPT = [f"accepted at τ = {tau:g} (if all earlier slots are)" for tau in THRESHOLDS]
_WALLTIME = ("task", "", "batch", "decoding", "seeds", "prompts", "exact", "tokens/s", "seconds per prompt")
_CONTEXT = ("task", "", "examples", "tokens before", "decoding", "seeds", "prompts", "exact", "tokens per pass")
# At the small rate; at the better rate of each; with the loss that helps SDLM; then each rate against the other.
_RATE_PAIRS = [*((arm, "ar_slow") for arm in ("d4_slow", "d4", "next_token")), ("ar_slow", "ar"), ("d4_slow", "d4")]

TABLES: dict[str, Callable[[Campaign], tuple[Sequence[str], Rows]]] = {
    "runs": lambda c: (_RUNS, run_rows(c)),
    "main": lambda c: (_MODELS, model_rows(c, [BASE, *LEADING])),
    "differences": lambda c: (_DIFFERENCES, difference_rows(c, [(arm, LEADING[0]) for arm in LEADING[1:]])),
    "curve": lambda c: (("task", "", "decoding", "seeds", "exact", "tokens per pass"), curve_rows(c)),
    "calibration": lambda c: (("task", "", "slot", "correct", *_SCORES), calibration_rows(c)),
    "kept": lambda c: (("task", "", "slot", "positions", *_KEPT), kept_rows(c)),
    "walltime": lambda c: ((*_WALLTIME, "speedup over n = 1"), walltime_rows(c)),
    "overhead": lambda c: (("", "batch", "tokens before", "n", "pass", "causal steps (quartiles)"), overhead_rows(c)),
    "context": lambda c: ((*_CONTEXT, "tokens/s"), context_table_rows(c)),
    "variants": lambda c: (_MODELS, model_rows(c, VARIANTS)),
    "variant_differences": lambda c: (_DIFFERENCES, difference_rows(c, [(arm, VARIANTS[0]) for arm in VARIANTS[1:]])),
    "sensitivity": lambda c: (_MODELS, model_rows(c, SENSITIVE)),
    "rates": lambda c: (_MODELS, model_rows(c, RATES)),
    "rate_differences": lambda c: (_DIFFERENCES, difference_rows(c, _RATE_PAIRS)),
    "perplexity": perplexity_table,
}
"""Name of a table in docs/evidence.md to its head and rows."""


def markdown(head: Sequence[str], rows: Rows) -> str:
    """A Markdown table; "" without rows."""
    body = [[str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body]) if body else ""
