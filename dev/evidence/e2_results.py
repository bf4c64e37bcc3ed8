"""Arms of experiment E2 and the tables that follow from its committed vectors: one seed, intervals over the prompts."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dev.evidence import e1_measure, e1_results
from dev.evidence.e1_results import RULE_TEXTS, Rows
from dev.evidence.evidence_tables import markdown
from dev.evidence.experiment import Arm
from sdlm_megatron.errors import DataError
from sdlm_megatron.evaluation import intervals, signatures
from sdlm_megatron.evaluation.page import change, number, percent

KEPT = (*e1_measure.COUNTS, "repeated", "ended", "flexible")
"""Fields of a decoding rule besides `exact`."""
LEARNING_RATE = 3e-4
_D4 = Arm("d4", "SDLM, D = 4", row_length=1344)
E2_ARMS = {
    arm.name: arm
    for arm in (
        Arm("ar", "autoregressive (D = 1)", block_size=1, row_length=800),
        _D4,
        replace(_D4, name="d4_nt", text="SDLM, D = 4, with the next-token loss", next_token_weight=1.0),
        Arm("base", "untouched model", block_size=1),
    )
}
WINDOWS = ("p98", "p90", "self")
"""Decoding rules with a window; what `self` writes is slot 1 alone, so a threshold is to be compared with it."""
LENGTHS = ("short", "middle", "long")
"""Thirds of the questions by the tokens of the reference answer."""
Answers = Mapping[tuple[str, str], dict[str, Any]]
"""(arm, rule) to its vectors and those of the reference answers, `expected`."""


def rules_of(arm: str) -> tuple[str, ...]:
    """Decoding rules that are measured of an arm."""
    return ("n1", *WINDOWS) if E2_ARMS[arm].block_size > 1 else ("n1",)


def number_behind_mark(answer: str) -> str:
    """The number behind the first "#### " that a number follows, "" without one: a count that does not use lm_eval."""
    for rest in answer.split("#### ")[1:]:
        sign, digits = ("-", rest[1:]) if rest.startswith("-") else ("", rest)
        end = next((i for i, letter in enumerate(digits) if letter not in "0123456789.,"), len(digits))
        if end:
            return sign + digits[:end].replace(",", "").removesuffix(".")
    return ""


def read_answers(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The vectors of a folder of results.

    Raises:
        DataError: they are not of one campaign: one base, one model of each arm, the same budget and questions.
    """
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    files = e1_results.read_folder(folder, KEPT)
    trained = [key for key, _ in files if key.arm != "base"]
    fix = "keep the files of one campaign there"
    for what, values in {
        "lr, steps, seed": {(key.lr, key.steps, key.seed) for key in trained},
        "prompts": {value["prompts"] for value in files.values()},
        "base": {value.get("base", "not recorded") for value in files.values()},
    }.items():
        if len(values) > 1:
            raise DataError(f"results with different {what}: {sorted(values)}", str(folder), fix)
    for (key, part), value in files.items():
        if any(arm == key.arm for arm, _ in answers):
            raise DataError(f"a second model of {key.arm}", str(folder / key.file(part)), fix)
        expected = {name: [int(n) for n in text.split()] for name, text in value["expected"].items()}
        for rule, row in value["rules"].items():
            answers[key.arm, rule] = {**row, "expected": expected}
    return {(arm, rule): answers[arm, rule] for arm in E2_ARMS for rule in RULE_TEXTS if (arm, rule) in answers}


def thirds(lengths: list[int]) -> list[np.ndarray]:
    """Numbers of the shortest, the middle and the longest third."""
    return [np.sort(part) for part in np.array_split(np.argsort(lengths, kind="stable"), len(LENGTHS))]


def main_rows(answers: Answers) -> Rows:
    """Every arm and decoding rule."""
    for (arm, rule), row in answers.items():
        exact, flexible = (percent(intervals.share([row[name]])) for name in ("exact", "flexible"))
        speed = number(intervals.ratio([row["tokens"]], [row["passes"]]))
        tokens = f"{np.mean(row['tokens']):.0f} ({np.mean(row['expected']['tokens']):.0f})"
        yield E2_ARMS[arm].text, RULE_TEXTS[rule], len(row["exact"]), exact, flexible, speed, tokens


def difference_rows(answers: Answers) -> Rows:
    """Paired differences of exact answers."""
    several = ("d4", "d4_nt")
    for first, second in (
        *(((arm, rule), ("ar", "n1")) for arm in several for rule in rules_of(arm)),
        *((("d4_nt", rule), ("d4", rule)) for rule in rules_of("d4")),
        *(((arm, rule), (arm, "self")) for arm in several for rule in ("p98", "p90")),
        *(((arm, rule), (arm, "n1")) for arm in several for rule in WINDOWS),
    ):
        if first in answers and second in answers:
            a, b = answers[first]["exact"], answers[second]["exact"]
            names = [f"{E2_ARMS[arm].text}, {RULE_TEXTS[rule]}" for arm, rule in (first, second)]
            only_first, only_second, _ = intervals.mcnemar(a, b)
            yield *names, change(intervals.difference([a], [b])), only_first, only_second


def length_rows(answers: Answers) -> Rows:
    """Failure signatures and speed by the length of the reference answer."""
    for (arm, rule), row in answers.items():
        for name, at in zip(LENGTHS, thirds(row["expected"]["tokens"]), strict=True):
            signs = signatures.measure(row, several=rule != "n1", expected=row["expected"], at=at.tolist())
            exact, tokens, passes = (np.array(row[field])[at] for field in ("exact", "tokens", "passes"))
            ends = intervals.share(
                [np.array(row["ended"])[at] * (2 * tokens < np.array(row["expected"]["tokens"])[at])]
            )
            shares = [
                "" if share is None else f"{share:.1%}"
                for share in (signs.cut, signs.repetition, signs.expected_repetition, signs.stalled)
            ]
            speed = number(intervals.ratio([tokens], [passes]))
            cells = (len(at), percent(intervals.share([exact])), speed, percent(ends), *shares)
            yield E2_ARMS[arm].text, RULE_TEXTS[rule], name, *cells


def tables(folder: Path) -> dict[str, str]:
    """Name to Markdown of every table; "" before all models are measured."""
    answers = read_answers(folder)
    if not {(arm, rule) for arm in E2_ARMS for rule in rules_of(arm)} <= answers.keys():
        return dict.fromkeys(("main", "differences", "lengths"), "")
    main = ("arm", "decoding", "questions", "exact", "last number", "tokens per pass", "tokens (reference)")
    signs = ("ended early", "no end", "repetition", "reference", "stalled")
    length = ("arm", "decoding", "answers", "questions", "exact", "tokens per pass", *signs)
    return {
        "main": markdown(main, main_rows(answers)),
        "differences": markdown(("", "against", "points", "only first", "only second"), difference_rows(answers)),
        "lengths": markdown(length, length_rows(answers)),
    }


def recompute(args: argparse.Namespace) -> None:
    """Prints all tables from the committed vectors, and puts them into evidence.md."""
    e1_results.publish(tables(args.results), "e2", args)
