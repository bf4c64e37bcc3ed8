"""`python checkpoint_chain.py DATA BASE OUT`: pass a checkpoint through a chain of layouts.

Each layout loads the checkpoint that the previous one saved. Megatron-Core is imported once; the processes of each
layout are forked.
"""

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch._dynamo  # before the fork; otherwise each process imports it with its optimizer

from sdlm_megatron.parallel import compat, cpu

compat.silence_known_notices()
cpu.install()

from sdlm_megatron.checkpoint import restore as checkpointing  # noqa: E402
from sdlm_megatron.checkpoint.async_writer import CheckpointWriter  # noqa: E402
from sdlm_megatron.config.schema import CheckpointConfig, DiffusionConfig, LoraConfig, ParallelConfig, RunConfig  # noqa: E402
from sdlm_megatron.data.batch import StepLoader  # noqa: E402
from sdlm_megatron.data.cut import StepGrid  # noqa: E402
from sdlm_megatron.data.format import PackedDataset  # noqa: E402
from sdlm_megatron.parallel import optimizer  # noqa: E402
from sdlm_megatron.parallel.engine import Engine  # noqa: E402
from sdlm_megatron.parallel.groups import init_groups  # noqa: E402
from sdlm_megatron.weights.checkpoint_folder import TrainState, newest, read_state, step_folder  # noqa: E402
from sdlm_megatron.weights.hf_config import read_hf_config  # noqa: E402

ROWS = 4
ALL = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclass(frozen=True)
class Layout:
    processes: int
    parallel: dict[str, Any]
    buckets: int | None = 5000

    def __str__(self) -> str:
        return f"{self.processes} processes, {self.parallel}"


CHAINS = {
    "bf16": [
        Layout(8, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, **ALL}),
        Layout(1, {"distributed_optimizer": False}),
        Layout(4, {"context": 2, "tensor": 2, "sequence": True}),
        Layout(3, {}, buckets=None),
        Layout(4, {"tensor": 4}),  # more than KV heads
        Layout(4, {"tensor": 2, "distributed_optimizer": False}),
        Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    ],
    "fp32": [
        Layout(2, ALL),
        Layout(4, {"context": 2, "distributed_optimizer": False}),
        Layout(2, {"tensor": 2, "distributed_optimizer": False}),
        Layout(4, {"context": 4}),
    ],
}


def forked(processes: int, action: Callable[..., None], *arguments: Any, wait: bool = True) -> list:
    """Runs `action(*arguments)` in `processes` forked, connected processes; raises if any of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> None:
        names = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1")
        code = 1
        try:
            action(*arguments)
            code = 0
        except BaseException:  # noqa: BLE001  the process ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    children = [multiprocessing.get_context("fork").Process(target=child, args=(r,)) for r in range(processes)]
    for process in children:
        process.start()
    if wait:
        for process in children:
            process.join()
        assert [process.exitcode for process in children] == [0] * processes, f"{action.__name__}{arguments}"
    return children


def connections() -> int:
    """Number of TCP connections of this process."""
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process().net_connections("tcp"))


@dataclass
class Run:
    """Builds engines of any layout on one model and dataset."""

    data: Path
    base: Path
    precision: str
    lora: LoraConfig = field(default_factory=LoraConfig)

    def engine(self, layout: Layout, *, initialize: bool = False) -> tuple[Engine, TrainState]:
        diffusion = DiffusionConfig(block_size=4, target_shift=True, mask_token="<text_mask>")
        config = RunConfig(parallel=ParallelConfig(**layout.parallel), diffusion=diffusion, lora=self.lora)
        config.train.precision, optimizer.BUCKET_PARAMETERS = self.precision, layout.buckets
        config.optimizer.lr = 1e-3
        groups = init_groups(config.parallel, seed=1)
        shape, dataset = read_hf_config(self.base).shape, PackedDataset(self.data)
        mask = dataset.manifest["mask_token_id"]
        options: dict[str, Any] = {"max_positions": 4096, "row_length": 128, "steps": 9, "initialize": initialize}
        engine = Engine(config, shape, groups, mask_token_id=mask, **options)
        if initialize:
            checkpointing.load_base(self.base, engine, new_mask=None)
        state = TrainState(0, 0, ROWS, shape, config.diffusion, mask, self.precision, True, {}, lora=self.lora)
        return engine, state

    def steps(self, engine: Engine, first: int, last: int) -> None:
        """Trains steps `first` to `last`; `engine.results` checks each of them."""
        groups = engine.groups
        grid = StepGrid(groups.dp_size, -(-ROWS // (2 * groups.dp_size)) * 2, 2, 128)
        loader = StepLoader(PackedDataset(self.data), grid, ROWS, 1000, seed=1)
        for step in range(first, last + 1):
            rows = [engine.prepare(batch) for batch in loader.load((step - 1) * ROWS, groups.dp_rank)]
            engine.results([engine.train_step(rows, step)])

    def begin(self, layout: Layout, out: Path) -> None:
        """Saves after steps 2 and 4 without waiting: the first checkpoint is written while training continues."""
        engine, state = self.engine(layout, initialize=True)
        before = connections()
        with CheckpointWriter(engine, out, CheckpointConfig(keep_last=0)) as writer:
            made = engine.groups.gather(connections() - before)
            if engine.groups.main:
                out.parent.mkdir(parents=True)
                out.with_suffix(".connections.json").write_text(json.dumps(made))
            for step in (2, 4):
                self.steps(engine, step - 1, step)
                writer.save(replace(state, step=step), final=step == 4)

    def resume(self, layout: Layout, source: Path, out: Path, last: int) -> None:
        """Loads the newest checkpoint of `source`, trains to `last`, saves to `out`."""
        engine, _ = self.engine(layout)
        folder = newest(source / "ckpt", print)
        assert folder is not None
        state = read_state(folder)
        checkpointing.load(folder, engine, step=state.step)
        self.steps(engine, state.step + 1, last)
        CheckpointWriter(engine, out, CheckpointConfig()).save(replace(state, step=last), final=True)


def main(data: Path, base: Path, out: Path, precision: str) -> None:
    run, (first, *others) = Run(data, base, precision), CHAINS[precision]
    forked(first.processes, run.begin, first, out / "first")
    source = out / "only-2"
    os.makedirs(source / "ckpt")
    os.rename(step_folder(out / "first", 2), step_folder(source, 2))
    for number, layout in enumerate(others):
        forked(layout.processes, run.resume, layout, source, out / f"chain-{number}", 2)
        source = out / f"chain-{number}"
    forked(first.processes, run.resume, first, source, out / "back", 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, base, out = map(Path, sys.argv[1:])
    for precision in CHAINS:
        main(data, base, out / precision, precision)
