"""Workload of a run: rows, tokens, targets and visible pairs of a dataset or of the published mixture."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.data.cut import StepDocuments, StepGrid, choose_grid, cut
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.sample import sample_steps
from sdlm_megatron.diffusion.layout import IGNORE, next_token_targets
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.errors import DataError
from sdlm_megatron.planner.assumptions import Assumptions
from sdlm_megatron.planner.flops import training_flops
from sdlm_megatron.planner.memory import RowTokens
from sdlm_megatron.planner.parallel_layout import ParallelLayout

_STEPS = 8
"""Steps of the mixture that are drawn to choose a row length."""
POINTS = 20_000
"""Document lengths, at even quantiles, that represent the mixture."""
SAMPLED_ROWS = 200
"""Rows of a dataset that are read to count visible pairs."""
_CONTENT = ("clean", "block", "response", "targets", "next_token_targets")


class StepSample:
    """Steps of a workload, from which training chooses its rows; results are kept.

    Args:
        draw: the documents of some steps, by the number of their rows.
    """

    def __init__(self, draw: Callable[[int], Sequence[StepDocuments]]) -> None:
        self.steps = cache(draw)
        self.grid = cache(self._grid)
        self.spread = cache(self._spread)

    def _grid(self, rows: int, row_length: int, parallel: tuple[int, int, int], train: tuple[int, bool]) -> StepGrid:
        """The grid that training would choose.

        Args:
            rows: of the dataset in a step.
            parallel: data-parallel ranks, divisor of the number of micro-batches, divisor of the row length.
            train: micro_batches, and whether the loss is a mean over rows.
        """
        ranks, multiple, unit = parallel
        options = {"ranks": ranks, "multiple": multiple, "unit": unit, "micro_batches": train[0]}
        return choose_grid(self.steps(rows), rows, row_length, **options, whole_rows=train[1])

    def _spread(self, rows: int, grid: StepGrid) -> tuple[float, float]:
        """Largest visible pairs over their mean: of a row, and of the sum of a rank; mean over the steps."""
        spreads = []
        for docs in self.steps(rows):
            places, count = cut(docs, grid)
            pairs = np.bincount(places, docs.pairs, count * grid.ranks).reshape(count, grid.ranks)
            spreads.append((pairs.max() / pairs.mean(), pairs.sum(0).max() / pairs.sum(0).mean()))
        return tuple(np.mean(spreads, axis=0).tolist())


@dataclass(frozen=True)
class Workload:
    """One epoch of data, and its mean row."""

    source: str
    rows: float
    documents: float
    row: RowTokens
    pairs: float
    """Visible (query, key) pairs per row."""
    sample: StepSample = field(repr=False, compare=False)

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

    def scaled(self, length: int, share: float) -> "Workload":
        """The same documents in rows of `length` tokens, each with `share` times the content."""
        means = {name: getattr(self.row, name) * share for name in _CONTENT}
        row = replace(self.row, length=length, **means)
        return replace(self, rows=self.rows / share, row=row, pairs=self.pairs * share)

    def part(self, layout: ParallelLayout) -> "Workload":
        """The share of a rank in each row under context parallelism; without it, whole rows."""
        return replace(self, row=self.row.part(layout), pairs=self.pairs / layout.context)

    def row_flops(self, model: ModelConfig, *, frozen: bool) -> float:
        """Model FLOPs per row, forward and backward; `frozen`: of a run with adapters."""
        counts = {"pairs": round(self.pairs), "label_rows": round(self.row.label_rows)}
        return training_flops(model, tokens=round(self.row.clean + self.row.block), **counts, frozen=frozen)


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
    sizes = np.stack([clean + blocks * block_size, pairs], axis=1).astype(np.int64)
    filled = length * assumed.fill
    source = (
        f"published mixture: {assumed.documents:,.0f} documents, {assumed.content_tokens:,.0f} tokens of text and "
        f"{assumed.template_tokens:g} of the chat template each"
    )
    sample = StepSample(lambda rows: [_draw_step(sizes, rows, filled, seed) for seed in range(_STEPS)])
    return Workload(source, assumed.documents / per_row, assumed.documents, row, float(per_row * pairs.mean()), sample)


def _draw_step(sizes: np.ndarray, rows: int, filled: float, seed: int) -> StepDocuments:
    """Documents with `sizes` (tokens, pairs) that are drawn until they would fill rows of `filled` tokens."""
    count = int(rows * filled / sizes[:, 0].mean() * 1.5) + 100
    drawn = np.random.default_rng(seed).choice(sizes, count)
    ends = np.cumsum(drawn[:, 0])
    drawn = drawn[: max(1, int((ends <= rows * filled).sum()))]  # the first may be longer than what fills a row
    before = np.cumsum(drawn[:, 0]) - drawn[:, 0]
    return StepDocuments((before // filled).astype(np.int64), np.zeros(len(drawn), np.int64), *drawn.T)


def dataset(path: str, causal_attn: bool, *, next_token: bool = False, seed: int = 0) -> Workload:
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
    steps = StepSample(lambda count: sample_steps(data, count, seed=seed))
    return Workload(f"dataset {path}", rows, counts["documents"], row, sum(seen) / len(seen), steps)


def workload(config: RunConfig, path: str, assumed: Assumptions) -> Workload:
    """Workload of the dataset at `path`, or of the published mixture if `path` is empty."""
    diffusion = config.diffusion
    next_token = diffusion.next_token_weight > 0
    if path:
        return dataset(path, diffusion.causal_attn, next_token=next_token, seed=config.train.seed)
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
