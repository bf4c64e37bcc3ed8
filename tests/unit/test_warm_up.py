"""Warm-up runs the attention of the rows and changes no state. Runs on a CPU skip it; the tests call it directly."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import load_micro_batch, make_dataset, make_hf

from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.model.attention.choice import Heads, choose_attention


@pytest.mark.parametrize("name", ["per_document", "decomposed"])
def test_warm_up_changes_no_state(
    make_engine: Callable, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlm_megatron.parallel.device import warm_up

    engine = make_engine(make_hf(tmp_path / "hf"))
    engine.attention = choose_attention(
        name, causal_attn=False, device=torch.device("cpu"), heads=Heads(4, 2, 16, torch.float32)
    )
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=2))
    batches = [engine.prepare(load_micro_batch(dataset, n, seed=0)) for n in (0, 1, None)]
    assert engine.warm_up(batches) is None
    seen: list[tuple] = []
    backend = type(batches[0].attention)
    call = backend.__call__

    def recorded(self, q, k, v, scale):  # a fused kernel may use the generator
        seen.append((q.shape, k.shape, v.shape, v.is_contiguous(), scale))
        torch.rand(1)
        return call(self, q, k, v, scale)

    monkeypatch.setattr(backend, "__call__", recorded)
    before, state = [p.detach().clone() for p in engine.module.parameters()], torch.get_rng_state()
    text = warm_up(batches, engine.heads, engine.optimizer, engine.groups)
    assert text.startswith("warm-up: attention forward and backward over 3 rows ")
    assert "of 0 groups" in text  # one process
    assert seen == 3 * [((128, 4, 16), (128, 2, 16), (128, 2, 16), False, 0.25)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(p, was) and p.grad is None for p, was in zip(engine.module.parameters(), before, strict=True)
    )


def test_memory_layout_matches_the_layers(make_engine: Callable, tmp_path: Path) -> None:
    """Compiled kernels are specialized for strides, so warm-up must use the strides of a step."""
    from sdlm_megatron.parallel.device import attend_once

    engine = make_engine(make_hf(tmp_path / "hf"))
    dataset = PackedDataset(make_dataset(tmp_path / "data", rows=1))
    batch = engine.prepare(load_micro_batch(dataset, 0, seed=0))
    strides: list[list[tuple]] = []
    backend, call = type(batch.attention), type(batch.attention).__call__

    def recorded(self, q, k, v, scale):
        strides.append([x.stride() for x in (q, k, v)])
        out = call(self, q, k, v, scale)
        out.register_hook(lambda gradient: strides.append([gradient.stride()]))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "__call__", recorded)
        attend_once(batch.attention, 128, engine.heads, torch.device("cpu"))
        warm = list(strides)
        strides.clear()
        engine.forward_backward([batch])
    assert strides[0] == warm[0]
    assert strides[-1] == warm[-1]
