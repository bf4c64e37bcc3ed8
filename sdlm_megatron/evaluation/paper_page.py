"""The page of `sdlm evaluate paper`: the paper's figures beside the results of one model, with intervals."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sdlm_megatron.evaluation import intervals, signatures
from sdlm_megatron.evaluation.page import number, percent
from sdlm_megatron.evaluation.paper_tasks import Published, paper_tasks, published
from sdlm_megatron.evaluation.result_files import Result, name_of
from sdlm_megatron.report.page_kit import Page
from sdlm_megatron.report.plots import INK, SERIES, SOFT, figure_of, legend

LARGE = 10e9
"""Parameters from which on a model is compared with the published 32B ones."""
SOURCE = "arXiv 2509.24007 (v1)"
DIFFERENCES = (
    "The prompts and the numbers of examples follow the evaluation guide of the reference implementation, which uses "
    "OpenCompass; answers are scored by lm-evaluation-harness, so the same model may get another score. "
    "MMLU is the mean over questions, IFEval the prompt-level strict accuracy. The interval of a score covers the "
    "choice of prompts (Wilson, 95 %). Tokens per pass count the end token of an answer, which the reference's count "
    "leaves out. The paper does not say at which threshold the choice tasks were decoded."
)


def summary_line(result: Result) -> str:
    """A result as one line of text."""
    task = paper_tasks()[result["task"]]
    return (
        f"{task.name}: {percent(score(result))} of {len(result['correct'])} prompts, "
        f"{number(speed(result))} tokens per pass, {result['seconds']:.0f} s"
    )


def score(result: Result) -> intervals.Estimate:
    """Share of correct answers."""
    return intervals.share([result["correct"]])


def speed(result: Result) -> intervals.Estimate:
    """Tokens per pass."""
    return intervals.ratio([result["tokens"]], [result["passes"]])


def comparable(facts: Mapping[str, Any]) -> tuple[Published, list[Published]]:
    """The published autoregressive model and rows of the published SDLM that are nearest to a model.

    They have the size class of the model, and its block size if there is a published model with it.
    """
    size = "32B" if facts["parameters"] >= LARGE else "3B"
    rows = [row for row in published() if row.size == size]
    blocks = {row.block_size for row in rows} - {1}
    nearest = min(blocks, key=lambda block: (abs(block - facts["block_size"]), block))
    return next(row for row in rows if row.block_size == 1), [row for row in rows if row.block_size == nearest]


def _at(rows: Sequence[Published], threshold: float | None) -> Published:
    """The row of a model with this threshold; without one, only what is published for no particular threshold."""
    exact = next((row for row in rows if row.threshold == threshold), None)
    return exact or dataclasses.replace(rows[0], threshold=None, scores={}, tokens_per_pass={})


def _published_score(row: Published, key: str) -> float | None:
    return row.scores.get(key, row.choice.get(key))


def write_paper_page(results: Sequence[Result], reasons: Mapping[str, str], out: Path) -> None:
    """Writes the page.

    Args:
        results: result files of one model.
        reasons: why tasks were left out, by their key.
    """
    facts, settings, model = (results[0][name] for name in ("facts", "settings", "model"))
    page = Page(f"{Path(model).name or model} on the tasks of {SOURCE}")
    section = page.section("facts", "Model and settings")
    limit = "all prompts" if settings["limit"] is None else f"the first {settings['limit']} prompts of each task"
    names = ("block_size", "parameters", "dtype", "device", "threads", "date", "torch", "transformers", "lm_eval")
    chosen = {"model": model, **{name: facts.get(name, "–") for name in names}}
    section.facts({**chosen, "prompts": limit, "tokens of an answer, at most": settings["max_new_tokens"]})
    section.details("Commands", "\n".join(dict.fromkeys(r["facts"]["command"] for r in results)))
    plain, rows = comparable(facts)
    by_rule: dict[str, dict[str, Result]] = {}
    for result in results:
        rule = result["rule"]
        by_rule.setdefault(name_of((rule["alg"], rule["n"], rule["threshold"])), {})[result["task"]] = result
    for rule_name, measured in by_rule.items():
        threshold = next(iter(measured.values()))["rule"]["threshold"]
        _add_rule(page, rule_name, measured, plain, _at(rows, threshold))
    _add_signatures(page, by_rule)
    if reasons:
        section = page.section("missing", "Not run")
        tasks = paper_tasks()
        section.table(["", "why"], [(tasks[key].name, why) for key, why in reasons.items()], align="left")
    page.section("differences", "Before you compare").text(DIFFERENCES)
    _add_published(page)
    page.write(out)


def _add_rule(page: Page, rule: str, measured: Mapping[str, Result], plain: Published, row: Published) -> None:
    section = page.section("rule" + "".join(c for c in rule if c.isalnum()), f"Decoded with {rule}")
    known = "" if row.scores else ", of which no scores with this threshold are published, except for choice tasks"
    section.text(f"Scores in percent with 95 % intervals; published: {plain.model}, and {row.model}{known}.")
    section.figure(_figure(measured, plain, row), "scores measured here and published")
    lines = []
    for key, task in paper_tasks().items():
        if key in measured:
            result = measured[key]
            part = "" if len(result["correct"]) == task.split else f" of {task.split}"
            theirs, tokens = _published_score(row, key), row.tokens_per_pass.get(key)
            lines.append(
                (
                    task.name,
                    task.shots,
                    f"{len(result['correct'])}{part}",
                    _shown(_published_score(plain, key)),
                    _shown(theirs),
                    percent(score(result)),
                    "–" if tokens is None else f"{tokens:.2f}",
                    number(speed(result)),
                )
            )
    head = ["", "examples", "prompts", "autoregressive (published)", "SDLM (published)", "here"]
    section.table([*head, "tokens per pass (published)", "tokens per pass"], lines)
    if any(measured[key]["settings"]["limit"] is not None for key in measured):
        section.note("Only the first prompts of each task were asked: the intervals do not cover that choice.")


def _shown(percents: float | None) -> str:
    return "–" if percents is None else f"{percents:.1f}%"


def _figure(measured: Mapping[str, Result], plain: Published, row: Published) -> Figure:
    tasks = [task for key, task in paper_tasks().items() if key in measured]
    figure, (axis,) = figure_of(7.2, 1.1 + 0.32 * len(tasks))
    here = [score(measured[task.key]) for task in tasks]
    places = range(len(tasks))
    axis.errorbar(
        [100 * x.value for x in here],
        places,
        xerr=[[100 * x.bars[side] for x in here] for side in (0, 1)],
        color=SERIES[0],
        linestyle="",
        marker="o",
        markersize=5,
        label="here",
    )
    for source, marker, color in ((row, "D", SERIES[1]), (plain, "|", SOFT)):
        points = [
            (value, y) for y, task in enumerate(tasks) if (value := _published_score(source, task.key)) is not None
        ]
        if points:
            axis.plot(
                *zip(*points, strict=True), marker, color=color, markersize=6, label=f"{source.model} (published)"
            )
    axis.set_yticks(places, [task.name for task in tasks])
    axis.set_ylim(len(tasks) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xlabel("score, %", color=INK)
    legend(figure, loc="outside upper left", ncols=3)
    return figure


def _add_signatures(page: Page, by_rule: Mapping[str, Mapping[str, Result]]) -> None:
    section = page.section("signatures", "Failure signatures")
    section.text(
        f"Repetition: runs of {signatures.GRAM} tokens that occurred earlier in the same answer. No end: answers "
        f"stopped by the token limit. Stall: answers of at least {signatures.STALL_TOKENS} tokens "
        f"with fewer than {signatures.STALL_RATE} tokens per pass. These tasks have no expected answers token by "
        "token: compare thresholds with each other. Answers that get shorter as the threshold falls may end early."
    )
    lines = []
    for key, task in paper_tasks().items():
        for rule, measured in by_rule.items():
            if key in measured:
                result = measured[key]
                s = signatures.measure(result, several=result["rule"]["n"] > 1)
                shares = ("–" if x is None else f"{x:.1%}" for x in (s.repetition, s.cut, s.stalled))
                mean = sum(result["tokens"]) / len(result["tokens"])
                lines.append((task.name, rule, f"{mean:.0f}", *shares))
    section.table(["", "decoding", "tokens per answer", "repetition", "no end", "stall"], lines)


def _add_published(page: Page) -> None:
    section = page.section("published", f"All published figures ({SOURCE})")
    section.text("Scores in percent, tokens per pass in brackets.")
    tasks, lines = paper_tasks(), []
    for row in published():
        cells = []
        for key in tasks:
            tokens = row.tokens_per_pass.get(key)
            value = row.scores.get(key)
            cells.append("–" if value is None else f"{value:.1f}" + (f" ({tokens:.2f})" if tokens else ""))
        if any(cell != "–" for cell in cells):
            name = row.model if row.threshold is None else f"{row.model}, τ = {row.threshold:g}"
            lines.append((name, *cells[: len(row.scores)]))
    first = len(published()[0].scores)
    section.table(["", *(task.name for task in list(tasks.values())[:first])], lines)
    choice = {row.model: row.choice for row in published() if row.choice}
    names = [task.name for task in list(tasks.values())[first:]]
    section.table(["", *names], [(model, *(f"{v:.1f}" for v in values.values())) for model, values in choice.items()])
