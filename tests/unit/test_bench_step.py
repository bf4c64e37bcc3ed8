"""Step benchmark: memory is linear in row length, parts sum to the total, documents cover the case."""

import numpy as np
import pytest
import torch
from helpers import run_python

from dev.bench import engine_case, step, timing
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.parallel.groups import Groups

SHAPE = ["--model.hidden_size=32", "--model.ffn_hidden_size=64", "--model.vocab_size=256"]
CPU = torch.device("cpu")


def config_of(*overrides: str) -> RunConfig:
    return load_config(RunConfig, "tiny", [*SHAPE, *overrides], PRESETS)


def test_command_prints_tables() -> None:
    text = run_python(
        "-m", "dev.bench.step", "--config", "dev/bench/body.yaml", "--tokens", "64", "--samples", "1", "--runs", "1"
    ).stdout
    assert "useful tokens/s" in text
    assert "MFU" in text
    assert "linear layers" in text


def growth_ratio(groups: Groups, attention: str) -> float:
    """Peak growth from 2 to 3 kilotokens relative to that from 1 to 2: 1 if linear, 5/3 if quadratic."""
    config = config_of(f"--train.attention={attention}")
    first, second, third = (step.peak_of(config, groups, "full", s) for s in (1024, 2048, 3072))
    return (third - second) / (second - first)


@pytest.mark.parametrize("attention", ["per_document", "decomposed"])
def test_memory_of_a_step_is_linear_in_the_row(groups, monkeypatch, attention) -> None:
    """A single document fills the row: the worst case, because the number of visible keys grows with it."""
    monkeypatch.setattr("sdlm_megatron.model.attention.masked.KEPT_KEYS", 0)
    monkeypatch.setattr("sdlm_megatron.model.attention.varlen.QUERY_CHUNK", 64)
    assert growth_ratio(groups, attention) < 1.15


def test_memory_of_the_dense_mask_is_not_linear(groups) -> None:
    assert growth_ratio(groups, "dense") > 1.5


def test_parts_sum_to_the_step(groups) -> None:
    case = engine_case.StepCase.of(config_of(), groups, "full", samples=2, tokens=256)
    case.step()
    parts = {}
    seconds, _ = timing.timed(lambda: parts.update(timing.parts_of(case.step, CPU)[0]), CPU)
    assert {"attention", "linear layers", "head and loss", "optimizer"} <= {p for p, s in parts.items() if s > 0}
    assert 0 < sum(parts.values()) < seconds  # the remainder is profiler overhead


@pytest.mark.parametrize(("kind", "samples"), [("full", 3), ("mixture", 6)])
def test_each_document_is_in_one_row_and_last_targets_are_dropped(kind, samples) -> None:
    tokens, block_size, shape = 2048, 4, config_of().model
    documents = engine_case.make_documents(kind, samples, tokens, shape, block_size)
    rows = engine_case.pack_documents(documents, tokens, shape, block_size)
    assert sorted(d for r in rows for d in r.layout.doc_ids) == list(range(samples))
    assert sum(r.layout.used for r in rows) == sum(d.expanded(block_size) for d in documents)
    if kind == "full":
        assert {d.expanded(block_size) for d in documents} == {tokens}
    for row in rows:
        ends = row.layout.n_clean + np.cumsum(row.layout.n_blocks) * block_size - 1
        assert not set(ends.tolist()) & set(row.label_index.tolist())
