"""Speed, memory and parts of a training step of the engine, in one process.

Useful tokens are clean and block tokens; row tokens include padding. MFU divides the FLOPs of the exact mask by the
peak of the device, which on a CPU is the speed of a large matrix product measured in the same run. With --reference,
the reference's model and loss step over the same documents with the same weights, alternating with ours; the command
fails unless loss and gradient norm agree. --memory shows how the peak of a step grows with the row.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdlm_megatron.parallel import compat, cpu

compat.silence_known_notices()
cpu.install()  # before anything imports megatron

from dev.bench.engine_case import StepCase  # noqa: E402
from dev.bench.reference_step import ReferenceProcess  # noqa: E402
from dev.bench.timing import (  # noqa: E402
    host_seconds,
    matmul_flops,
    parts_of,
    peak_bytes,
    print_table,
    rehearsal,
    timed,
)
from sdlm_megatron.config.command_line import make_config_parser, parse_config  # noqa: E402
from sdlm_megatron.config.load import PRESETS  # noqa: E402
from sdlm_megatron.config.schema import ParallelConfig, RunConfig  # noqa: E402
from sdlm_megatron.diffusion.mask import visible_pairs  # noqa: E402
from sdlm_megatron.errors import TrainingError, run_cli  # noqa: E402
from sdlm_megatron.files import write_json  # noqa: E402
from sdlm_megatron.parallel.groups import Groups, close_groups, init_groups  # noqa: E402
from sdlm_megatron.planner.flops import peak_flops  # noqa: E402
from sdlm_megatron.weights.dtypes import PRECISIONS  # noqa: E402

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Largest relative difference of loss and gradient norm from the reference."""
MEMORY_TOKENS = (2048, 4096, 8192, 16384)
DENSE_LIMIT = 4096
"""Longest row for `dense`, whose mask is quadratic in it."""


@dataclass
class Durations:
    """Wall-clock and CPU seconds of repeated calls."""

    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, seconds: Sequence[float]) -> None:
        """Adds one call: (wall-clock seconds, CPU seconds)."""
        self.clock.append(seconds[0])
        self.cpu.append(seconds[1])

    @property
    def median(self) -> float:
        return statistics.median(self.clock)

    def cells(self) -> tuple[str, str, str]:
        """Median, range and CPU time, for a table."""
        spread = f"{min(self.clock):.3f} to {max(self.clock):.3f}"
        return f"{self.median:.3f}", spread, f"{statistics.median(self.cpu):.3f}"


def check_agreement(case: StepCase, reference: ReferenceProcess) -> None:
    """Takes the first step; raises TrainingError unless targets, loss and gradient norm agree with the reference's."""
    engine = case.engine
    (first,) = engine.results([engine.train_step(case.batches, 1)])
    for name, ours in (("targets", first.targets), ("loss", first.loss), ("grad_norm", first.grad_norm)):
        theirs = reference.first[name]
        difference = abs(ours - theirs) / abs(theirs)
        print(f"{name:10} ours {ours:<12.8g} reference {theirs:<12.8g} relative difference {difference:.1e}")
        if not difference <= TOLERANCE[engine.config.train.precision]:
            what = f"{name} is {ours}, the reference's is {theirs}"
            raise TrainingError(what, "dev.bench.step", "times of different computations cannot be compared")


def measure_step(config: RunConfig, args: argparse.Namespace, groups: Groups) -> None:
    """Measures one case, alternating with the reference if there is one, and prints the results."""
    case = StepCase.of(config, groups, args.documents, args.samples, args.tokens)
    lengths = [d.expanded(case.engine.config.diffusion.block_size) for d in case.documents]
    print(
        f"{config.model.num_layers} layers of {config.model.hidden_size}, vocabulary {config.model.vocab_size}, "
        f"{config.train.precision}; attention {case.engine.attention.text}\n"
        f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens in {len(case.rows)} rows of "
        f"{args.tokens} ({case.useful / case.row_tokens:.1%} useful), {case.targets} targets; "
        f"median of {args.runs} runs\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        reference = None
        if args.reference:
            case.write_reference_inputs(Path(folder))
            reference = stack.enter_context(ReferenceProcess(args, Path(folder), PRECISIONS[config.train.precision]))
            check_agreement(case, reference)
        else:
            case.engine.train_step(case.batches, 1)
        inner, whole, theirs = Durations(), Durations(), Durations()
        # In turns, so that a drift of the machine's speed affects both sides alike.
        for _ in range(args.runs):
            inner.add(timed(lambda: case.engine.forward_backward(case.batches), groups.device))
            if reference:
                theirs.add(reference.ask("step"))
            whole.add(timed(case.step, groups.device))
        facts = print_speed(case, whole, inner, config.train.precision)
        if reference:
            print_reference(case, inner, theirs, reference)
        facts |= step_facts(case, config) | {"parts": {}, "launches": 0}
        if args.json:
            write_json(args.json, facts)  # the profiler needs CUPTI, which may end the process
        if rehearsal():
            print("no profile: CUPTI ends a process without a driver")
            return
        facts["parts"], facts["launches"] = parts_of(case.step, groups.device)
        print_parts(facts["parts"], reference)
    if args.json:
        write_json(args.json, facts)


def step_facts(case: StepCase, config: RunConfig) -> dict[str, Any]:
    """Facts about a case for --json: its settings, rows, and the memory that the process has needed, all in all."""
    layouts, device = [row.layout for row in case.rows], case.engine.groups.device
    cuda = device.type == "cuda"
    return {
        "device": case.engine.groups.device_name,
        "model": asdict(case.engine.shape),
        "train": asdict(config.train) | {"layers": case.engine.layers.kind},
        "attention": case.engine.attention.text,
        "rows": len(layouts),
        "row_length": case.row_tokens // len(layouts),
        "clean": sum(x.n_clean for x in layouts),
        "block": sum(x.n_block_tokens for x in layouts),
        "block_size": layouts[0].block_size,
        "targets": case.targets,
        "pairs": sum(map(visible_pairs, layouts)),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
        "host_seconds": min(host_seconds(case.step, device) for _ in range(3)),
        "product_flops": matmul_flops(PRECISIONS[config.train.precision], device),
    }


def print_speed(case: StepCase, whole: Durations, inner: Durations, precision: str) -> dict[str, Any]:
    """Prints times, tokens per second, MFU and peak memory of our step; the figures for --json."""
    device = case.engine.groups.device
    # The table of peaks is for bf16 tensor cores; other cases use a measured product.
    known = peak_flops(case.engine.groups.device_name) if precision == "bf16" else None
    peak = known or matmul_flops(PRECISIONS[precision], device)
    memory = peak_bytes(case.step, device)
    prepare = Durations()
    prepare.add(timed(lambda: [case.engine.prepare(row) for row in case.rows], torch.device("cpu")))
    rows = [("whole step", whole), ("forward and backward", inner), ("attention's tables (data loader)", prepare)]
    print_table(("", "seconds", "range", "CPU seconds"), [(name, *times.cells()) for name, times in rows])
    print(f"optimizer {max(0.0, whole.median - inner.median):.3f} s")
    print(f"useful tokens/s {case.useful / whole.median:.0f}, row tokens/s {case.row_tokens / whole.median:.0f}")
    mfu, inner_mfu = (case.flops / times.median / peak for times in (whole, inner))
    measured = "" if known else ", measured with a matrix product"
    print(f"MFU {mfu:.1%} (forward and backward {inner_mfu:.1%}) of {peak / 1e12:.4g} TFLOP/s{measured}")
    print(f"peak memory of a step {memory / 1e6:.0f} MB\n", flush=True)
    times = {"seconds": whole.median, "inner_seconds": inner.median, "cpu_seconds": statistics.median(whole.cpu)}
    return {**times, "useful": case.useful, "flops": case.flops, "peak_flops": peak, "mfu": mfu, "step_bytes": memory}


def print_reference(case: StepCase, inner: Durations, theirs: Durations, reference: ReferenceProcess) -> None:
    """Prints the reference's times and the ratio of useful tokens per second."""
    useful = case.useful / reference.first["row_tokens"]
    print(f"reference: {reference.first['versions']}, {useful:.1%} of its tokens useful")
    print_table(("", "seconds", "range", "CPU seconds"), [("forward and backward", *theirs.cells())])
    print(f"peak memory of a step {reference.ask('memory') / 1e6:.0f} MB")
    by_cpu = statistics.median(theirs.cpu) / statistics.median(inner.cpu)
    print(f"useful tokens/s: {theirs.median / inner.median:.2f} x the reference's (by CPU time {by_cpu:.2f} x)\n")


def print_parts(ours: dict[str, float], reference: ReferenceProcess | None) -> None:
    """Prints the parts of one profiled step and their shares."""
    columns = [ours, *([reference.ask("parts")] if reference else [])]
    head = ("one profiled step", *("ours", "reference")[: len(columns)])
    cells = ((part, *(f"{c[part]:.3f} s {c[part] / sum(c.values()):.1%}" for c in columns)) for part in ours)
    print_table(head, cells)


def peak_of(config: RunConfig, groups: Groups, documents: str, tokens: int) -> int:
    """Peak bytes of a whole step over one row of `tokens` tokens."""
    case = StepCase.of(config, groups, documents, 1, tokens)
    case.step()  # allocates what is kept between steps
    return peak_bytes(case.step, groups.device)


def print_memory(config: RunConfig, args: argparse.Namespace, groups: Groups) -> None:
    """Prints the peak of a whole step by row length for every backend."""
    print(f"peak memory of a whole step in MB (in parentheses: MB per 1,000 more tokens), {args.documents} documents")
    rows = []
    for attention in ("per_document", "decomposed", *(["flex"] if groups.device.type == "cuda" else []), "dense"):
        config.train.attention = attention
        cells: list[str] = []
        peaks: list[float] = []
        for i, tokens in enumerate(args.sizes):
            # An empty cell keeps the columns of the table aligned.
            if attention == "dense" and tokens > DENSE_LIMIT:
                cells.append("")
                continue
            peaks.append(peak_of(config, groups, args.documents, tokens) / 1e6)
            growth = f" ({(peaks[i] - peaks[i - 1]) / (tokens - args.sizes[i - 1]) * 1e3:.1f})" if i else ""
            cells.append(f"{peaks[i]:.0f}{growth}")
        rows.append((attention, *cells))
    print_table(("row length", *args.sizes), rows)


EXAMPLE = """
python -m dev.bench.step --config dev/bench/body.yaml --train.precision=bf16
python -m dev.bench.step --config dev/bench/vocab.yaml --tokens 1024 --documents mixture --samples 4 --reference SDLM
python -m dev.bench.step --memory --config tiny --documents mixture
python -m dev.bench.step --config qwen2.5-3b --train.precision=bf16 --tokens 5632 --documents mixture
"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_config_parser("python -m dev.bench.step", __doc__, example=EXAMPLE, schema=RunConfig, presets=PRESETS)
    add = parser.add_argument
    add("--tokens", type=int, default=2048, help="row length S")
    add("--documents", choices=("full", "mixture"), default="full", help="one document fills a row, or mixture lengths")
    add("--samples", type=int, default=2, help="documents per step")
    add("--runs", type=int, default=5, help="timed steps; medians are reported")
    add("--threads", type=int, default=1, help="CPU threads of torch")
    add("--reference", type=Path, metavar="DIR", help="checkout of OpenGVLab/SDLM to compare with, on a CPU")
    add("--reference-python", default=sys.executable, metavar="FILE", help="interpreter with transformers 4.37.2")
    add("--reference-batch", type=int, default=2, help="documents per batch of the reference, padded to the longest")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add("--memory", action="store_true", help="report peak memory by row length instead")
    add("--sizes", type=int, nargs="+", default=MEMORY_TOKENS, help="row lengths of --memory")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config, args = parse_config(build_parser(), RunConfig, PRESETS, argv)
    torch.set_num_threads(args.threads)
    groups = init_groups(ParallelConfig(), seed=0)
    where = groups.device_name if groups.device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"{where}; torch {torch.__version__}")
    (print_memory if args.memory else measure_step)(config, args, groups)
    close_groups()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
