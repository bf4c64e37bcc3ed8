"""One page with a figure and a table for everything that was measured of a model, or of several side by side.

Reads sweep.json, calibration.json, speed.json, context.json and perplexity.json of each folder, those that are there.
Folders of one --label are seeds of one model: their figures are averaged, and intervals cover the seeds too.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, DataError, run_cli
from sdlm_megatron.evaluation.figures import models_figure, quality_figure, threshold_figure, wall_figure
from sdlm_megatron.evaluation.figures_cost import context_figure, context_rows, overhead_figure, perplexities
from sdlm_megatron.evaluation.figures_slots import (
    KEPT_AT,
    acceptance_figure,
    precision_recall_figure,
    reliability_figure,
)
from sdlm_megatron.evaluation.intervals import (
    Estimate,
    acceptance,
    average_precision,
    bins_of,
    brier,
    difference,
    kept_at,
    mcnemar,
)
from sdlm_megatron.evaluation.results import (
    KINDS,
    Result,
    Results,
    exact_of,
    name_of,
    points,
    pooled,
    read_results,
    timings,
)
from sdlm_megatron.files import write_text
from sdlm_megatron.report.page_kit import image, page, section, table

TAU = 0.98
"""Of the precision and recall in the table of slots."""


def percent(one: Estimate) -> str:
    """A share with its interval, if it has one."""
    if one.low == one.high:
        return f"{one.value:.1%}"
    return f"{one.value:.1%} ({100 * one.low:.1f} to {100 * one.high:.1f})"


def number(one: Estimate, digits: int = 2) -> str:
    """A figure with its interval, if it has one."""
    if one.low == one.high:
        return f"{one.value:.{digits}f}"
    return f"{one.value:.{digits}f} ({one.low:.{digits}f} to {one.high:.{digits}f})"


def change(gap: Estimate) -> str:
    """A difference of shares in percentage points, with its interval."""
    return f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"


def group(folders: Sequence[Path], labels: Sequence[str]) -> dict[str, dict[str, list[Result]]]:
    """Result files by kind and label; folders of one label are its seeds.

    Raises:
        DataError: a folder without results; seeds of a label that were not measured on as many prompts.
    """
    found: dict[str, dict[str, list[Result]]] = {}
    for folder, label in zip(folders, labels, strict=True):
        for kind, result in read_results(folder).items():
            seeds = found.setdefault(kind, {}).setdefault(label, [])
            if seeds and _prompts(seeds[0]) != _prompts(result):
                raise DataError(
                    f"{label!r} has {_prompts(result)} prompts here and {_prompts(seeds[0])} in another folder",
                    str(folder / f"{kind}.json"),
                    "measure all seeds of a model on the same prompts, or give the folders other labels",
                )
            seeds.append(result)
    return found


def _prompts(result: Result) -> int | None:
    """How many prompts the rows of a sweep or context stand for."""
    rows = result.get("rows")
    return len(rows[0]["exact"]) if rows else None


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with the parent's where two are the same."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        for folder, name in zip(folders, names, strict=True)
    ]


def write_page(folders: Sequence[Path], labels: Sequence[str], out: Path, title: str) -> None:
    """Writes the page; DataError as `group`."""
    found = group(folders, labels)
    makers: dict[str, Callable[[Results], Iterator[str]]] = {
        "sweep": _sweep_sections,
        "calibration": _calibration_sections,
        "speed": _speed_sections,
        "context": _context_sections,
        "perplexity": _perplexity_sections,
    }
    sections = [_facts_section(found)]
    for kind in KINDS:
        if kind in found:
            print(f"{kind}: {', '.join(found[kind])}", flush=True)
            sections += makers[kind](found[kind])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(title, sections))


# ---------------------------------------------------------------------------------------------- sections
FACTS = ("block_size", "parameters", "dtype", "device", "threads", "date", "torch", "transformers")
"""What the table of facts has a column for."""


def _facts_section(found: dict[str, dict[str, list[Result]]]) -> str:
    rows: dict[tuple[str, ...], list[str]] = {}
    commands: list[str] = []
    for kind, results in found.items():
        for label, seeds in results.items():
            for result in seeds:
                facts = result["facts"]
                kinds = rows.setdefault((label, *(str(facts.get(name, "–")) for name in FACTS)), [])
                kinds += [] if kind in kinds else [kind]
                commands.append(facts.get("command", "–"))
    text = (
        "<p>Intervals are at 95 %. They cover the prompts (Wilson's for shares, a bootstrap for tokens a pass), and of "
        "several seeds also these (Student's): the wider at either end. One seed says nothing about other seeds.</p>"
    )
    body = table(("", "D", *FACTS[1:], "measured"), [(*key, ", ".join(kinds)) for key, kinds in rows.items()])
    listed = escape("\n".join(dict.fromkeys(commands)))
    return section(
        "facts",
        "What was measured",
        f"{text}{body}<details><summary>Commands</summary><pre>{listed}</pre></details>",
    )


def _sweep_sections(sweeps: Results) -> Iterator[str]:
    text = (
        "<p>Decoding keeps, in each pass, the longest run of tokens whose confidence exceeds the threshold. An answer "
        "is exact when all of it equals the expected text. Up and to the right is better; the star is one token a "
        "pass.</p>"
    )
    rows = [
        (label, len(seeds), p.name, percent(p.exact), number(p.speed))
        for label, seeds in sweeps.items()
        for p in points(seeds)
    ]
    heads = ("", "seeds", "decoding", "exact", "tokens a pass")
    body = image(quality_figure(sweeps), "exact answers against tokens a pass") + table(heads, rows)
    yield section("quality", "Quality against tokens a pass", text + body)
    if any(row["threshold"] is not None for seeds in sweeps.values() for row in seeds[0]["rows"]):
        text = "<p>The threshold trades one for the other.</p>"
        body = image(threshold_figure(sweeps), "tokens a pass and exact answers by threshold")
        yield section("threshold", "By threshold", text + body)
    if len(sweeps) > 1:
        yield from _difference_section(sweeps)


def _difference_section(sweeps: Results) -> Iterator[str]:
    """Every label against the first, on the same prompts, setting by setting."""
    (first, base), *others = sweeps.items()
    rows = []
    plain = exact_of(base, "ar", None)
    for label, seeds in others:
        for alg, threshold in dict.fromkeys((p.alg, p.threshold) for p in points(seeds)):
            other = exact_of(seeds, alg, threshold)
            if plain is None or other is None or len(plain[0]) != len(other[0]):
                continue
            both = min(len(plain), len(other))
            gap = difference(other[:both], plain[:both])
            only, only_first, p = mcnemar(other[0], plain[0])
            rows.append(
                (label, name_of((alg, 1, threshold)).split(", n")[0], change(gap), only, only_first, f"{p:.2g}")
            )
    if rows:
        text = (
            f"<p>Exact answers less those of {first} at one token a pass, on the same prompts, seed by seed. The last "
            "columns are of the first seed: prompts that only one of the two answers right, and McNemar's exact p.</p>"
        )
        heads = ("", "decoding", "difference in points", "only this one", f"only {first}", "p")
        yield section("differences", f"Differences to {first}", text + table(heads, rows))


def _calibration_sections(calibrations: Results) -> Iterator[str]:
    text = (
        "<p>Along the expected answers, a window at every place: is the token a slot is sure of the right one? On the "
        "dotted line a confidence is the share of right tokens; below it the slot is too sure. Above each panel: how "
        "many predictions. ECE is the mean distance from the line over 15 bins of equal width.</p>"
    )
    body = "".join(
        f"<h3>{name}</h3>" + image(reliability_figure(calibrations, score), f"share right by {name}, slot by slot")
        for score, name in (("prob", "Probability"), ("entropy", "Entropy"))
    )
    yield section("reliability", "Is confidence correctness?", text + body + _slots_table(calibrations))
    text = (
        "<p>Keeping only predictions above a threshold: how many of the kept are right, and how many of the right are "
        "kept. Dots: probability above .9 and .98.</p>"
    )
    body = image(precision_recall_figure(calibrations), "precision and recall by slot")
    yield section("precision", "What a threshold keeps", text + body)
    text = (
        "<p>Full lines: how often decoding keeps a slot. Dashed: of the places where all slots before it are kept. "
        "Dotted: where it and all before it are right, what a perfect confidence would keep.</p>"
    )
    rows = []
    for label, seeds in calibrations.items():
        slots = pooled(seeds)
        columns = [acceptance([one["prob"] for one in slots], tau) for tau in KEPT_AT]
        rows += [
            (label, j + 1, *(f"{kept[j]:.1%} ({given[j]:.1%})" for kept, given in columns)) for j in range(len(slots))
        ]
    heads = ("", "slot", *(f"kept at {tau:g} (if all before are)" for tau in KEPT_AT))
    body = image(acceptance_figure(calibrations), "how often each slot is kept") + table(heads, rows)
    yield section("acceptance", "Acceptance by slot", text + body)


def _slots_table(calibrations: Results) -> str:
    rows: list[tuple[Any, ...]] = []
    for label, seeds in calibrations.items():
        for j, slot in enumerate(pooled(seeds)):
            right = slot["right"]
            sharp, recall, _ = kept_at(slot["prob"], right, TAU)
            scores = [
                f"{value:.3f}"
                for score in ("prob", "entropy")
                for value in (
                    bins_of(slot[score], right).ece,
                    brier(slot[score], right),
                    average_precision(slot[score], right),
                )
            ]
            rows.append((label, j + 1, len(right), f"{right.mean():.1%}", *scores, f"{sharp:.1%}", f"{recall:.1%}"))
    kinds = [f"{name}, {score}" for score in ("prob", "entropy") for name in ("ECE", "Brier", "AP")]
    return table(("", "slot", "places", "right", *kinds, f"precision at {TAU:g}", f"recall at {TAU:g}"), rows)


def _speed_sections(speeds: Results) -> Iterator[str]:
    timed = [(label, t) for label, seeds in speeds.items() for t in timings(seeds)]
    if timed:
        text = (
            "<p>Whole answers on this machine, timed from the prompt to the last token, several at a time or one.</p>"
        )
        rows = [
            (label, t.batch, t.name, t.prompts, f"{t.exact:.1%}", number(t.rate, 1), number(t.seconds, 3))
            for label, t in timed
        ]
        heads = ("", "batch", "decoding", "prompts", "exact", "tokens/s", "seconds a prompt")
        body = image(wall_figure(speeds), "exact answers against tokens a second") + table(heads, rows)
        yield section("wall", "Quality against wall time", text + body)
    if any(seeds[0].get("break_even") for seeds in speeds.values()):
        text = (
            "<p>What a pass with a window costs, in steps that make one token each. It is a gain when it keeps more "
            "tokens than that.</p>"
        )
        costs = [
            (label, r["batch"], r["context"], r["what"], r["n"], number(Estimate(r["tokens"], r["low"], r["high"])))
            for label, seeds in speeds.items()
            for r in seeds[0].get("break_even", [])
        ]
        names = ("", "batch", "tokens before", "pass", "n", "causal steps (quartiles)")
        body = image(overhead_figure(speeds), "cost of a window pass in causal steps") + table(names, costs)
        yield section("overhead", "What a window costs", text + body)


def _context_sections(contexts: Results) -> Iterator[str]:
    text = "<p>The same prompts behind more and more solved examples.</p>"
    rows = [
        (
            label,
            row["shots"],
            f"{row['context']:.0f}",
            name_of((row["alg"], row["n"], row["threshold"])),
            percent(row["exact"]),
            number(row["speed"]),
            number(row["rate"], 1),
        )
        for label, seeds in contexts.items()
        for row in context_rows(seeds)
    ]
    heads = ("", "examples", "tokens before", "decoding", "exact", "tokens a pass", "tokens/s")
    body = image(context_figure(contexts), "quality and speed by context length") + table(heads, rows)
    yield section("context", "With longer contexts", text + body)


def _perplexity_sections(results: Results) -> Iterator[str]:
    text = "<p>Plain next-token perplexity of text that has nothing to do with the training.</p>"
    texts = perplexities(results)
    body = image(models_figure(texts, logarithmic=True), "perplexity of unrelated texts")
    rows = [(name, *(number(row[label]) for label in results)) for name, row in texts.items()]
    yield section("perplexity", "Unrelated text", text + body + table(("", *results), rows))


# ------------------------------------------------------------------------------------------- the command
def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "sdlm evaluate page",
        __doc__,
        example="sdlm evaluate page results --out results/index.html\n"
        "sdlm evaluate page ar-0 d4-0 d4-1 --label AR D=4 D=4 --out index.html",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of result files")
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="the file to write")
    parser.add_argument("--label", nargs="+", metavar="TEXT", help="one a folder; default: the folders' names")
    parser.add_argument("--title", default="Evaluation", metavar="TEXT", help="heading; default: Evaluation")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    labels = args.label or labels_of(args.folders)
    if len(labels) != len(args.folders):
        raise ConfigError(
            f"{len(labels)} labels for {len(args.folders)} folders", "--label", "give one a folder, in their order"
        )
    write_page(args.folders, labels, args.out, args.title)
    print(args.out)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
