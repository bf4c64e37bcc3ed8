"""Progress with an ETA: a bar in a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Advance(Protocol):
    """Reports that `n` more things are done."""

    def __call__(self, n: int = 1) -> None: ...


LINE_EVERY = 5.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def track(title: str, total: int, unit: str, console: Console) -> Iterator[Advance]:
    """Shows how far a stage of `total` things is; yields the function to call as they get done."""
    if not console.is_terminal:
        yield _lines(title, total, unit, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=total)

        def advance(n: int = 1) -> None:
            bar.advance(task, n)

        yield advance


def _lines(title: str, total: int, unit: str, console: Console) -> Advance:
    start = shown = time.monotonic()
    done = 0

    def advance(n: int = 1) -> None:
        nonlocal done, shown
        done += n
        now = time.monotonic()
        if now - shown >= LINE_EVERY or (done >= total and n):
            shown = now
            rate = done / max(now - start, 1e-9)
            eta = max(0, total - done) / max(rate, 1e-9)
            clock = f"{int(eta) // 60:02d}:{int(eta) % 60:02d}"
            console.print(f"{title} {done:,}/{total:,} {unit}, {rate:,.0f} a second, ETA {clock}", highlight=False)

    return advance
