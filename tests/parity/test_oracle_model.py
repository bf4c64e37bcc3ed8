"""Megatron-Core model against the reference's recorded losses and gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EOS, MASK, PAD, oracle

from sdlm_megatron.diffusion.layout import IGNORE, RowLayout, expand_document, pack_row
from sdlm_megatron.diffusion.loss import slot_sums
from sdlm_megatron.diffusion.mask import visible_row
from sdlm_megatron.diffusion.row import MicroBatch, make_micro_batch

BATCHES = [
    ("random", 4, "b0"),
    ("random", 8, "b1_multi"),
    ("trained_d4", 4, "b1_multi"),
    ("trained_d4", 4, "b3_single"),
]
TOLERANCE = 1e-4


@dataclass
class Golden:
    """One recorded batch and the documents it was built from."""

    data: dict[str, np.ndarray]
    block_size: int
    documents: list[tuple[np.ndarray, np.ndarray]]
    """(clean ids, block starts) of each row."""


def load_golden(model: str, block_size: int, name: str) -> Golden:
    with np.load(oracle() / "tiny" / f"goldens_{model}_D{block_size}_{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    documents = []
    for row, clean_len in enumerate(data["x0_len"]):
        used = int(data["attention_mask"][row].sum())
        starts = data["position_ids"][row, clean_len:used:block_size]
        documents.append((data["input_ids"][row, :clean_len], starts))
    return Golden(data, block_size, documents)


def micro_batch(documents: list[tuple[np.ndarray, np.ndarray]], block_size: int, row_length: int) -> MicroBatch:
    tokens, layout = pack_row(
        [(i, ids, starts) for i, (ids, starts) in enumerate(documents)],
        block_size=block_size,
        mask_token_id=MASK,
    )
    return make_micro_batch(tokens, layout, row_length=row_length, pad_token_id=PAD, eos_token_id=EOS)


def without_lost_target(batch: MicroBatch, golden: Golden, row: int) -> MicroBatch:
    """The batch without the target that the reference loses: it stores targets shifted by one, which cuts a full row's
    last one."""
    keep = golden.data["labels"].shape[1] - 1 > batch.label_index
    return MicroBatch(
        batch.tokens,
        batch.positions,
        batch.label_index[keep],
        batch.label_targets[keep],
        batch.label_slots[keep],
        batch.layout,
        batch.rows,
    )


@pytest.mark.parametrize(("model", "block_size", "name"), BATCHES)
def test_rows_and_masks_equal_the_reference(model: str, block_size: int, name: str) -> None:
    golden = load_golden(model, block_size, name)
    shape = tuple(golden.data["mask_shape"])
    masks = np.unpackbits(golden.data["mask_bool_packed"])[: np.prod(shape)].reshape(shape).astype(bool)
    for row, (ids, starts) in enumerate(golden.documents):
        ours = expand_document(ids, starts, block_size=block_size, mask_token_id=MASK, eos_token_id=EOS)
        used = len(ours.input_ids)
        np.testing.assert_array_equal(ours.input_ids, golden.data["input_ids"][row, :used])
        np.testing.assert_array_equal(ours.position_ids, golden.data["position_ids"][row, :used])
        shifted = golden.data["labels"][row, 1 : used + 1]
        np.testing.assert_array_equal(ours.targets[: len(shifted)], shifted)
        layout = RowLayout(*(np.array([x]) for x in (0, len(ids), len(starts))), np.asarray(starts), block_size)
        mask = visible_row(layout, used)
        np.testing.assert_array_equal(mask, masks[row, 0, :used, :used])


@pytest.mark.parametrize(("model", "block_size", "name"), BATCHES)
def test_losses_equal_the_reference(make_engine: Callable, model: str, block_size: int, name: str) -> None:
    golden = load_golden(model, block_size, name)
    engine = make_engine(oracle() / "tiny" / model, block_size=block_size)
    length = golden.data["input_ids"].shape[1]
    slots, total, count = torch.zeros(2, block_size), 0.0, 0
    for row, document in enumerate(golden.documents):
        batch = without_lost_target(micro_batch([document], block_size, length), golden, row)
        with torch.no_grad():
            nll = engine.module(batch).nll
        expected = golden.data["train_eager_token_nll"][row][batch.label_index]
        np.testing.assert_allclose(nll.numpy(), expected, rtol=TOLERANCE, atol=1e-5)
        slots += slot_sums(nll, batch.label_targets, batch.label_slots, block_size)
        total, count = total + float(nll.double().sum()), count + len(nll)
    np.testing.assert_allclose(slots[0].numpy(), golden.data["train_eager_slot_sum"], rtol=TOLERANCE)
    np.testing.assert_array_equal(slots[1].numpy(), golden.data["slot_count"])
    assert total / count == pytest.approx(float(golden.data["train_eager_loss"]), rel=TOLERANCE)


@pytest.mark.parametrize(("model", "block_size", "name"), BATCHES)
def test_causal_block_loss_equals_the_reference(make_engine: Callable, model: str, block_size: int, name: str) -> None:
    golden = load_golden(model, block_size, name)
    engine = make_engine(oracle() / "tiny" / model, block_size=block_size, causal_attn=True)
    length = golden.data["input_ids"].shape[1]
    losses = []
    for row, document in enumerate(golden.documents):
        batch = without_lost_target(micro_batch([document], block_size, length), golden, row)
        with torch.no_grad():
            losses.append(engine.module(batch).nll)
    loss = float(torch.cat(losses).double().mean())
    assert loss == pytest.approx(float(golden.data["train_causal_eager_loss"]), rel=TOLERANCE)


@pytest.mark.parametrize(("model", "block_size", "name"), BATCHES)
def test_every_gradient_equals_the_reference(make_engine: Callable, model: str, block_size: int, name: str) -> None:
    golden = load_golden(model, block_size, name)
    expected = {k.removeprefix("grad/"): v for k, v in golden.data.items() if k.startswith("grad/")}
    if not expected:
        pytest.skip("the reference's gradients were recorded for b0 and b1_multi only")
    engine = make_engine(oracle() / "tiny" / model, block_size=block_size)
    actual = gradients(engine, golden)
    assert set(actual) == set(expected)
    for key, gradient in expected.items():
        error = np.abs(actual[key] - gradient).max() / np.abs(gradient).max()
        assert error < TOLERANCE, f"{key}: {error}"


def gradients(engine: object, golden: Golden) -> dict[str, np.ndarray]:
    """Gradients of the step's loss by Hugging Face name, as passed to the optimizer."""
    from sdlm_megatron.checkpoint.sharding import hf_tensors

    length = golden.data["input_ids"].shape[1]
    batches = [
        without_lost_target(micro_batch([d], golden.block_size, length), golden, i)
        for i, d in enumerate(golden.documents)
    ]
    engine.forward_backward(batches)
    return {name: gradient.numpy() for name, gradient in hf_tensors(engine, lambda p: p.main_grad)}


@pytest.mark.parametrize("causal_attn", [False, True])
def test_packing_does_not_change_a_document(make_engine: Callable, causal_attn: bool) -> None:
    """Documents of all batches with block size 4 in one row, in two orders: each loss equals that of its own row."""
    documents = [d for m, b, n in BATCHES if b == 4 for d in load_golden(m, b, n).documents]
    engine = make_engine(oracle() / "tiny" / "trained_d4", causal_attn=causal_attn)
    with torch.no_grad():
        alone = [engine.module(micro_batch([d], 4, len(d[0]) + 4 * len(d[1]))).nll for d in documents]
        for order in (range(len(documents)), reversed(range(len(documents)))):
            order = list(order)
            batch = micro_batch([documents[i] for i in order], 4, 1600)
            packed = engine.module(batch).nll
            torch.testing.assert_close(packed, torch.cat([alone[i] for i in order]), rtol=1e-4, atol=2e-5)


def test_chunked_attention_equals_a_single_call(make_engine: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of the chunked attention path equal those of the single-call path."""
    from sdlm_megatron.model.attention import masked as attention_masked

    golden = load_golden("trained_d4", 4, "b1_multi")
    engine = make_engine(oracle() / "tiny" / "trained_d4")
    batch = micro_batch(golden.documents, 4, 1024)
    with torch.no_grad():
        joint = engine.module(batch).nll
        monkeypatch.setattr(attention_masked, "CHUNK_TOKENS", 40)
        torch.testing.assert_close(engine.module(batch).nll, joint, rtol=1e-4, atol=2e-5)


def test_placeholder_label_of_an_empty_row_has_no_weight(make_engine: Callable) -> None:
    engine = make_engine(Path(oracle()) / "tiny" / "random")
    empty = micro_batch([], 4, 64)
    assert empty.label_targets.tolist() == [IGNORE]
    golden = load_golden("random", 4, "b0")
    rows = [micro_batch([d], 4, 256) for d in golden.documents]
    (alone,) = engine.results([engine.train_step(rows, 1)])
    engine = make_engine(Path(oracle()) / "tiny" / "random")
    (padded,) = engine.results([engine.train_step([*rows, empty], 1)])
    assert padded.loss == pytest.approx(alone.loss, rel=1e-7)
    assert padded.grad_norm == pytest.approx(alone.grad_norm, rel=1e-6)
