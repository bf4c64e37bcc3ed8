"""Report sections about a run: charts of its metrics, speed, where the time of the job went, events."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sdlm_megatron.metrics.formats import format_count, format_duration
from sdlm_megatron.metrics.metric_table import Metric, fields_by_metric
from sdlm_megatron.metrics.sinks import VALIDATION_FILE, read_metrics
from sdlm_megatron.ops.goodput import CAUSES, USEFUL, Goodput
from sdlm_megatron.report.page_kit import Page, PageSection
from sdlm_megatron.report.plots import GRID, INK, SERIES, Records, curves_figure, figure_of, legend, mark_resumes

MAX_EVENTS = 200
"""Events and spikes shown; of a longer run the newest."""
_UNSHOWN = ("time", "attempt", "kind", "process_start", "dataset", "software", "machine")
"""Fields of events that the table of events leaves out, or shows elsewhere."""
TAB_HEADINGS = {"decoding": "Accuracy and accepted length", "speed": "Speed"}
STEP_PARTS = {
    "time_forward_backward": "forward and backward",
    "time_reduce": "gradient reduction",
    "time_update": "update",
    "data_wait": "data wait",
    "time_read_log": "results, log, rest",
}
"""Fields of a log record that add up to its step_time."""
CAUSE_COLORS = (
    *("#2f9e77", "#cfd6de", "#9cc3e6", "#3b6fb6", "#4aa3b5", "#c24b3a", "#e2803a", "#8a63c2", "#8d7a1f"),
    *("#7d1f14", "#b5527d", "#6b7785"),
)
"""One for each of goodput.CAUSES, in their order."""


def job_facts(events: Records, goodput: Goodput | None) -> dict[str, str]:
    """Lines for the table of facts: begin and end, goodput, starts and layout."""
    facts = {}
    if goodput is not None:
        ends = (goodput.start, goodput.start + goodput.wall)
        started, ended = (datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M") for t in ends)
        facts["from … to"] = f"{started} … {ended} UTC, {format_duration(goodput.wall)}"
        facts["goodput"] = f"{goodput.share:.1%} of the time was spent in useful steps"
    starts = [e for e in events if e["kind"] == "start"]
    if starts:
        jobs = len({str(e.get("attempt", "")).split("-")[0] for e in starts})
        facts["starts"] = f"{len(starts)} of the processes" + (f", in {jobs} jobs" if jobs > 1 else "")
        last = starts[-1]
        facts["layout"] = f"{last.get('layout', '')} on {last.get('world_size', '?')} processes"
    return facts


# ---------------------------------------------------------------------------------------------------- metrics
def field_label(metric: Metric, field: str) -> str:
    """A field's name in a legend."""
    slot = re.search(r"_pos_(\d+)$", field)
    if slot:
        return "slot 1 (next token)" if slot[1] == "1" else f"slot {slot[1]}"
    if field.endswith("_next_token"):
        return "clean tokens"
    if "{threshold}" in metric.name:
        return f"τ {field.rpartition('_')[2]}"
    return metric.column.heading if metric.column is not None else field


def _fields(records: Records) -> list[tuple[Metric, list[str]]]:
    return list(fields_by_metric({key for record in records for key in record}))


def loss_section(page: Page, records: Records) -> None:
    """Losses of each slot against the step."""
    section = page.section("loss", "Loss per slot")
    if not records:
        section.text("No step has been logged yet.")
        return
    section.text(
        "A block predicts the tokens after a known one: slot 1 the next token, slot 2 the one after that, and so on. "
        "Later slots have less context and a higher loss."
    )
    losses = [(metric, fields) for metric, fields in _fields(records) if metric.name.startswith("loss_")]
    curves = {field: field_label(metric, field) for metric, fields in losses for field in fields}
    figure = curves_figure(records, {**curves, "loss": "trained loss"}, "loss (nats)", dashed="loss", annotate=True)
    section.figure(figure, "loss per slot by step")


def chart_sections(page: Page, records: Records, *, speed: bool) -> None:
    """A section for each tab of the table of metrics that has charts: the tab "speed", or all others."""
    sections: dict[str, PageSection] = {}
    charts: dict[tuple[str, str], list[tuple[Metric, list[str]]]] = {}
    for metric, fields in _fields(records):
        if metric.chart and (metric.tab == "speed") is speed:
            charts.setdefault((metric.tab, metric.chart), []).append((metric, fields))
    for (tab, chart), metrics in charts.items():
        if tab not in sections:
            sections[tab] = page.section(tab.replace(" ", "-"), TAB_HEADINGS.get(tab, tab.capitalize()))
            if tab == "speed":
                sections[tab].text(" ".join(_speed_summary(records)))
        unit = metrics[0][0].unit
        curves = {field: field_label(metric, field) for metric, fields in metrics for field in fields}
        figure = curves_figure(records, curves, chart if unit == "share" else unit or chart, share=unit == "share")
        sections[tab].text(" ".join(dict.fromkeys(metric.explanation for metric, _ in metrics)))
        sections[tab].figure(figure, f"{chart} by step")


def _speed_summary(records: Records) -> list[str]:
    useful, tokens = (sum(r.get(key) or 0 for r in records) for key in ("useful_tokens", "tokens"))
    sentences = [f"{useful / max(tokens, 1):.1%} of the tokens were not padding."]
    mfu, hot, peak = ([r[key] for r in records if r.get(key)] for key in ("mfu", "gpu_temperature_c", "memory_gb"))
    if mfu:
        sentences.append(f"Mean model FLOPs utilization {sum(mfu) / len(mfu):.1%}.")
    if hot:
        sentences.append(f"Hottest GPU of the first node {max(hot):.0f} °C.")
    if peak:
        sentences.append(f"Peak memory of the first process {max(peak):.1f} GB.")
    return sentences


def metrics_section(page: Page, records: Records) -> None:
    """The newest value and the explanation of every metric that was logged."""
    section = page.section("metrics", "All metrics")
    rows = []
    for metric, fields in _fields(records):
        # not of the last record: some fields, such as time_save, are not in every one
        newest = [next(r[field] for r in reversed(records) if field in r) for field in fields]
        name = fields[0] if len(fields) == 1 else f"{fields[0]} … {fields[-1]}"
        values = ", ".join("–" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in newest)
        rows.append((name, values, metric.unit, metric.explanation))
    if rows:
        section.text("Fields of metrics.jsonl with their newest values.")
        section.table(("field", "newest", "unit", ""), rows, align="left")


def validation_section(page: Page, run: Path, records: Records) -> None:
    """Losses on held-out rows."""
    validated = read_metrics(run / VALIDATION_FILE) if (run / VALIDATION_FILE).exists() else []
    if not validated:
        return
    section, last = page.section("validation", "Validation"), validated[-1]
    same_rows = "val_rows", "held_out_data"  # a resumed run may have others
    same = list(takewhile(lambda r: all(r.get(key) == last.get(key) for key in same_rows), reversed(validated)))
    count, data = last.get("val_rows", "?"), last.get("held_out_data")
    text = f"{'The same ' if data else ''}{count} held-out rows each time"
    since = f" from step {same[-1]['step']} on; the records before are of other rows, or do not name them"
    text += "." if len(same) == len(validated) else f"{since}."
    known = [r for r in same if r.get("val_loss") is not None]
    if known:
        best = min(known, key=lambda r: r["val_loss"])
        text += f" Lowest loss: {best['val_loss']:.4f} after step {best['step']}."
    section.text(text)
    slots = sorted({int(m[1]) for r in validated for key in r if (m := re.fullmatch(r"val_loss_pos_(\d+)", key))})
    names = {n: "slot 1 (next token)" if n == 1 else f"slot {n}" for n in slots}
    losses = {f"val_loss_pos_{n}": name for n, name in names.items()}
    losses |= {"val_loss_next_token": "clean tokens", "val_loss": "whole loss"}
    figure = curves_figure(validated, losses, "loss (nats)", dashed="val_loss", resumes=records)
    section.figure(figure, "losses on held-out rows by step")
    section.text(f"After step {last['step']}:")
    rows = []
    for n, name in names.items():
        values = [last.get(f"val_{what}_pos_{n}") for what in ("loss", "accuracy", "confidence")]
        rows.append((name, *(f"{x:.4f}" if isinstance(x, (int, float)) else "–" for x in values)))
    section.table(("", "loss", "accuracy", "mean confidence"), rows)
    accepted = {key.rpartition("_")[2]: x for key, x in last.items() if key.startswith("val_accepted_")}
    if accepted:
        section.text(f"Tokens per pass: {', '.join(f'{x:.2f} at τ {tau}' for tau, x in accepted.items())}.")


# ------------------------------------------------------------------------------------------------- time of a step
def step_time_section(page: Page, records: Records) -> None:
    """Parts of the step time, and the hosts that were slowest."""
    if not any(r.get("time_forward_backward") is not None for r in records):
        return
    section = page.section("breakdown", "Step time by part")
    section.text(
        "Measured on the first process. Gradient reduction is the part that the backward pass did not hide. Waiting "
        "for a slower process counts there, or in the forward and backward pass."
    )
    section.figure(breakdown_figure(records), "seconds per step by part")
    slow = Counter(str(r["slowest_host"]) for r in records if r.get("slowest_host"))
    if len(slow) > 1:
        total = sum(slow.values())
        section.text("Slowest hosts by number of log records:")
        rows = [(host, n, f"{n / total:.0%}") for host, n in slow.most_common(8)]
        section.table(("", "records", "share"), rows)


def breakdown_figure(records: Records) -> Figure:
    """Seconds per step, stacked by part, against the step; neighbors are averaged above 120 records."""
    figure, (axis,) = figure_of(7.2, 3.2)
    known = [r for r in records if r.get("time_forward_backward") is not None]
    bins = np.array_split(np.arange(len(known)), min(len(known), 120))
    steps = [known[b[-1]]["step"] for b in bins]
    bottom = np.zeros(len(bins))
    for n, (key, name) in enumerate(STEP_PARTS.items()):
        values = np.array([float(r.get(key) or 0.0) for r in known])
        height = np.array([values[b].mean() for b in bins])
        style: dict[str, Any] = {"color": SERIES[n], "label": name, "linewidth": 0}
        if len(bins) == 1:  # an area over one step has no width
            axis.bar(steps, height, bottom=bottom, **style)
        else:
            axis.fill_between(steps, bottom, bottom + height, **style)
        bottom += height
    mark_resumes(axis, records)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel("seconds per step", color=INK)
    # a first step that compiles would flatten all others
    axis.set_ylim(0, float(np.percentile(bottom, 98)) * 1.25 or 1)
    axis.margins(x=0)
    legend(axis, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure


# -------------------------------------------------------------------------------------------------- time of the job
def job_sections(page: Page, run: Path, events: Records, goodput: Goodput | None) -> None:
    """Time of the job by cause, loss spikes and events."""
    if goodput is not None:
        section = page.section("goodput", "Job time by cause")
        section.text(f"{goodput.share:.1%} of {format_duration(goodput.wall)} was spent in useful steps.")
        starts = [float(e["time"]) for e in events if e["kind"] == "start"]
        section.figure(goodput_figure(goodput, starts), "time of the job by cause")
        rows = [(c, format_duration(s), f"{s / goodput.wall:.1%}", CAUSES[c]) for c, s in _by_share(goodput)]
        section.table(("", "time", "share", ""), rows, align="left")
    _spikes(page, run / "spikes.jsonl")
    if events:
        _events(page.section("events", "Events"), events)


def _by_share(goodput: Goodput) -> list[tuple[str, float]]:
    """Causes and their seconds: useful steps, then the others by descending time."""
    return sorted(goodput.seconds.items(), key=lambda item: (item[0] != USEFUL, -item[1]))


def goodput_figure(goodput: Goodput, starts: Sequence[float]) -> Figure:
    """Time of the job by cause: shares in descending order above, along the clock below.

    Args:
        starts: when attempts started, in seconds since 1970.
    """
    causes = _by_share(goodput)
    figure, (upper, lower) = figure_of(7.2, 1.6 + 0.28 * len(causes), 2, height_ratios=[len(causes), 2.2])
    colors = dict(zip(CAUSES, CAUSE_COLORS, strict=True))
    share = [seconds / goodput.wall for _, seconds in causes]
    upper.barh(range(len(causes)), share, color=[colors[cause] for cause, _ in causes])
    upper.set_yticks(range(len(causes)), [cause for cause, _ in causes])
    upper.invert_yaxis()
    upper.set_xlim(0, max(share) * 1.15)
    for n, x in enumerate(share):
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": INK, "va": "center"}
        upper.annotate(f"{x:.1%}", (x, n), xytext=(4, 0), **style)
    upper.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    upper.grid(False, axis="y")
    _draw_clock(lower, goodput, starts, colors)
    return figure


def _draw_clock(axis: Axes, goodput: Goodput, starts: Sequence[float], colors: Mapping[str, str]) -> None:
    """The causes along the time."""
    units = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    unit, name = next((u for u in units if goodput.wall > 3 * u[0]), units[-1])
    for cause in CAUSES:
        spans = [span for span in goodput.spans if span.cause == cause]
        bars = [((s.start - goodput.start) / unit, (s.end - s.start) / unit) for s in spans]
        axis.broken_barh(bars, (0, 1), color=colors[cause], linewidth=0)
    for start in starts:
        axis.axvline((start - goodput.start) / unit, color=INK, linewidth=0.9, linestyle=":")
    axis.set_xlim(0, goodput.wall / unit)
    axis.set_yticks([])
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(f"{name} since the beginning (dotted: start of the processes)", color=INK)
    axis.set_facecolor(GRID)


def _spikes(page: Page, file: Path) -> None:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    rows = []
    for line in lines:
        try:
            spike = json.loads(line)
            rows.append((f"step {spike.pop('step')}", _short_fields(spike)))
        except (ValueError, KeyError, AttributeError):  # the last line may be cut by a crash
            continue
    if rows:
        section = page.section("spikes", "Spikes")
        section.text(
            "Steps whose loss or gradient norm was far outside the usual range, and the rows that may be the cause."
        )
        section.table(("", "values"), rows[-MAX_EVENTS:], align="left")


def _events(section: PageSection, events: Records) -> None:
    first = float(events[0]["time"])  # of all events, also if only the newest are shown
    rows = []
    for event in events[-MAX_EVENTS:]:
        rest = {k: v for k, v in event.items() if k not in _UNSHOWN}
        when = datetime.fromtimestamp(event["time"], UTC).strftime("%m-%d %H:%M:%S")
        after = format_duration(float(event["time"]) - first)
        rows.append((when, after, event.get("attempt", ""), event["kind"], _short_fields(rest)))
    if len(events) > MAX_EVENTS:
        section.note(f"The newest {MAX_EVENTS} of {len(events)}.")
    section.table(("UTC", "after", "attempt", "event", ""), rows, align="left")


def _short_fields(fields: Mapping[str, Any]) -> str:
    """Fields as text: numbers shortened, long text cut."""

    def text(key: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if key == "bytes" and isinstance(value, int):
            return format_count(value)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    whole = ", ".join(f"{key} {text(key, value)}" for key, value in fields.items() if value not in ("", None))
    return whole if len(whole) <= 400 else whole[:399] + "…"
