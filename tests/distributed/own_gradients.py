"""`torchrun own_gradients.py DATA BASE OUT SETTINGS`: steps that scale own or all gradients, compared bitwise.

SETTINGS is a list; OUT has a list with the results of each rank for each of them."""

import json
import sys
from pathlib import Path

import torch

from sdlm_megatron.parallel import cpu

cpu.install()  # before anything imports megatron

from sdlm_megatron.checkpoint import restore  # noqa: E402
from sdlm_megatron.config.schema import ParallelConfig, RunConfig  # noqa: E402
from sdlm_megatron.data.format import PackedDataset  # noqa: E402
from sdlm_megatron.parallel import optimizer  # noqa: E402
from sdlm_megatron.parallel.engine import Engine  # noqa: E402
from sdlm_megatron.parallel.groups import Groups, close_groups, init_groups  # noqa: E402
from sdlm_megatron.weights.hf_config import read_hf_config  # noqa: E402
from tests.helpers import load_micro_batch  # noqa: E402

own_scale, written = optimizer.scale_gradients, [0, 0]
optimizer.BUCKET_PARAMETERS = 5000


def counted(chunk, scale, group) -> None:
    """Counts gradients, and those that scaling changes."""
    before = [buffer.grad_data.clone() for buffer in chunk.buffers]
    own_scale(chunk, scale, group)
    for buffer, old in zip(chunk.buffers, before, strict=True):
        written[0] += int((buffer.grad_data != old).sum())
        written[1] += int((old != 0).sum())


def compare(dataset: PackedDataset, base: Path, groups: Groups, parallel: dict) -> list:
    """Of each rank: whether norms and weights are bitwise equal, the share of gradients written, the norms."""
    config, results, written[:] = RunConfig(parallel=ParallelConfig(**parallel)), [], [0, 0]
    config.train.precision, config.diffusion.block_size, config.optimizer.lr = "fp32", 4, 1e-3
    config.diffusion.causal_attn = False
    for scaling in (counted, lambda chunk, scale, group: chunk.scale_gradients(scale)):
        optimizer.scale_gradients = scaling
        engine = Engine(config, read_hf_config(base).shape, groups, max_positions=4096, steps=9, initialize=False)
        restore.load_base(base, engine, new_mask=None)
        norms = []
        for step in (1, 2, 3):
            rows = [
                engine.prepare(load_micro_batch(dataset, 4 * step + groups.dp_rank * 2 + i, seed=0)) for i in (0, 1)
            ]
            norms.append(engine.results([engine.train_step(rows, step)])[0].grad_norm)
        engine.gather_weights()
        results.append((norms, [p.detach().clone() for m in engine.modules for p in m.parameters()]))
    (norms, weights), (whole_norms, whole) = results
    same = norms == whole_norms and all(torch.equal(a, b) for a, b in zip(weights, whole, strict=True))
    return groups.gather([same, written[0] / written[1], norms])


def main(data: Path, base: Path, out: Path, settings: list[dict]) -> None:
    groups = init_groups(ParallelConfig(), seed=1)
    results = [compare(PackedDataset(data), base, groups, parallel) for parallel in settings]
    if groups.main:
        out.write_text(json.dumps(results))
    close_groups()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:4]), json.loads(sys.argv[4]))
