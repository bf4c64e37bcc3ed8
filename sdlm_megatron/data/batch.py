"""Rows of the run as micro-batches."""

import numpy as np

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.order import locate
from sdlm_megatron.diffusion.row import MicroBatch, empty_layout, make_micro_batch


def load_micro_batch(
    dataset: PackedDataset, number: int | None, *, seed: int, next_token_weight: float = 0.0
) -> MicroBatch:
    """The run's row `number` as a micro-batch; None gives an empty row."""
    if number is None:
        tokens, layout = np.empty(0, dtype=np.int32), empty_layout(dataset.block_size)
    else:
        place = locate(number, dataset.rows, seed=seed)
        tokens, layout = dataset.read(place.epoch, place.row)
    return make_micro_batch(
        tokens,
        layout,
        row_length=dataset.row_length,
        pad_token_id=dataset.manifest["pad_token_id"],
        eos_token_id=dataset.manifest["eos_token_id"],
        number=number,
        next_token_weight=next_token_weight,
    )
