"""What there is to train: rows, tokens, targets and visible pairs, of a dataset or of the published mixture."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.layout import IGNORE, next_token_targets
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.errors import DataError
from sdlm_megatron.planner.assumptions import Assumptions
from sdlm_megatron.planner.flops import ModelShape, training_flops
from sdlm_megatron.planner.memory import Row

POINTS = 20_000
"""Document lengths, at even quantiles, that the mixture is made of."""
SAMPLED_ROWS = 200


@dataclass(frozen=True)
class Workload:
    """One epoch, and the row that is typical of it."""

    source: str
    rows: float
    documents: float
    row: Row
    pairs: float
    """Visible (query, key) pairs of a row."""

    @property
    def documents_per_row(self) -> float:
        return self.documents / self.rows

    @property
    def clean_tokens(self) -> float:
        return self.row.clean * self.rows

    @property
    def useful_tokens(self) -> float:
        """Clean and block tokens."""
        return (self.row.clean + self.row.block) * self.rows

    def row_flops(self, shape: ModelShape) -> float:
        """Model FLOPs of a row, forward and backward."""
        tokens = round(self.row.clean + self.row.block)
        return training_flops(shape, tokens=tokens, pairs=round(self.pairs), label_rows=round(self.row.label_rows))


def mixture(block_size: int, causal_attn: bool, given: Assumptions, *, next_token: bool = False) -> Workload:
    """The published mixture: its number of documents and tokens, lengths lognormal around their mean.

    A document of L clean tokens has R = response_share * L anchors and min(row_length - L, r * R) // D blocks.
    With `next_token` each answer token that one of the D anchors before it covers is a target of a clean token too.
    """
    length = given.row_length
    mean = given.clean_tokens / given.documents
    normal = NormalDist(0, given.length_spread) if given.length_spread else None
    quantiles = (np.arange(POINTS) + 0.5) / POINTS
    clean = np.exp([normal.inv_cdf(q) for q in quantiles]) if normal else np.ones(POINTS)
    clean = np.minimum(clean * mean / clean.mean(), length - block_size)
    response = given.response_share * clean
    room = np.minimum(length - clean, given.repeat * response)
    blocks = np.minimum(np.floor(room / block_size), response)
    own = block_size * (block_size + 1) / 2 if causal_attn else block_size**2
    pairs = clean * (clean + 1) / 2 + blocks * (block_size * (clean - response / 2) + own)
    targets = blocks * (block_size - np.minimum(block_size * (block_size - 1) / 2 / response, block_size - 1))
    covered = response * (1 - (1 - blocks / response) ** block_size) if next_token else np.zeros(1)
    a_row = float(length * given.fill / (clean + blocks * block_size).mean())  # documents
    means = [float(a_row * x.mean()) for x in (clean, blocks * block_size, response, targets, covered)]
    row = Row(int(length), means[0], means[1], means[2], means[3], block_size, means[4])
    source = f"the published mixture: {given.documents:,.0f} documents, {given.clean_tokens:,.0f} clean tokens"
    return Workload(source, given.documents / a_row, given.documents, row, float(a_row * pairs.mean()))


def dataset(path: str, causal_attn: bool, *, next_token: bool = False) -> Workload:
    """A packed dataset: counts of its manifest; visible pairs, and targets of clean tokens, of some of its rows."""
    data = PackedDataset(Path(path))
    counts = data.manifest["counts"][0]
    rows = counts["rows"]
    if not rows:
        raise DataError("the dataset has no rows", path, "build it from more documents")
    sample = [data.read(0, i) for i in range(0, rows, max(1, rows // SAMPLED_ROWS))]
    seen = [visible_pairs(layout, causal_attn=causal_attn) for _, layout in sample]
    eos = data.manifest["eos_token_id"]
    clean = [int((next_token_targets(*x, eos) != IGNORE).sum()) for x in sample] if next_token else [0]
    d, repeat = data.block_size, data.manifest["repeat"]
    row = Row(
        data.row_length,
        counts["clean"] / rows,
        counts["block"] / rows,
        counts["block"] / rows / repeat,
        counts["targets"] / rows,
        d,
        sum(clean) / len(clean),
    )
    return Workload(f"the dataset {path}", rows, counts["documents"], row, sum(seen) / len(seen))


def workload(config: RunConfig, path: str, given: Assumptions) -> Workload:
    """Of the dataset at `path`, of the published mixture if that is empty."""
    diffusion = config.diffusion
    next_token = diffusion.next_token_weight > 0
    if path:
        return dataset(path, diffusion.causal_attn, next_token=next_token)
    # without a dataset to read it from: the published models' block size
    return mixture(diffusion.block_size or 4, diffusion.causal_attn, given, next_token=next_token)


def rows_per_step(config: RunConfig, work: Workload) -> int:
    """Rows of the global batch, as training counts them."""
    if config.train.global_batch_unit == "rows":
        return config.train.global_batch
    return max(1, round(config.train.global_batch / work.documents_per_row))


def steps(config: RunConfig, work: Workload, rows: int) -> int:
    """Steps of the run."""
    return config.train.steps or math.ceil(config.train.epochs * work.rows / rows)
