"""Draws the figures of docs/evidence.md and fills its tables from the results of a campaign.

The prose is written by hand: only the text between `<!-- table NAME -->` and `<!-- end -->` is replaced. A table
without results stays as it is, and its name is printed.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from matplotlib.figure import Figure

from dev.evidence.evidence_tables import (
    BASE,
    BLOCKS,
    LEADING,
    RATES,
    SENSITIVE,
    TABLES,
    VARIANTS,
    Campaign,
    markdown,
    read_campaign,
)
from dev.evidence.experiment import TASKS
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import DataError, run_cli
from sdlm_megatron.evaluation.figures import (
    context_figure,
    models_figure,
    overhead_figure,
    quality_figure,
    threshold_figure,
    wall_figure,
)
from sdlm_megatron.evaluation.figures_slots import acceptance_figure, precision_recall_figure, reliability_figure
from sdlm_megatron.evaluation.intervals import Estimate
from sdlm_megatron.evaluation.result_files import Results, perplexities, pick, points
from sdlm_megatron.files import write_text

DOCUMENT = "evidence.md"
NO_RESULTS = "Not measured yet."
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
DPI = 110


def compared_figure(sweeps: Results) -> Figure:
    """One row per model: exact answers at n = 1 and at τ = .98, tokens per pass at τ = .98."""
    panels: dict[str, dict[str, Estimate]] = {}
    for label, seeds in sweeps.items():
        measured = points(seeds)
        plain, fast = pick(measured, "ar"), pick(measured, "prob_conf", 0.98)
        if plain is not None:
            panels.setdefault("exact answers, n = 1", {})[label] = plain.exact
        if fast is not None:
            panels.setdefault("exact answers, τ = .98", {})[label] = fast.exact
            panels.setdefault("tokens per pass, τ = .98", {})[label] = fast.speed
    return models_figure(panels, percent=[name for name in panels if name.startswith("exact")])


def figures(campaign: Campaign) -> Iterator[tuple[str, Figure]]:
    """File name and figure of everything that has results."""
    kinds: list[tuple[str, str, Sequence[str], Callable[[Results], Figure]]] = [
        ("quality", "sweep", LEADING, quality_figure),
        ("threshold", "sweep", LEADING, threshold_figure),
        ("variants", "sweep", VARIANTS, compared_figure),
        ("sensitivity", "sweep", SENSITIVE, compared_figure),
        ("rates", "sweep", RATES, compared_figure),
        ("walltime", "speed", LEADING, wall_figure),
        ("reliability", "calibration", BLOCKS, reliability_figure),
        ("reliability_entropy", "calibration", BLOCKS, lambda results: reliability_figure(results, "entropy")),
        ("precision", "calibration", BLOCKS, precision_recall_figure),
        ("acceptance", "calibration", BLOCKS, acceptance_figure),
        ("context", "context", LEADING, context_figure),
    ]
    for name, kind, arms, draw in kinds:
        for task in TASKS:
            results = campaign.of(task, kind, arms)
            if results:
                yield f"{name}_{task}", draw(results)
    for task in TASKS:  # the cost of a pass does not depend on the task, so the first one is enough
        results = {k: v for k, v in campaign.of(task, "speed", BLOCKS).items() if v[0].get("break_even")}
        if results:
            yield "overhead", overhead_figure(results)
            break
    results = campaign.of("", "perplexity", [BASE, *LEADING])
    if results:
        yield "perplexity", models_figure(perplexities(results), logarithmic=True)


def fill(text: str, campaign: Campaign, where: str) -> tuple[str, list[str]]:
    """The document with its tables replaced, and the names of the tables without results, which stay as they are.

    Raises:
        DataError: the document has a table with an unknown name.
    """
    empty = []

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            near = get_close_matches(name, TABLES, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(TABLES)}"
            raise DataError(f"there is no table {name!r}", where, fix)
        body = markdown(*TABLES[name](campaign))
        if not body:
            empty.append(name)
        return f"{match[1]}\n{body or match[3].strip() or NO_RESULTS}\n\n{match[4]}"

    return MARKED.sub(replace, text), empty


def write_document(campaign: Campaign, docs: Path) -> None:
    """Writes DOCS/evidence/*.png and the tables in DOCS/evidence.md, and prints the names of missing results."""
    document = docs / DOCUMENT
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"the document cannot be read: {error}", str(document), "name the folder docs") from None
    filled, empty = fill(text, campaign, str(document))
    pictures = docs / "evidence"
    pictures.mkdir(exist_ok=True)
    for name, figure in figures(campaign):
        path = pictures / f"{name}.png"
        # Without the metadata the same results always give the same bytes.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        print(path, flush=True)
    write_text(document, filled)
    print(document)
    if empty:
        print(f"no results yet for: {', '.join(empty)}")
    shown = set(re.findall(r"\]\(evidence/([\w.]+\.png)\)", text))
    missing = sorted(name for name in shown if not (pictures / name).exists())
    if missing:
        print(f"missing pictures: {', '.join(missing)}")


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.evidence.document", __doc__, example="python -m dev.evidence.document runs/evidence --out docs"
    )
    parser.add_argument("campaign", type=Path, metavar="DIR", help="what dev.evidence.train_arms and .measure wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DOCS", help="folder of evidence.md")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    write_document(read_campaign(args.campaign), args.out)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
