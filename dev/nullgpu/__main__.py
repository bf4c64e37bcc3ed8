"""The null-GPU lab: ranks of big jobs under the real CUDA host code, on a machine without a GPU.

For each case: no error; the host never waits for the device in a step; peak memory as planned; launches and host time
about as recorded (cases.py has the accepted differences). Then 16 ranks of a job: the order of their communication.
`--planted` plants faults instead, each of which must be detected. The environment is described in
dev/nullgpu/environment.py.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dev.nullgpu import cases
from dev.nullgpu.cases import Case, all_cases, failures, table
from dev.nullgpu.collective_order import problems, read_dump
from dev.nullgpu.environment import LOADED, make_environment
from dev.nullgpu.rank import run_rank
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.files import write_json, write_text

PRELOADED = ("megatron.core.models.gpt.gpt_layer_specs", "torch._inductor.compile_fx", "dev.bench.engine_case")
"""Modules that take seconds to import, which the processes of the ranks inherit."""
WITHOUT_TE = "NULLGPU_WITHOUT_TE"
"""Environment variable with the reason why TransformerEngine is missing."""
EXAMPLE = """
python -m dev.nullgpu --quick
python -m dev.nullgpu --only 3b_d4 --only 'rank 0'
"""


def run_all(arguments: Sequence[Sequence[str]], processes: int) -> Iterator[dict[str, Any]]:
    """dict[str, Any] of ranks in order, or their "error"; each in a process of its own."""
    context = multiprocessing.get_context("fork")
    waiting, results = iter(enumerate(arguments)), dict[int, dict[str, Any]]()
    running: dict[Any, tuple[int, Any]] = {}
    for rank in range(len(arguments)):
        while rank not in results:
            for index, line in islice(waiting, processes - len(running)):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send, args=(sender, line), daemon=True)
                process.start()
                sender.close()  # the pipe ends with the process; a Pool would wait for its result forever
                running[receiver] = index, process
            ready: Any
            for ready in wait(list(running)):
                index, process = running.pop(ready)
                try:
                    results[index] = ready.recv()
                    process.join()
                except (EOFError, OSError):
                    process.join()
                    results[index] = {"error": f"the process ended with {process.exitcode}", "trace": ""}
        yield results.pop(rank)


def _send(sender: Connection, arguments: Sequence[str]) -> None:
    sender.send(_in_child(arguments))


def _in_child(arguments: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as log:  # notices of the libraries, from C++ too
        sys.stdout.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            # unlike a real one, the null device is whole after a fork
            with patch("torch.cuda._is_in_bad_fork", bool):
                return run_rank(arguments)
        except BaseException as error:  # noqa: BLE001 - reported by the parent
            return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def check_cases(args: argparse.Namespace) -> int:
    """Runs the cases; the number that fail."""
    chosen = [c for c in all_cases() if (c.quick or not args.quick) and all(x in c.name for x in args.only)]
    if args.without_te:
        chosen = [c for c in chosen if cases.MEGATRON in " ".join(c.arguments)]
    if not chosen:
        raise ConfigError("no case is chosen", f"--only {' --only '.join(args.only)}", "take texts of the table's jobs")
    limits = json.loads(cases.LIMITS.read_text(encoding="utf-8")) if cases.LIMITS.exists() else {}
    rows: list[tuple[Case, dict[str, Any]]] = []
    failed = 0
    for case, facts in zip(chosen, run_all([c.arguments for c in chosen], args.processes), strict=True):
        rows.append((case, facts))
        wrong = failures(case, facts, None if args.record else limits)
        failed += bool(wrong)
        print(f"{'FAILED' if wrong else 'ok':6} {case.name} ({facts.get('seconds', 0):.0f} s)", flush=True)
        for text in wrong:
            print(f"       {text}", flush=True)
    if args.record:
        new = {
            c.name: {"launches": f["launches"], "loops": round(f["cpu"] / f["loop"], 1)}
            for c, f in rows
            if "error" not in f
        }
        write_json(cases.LIMITS, limits | new)
    if args.out:
        write_text(args.out, table(rows) + "\n")
    print(f"\n{table(rows)}\n")
    return failed


def check_order(args: argparse.Namespace, planted: int | None = None) -> list[str]:
    """Compares the calls of 16 ranks, for each kind of layers; the problems, of a job with a fault if `planted`."""
    wrong = []
    kinds = ["megatron"] if args.without_te or planted is not None else ["megatron", "transformer_engine"]
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, str(rank)) for rank in range(16)]
            line = partial(_order_line, kind, planted)
            results = list(run_all([line(rank, file) for rank, file in enumerate(files)], args.processes))
            errors = [f"rank {i}: {facts['error']}" for i, facts in enumerate(results) if "error" in facts]
            calls = {} if errors else {rank: read_dump(file.read_bytes()) for rank, file in enumerate(files)}
        messages = sum(call.message for rank in calls.values() for call in rank) // 2
        now = errors or problems(calls)
        wrong += [] if errors and planted is not None else now  # a rank that fails detects no order
        print(f"{kind} layers: {sum(map(len, calls.values())):,} calls of 16 ranks, {messages:,} messages: ", end="")
        print("; ".join(now) or "same order, all paired, no deadlock", flush=True)
    return wrong


def _order_line(kind: str, planted: int | None, rank: int, file: Path) -> list[str]:
    fault = ["--plant", "order"] if rank == planted else []
    return [*cases.ORDER, "--rank", str(rank), f"--train.layers={kind}", "--dump", str(file), *fault]


def check_planted(args: argparse.Namespace) -> int:
    """Plants each fault; the number that is not detected."""
    case = next(c for c in all_cases() if c.job == f"{cases.SMALL} on 16, layers megatron")
    missed = 0
    for fault, sign in (("sync", "the host waits"), ("memory", "peak memory")):
        (facts,) = run_all([[*case.arguments, "--plant", fault]], 1)
        seen = [text for text in failures(case, facts, None) if text.startswith(sign)]
        print(f"planted {fault}: {'; '.join(seen) or 'NOT DETECTED'}", flush=True)
        missed += not seen
    print("planted order, on rank 5: ", end="")
    return missed + (not check_order(args, planted=5))


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m dev.nullgpu", __doc__, example=EXAMPLE)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cases, without the 16 ranks")
    add("--only", action="append", default=[], metavar="TEXT", help="cases with this text in their name; repeatable")
    add("--planted", action="store_true", help="plant a wait, a wrong order and 5 %% of memory, which must be detected")
    add("--record", action="store_true", help="record launches and host time as the new limits")
    add("--out", type=Path, metavar="FILE", help="write the table")
    add("--processes", type=int, default=os.cpu_count() or 1, help="ranks at a time")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if not os.environ.get(LOADED):
        made = make_environment()
        line = [str(made.python), "-m", "dev.nullgpu", *(sys.argv[1:] if argv is None else argv)]
        os.execve(made.python, line, {**os.environ, **made.variables, WITHOUT_TE: made.transformer_engine})
    started, args.without_te = time.perf_counter(), os.environ.get(WITHOUT_TE, "")
    if args.without_te:
        print(f"TransformerEngine is missing, so only Megatron-Core's layers are run: {args.without_te}")
    for module in (*PRELOADED, *([] if args.without_te else ["transformer_engine.pytorch"])):
        importlib.import_module(module)
    importlib.import_module("torch").cuda.init()
    failed = check_planted(args) if args.planted else check_cases(args)
    if not args.planted and not args.quick and not args.only:
        failed += len(check_order(args))
    print(f"{failed} failed; {time.perf_counter() - started:.0f} s, {args.processes} processes")
    sys.exit(bool(failed))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
