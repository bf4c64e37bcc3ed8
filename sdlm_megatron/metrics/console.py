"""One line a step on the console, at most 120 columns for block sizes up to 8.

 step    loss   slot1  slot2  slot3  slot4    grad       lr  useful/s    all/s  memory     eta
12/58  1.2346   0.513  1.002  1.410  1.780    1.21  3.0e-04     1.20k    1.51k    3.2G   2m41s
"""

import math
import sys
from collections.abc import Mapping
from typing import TextIO

_REPEAT_NAMES = 50
_MOST_SLOTS = 8
Record = Mapping[str, float | int | str]


def format_count(value: float) -> str:
    """At most 5 characters: 12345 -> "12.3k", 1.5e6 -> "1.50M"."""
    for limit, divisor, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G")):
        if value < limit * 0.9995:
            scaled = value / divisor
            if not unit:
                return f"{scaled:.0f}"
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0e}"


def format_duration(seconds: float) -> str:
    """Seconds to "41s", "2m41s", "12h03m", "3d04h"; "?" when it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


class Console:
    """Prints the log records of a run: a legend once, the column names every 50 lines, one line a record.

    Args:
        steps: steps of the whole run.
        block_size: D, the number of slots.
        show_next_token: whether clean tokens are trained too (diffusion.next_token_weight).
        show_mfu: whether the device's peak is known; without it the column is left out.
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
        self._show_next_token, self._show_mfu = show_next_token, show_mfu
        self._lines = 0
        shown = min(block_size, _MOST_SLOTS - show_next_token)
        # more slots than fit: the first ones and the last, which is the hardest
        self._slots = [*range(1, shown), block_size]
        self._slot_digits, self._gap = (3, "  ") if shown <= 4 else (2, " ")
        self._step_width = max(2 * len(str(steps)) + 1, 5)
        self._steps = steps

    def _slot_width(self, slot: int) -> int:
        return max(self._slot_digits + 3, len(f"slot{slot}"))

    def legend(self) -> str:
        """What the columns mean; printed once before the first line."""
        last = self._slots[-1]
        text = [
            "loss: mean over all targets of the step; "
            f"slot1 is next-token prediction, slot{last} looks {last} tokens ahead (- = no target)",
            "grad: norm before clipping; useful/s: tokens of documents and blocks a second; all/s: with padding",
        ]
        if self._show_next_token:
            text.append("clean: plain next-token loss of clean tokens, unweighted; loss has it with its weight")
        if self._show_mfu:
            text.append("mfu: share of the devices' bf16 peak that the step's model FLOPs used")
        return "\n".join(text)

    def names(self) -> str:
        """The column names, aligned with `line`."""
        cells = ["step".rjust(self._step_width), "loss".rjust(7)]
        cells.append(" ".join(f"slot{j}".rjust(self._slot_width(j)) for j in self._slots))
        cells += ["clean".rjust(self._slot_digits + 3)] * self._show_next_token
        cells += ["grad".rjust(6), "lr".rjust(7), "useful/s", "all/s".rjust(6)]
        cells += ["mfu".rjust(5)] * self._show_mfu + ["memory", "eta".rjust(6)]
        return self._gap.join(cells)

    def line(self, record: Record) -> str:
        """One record as one line; fields that are absent show as "-"."""

        def cell(key: str, spec: str, width: int) -> str:
            value = record.get(key)
            text = "-" if not isinstance(value, (int, float)) else format(value, spec)
            return text.rjust(width)

        digits = self._slot_digits
        cells = [
            f"{record['step']}/{record.get('steps', self._steps)}".rjust(self._step_width),
            cell("loss", ".4f", 7),
            " ".join(cell(f"loss_pos_{j}", f".{digits}f", self._slot_width(j)) for j in self._slots),
            *[cell("loss_next_token", f".{digits}f", digits + 3)] * self._show_next_token,
            cell("grad_norm", ".2f", 6) if float(record.get("grad_norm", 0)) < 1000 else cell("grad_norm", ".0e", 6),
            cell("lr", ".1e", 7),
            format_count(float(record.get("useful_tokens_per_s", 0))).rjust(8),
            format_count(float(record.get("tokens_per_s", 0))).rjust(6),
        ]
        if self._show_mfu:
            cells.append(cell("mfu", ".1%", 5))
        memory, eta = record.get("memory_gb"), record.get("eta_s")
        cells.append(("-" if memory is None else f"{float(memory):.1f}G").rjust(6))
        cells.append(("-" if eta is None else format_duration(float(eta))).rjust(6))
        return self._gap.join(cells)

    def log(self, step: int, record: Record) -> None:
        """Prints the line of a record, with legend and column names where they are due."""
        if self._lines == 0:
            print(self.legend(), file=self._stream)
        if self._lines % _REPEAT_NAMES == 0:
            print(self.names(), file=self._stream)
        self._lines += 1
        print(self.line({"step": step, **record}), file=self._stream, flush=True)
