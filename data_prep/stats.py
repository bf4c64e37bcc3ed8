"""Writes an HTML page about a packed dataset: `python -m data_prep.stats DATASET`.

Tokens, slots, duplicates and what became of the input rows are exact, from the manifest. What belongs to single
documents and rows (lengths, anchors, fill) is counted on rows taken at even distances from the first epoch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from data_prep.row_rules import Facts, read_row
from data_prep.stats_page import Sample, page
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.errors import DataError, run_cli
from sdlm_megatron.files import write_text
from sdlm_megatron.progress import track

SAMPLE = 20_000
"""Rows that are read unless more are asked for."""


def take_sample(dataset: PackedDataset, rows: int, console: Console) -> Sample:
    """Reads `rows` rows at even distances, or all if there are no more."""
    facts, total = Facts.of(dataset.manifest), dataset.rows(0)
    numbers = np.unique(np.linspace(0, total - 1, min(rows, total)).astype(np.int64)).tolist()
    found: list[np.ndarray] = []
    used, documents = [], []
    with track("read", len(numbers), "rows", console) as advance:
        for number in numbers:
            tokens, layout = dataset.read(0, number)
            row = read_row(tokens, layout, facts, 0)
            used.append(layout.used)
            documents.append(layout.n_docs)
            found.append(np.stack([layout.clean_lens, layout.n_blocks, row.n_anchors]).astype(np.int64))
            advance(1, layout.used)
    return Sample(total, np.array(used), np.array(documents), *np.concatenate(found, axis=1))


def write_stats(path: str | Path, out: Path, console: Console | None = None, *, rows: int = SAMPLE) -> Sample:
    """Writes the page.

    Args:
        path: the dataset.
        out: HTML file to write; it needs no other file.
        console: where progress goes.
        rows: rows to read.

    Raises DataError when the folder is no dataset, or a row is damaged.
    """
    console = console or Console()
    dataset = PackedDataset(path)
    if "accounting" not in dataset.manifest:
        raise DataError("the manifest says nothing of the input rows", str(path), "build it with data_prep.build")
    sample = take_sample(dataset, rows, console)
    write_text(out, page(dataset.path.name, dataset.manifest, sample))
    return sample


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm stats", __doc__, example="sdlm stats DATA --out=stats.html")
    parser.add_argument("dataset", help="folder that `python -m data_prep.build` wrote")
    parser.add_argument("--out", type=Path, default=Path("stats.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=SAMPLE, metavar="N", help="rows to read (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows is {args.rows}: give a number above 0")
    console = Console()
    sample = write_stats(args.dataset, args.out, console, rows=args.rows)
    console.print(
        f"{args.out}: lengths, anchors and fill from {len(sample.used):,} of {sample.rows:,} rows, the rest exact",
        highlight=False,
        markup=False,
    )


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
