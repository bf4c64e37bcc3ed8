"""diffusion.next_token_weight: loss and gradients against transformers' model with a dense mask and plain autograd."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EOS, MASK, PAD, make_hf

from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, draw_starts, next_token_targets, pack_row, row_positions
from sdlm_megatron.diffusion.loss import BALANCE_DECAY, MOST_BALANCE, balanced_weights
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch

LENGTH, D, WEIGHT = 128, 4, 0.3


def packed(seed: int, shift: bool = True) -> tuple[np.ndarray, RowLayout]:
    """Row of documents with two answers each; the last document has no blocks."""
    rng = np.random.default_rng(seed)
    documents = []
    for i, (length, blocks) in enumerate(((21, 5), (12, 2), (9, 0))):
        ids = rng.integers(0, 256, length).astype(np.int32)
        ids[[length // 2, length - 2]] = EOS
        anchors = np.concatenate([np.arange(2, length // 2), np.arange(length // 2 + 2, length - 2)])
        documents.append((i, ids, draw_starts(anchors, blocks, seed=seed, epoch=0, document=i)))
    return pack_row(documents, block_size=D, mask_token_id=MASK, target_shift=shift)


def defined_targets(tokens: np.ndarray, layout: RowLayout) -> tuple[dict[int, int], dict[int, int]]:
    """Targets of block rows and of clean rows by row index, from the definition, one token at a time."""
    blocks, clean, start, row = {}, {}, 0, layout.n_clean
    first = 0
    for length, n in zip(layout.clean_lens.tolist(), layout.n_blocks.tolist(), strict=True):
        for p in layout.anchors[first : first + n].tolist():
            ended = False
            for j in range(D):
                q = p + 1 + j
                if q < length and not ended:
                    token = int(tokens[start + q])
                    blocks[row + j] = token
                    clean[start + q - 1] = token
                    ended = token == EOS
            row += D
        start, first = start + length, first + n
    return blocks, clean


@pytest.mark.parametrize("seed", range(20))
def test_clean_token_targets_equal_the_definition(seed: int) -> None:
    tokens, layout = packed(seed)
    blocks, clean = defined_targets(tokens, layout)
    targets = next_token_targets(tokens, layout, EOS)
    assert {int(i): int(targets[i]) for i in np.flatnonzero(targets != IGNORE)} == clean
    batch = micro_batch(seed)
    expected = {**clean, **blocks}
    assert dict(zip(batch.label_index.tolist(), batch.label_targets.tolist(), strict=True)) == expected
    weights = [float(np.float32(WEIGHT)) if i < layout.n_clean else 1.0 for i in batch.label_index.tolist()]
    assert batch.label_weights is not None and batch.label_weights.tolist() == weights
    off = micro_batch(seed, 0.0)
    assert off.label_weights is None and off.label_index.tolist() == list(blocks)


def micro_batch(seed: int, weight: float = WEIGHT, shift: bool = True) -> MicroBatch:
    return make_micro_batch(
        *packed(seed, shift), row_length=LENGTH, pad_token_id=PAD, eos_token_id=EOS, next_token_weight=weight
    )


@pytest.mark.parametrize(
    ("rows", "causal_attn", "shift"),
    [(False, False, True), (True, False, True), (False, True, True), (False, False, False), (False, True, False)],
)
def test_loss_and_every_gradient_equal_transformers(
    make_engine: Callable, tmp_path: Path, rows: bool, causal_attn: bool, shift: bool
) -> None:
    from transformers import AutoModelForCausalLM

    from sdlm_megatron.checkpoint.sharding import hf_tensors

    folder = make_hf(tmp_path / "hf", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    numerators, denominators, clean_losses = [], [], []
    for seed in (0, 1):
        tokens, layout = packed(seed, shift)
        blocks, clean = defined_targets(tokens, layout)
        mask = torch.from_numpy(visible_row(layout, layout.used, causal_attn=causal_attn))[None, None]
        positions = torch.from_numpy(row_positions(layout)).long()[None]
        logits = model(torch.from_numpy(tokens).long()[None], attention_mask=mask, position_ids=positions).logits[0]
        nll = -logits.log_softmax(-1)
        of_blocks = torch.stack([nll[i, t] for i, t in blocks.items()])
        of_clean = torch.stack([nll[i, t] for i, t in clean.items()])
        numerator = of_blocks.sum() + WEIGHT * of_clean.sum()
        numerators.append(numerator / len(blocks) if rows else numerator)
        denominators.append(1 if rows else len(blocks))
        clean_losses.append(of_clean.detach())
    loss = sum(numerators) / sum(denominators)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()

    engine = make_engine(folder, causal_attn=causal_attn, rows=rows)
    engine.module.logits_mb = 0.05  # splits the head into several chunks
    empty = make_micro_batch(
        *pack_row([], block_size=D, mask_token_id=MASK),
        row_length=LENGTH, pad_token_id=PAD, eos_token_id=EOS, next_token_weight=WEIGHT,
    )  # fmt: skip
    batches = [micro_batch(0, shift=shift), empty, micro_batch(1, shift=shift)]
    engine.forward_backward(batches)
    for key, part in hf_tensors(engine, lambda p: p.main_grad):
        error = (part - expected.pop(key)).abs().max() / part.abs().max()
        assert error < 1e-4, f"{key}: {error}"
    assert not expected
    (result,) = engine.results([engine.train_step(batches, 1)])
    assert result.loss == pytest.approx(float(loss), rel=1e-5)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert result.next_token_loss == pytest.approx(float(torch.cat(clean_losses).mean()), rel=1e-5)
    assert result.next_token_targets == sum(map(len, clean_losses))
    assert result.targets == sum(len(defined_targets(*packed(s))[0]) for s in (0, 1))


def test_balance_scales_the_weight_by_the_losses_before(make_engine: Callable, tmp_path: Path) -> None:
    """Losses of three steps by hand; gradients are those of the scaled weight; the ratio is limited."""
    engine, plain = (make_engine(make_hf(tmp_path / name)) for name in ("a", "b"))
    engine.config.train.next_token_balance = True
    batches = [micro_batch(0), micro_batch(1)]
    ratio, before = 1.0, (0.0, 0.0)
    for step in (1, 2, 3):
        (result,) = engine.results([engine.train_step(batches, step)])
        sums = [now - BALANCE_DECAY * then for now, then in zip(result.running_losses, before, strict=True)]
        assert sums[1] == pytest.approx(result.next_token_loss * result.next_token_targets, rel=1e-5)
        assert result.loss == pytest.approx((sums[0] + WEIGHT * ratio * sums[1]) / result.targets, rel=1e-5)
        ratio, before = result.running_losses[0] / result.running_losses[1], result.running_losses
    assert ratio > 1.2
    for running, expected in ((4.0, 4.0), (40.0, MOST_BALANCE), (1e-3, 1 / MOST_BALANCE)):
        engine.running_losses = torch.tensor([running, 1.0], dtype=torch.float64)
        weights = batches[0].label_weights
        assert weights is not None
        scaled = balanced_weights(weights, batches[0].label_slots, D, engine.running_losses)
        assert scaled.unique().tolist() == pytest.approx(sorted({1.0, WEIGHT * expected}))
    engine.running_losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    for e, weight in ((engine, WEIGHT), (plain, 2 * WEIGHT)):
        e.module.load_state_dict(plain.module.state_dict())
        e.forward_backward([micro_batch(0, weight)])
    for a, b in zip(engine.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(a.main_grad, b.main_grad, rtol=1e-5, atol=1e-7)
