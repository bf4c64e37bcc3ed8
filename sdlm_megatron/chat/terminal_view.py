"""Live view of an answer in a terminal: text colored by pass, and a line of statistics below it.

A pipe or file gets only the text, as it is decoded; the statistics then go to standard error.
"""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sdlm_megatron.chat.chat_model import Answer
from sdlm_megatron.chat.passes import TextStream, colored, style_of, summary, token_texts
from sdlm_megatron.errors import neutral

REDRAW_S = 0.05  # seconds between redraws; drawing after each pass would slow down the decoding that is timed
SIDE_BY_SIDE = 100  # terminal width, in columns, from which two answers are shown side by side


class LiveAnswer:
    """Shows one answer while it is decoded: `with LiveAnswer(...) as view: ... view.add(tokens) ...`.

    Args:
        console: output; only a terminal gets the live view.
        tokenizer: tokenizer of the model.
        label: text before the live statistics.
        text: False: show only the live statistics, and leave nothing on the screen.
    """

    def __init__(self, console: Console, tokenizer: Any, *, label: str = "", text: bool = True) -> None:
        self._console, self._label, self._show = console, label, text
        self._stream = TextStream(tokenizer)
        self._line = Text()  # the last, unfinished line on the screen
        self._tokens = self._passes = 0
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "LiveAnswer":
        self._started = self._drawn = time.perf_counter()
        if self._live:
            self._live.start()
            self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._show:
            self._write(self._stream.flush())
        if self._live:
            self._live.stop()
        if self._show and self._live:
            self._console.print(self._line, soft_wrap=True)
        elif self._show:
            print(flush=True)

    def add(self, tokens: list[int]) -> None:
        """Adds the tokens of one pass."""
        self._passes += 1
        self._tokens += len(tokens)
        if self._show:
            self._write("".join(self._stream.push(token) for token in tokens))
        if time.perf_counter() - self._drawn >= REDRAW_S:
            self._draw()

    def _write(self, text: str) -> None:
        if not self._live:
            # the stream below the neutral one: a program that reads the answer needs it as it is
            self._console.file.write(text)
            self._console.file.flush()
            return
        self._line.append(printable(text), style_of(self._passes))
        # after a full line, terminals differ in where they put the cursor: one column stays free
        *lines, self._line = self._line.wrap(self._console, self._console.width - 1)
        for line in lines:
            # a finished line is printed above the redrawn part and scrolls up with the rest
            self._live.update(self._picture())
            self._console.print(line, soft_wrap=True)

    def _draw(self) -> None:
        if self._live:
            self._live.update(self._picture(), refresh=True)
            self._drawn = time.perf_counter()

    def _picture(self) -> RenderableType:
        """The redrawn part: the unfinished line and the statistics."""
        seconds = time.perf_counter() - self._started
        statistics = summary(self._tokens, self._passes, seconds) if self._tokens else "reading the prompt"
        status = Text(f"{self._label}{statistics}", style="dim", no_wrap=True, overflow="ellipsis")
        if not self._show:
            return status
        line = self._line.copy()
        line.rstrip()
        return Group(line, status)


def printable(text: str) -> str:
    """`text` with control characters replaced by visible symbols, so that a model cannot control the terminal."""
    return neutral(text.replace("\t", "    ").replace("\r\n", "\n"))


def statistics(answer: Answer, limit: str) -> str:
    """The line below an answer; `limit`: what cuts one that is not complete."""
    text = summary(len(answer.tokens), len(answer.accepted), answer.seconds)
    if answer.interrupted:
        return f"{text} (interrupted)"
    return text if answer.complete else f"{text} (cut at {limit})"


def note(console: Console, text: str) -> None:
    """Prints a remark: dim on a terminal, to standard error if the output is a pipe."""
    if console.is_terminal:
        console.print(Text(neutral(text), style="dim"), soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def comparison(ours: Answer, theirs: Answer) -> str:
    """Whether two answers have the same text, or where they first differ, and the ratio of their tokens per second."""
    speeds = [len(a.tokens) / max(a.seconds, 1e-9) for a in (ours, theirs)]
    verdict = "the texts are equal"
    if ours.text != theirs.text:
        pairs = zip(ours.text, theirs.text, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours.text), len(theirs.text)))
        shown = [_excerpt(a.text, at) for a in (ours, theirs)]
        verdict = f"the texts differ from character {at + 1} on: {shown[0]} against {shown[1]}"
    return f"{verdict}\n{speeds[0] / max(speeds[1], 1e-9):.2f} times the tokens/s of ar"


def _excerpt(text: str, at: int, around: int = 12) -> str:
    rest = printable(text[at : at + around]).replace("\n", "⏎")
    before = printable(text[max(0, at - around) : at]).replace("\n", "⏎")
    return f"“{'…' * (at > around)}{before}[{rest or 'end'}]{'…' * (at + around < len(text))}”"


def show_pair(
    console: Console, tokenizer: Any, answers: tuple[Answer, Answer], names: tuple[str, str], limit: str
) -> None:
    """Shows two answers side by side if the terminal is wide enough, else one below the other."""
    ours, greedy = answers
    tokens = token_texts(tokenizer, ours.tokens, ours.accepted)
    # the greedy answer has one token per pass: colors would carry no information
    texts = (colored({**t, "text": printable(t["text"])} for t in tokens), Text(printable(greedy.text)))
    heads = [Text(name, style="bold") for name in names]
    feet = [Text(statistics(a, limit), style="dim") for a in answers]
    if console.is_terminal and console.width >= SIDE_BY_SIDE:
        table = Table.grid(padding=(0, 3), expand=True)
        table.add_column(ratio=1, overflow="fold")
        table.add_column(ratio=1, overflow="fold")
        for row in (heads, texts, feet):
            table.add_row(*row)
        console.print(table)
    else:
        for head, text, foot in zip(heads, texts, feet, strict=True):
            for part in (head, text, foot):
                console.print(part, soft_wrap=True)
            console.print()
    note(console, comparison(ours, greedy))
