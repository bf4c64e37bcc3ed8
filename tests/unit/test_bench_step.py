"""The measurement of a training step: its memory is linear in the row, its parts add up, its documents are the case."""

import argparse

import numpy as np
import pytest
import torch
from helpers import run_python

from dev.bench import measure, step, step_case
from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.parallel.groups import Groups

SHAPE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=256,
    tied_embeddings=True,
)
CPU = torch.device("cpu")


def test_the_command_prints_a_table() -> None:
    text = run_python(
        "-m", "dev.bench.step", "--shape", "body", "--tokens", "64", "--samples", "1", "--runs", "1"
    ).stdout
    assert "useful tokens/s" in text
    assert "MFU" in text
    assert "linear layers" in text


def arguments(**values: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "dtype": "fp32",
            "train": [],
            "block_size": 4,
            "documents": "full",
            "samples": 1,
            "next_token_weight": 0.0,
            **values,
        }
    )


def increments(groups: Groups, attention: str) -> float:
    """How the peak's growth from 2 to 3 kilotokens compares with that from 1 to 2: 1 is linear, 5/3 quadratic."""
    one, two, three = (step.peak_of(arguments(), SHAPE, groups, s, attention) for s in (1024, 2048, 3072))
    return (three - two) / (two - one)


@pytest.mark.parametrize("attention", ["per_document", "decomposed"])
def test_a_step_s_memory_is_linear_in_the_row(groups, monkeypatch, attention) -> None:
    """One document fills the row: the hardest case, since what it sees grows with it."""
    monkeypatch.setattr("sdlm_megatron.model.attention.masked.KEPT_KEYS", 0)
    monkeypatch.setattr("sdlm_megatron.model.attention.varlen.QUERY_CHUNK", 64)
    assert increments(groups, attention) < 1.15


def test_the_dense_mask_s_memory_is_not(groups) -> None:
    assert increments(groups, "dense") > 1.5


def test_parts_of_a_step_add_up(groups) -> None:
    case = step.make_case(arguments(samples=2), SHAPE, groups, tokens=256, attention="auto")
    case.engine.train_step(case.batches, 1)
    parts = {}
    seconds, _ = measure.timed(lambda: parts.update(step.parts_of(case.engine, case.batches)), CPU)
    assert set(parts) == set(measure.PARTS)
    assert min(parts.values()) > 0
    assert sum(parts.values()) < seconds  # the profiler's own work is not a part
    assert case.engine.module._postprocess.__name__ == "_postprocess", "the marks are taken away again"


def test_backward_operations_belong_to_their_forward_operation() -> None:
    """One part multiplies matrices, the other adds: the backward products must not land in the small part."""
    inner, outer = torch.nn.Linear(512, 512), torch.nn.LayerNorm(512)
    ranges, x = measure.Ranges(), torch.randn(2048, 512, requires_grad=True)
    ranges.module(inner, measure.LINEAR)
    ranges.module(outer, measure.SMALL)

    def once() -> None:
        outer(inner(inner(x))).sum().backward()

    once()
    parts = ranges.split(once, CPU)
    assert parts[measure.LINEAR] > 3 * parts[measure.SMALL] > 0


@pytest.mark.parametrize(("kind", "samples"), [("full", 3), ("mixture", 6)])
def test_every_document_is_in_one_row_and_the_lost_target_is_in_none(kind, samples) -> None:
    tokens, block_size = 2048, 4
    documents = step_case.make_documents(kind, samples, tokens, SHAPE, block_size)
    rows = step_case.pack(documents, tokens, SHAPE, block_size)
    assert sorted(d for r in rows for d in r.layout.doc_ids) == list(range(samples))
    assert sum(r.layout.used for r in rows) == sum(d.expanded(block_size) for d in documents)
    if kind == "full":
        assert {d.expanded(block_size) for d in documents} == {tokens}
    for row in rows:
        ends = row.layout.n_clean + np.cumsum(row.layout.n_blocks) * block_size - 1
        assert not set(ends.tolist()) & set(row.label_index.tolist())
