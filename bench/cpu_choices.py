"""Two choices made for the CPU, measured side by side: attention of a short document, and the Adam kernel.

`python -m bench.cpu_choices` prints the median of several runs; results are kept in docs/benchmarks.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from sdlm_megatron.model.attention_masked import attend


def median_ms(function: Callable[[], object], runs: int) -> float:
    """Median wall time in ms after two runs that are not counted."""
    times = []
    for i in range(runs + 2):
        started = time.perf_counter()
        function()
        if i >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def attention(runs: int, tokens: int, heads: int, dim: int) -> list[tuple[str, float]]:
    """Forward and backward of one short document under a dense mask."""
    rows = []
    mask = torch.rand(tokens, tokens) > 0.5
    mask[:, 0] = True
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(tokens, heads, dim, dtype=dtype, requires_grad=True) for _ in range(3))

        def ours(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            attend(q, k, v, mask, dim**-0.5).sum().backward()

        def flash(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
            scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

        name = str(dtype).removeprefix("torch.")
        rows += [(f"{name}, two matrix products (ours)", median_ms(ours, runs))]
        rows += [(f"{name}, scaled_dot_product_attention", median_ms(flash, runs))]
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


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu_choices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m bench.cpu_choices --runs 20",
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {args.runs} runs")
    print("attention, 190 tokens, 9 heads of 64, forward and backward")
    for name, ms in attention(args.runs, 190, 9, 64):
        print(f"  {name:44} {ms:9.2f} ms")
    print("AdamW, 53 M parameters in 30 tensors")
    for name, ms in adam(args.runs, 30, 1769472):
        print(f"  {name:44} {ms:9.1f} ms")


if __name__ == "__main__":
    main()
