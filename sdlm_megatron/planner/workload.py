"""Workload of a run: rows, tokens, targets and visible pairs of a dataset or of the published mixture."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.layout import IGNORE, next_token_targets
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.errors import DataError
from sdlm_megatron.planner.assumptions import Assumptions
from sdlm_megatron.planner.flops import training_flops
from sdlm_megatron.planner.memory import RowTokens

POINTS = 20_000
"""Document lengths, at even quantiles, that represent the mixture."""
SAMPLED_ROWS = 200
"""Rows of a dataset that are read to count visible pairs."""


@dataclass(frozen=True)
class Workload:
    """One epoch of data, and its mean row."""

    source: str
    rows: float
    documents: float
    row: RowTokens
    pairs: float
    """Visible (query, key) pairs per row."""

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

    def row_flops(self, model: ModelConfig) -> float:
        """Model FLOPs per row, forward and backward."""
        tokens = round(self.row.clean + self.row.block)
        return training_flops(model, tokens=tokens, pairs=round(self.pairs), label_rows=round(self.row.label_rows))


def mixture(block_size: int, causal_attn: bool, assumed: Assumptions, *, next_token: bool = False) -> Workload:
    """The published mixture: its numbers of documents and tokens, with lognormal document lengths.

    A document of L clean tokens has R = response_share * L anchors and min(row_length - L, r * R) // D blocks. With
    `next_token`, each response token that is a target of some block is also a target of a clean token.
    """
    length = assumed.row_length
    mean = assumed.content_tokens / assumed.documents + assumed.template_tokens
    normal = NormalDist(0, assumed.length_spread) if assumed.length_spread else None
    quantiles = (np.arange(POINTS) + 0.5) / POINTS
    clean = np.exp([normal.inv_cdf(q) for q in quantiles]) if normal else np.ones(POINTS)
    clean = np.minimum(clean * mean / clean.mean(), length - block_size)
    response = assumed.response_share * clean
    room = np.minimum(length - clean, assumed.repeat * response)
    blocks = np.minimum(np.floor(room / block_size), response)
    own = block_size * (block_size + 1) / 2 if causal_attn else block_size**2
    pairs = clean * (clean + 1) / 2 + blocks * (block_size * (clean - response / 2) + own)
    targets = blocks * (block_size - np.minimum(block_size * (block_size - 1) / 2 / response, block_size - 1))
    # probability that at least one of the D anchors before a token is drawn, if draws were independent
    covered = response * (1 - (1 - blocks / response) ** block_size) if next_token else np.zeros(1)
    per_row = float(length * assumed.fill / (clean + blocks * block_size).mean())  # documents
    means = [float(per_row * x.mean()) for x in (clean, blocks * block_size, response, targets, covered)]
    row = RowTokens(int(length), means[0], means[1], means[2], means[3], block_size, means[4])
    source = (
        f"published mixture: {assumed.documents:,.0f} documents, {assumed.content_tokens:,.0f} tokens of text and "
        f"{assumed.template_tokens:g} of the chat template each"
    )
    return Workload(source, assumed.documents / per_row, assumed.documents, row, float(per_row * pairs.mean()))


def dataset(path: str, causal_attn: bool, *, next_token: bool = False) -> Workload:
    """A packed dataset: counts from its manifest; visible pairs and clean targets from a sample of its rows."""
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
    row = RowTokens(
        data.row_length,
        counts["clean"] / rows,
        counts["block"] / rows,
        counts["block"] / rows / repeat,
        counts["targets"] / rows,
        d,
        sum(clean) / len(clean),
    )
    return Workload(f"dataset {path}", rows, counts["documents"], row, sum(seen) / len(seen))


def workload(config: RunConfig, path: str, assumed: Assumptions) -> Workload:
    """Workload of the dataset at `path`, or of the published mixture if `path` is empty."""
    diffusion = config.diffusion
    next_token = diffusion.next_token_weight > 0
    if path:
        return dataset(path, diffusion.causal_attn, next_token=next_token)
    # block size 0 means "as the dataset"; without one, assume that of the published models
    return mixture(diffusion.block_size or 4, diffusion.causal_attn, assumed, next_token=next_token)


def rows_per_step(config: RunConfig, work: Workload) -> int:
    """Rows of the global batch, converted from documents as training does."""
    if config.train.global_batch_unit == "rows":
        return config.train.global_batch
    return max(1, round(config.train.global_batch / work.documents_per_row))


def steps(config: RunConfig, work: Workload, rows: int) -> int:
    """Number of steps of the run."""
    return config.train.steps or math.ceil(config.train.full_epochs * work.rows / rows)
