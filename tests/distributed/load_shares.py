"""`torchrun load_shares.py BASE TP MASK OUT`: load a base model, check each parameter, count bytes read per rank."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from sdlm_megatron.parallel import cpu

cpu.install()  # before anything imports megatron

from sdlm_megatron.checkpoint import restore  # noqa: E402
from sdlm_megatron.config.schema import ParallelConfig, RunConfig  # noqa: E402
from sdlm_megatron.errors import CheckpointError  # noqa: E402
from sdlm_megatron.parallel.engine import Engine  # noqa: E402
from sdlm_megatron.parallel.groups import close_groups, init_groups  # noqa: E402
from sdlm_megatron.weights.hf_config import read_hf_config  # noqa: E402
from sdlm_megatron.weights.hf_weights import HFWeights  # noqa: E402
from sdlm_megatron.weights.names import hf_rows, partition_dim  # noqa: E402
from sdlm_megatron.weights.shape import NewMaskToken, mean_row  # noqa: E402
from sdlm_megatron.weights.tensors import read_rows  # noqa: E402

BROKEN = "model.layers.1.mlp.down_proj.weight"


class Counting(HFWeights):
    """Counts the bytes that are read; if `broken`, reading the tensor BROKEN fails."""

    count = 0
    broken = False

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        if self.broken and name == BROKEN:
            raise CheckpointError("the disk fails", name)
        tensor = super().read(name, start, size)
        Counting.count += tensor.nbytes
        return tensor


def expected(engine: Engine, folder: Path, name: str, new_mask: NewMaskToken | None) -> torch.Tensor:
    """Expected shard of a parameter on this rank, from the whole tensors: fused, padded, then split."""
    weights, groups = HFWeights(folder), engine.groups
    parts = [read_rows(weights, hf, start, stop) for hf, start, stop in hf_rows(name, read_hf_config(folder).shape)]
    whole = torch.cat(parts)
    if "embedding" in name or "output_layer" in name:
        padded = whole.new_zeros(engine.module.vocab_size, whole.shape[1])
        padded[: len(whole)] = whole
        if new_mask is not None:
            padded[new_mask.row] = mean_row(whole, new_mask)
        whole = padded
    if (dim := partition_dim(name)) is None:
        return whole
    if name.endswith("linear_fc1.weight"):
        return torch.cat([part.chunk(groups.tp_size)[groups.tp_rank] for part in whole.chunk(2)])
    return whole.chunk(groups.tp_size, dim=dim)[groups.tp_rank]


def main(folder: Path, tensor: int, mask: int, out: Path) -> None:
    config = RunConfig(parallel=ParallelConfig(tensor=tensor))
    config.train.precision = "bf16"
    groups = init_groups(config.parallel, seed=1)
    new_mask = NewMaskToken(mask, mask) if mask else None
    shape = read_hf_config(folder).shape
    shape = replace(shape, vocab_size=max(shape.vocab_size, mask + 1))
    engine = Engine(config, shape, groups, max_positions=64, steps=3, initialize=False)
    restore.HFWeights = Counting  # type: ignore[misc]
    restore.load_base(folder, engine, new_mask=new_mask)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, expected(engine, folder, name, new_mask).bfloat16()), name
    read = groups.gather(Counting.count)
    Counting.broken = True
    try:
        restore.load_base(folder, engine, new_mask=new_mask)
        failed = False
    except CheckpointError as error:
        failed = error.what == "the disk fails"
    failures = groups.gather(failed)
    if groups.main:
        out.write_text(json.dumps({"read": read, "failed": failures}))
    close_groups()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
