"""The table of metrics: name, reduction, tab, column, unit and explanation of every field of a log record.

The table decides what is measured on the device and how it is reduced (parallel/results.py), the console's columns and
legend (metrics/console.py), the tabs of TensorBoard (metrics/sinks.py), and the charts and explanations of the report.

A new device metric is one entry with one function. The function gets the label rows of a micro-batch on the last
pipeline stage and returns sums and counts; it must not make the host wait for the device. The share of padding:

    def padding(rows: LabelRows) -> Tensor:
        length = rows.batch.tokens.shape[1]
        return rows.host_value(length - rows.batch.layout.used, length)

    register(Metric("padding", "mean", "data", "share", "Padding's share of all tokens.", measure=padding))

This module imports neither torch nor Megatron-Core, because reports and consoles read it too.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdlm_megatron.metrics.formats import format_count, format_duration

if TYPE_CHECKING:
    from torch import Tensor

    from sdlm_megatron.diffusion.loss import LabelRows

THRESHOLDS = (0.9, 0.98)
"""Confidence thresholds at which the accepted length is reported."""
VALIDATION = "val_"
"""Prefix of the fields that were measured on held-out rows."""
_PLACEHOLDERS = {"{slot}": r"\d+", "{slot or clean}": r"(pos_\d+|next_token)", "{threshold}": r"[\d.]+"}
"""Placeholders of metric names, and the pattern of the field names that they stand for."""


@dataclass(frozen=True)
class Column:
    """A column of the console."""

    heading: str
    width: int
    text: Callable[[float], str] = "{:.4g}".format


@dataclass(frozen=True)
class Metric:
    """One entry of the table: a field of the log record, or a family of fields."""

    name: str
    """The field. "{slot}" stands for 1 ... D, "{slot or clean}" for pos_1 ... pos_D and next_token (the clean tokens),
    "{threshold}" for each of THRESHOLDS."""
    reduction: Literal["mean", "sum", "max", "last"]
    """Over what a record stands for. With `measure`: over all micro-batches and ranks of the record's step. Without:
    over the steps since the previous record, or "last" for the value of the record's own step."""
    tab: str
    """Group of related fields in TensorBoard and in the report."""
    unit: str
    explanation: str
    """One sentence for the console's legend and the report."""
    column: Column | None = None
    chart: str = ""
    """The report draws metrics with the same chart in one figure; empty: no figure."""
    measure: "Callable[[LabelRows], Tensor] | None" = None
    """Device metrics: from a micro-batch's label rows to float32 (2, fields) on the device. Row 0 holds sums (maxima
    where `reduction` is "max"), row 1 counts. A field whose total count is 0 is left out of the record."""

    def fields(self, block_size: int) -> list[str]:
        """Names of its fields in a log record, in the order of `measure`'s columns."""
        slots = range(1, block_size + 1)
        values: dict[str, list[str]] = {
            "{slot}": [str(j) for j in slots],
            "{slot or clean}": [*(f"pos_{j}" for j in slots), "next_token"],
            "{threshold}": [f"{tau:g}" for tau in THRESHOLDS],
        }
        for placeholder, texts in values.items():
            if placeholder in self.name:
                return [self.name.replace(placeholder, text) for text in texts]
        return [self.name]

    def matches(self, field: str) -> bool:
        """Whether a field of a log record belongs to this entry."""
        prefix, brace, rest = self.name.partition("{")
        return re.fullmatch(re.escape(prefix) + _PLACEHOLDERS.get(brace + rest, ""), field) is not None

    @property
    def by_slot(self) -> bool:
        """Whether it has one field per slot."""
        return "{slot}" in self.name


def _exponent_if_large(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}"  # keeps the column narrow when gradients explode


# ---------------------------------------------------------------------------------------------------- entries
# The order is that of the console's columns and of the report.
# fmt: off
METRICS: list[Metric] = [
    Metric("loss", "mean", "loss", "nats",
           "The trained loss: mean over block targets, plus the weighted losses of clean tokens per block target.",
           Column("loss", 7, "{:.4f}".format)),
    Metric("loss_pos_{slot}", "mean", "loss", "nats",
           "Mean loss of each slot of a block: slot1 predicts the next token, slotN the token N positions ahead.",
           Column("slot", 6)),
    Metric("loss_next_token", "mean", "loss", "nats",
           "Mean next-token loss of clean tokens, unweighted; `loss` includes it with its weight.",
           Column("clean", 6, "{:.3f}".format)),
    Metric("accuracy_{slot or clean}", "mean", "decoding", "share",
           "Share of the targets that were the model's most likely token, on the rows of the step, before its update.",
           chart="accuracy", measure=lambda rows: rows.by_slot(rows.correct.float())),
    Metric("confidence_{slot or clean}", "mean", "decoding", "share",
           "Mean probability of the model's most likely token.",
           measure=lambda rows: rows.by_slot(rows.confidence)),
    Metric("accepted_{threshold}", "mean", "decoding", "tokens per pass",
           "Tokens that decoding would accept of a block whose context is correct: the longest prefix of slots with a "
           "confidence above τ, at least one. It counts confident tokens, correct or not.",
           chart="accepted length", measure=lambda rows: rows.accepted_length(THRESHOLDS)),
    Metric("grad_norm", "last", "optimizer", "", "Norm of the gradient before clipping.",
           Column("grad", 6, _exponent_if_large)),
    Metric("lr", "last", "optimizer", "", "Learning rate.", Column("lr", 7, "{:.1e}".format)),
    Metric("targets", "sum", "data", "", "Targets of blocks in the step."),
    Metric("tokens", "sum", "data", "", "Tokens of the step, padding included."),
    Metric("useful_tokens", "sum", "data", "", "Clean and block tokens of the step, without padding."),
    Metric("documents", "sum", "data", "", "Documents in the step."),
    Metric("step_time", "mean", "speed", "s", "Time per step."),
    Metric("useful_tokens_per_s", "mean", "speed", "tokens/s", "Clean and block tokens per second, without padding.",
           Column("useful/s", 8, format_count), chart="tokens per second"),
    Metric("tokens_per_s", "mean", "speed", "tokens/s", "Tokens per second, with padding.",
           Column("all/s", 6, format_count), chart="tokens per second"),
    Metric("mfu", "mean", "speed", "share",
           "Model FLOPs utilization: share of the devices' bf16 peak that the step's model FLOPs used.",
           Column("mfu", 5, "{:.1%}".format), chart="model FLOPs utilization"),
    Metric("memory_now_gb", "last", "time and memory", "GB", "Memory in use by the first process."),
    Metric("memory_gb", "max", "time and memory", "GB", "Peak memory of the first process.",
           Column("memory", 6, "{:.1f}G".format)),
    Metric("epoch", "last", "data", "", "Epoch of the last row, from 0."),
    Metric("consumed_rows", "last", "data", "", "Rows trained on so far."),
    Metric("eta_s", "last", "speed", "s", "Time left until the last step.", Column("eta", 6, format_duration)),
    Metric("compute_min", "last", "data", "s", "Compute time before the gradient reduction, fastest host."),
    Metric("compute_median", "last", "data", "s", "Compute time before the gradient reduction, median host."),
    Metric("compute_max", "last", "data", "s", "Compute time before the gradient reduction, slowest host."),
    Metric("slowest_host", "last", "data", "", "Name of the slowest host."),
    Metric("data_wait", "mean", "speed", "s", "Time a step waited for its rows."),
    Metric("time_forward_backward", "mean", "time and memory", "s",
           "Forward and backward passes of a step, until its gradients are reduced."),
    Metric("time_reduce", "mean", "time and memory", "s", "Gradient reduction that the backward pass did not hide."),
    Metric("time_update", "mean", "time and memory", "s", "Clipping and optimizer update."),
    Metric("time_read_log", "mean", "time and memory", "s",
           "Reading results and writing log records; on a GPU also the host's time that the device waited for."),
    Metric("time_save", "sum", "time and memory", "s", "Training stopped for a checkpoint."),
    Metric("time_validate", "sum", "time and memory", "s", "Training stopped for validation."),
    Metric("time_samples", "sum", "time and memory", "s", "Training stopped for samples."),
    Metric("gpu_temperature_c", "last", "time and memory", "°C", "Hottest GPU of the first node."),
    Metric("gpu_power_w", "last", "time and memory", "W", "Mean power per GPU of the first node."),
    Metric("gpu_clock_mhz", "last", "time and memory", "MHz", "Slowest SM clock of the first node."),
    Metric("sample_tokens_per_pass", "last", "samples", "", "Tokens per forward pass of the samples."),
    Metric("val_rows", "last", "validation", "", "Held-out rows that were measured."),
]
# fmt: on


def register(metric: Metric) -> None:
    """Appends an entry to the table.

    Raises:
        ValueError: one of its fields already belongs to another entry.
    """
    for field in metric.fields(block_size=1):
        if metric_of(field) is not None:
            raise ValueError(f"the metric {field} is already in the table")
    METRICS.append(metric)


def metric_of(field: str) -> Metric | None:
    """The entry of a field of a log record, of validation too; None for fields outside the table, such as `step`."""
    for name in (field, field.removeprefix(VALIDATION)):
        for metric in METRICS:
            if metric.matches(name):
                return metric
    return None


def tab_of(field: str) -> str:
    """The tab of a field; "data" for fields outside the table."""
    if field.startswith(VALIDATION):
        return "validation"
    metric = metric_of(field)
    return metric.tab if metric is not None else "data"


def device_metrics() -> list[Metric]:
    """Entries with a `measure`, those with the reduction "max" last (parallel/results.py reduces these separately)."""
    measured = [metric for metric in METRICS if metric.measure is not None]
    return sorted(measured, key=lambda metric: metric.reduction == "max")


def fields_by_metric(fields: Iterable[str]) -> Iterator[tuple[Metric, list[str]]]:
    """Entries in the table's order, each with those of `fields` that belong to it, in ascending order of slots."""
    numbered = [(name.endswith("next_token"), [int(n) for n in re.findall(r"\d+", name)], name) for name in set(fields)]
    names = [name for *_, name in sorted(numbered)]  # slots by number, then the clean tokens
    for metric in METRICS:
        if matching := [name for name in names if metric.matches(name)]:
            yield metric, matching
