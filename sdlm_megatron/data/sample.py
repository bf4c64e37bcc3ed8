"""Documents of the steps of a run, from the sizes that a dataset stores; without torch, for the planner."""

import numpy as np

from sdlm_megatron.data.cut import StepDocuments
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.order import locate_many

SAMPLED_STEPS = 64
"""Steps whose documents decide the row length of a run."""


def step_documents(dataset: PackedDataset, numbers: np.ndarray, *, seed: int) -> StepDocuments:
    """The documents of rows of the run, from their sizes; `numbers` int64 ascend."""
    size = dataset.block_size
    parts = [np.empty((4, 0), dtype=np.int64)]
    for epoch, some, rows in locate_many(numbers, dataset.rows, seed=seed):
        sizes = dataset.sizes(epoch)
        counts = sizes.first[rows + 1] - sizes.first[rows]
        index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        clean, blocks, start = sizes.table[np.repeat(sizes.first[rows], counts) + index].astype(np.int64).T
        pairs = clean * (clean + 1) // 2 + blocks * size * (start + size)
        parts.append(np.stack([np.repeat(some, counts), index, clean + blocks * size, pairs]))
    return StepDocuments(*np.concatenate(parts, axis=1))


def sample_steps(dataset: PackedDataset, rows_per_step: int, *, seed: int) -> list[StepDocuments]:
    """Up to SAMPLED_STEPS steps, spread over the first epoch."""
    whole = max(1, dataset.rows(0) // rows_per_step)
    steps = np.unique(np.linspace(0, whole - 1, min(SAMPLED_STEPS, whole)).astype(np.int64)).tolist()
    rows = [np.arange(step * rows_per_step, (step + 1) * rows_per_step) for step in steps]
    return [step_documents(dataset, numbers, seed=seed) for numbers in rows]
