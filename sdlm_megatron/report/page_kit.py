"""The report's style sheet and pieces: one column, system fonts, pictures and tables that scroll in narrow windows."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from matplotlib.figure import Figure

CSS = """
:root { --ink: #1f2933; --soft: #6b7785; --line: #e3e8ee; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 12px 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 10px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 0 0 16px; }
p { margin: 0 0 10px; }
figure { margin: 8px 0 0; overflow-x: auto; }
figure + p { margin-top: 18px; }
img { display: block; width: 100%; min-width: 520px; height: auto; }
.wide { overflow-x: auto; margin: 0 0 10px; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-top: 1px solid var(--line); }
tr:first-child th, tr:first-child td { border-top: 0; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 600; }
tbody tr:first-child th, tbody tr:first-child td { border-top: 1px solid var(--line); }
.facts th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.facts tr:first-child th, .facts tr:first-child td { border-top: 0; }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre, .answer, .prompt { font: .9rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 8px 0 0; overflow-x: auto; background: #f4f6f8; border-radius: 6px; padding: 10px 12px; }
.prompt { border-left: 3px solid var(--line); padding-left: 10px; white-space: pre-wrap; }
.answer { line-height: 2.5; overflow-wrap: anywhere; }
.pass { display: inline; padding: 4px 2px; margin: 0 2px; border-radius: 5px; border: 1px solid rgba(0, 0, 0, .13);
  white-space: pre-wrap; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.pass i { font-style: normal; }
.pass i + i { border-left: 1px dotted rgba(0, 0, 0, .35); }
.pass sub { color: var(--soft); font-size: .62rem; line-height: 0; padding-left: 3px; }
.p0 { background: #dce9f8; } .p1 { background: #fde6d3; } .p2 { background: #d9f0e6; }
.p3 { background: #f6dce8; } .p4 { background: #e8e0f6; } .p5 { background: #f1eccb; }
summary { cursor: pointer; }
@media (max-width: 560px) { main { padding: 12px 8px 40px; } section { padding: 14px 12px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def page(heading: str, sections: Sequence[str]) -> str:
    """A whole page that fetches nothing."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{CSS}</style></head>\n"
        f"<body><main><h1>{escape(heading)}</h1>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def section(name: str, heading: str, body: str) -> str:
    """One box of the page."""
    return f'<section id="{name}"><h2>{escape(heading)}</h2>{body}</section>'


def image(figure: Figure, alt: str) -> str:
    """A figure as an inline picture. PNG at twice the size: sharp on dense screens, and no ids that could clash."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column names the rows."""
    names = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = "".join(
        f"<tr><th>{escape(str(first))}</th>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    body = f'<table class="numbers"><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="wide">{body}</div>'
