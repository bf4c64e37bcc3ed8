"""One rank of a job of any size on a GPU that does nothing: the real engine, its memory, launches, waits and host time.

Real are torch's CUDA build with its allocator and its NCCL process groups, TransformerEngine, Megatron-Core and the
engine. Kernels do nothing, so results are whatever was in memory; other ranks are assumed to hold the same values.
Prints one line of JSON.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from dev.nullgpu.environment import LOADED, make_environment
from sdlm_megatron.config.command_line import make_config_parser, parse_config
from sdlm_megatron.config.load import PRESETS
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import run_cli
from sdlm_megatron.planner.memory import RowTokens, stage_memory
from sdlm_megatron.planner.parallel_layout import layout_of

if TYPE_CHECKING:
    from sdlm_megatron.parallel.engine import Engine

TOKENS, REPEAT = 5632, 3
LOOP = 1_000_000
"""Rounds of the Python loop that host time is compared with."""
_KEPT: list = []
EXAMPLE = """
python -m dev.nullgpu.rank --config sdlm_32b_d4 --world 232 --rank 0 --micro-batches 6
python -m dev.nullgpu.rank --config sdlm_3b_d4 --world 16 --rank 15 --train.layers=megatron --roof
"""


class NullDevice:
    """Counters of the null GPU in this process (runtime.c)."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        for name in ("launches", "products", "copies", "waits", "pinned"):
            getattr(library, f"nullgpu_{name}").restype = ctypes.c_long
        self._library = library
        self._type = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

    def __getattr__(self, name: str) -> int:
        return getattr(self._library, f"nullgpu_{name}")()

    def reset(self) -> None:
        self._library.nullgpu_reset()

    def write_kernels(self, path: Path) -> None:
        """Launches of each kernel since the last reset, one line each."""
        self._library.nullgpu_write_kernels(str(path).encode())

    @contextmanager
    def named_waits(self) -> Iterator[Counter]:
        """Counts the calls in which the host waits for the device, by call and the lines that made it."""
        facts: Counter = Counter()

        def note(call: bytes) -> None:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            places = [f"{_short(f.filename)}:{f.lineno} {f.name}" for f in reversed(frames)]
            facts[f"{call.decode()} in {' < '.join(places[:4])}"] += 1

        hook = self._type(note)
        self._library.nullgpu_set_wait_hook(hook)
        try:
            yield facts
        finally:
            self._library.nullgpu_set_wait_hook(None)


def _short(file: str) -> str:
    return file.partition("/site-packages/")[2] or os.path.relpath(file)


def loop_seconds() -> float:
    """CPU seconds of a loop of LOOP additions in Python, the unit of host time."""
    started, total = time.process_time(), 0
    for i in range(LOOP):
        total += i
    return time.process_time() - started


def join(rank: int, world: int) -> None:
    """Joins an NCCL job of which only this process exists."""
    import torch
    import torch.distributed as dist

    class OneProcessStore(dist.Store):
        """Answers at once, with an NCCL id where another rank would have written one."""

        def __init__(self) -> None:
            super().__init__()
            self.values: dict[str, bytes] = {}

        def set(self, key: str, value: Any) -> None:
            self.values[key] = value if isinstance(value, bytes) else str(value).encode()

        def get(self, key: str) -> bytes:
            return self.values.get(key, b"\x07" * 128)

        def add(self, key: str, amount: int) -> int:
            self.values[key] = str(int(self.values.get(key, b"0")) + amount).encode()
            return int(self.values[key])

        def wait(self, keys: Sequence[str], timeout: Any = None) -> None: ...

        def check(self, keys: Sequence[str]) -> bool:
            return False

        def clone(self) -> "OneProcessStore":
            return self

        def set_timeout(self, timeout: Any) -> None: ...

        def delete_key(self, key: str) -> bool:
            return True

        def num_keys(self) -> int:
            return len(self.values)

        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            return self.values.setdefault(key, desired.encode())

    torch.cuda.set_device(0)
    _KEPT.append(store := OneProcessStore())  # torch does not keep the Python half of a store
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))


def build(config: RunConfig, args: argparse.Namespace) -> tuple["Engine", list]:
    """The engine of the rank, and the rows of its step."""
    from dev.bench.engine_case import make_documents, pack_documents
    from sdlm_megatron.model.attention import choice
    from sdlm_megatron.model.attention.varlen import TorchFlash
    from sdlm_megatron.parallel import compat, cpu

    compat.silence_known_notices()
    cpu.install()
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.parallel.groups import init_groups

    join(args.rank, args.world)
    groups = init_groups(config.parallel, seed=1)
    # the check against the definition needs numbers, and cuDNN a device
    with (
        patch.object(choice, "check_backend", lambda *_, **__: 0.0),
        patch.object(choice, "gpu_kernels", lambda: [TorchFlash()]),
    ):
        engine = Engine(
            config,
            config.model,
            groups,
            max_positions=TOKENS + config.diffusion.block_size,
            row_length=TOKENS,
            steps=10_000,
            initialize=False,
        )
    size = config.diffusion.block_size
    documents = make_documents("mixture", 4 * args.micro_batches + 8, TOKENS, config.model, size)
    return engine, pack_documents(documents, TOKENS, config.model, size)[: args.micro_batches]


def measure_steps(engine: "Engine", rows: list, args: argparse.Namespace, device: NullDevice) -> dict[str, Any]:
    """Warm-up and steps: the last one is a log step, the one before is measured."""
    import torch

    from sdlm_megatron.data.batch import Prefetch

    facts: dict[str, Any] = {"waits": {}}
    load: Callable = lambda: [engine.prepare(row) for row in rows]  # noqa: E731
    with Prefetch([load] * args.steps, engine.groups.device) as data:
        queued = []
        for step in range(1, args.steps + 1):
            batches = data.next_step()
            if step == 1:
                facts["warm_up"] = engine.warm_up(batches)
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            device.reset()
            loop, began, wall = loop_seconds(), time.process_time(), time.perf_counter()
            with device.named_waits() as waits:
                queued.append(engine.train_step(batches, step, measure=step == args.steps))
            cpu, wall = time.process_time() - began, time.perf_counter() - wall
            facts["waits"] |= waits if step > 1 else {}
            if 1 < step < args.steps and cpu < facts.get("cpu", float("inf")):
                facts |= {"cpu": cpu, "wall": wall, "loop": min(loop, loop_seconds()), "launches": device.launches}
                facts |= {"products": device.products, "copies": device.copies}
                if args.kernels:
                    device.write_kernels(args.kernels)
        stats = torch.cuda.memory_stats()
        facts |= {"peak": stats["allocated_bytes.all.peak"], "reserved": stats["reserved_bytes.all.peak"]}
        engine.results(queued)
    return facts


def row_tokens(rows: list) -> RowTokens:
    """The planner's description of the largest row."""
    most = {"length": TOKENS, "block_size": rows[0].layout.block_size}
    most["clean"] = max(r.layout.n_clean for r in rows)
    most["block"] = max(r.layout.n_block_tokens for r in rows)
    return RowTokens(**most, response=most["block"] / REPEAT, targets=max(len(r.label_index) for r in rows))


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_config_parser(
        "python -m dev.nullgpu.rank", __doc__, example=EXAMPLE, schema=RunConfig, presets=PRESETS
    )
    add = parser.add_argument
    add("--world", type=int, default=232, help="GPUs of the job")
    add("--rank", type=int, default=0, help="rank of this process")
    add("--micro-batches", type=int, default=6, help="micro-batches of a step")
    add("--steps", type=int, default=4, help="steps; the first warms up, the last is a log step")
    add("--kernels", type=Path, metavar="FILE", help="write the launches of each kernel in a step")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    if not os.environ.get(LOADED):
        made = make_environment()
        line = [str(made.python), "-m", "dev.nullgpu.rank", *(sys.argv[1:] if argv is None else argv)]
        os.execve(made.python, line, {**os.environ, **made.variables})
    config, args = parse_config(build_parser(), RunConfig, PRESETS, argv)
    os.environ |= {"RANK": str(args.rank), "LOCAL_RANK": "0"}
    started, device = time.perf_counter(), NullDevice()
    engine, rows = build(config, args)
    groups = engine.groups
    facts = {
        "rank": args.rank,
        "stage": groups.pp_rank,
        "layers": engine.layers.kind,
        "attention": engine.attention.text,
    }
    facts["build"] = time.perf_counter() - started
    facts |= measure_steps(engine, rows, args, device)
    layout = layout_of(config, args.world)
    facts["planned"] = stage_memory(config.model, layout, row_tokens(rows), args.micro_batches, groups.pp_rank).total
    print(json.dumps(facts))
    sys.stdout.flush()
    os._exit(0)  # leaving the process groups would wait for the other ranks


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
