"""Attention backends on one packed row with the document lengths of the training mixture.

The table has the time of the forward pass and of forward and backward together, TFLOP/s on visible (query, key) pairs
only (4 * heads * dim FLOPs per pair forward, 2.5 times that backward), the peak memory of forward and backward, and the
largest relative error of output and gradients on a small row, against the definition in float64.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dev.bench.timing import median_ms, peak_bytes, print_table, rehearsal
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.config.hardware import default_device
from sdlm_megatron.diffusion.layout import RowLayout, block_count, draw_starts, pack_row
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.errors import run_cli
from sdlm_megatron.files import write_json
from sdlm_megatron.model.attention.choice import Heads, check_backend, gpu_kernels
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.decomposed import Decomposed
from sdlm_megatron.model.attention.flex import Flex
from sdlm_megatron.model.attention.fused import Fused
from sdlm_megatron.model.attention.masked import Dense, PerDocument
from sdlm_megatron.model.attention.varlen import TorchKernel, TransformerEngineFused, VarlenKernel
from sdlm_megatron.weights.dtypes import PRECISIONS

# Measured on the tokenized training mixture: clean tokens per document (lognormal), and the share of answers.
MEAN_CLEAN, SPREAD, RESPONSE_SHARE, REPEAT = 663, 0.8, 0.68, 3
HEAD = ("backend", "forward, ms", "forward + backward, ms", "TFLOP/s", "of the backward", "peak, MB", "error")
Builder = Callable[[RowLayout, int], RowAttention]


def clean_length(rng: np.random.Generator) -> int:
    """Number of clean tokens of one document of the mixture."""
    return max(16, int(rng.lognormal(np.log(MEAN_CLEAN) - SPREAD**2 / 2, SPREAD)))


def mixture_row(tokens: int, block_size: int, seed: int) -> RowLayout:
    """A row of documents, added until one does not fit."""
    rng, room = np.random.default_rng(seed), tokens
    documents: list[tuple[int, np.ndarray, np.ndarray]] = []
    while True:
        clean = clean_length(rng)
        anchors = np.arange(clean - int(RESPONSE_SHARE * clean), clean - 1)
        blocks = block_count(clean, len(anchors), tokens, block_size, REPEAT)
        if clean + blocks * block_size > room:
            # A first document that does not fit is drawn again: the row must not be empty.
            if documents:
                return pack_row(documents, block_size=block_size, mask_token_id=0)[1]
            continue
        starts = draw_starts(anchors, blocks, seed=seed, epoch=0, document=len(documents))
        documents.append((len(documents), np.zeros(clean, np.int32), starts))
        room -= clean + blocks * block_size


def backends(
    device: torch.device, dtype: torch.dtype, group: int, *, dense: bool
) -> Iterator[tuple[str, Builder | None]]:
    """Name and constructor of every backend of this machine; None for an installed kernel that cannot run."""
    if dense:
        yield "dense", partial(Dense, causal_attn=False)
    yield "per_document", partial(PerDocument, causal_attn=False)
    kernels: Iterable[VarlenKernel | str] = [TorchKernel()]
    if device.type == "cuda":
        yield "flex", partial(Flex, causal_attn=False)
        if dtype is not torch.float32:
            yield "triton", partial(Fused, causal_attn=False, group=group)
        kernels = gpu_kernels() if dtype is not torch.float32 else []
    # gpu_kernels is a generator that selects one kernel after the other: each is measured before the next is yielded.
    for kernel in kernels:
        if isinstance(kernel, str):
            yield kernel, None
        elif rehearsal() and isinstance(kernel, TransformerEngineFused):
            yield f"{kernel.name}: cuDNN needs a GPU", None
        else:
            yield f"decomposed, {kernel.name}", partial(build_decomposed, kernel)


def build_decomposed(kernel: VarlenKernel, layout: RowLayout, row_length: int) -> RowAttention:
    """`decomposed` over this kernel."""
    return Decomposed(layout, kernel, causal_attn=False)


def measure_backend(
    row: RowAttention, values: list[torch.Tensor], runs: int, device: torch.device
) -> tuple[float, float, int]:
    """Forward ms, forward and backward ms, and peak bytes; `values` are q, k, v and the output's gradient."""
    q, k, v = (x.requires_grad_() for x in values[:3])
    scale = q.shape[-1] ** -0.5

    def both() -> None:
        torch.autograd.grad(row(q, k, v, scale), (q, k, v), values[3])

    # Without a graph, as in decoding: the difference to `both` is then the whole backward pass.
    def forward() -> torch.Tensor:
        with torch.no_grad():
            return row(q, k, v, scale)

    return median_ms(forward, runs, device), median_ms(both, runs, device), peak_bytes(both, device)


def measure_backends(
    layout: RowLayout, heads: int, kv_heads: int, args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Results of one head shape: of each backend its name and figures, or the `problem` that it has here."""
    dtype = PRECISIONS[args.dtype]
    tflop = 4 * heads * args.dim * visible_pairs(layout) / 1e12
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    values = [torch.randn(args.tokens, n, args.dim, generator=generator).to(device, dtype) for n in sizes]
    for name, build in backends(device, dtype, heads // kv_heads, dense=args.dense):
        result: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "backend": name}
        if build is None:
            yield result | {"problem": "not measured"}
            continue
        try:
            forward, both, peak = measure_backend(build(layout, args.tokens).to(device), values, args.runs, device)
            error = check_backend(
                build, causal_attn=False, device=device, heads=Heads(heads, kv_heads, args.dim, dtype)
            )
        except Exception as raised:  # noqa: BLE001 - one kernel that fails must not hide the results of the others
            yield result | {"problem": (str(raised).splitlines() or [type(raised).__name__])[0]}
            continue
        speeds = {"tflops": 1e3 * tflop * 3.5 / both, "backward_tflops": 1e3 * tflop * 2.5 / (both - forward)}
        yield result | {"forward_ms": forward, "both_ms": both, **speeds, "peak_bytes": peak, "error": error}


def backend_row(result: dict[str, Any]) -> Sequence[str]:
    """Row of the table of a result."""
    if "problem" in result:
        return f"{result['backend']}: {result['problem']}", *[""] * 6
    times = (f"{result['forward_ms']:.2f}", f"{result['both_ms']:.2f}")
    speeds = (f"{result['tflops']:.3g}", f"{result['backward_tflops']:.3g}")
    return result["backend"], *times, *speeds, f"{result['peak_bytes'] / 1e6:.0f}", f"{result['error']:.1g}"


EXAMPLE = """
python -m dev.bench.attention_speed                    # on a GPU, head shapes of 32B and 3B
python -m dev.bench.attention_speed --tokens 2048 --heads 8/2 --dim 64 --runs 3 --dense    # on a laptop
"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m dev.bench.attention_speed", __doc__, example=EXAMPLE)
    add = parser.add_argument
    add("--tokens", type=int, default=5632, help="row length S")
    add("--block-size", type=int, default=4, help="block size D")
    add("--heads", nargs="+", default=["40/8", "16/2"], metavar="HEADS/KV", help="query heads / KV heads")
    add("--dim", type=int, default=128, help="size of a head")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of q, k and v")
    add("--dense", action="store_true", help="also the S x S definition")
    add("--runs", type=int, default=20, help="timed calls; medians are reported")
    add("--seed", type=int, default=0, help="seed of the row's documents")
    add("--threads", type=int, default=1, help="CPU threads of torch")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    device = default_device()
    layout = mixture_row(args.tokens, args.block_size, args.seed)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"{where}; torch {torch.__version__}; median of {args.runs} runs")
    print(
        f"row of {args.tokens}: {layout.n_docs} documents of {', '.join(map(str, layout.clean_lens))} clean tokens, "
        f"{len(layout.starts)} blocks of {args.block_size}, {layout.used} tokens used, "
        f"{visible_pairs(layout) / args.tokens**2:.1%} of all pairs visible"
    )
    results: list[dict[str, Any]] = []
    for shape in args.heads:
        heads, kv_heads = (int(x) for x in shape.split("/"))
        print(f"\n{heads} heads, {kv_heads} KV heads of {args.dim}, {args.dtype}", flush=True)
        shape_results = list(measure_backends(layout, heads, kv_heads, args, device))
        print_table(HEAD, map(backend_row, shape_results))
        results += shape_results
    if args.json:
        write_json(args.json, {"pairs": visible_pairs(layout), "tokens": args.tokens, "results": results})


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
