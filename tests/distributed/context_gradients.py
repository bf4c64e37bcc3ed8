"""`torchrun context_gradients.py BASE OUT SETTINGS`: loss, gradients and losses by document of unusual rows.

Rank 0 writes OUT, a list with one entry per case; gradients only without tensor parallelism.
"""

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from sdlm_megatron.parallel import cpu

cpu.install()  # before anything imports megatron

from sdlm_megatron.checkpoint import restore  # noqa: E402
from sdlm_megatron.checkpoint.sharding import hf_tensors  # noqa: E402
from sdlm_megatron.config.schema import ParallelConfig, RunConfig  # noqa: E402
from sdlm_megatron.diffusion.layout import pack_row  # noqa: E402
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch  # noqa: E402
from sdlm_megatron.model.attention.choice import choose_attention  # noqa: E402
from sdlm_megatron.parallel.engine import Engine  # noqa: E402
from sdlm_megatron.parallel.groups import close_groups, init_groups  # noqa: E402
from sdlm_megatron.parallel.optimizer import gradient_norm  # noqa: E402
from sdlm_megatron.parallel.results import document_losses, queued_step  # noqa: E402
from sdlm_megatron.weights.hf_config import read_hf_config  # noqa: E402
from tests.helpers import EOS, MASK  # noqa: E402

Document = tuple[int, list[int]]
ROWS: list[list[Document]] = [
    [(37, [0, 5, 6, 30, 36])],  # one document over all ranks
    [(1, []), (9, []), (20, [3, 4, 19]), (1, [0]), (6, [5])],  # no blocks, one token, no clean keys
    [(2, [0])],  # fewer tokens than ranks
    [],
]
CASES = list(product((1, 4, 16), (False, True)))
"""D, and whether the row-wise loss with causal blocks and a next-token loss is taken."""


def row_of(documents: list[Document], number: int, size: int, weight: float) -> MicroBatch:
    rng = np.random.default_rng(number)
    packed = [
        (i, np.append(rng.integers(0, 256, n - 1), EOS), np.array(starts, np.int64))
        for i, (n, starts) in enumerate(documents)
    ]
    tokens, layout = pack_row(packed, block_size=size, mask_token_id=MASK)
    row = {"row_length": 160, "pad_token_id": 0, "eos_token_id": EOS, "rows": [number] * len(documents)}
    return make_micro_batch(tokens, layout, **row, next_token_weight=weight)


def main(base: Path, out: Path, parallel: dict) -> None:
    config = RunConfig(parallel=ParallelConfig(distributed_optimizer=False, **parallel))
    config.train.precision = "fp32"
    if config.parallel.sequence:
        config.train.recompute, config.train.logits_mb = "full", 0.02
    groups = init_groups(config.parallel, seed=1)
    engine = Engine(config, read_hf_config(base).shape, groups, max_positions=64, steps=4, initialize=False)
    restore.load_base(base, engine, new_mask=None)
    results = []
    for size, by_row in CASES:
        config.diffusion.block_size, config.diffusion.causal_attn = size, by_row
        config.train.loss_normalization = "rows" if by_row else "targets"
        config.train.next_token_balance = by_row
        context = groups.collection.cp if groups.cp_size > 1 else None
        engine.attention = choose_attention(
            "auto", causal_attn=by_row, device=groups.device, heads=engine.heads, context=context
        )
        rows = [engine.prepare(row_of(row, i, size, 0.3 * by_row)) for i, row in enumerate(ROWS)]
        outputs = engine.forward_backward([replace(row, measure=True) for row in rows])
        engine._count_losses(outputs)  # the weights of the next case with a next-token loss
        engine.optimizer.prepare_grads()
        norm = gradient_norm(engine.optimizer)
        running = {"running_losses": engine.running_losses}
        queued = queued_step(1, 0.0, outputs, norm, rows, groups, causal_attn=by_row, **running)
        (result,) = engine.results([queued])
        whole = hf_tensors(engine, lambda p: p.main_grad) if groups.tp_size == 1 else ()
        gradients = {name: x.clone() for name, x in whole}
        documents = [vars(document) for document in document_losses(queued, groups)]
        results.append((vars(result), gradients, documents))
    if groups.main:
        torch.save(results, out)
    close_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
