"""Choices made for the CPU, measured side by side: attention of a short document, its products, the Adam kernel.

`python -m dev.bench.cpu_choices` prints the median of several runs; results are kept in docs/benchmarks.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.errors import run_cli
from sdlm_megatron.model.attention.masked import PerDocument


def median_ms(function: Callable[[], object], runs: int) -> float:
    """Median wall time in ms after two runs that are not counted."""
    times = []
    for i in range(runs + 2):
        started = time.perf_counter()
        function()
        if i >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def attention(runs: int, clean: int, blocks: int, heads: int, dim: int) -> list[tuple[str, float]]:
    """Forward and backward of one short document with blocks of 4."""
    rows = []
    starts = np.arange(clean - 2 - blocks, clean - 2, dtype=np.int32)
    _, layout = pack_row([(0, np.zeros(clean, np.int32), starts)], block_size=4, mask_token_id=0)
    ours, mask = PerDocument(layout, layout.used, causal_attn=False), torch.from_numpy(visible_row(layout, layout.used))
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(layout.used, heads, dim, dtype=dtype, requires_grad=True) for _ in range(3))

        def pieces(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            ours(q, k, v, dim**-0.5).sum().backward()

        def flash(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
            scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

        name = str(dtype).removeprefix("torch.")
        rows += [(f"{name}, matrix products piece by piece (ours)", median_ms(pieces, runs))]
        rows += [(f"{name}, scaled_dot_product_attention", median_ms(flash, runs))]
    return rows


def turned(runs: int) -> list[tuple[str, float]]:
    """Products with a wide operand turned, as it lies in memory, or with the narrow one copied instead."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        wide, narrow = torch.randn(2, 1024, 1200, dtype=dtype), torch.randn(2, 1024, 64, dtype=dtype)

        def as_it_lies(wide: torch.Tensor = wide, narrow: torch.Tensor = narrow) -> torch.Tensor:
            return torch.bmm(wide.transpose(1, 2), narrow)

        def copied(wide: torch.Tensor = wide, narrow: torch.Tensor = narrow) -> torch.Tensor:
            return torch.bmm(narrow.transpose(1, 2).contiguous(), wide).transpose(1, 2)

        name = str(dtype).removeprefix("torch.")
        rows += [(f"{name}, narrow operand turned (ours)", median_ms(copied, runs))]
        rows += [(f"{name}, wide operand turned", median_ms(as_it_lies, runs))]
    return rows


def adam(runs: int, tensors: int, size: int) -> list[tuple[str, float]]:
    """One AdamW step in fp32."""
    rows = []
    for name, options in (
        ("one-pass kernel (ours)", {"fused": True}),
        ("loop", {"foreach": False}),
        ("foreach", {"foreach": True}),
    ):
        parameters = [torch.nn.Parameter(torch.randn(size)) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.randn(size)
        rows.append((name, median_ms(torch.optim.AdamW(parameters, **options).step, runs)))  # type: ignore[arg-type]
    return rows


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.cpu_choices", __doc__, example="python -m dev.bench.cpu_choices --runs 20"
    )
    parser.add_argument("--runs", type=int, default=10, help="runs of which the median is reported")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {args.runs} runs")
    print("attention, 62 clean tokens and 32 blocks of 4, 9 heads of 64, forward and backward")
    for name, ms in attention(args.runs, 62, 32, 9, 64):
        print(f"  {name:44} {ms:9.2f} ms")
    print("gradient of keys: 2 x (1024 x 1200)^T times 1024 x 64")
    for name, ms in turned(args.runs):
        print(f"  {name:44} {ms:9.2f} ms")
    print("AdamW, 53 M parameters in 30 tensors")
    for name, ms in adam(args.runs, 30, 1769472):
        print(f"  {name:44} {ms:9.1f} ms")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
