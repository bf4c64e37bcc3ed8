"""Products and sums of tokens beyond int32, at the boundary and without large memory; Python's integers are exact."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_dataset

from data_prep.chat import RenderedBatch
from data_prep.truncate import fit_batch
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.data.format import MOST_TOKENS, PackedDataset
from sdlm_megatron.data.indexed import IndexedReader, IndexedWriter
from sdlm_megatron.data.sample import step_documents
from sdlm_megatron.data.sizes import EpochSizes, scan_layouts
from sdlm_megatron.diffusion.layout import RowLayout, block_count
from sdlm_megatron.diffusion.mask import visible_pairs
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.model.attention.fused import Fused, check_reach
from sdlm_megatron.training.run_plan import make_run_plan

LONG = 10_000_000
"""Largest row_length of `sdlm prepare`."""


def test_pairs_of_the_longest_document() -> None:
    starts = np.array([LONG - 2, LONG - 1], dtype=np.int32)
    lens, blocks = np.array([LONG], dtype=np.int32), np.array([2], dtype=np.int32)
    layout = RowLayout(np.zeros(1, np.int32), lens, blocks, starts, 4096)
    expected = LONG * (LONG + 1) // 2 + 4096 * (2 * LONG - 3) + 2 * 4096**2
    assert visible_pairs(layout) == expected > 2**31
    assert layout.used == LONG + 2 * 4096
    sizes = EpochSizes(np.array([[LONG, 2, LONG - 2]], dtype=np.int32), np.array([0, 1]))
    data: Any = SimpleNamespace(block_size=4096, rows=lambda epoch: 1, sizes=lambda epoch: sizes)
    docs = step_documents(data, np.array([0]), seed=0)
    assert docs.pairs.tolist() == [LONG * (LONG + 1) // 2 + 2 * 4096 * (LONG - 2 + 4096)]


def test_blocks_of_long_documents() -> None:
    """repeat x anchors and blocks x block size are above int32."""
    n = LONG // 2 - 10
    turn, edges = np.zeros(1, np.int64), np.array([0, 1])
    places = (turn, turn + n, turn, turn + n - 1)
    batch = RenderedBatch(np.empty(0, np.int32), np.array([0, n]), edges, ["assistant"], *places)
    fitted = fit_batch(batch, "keep_whole_turns", max_len=1000 * LONG, block_size=4, repeat=1000)
    assert fitted.n_blocks.tolist() == [block_count(n, n - 1, 1000 * LONG, 4, 1000)] == [n - 1]
    assert int((fitted.clean_lens + fitted.n_blocks * 4096)[0]) == n + (n - 1) * 4096


def test_sums_of_starts_and_files_beyond_2_gib(tmp_path: Path) -> None:
    writer = IndexedWriter(str(tmp_path / "layout"))
    starts = np.arange(LONG - 1000, LONG)
    row = np.concatenate([[0, 1, 7, LONG, 1000], starts])
    writer.add(row, [len(row)])
    writer.finish()
    table = scan_layouts([IndexedReader(str(tmp_path / "layout"))]).table.tolist()
    assert table == [[LONG, 1000, sum(starts.tolist()) // 1000]] and sum(starts.tolist()) > 2**31
    # an index over 400 sequences of 2^23 integers, 12.5 GiB, and a sparse file
    writer = IndexedWriter(str(tmp_path / "rows"))
    writer._lengths.extend([MOST_TOKENS // 2] * 400)
    writer.finish()
    os.truncate(tmp_path / "rows.bin", size := 400 * MOST_TOKENS * 2)
    with open(tmp_path / "rows.bin", "r+b") as file:
        file.seek(size - 4)
        file.write(np.int32(5).tobytes())
    reader = IndexedReader(str(tmp_path / "rows"), MOST_TOKENS)
    assert int(reader.offsets[-1]) == 399 * MOST_TOKENS * 2 > 2**31
    assert reader.integers[int(reader.offsets[-1]) // 4 :][-1] == 5


def test_steps_and_rows_at_the_limit(tmp_path: Path) -> None:
    data = PackedDataset(make_dataset(tmp_path / "data", rows=3, row_length=128))
    for rows, accepted in ((2**24 - 1, True), (2**24, False)):
        options = [f"--train.global_batch={rows}", "--train.global_batch_unit=rows", f"--run_dir={tmp_path}"]
        config = load_config(RunConfig, "tiny", options, PRESETS)
        if accepted:
            make_run_plan(config, data, lambda text: None)
        else:
            with pytest.raises(ConfigError, match=r"2,147,483,648 tokens, the limit is 2\^31") as caught:
                make_run_plan(config, data, lambda text: None)
            assert caught.value.fix == "at most 16,777,215 rows"
    check_reach(2**24 - 1, 128, 65535)
    with pytest.raises(ConfigError, match=r"16,777,216 tokens has 2,147,483,648 numbers"):
        check_reach(2**24, 128, 65535)
    length = np.array([1_200_000], dtype=np.int32)
    layout = RowLayout(length, length, length * 0, length[:0], 4)
    row = Fused(layout, int(length[0]), causal_attn=False, group=7)  # 18 tokens in a tile
    q, k = (torch.empty(int(length[0]), heads, 1, device="meta") for heads in (7, 1))
    with pytest.raises(ConfigError, match="1,200,000 tokens has 66,667 tiles, the Triton kernels take 65,535"):
        row(q, k, k, 1.0)
