"""Fill and speed of the packing on simulated lengths: `python -m dev.bench.packing_speed`.

Lengths as the mixture has them: lognormal with a mean of 663 clean tokens, 68 % of them answers; blocks as a build
gives them (D 4, repeat 3, at most 5632 tokens a document). Next-fit, which keeps one row open, is the comparison.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_prep.build_config import BuildConfig
from data_prep.packing import BestFit
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli

WINDOW = BuildConfig().window


def lengths(
    n: int, sigma: float, *, seed: int = 0, block_size: int = 4, repeat: int = 3, cap: int = 5632
) -> np.ndarray:
    """Expanded lengths of n documents, int64 (about n,): those too long for a block are left out."""
    drawn = np.random.default_rng(seed).lognormal(np.log(663) - sigma**2 / 2, sigma, n)
    clean = np.maximum(20, drawn).astype(np.int64)
    answers = (0.68 * clean).astype(np.int64)
    blocks = np.minimum(np.minimum(cap - clean, repeat * answers) // block_size, answers)
    return (clean + block_size * blocks)[blocks > 0]


def next_fit(sizes: np.ndarray, row_length: int) -> int:
    """Rows that next-fit needs."""
    rows, room = 0, 0
    for size in sizes.tolist():
        if size > room:
            rows, room = rows + 1, row_length
        room -= size
    return rows


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.packing_speed", __doc__, example="python -m dev.bench.packing_speed --documents 200000"
    )
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents to pack")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    table = Table(*("row length", "sigma", "fill", "next-fit", "seconds", "s per M documents"), box=SIMPLE_HEAD)
    for row_length in (5632, 8192, 16384):
        for sigma in (0.6, 0.8, 1.0):
            sizes = lengths(args.documents, sigma)
            packer, start = BestFit(row_length), time.process_time()
            parts = [packer.add(sizes[at : at + WINDOW]) for at in range(0, len(sizes), WINDOW)]
            parts.append(packer.finish())
            seconds = time.process_time() - start
            documents = np.concatenate([part.documents for part in parts])
            counts = np.concatenate([part.counts for part in parts])
            used = np.bincount(np.repeat(np.arange(len(counts)), counts), weights=sizes[documents])
            assert (np.sort(documents) == np.arange(len(sizes))).all(), "every document is in one row"
            assert used.max() <= row_length, "no row is too long"
            fill, worse = (sizes.sum() / (n * row_length) for n in (len(counts), next_fit(sizes, row_length)))
            speed = f"{seconds / len(sizes) * 1e6:.2f}"
            table.add_row(f"{row_length}", f"{sigma}", f"{fill:.4f}", f"{worse:.4f}", f"{seconds:.2f}", speed)
    Console(width=100).print(table)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
