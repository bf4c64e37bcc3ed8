"""Page: one HTML page with figures and tables for the measurements of one or several models.

Reads the files of sweep, calibration, speed, context, perplexity and serving from each folder, as far as they exist.
Folders with the same --label are seeds of one model: their values are averaged, and intervals cover the seeds too.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, DataError, run_cli
from sdlm_megatron.evaluation import figures, figures_slots, intervals, result_files
from sdlm_megatron.evaluation.intervals import Estimate
from sdlm_megatron.evaluation.result_files import KINDS, Result, Results, name_of, points, pooled
from sdlm_megatron.evaluation.signatures import GRAM, STALL_RATE, STALL_TOKENS
from sdlm_megatron.report.page_kit import Page, PageSection

TAU = 0.98  # threshold of the precision and recall in the table of slots
CLIENT_BUSY = 0.7  # share of a core from which on the client that sends requests may be the bottleneck
# Facts that have a column in the first table.
FACTS = ("block_size", "parameters", "dtype", "device", "threads", "date", "torch", "transformers")


# --- cells


def percent(share: Estimate) -> str:
    """A share and its interval, if there is one: "95.0% (93.1 to 96.4)"."""
    if share.low == share.high:
        return f"{share.value:.1%}"
    return f"{share.value:.1%} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def number(value: Estimate, digits: int = 2) -> str:
    """A value and its interval, if there is one: "3.08 (3.01 to 3.15)"."""
    if value.low == value.high:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def defined(value: float, form: str = ".1%") -> str:
    """A number, or "–" where it is nan."""
    return "–" if math.isnan(value) else format(value, form)


def change(gap: Estimate) -> str:
    """A difference of shares in percentage points, with its interval: "-1.2 (-3.0 to +0.6)"."""
    return f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"


# --- input


def group(folders: Sequence[Path], labels: Sequence[str]) -> dict[str, dict[str, list[Result]]]:
    """Result files by kind and label; folders of one label are its seeds.

    Raises:
        DataError: a folder has no results, or the seeds of a label differ in their number of prompts.
    """
    results: dict[str, dict[str, list[Result]]] = {}
    for folder, label in zip(folders, labels, strict=True):
        for kind, result in result_files.read_results(folder).items():
            seeds = results.setdefault(kind, {}).setdefault(label, [])
            if seeds and kind in ("sweep", "context") and _prompts(seeds[0]) != _prompts(result):
                raise DataError(
                    f"{label!r} has {_prompts(result)} prompts here and {_prompts(seeds[0])} in another folder",
                    str(folder / f"{kind}.json"),
                    "measure all seeds of a model on the same prompts, or use another label for this folder",
                )
            seeds.append(result)
    return results


def _prompts(result: Result) -> int | None:
    """Number of prompts behind each row of a sweep or context file; None without rows."""
    return len(result["rows"][0]["exact"]) if result["rows"] else None


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with the parent's name where two are equal."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        for folder, name in zip(folders, names, strict=True)
    ]


# --- sections


def _add_facts(page: Page, results: dict[str, dict[str, list[Result]]]) -> None:
    rows: dict[tuple[str, ...], list[str]] = {}
    commands: list[str] = []
    for kind, labels in results.items():
        for label, seeds in labels.items():
            for result in seeds:
                facts = result["facts"]
                kinds = rows.setdefault((label, *(str(facts.get(name, "–")) for name in FACTS)), [])
                kinds += [] if kind in kinds else [kind]
                commands.append(facts.get("command", "–"))
    section = page.section("facts", "Models and measurements")
    section.text(
        "Intervals are at the 95 % level. They cover the choice of prompts (Wilson's interval for shares, a bootstrap "
        "for tokens per pass). With several seeds they also cover the seeds (Student's interval); each end is the "
        "wider of the two. The interval of a single seed does not say how other seeds would do."
    )
    section.table(["", "D", *FACTS[1:], "measured"], [(*key, ", ".join(kinds)) for key, kinds in rows.items()])
    section.details("Commands", "\n".join(dict.fromkeys(commands)))


def _add_sweep(page: Page, sweeps: Results) -> None:
    section = page.section("quality", "Quality against tokens per pass")
    section.text(
        "In each pass, decoding keeps the longest prefix of proposed tokens whose confidence exceeds the threshold. "
        "An answer is exact if all of it equals the expected text. Up and to the right is better; the star is "
        "next-token decoding, one token per pass."
    )
    section.figure(figures.quality_figure(sweeps), "exact answers against tokens per pass")
    section.table(
        ["", "seeds", "decoding", "exact", "tokens per pass"],
        [
            (label, len(seeds), p.name, percent(p.exact), number(p.speed))
            for label, seeds in sweeps.items()
            for p in points(seeds)
        ],
    )
    if any(row["threshold"] is not None for seeds in sweeps.values() for row in seeds[0]["rows"]):
        section = page.section("threshold", "Effect of the threshold")
        section.text("A lower threshold keeps more tokens per pass and costs quality.")
        section.figure(figures.threshold_figure(sweeps), "tokens per pass and exact answers by threshold")
    _add_differences(page, sweeps)
    if any(result_files.signatures_of(seeds) for seeds in sweeps.values()):
        _signatures_table(page.section("signatures", "Failure signatures"), sweeps, "rows")


def _signatures_table(section: PageSection, results: Results, rows_name: str, **fields: str) -> None:
    """Definitions and a table of the signatures of all rows, unless there are none; a note for each beyond its limit.

    Args:
        rows_name: of the rows in a result file.
        fields: fields that tell rows of one rule apart, and the heads of their columns.
    """
    rows, beyond = [], []
    for label, seeds in results.items():
        for key, by_length in result_files.signatures_of(seeds, rows_name, *fields):
            place = [f"{name} {value}" for name, value in zip(fields.values(), key[1:], strict=True)]
            where = ", ".join([label, key[0], *place])
            beyond += [f"{where}: {warning}." for warning in by_length["all"].warnings()]
            for length, s in by_length.items():
                shares = (s.repetition, s.expected_repetition, s.early, s.cut, s.stalled)
                rows.append((label, *key, length, s.answers, *("–" if x is None else f"{x:.1%}" for x in shares)))
    if rows:
        section.text(
            f"Repetition: runs of {GRAM} tokens that occurred earlier in the same answer. Early end: answers that end "
            "before half of the expected length. No end: answers cut at the length of the longest expected one. "
            f"Stall: answers of at least {STALL_TOKENS} tokens with fewer than {STALL_RATE} tokens per pass."
        )
        names = ["repetition", "of the expected", "early end", "no end", "stall"]
        section.table(["", "decoding", *fields.values(), "expected tokens", "answers", *names], rows)
        for text in beyond:
            section.note(text)


def _add_differences(page: Page, sweeps: Results) -> None:
    """A row per decoding rule of every other label: its exact answers minus those of the first label at n = 1."""
    (first, base), *others = sweeps.items()
    rows, other_prompts = [], []
    reference = result_files.exact_of(base, "ar", None)
    for label, seeds in others:
        prompts = [[result_files.prompts_of(sweep) for sweep in pair] for pair in zip(base, seeds, strict=False)]
        if any(None in pair or len(set(pair)) > 1 for pair in prompts):
            other_prompts.append(label)
            continue
        for alg, threshold in dict.fromkeys((p.alg, p.threshold) for p in points(seeds)):
            exact = result_files.exact_of(seeds, alg, threshold)
            if reference is None or exact is None:
                continue
            both = min(len(reference), len(exact))
            gap = intervals.difference(exact[:both], reference[:both])
            only, only_first, p = intervals.mcnemar(exact[0], reference[0])
            name = name_of((alg, 1, threshold)).split(", n")[0]
            rows.append((label, name, change(gap), only, only_first, f"{p:.2g}"))
    if not rows and not other_prompts:
        return
    section = page.section("differences", f"Differences from {first}")
    for label in other_prompts:
        section.note(f"{label}: no difference is shown, because the prompts differ or its files do not identify them.")
    if rows:
        section.text(
            f"Share of exact answers minus that of {first} with n = 1, on the same prompts, seed by seed. The last "
            "columns are for the first seed: prompts that only one of the two answers correctly, and McNemar's exact p."
        )
        section.table(["", "decoding", "difference in points", "only this one", f"only {first}", "p"], rows)


def _add_calibration(page: Page, calibrations: Results) -> None:
    section = page.section("reliability", "Is confidence calibrated?")
    section.text(
        "A window is placed at every position of the expected answers, and each slot's most likely token is compared "
        "with the answer's. On the dotted line, confidence equals accuracy; below it, the slot is overconfident. The "
        "strip above a panel counts the predictions. ECE is the mean distance from the line over 15 bins of equal "
        "width."
    )
    for score, name in (("prob", "Probability"), ("entropy", "Entropy")):
        section.subheading(name)
        figure = figures_slots.reliability_figure(calibrations, score)
        section.figure(figure, f"accuracy against {name.lower()}, slot by slot")
    section.table(*_slots_table(calibrations))

    section = page.section("precision", "Precision and recall of a threshold")
    section.text(
        "If only predictions above a threshold are kept: precision is the share of kept predictions that are correct, "
        "recall the share of correct predictions that are kept. Dots: probability above 0.9 and 0.98."
    )
    section.figure(figures_slots.precision_recall_figure(calibrations), "precision and recall by slot")

    section = page.section("acceptance", "Acceptance by slot")
    section.text(
        "Solid lines: how often decoding keeps a slot. Dashed: the same, of the positions at which all slots before it "
        "are kept. Dotted: the slot and all before it are correct, which is what a perfect confidence would keep."
    )
    section.figure(figures_slots.acceptance_figure(calibrations), "how often each slot is kept")
    rows: list[tuple[object, ...]] = []
    for label, seeds in calibrations.items():
        slots = pooled(seeds)
        columns = [intervals.acceptance([slot["prob"] for slot in slots], tau) for tau in figures_slots.KEPT_AT]
        rows += [
            (label, j + 1, *(f"{kept[j]:.1%} ({defined(own[j])})" for kept, own in columns)) for j in range(len(slots))
        ]
    section.table(["", "slot", *(f"kept at {tau:g} (if all before are)" for tau in figures_slots.KEPT_AT)], rows)


def _slots_table(calibrations: Results) -> tuple[list[str], list[tuple[Any, ...]]]:
    rows: list[tuple[Any, ...]] = []
    for label, seeds in calibrations.items():
        for j, slot in enumerate(pooled(seeds)):
            correct = slot["right"]
            precision, recall = intervals.kept_at(slot["prob"], correct, TAU)
            scores = [
                defined(value, ".3f")
                for confidence in (slot["prob"], slot["entropy"])
                for value in (
                    intervals.bins_of(confidence, correct).ece,
                    intervals.brier(confidence, correct),
                    intervals.average_precision(confidence, correct),
                )
            ]
            shares = (f"{correct.mean():.1%}", *scores, defined(precision), defined(recall))
            rows.append((label, j + 1, len(correct), *shares))
    scores = [f"{name}, {score}" for score in ("prob", "entropy") for name in ("ECE", "Brier", "AP")]
    return ["", "slot", "positions", "accuracy", *scores, f"precision at {TAU:g}", f"recall at {TAU:g}"], rows


def _add_speed(page: Page, speeds: Results) -> None:
    timed = [(label, t) for label, seeds in speeds.items() for t in result_files.timings(seeds)]
    if timed:
        section = page.section("wall", "Quality against wall time")
        section.text("Whole answers on this machine, from the prompt to the last token.")
        section.figure(figures.wall_figure(speeds), "exact answers against tokens per second")
        section.table(
            ["", "batch", "decoding", "prompts", "exact", "tokens/s", "seconds per prompt"],
            [
                (label, t.batch, t.name, t.prompts, f"{t.exact:.1%}", number(t.rate, 1), number(t.seconds, 3))
                for label, t in timed
            ],
        )
        _signatures_table(section, speeds, "decodes", batch="batch")
    if any(seeds[0].get("break_even") for seeds in speeds.values()):
        section = page.section("overhead", "Cost of a window")
        section.text(
            "The cost of a pass with a window, in causal steps (passes that produce one token each). A pass is a gain "
            "if it keeps more tokens than that."
        )
        section.figure(figures.overhead_figure(speeds), "cost of a window pass in causal steps")
        section.table(
            ["", "batch", "tokens before", "pass", "n", "causal steps (quartiles)"],
            [
                (label, r["batch"], r["context"], r["what"], r["n"], number(Estimate(r["tokens"], r["low"], r["high"])))
                for label, seeds in speeds.items()
                for r in seeds[0].get("break_even", [])
            ],
        )


def _add_context(page: Page, contexts: Results) -> None:
    section = page.section("context", "Longer contexts")
    section.text("The same prompts after an increasing number of solved examples.")
    section.figure(figures.context_figure(contexts), "quality and speed by context length")
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
        for row in result_files.context_rows(seeds)
    ]
    section.table(["", "examples", "tokens before", "decoding", "exact", "tokens per pass", "tokens/s"], rows)
    _signatures_table(section, contexts, "rows", shots="examples")


def _add_perplexity(page: Page, results: Results) -> None:
    section = page.section("perplexity", "Unrelated text")
    section.text("Next-token perplexity of text that has nothing to do with the training data; lower is better.")
    texts = result_files.perplexities(results)
    if not texts:
        section.note("No text was measured with all of the models: name the same files with --text.")
        return
    section.figure(figures.models_figure(texts, logarithmic=True), "perplexity of unrelated texts")
    rows = [(name, *(number(row[label]) for label in results)) for name, row in texts.items()]
    section.table(["", *results], rows)


def _add_serving(page: Page, servings: Results) -> None:
    section = page.section("serving", "Serving with vLLM")
    section.text(
        "vLLM with the plugin sdlm-vllm beside vLLM without it (plain serving: the same folder, one token per pass), "
        "with the same prompts. Below the dotted line SDLM serves fewer tokens per second. Times of a request are "
        "medians, with the 90th percentile. Where a model has several seeds, the first is shown."
    )
    section.figure(figures.serving_figure(servings), "tokens per second by requests at a time")
    rates = [(label, rate) for label, seeds in servings.items() for rate in result_files.served_rates(seeds[0])]
    head = ["", "at a time", "decoding", "tokens/s", "of plain", "tokens per pass", "first text, s", "answer, s"]
    section.table([*head, "tokens", "exact"], [(label, rate.at, *rate.cells) for label, rate in rates])
    for label, seeds in servings.items():
        for sentence in result_files.served_comparison(result_files.served_rates(seeds[0])):
            section.note(f"{label}: {sentence}")
        for name, why in seeds[0]["refused"].items():
            section.note(f"{label}: {name} was not measured: {why}.")
        if any(row["client_cpu"] > CLIENT_BUSY for row in seeds[0]["rows"]):
            section.note(f"{label}: the client of this measurement was busy; the servers may be faster than shown.")


SECTIONS: dict[str, Callable[[Page, Results], None]] = {
    "sweep": _add_sweep,
    "calibration": _add_calibration,
    "speed": _add_speed,
    "context": _add_context,
    "perplexity": _add_perplexity,
    "serving": _add_serving,
}


# --- the command


def write_page(folders: Sequence[Path], labels: Sequence[str], out: Path, title: str) -> None:
    """Writes the page; raises DataError as `group` does."""
    results = group(folders, labels)
    page = Page(title)
    _add_facts(page, results)
    for kind in KINDS:
        if kind in results:
            print(f"{kind}: {', '.join(results[kind])}", flush=True)
            SECTIONS[kind](page, results[kind])
    page.write(out)


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
    parser.add_argument("--label", nargs="+", metavar="TEXT", help="a label per folder; default: the folders' names")
    parser.add_argument("--title", default="Evaluation", metavar="TEXT", help="heading of the page")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    labels = args.label or labels_of(args.folders)
    if len(labels) != len(args.folders):
        raise ConfigError(
            f"{len(labels)} labels for {len(args.folders)} folders", "--label", "pass one per folder, in their order"
        )
    write_page(args.folders, labels, args.out, args.title)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
