"""Weight decay: on which parameters it acts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import load_micro_batch, make_dataset, make_hf

from sdlm_megatron.config.schema import OptimizerConfig
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.parallel.optimizer import build_optimizer


@pytest.mark.parametrize("all_parameters", [False, True])
def test_norms_and_biases_decay_only_if_requested(make_engine: Callable, tmp_path: Path, all_parameters: bool) -> None:
    """A step without targets has a zero gradient: it is the decay alone."""
    engine = make_engine(make_hf(tmp_path / "hf"))
    decay, rate = 0.5, engine.config.optimizer.lr
    config = OptimizerConfig(weight_decay=decay, decay_norms_and_biases=all_parameters)
    engine.optimizer = build_optimizer(engine.models, config, engine.config.parallel)
    engine.schedule.optimizer = engine.optimizer
    engine.schedule.start_wd = engine.schedule.end_wd = decay
    named = [(name, p) for module in engine.modules for name, p in module.named_parameters()]
    for _, parameter in named:
        parameter.data.fill_(1.0)
    engine.optimizer.reload_model_params()
    empty = load_micro_batch(PackedDataset(make_dataset(tmp_path / "data", rows=1)), None, seed=0)
    engine.train_step([engine.prepare(empty)], 1)
    small = {name for name, p in named if p.ndim == 1}
    assert any("norm" in name for name in small) and any("bias" in name for name in small)
    decayed = {name for name, p in named if torch.all(p == torch.tensor(1.0) * (1 - rate * decay))}
    unchanged = {name for name, p in named if torch.all(p == 1.0)}
    assert unchanged == (set() if all_parameters else small)
    assert decayed | unchanged == {name for name, _ in named}
