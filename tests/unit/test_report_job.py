"""Report of a run over all its restarts, and its command."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
from helpers import make_dataset, run_python
from job_history import event, write_job

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import DataError
from sdlm_megatron.report.run_page import main, write_report
from sdlm_megatron.report.run_sections import breakdown_figure

SLOTS = {f"{name}_pos_{j}": j / 8 for name in ("loss", "accuracy", "confidence") for j in (1, 2)}
LEARNED = {"loss": 1.0, **SLOTS, "accepted_0.9": 1.5, "accepted_0.98": 1.25}
PARTS = {"time_forward_backward": 1.5, "time_reduce": 0.2, "time_update": 0.2, "time_read_log": 0.1}
SPEED = {"tokens": 1000, "useful_tokens": 900, "tokens_per_s": 500.0, "useful_tokens_per_s": 450.0, "mfu": 0.4}


def headings(page: Path) -> list[str]:
    return [unescape(h) for h in re.findall("<h2>(.*?)</h2>", page.read_text(encoding="utf-8"))]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_job(tmp_path, **LEARNED, **PARTS, **SPEED, slowest_host="node-7", gpu_temperature_c=71.0, memory_gb=60.0)
    validated = {"step": 6, "val_rows": 64, "held_out_data": "b", **{f"val_{k}": v for k, v in LEARNED.items()}}
    easier = {"step": 3, "val_rows": 64, "held_out_data": "a", "val_loss": 0.5}  # of another data.validation
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (easier, validated)))
    spike = {"step": 5, "rows": [{"row": 31, "loss": 14.2}], "skip": "--data.skip_rows=[31]"}
    (tmp_path / "spikes.jsonl").write_text(json.dumps(spike) + '\n{"step": 6, "ro')
    (tmp_path / "config.yaml").write_text("data:\n  path: /nowhere\n")
    return tmp_path


def test_page_has_every_section(job: Path) -> None:
    page = write_report(job)
    assert headings(page) == [
        "Run",
        "Loss per slot",
        "Accuracy and accepted length",
        "Validation",
        "Speed",
        "Step time by part",
        "Job time by cause",
        "Spikes",
        "Events",
        "All metrics",
        "Configuration",
    ]
    text = page.read_text(encoding="utf-8")
    for words in (
        "6.6% of 4m02s was spent in useful steps",
        "<td>1m41s</td><td>41.7%</td>",  # time in the queue
        "--data.skip_rows=[31]",
        "3 of the processes",
        "Mean model FLOPs utilization 40.0%",
        "The same 64 held-out rows each time from step 6 on",
        "Lowest loss: 1.0000 after step 6",
        "<th>software</th><td>torch 1</td>",
        "<th>machine</th><td>Acorn</td>",
        "1.50 at τ 0.9, 1.25 at τ 0.98",
        "Hottest GPU of the first node 71 °C",
        "reason time limit",
    ):
        assert words in text, words
    assert text.count("<img") == 8 and "http" not in re.sub(r'src="data:[^"]*"', "", text)


@pytest.mark.parametrize("state", ["configured", "starting", "started", "logged"])
def test_page_of_a_run_in_any_state(job: Path, state: str) -> None:
    """States: only a configuration; a single event; a crash before the first step; files truncated by a crash."""
    if state == "configured":
        for file in job.glob("*.jsonl"):
            file.unlink()
    elif state == "starting":
        for file in job.glob("*.jsonl"):
            file.unlink()
        (job / "events.jsonl").write_text('{"kind": "start", "time": 1796048636.0, "attempt": "local", "step": 0}\n')
    elif state == "started":
        events = (job / "events.jsonl").read_text().splitlines(keepends=True)
        for file in job.glob("*.jsonl"):
            file.unlink()
        (job / "events.jsonl").write_text("".join(events[:4]) + events[4][:20])
    else:
        for name in ("events", "validation", "spikes", "metrics.redone"):
            (job / f"{name}.jsonl").unlink()
        with open(job / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "lo')
    page = write_report(job)
    titles = headings(page)
    assert titles[:2] == ["Run", "Loss per slot"] and "this page was written with" in page.read_text()
    assert ("Job time by cause" in titles) == (state == "started")


def test_report_command(job: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    main([str(job), "--out", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    assert "6.6% of 4m02s was spent in useful steps" in printed and "41.7%    1m41s  queue" in printed
    assert "left out: there is no dataset at /nowhere" in (tmp_path / "page.html").read_text()
    with pytest.raises(DataError, match="does not exist"):
        main([str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    done = run_python("-m", "sdlm_megatron.report.run_page", str(tmp_path / "empty"), check=False)
    assert done.returncode == 2 and "no metrics.jsonl" in done.stderr and "Traceback" not in done.stderr


def test_the_mask_is_that_of_the_dataset_which_the_run_read(tmp_path: Path) -> None:
    data, events = make_dataset(tmp_path / "data", rows=3), tmp_path / "events.jsonl"
    (tmp_path / "config.yaml").write_text(f"data:\n  path: {data}\n")
    read = {"dataset": PackedDataset(data).manifest["checksum"]}
    for fields, shown, note in (
        (read, True, ""),
        ({"dataset": "0" * 64}, False, "is not the one that the run read"),
        ({}, True, "did not record which it read"),
    ):
        events.write_text(json.dumps(event(0, "start", step=0, **fields)) + "\n")
        main([str(tmp_path)])
        page = tmp_path / "report.html"
        assert ("Visibility mask" in headings(page)) is shown
        assert note in page.read_text() and ("mask and fill" in page.read_text()) is bool(note)


def test_a_single_record_shows_its_parts_and_claims_no_resume(tmp_path: Path) -> None:
    record = {"step": 1, **LEARNED, **PARTS}
    (axis,) = breakdown_figure([record]).axes
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([1.5, 0.2, 0.2, 0, 0.1])
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert "resumed after" not in write_report(tmp_path).read_text()
