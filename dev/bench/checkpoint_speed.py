"""What a checkpoint costs training: seconds a step waits for it, against Megatron-Core's own save of the same state.

Runs in one process, or in several (`torchrun --nproc-per-node N -m dev.bench.checkpoint_speed`, data parallel). Megatron-Core's
(dist_checkpointing, fully_reshardable) is what this project used before: it blocks until everything is on the disk, and
gathers a stage's optimizer on each data-parallel rank. Results are kept in docs/benchmarks.md.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from sdlm_megatron.parallel import compat, cpu

compat.silence_known_notices()
cpu.install()  # before anything imports megatron

from megatron.core import dist_checkpointing  # noqa: E402

from dev.bench.step_case import make_documents, make_engine, pack  # noqa: E402
from sdlm_megatron.checkpoint.async_writer import CheckpointWriter  # noqa: E402
from sdlm_megatron.config.command_line import make_parser  # noqa: E402
from sdlm_megatron.config.schema import CheckpointConfig, ModelConfig, ParallelConfig  # noqa: E402
from sdlm_megatron.diffusion.row import MicroBatch  # noqa: E402
from sdlm_megatron.errors import run_cli  # noqa: E402
from sdlm_megatron.ops.attempt import read_events  # noqa: E402
from sdlm_megatron.parallel.engine import Engine  # noqa: E402
from sdlm_megatron.parallel.groups import close_groups, init_groups  # noqa: E402
from sdlm_megatron.weights.checkpoint_folder import TrainState  # noqa: E402

ROW, BLOCK = 512, 4


def _timed(engine: Engine, rows: Sequence[MicroBatch], first: int, count: int) -> list[float]:
    seconds = []
    for step in range(first, first + count):
        began = time.perf_counter()
        engine.results([engine.train_step(rows, step)])
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(engine: Engine, shape: ModelConfig, out: Path, steps: int) -> None:
    """Prints the table; `out` is removed before and after."""
    documents = make_documents("mixed", 40, ROW, shape, BLOCK)
    rows = [engine.prepare(row) for row in pack(documents, ROW, shape, BLOCK)[:1]]
    _timed(engine, rows, 1, 2)
    alone = statistics.median(_timed(engine, rows, 3, steps))
    state = TrainState(0, 0, 1, shape, engine.config.diffusion, -1, "bf16", True, {})
    during: list[float] = []
    with CheckpointWriter(engine, out, CheckpointConfig(keep_last=1)) as writer:
        for round_ in (1, 2):  # the first takes the host's memory
            writer.save(replace(state, step=round_), None)
            while writer.busy:
                during += _timed(engine, rows, 10 * round_, 1)
            writer.wait()
    events = [e for e in read_events(out) if e["kind"] == "saved"] if engine.groups.main else []
    old: list[float] = []
    assert engine.optimizer is not None
    for _ in range(2):
        shutil.rmtree(out / "theirs", ignore_errors=True)
        (out / "theirs").mkdir()
        dist.barrier()
        began = time.perf_counter()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
        metadata["dp_cp_group"] = engine.groups.collection.dp_cp
        model = engine.module.sharded_state_dict(metadata=metadata)
        both = {"model": model, "optimizer": engine.optimizer.sharded_state_dict({"model": model}, metadata=metadata)}
        dist_checkpointing.save(both, str(out / "theirs"))
        dist.barrier()
        old.append(time.perf_counter() - began)
    for event, theirs in zip(events, old, strict=False):
        print(
            f"{event['bytes'] / 1e9:.2f} GB: blocked {event['blocked_s']:.3f} s of {event['total_s']:.2f} s "
            f"({event['blocked_s'] / event['total_s']:.1%}); Megatron-Core's blocks {theirs:.2f} s"
        )
    if events:
        print(
            f"a step alone {alone:.3f} s; while a checkpoint is written {statistics.median(during):.3f} s", flush=True
        )


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.checkpoint_speed",
        __doc__,
        example="torchrun --nproc-per-node 2 -m dev.bench.checkpoint_speed --out /data/bench --hidden 1024",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder on the disk to measure")
    parser.add_argument("--hidden", type=int, default=1024, help="width; 8 layers (default: 1024, 0.11 B parameters)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed without a checkpoint (default: 5)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    groups = init_groups(ParallelConfig(), seed=1)
    heads, wide = args.hidden // 64, 3 * args.hidden
    shape = ModelConfig(8, args.hidden, wide, heads, heads // 4, 64, 1024, tied_embeddings=True)
    train: dict[str, object] = {"precision": "bf16"}
    engine = make_engine(shape, groups, block_size=BLOCK, max_positions=ROW + BLOCK, train=train)
    if groups.main:
        args.out.mkdir(parents=True)
    dist.barrier()
    measure(engine, shape, args.out, args.steps)
    dist.barrier()
    if groups.main:
        shutil.rmtree(args.out)
    close_groups()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
