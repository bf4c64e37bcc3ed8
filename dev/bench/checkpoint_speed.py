"""Time that a training step waits for a checkpoint, compared with Megatron-Core's own save of the same state.

Runs in one process, or data parallel in several. Megatron-Core's save (dist_checkpointing, fully_reshardable) blocks
until everything is on the disk, and gathers a stage's optimizer on each data-parallel rank.
"""

import argparse
import pickle
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

from sdlm_megatron.parallel import compat, cpu

compat.silence_known_notices()
cpu.install()  # before anything imports megatron

from megatron.core import dist_checkpointing  # noqa: E402

from dev.bench.engine_case import StepCase  # noqa: E402
from dev.bench.timing import print_table, timed  # noqa: E402
from sdlm_megatron.checkpoint.async_writer import CheckpointWriter  # noqa: E402
from sdlm_megatron.config.command_line import make_parser  # noqa: E402
from sdlm_megatron.config.schema import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig  # noqa: E402
from sdlm_megatron.errors import run_cli  # noqa: E402
from sdlm_megatron.ops.attempt import read_events  # noqa: E402
from sdlm_megatron.parallel.engine import Engine  # noqa: E402
from sdlm_megatron.parallel.groups import close_groups, init_groups  # noqa: E402
from sdlm_megatron.weights.checkpoint_folder import TrainState  # noqa: E402

ROUNDS = 2
"""Checkpoints of each kind. The first one also allocates the host's memory."""


def megatron_save_seconds(engine: Engine, folder: Path) -> float:
    """Seconds of one blocking save by Megatron-Core."""
    assert engine.optimizer is not None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    dist.barrier()
    began = time.perf_counter()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    metadata["dp_cp_group"] = engine.groups.collection.dp_cp
    model = engine.module.sharded_state_dict(metadata=metadata)
    both = {"model": model, "optimizer": engine.optimizer.sharded_state_dict({"model": model}, metadata=metadata)}
    dist_checkpointing.save(both, str(folder))
    dist.barrier()
    return time.perf_counter() - began


def measure_checkpoints(case: StepCase, out: Path, steps: int) -> None:
    """Prints the table; files are written below `out`."""
    engine = case.engine
    case.step()
    alone = statistics.median(timed(case.step, engine.groups.device)[0] for _ in range(steps))
    state = TrainState(0, 0, 1, engine.shape, engine.config.diffusion, -1, "bf16", True, {})
    during: list[float] = []
    with CheckpointWriter(engine, out, CheckpointConfig(keep_last=1)) as writer:
        for number in range(1, ROUNDS + 1):
            writer.save(replace(state, step=number))
            # Steps continue while the writer thread works: their slowdown is part of the cost.
            while any(engine.groups.gather(writer.busy)):  # together: a step waits for all processes
                during.append(timed(case.step, engine.groups.device)[0])
            writer.wait()
    distributed_c10d._unpickler = pickle.Unpickler  # Megatron-Core's save exchanges objects, which training refuses
    megatron = [megatron_save_seconds(engine, out / "megatron") for _ in range(ROUNDS)]
    if not engine.groups.main:
        return
    saved = [event for event in read_events(out) if event["kind"] == "saved"]
    print_table(
        ("GB", "a step waits, s", "until it is on the disk, s", "Megatron-Core's blocking save, s"),
        [
            (f"{event['bytes'] / 1e9:.2f}", f"{event['blocked_s']:.3f}", f"{event['total_s']:.2f}", f"{seconds:.2f}")
            for event, seconds in zip(saved, megatron, strict=False)
        ],
    )
    print(f"a step alone {alone:.3f} s; while a checkpoint is written {statistics.median(during):.3f} s", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "torchrun --nproc-per-node 2 -m dev.bench.checkpoint_speed --out /data/bench --hidden 1024"
    parser = make_parser("python -m dev.bench.checkpoint_speed", __doc__, example=example)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder on the disk to measure")
    parser.add_argument("--hidden", type=int, default=1024, help="width of 8 layers; 1024 gives 0.11 B parameters")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed without a checkpoint")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    groups = init_groups(ParallelConfig(), seed=1)
    wide, heads, pairs = 3 * args.hidden, args.hidden // 64, max(args.hidden // 256, 1)
    config = RunConfig(model=ModelConfig(8, args.hidden, wide, heads, pairs, 64, 1024, tied_embeddings=True))
    config.train.precision = "bf16"
    case = StepCase.of(config, groups, "mixture", 1, 512)
    if groups.main:
        args.out.mkdir(parents=True)
    dist.barrier()
    measure_checkpoints(case, args.out, args.steps)
    # No rank may still be reading or writing when the folder is removed.
    dist.barrier()
    if groups.main:
        shutil.rmtree(args.out)
    close_groups()


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
