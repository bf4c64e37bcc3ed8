"""Metric table: one entry with one function adds a device metric to every output."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import load_micro_batch, make_dataset, read_metrics, train

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.metrics import sinks
from sdlm_megatron.metrics.metric_table import METRICS, Metric, metric_of, register, tab_of
from sdlm_megatron.ops.attempt import read_events
from sdlm_megatron.report.run_page import write_report

ONE_ENTRY = """
import sys
from sdlm_megatron.errors import run_cli
from sdlm_megatron.metrics.metric_table import Column, Metric, register


def padding(rows):
    length = rows.batch.tokens.shape[1]
    return rows.host_value(length - rows.batch.layout.used, length)


register(Metric("padding", "mean", "data", "share", "Share of the tokens that are padding.",
                Column("padding", 8, "{:.2%}".format), chart="padding", measure=padding))

if __name__ == "__main__":
    from sdlm_megatron.train import main

    run_cli(main, sys.argv[1:])
"""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the entries that a test registers."""
    monkeypatch.setattr("sdlm_megatron.metrics.metric_table.METRICS", [*METRICS])


def test_one_entry_reaches_the_record_the_console_and_the_report(tmp_path: Path, table: None) -> None:
    script, data, run = tmp_path / "train_with_padding.py", tmp_path / "data", tmp_path / "run"
    script.write_text(ONE_ENTRY)
    dataset = PackedDataset(make_dataset(data, rows=4))
    settings = {
        "run_dir": run,
        "data.path": data,
        "train.steps": 2,
        "train.global_batch": 2,
        "train.global_batch_unit": "rows",
        "checkpoint.save_every": 0,
    }
    done = train(settings, entry=(str(script),))
    records = read_metrics(run)
    length = dataset.row_length
    rows = [load_micro_batch(dataset, n, seed=42).layout.used for n in range(4)]
    for record, used in zip(records, (rows[:2], rows[2:]), strict=True):
        assert record["padding"] == pytest.approx(1 - sum(used) / (2 * length))
    lines = done.stdout.splitlines()
    assert any(re.match(r"\s+padding\s+Share of the tokens that are padding\.", line) for line in lines)
    (line,) = (line for line in lines if line.lstrip().startswith("2/2 "))
    assert line.endswith(f"{records[-1]['padding']:.2%}")
    register(Metric("padding", "mean", "data", "share", "Share of the tokens that are padding.", chart="padding"))
    page = html.unescape(write_report(run).read_text())
    assert "<th>padding</th>" in page and 'alt="padding by step"' in page
    assert "Share of the tokens that are padding." in page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert "data/padding" in events.Tags()["scalars"]


def test_every_record_is_read_and_its_fields_have_entries_and_explanations(tmp_path: Path) -> None:
    settings = {
        "run_dir": tmp_path / "run",
        "data.path": make_dataset(tmp_path / "data", rows=4),
        "data.validation": make_dataset(tmp_path / "held-out", rows=2, seed=1),
        "observe.validate_every": 1,
        "observe.sample_every": 1,
        "diffusion.next_token_weight": 0.1,
        "train.steps": 2,
        "train.global_batch": 2,
        "observe.tensorboard": False,
    }
    train(settings)
    for file in ("metrics", "validation", "samples"):
        path = tmp_path / "run" / f"{file}.jsonl"
        assert sinks.read_metrics(path) == [json.loads(line) for line in path.read_text().splitlines()] != []
    written = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert read_events(tmp_path / "run") == [json.loads(line) for line in written] != []
    assert "Answers during training" in write_report(tmp_path / "run").read_text()
    fields = {field for record in read_metrics(tmp_path / "run") for field in record}
    assert {"loss_next_token", "accuracy_pos_4", "accepted_0.98", "time_validate"} <= fields
    assert {field for field in fields if metric_of(field) is None} == {"step", "time", "steps"}
    assert all(metric.explanation.endswith(".") for metric in METRICS)


@pytest.mark.parametrize(
    ("field", "tab"),
    [
        ("loss", "loss"),
        ("loss_pos_12", "loss"),
        ("loss_next_token", "loss"),
        ("val_loss", "validation"),
        ("val_targets", "validation"),
        ("accuracy_next_token", "decoding"),
        ("accepted_0.98", "decoding"),
        ("sample_tokens_per_pass", "samples"),
        ("lr", "optimizer"),
        ("memory_gb", "time and memory"),
        ("mfu", "speed"),
        ("targets", "data"),
        ("of an older version", "data"),
    ],
)
def test_tab_of_each_field(field: str, tab: str) -> None:
    assert tab_of(field) == tab


def test_duplicate_field_is_refused(table: None) -> None:
    with pytest.raises(ValueError, match="loss_pos_1 is already in the table"):
        register(Metric("loss_pos_{slot}", "mean", "loss", "nats", ""))


def test_reductions_cover_all_micro_batches(make_engine: Callable, tmp_path: Path, table: None) -> None:
    """Includes several steps that are read together and steps without a value."""
    from helpers import make_hf

    def largest(rows: object) -> torch.Tensor:
        return torch.stack([rows.nll.max()[None], rows.nll.new_ones(1)])

    def rows_with_number(rows: object) -> torch.Tensor:
        return rows.host_value(2.0, float(bool(rows.batch.rows)))

    register(Metric("largest_nll", "max", "loss", "nats", "", measure=largest))
    register(Metric("twos", "sum", "data", "", "", measure=rows_with_number))
    register(Metric("two", "mean", "data", "", "", measure=rows_with_number))
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=3))
    engine = make_engine(make_hf(tmp_path / "hf"))
    batches = [engine.prepare(load_micro_batch(dataset, n, seed=0)) for n in (0, 1, None)]
    with engine.inference():
        values = [engine.logits(b).float().log_softmax(-1) for b in batches[:2]]
        losses = [-v.gather(1, b.label_targets[:, None]) for v, b in zip(values, batches, strict=False)]
        held_out = engine.evaluate([batches[:1], batches[1:]])
    first, unmeasured, empty = engine.results(
        [
            engine.train_step(batches, 1, measure=True),
            engine.train_step(batches, 2),
            engine.train_step(batches[2:], 3, measure=True),
        ]
    )
    for result in (first, held_out):
        assert result.measured["largest_nll"] == pytest.approx(max(x.max().item() for x in losses), rel=1e-5)
        assert (result.measured["twos"], result.measured["two"]) == (6.0, 3.0)
    assert not unmeasured.measured and "two" not in empty.measured
