"""evaluation.json, the results of decoding an exported model: its format, its check, and the report sections about it.

    {"prompts": 128,
     "rows":     [{"name": "tau 0.98", "alg": "prob_conf", "n": 4, "threshold": 0.98,
                   "tokens_per_pass": 3.1, "exact": 0.98, "n_prompts": 128}, ...],
     "baseline": [{"name": "untouched model, n = 1", "alg": "greedy", "n": 1, "threshold": null, ...}],
     "sample":   {"prompt": "...", "answer_tokens": [{"text": "{", "pass": 1}, ...], "expected": "..."}}

`exact` is a share (0..1) of n_prompts, `pass` counts from 1, `threshold` is null for n = 1. `baseline` and `sample` are
optional (`sample` is {} for a model without blocks); a row may hold more fields, such as `warnings`, sentences that are
shown. The samples of samples.jsonl have the form of `sample`.
"""

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sdlm_megatron.errors import DataError
from sdlm_megatron.report.page_kit import Page, PageSection
from sdlm_megatron.report.plots import INK, SERIES, SOFT, Records, figure_of, legend

MAX_SAMPLED_STEPS = 5
"""Steps with samples that are shown; of more, this many at equal distances."""
_ROW: dict[str, Any] = {
    "name": str,
    "alg": str,
    "n": int,
    "threshold": (int, float, type(None)),
    "tokens_per_pass": (int, float),
    "exact": (int, float),
    "n_prompts": int,
}
_FIX = "write it as described in sdlm_megatron/report/evaluation_record.py"


def load_evaluation(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Reads and checks an evaluation from a file or an object.

    Raises:
        DataError: with the field that is wrong.
    """
    where = "evaluation"
    value: Any = source
    if isinstance(source, (str, Path)):
        where = str(source)
        try:
            value = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"the evaluation cannot be read: {error}", where, _FIX) from None
    if not isinstance(value, Mapping):
        raise DataError("the evaluation is not a JSON object", where, _FIX)
    record: dict[str, Any] = {
        "prompts": value.get("prompts"),
        "rows": value.get("rows"),
        "baseline": value.get("baseline") or [],
    }
    for part in ("rows", "baseline"):
        if not isinstance(record[part], list):
            raise DataError(f"{part} is not a list", f"{where}, {part}", _FIX)
        for n, row in enumerate(record[part]):
            _check_row(row, f"{where}, {part}[{n}]")
    if value.get("sample"):
        _check_sample(value["sample"], f"{where}, sample")
        record["sample"] = value["sample"]
    return record


def _check_row(row: Any, where: str) -> None:
    for key, kind in _ROW.items():
        if not isinstance(row, Mapping) or key not in row:
            raise DataError(f"the field {key} is missing", where, _FIX)
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise DataError(f"the field {key} is {row[key]!r}", where, _FIX)
    if not 0 <= row["exact"] <= 1:
        raise DataError(f"exact is a share between 0 and 1, not {row['exact']}", where, _FIX)


def _check_sample(sample: Any, where: str) -> None:
    tokens = sample.get("answer_tokens") if isinstance(sample, Mapping) else None
    if not isinstance(tokens, list) or not isinstance(sample.get("prompt"), str):
        raise DataError("a sample needs prompt and answer_tokens", where, _FIX)
    for n, token in enumerate(tokens):
        good = isinstance(token, Mapping) and isinstance(token.get("text"), str)
        if not good or not isinstance(token.get("pass"), int):
            raise DataError("a token needs text and pass", f"{where}, answer_tokens[{n}]", _FIX)


# --------------------------------------------------------------------------------------------------- report sections
def evaluation_sections(page: Page, record: Mapping[str, Any]) -> None:
    """Speed and exactness by threshold, and one answer."""
    rows, baseline = record["rows"], record["baseline"]
    if rows or baseline:
        section = page.section("decoding", "Speed and exactness")
        section.text(
            "In each pass, decoding accepts the longest prefix of tokens whose confidence exceeds the threshold. An "
            "answer is exact if it equals the expected text."
        )
        lines = [
            (
                row["name"],
                row["alg"],
                row["n"],
                "–" if row["threshold"] is None else f"{row['threshold']:g}",
                f"{row['tokens_per_pass']:.2f}",
                f"{row['exact']:.1%}",
                row["n_prompts"],
            )
            for row in [*rows, *baseline]
        ]
        section.table(("", "algorithm", "n", "τ", "tokens per pass", "exact", "prompts"), lines)
        for row in [*rows, *baseline]:
            for warning in row.get("warnings", ()):
                section.note(f"{row['name']}: {warning}.")
        section.figure(threshold_figure(rows, baseline), "tokens per pass and exact answers by threshold")
    if "sample" in record:
        _show_answer(page.section("sample", "One answer, pass by pass"), record["sample"])


def samples_section(page: Page, records: Records) -> None:
    """Answers during training: of the first prompt at some steps, of all prompts at the last."""
    if not records:
        return
    section = page.section("samples", "Answers during training")
    section.text("Prompts from the training data, answered with the weights of that step.")
    last = len(records) - 1
    for i in sorted({round(k * last / (MAX_SAMPLED_STEPS - 1)) for k in range(MAX_SAMPLED_STEPS)}):
        record = records[i]
        section.subheading(f"Step {record['step']}, {record['tokens_per_pass']:.2f} tokens per pass")
        for warning in record.get("warnings", ()):
            section.note(f"{warning}.")
        for sample in record["samples"] if i == last else record["samples"][:1]:
            _show_answer(section, sample)


def _show_answer(section: PageSection, sample: Mapping[str, Any]) -> None:
    tokens = sample["answer_tokens"]
    passes = [(n, [t["text"] for t in group]) for n, group in groupby(tokens, key=lambda token: token["pass"])]
    section.answer(sample["prompt"], passes)
    count, total = len({t["pass"] for t in tokens}), len(tokens)
    section.text(
        "Tokens in one box came from one forward pass, whose number is at its end. "
        f"{total} tokens in {count} passes: {total / max(count, 1):.2f} tokens per pass."
    )
    expected = sample.get("expected")
    if expected is None:
        return
    if "".join(t["text"] for t in tokens).strip() == expected.strip():
        section.text("The answer equals the expected text.")
    else:
        section.text("Expected text:")
        section.preformatted(expected)


def threshold_figure(rows: Records, baseline: Records) -> Figure:
    """Tokens per pass (above) and exact answers (below) against the threshold; one line per algorithm and width.

    Args:
        rows, baseline: entries of evaluation.json; those without a threshold (n = 1) become horizontal lines.
    """
    figure, (upper, lower) = figure_of(7.2, 5.2, 2, sharex=True)
    swept: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("threshold") is not None and row["n"] > 1:
            swept.setdefault((row["alg"], row["n"]), []).append(row)
    for index, ((alg, n), points) in enumerate(sorted(swept.items())):
        points = sorted(points, key=lambda r: r["threshold"])
        x = [r["threshold"] for r in points]
        style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "marker": "o", "markersize": 5, "linewidth": 1.6}
        upper.plot(x, [r["tokens_per_pass"] for r in points], label=f"{alg}, n = {n}", **style)
        lower.plot(x, [r["exact"] for r in points], **style)
        for r in points:
            _label_point(upper, r["threshold"], r["tokens_per_pass"], f"{r['tokens_per_pass']:.2f}", style["color"])
            _label_point(lower, r["threshold"], r["exact"], f"{r['exact']:.0%}", style["color"], r["exact"] > 0.5)
    levels = [*(r for r in rows if r.get("threshold") is None or r["n"] <= 1), *baseline]
    for index, row in enumerate(levels):
        dash: dict[str, Any] = {
            "color": (SOFT, "#b5527d", INK)[index % 3],
            "linewidth": 1.2,
            "linestyle": (0, (5, 2 + 2 * index)),
        }
        upper.axhline(row["tokens_per_pass"], label=row["name"], **dash)
        lower.axhline(row["exact"], **dash)
    upper.set_ylim(0, max([1.0, *(r["tokens_per_pass"] for r in [*rows, *baseline])]) * 1.18)
    lower.set_ylim(-0.05, 1.08)
    lower.set_yticks([0, 0.25, 0.5, 0.75, 1])
    lower.yaxis.set_major_formatter(PercentFormatter(1.0))
    upper.set_ylabel("tokens per pass", color=INK)
    lower.set_ylabel("exact answers", color=INK)
    lower.set_xlabel("threshold τ", color=INK)
    for axis in (upper, lower):
        axis.margins(x=0.06)
    legend(figure, loc="outside upper left", ncols=3)
    return figure


def _label_point(axis: Axes, x: float, y: float, text: str, color: str, below: bool = False) -> None:
    offset = (0, -14) if below else (0, 7)
    axis.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=8.5, color=color, ha="center")
