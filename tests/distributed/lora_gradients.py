"""`torchrun lora_gradients.py DATA BASE OUT SETTINGS`: gradients of a model with adapters, before any update.

SETTINGS is JSON: dotted settings. Each rank writes OUT.RANK: for each region of a trained tensor whose gradient its
optimizer reads, (key, shape of the whole tensor, start, size, value, gradient). B is random instead of 0, as the
gradient of A is 0 otherwise. It fails if a frozen weight has a gradient or a place in the optimizer.
"""

import json
import sys
from pathlib import Path

import torch

from sdlm_megatron.parallel import cpu

cpu.install()  # before anything imports megatron

from sdlm_megatron.checkpoint import restore  # noqa: E402
from sdlm_megatron.checkpoint.sharding import _place, _states  # noqa: E402
from sdlm_megatron.config.schema import RunConfig  # noqa: E402
from sdlm_megatron.data.format import PackedDataset  # noqa: E402
from sdlm_megatron.parallel import optimizer  # noqa: E402
from sdlm_megatron.parallel.engine import Engine  # noqa: E402
from sdlm_megatron.parallel.groups import close_groups, init_groups  # noqa: E402
from sdlm_megatron.weights.adapter_tensors import InitialAdapters  # noqa: E402
from sdlm_megatron.weights.hf_config import read_hf_config  # noqa: E402
from tests.helpers import MASK, load_micro_batch  # noqa: E402

ROWS = 4


class RandomAdapters(InitialAdapters):
    """Both factors random."""

    def read(self, name: str, start: tuple, size: tuple) -> torch.Tensor:
        if not name.endswith(".B"):
            return super().read(name, start, size)
        layers, rows, columns = (slice(a, a + n) for a, n in zip(start, size, strict=True))
        return torch.stack([self._random(name, i)[rows, columns] for i in range(layers.start, layers.stop)]) / 2


def build(base: Path, settings: dict) -> Engine:
    """An engine with random adapters."""
    restore.InitialAdapters = RandomAdapters  # type: ignore[misc]
    config = RunConfig()
    config.train.precision, config.diffusion.block_size, config.lora.rank = "fp32", 4, 3
    config.lora.alpha, config.train.logits_mb, optimizer.BUCKET_PARAMETERS = 6.0, 0.05, 1000
    for key, value in settings.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    groups = init_groups(config.parallel, seed=1)
    shape = read_hf_config(base).shape
    engine = Engine(config, shape, groups, max_positions=4096, steps=9, initialize=False, mask_token_id=MASK)
    restore.load_base(base, engine, new_mask=None)
    return engine


def main(data: Path, base: Path, out: Path, settings: dict) -> None:
    engine, dataset = build(base, settings), PackedDataset(data)
    share = ROWS // engine.groups.dp_size
    rows = [load_micro_batch(dataset, engine.groups.dp_rank * share + i, seed=0) for i in range(share)]
    engine.forward_backward([engine.prepare(row) for row in rows])
    states, regions = _states(engine.optimizer), []
    for module in engine.modules:
        for parameter, placed, _ in _place(engine, module):
            if not parameter.requires_grad:
                assert parameter.grad is None and not hasattr(parameter, "main_grad") and parameter not in states
                continue
            state = states.get(parameter)
            low, high = (0, 0) if state is None else (state.low, state.low + state.main.numel())
            value, gradient = parameter.detach().flatten(), parameter.main_grad.flatten()
            for part in placed:
                for region in part.intersect(low, high):
                    here = slice(region.offset, region.offset + region.numel)
                    parts = [x[here].reshape(region.size).clone() for x in (value, gradient)]
                    regions.append((part.key, part.shape, region.start, *parts))
    torch.save(regions, out.with_suffix(f".{engine.groups.rank}"))
    close_groups()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:4]), json.loads(sys.argv[4]))
