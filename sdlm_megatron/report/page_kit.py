"""HTML pages with sections, tables and figures in one file that loads nothing over the network.

    page = Page("Run default")
    section = page.section("speed", "Speed")
    section.text("Tokens per second, averaged over the steps of a log record.")
    section.table(["", "tokens/s"], [["useful", "450"]])
    section.figure(figure, "tokens per second by step")
    page.write(Path("report.html"))

All markup is in templates/page.html.jinja and all style in templates/page.css. Every string is escaped. Tables and
figures scroll inside a narrow window, so that a page is readable on a phone.
"""

import base64
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from sdlm_megatron.errors import UserError, markdown, neutral
from sdlm_megatron.files import make_folder, write_text
from sdlm_megatron.report.plots import show_plainly

Cells = Iterable[Sequence[object]]


@dataclass
class PageSection:
    """One box of a page: a heading and its parts, in the order in which they were added.

    `parts` are mappings with a `kind`, which templates/page.html.jinja turns into markup.
    """

    name: str
    """The anchor: page.html#name."""
    heading: str
    """Empty: no heading."""
    parts: list[dict[str, Any]] = field(default_factory=list)

    def _add(self, kind: str, **values: Any) -> None:
        self.parts.append({"kind": kind, **values})

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add("text", text=text)

    def note(self, text: str) -> None:
        """A paragraph in small grey print: sources, sample sizes, exceptions."""
        self._add("note", text=text)

    def subheading(self, text: str) -> None:
        """A heading below the section's own."""
        self._add("subheading", text=text)

    def table(
        self, head: Sequence[str], rows: Cells, *, align: Literal["right", "left"] = "right", total: bool = False
    ) -> None:
        """A table whose first column names the rows.

        Args:
            head: column names; all empty: no header line.
            rows: cells, shown with str().
            align: of all columns but the first: right for numbers, left for text.
            total: the last row is a total, and set in bold.
        """
        lines = [[str(cell) for cell in row] for row in rows]
        self._add("table", head=list(head), rows=lines, align=align, total=total)

    def facts(self, facts: Mapping[str, object]) -> None:
        """Names and values, one pair per line."""
        self._add("facts", facts={name: str(value) for name, value in facts.items()})

    def cards(self, cards: Iterable[tuple[str, str]]) -> None:
        """Large figures with a caption each, as (figure, caption)."""
        self._add("cards", cards=list(cards))

    def figure(self, figure: Figure, description: str) -> None:
        """A matplotlib figure as an inline image; `description` is its alternative text."""
        # PNG at twice the usual density is sharp on phones, and unlike inline SVG has no ids that could clash
        buffer = io.BytesIO()
        show_plainly(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # shown as a box: a name may be in any script
            figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        # Text of 9 points is at least 8 pixels high: a wide figure scrolls on a phone, and a narrow one fits.
        width = int(62 * figure.get_figwidth())
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        self._add("figure", data=data, description=description, least=width, most=2 * width)

    def details(self, summary: str, text: str) -> None:
        """Preformatted text that is folded away under `summary` until it is clicked."""
        self._add("details", summary=summary, text=text)

    def preformatted(self, text: str) -> None:
        """Text in a fixed-width font, line breaks kept."""
        self._add("preformatted", text=text)

    def answer(self, prompt: str, passes: Sequence[tuple[int, Sequence[str]]]) -> None:
        """A decoded answer, one colored box per forward pass.

        Args:
            prompt: the text before the answer.
            passes: the number of each pass and the tokens it produced.
        """
        self._add("answer", prompt=prompt, passes=[(number, list(tokens)) for number, tokens in passes])


@dataclass
class Page:
    """A page: a title and sections, in the order in which they were added. Sections without parts are not shown."""

    title: str
    sections: list[PageSection] = field(default_factory=list)

    def section(self, name: str, heading: str = "") -> PageSection:
        """Appends an empty section and returns it."""
        self.sections.append(PageSection(name, heading))
        return self.sections[-1]

    def html(self) -> str:
        """The page as one HTML document."""
        shown = [section for section in self.sections if section.parts]
        return _template("page.html.jinja").render(title=self.title, sections=shown)

    def markdown(self) -> str:
        """Headings, text and tables as Markdown, aligned so that it can be read in a terminal as it is."""
        lines = [f"# {markdown(self.title)}", ""]
        for section in self.sections:
            lines += [f"## {markdown(section.heading)}", ""] if section.heading else []
            for part in section.parts:
                lines += [*_markdown_lines(part), ""]
        return "\n".join(lines).rstrip() + "\n"

    def write(self, path: Path) -> None:
        """Replaces `path` by the HTML document; its folder is created if it does not exist."""
        if path.is_dir():
            raise UserError("the page cannot replace a folder", str(path), "name a file, such as index.html")
        make_folder(path.parent)
        write_text(path, self.html())


def markdown_table(head: Sequence[str], rows: Cells) -> list[str]:
    """The lines of a Markdown table, padded so that columns align; the first column is left-aligned."""
    lines = [[markdown(str(cell)) for cell in row] for row in [head, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])} |"

    marks = [f"{'-' * (widths[0] + 2)}", *(f"{'-' * (width + 1)}:" for width in widths[1:])]
    return [row(lines[0]), f"|{'|'.join(marks)}|", *map(row, lines[1:])]


def _markdown_lines(part: Mapping[str, Any]) -> list[str]:
    match part["kind"]:
        case "text" | "note":
            return [markdown(part["text"])]
        case "subheading":
            return [f"### {markdown(part['text'])}"]
        case "table":
            return markdown_table(part["head"], part["rows"])
        case kind:
            raise ValueError(f"{kind} parts have no Markdown form")


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("sdlm_megatron.report"),
        autoescape=True,
        # the type stays: text that is escaped already must not be escaped again
        finalize=lambda value: type(value)(neutral(value)) if isinstance(value, str) else value,
        undefined=StrictUndefined,  # a misspelled field fails instead of showing nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
