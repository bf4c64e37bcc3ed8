"""Context parallelism inside one process: the shards of a row add up to the row, in tokens, targets and attention."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from attention_cases import defined, inputs, layout_of, run
from helpers import EOS, MASK, random_document
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, pack_row, row_positions
from sdlm_megatron.diffusion.loss import LabelRows, loss_terms
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch, shard_row
from sdlm_megatron.diffusion.shard import RowShard, shard_length
from sdlm_megatron.model.attention import decomposed, varlen
from sdlm_megatron.model.attention.varlen import TorchKernel

SIZES = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def layouts(draw: st.DrawFn, sizes: tuple[int, ...] = (1, 2, 4, 8, 16)) -> RowLayout:
    """Strategy: rows of 0 to 5 documents, of which some have one token, no blocks or no clean tokens."""
    documents = []
    for _ in range(draw(st.integers(0, 5))):
        n = draw(st.sampled_from([1, 2, 3, 24, 61]))
        documents.append((n, sorted(draw(st.sets(st.integers(0, n - 1), max_size=n)))))
    return layout_of(documents, draw(st.sampled_from(sizes)))


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), size=SIZES, spare=st.integers(0, 7), multiple=st.sampled_from([1, 2, 32]))
def test_each_token_is_in_one_shard(layout: RowLayout, size: int, spare: int, multiple: int) -> None:
    shards = [RowShard(layout, rank, size) for rank in range(size)]
    assert np.array_equal(np.sort(np.concatenate([s.index for s in shards])), np.arange(layout.used))
    length = shard_length(layout.used + spare, layout.block_size, size, multiple)
    assert length % multiple == 0 and max(s.used for s in shards) <= length
    assert length < (layout.used + spare) / size + 1 + layout.block_size + multiple
    for count in ("n_clean", "n_blocks"):  # tokens balanced
        counts = [getattr(s, count) for s in shards]
        assert max(counts) - min(counts) <= 1
    for shard in shards:
        blocks = shard.index[shard.n_clean :].reshape(-1, layout.block_size)
        assert (np.diff(blocks, axis=1) == 1).all() and ((blocks[:, 0] - layout.n_clean) % layout.block_size == 0).all()
        assert (np.diff(shard.index) > 0).all() and (shard.index[: shard.n_clean] < layout.n_clean).all()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_work_of_a_long_document_is_balanced(size: int) -> None:
    """Visible pairs of the definition; contiguous shards would have 2 N - 1 times as many on the last rank."""
    layout = layout_of([(1600, list(range(400, 1590, 3)))], 4)
    seen = visible_row(layout, layout.used).sum(1)
    pairs = [seen[RowShard(layout, rank, size).index].sum() for rank in range(size)]
    assert max(pairs) < 1.02 * min(pairs)


class Channel:
    """All ranks' exchange in one process: keys are those of the row, gradients are added up."""

    def __init__(self, layout: RowLayout, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k[: layout.n_clean], v[: layout.n_clean]
        self.gradients = [torch.zeros_like(self.k), torch.zeros_like(self.v)]

    def of(self, shard: RowShard, group: object) -> "Channel":
        self.index = torch.from_numpy(shard.index[: shard.n_clean])
        return self

    def gather(self, k: torch.Tensor, v: torch.Tensor):
        assert torch.equal(k, self.k[self.index]) and torch.equal(v, self.v[self.index])
        return lambda: (self.k, self.v)

    def reduce(self, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for total, part in zip(self.gradients, (dk, dv), strict=True):
            total += part
        return torch.zeros_like(dk[self.index]), torch.zeros_like(dv[self.index])


@settings(max_examples=100, deadline=None)
@given(layout=layouts(), size=st.sampled_from([2, 3, 4, 8]), causal=st.booleans(), group=st.integers(1, 3))
@example(layout=layout_of([(61, [0, 3, 60]), (1, []), (24, []), (61, [0])], 4), size=4, causal=True, group=2)
def test_attention_of_shards_is_that_of_the_row(layout: RowLayout, size: int, causal: bool, group: int) -> None:
    """Output and gradients, against the dense definition of the whole row."""
    q, k, v, grad = inputs(layout.used, 2 * group, 2, torch.float64)
    expected = run(defined(layout, layout.used, causal_attn=causal), [q, k, v, grad])
    channel = Channel(layout, k, v)
    ours = [torch.zeros_like(x) for x in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decomposed, "key_exchange", channel.of)
        patch.setattr(varlen, "QUERY_CHUNK", 5)
        for rank in range(size):
            shard = RowShard(layout, rank, size)
            attend, index = decomposed.Decomposed(shard, TorchKernel(), causal_attn=causal), shard.index
            padding = [x.new_ones(3, *x.shape[1:]) for x in (q, k, v, grad)]
            values = [torch.cat([x[index], pad]) for x, pad in zip((q, k, v, grad), padding, strict=True)]
            for total, part in zip(ours, run(attend, values), strict=True):
                assert not part[shard.used :].any()
                total[index] += part[: shard.used]
    for total, part in zip(ours[2:], channel.gradients, strict=True):
        total[: layout.n_clean] += part
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_queries_of_blocks_are_divided_too() -> None:
    """Part (2) has a query for each position between blocks: its work must shrink with the number of ranks."""
    layout = layout_of([(1600, list(range(400, 1590, 3)))], 4)

    def queries(size: int) -> list[int]:
        parts = (decomposed._row_index(RowShard(layout, rank, size), False, None) for rank in range(size))
        return [sum(run.n_queries for run in part.runs) for part in parts]

    (alone,) = queries(1)
    assert max(queries(4)) < 0.26 * alone


def row_of(layout: RowLayout, spare: int, weight: float) -> MicroBatch:
    rng = np.random.default_rng(layout.used)
    tokens = rng.integers(0, 6, layout.used).astype(np.int32)
    return make_micro_batch(
        tokens, layout, row_length=layout.used + spare, pad_token_id=9, eos_token_id=5, next_token_weight=weight
    )


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), size=SIZES, spare=st.integers(1, 7), weight=st.sampled_from([0.0, 0.3]), by_row=st.booleans())
def test_label_rows_of_shards_are_those_of_the_row(
    layout: RowLayout, size: int, spare: int, weight: float, by_row: bool
) -> None:
    whole = row_of(layout, spare, weight)
    parts = [shard_row(whole, rank, size) for rank in range(size)]
    found, total, count = {}, 0.0, 0
    nll = torch.arange(len(whole.label_index)).double() + 1
    for part in parts:
        index = part.shard.index
        assert torch.equal(part.tokens[0, : len(index)], whole.tokens[0, index])
        assert part.positions[0, : len(index)].tolist() == row_positions(layout)[index].tolist()
        assert not part.positions[0, len(index) :].any()
        assert len(part.label_index) == max(1, len(part.label_numbers)) and part.row_labels == len(whole.label_index)
        places = [index[i] for i in part.label_index.tolist()] if len(part.label_numbers) else []
        fields = (part.label_targets, part.label_slots, part.label_documents, part.label_weights)
        for i, place in enumerate(places):
            found[place] = [float(x[i]) for x in fields if x is not None]
        assert places or (part.label_targets.tolist(), part.label_documents.tolist()) == ([IGNORE], [-1])
        own = nll[part.label_numbers] * (1 if weight == 0 else part.label_weights[: len(part.label_numbers)])
        numerator, denominator = loss_terms(own.sum(), part, layout.block_size, by_row=by_row)
        total, count = total + numerator, count + denominator
    expected = {}
    fields = (whole.label_targets, whole.label_slots, whole.label_documents, whole.label_weights)
    for i, place in enumerate(whole.label_index.tolist()):
        if whole.label_documents[i] >= 0:
            expected[place] = [float(x[i]) for x in fields if x is not None]
    assert found == expected
    real = nll * (whole.label_targets != IGNORE) * (1 if weight == 0 else whole.label_weights)
    numerator, denominator = loss_terms(real.sum(), whole, layout.block_size, by_row=by_row)
    assert float(total) == pytest.approx(float(numerator)) and int(count) == int(denominator)


@pytest.mark.parametrize("size", [2, 4])
def test_accepted_length_of_shards_is_that_of_the_row(size: int) -> None:
    rng = np.random.default_rng(0)
    documents = [(i, *random_document(rng, n)) for i, n in enumerate((40, 9, 30))]
    tokens, layout = pack_row(documents, block_size=4, mask_token_id=MASK)
    whole = make_micro_batch(tokens, layout, row_length=layout.used + 3, pad_token_id=0, eos_token_id=EOS)
    confidence = torch.rand(len(whole.label_index), generator=torch.Generator().manual_seed(0))

    def accepted(part: MicroBatch, confidence: torch.Tensor) -> torch.Tensor:
        rows = LabelRows(part, confidence, confidence, confidence > 0.5, 4)
        return rows.accepted_length([0.3, 0.7])

    shards = [shard_row(whole, rank, size) for rank in range(size)]
    parts = [accepted(part, confidence[part.label_numbers]) for part in shards if len(part.label_numbers)]
    assert torch.equal(torch.stack(parts).sum(0), accepted(whole, confidence))


def test_chunks_read_the_documents_they_cross() -> None:
    """Clean tokens 0-9 and 10-29; rank 0 of 2 has 0-7 and 22-29: the late ones see their document from its start."""
    shard = RowShard(replace(layout_of([(10, []), (20, [])], 4)), 0, 2)
    early, late = decomposed._row_index(shard, False, None).chunks
    assert (early.keys, late.keys) == (slice(0, 8), slice(10, 30))
    assert [b - a for a, b in pairwise(late.at.cu_q.tolist())] == [7]
    assert late.at.cu_k.tolist() == [0, 20]
