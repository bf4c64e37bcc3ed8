"""Progress of a stage with rate and ETA: a bar in a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Advance(Protocol):
    """Callback that adds `n` finished units with `tokens` tokens.

    `expected`: number of units that an estimated total counted for them; the total is corrected by the difference.
    """

    def __call__(self, n: float = 1, tokens: int = 0, expected: float | None = None) -> None: ...


LINE_EVERY = 5.0
"""Seconds between lines when the output is not a terminal."""


class _Meter:
    """Units done, rate and remaining time of a stage."""

    def __init__(self, title: str, total: float, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.start = time.monotonic()
        self.done, self.tokens = 0.0, 0

    def advance(self, n: float, tokens: int, expected: float | None) -> None:
        self.done, self.tokens = self.done + n, self.tokens + tokens
        self.total += 0 if expected is None else n - expected

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)  # the first call may come within the clock's resolution
        rate = self.done / seconds
        speed = f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"
        if self.tokens:
            speed += f", {self.tokens / seconds / 1e6:.2f} M tokens/s"
        left = int(max(0.0, self.total - self.done) * seconds / max(self.done, 1e-9)) if self.done else 0
        eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}" if self.done else "?"
        return f"{self.done:,.0f}/{self.total:,.0f} {self.unit}, {speed}, ETA {eta}"


@contextmanager
def track(title: str, total: float, unit: str, console: Console) -> Iterator[Advance]:
    """Shows the progress of a stage of `total` units; yields the callback that counts finished ones."""
    meter = _Meter(title, total, unit)
    if not console.is_terminal:
        yield _lines(meter, console)
        return
    texts = [TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[state]}")]
    columns = (texts[0], BarColumn(), TaskProgressColumn(), texts[1])
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(title, total=total, state="")

        def advance(n: float = 1, tokens: int = 0, expected: float | None = None) -> None:
            meter.advance(n, tokens, expected)
            bar.update(task, completed=meter.done, total=meter.total, state=str(meter))

        yield advance


def _lines(meter: _Meter, console: Console) -> Advance:
    shown = meter.start

    def advance(n: float = 1, tokens: int = 0, expected: float | None = None) -> None:
        nonlocal shown
        meter.advance(n, tokens, expected)
        now = time.monotonic()
        # `n`: a call that only corrects the total must not print the last line a second time
        if now - shown >= LINE_EVERY or (meter.done >= meter.total and n):
            shown = now
            console.print(f"{meter.title} {meter}", highlight=False)

    return advance
