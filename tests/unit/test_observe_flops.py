"""Model FLOPs match a hand count; tests/parity/test_planner_flops.py compares them with PyTorch's counter."""

import numpy as np
import pytest

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.planner.flops import (
    forward_flops,
    linear_params,
    model_flops_utilization,
    peak_flops,
    step_flops,
    training_flops,
    visible_pairs,
)

SHAPE = ModelConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=3,
    ffn_hidden_size=16,
    vocab_size=50,
)


def layout_of(documents, block_size):
    triples = [
        (i, np.arange(length, dtype=np.int32), np.array(starts, dtype=np.int32))
        for i, (length, starts) in enumerate(documents)
    ]
    return pack_row(triples, block_size=block_size, mask_token_id=99)[1]


def test_flops_match_hand_count():
    # per layer: q and o 8x12 each, k and v 8x6 each, three 8x16 matrices
    assert linear_params(SHAPE) == 2 * (2 * 96 + 2 * 48 + 3 * 128)
    # 10 tokens, 33 pairs in 2 layers of 4 heads of size 3, 5 labels
    assert forward_flops(SHAPE, tokens=10, pairs=33, label_rows=5) == 2 * 1344 * 10 + 4 * 33 * 12 * 2 + 2 * 8 * 50 * 5
    assert training_flops(SHAPE, tokens=10, pairs=33, label_rows=5) == 3 * (26880 + 3168 + 4000)


def test_step_flops_sum_over_rows_without_padding():
    first, second = layout_of([(5, [1, 3])], 4), layout_of([(6, [2]), (4, [0, 1])], 4)
    pairs = visible_pairs(first) + visible_pairs(second)
    expected = training_flops(SHAPE, tokens=first.used + second.used, pairs=pairs, label_rows=11)
    assert step_flops(SHAPE, [first, second], 11) == expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989.4e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12),
     ("NVIDIA GH200 480GB", 989.4e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla T4", None), ("cpu", None)],
)  # fmt: skip
def test_peaks_by_device_name(name, peak):
    assert peak_flops(name) == peak


def test_utilization():
    assert model_flops_utilization(2 * 10**15, 2.0, 4, 1e15) == pytest.approx(0.25)
    assert model_flops_utilization(10**15, 1.0, 1, None) is None
