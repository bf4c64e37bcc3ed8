"""A training step of the engine in one process: speed, memory, and where the time goes.

Useful tokens are clean and block tokens; row tokens count padding too. MFU takes the FLOPs of the exact mask
(planner/flops.py) over the peak of the device, which on a CPU is the speed of a large matrix product measured in the
same run. With `--reference` the reference's model and loss code steps over the same documents with the same weights,
alternating with ours; the command fails unless both find the same loss and gradient norm. `--memory` shows how the
peak of a step grows with the row. Results are kept in docs/benchmarks.md.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sdlm_megatron.parallel import compat, cpu

compat.silence_known_notices()
cpu.install()  # before anything imports megatron

from dev.bench.measure import (  # noqa: E402
    ATTENTION,
    BUFFERS,
    HEAD,
    LINEAR,
    OPTIMIZER,
    OTHER,
    PARTS,
    SMALL,
    Ranges,
    matmul_flops,
    peak_bytes,
    timed,
)
from dev.bench.reference_step import Reference  # noqa: E402
from dev.bench.step_case import (  # noqa: E402
    SHAPES,
    Document,
    make_documents,
    make_engine,
    pack,
    preset_shape,
    write_documents,
    write_hf,
)
from sdlm_megatron.config.command_line import make_parser  # noqa: E402
from sdlm_megatron.config.schema import ModelConfig, ParallelConfig  # noqa: E402
from sdlm_megatron.diffusion.row import MicroBatch  # noqa: E402
from sdlm_megatron.errors import TrainingError, run_cli  # noqa: E402
from sdlm_megatron.parallel.engine import Engine  # noqa: E402
from sdlm_megatron.parallel.groups import Groups, close_groups, init_groups  # noqa: E402
from sdlm_megatron.planner.flops import peak_flops, step_flops  # noqa: E402
from sdlm_megatron.weights.dtypes import PRECISIONS  # noqa: E402

SAME = {"fp32": 1e-4, "bf16": 1e-2}
"""Largest relative difference of loss and gradient norm from the reference."""
LINEAR_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
MEMORY_TOKENS = (2048, 4096, 8192, 16384)
DENSE_LIMIT = 4096
"""Longest row at which `dense` is still tried."""


@dataclass
class Times:
    """Seconds of some runs."""

    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, found: tuple[float, float]) -> None:
        self.clock.append(found[0])
        self.cpu.append(found[1])

    def __str__(self) -> str:
        spread = f"{min(self.clock):.3f}..{max(self.clock):.3f}"
        return f"{self.median:8.3f} s   of {spread:16} CPU time {statistics.median(self.cpu):.3f} s"

    @property
    def median(self) -> float:
        return statistics.median(self.clock)


def mark(ranges: Ranges, engine: Engine) -> None:
    """Says which module and which call is which part; what is left of the step is the optimizer's."""
    for name, module in engine.module.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in LINEAR_LAYERS:
            ranges.module(module, LINEAR)
        elif leaf == "core_attention":
            ranges.module(module, ATTENTION)
    ranges.module(engine.module, SMALL)
    ranges.function(engine.module, "_postprocess", HEAD)
    ranges.function(engine, "_loss", HEAD)
    ranges.function(engine, "forward_backward", OTHER)
    ranges.function(engine.models[0], "zero_grad_buffer", BUFFERS)
    ranges.function(engine, "train_step", OPTIMIZER)


def parts_of(engine: Engine, batches: list[MicroBatch]) -> dict[str, float]:
    """Seconds of each part of one whole step."""
    ranges = Ranges()
    mark(ranges, engine)
    return ranges.split(lambda: engine.train_step(batches, 2), engine.groups.device)


def check_same(engine: Engine, batches: list[MicroBatch], reference: Reference) -> None:
    """Takes the first step. TrainingError unless its loss, gradient norm and targets are the reference's."""
    (first,) = engine.results([engine.train_step(batches, 1)])
    for what, mine in (("targets", first.targets), ("loss", first.loss), ("grad_norm", first.grad_norm)):
        theirs = reference.first[what]
        apart = abs(mine - theirs) / abs(theirs)
        print(f"{what:10} ours {mine:<12.8g} reference {theirs:<12.8g} relative difference {apart:.1e}")
        if not apart <= SAME[engine.config.train.precision]:
            raise TrainingError(
                f"{what} is {mine}, the reference's {theirs}", "dev.bench.step", "times of different sums say nothing"
            )


@dataclass
class Case:
    """An engine and the rows it steps over."""

    engine: Engine
    documents: list[Document]
    rows: list[MicroBatch]
    batches: list[MicroBatch]
    """The rows as the data loader hands them over."""

    @property
    def useful(self) -> int:
        return sum(b.layout.used for b in self.rows)

    @property
    def row_tokens(self) -> int:
        return sum(b.tokens.numel() for b in self.rows)

    @property
    def flops(self) -> int:
        labels = sum(len(b.label_index) for b in self.rows)
        return step_flops(self.engine.shape, [b.layout for b in self.rows], labels)


def make_case(args: argparse.Namespace, shape: ModelConfig, groups: Groups, *, tokens: int, attention: str) -> Case:
    """What the command line asks for."""
    train = {"precision": args.dtype, "attention": attention, **dict(x.split("=", 1) for x in args.train)}
    engine = make_engine(shape, groups, block_size=args.block_size, max_positions=tokens, train=train)
    documents = make_documents(args.documents, args.samples, tokens, shape, args.block_size)
    rows = pack(documents, tokens, shape, args.block_size, next_token_weight=args.next_token_weight)
    return Case(engine, documents, rows, [engine.prepare(b) for b in rows])


def start_reference(args: argparse.Namespace, case: Case, folder: Path) -> Reference:
    """The reference with the same weights and documents."""
    model, documents = folder / "model", folder / "documents.npz"
    write_hf(model, case.engine)
    write_documents(documents, case.documents, case.engine.shape, args.block_size)
    return Reference(
        args.reference_python,
        *("--checkout", args.reference, "--model", model, "--documents", documents, "--threads", args.threads),
        *("--dtype", str(PRECISIONS[args.dtype]).removeprefix("torch."), "--batch", args.reference_batch),
    )


def measure(args: argparse.Namespace, shape: ModelConfig, groups: Groups) -> None:
    """Measures one case, beside the reference if there is one, and prints."""
    case = make_case(args, shape, groups, tokens=args.tokens, attention=args.attention)
    describe(args, case)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        reference = None
        if args.reference:
            reference = stack.enter_context(start_reference(args, case, Path(folder)))
            check_same(case.engine, case.batches, reference)
        else:
            case.engine.train_step(case.batches, 1)
        inner, whole, theirs = Times(), Times(), Times()
        for _ in range(args.runs):  # in turns, so that a machine that drifts is as unkind to one as to the other
            inner.add(timed(lambda: case.engine.forward_backward(case.batches), groups.device))
            if reference:
                theirs.add(reference.ask("step"))
            whole.add(timed(lambda: case.engine.train_step(case.batches, 2), groups.device))
        print_ours(case, whole, inner, args.dtype)
        if reference:
            print_reference(case, inner, theirs, reference)
        print_parts(parts_of(case.engine, case.batches), reference)


def describe(args: argparse.Namespace, case: Case) -> None:
    """The case in words."""
    shape, lengths = case.engine.shape, [d.expanded(args.block_size) for d in case.documents]
    heads = f"{shape.num_attention_heads}/{shape.num_query_groups} heads"
    filled = f"{case.useful / case.row_tokens:.1%} useful"
    print(
        f"{shape.num_layers} layers of {shape.hidden_size}, {heads}, vocabulary {shape.vocab_size}, {args.dtype}; "
        f"attention {case.engine.attention.text}\n"
        f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens in {len(case.rows)} rows of "
        f"{args.tokens} ({filled}), {sum(len(b.label_index) for b in case.rows)} targets; median of {args.runs} runs",
        flush=True,
    )


def print_ours(case: Case, whole: Times, inner: Times, dtype: str) -> None:
    """Speed and memory."""
    device, seconds = case.engine.groups.device, whole.median
    known = peak_flops(case.engine.groups.device_name) if dtype == "bf16" else None
    peak = known or matmul_flops(PRECISIONS[dtype], device)
    memory = peak_bytes(lambda: case.engine.train_step(case.batches, 2), device)
    data = timed(lambda: [case.engine.prepare(b) for b in case.rows], torch.device("cpu"))[0]
    print(f"\nwhole step            {whole}")
    print(f"forward and backward  {inner}")
    print(f"optimizer             {max(0.0, seconds - inner.median):8.3f} s")
    print(f"data                  {data:8.4f} s   (attention's tables, made by the data loader)")
    print(f"useful tokens/s       {case.useful / seconds:8.0f}     row tokens/s {case.row_tokens / seconds:.0f}")
    print(
        f"MFU                   {case.flops / seconds / peak:8.1%}     forward and backward alone "
        f"{case.flops / inner.median / peak:.1%}; peak {peak / 1e12:.4g} TFLOP/s{'' if known else ' (matmul)'}"
    )
    print(f"peak memory of a step {memory / 1e6:8.0f} MB", flush=True)


def print_reference(case: Case, inner: Times, theirs: Times, reference: Reference) -> None:
    """The other side, and how many times as fast ours is."""
    row_tokens = reference.first["row_tokens"]
    print(f"\nreference ({reference.first['versions']}), {case.useful / row_tokens:.1%} of {row_tokens} tokens useful")
    print(f"forward and backward  {theirs}")
    print(f"useful tokens/s       {case.useful / theirs.median:8.0f}")
    print(f"peak memory           {reference.ask('memory') / 1e6:8.0f} MB")
    by_cpu = statistics.median(theirs.cpu) / statistics.median(inner.cpu)
    times = theirs.median / inner.median
    print(f"\nuseful tokens/s, forward and backward: {times:.2f} x the reference (by CPU time {by_cpu:.2f} x)")


def print_parts(ours: dict[str, float], reference: Reference | None) -> None:
    """Where the time goes, of one profiled step."""
    theirs = reference.ask("parts") if reference else None
    print(f"\n{'one profiled step':36} {'ours':>10}" + (f" {'reference':>16}" if theirs else ""))
    for part in PARTS:
        line = f"{part:36} {ours[part]:8.3f} s {ours[part] / sum(ours.values()):6.1%}"
        if theirs:
            line += f" {theirs[part]:8.3f} s {theirs[part] / sum(theirs.values()):6.1%}"
        print(line)


def peak_of(args: argparse.Namespace, shape: ModelConfig, groups: Groups, tokens: int, attention: str) -> int:
    """Peak bytes of a whole step over one row of `tokens`."""
    case = make_case(args, shape, groups, tokens=tokens, attention=attention)
    row = case.batches[:1]
    case.engine.train_step(row, 1)  # what is made once
    return peak_bytes(lambda: case.engine.train_step(row, 2), groups.device)


def print_memory(args: argparse.Namespace, shape: ModelConfig, groups: Groups) -> None:
    """Peak of a whole step against the row length, for every backend, and what each 1,000 tokens more cost."""
    cuda = groups.device.type == "cuda"
    print(f"peak memory of a whole step in MB (in brackets: MB for each 1,000 tokens more), {args.documents} documents")
    print(f"{'row length':14}" + "".join(f"{s:>18}" for s in args.sizes))
    for attention in ("per_document", "decomposed", *(["flex"] if cuda else []), "dense"):
        sizes = [s for s in args.sizes if attention != "dense" or s <= DENSE_LIMIT]
        peaks = [peak_of(args, shape, groups, s, attention) / 1e6 for s in sizes]
        growth = [(b - a) / (t - s) * 1e3 for a, b, s, t in zip(peaks, peaks[1:], sizes, sizes[1:], strict=False)]
        cells = [f"{peaks[0]:9.0f}         ", *(f"{p:9.0f} ({g:6.1f})" for p, g in zip(peaks[1:], growth, strict=True))]
        print(f"{attention:14}" + "".join(f"{c:>18}" for c in cells), flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.step",
        __doc__,
        example="python -m dev.bench.step --shape body --dtype bf16 --runs 3                    # on a laptop\n"
        "python -m dev.bench.step --shape vocab --tokens 1024 --documents mixture --samples 4 --dtype bf16 \\\n"
        "    --reference SDLM --reference-python VENV/bin/python                      # beside the reference\n"
        "python -m dev.bench.step --memory --preset tiny --documents mixture\n"
        "python -m dev.bench.step --preset qwen2.5-3b --dtype bf16 --tokens 5632 --documents mixture   # on a GPU",
    )
    parser.add_argument("--shape", choices=SHAPES, default="body", help="a small model")
    parser.add_argument("--preset", help="a preset's shape instead, such as qwen2.5-3b")
    parser.add_argument("--layers", type=int, help="with --preset: fewer layers")
    parser.add_argument("--tokens", type=int, default=2048, help="row length S")
    parser.add_argument("--documents", choices=("full", "mixture"), default="full", help="one fills a row, or several")
    parser.add_argument("--samples", type=int, default=2, help="documents a step")
    parser.add_argument("--block-size", type=int, default=4, help="tokens D of a block")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights")
    parser.add_argument("--attention", default="auto", help="train.attention")
    parser.add_argument("--next-token-weight", type=float, default=0.0, help="diffusion.next_token_weight")
    parser.add_argument("--train", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of train")
    parser.add_argument("--runs", type=int, default=5, help="steps of which the median is reported")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--reference", type=Path, help="a checkout of OpenGVLab/SDLM; on a CPU")
    parser.add_argument("--reference-python", default=sys.executable, help="a Python with transformers 4.37.2")
    parser.add_argument("--reference-batch", type=int, default=2, help="documents padded to the longest of them")
    parser.add_argument("--memory", action="store_true", help="instead: peak memory against row length")
    parser.add_argument("--sizes", type=int, nargs="+", default=MEMORY_TOKENS, help="row lengths of --memory")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    shape = preset_shape(args.preset, args.layers) if args.preset else SHAPES[args.shape]
    groups = init_groups(ParallelConfig(), seed=0)
    where = groups.device_name if groups.device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"{where}; torch {torch.__version__}")
    (print_memory if args.memory else measure)(args, shape, groups)
    close_groups()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
