"""Accuracy, confidence and accepted length match a plain computation from dense probabilities."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import EOS, load_micro_batch, make_dataset, make_hf

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.diffusion.layout import IGNORE
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.metrics.metric_table import THRESHOLDS

D = 4


def plain(rows: Sequence[tuple[torch.Tensor, MicroBatch]]) -> tuple[dict[str, float], set[int]]:
    """Device metrics and accepted lengths of rows, by loops over the probabilities (N, V) of their label rows."""
    correct: list[list] = [[] for _ in range(D + 1)]
    confidence: list[list] = [[] for _ in range(D + 1)]
    blocks: dict[tuple, dict[int, float]] = {}
    for i, (probabilities, batch) in enumerate(rows):
        columns = (batch.label_index, batch.label_targets, batch.label_slots)
        for n, (at, target, slot) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if target == IGNORE:
                continue
            correct[slot].append(probabilities[n].argmax().item() == target)
            confidence[slot].append(probabilities[n].max().item())
            if slot < D:
                blocks.setdefault((i, (at - batch.layout.n_clean) // D), {})[slot] = confidence[slot][-1]
    lengths: dict[float, list[int]] = {tau: [] for tau in THRESHOLDS}
    for tau in THRESHOLDS:
        for slots in blocks.values():
            n = 0
            while n in slots and slots[n] > tau:
                n += 1
            lengths[tau].append(max(n, 1))
    names = [*(f"pos_{j}" for j in range(1, D + 1)), "next_token"]
    fields = {f"accuracy_{n}": sum(x) / len(x) for n, x in zip(names, correct, strict=True) if x}
    fields |= {f"confidence_{n}": sum(x) / len(x) for n, x in zip(names, confidence, strict=True) if x}
    fields |= {f"accepted_{tau:g}": sum(kept) / len(kept) for tau, kept in lengths.items()}
    return fields, {n for kept in lengths.values() for n in kept}


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_step_metrics_match_dense_probabilities(make_engine: Callable, tmp_path: Path, weight: float) -> None:
    """Covers confidences on both sides of the thresholds, blocks that end early, an empty row and a chunked head."""
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=2))
    engine = make_engine(make_hf(tmp_path / "hf", tied=False))
    engine.config.train.logits_mb = engine.module.logits_mb = 0.02
    with torch.no_grad():
        engine.module.output_layer.weight.mul_(8)
    batches = [engine.prepare(load_micro_batch(dataset, n, seed=0, next_token_weight=weight)) for n in (0, 1, None)]
    assert any(EOS in b.label_targets for b in batches)
    with engine.inference():
        expected, lengths = plain([(engine.logits(b).float().softmax(-1), b) for b in batches])
        assert lengths == {1, 2, 3, 4}
        held_out = engine.evaluate([batches[:2], batches[2:]])
    step, plainly = engine.results([engine.train_step(batches, 1, measure=True), engine.train_step(batches, 2)])
    assert not plainly.measured
    for result in (step, held_out):
        assert result.measured == pytest.approx(expected, rel=1e-5)
    assert held_out.loss == pytest.approx(step.loss, rel=1e-6) and held_out.slot_loss == pytest.approx(step.slot_loss)
    assert ("accuracy_next_token" in step.fields()) == bool(weight)


def test_evaluation_does_not_affect_training(make_engine: Callable, tmp_path: Path) -> None:
    """Weights after two steps are bitwise equal with and without evaluation and with other measures."""
    dataset, base = PackedDataset(make_dataset(tmp_path / "data", rows=4)), make_hf(tmp_path / "hf")
    batches = [load_micro_batch(dataset, n, seed=0) for n in range(4)]
    weights = []
    for looks in (False, True):
        engine = make_engine(base)
        for step in (1, 2):
            engine.train_step([engine.prepare(b) for b in batches[:2]], step, measure=looks)
            if looks:
                with engine.inference():
                    assert engine.evaluate([batches[2:]]).targets > 0
        weights.append({name: p.detach().clone() for name, p in engine.module.named_parameters()})
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())
