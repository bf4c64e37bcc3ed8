"""Fill and speed of the packing on simulated lengths of the mixture, compared with next-fit (one open row).

Lengths are lognormal with the mixture's mean; blocks as a build makes them (D = 4, repeat 3, at most 5,632 tokens per
document).
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.build_config import BuildConfig
from data_prep.packing import BestFit
from dev.bench.timing import print_table
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli

WINDOW = BuildConfig().window


def expanded_lengths(n: int, sigma: float) -> np.ndarray:
    """Expanded lengths of n documents, int64 (about n,): documents without room for a block are dropped."""
    drawn = np.random.default_rng(0).lognormal(np.log(663) - sigma**2 / 2, sigma, n)
    clean = np.maximum(20, drawn).astype(np.int64)
    answers = (0.68 * clean).astype(np.int64)
    blocks = np.minimum(np.minimum(5632 - clean, 3 * answers) // 4, answers)
    return (clean + 4 * blocks)[blocks > 0]


def next_fit(sizes: np.ndarray, row_length: int) -> int:
    """Number of rows that next-fit needs."""
    rows, room = 0, 0
    for size in sizes.tolist():
        if size > room:
            rows, room = rows + 1, row_length
        room -= size
    return rows


def packing_rows(documents: int) -> Iterator[Sequence[str]]:
    """Packs all cases; raises AssertionError if a document is lost or a row is too long."""
    for row_length in (5632, 8192, 16384):
        for sigma in (0.6, 0.8, 1.0):
            sizes = expanded_lengths(documents, sigma)
            packer, start = BestFit(row_length), time.process_time()
            parts = [packer.add(sizes[at : at + WINDOW]) for at in range(0, len(sizes), WINDOW)]
            parts.append(packer.finish())
            seconds = time.process_time() - start
            order = np.concatenate([part.documents for part in parts])
            counts = np.concatenate([part.counts for part in parts])
            used = np.bincount(np.repeat(np.arange(len(counts)), counts), weights=sizes[order])
            assert (np.sort(order) == np.arange(len(sizes))).all(), "every document is in exactly one row"
            assert used.max() <= row_length, "no row is too long"
            fill, baseline = (sizes.sum() / (n * row_length) for n in (len(counts), next_fit(sizes, row_length)))
            speed = f"{seconds / len(sizes) * 1e6:.2f}"
            yield f"{row_length}", f"{sigma}", f"{fill:.4f}", f"{baseline:.4f}", speed


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.bench.packing_speed"
    parser = make_parser(command, __doc__, example=f"{command} --documents 200000")
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents to pack in each case")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    print_table(("row length", "sigma", "fill", "next-fit", "s per M documents"), packing_rows(args.documents))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
