"""FLOPs counted by MFU and planner against PyTorch's counter on steps of the real Megatron model.

Dense attention multiplies all pairs of the row, padding included. Per-document attention, in a short document,
multiplies all pairs of clean tokens, and block tokens with the prefix up to the last anchor and with each other. Where
the multiplied pairs are known, the counts must be exactly equal.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import make_hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.diffusion.layout import RowLayout, draw_starts, pack_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch
from sdlm_megatron.model.attention.masked import Dense, PerDocument
from sdlm_megatron.planner.flops import training_flops

LENGTH, D = 128, 4
SHAPE = ModelConfig(
    num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96, vocab_size=264
)


def packed_row() -> tuple[np.ndarray, RowLayout]:
    documents = []
    for i, (length, blocks) in enumerate(((17, 8), (9, 0), (22, 9))):
        starts = draw_starts(np.arange(4, length - 1), blocks, seed=0, epoch=0, document=i)
        documents.append((i, np.arange(length, dtype=np.int32) + 5, starts))
    return pack_row(documents, block_size=D, mask_token_id=3)


def counted(
    make_engine: Callable, folder: Path, attention: type, recompute: str = "none", rank: int = 0
) -> tuple[int, MicroBatch]:
    """FLOPs of a forward and backward pass, and the row that was passed."""
    engine = make_engine(make_hf(folder, vocab=SHAPE.vocab_size, ffn=SHAPE.ffn_hidden_size, tied=False), rank=rank)
    if recompute == "full":
        config = engine.module.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    tokens, layout = packed_row()
    batch = make_micro_batch(tokens, layout, row_length=LENGTH, pad_token_id=0, eos_token_id=2)
    batch = MicroBatch(**{**vars(batch), "attention": attention(layout, LENGTH, causal_attn=False)})
    # the counter covers matrix products, but not torch's fused attention for CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        engine.forward_backward([batch])
    return counter.get_total_flops(), batch


def test_dense_attention_multiplies_every_pair(make_engine: Callable, tmp_path: Path) -> None:
    total, batch = counted(make_engine, tmp_path / "hf", Dense)
    labels = len(batch.label_index)
    assert total == training_flops(SHAPE, tokens=LENGTH, pairs=LENGTH**2, label_rows=labels)


def test_per_document_attention_multiplies_the_pairs_of_a_document(make_engine: Callable, tmp_path: Path) -> None:
    total, batch = counted(make_engine, tmp_path / "hf", PerDocument)
    layout, pairs = batch.layout, 0
    ends = np.cumsum(layout.n_blocks)
    for clean, blocks, end in zip(layout.clean_lens.tolist(), layout.n_blocks.tolist(), ends, strict=True):
        pairs += clean**2
        if blocks:
            pairs += blocks * D * (int(layout.starts[end - 1]) + blocks * D)
    assert total == training_flops(SHAPE, tokens=LENGTH, pairs=pairs, label_rows=len(batch.label_index))


def test_full_recompute_adds_a_forward_pass_of_the_layers(make_engine: Callable, tmp_path: Path) -> None:
    plain, _ = counted(make_engine, tmp_path / "a", Dense)
    again, _ = counted(make_engine, tmp_path / "b", Dense, "full")
    layers = training_flops(SHAPE, tokens=LENGTH, pairs=LENGTH**2, label_rows=0)
    assert again - plain == pytest.approx(layers / 3, rel=1e-12)


def test_frozen_weights_have_no_gradient_product(make_engine: Callable, tmp_path: Path) -> None:
    """With adapters, whose products come on top: A has `rank` rows for each of q, k, v and gate, up, B such columns."""
    total, batch = counted(make_engine, tmp_path / "hf", Dense, rank=3)
    counts = {"tokens": LENGTH, "pairs": LENGTH**2, "label_rows": len(batch.label_index)}
    fused = ((3, 64, 64 + 2 * 32), (1, 64, 64), (2, 64, 2 * 96), (1, 96, 64))  # Hugging Face layers, inputs, outputs
    adapters = sum(6 * 3 * kinds * (inputs + outputs) * LENGTH for kinds, inputs, outputs in fused)
    assert total == training_flops(SHAPE, **counts, frozen=True) + SHAPE.num_layers * adapters
