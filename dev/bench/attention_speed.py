"""Attention backends side by side on one packed row as the training mixture makes them.

Each line of the table is a backend: time of the forward pass and of forward and backward together, TFLOP/s counted on
visible (query, key) pairs only (4 * heads * dim FLOPs a pair forward, 2.5 times that backward), and the peak of the
tensors it allocates. Document lengths are lognormal with the mixture's mean; results are kept in docs/benchmarks.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from dev.bench.measure import peak_bytes
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.diffusion.layout import RowLayout, block_count, draw_starts, pack_row
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.errors import run_cli
from sdlm_megatron.model.attention.choice import LIBRARY_ERRORS, gpu_kernels
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.decomposed import Decomposed
from sdlm_megatron.model.attention.flex import Flex
from sdlm_megatron.model.attention.masked import Dense, PerDocument
from sdlm_megatron.model.attention.varlen import TorchKernel, VarlenKernel
from sdlm_megatron.weights.dtypes import PRECISIONS

MEAN_CLEAN, SPREAD, RESPONSE_SHARE, REPEAT = 663, 0.8, 0.68, 3
Backend = tuple[str, Callable[[RowLayout, int], RowAttention]]


def mixture_row(tokens: int, block_size: int, seed: int) -> RowLayout:
    """A row filled with documents until one does not fit."""
    rng, room = np.random.default_rng(seed), tokens
    documents: list[tuple[int, np.ndarray, np.ndarray]] = []
    while True:
        clean = max(16, int(rng.lognormal(np.log(MEAN_CLEAN) - SPREAD**2 / 2, SPREAD)))
        anchors = np.arange(clean - int(RESPONSE_SHARE * clean), clean - 1)
        blocks = block_count(clean, len(anchors), tokens, block_size, REPEAT)
        if clean + blocks * block_size > room:
            if documents:
                return pack_row(documents, block_size=block_size, mask_token_id=0)[1]
            continue
        starts = draw_starts(anchors, blocks, seed=seed, epoch=0, document=len(documents))
        documents.append((len(documents), np.zeros(clean, np.int32), starts))
        room -= clean + blocks * block_size


def backends(device: torch.device, dtype: torch.dtype, *, dense: bool) -> Iterator[Backend | str]:
    """What can run here; a text for what is installed and cannot. Kernels are switched on one after the other."""
    if dense:
        yield "dense", partial(Dense, causal_attn=False)
    yield "per_document", partial(PerDocument, causal_attn=False)
    if device.type == "cpu":
        yield decomposed(TorchKernel())
        return
    yield "flex", partial(Flex, causal_attn=False)
    for kernel in gpu_kernels() if dtype is not torch.float32 else ():
        yield kernel if isinstance(kernel, str) else decomposed(kernel)


def decomposed(kernel: VarlenKernel) -> Backend:
    """`decomposed` over this kernel."""
    return f"decomposed, {kernel.name}", lambda layout, _: Decomposed(layout, kernel, causal_attn=False)


def median_ms(function: Callable[[], object], runs: int, device: torch.device) -> float:
    """Median time after three runs that are not counted; on a GPU by its own clock."""
    times = []
    for i in range(runs + 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end)
        else:
            started = time.perf_counter()
            function()
            took = (time.perf_counter() - started) * 1e3
        if i >= 3:
            times.append(took)
    return statistics.median(times)


def measure(row: RowAttention, values: list[torch.Tensor], runs: int, device: torch.device) -> tuple[float, float, int]:
    """Forward ms, forward and backward ms, peak bytes, for values = q, k, v and the output's gradient."""
    q, k, v = (x.requires_grad_() for x in values[:3])
    scale = q.shape[-1] ** -0.5

    def both() -> None:
        torch.autograd.grad(row(q, k, v, scale), (q, k, v), values[3])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return row(q, k, v, scale)

    return median_ms(forward, runs, device), median_ms(both, runs, device), peak_bytes(both, device)


def table(layout: RowLayout, heads: int, kv_heads: int, args: argparse.Namespace, device: torch.device) -> None:
    """Measures every backend at one head shape and prints."""
    dtype = PRECISIONS[args.dtype]
    pairs = visible_pairs(layout)
    flops = 4 * heads * args.dim * pairs
    shape = f"{heads} heads, {kv_heads} KV heads of {args.dim}, {args.dtype}"
    print(f"\n{shape}; {flops * 3.5 / 1e12:.3g} TFLOP forward and backward")
    print(f"{'backend':48} {'forward':>10} {'fwd + bwd':>10} {'TFLOP/s':>8} {'of bwd':>7} {'peak':>9}")
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    values = [torch.randn(args.tokens, n, args.dim, generator=generator).to(device, dtype) for n in sizes]
    for backend in backends(device, dtype, dense=args.dense):
        if isinstance(backend, str):
            print(backend)
            continue
        name, build = backend
        try:
            forward, both, peak = measure(build(layout, args.tokens).to(device), values, args.runs, device)
        except LIBRARY_ERRORS as error:
            print(f"{name:48} {str(error).splitlines()[0]}")
            continue
        print(
            f"{name:48} {forward:7.2f} ms {both:7.2f} ms {flops * 3.5 / both / 1e9:8.3g} "
            f"{flops * 2.5 / (both - forward) / 1e9:7.3g} {peak / 1e6:6.0f} MB",
            flush=True,
        )


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.attention_speed",
        __doc__,
        example="python -m dev.bench.attention_speed                    # on a GPU, shapes of 32B and 3B\n"
        "python -m dev.bench.attention_speed --tokens 2048 --heads 8/2 --dim 64 --runs 3 --dense    # on a laptop",
    )
    parser.add_argument("--tokens", type=int, default=5632, help="row length S")
    parser.add_argument("--block-size", type=int, default=4, help="tokens D of a block")
    parser.add_argument(
        "--heads", nargs="+", default=["40/8", "16/2"], metavar="HEADS/KV", help="query heads and KV heads of each case"
    )
    parser.add_argument("--dim", type=int, default=128, help="width of a head")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of queries, keys and values")
    parser.add_argument("--dense", action="store_true", help="also the S x S definition")
    parser.add_argument("--runs", type=int, default=20, help="runs of which the median is reported")
    parser.add_argument("--seed", type=int, default=0, help="of the row's documents")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = mixture_row(args.tokens, args.block_size, args.seed)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"{where}; torch {torch.__version__}; median of {args.runs} runs")
    print(
        f"row of {args.tokens}: {layout.n_docs} documents of {', '.join(map(str, layout.clean_lens))} clean tokens, "
        f"{len(layout.starts)} blocks of {args.block_size}, {layout.used} tokens used, "
        f"{visible_pairs(layout) / args.tokens**2:.1%} of all pairs visible"
    )
    for shape in args.heads:
        heads, kv_heads = (int(x) for x in shape.split("/"))
        table(layout, heads, kv_heads, args, device)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
