"""Console line: width, columns, number formats."""

import io

import pytest

from sdlm_megatron.metrics.console import Console
from sdlm_megatron.metrics.formats import format_count, format_duration


def record(step, block_size, **more):
    slots = {f"loss_pos_{j}": 0.5 * j for j in range(1, block_size + 1)}
    return {
        "step": step,
        "steps": 13699,
        "loss": 1.23456,
        **slots,
        "grad_norm": 1.25,
        "lr": 5e-6,
        "useful_tokens_per_s": 1_234_567.0,
        "tokens_per_s": 1_500_000.0,
        "memory_gb": 63.24,
        "eta_s": 43_380.0,
        **more,
    }


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 32])
def test_lines_align_with_names_and_fit_120_columns(block_size):
    console = Console(steps=13699, block_size=block_size, show_next_token=True, show_mfu=True)
    line = console.line(record(13699, block_size, mfu=0.4213, loss_next_token=7.77))
    assert "7.77" in line
    assert len(line) == len(console.names()) <= 120
    assert all(len(text) <= 120 for text in console.legend().splitlines())
    assert line.count(" - ") == 0
    assert "42.1%" in line and "12h03m" in line and "63.2G" in line and "1.23M" in line and "5.0e-06" in line


def test_up_to_eight_slots_are_shown_then_the_last():
    shown = Console(steps=9, block_size=8).names()
    assert all(f"slot{j}" in shown for j in range(1, 9))
    wide = Console(steps=9, block_size=32).names()
    assert "slot32" in wide and "slot7" in wide and "slot8" not in wide


def test_absent_fields_show_as_a_dash_and_columns_stay():
    console = Console(steps=58, block_size=4)
    full = record(1, 4)
    partial = {k: v for k, v in full.items() if k not in ("loss_pos_3", "eta_s", "memory_gb")}
    line = console.line(partial)
    assert len(line) == len(console.line(full))
    assert line.split().count("-") == 3
    assert "mfu" not in console.names()


def test_exploding_gradient_does_not_widen_the_line():
    console = Console(steps=13699, block_size=8)
    assert len(console.line(record(1, 8, grad_norm=123456.0))) == len(console.names())


def test_legend_is_printed_once_and_header_every_50_lines():
    stream = io.StringIO()
    console = Console(steps=120, block_size=4, stream=stream)
    for step in range(1, 102):
        console.log(step, record(step, 4))
    lines = stream.getvalue().splitlines()
    assert lines.count("columns:") == 1
    assert sum("slot1 " in line and line.lstrip().startswith("step") for line in lines) == 3
    assert sum("/13699" in line for line in lines) == 101


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7.4, "7"), (999.4, "999"), (999.6, "1.00k"), (1234, "1.23k"), (12_345, "12.3k"), (999_600, "1.00M"),
     (123_456, "123k"), (1.5e6, "1.50M"), (2.3229e9, "2.32G"), (5e12, "5e+12")],
)  # fmt: skip
def test_format_count(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (161, "2m41s"), (3599.7, "1h00m"), (43_380, "12h03m"),
     (86_399, "1d00h"), (273_600, "3d04h"), (float("nan"), "?"), (float("inf"), "?"), (-1, "?")],
)  # fmt: skip
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
