"""Arms of experiment E1, its committed vectors, and the tables and verdicts that follow from them.

docs/evidence/e1 has one file for each measured model and part, written by `e1_measure`, and `new_prompts.txt`: 1 for
each test prompt that does not occur in the training part.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dev.evidence.e1_measure import KEPT, read_vectors
from dev.evidence.e1_statistics import MARGIN, SEEDS, Crossed, crossed, gap, holm, tokens_per_pass
from dev.evidence.evidence_tables import markdown
from dev.evidence.experiment import Arm, ramps
from sdlm_megatron.errors import DataError
from sdlm_megatron.evaluation import intervals
from sdlm_megatron.evaluation.intervals import Estimate
from sdlm_megatron.evaluation.page import change, number, percent
from sdlm_megatron.files import write_text

STEPS = 150
"""Steps of the models that are compared."""
RATES, FIRST_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), (3e-4, 1e-3)
"""Learning rates, and those that are measured first."""
NEW = "new_prompts.txt"
LEAST_SPEED = 1.5
"""Tokens per pass of H4."""
_D4 = Arm("d4", "SDLM, D = 4", row_length=640)
_NT = replace(_D4, name="d4_nt", text="SDLM, D = 4, with the next-token loss", next_token_weight=1.0)
E1_ARMS = {
    arm.name: arm
    for arm in (
        Arm("ar", "autoregressive (D = 1)", block_size=1, row_length=432),
        _D4,
        _NT,
        replace(_NT, name="d4_causal", text="SDLM, D = 4, with the next-token loss and causal_attn", causal_attn=True),
        replace(_NT, name="d16_nt", text="SDLM, D = 16, with the next-token loss", block_size=16),
    )
}
COUNTS = {"ar": "n1", "d4": "p98", "d4_nt": "p98", "d4_causal": "lossless", "d16_nt": "p98"}
"""Decoding rule of each arm that counts in the comparison."""
RULE_TEXTS = {"n1": "n = 1", "p98": "τ = .98", "p90": "τ = .9", "self": "self-speculative", "lossless": "lossless"}
HYPOTHESES = {"H1": "d4", "H2": "d4_nt", "H3": "d4_causal"}
"""Arm that is compared with `ar`."""
SPEED_ARM = "d4_nt"
DIVERGED, LOST = "diverged", "did not train"
"""Field of the files of models whose loss or gradient was not finite, and what tables say of these models."""
Rows = Iterator[Sequence[object]]


@dataclass(frozen=True)
class Key:
    """One model."""

    arm: str
    lr: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.lr:.0e}-{self.steps}-{self.seed}"

    def file(self, part: str) -> str:
        """Name of the file of its vectors."""
        return f"{self.name}-{part}.json"


ResultFiles = Mapping[tuple[Key, str], dict[str, Any]]
"""(model, dev or test) to the content of its file."""


def rules_of(key: Key, part: str) -> tuple[str, ...]:
    """Decoding rules that are measured of a model."""
    arm = key.arm
    if part == "dev":
        # Lossless answers are those of n = 1, at twice the cost.
        return ("n1",) if COUNTS[arm] == "lossless" else (COUNTS[arm],)
    if E1_ARMS[arm].block_size == 1:
        return ("n1",)
    more = {"self": key.seed == 0 and E1_ARMS[arm].block_size <= 4, "lossless": COUNTS[arm] == "lossless"}
    return ("n1", "p98", "p90", *(rule for rule, measured in more.items() if measured))


def read_folder(folder: Path, kept: Sequence[str] = KEPT) -> dict[tuple[Key, str], dict[str, Any]]:
    """All vectors of a folder.

    Raises:
        DataError: a file's name differs from what it says about itself.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        value = read_vectors(path, kept)
        try:
            key, part = Key(*(value[name] for name in Key.__dataclass_fields__)), value["part"]
        except KeyError as error:
            raise DataError(f"no {error}", str(path), "measure again") from None
        if path.name != key.file(part):
            raise DataError(f"the file says that it is {key.file(part)}", str(path), "restore its name")
        results[key, part] = value
    return results


def best_rate(results: ResultFiles, arm: str, steps: int) -> float:
    """The learning rate with the most exact answers on dev in the decoding that counts; of equals the smallest.

    Raises:
        DataError: no rate was measured.
    """
    rule = rules_of(Key(arm, 0.0, steps, 0), "dev")[0]
    scores = {
        key.lr: sum(value["rules"][rule]["exact"])
        for (key, part), value in results.items()
        if part == "dev" and (key.arm, key.steps) == (arm, steps) and rule in value["rules"]
    }
    if not scores:
        raise DataError("no learning rate was measured on dev", arm, "python -m dev.evidence.e1 run")
    return min(scores, key=lambda lr: (-scores[lr], lr))


class Comparison:
    """Vectors of the arms with their chosen rates."""

    def __init__(self, results: ResultFiles, steps: int, new: np.ndarray | None = None) -> None:
        self.seeds: dict[str, dict[int, dict[str, Any]]] = {}
        self.lost: set[tuple[str, int]] = set()
        """Arm and seed of the models that did not train."""
        for key, part in sorted(results, key=lambda item: item[0].seed):
            if part == "test" and key.steps == steps:
                self.seeds.setdefault(key.arm, {})[key.seed] = results[key, part]["rules"]
                if results[key, part].get(DIVERGED):
                    self.lost.add((key.arm, key.seed))
        self.new = new

    @property
    def complete(self) -> bool:
        """Whether all seeds of all compared arms have all their rules."""
        return all(
            sorted(self.seeds.get(arm, {})) == list(range(SEEDS))
            and all(
                set(rules_of(Key(arm, 0.0, 0, seed), "test")) <= rules.keys() for seed, rules in self.seeds[arm].items()
            )
            for arm in ("ar", *HYPOTHESES.values())
        )

    def with_rule(self, arm: str, rule: str) -> list[int]:
        """Seeds of the arm with this rule."""
        return [seed for seed, rules in self.seeds.get(arm, {}).items() if rule in rules]

    def matrix(self, arm: str, rule: str, seeds: Sequence[int], field: str = "exact") -> np.ndarray:
        """int (seeds, prompts)"""
        values = np.array([self.seeds[arm][seed][rule][field] for seed in seeds])
        return values if self.new is None else values[:, self.new]

    def quality(self, arm: str, rule: str, other: str, other_rule: str) -> Crossed:
        """Difference of the shares of exact answers; all seeds must have both rules."""
        return gap(self.matrix(arm, rule, range(SEEDS)), self.matrix(other, other_rule, range(SEEDS)))

    def cells(self, arm: str, rule: str) -> tuple[str, str, str] | None:
        """Seeds, share of exact answers and tokens per pass as texts; None without results.

        The intervals of a single seed are over the prompts alone.
        """
        seeds = self.with_rule(arm, rule)
        if not seeds:
            return None
        lost = sum((arm, seed) in self.lost for seed in seeds)
        if lost == len(seeds):
            return str(lost), LOST, "–"
        exact, tokens, passes = (self.matrix(arm, rule, seeds, field) for field in ("exact", "tokens", "passes"))
        if len(seeds) == 1:
            share, speed = intervals.share(list(exact)), intervals.ratio(list(tokens), list(passes))
        else:
            share, speed = crossed(exact).interval, tokens_per_pass(tokens, passes).interval
            # Student's interval of few seeds can leave [0, 1].
            share = Estimate(share.value, max(share.low, 0.0), min(share.high, 1.0))
        return f"{len(seeds)} ({lost} {LOST})" if lost else str(len(seeds)), percent(share), number(speed)


def estimates(comparison: Comparison) -> dict[str, Crossed]:
    """Hypothesis to its estimate; nothing before all models are measured."""
    if not comparison.complete:
        return {}
    values = {name: comparison.quality(arm, COUNTS[arm], "ar", "n1") for name, arm in HYPOTHESES.items()}
    counts = (comparison.matrix(SPEED_ARM, COUNTS[SPEED_ARM], range(SEEDS), field) for field in ("tokens", "passes"))
    return values | {"H4": tokens_per_pass(*counts)}


def verdicts(comparison: Comparison) -> dict[str, tuple[float, str]]:
    """Hypothesis to Holm's adjusted p-value and the verdict; nothing before all models are measured."""
    values = estimates(comparison)
    tested = holm({name: value.above(LEAST_SPEED if name == "H4" else -MARGIN) for name, value in values.items()})
    return {
        name: (adjusted, _verdict(name, values[name].interval, rejected))
        for name, (adjusted, rejected) in tested.items()
    }


def _verdict(name: str, interval: Estimate, rejected: bool) -> str:
    if name == "H4":
        return f"more than {LEAST_SPEED}" if rejected else "not more" if interval.high < LEAST_SPEED else "not decided"
    if rejected:
        return "within 3 points"
    if interval.high < -MARGIN:
        return "worse by more than 3 points"
    return "worse" if interval.high < 0 else "not decided"


def rate_text(rate: float) -> str:
    """A learning rate as the text of evidence.md writes it: "3e-4"."""
    return f"{rate:.0e}".replace("e-0", "e-")


def text_of(arm: str, rule: str) -> str:
    """An arm and its decoding rule in one cell."""
    return f"{E1_ARMS[arm].text}: {RULE_TEXTS[rule]}"


def rate_rows(results: ResultFiles) -> Rows:
    """The learning rates on dev."""
    for (key, part), value in sorted(
        results.items(), key=lambda item: (list(E1_ARMS).index(item[0][0].arm), item[0][0].lr)
    ):
        if part == "dev":
            rule = rules_of(key, "dev")[0]
            exact = LOST if value.get(DIVERGED) else percent(intervals.share([value["rules"][rule]["exact"]]))
            chosen = "chosen" if key.lr == best_rate(results, key.arm, key.steps) else ""
            yield E1_ARMS[key.arm].text, rate_text(key.lr), RULE_TEXTS[rule], exact, chosen


def main_rows(comparison: Comparison) -> Rows:
    """Every arm and decoding rule: exact answers and tokens per pass."""
    for arm in E1_ARMS:
        for rule, text in RULE_TEXTS.items():
            if cells := comparison.cells(arm, rule):
                yield E1_ARMS[arm].text, text, *cells


def hypothesis_rows(comparison: Comparison) -> Rows:
    """The estimates of the four hypotheses."""
    for name, value in estimates(comparison).items():
        arm = HYPOTHESES.get(name, SPEED_ARM)
        shown = number(value.interval) + " tokens per pass" if name == "H4" else change(value.interval) + " points"
        yield name, text_of(arm, COUNTS[arm]), shown, f"{value.freedom:.0f}"


def verdict_rows(comparison: Comparison) -> Rows:
    """The four hypotheses with their verdicts."""
    decided = verdicts(comparison)
    for name, *cells in hypothesis_rows(comparison):
        adjusted, verdict = decided[str(name)]
        yield name, *cells, f"{adjusted:.4f}" if adjusted >= 0.0001 else "below 0.0001", verdict


def difference_rows(comparison: Comparison) -> Rows:
    """Differences without a verdict: the hypotheses are left out."""
    arms = HYPOTHESES.values()
    pairs = [
        *((arm, rule, "ar", "n1") for arm in arms for rule in ("n1", "p98", "p90") if rule != COUNTS[arm]),
        *(("d4_nt", rule, "d4", rule) for rule in ("n1", "p98", "p90")),
        ("d4_causal", "p98", "d4_nt", "p98"),
        *((arm, "p98", arm, "p90") for arm in arms),
        ("d4_causal", "lossless", "d4_causal", "n1"),
    ]
    for arm, rule, other, other_rule in pairs:
        value = comparison.quality(arm, rule, other, other_rule)
        yield text_of(arm, rule), text_of(other, other_rule), change(value.interval)


def budget_rows(results: ResultFiles, new: np.ndarray | None = None) -> Rows:
    """Speed and quality of each arm by the sum of the learning rates of all steps."""
    rates = {(key.arm, key.steps): key.lr for key, part in results if part == "test"}
    for arm, steps in sorted(rates, key=lambda model: (list(E1_ARMS).index(model[0]), model[1])):
        if cells := Comparison(results, steps, new).cells(arm, COUNTS[arm]):
            rate, (warmup, decay) = rates[arm, steps], ramps(steps)
            # The warm-up rises to the rate in its last step, the decay falls from the rate in its first step.
            total = rate * (steps - (warmup - 1) / 2 - (decay - 1) / 2)
            yield E1_ARMS[arm].text, RULE_TEXTS[COUNTS[arm]], f"{steps:,}", rate_text(rate), f"{total:.3g}", *cells


def lossless_rows(comparison: Comparison) -> Rows:
    """Answers of lossless decoding that differ from those of n = 1, by their checksums; ties in rounding may differ."""
    for seed in comparison.with_rule("d4_causal", "lossless"):
        lossless, plain = (comparison.matrix("d4_causal", rule, [seed], "checksums") for rule in ("lossless", "n1"))
        lost = ("d4_causal", seed) in comparison.lost
        yield seed, f"{plain.size:,}", LOST if lost else int((lossless != plain).sum())


def check_rates(results: ResultFiles, steps: int) -> None:
    """DataError if a model answered test prompts with another rate than dev chooses."""
    for key, part in results:
        if part == "test" and key.lr != best_rate(results, "d4_nt" if key.arm == "d16_nt" else key.arm, steps):
            fix = "commit the dev results of a campaign before it answers test prompts"
            raise DataError("dev chooses another learning rate than this model has", key.file(part), fix)


def tables(folder: Path, steps: int) -> dict[str, str]:
    """Name to Markdown of every table; "" before all models of the comparison are measured: no interim test.

    Tables `unseen_*` leave out the test prompts that also occur in the training part, and have no verdicts.
    """
    results = read_folder(folder)
    check_rates(results, steps)
    comparison = Comparison(results, steps)
    names = ("hypotheses", "main", "differences", "lossless", "budget")
    if not comparison.complete:
        return dict.fromkeys(("rates", "verdicts", *names[1:], *(f"unseen_{name}" for name in names)), "")
    new = np.array([c == "1" for c in (folder / NEW).read_text(encoding="utf-8").strip()])
    unseen = Comparison(results, steps, new)
    hypothesis = ("hypothesis", "arm and decoding", "estimate", "degrees of freedom")
    return {
        "rates": markdown(("arm", "learning rate", "decoding", "exact on dev", ""), rate_rows(results)),
        "verdicts": markdown((*hypothesis, "p (Holm)", "verdict"), verdict_rows(comparison)),
        **_tables_of(comparison, budget_rows(results)),
        "unseen_hypotheses": markdown(hypothesis, hypothesis_rows(unseen)),
        **{f"unseen_{name}": text for name, text in _tables_of(unseen, budget_rows(results, new)).items()},
    }


def _tables_of(comparison: Comparison, budgets: Rows) -> dict[str, str]:
    """The tables without hypotheses of one set of test prompts."""
    measured = ("seeds", "exact", "tokens per pass")
    budget = ("arm", "decoding", "steps", "learning rate", "sum of rates", *measured)
    return {
        "main": markdown(("arm", "decoding", *measured), main_rows(comparison)),
        "differences": markdown(("arm and decoding", "against", "points"), difference_rows(comparison)),
        "lossless": markdown(("seed", "answers", "differ from n = 1"), lossless_rows(comparison)),
        "budget": markdown(budget, budgets),
    }


def recompute(args: argparse.Namespace) -> None:
    """Prints all tables and verdicts from the committed vectors, and puts them into evidence.md."""
    publish(tables(args.results, STEPS), "e1", args)


def publish(made: Mapping[str, str], experiment: str, args: argparse.Namespace) -> None:
    """Prints tables and puts each into evidence.md between its marks, or compares them with those there (--check)."""
    for name, text in made.items():
        print(f"\n{name}\n{text or 'no results yet'}")
    path = args.docs / "evidence.md"
    old = path.read_text(encoding="utf-8")

    def replaced(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]] or 'No results yet.'}\n\n{match[4]}"

    filled = re.sub(rf"(<!-- {experiment} (\w+) -->\n)(.*?)(<!-- end -->)", replaced, old, flags=re.DOTALL)
    if args.check and filled != old:
        fix = f"python -m dev.evidence.{experiment} recompute"
        raise DataError(f"its {experiment.upper()} tables are not those of the vectors", str(path), fix)
    if not args.check:
        write_text(path, filled)
