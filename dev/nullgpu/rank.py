"""One rank of a job of any size on a GPU that does nothing: the real engine, its memory, launches, waits and host time.

Real are torch's CUDA build with its allocator and its NCCL process groups, TransformerEngine, Megatron-Core and the
engine. Kernels do nothing, so results are whatever was in memory; other ranks are assumed to hold the same values.
Prints one line of JSON.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
    from dev.nullgpu.instruments import NullDevice
    from sdlm_megatron.parallel.engine import Engine

REPEAT = 3
_KEPT: list = []
EXAMPLE = """
python -m dev.nullgpu.rank --config sdlm_32b_d4 --world 232 --rank 0 --micro-batches 6
python -m dev.nullgpu.rank --config sdlm_3b_d4 --world 16 --rank 15 --train.layers=megatron --roof
"""


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
            max_positions=args.row_length + config.diffusion.block_size,
            row_length=args.row_length,
            steps=10_000,
            initialize=False,
            mask_token_id=0,
        )
    size = config.diffusion.block_size
    count = args.micro_batches * (1 if args.documents == "full" else 4) + 8
    documents = make_documents(args.documents, count, args.row_length, config.model, size)
    return engine, pack_documents(documents, args.row_length, config.model, size)[: args.micro_batches]


def measure_steps(engine: "Engine", rows: list, args: argparse.Namespace, device: "NullDevice") -> dict[str, Any]:
    """Warm-up and steps: the last one is a log step, of the others after the first the quickest counts."""
    import torch
    import torch.distributed as dist

    from dev.nullgpu.instruments import Roof, loop_seconds
    from sdlm_megatron.data.batch import Prefetch
    from sdlm_megatron.parallel.results import read

    facts: dict[str, Any] = {"waits": {}, "cpu": float("inf")}
    load: Callable = lambda: [engine.prepare(row) for row in rows]  # noqa: E731
    with Prefetch([load] * args.steps, engine.groups.device) as data:
        queued = []
        for step in range(1, args.steps + 1):
            batches, last = data.next_step(), step == args.steps
            if step == 1:
                facts["warm_up"] = engine.warm_up(batches)
            planted = exchanged(dist.all_reduce) if args.plant == "order" and last else dist.all_reduce
            roof = Roof()
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            device.reset()
            loop, began = loop_seconds(), time.process_time()
            with (
                device.named_waits() as waits,
                patch.object(dist, "all_reduce", planted),
                roof if args.roof and last else nullcontext(),
            ):
                queued.append(engine.train_step(batches, step, measure=last))
            cpu = time.process_time() - began
            facts["waits"] |= waits if step > 1 else {}
            if last and args.roof:
                facts["roof"] = roof.facts()
            if 1 < step < args.steps and cpu < facts["cpu"]:
                facts |= {"cpu": cpu, "loop": min(loop, loop_seconds()), "launches": device.launches}
                facts |= {
                    "products": device.products,
                    "copies": device.copies,
                    "peak": torch.cuda.max_memory_allocated(),
                }
                if args.kernels:
                    device.write_kernels(args.kernels)
        facts["reserved"] = torch.cuda.max_memory_reserved()
        read(queued, engine.groups, engine.config.diffusion.block_size, check=False)  # the values are arbitrary
    return facts


def around_steps(engine: "Engine", rows: list) -> dict[str, Any]:
    """Work of a run between its steps: the copy of a checkpoint to pinned memory, validation, a pass of samples."""
    import torch

    from dev.nullgpu.instruments import NullDevice
    from sdlm_megatron.checkpoint import async_writer
    from sdlm_megatron.diffusion.decode_step import Step
    from sdlm_megatron.parallel.engine import EngineProposer

    device, began = NullDevice(), time.perf_counter()
    before = device.pinned
    with patch.object(async_writer, "_lazy_group", lambda: None):  # gloo needs the other ranks
        writer = async_writer.CheckpointWriter(engine, Path("."), engine.config.checkpoint)
    needed = sum(part.nbytes for part in writer._copy())
    copied = time.perf_counter()
    # decoding itself needs numbers: this is one of its passes, over two prompts of 20 tokens
    prompts, end = torch.zeros(2, 20, dtype=torch.long), torch.tensor([20, 20])
    window = engine.config.diffusion.block_size
    step = Step(prompts, end, torch.zeros_like(end), 20, 20, end[:, None] - 1, window, None)
    with engine.inference():
        engine.evaluate([rows])
        validated = time.perf_counter()
        EngineProposer(engine, mask_token_id=engine.shape.vocab_size - 1, row_length=rows[0].tokens.shape[1])(step)
    return {
        "checkpoint": {"bytes": needed, "pinned": device.pinned - before, "seconds": copied - began},
        "validation": validated - copied,
        "samples": time.perf_counter() - validated,
    }


# --- faults that the lab must detect


def plant(kind: str, engine: "Engine", planned: float) -> None:
    """Plants a fault into the engine: "sync", a value that the host reads; "memory", 5 % of the planned memory."""
    import torch

    def read_value(module: Any, arguments: tuple, out: Any) -> None:
        (out[0] if isinstance(out, tuple) else out).flatten()[0].item()

    if kind == "sync":
        engine.modules[0].decoder.layers[0].register_forward_hook(read_value)
    if kind == "memory":
        _KEPT.append(torch.empty(int(0.05 * planned), dtype=torch.uint8, device=engine.groups.device))


def exchanged(all_reduce: Callable) -> Callable:
    """The function with two of its calls in the wrong order: one comes after the next one in a larger group."""
    waiting: list = []

    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if not waiting and group is not None and group.size() > 1:
            waiting.append((args, kwargs))
            return None
        result = all_reduce(*args, **kwargs)
        if len(waiting) == 1 and group is not None and group.size() > waiting[0][1]["group"].size():
            waiting.append(all_reduce(*waiting[0][0], **waiting[0][1]))
        return result

    return call


def row_tokens(rows: list) -> RowTokens:
    """The planner's description of the largest row."""
    most = {"length": rows[0].tokens.shape[1], "block_size": rows[0].layout.block_size}
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
    add("--row-length", type=int, default=5632, help="tokens of a micro-batch")
    documents = "lengths of the published mixture, or one document per row"
    add("--documents", choices=("mixture", "full"), default="mixture", help=documents)
    add("--steps", type=int, default=3, help="steps; the first warms up, the last is a log step")
    add("--kernels", type=Path, metavar="FILE", help="write the launches of each kernel in a step")
    add("--roof", action="store_true", help="lower bound of the GPU's time by operator, of torch's operators only")
    add("--around", action="store_true", help="also copy a checkpoint, validate and decode samples")
    add("--dump", type=Path, metavar="FILE", help="write the dump of NCCL's flight recorder")
    add("--plant", choices=("sync", "order", "memory"), help="plant a fault, to see that it is detected")
    return parser


def run_rank(argv: Sequence[str]) -> dict[str, Any]:
    """Builds the rank and measures it, in a process on the null GPU that has not used CUDA yet."""
    from torch._C import _distributed_c10d as recorder

    from dev.nullgpu.instruments import NullDevice

    config, args = parse_config(build_parser(), RunConfig, PRESETS, argv)
    os.environ |= {"RANK": str(args.rank), "LOCAL_RANK": "0", "TORCH_FR_BUFFER_SIZE": "100000"}
    started, device = time.perf_counter(), NullDevice()
    engine, rows = build(config, args)
    groups, kind = engine.groups, engine.layers.kind
    facts = {"rank": args.rank, "stage": groups.pp_rank, "layers": kind, "attention": engine.attention.text}
    layout = layout_of(config, args.world)
    planned = stage_memory(config.model, layout, row_tokens(rows), args.micro_batches, groups.pp_rank)
    facts |= {"planned": planned.total, "build": time.perf_counter() - started}
    plant(args.plant, engine, planned.total)
    facts |= measure_steps(engine, rows, args, device)
    if args.around:
        facts |= around_steps(engine, rows)
    if args.dump:
        dump: Any = recorder._dump_nccl_trace  # type: ignore[attr-defined]  # only in builds with NCCL
        args.dump.write_bytes(dump(includeStackTraces=False, onlyActive=False))
    return facts | {"seconds": time.perf_counter() - started}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not os.environ.get(LOADED):
        made = make_environment()
        line = [str(made.python), "-m", "dev.nullgpu.rank", *arguments]
        os.execve(made.python, line, {**os.environ, **made.variables})
    print(json.dumps(run_rank(arguments)), flush=True)
    os._exit(0)  # leaving the process groups would wait for the other ranks


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
