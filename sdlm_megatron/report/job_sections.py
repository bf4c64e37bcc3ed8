"""The report's sections on a run as a job: what was learned beside the losses, speed, where the time went, events."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdlm_megatron.metrics.console import format_count, format_duration
from sdlm_megatron.metrics.sinks import VALIDATION_FILE, read_metrics
from sdlm_megatron.ops.goodput import CAUSES, USEFUL, Goodput
from sdlm_megatron.report import plots_run
from sdlm_megatron.report.page_kit import image, section, table

MOST_EVENTS = 200
"""Of a long run's events the newest are shown."""

Records = Sequence[Mapping[str, Any]]


def attempts_of(events: Records, found: Goodput | None) -> dict[str, str]:
    """Lines for the table of facts."""
    facts = {}
    if found is not None:
        started, ended = (datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M") for t in _ends(found))
        facts["from … to"] = f"{started} … {ended} UTC, {format_duration(found.wall)}"
        facts["goodput"] = f"{found.share:.1%} of the time went to steps that count"
    starts = [e for e in events if e["kind"] == "start"]
    if starts:
        jobs = len({str(e.get("attempt", "")).split("-")[0] for e in starts})
        facts["starts"] = f"{len(starts)} of the processes" + (f", in {jobs} jobs" if jobs > 1 else "")
        last = starts[-1]
        facts["layout"] = f"{last.get('layout', '')} on {last.get('world_size', '?')} processes"
    return facts


def _ends(found: Goodput) -> tuple[float, float]:
    return found.start, found.start + found.wall


def _slots(records: Records, prefix: str) -> dict[str, str]:
    """Fields of the slots, with their names."""
    found = sorted({int(k[len(prefix) :]) for r in records for k in r if k.startswith(prefix)})
    return {f"{prefix}{n}": "slot 1 (next token)" if n == 1 else f"slot {n}" for n in found}


def learning_sections(run: Path, records: Records) -> Iterator[str]:
    """Accuracy and accepted length of the training steps; validation."""
    accuracy = _slots(records, "accuracy_pos_")
    if accuracy:
        accuracy["accuracy_next_token"] = "clean tokens"
        text = (
            "<p>Share of the targets that were the model's likeliest token, on the rows of the step, before its "
            "update.</p>"
        )
        figure = plots_run.curves_figure(records, accuracy, "right", share=True)
        body = text + image(figure, "share of right tokens by slot and step")
        accepted = _accepted(records, "accepted_")
        if accepted:
            body += (
                "<p>Tokens that decoding would keep of a block whose past is right: the longest prefix of slots that "
                "are surer than τ, one at least. It counts what the model is sure of, right or wrong; decoding itself "
                "follows its own tokens.</p>"
            )
            figure = plots_run.curves_figure(records, accepted, "tokens a pass")
            body += image(figure, "accepted length by step")
        yield section("accuracy", "Accuracy and accepted length", body)
    if (run / VALIDATION_FILE).exists():
        yield from _validation(read_metrics(run / VALIDATION_FILE), records)


def _accepted(records: Records, prefix: str) -> dict[str, str]:
    found = sorted({k for r in records for k in r if k.startswith(prefix)})
    return {key: f"τ {key[len(prefix) :]}" for key in found}


def _validation(validated: Records, records: Records) -> Iterator[str]:
    if not validated:
        return
    losses = {**_slots(validated, "val_loss_pos_"), "val_loss_next_token": "clean tokens", "val_loss": "all targets"}
    rows = validated[-1].get("val_rows", "?")
    best = min((r for r in validated if r.get("val_loss") is not None), key=lambda r: r["val_loss"], default=None)
    text = f"<p>The same {rows} rows each time, which are not trained on."
    if best is not None:
        text += f" Lowest loss: {best['val_loss']:.4f} after step {best['step']}."
    figure = plots_run.curves_figure(validated, losses, "loss (nats a target)", marks=records)
    body = f"{text}</p>{image(figure, 'losses on held-out rows by step')}"
    last = validated[-1]
    lines = [
        (name, *(f"{last[k]:.4f}" if k in last and last[k] is not None else "–" for k in keys))
        for name, keys in (
            (name, (f"val_loss_pos_{n}", f"val_accuracy_pos_{n}", f"val_confidence_pos_{n}"))
            for n, name in enumerate(_slots(validated, "val_loss_pos_").values(), 1)
        )
    ]
    body += f"<p>After step {last['step']}:</p>" + table(("", "loss", "right", "mean confidence"), lines)
    kept = ", ".join(f"{last[k]:.2f} at {name}" for k, name in _accepted([last], "val_accepted_").items())
    yield section("validation", "Held-out rows", body + (f"<p>Tokens a pass: {kept}.</p>" if kept else ""))


def speed_sections(records: Records) -> Iterator[str]:
    """Throughput, and where a step's time went."""
    if any(r.get("tokens_per_s") for r in records):
        speeds = {"useful_tokens_per_s": "useful tokens", "tokens_per_s": "with padding"}
        body = image(plots_run.curves_figure(records, speeds, "tokens a second"), "tokens a second by step")
        useful, all_tokens = (sum(r.get(k) or 0 for r in records) for k in ("useful_tokens", "tokens"))
        text = f"<p>{useful / max(all_tokens, 1):.1%} of the tokens were no padding."
        mfu = [r["mfu"] for r in records if r.get("mfu")]
        if mfu:
            text += f" Mean model FLOPs utilization {sum(mfu) / len(mfu):.1%}."
            body += image(plots_run.curves_figure(records, {"mfu": "MFU"}, "MFU", share=True), "MFU by step")
        hot = [r["gpu_temperature_c"] for r in records if r.get("gpu_temperature_c")]
        if hot:
            text += f" Hottest GPU of the first node {max(hot):.0f} °C."
        peak = [r["memory_gb"] for r in records if r.get("memory_gb")]
        if peak:
            text += f" Most memory of the first process {max(peak):.1f} GB."
        yield section("speed", "Speed", text + "</p>" + body)
    if any(r.get("time_forward_backward") is not None for r in records):
        text = (
            "<p>Parts of a step, on the first process. Reduction is what the backward pass did not hide; waiting for "
            "a slower process shows there or in the forward and backward pass.</p>"
        )
        body = text + image(plots_run.breakdown_figure(records), "seconds a step by part")
        yield section("breakdown", "Where a step's time goes", body + _slow_hosts(records))


def _slow_hosts(records: Records) -> str:
    slow = Counter(str(r["slowest_host"]) for r in records if r.get("slowest_host"))
    if len(slow) < 2:
        return ""
    total = sum(slow.values())
    lines = [(host, n, f"{n / total:.0%}") for host, n in slow.most_common(8)]
    return "<p>Hosts that were the slowest of a log step:</p>" + table(("", "log steps", "share"), lines)


def job_sections(run: Path, events: Records, found: Goodput | None) -> Iterator[str]:
    """Where the time of the job went, spikes and events."""
    if found is not None:
        starts = [float(e["time"]) for e in events if e["kind"] == "start"]
        figure = image(plots_run.goodput_figure(found, starts), "where the time of the job went")
        causes = sorted(found.seconds, key=lambda c: (c != USEFUL, -found.seconds[c]))
        lines = [
            (c, format_duration(found.seconds[c]), f"{found.seconds[c] / found.wall:.1%}", CAUSES[c]) for c in causes
        ]
        text = f"<p>{found.share:.1%} of {format_duration(found.wall)} went to steps that count.</p>"
        body = text + figure + table(("", "time", "share", ""), lines)
        yield section("goodput", "Where the whole time went", body)
    yield from _spikes(run / "spikes.jsonl")
    if events:
        yield section("events", "Events", _events(events))


def _spikes(file: Path) -> Iterator[str]:
    if not file.exists():
        return
    shown = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            spike = json.loads(line)
            shown.append((f"step {spike.pop('step')}", _fields(spike)))
        except (ValueError, KeyError, AttributeError):  # cut by a crash
            continue
    if shown:
        text = "<p>Steps far outside of what was usual, and the rows that may have caused them.</p>"
        yield section("spikes", "Spikes", text + table(("", "what"), shown[-MOST_EVENTS:]))


def _events(events: Records) -> str:
    first = float(events[0]["time"])
    lines = []
    for event in events[-MOST_EVENTS:]:
        rest = {k: v for k, v in event.items() if k not in ("time", "attempt", "kind", "process_start")}
        when = datetime.fromtimestamp(event["time"], UTC).strftime("%m-%d %H:%M:%S")
        after = format_duration(float(event["time"]) - first)
        lines.append((when, after, event.get("attempt", ""), event["kind"], _fields(rest)))
    left = f"<p>The newest {MOST_EVENTS} of {len(events)}.</p>" if len(events) > MOST_EVENTS else ""
    return left + table(("UTC", "after", "attempt", "event", ""), lines)


def _fields(fields: Mapping[str, Any]) -> str:
    """Fields as text, numbers short, long text cut."""

    def text(key: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if key == "bytes" and isinstance(value, int):
            return format_count(value)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    whole = ", ".join(f"{key} {text(key, value)}" for key, value in fields.items() if value not in ("", None))
    return whole if len(whole) <= 400 else whole[:399] + "…"
