"""Console output of a run: one line per log record, with the columns of metrics/metric_table.py.

Lines are at most 120 characters wide for block sizes up to 8:

 step    loss   slot1  slot2  slot3  slot4    grad       lr  useful/s    all/s  memory     eta
12/58  1.2346   0.513  1.002  1.410  1.780    1.21  3.0e-04     1.20k    1.51k    3.2G   2m41s
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

from sdlm_megatron.metrics.metric_table import METRICS, Column, Metric

_HEADER_EVERY = 50
"""Lines between repetitions of the column headings."""
_MAX_SLOTS = 8
"""Slots shown; more do not fit into 120 characters."""
Record = Mapping[str, float | int | str]


@dataclass(frozen=True)
class _Cell:
    field: str
    heading: str
    width: int
    text: Callable[[float], str]
    gap: str
    """Text between this cell and the one on its left."""


class Console:
    """Prints the log records of a run: a legend once, the column headings every 50 lines, one line per record.

    Args:
        steps: steps of the whole run.
        block_size: D, the number of slots.
        show_next_token: whether clean tokens are trained too (diffusion.next_token_weight).
        show_mfu: whether the device's peak FLOPs are known; without them the column is left out.
        stream: where to print; default stdout.
    """

    def __init__(
        self,
        *,
        steps: int,
        block_size: int,
        show_next_token: bool = False,
        show_mfu: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream or sys.stdout
        self._lines = 0
        self._steps = steps
        self._step_width = max(2 * len(str(steps)) + 1, 5)
        slots = min(block_size, _MAX_SLOTS - show_next_token)
        # if not all slots fit: the first ones and the last, which is the hardest
        self._slots = [*range(1, slots), block_size]
        self._digits, self._gap = (3, "  ") if slots <= 4 else (2, " ")
        hidden = {name for name, shown in (("mfu", show_mfu), ("loss_next_token", show_next_token)) if not shown}
        self._columns = [(m, m.column) for m in METRICS if m.column is not None and m.name not in hidden]
        self._cells = [cell for metric, column in self._columns for cell in self._cells_of(metric, column)]

    def _cells_of(self, metric: Metric, column: Column) -> list[_Cell]:
        if not metric.by_slot:
            return [_Cell(metric.name, column.heading, column.width, column.text, self._gap)]
        cells = []
        for slot in self._slots:
            field, heading = metric.name.replace("{slot}", str(slot)), f"{column.heading}{slot}"
            width = max(self._digits + 3, len(heading))
            gap = self._gap if slot == self._slots[0] else " "
            cells.append(_Cell(field, heading, width, f"{{:.{self._digits}f}}".format, gap))
        return cells

    def legend(self) -> str:
        """The meaning of the columns; printed once before the first line."""
        entries = [("step", "Step and last step of the run. '-' in a column: not measured in this step.")]
        for metric, column in self._columns:
            many = f"1-{self._slots[-1]}" if metric.by_slot else ""
            entries.append((column.heading + many, metric.explanation))
        width = max(len(heading) for heading, _ in entries)
        return "\n".join(f"  {heading.ljust(width)}  {text}" for heading, text in entries)

    def names(self) -> str:
        """The column headings, aligned with `line`."""
        cells = [cell.gap + cell.heading.rjust(cell.width) for cell in self._cells]
        return "step".rjust(self._step_width) + "".join(cells)

    def line(self, record: Record) -> str:
        """One record as one line; fields that are absent show as "-"."""
        # the record knows the steps of its own schedule, which a resume may have changed
        step = f"{record['step']}/{record.get('steps', self._steps)}".rjust(self._step_width)
        return step + "".join(cell.gap + _text(record.get(cell.field), cell) for cell in self._cells)

    def log(self, step: int, record: Record) -> None:
        """Prints the line of a record, preceded by legend and column headings where they are due."""
        if self._lines == 0:
            print(f"columns:\n{self.legend()}", file=self._stream)
        if self._lines % _HEADER_EVERY == 0:
            print(self.names(), file=self._stream)
        self._lines += 1
        print(self.line({"step": step, **record}), file=self._stream, flush=True)


def _text(value: float | str | None, cell: _Cell) -> str:
    shown = cell.text(value) if isinstance(value, (int, float)) else "-"
    return shown.rjust(cell.width)
