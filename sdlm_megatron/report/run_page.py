"""The report of a run: one HTML file with everything inside, readable from disk without a network."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import write_text
from sdlm_megatron.metrics.console import format_count, format_duration
from sdlm_megatron.metrics.sinks import METRICS_FILE, SAMPLES_FILE, read_metrics
from sdlm_megatron.ops.attempt import EVENTS_FILE, read_events
from sdlm_megatron.ops.goodput import goodput_of
from sdlm_megatron.report import plots
from sdlm_megatron.report.evaluation_record import load_evaluation
from sdlm_megatron.report.job_sections import attempts_of, job_sections, learning_sections, speed_sections
from sdlm_megatron.report.page_kit import image, page, section, table

PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "transformer-engine")
MOST_ROWS = 512
"""Rows looked at for the filling; of a larger dataset, this many at even distances."""
MOST_STEPS = 5
"""Of the steps with samples, this many at even distances are shown."""


class Rows(Protocol):
    """What the report reads of a packed dataset (`data.format.PackedDataset` fits)."""

    manifest: dict[str, Any]

    def rows(self, epoch: int) -> int:
        """Rows of an epoch."""

    def read(self, epoch: int, row: int) -> tuple[np.ndarray, RowLayout]:
        """Tokens and layout of a row."""


def write_report(
    run_dir: str | Path,
    dataset: Rows | str | Path | None = None,
    evaluation: Mapping[str, Any] | str | Path | None = None,
    out: str | Path | None = None,
    *,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
    causal_attn: bool = False,
) -> Path:
    """Writes the report of a run folder and returns its path.

    Args:
        run_dir: of a run in any state; holds metrics.jsonl, events.jsonl, config.yaml, evaluation.json or some of them.
        dataset: packed dataset or its folder; without it the mask and the filling are left out.
        evaluation: see report/evaluation_record.py; default RUN/evaluation.json where that exists.
        out: the file to write; default RUN/report.html.
        title: heading; default the folder's name.
        facts: more lines for the table of facts, shown first.
        causal_attn: how blocks were trained to see themselves.

    Raises:
        DataError: there is nothing of a run, or one of the files cannot be read.
    """
    run = Path(run_dir)
    if not any((run / name).exists() for name in (METRICS_FILE, EVENTS_FILE, "config.yaml")):
        raise DataError(f"no {METRICS_FILE} in the run folder", str(run), "name the folder of a run")
    records = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).exists() else []
    events, time_went = read_events(run), goodput_of(run)
    rows = _open_dataset(dataset) if dataset is not None else None
    if evaluation is None and (run / "evaluation.json").exists():
        evaluation = run / "evaluation.json"
    measured = load_evaluation(evaluation) if evaluation is not None else None
    heading = title or f"Run {run.resolve().name}"
    sections = [
        _facts_section(records, rows, {**(facts or {}), **attempts_of(events, time_went)}),
        _loss_section(records),
        *learning_sections(run, records),
        *speed_sections(records),
        *job_sections(run, events, time_went),
        *(_evaluation_sections(measured) if measured else []),
        _samples_section(read_metrics(run / SAMPLES_FILE)) if (run / SAMPLES_FILE).exists() else "",
        *(_dataset_sections(rows, causal_attn) if rows is not None else []),
        _config_section(run),
    ]
    target = Path(out) if out is not None else run / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page(heading, [s for s in sections if s]))
    return target


def _open_dataset(dataset: Rows | str | Path) -> Rows:
    if not isinstance(dataset, (str, Path)):
        return dataset
    from sdlm_megatron.data.format import PackedDataset

    return PackedDataset(dataset)


# ---------------------------------------------------------------------------------------------- sections
def _facts_section(records: Sequence[Mapping[str, Any]], rows: Rows | None, extra: Mapping[str, str]) -> str:
    facts = dict(extra)
    if records:
        last = records[-1]
        facts["steps"] = f"{last['step']} of {last.get('steps', last['step'])}"
        facts["last loss"] = _number(last.get("loss"))
        # a record stands for the steps since the one before it
        steps = [int(r["step"]) - int(before["step"]) for before, r in pairwise([{"step": 0}, *records])]
        seconds, useful, targets = (
            sum(n * (r.get(key) or 0) for n, r in zip(steps, records, strict=True))
            for key in ("step_time", "useful_tokens", "targets")
        )
        facts["time in steps"] = format_duration(seconds)
        if seconds > 0 and useful > 0:
            facts["tokens trained"] = (
                f"{format_count(useful)} without padding, {format_count(targets)} targets; "
                f"{format_count(useful / seconds)} tokens a second"
            )
        resumed = [f"step {r['resumed_from']}" for r in records if "resumed_from" in r]
        facts["resumed after"] = ", ".join(resumed) or "never stopped"
    if rows is not None:
        manifest = rows.manifest
        facts["dataset"] = (
            f"{rows.rows(0)} rows of {manifest['row_length']} tokens, block size {manifest['block_size']}, "
            f"repeat {manifest['repeat']}, {float(manifest.get('mean_documents_per_row', 0)):.1f} documents a row"
        )
    facts["software"] = ", ".join([f"Python {platform.python_version()}", *_versions()])
    facts["machine"] = f"{platform.system()} {platform.machine()}"
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f'<section id="facts"><h2>The run</h2><div class="wide"><table class="facts">{body}</table></div></section>'


def _loss_section(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return section("loss", "Losses", "<p>No step has been logged yet.</p>")
    text = (
        "<p>A block copies one known token and predicts what follows it: slot 1 the next token, slot 2 the one after, "
        "and so on. Later slots see less and cost more.</p>"
    )
    return section("loss", "Losses per slot", text + image(plots.loss_figure(records), "losses per slot by step"))


def _evaluation_sections(measured: Mapping[str, Any]) -> Iterable[str]:
    rows, baseline = measured["rows"], measured["baseline"]
    if rows or baseline:
        text = (
            "<p>Decoding keeps, in each pass, the longest run of tokens whose confidence exceeds the threshold. "
            "An answer is exact when every character is right.</p>"
        )
        figure = image(plots.threshold_figure(rows, baseline), "tokens a pass and exact answers by threshold")
        yield section("decoding", "Speed and exactness", text + _evaluation_table([*rows, *baseline]) + figure)
    if "sample" in measured:
        yield section("sample", "One answer, pass by pass", _sample(measured["sample"]))


def _evaluation_table(rows: Sequence[Mapping[str, Any]]) -> str:
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
        for row in rows
    ]
    return table(("", "algorithm", "n", "τ", "tokens a pass", "exact", "prompts"), lines)


def _samples_section(records: Sequence[Mapping[str, Any]]) -> str:
    """What the model answered while it was trained: of the first prompt at some steps, of all at the last."""
    if not records:
        return ""
    chosen = sorted({round(i * (len(records) - 1) / (MOST_STEPS - 1)) for i in range(MOST_STEPS)})
    body = "<p>Prompts from the training data, answered with the weights of that step.</p>"
    for record in (records[i] for i in chosen):
        samples = record["samples"] if record is records[-1] else record["samples"][:1]
        body += f"<h3>Step {record['step']}, {record['tokens_per_pass']:.2f} tokens a pass</h3>"
        body += "".join(_sample(s) for s in samples)
    return section("samples", "Answers during training", body)


def _sample(sample: Mapping[str, Any]) -> str:
    groups: list[tuple[int, list[str]]] = []
    for token in sample["answer_tokens"]:
        if not groups or groups[-1][0] != token["pass"]:
            groups.append((token["pass"], []))
        groups[-1][1].append(token["text"])
    spans = []
    for n, (number, texts) in enumerate(groups):
        tokens = "".join(f"<i>{escape(_visible(t))}</i>" for t in texts)
        label = f"pass {number}: {len(texts)} token{'s' * (len(texts) != 1)}"
        spans.append(f'<span class="pass p{n % 6}" title="{label}">{tokens}<sub>{number}</sub></span>')
    total, passes = len(sample["answer_tokens"]), len({t["pass"] for t in sample["answer_tokens"]})
    summary = f"{total} tokens in {passes} passes: {total / max(passes, 1):.2f} tokens a pass."
    answer = "".join(t["text"] for t in sample["answer_tokens"])
    expected = sample.get("expected")
    verdict = ""
    if expected is not None:
        same = answer.strip() == expected.strip()
        verdict = "<p>The answer is exactly the expected one.</p>"
        if not same:
            verdict = f"<p>Expected was:</p><pre>{escape(expected)}</pre>"
    return (
        f'<p class="prompt">{escape(sample["prompt"])}</p><p class="answer">{"<wbr>".join(spans)}</p>'
        f"<p>Tokens in one box came in one forward pass (its number below). {summary}</p>{verdict}"
    )


def _visible(text: str) -> str:
    return text.replace("\n", "⏎")


def _dataset_sections(rows: Rows, causal_attn: bool) -> Iterable[str]:
    count, row_length = rows.rows(0), int(rows.manifest["row_length"])
    if count == 0:
        return
    _, layout = rows.read(0, 0)
    shown = plots.crop_layout(layout)
    whole = shown.used == layout.used
    length = min(row_length, plots.MASK_TOKENS) if whole else shown.used
    length = max(length, shown.used)
    note = "" if whole and length == row_length else f" Shown are {length} of the row's {row_length} tokens."
    text = (
        "<p>Documents share a row and do not see each other. First come the clean tokens of all of them, then their "
        f"blocks, then padding. This is the first row of the dataset.{note}</p>"
    )
    figure = plots.mask_figure(shown, length, causal_attn=causal_attn)
    body = text + image(figure, "visibility mask of one packed row")
    with_blocks = np.flatnonzero(shown.n_blocks)
    if len(with_blocks):
        zoom = plots.zoom_figure(shown, int(with_blocks[0]), causal_attn=causal_attn)
        body += (
            "<p>A few neighbouring blocks of a document, enlarged. A block sees the clean tokens before its start "
            "(dotted: the start itself, which the block holds as its own first token) and itself, never another "
            "block.</p>"
        ) + image(zoom, "visibility of a few blocks")
    yield section("mask", "Who sees whom", body)
    fill = read_fill(rows)
    some = "" if count <= MOST_ROWS else f" ({MOST_ROWS} of {count} rows, at even distances)"
    text = (
        f"<p>Each bar is a row of {row_length} tokens{some}. Clean tokens and blocks are useful; padding is what "
        "packing could not fill.</p>"
    )
    yield section("fill", "How rows are filled", text + image(plots.fill_figure(fill), "filling of rows"))


def read_fill(rows: Rows) -> plots.Fill:
    """Token counts of the rows of epoch 0, at most MOST_ROWS of them at even distances."""
    count = rows.rows(0)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(int))
    layouts = [rows.read(0, int(i))[1] for i in chosen]
    clean = np.array([layout.n_clean for layout in layouts], dtype=np.int64)
    block = np.array([layout.n_block_tokens for layout in layouts], dtype=np.int64)
    return plots.Fill(clean, block, int(rows.manifest["row_length"]))


def _config_section(run: Path) -> str:
    file = run / "config.yaml"
    if not file.exists():
        return ""
    text = escape(file.read_text(encoding="utf-8"))
    return section("config", "Configuration", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")


# ------------------------------------------------------------------------------------------------ pieces
def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else json.dumps(value)
