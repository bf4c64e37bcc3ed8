"""train.gradient_dtype: gradients that are summed in bf16 against those summed in fp32, from the same micro-batches."""

from typing import Any

import pytest
import torch

from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig


def gradients(groups: Any, count: int, weights: list[torch.Tensor] | None, **train: str) -> Any:
    """Engine and gradients in float64 of `count` micro-batches of 256 tokens, from these weights."""
    from dev.bench.engine_case import StepCase

    config = load_config(RunConfig, "tiny", [f"--train.{key}={value}" for key, value in train.items()], PRESETS)
    case = StepCase.of(config, groups, "full", count, 256)
    parameters = list(case.engine.module.parameters())
    if weights:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data.copy_(weight)
    case.engine.forward_backward(case.batches)
    (dtype,) = {buffer.grad_data.dtype for model in case.engine.models for buffer in model.buffers}
    assert dtype is getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[train["gradient_dtype"]])
    return case.engine, torch.cat([p.main_grad.double().flatten() for p in parameters])


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("count", "bound"), [(1, 0.003), (6, 0.006), (32, 0.01)])
def test_sums_in_bf16_stay_within_their_rounding(groups: Any, count: int, bound: float) -> None:
    """The error grows with the number of micro-batches; that of bf16 products, which both have, does not."""
    engine, exact = gradients(groups, count, None, precision="bf16", gradient_dtype="fp32")
    weights = [p.detach().clone() for p in engine.module.parameters()]
    _, rounded = gradients(groups, count, weights, precision="bf16", gradient_dtype="bf16")
    _, true = gradients(groups, count, weights, precision="fp32", gradient_dtype="fp32")
    by_sum, by_products = error(rounded, exact), error(exact, true)
    norm = float(rounded.norm() / exact.norm()) - 1
    print(f"{count} micro-batches: sums {by_sum:.2%}, bf16 products {by_products:.2%}, norm {norm:+.3%}")
    assert 0.001 < by_sum < bound
    assert abs(norm) < 0.002


def test_update_reads_fp32_gradients(groups: Any) -> None:
    """The optimizer's copies are fp32, whatever the buffers are, and are freed before the next forward pass."""
    engine, _ = gradients(groups, 2, None, precision="bf16", gradient_dtype="bf16")
    parts = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    engine.optimizer.prepare_grads()
    masters = [p for part in parts for p in part.get_parameters()]
    assert masters and all(p.grad is not None and p.grad.dtype is torch.float32 for p in masters)
    engine.optimizer.zero_grad()
    assert all(p.grad is None for p in masters)
