"""Learning rate of every step, compared with transformers' schedules, which train the reference implementation."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_hf
from transformers import get_scheduler

from sdlm_megatron.config.schema import ScheduleConfig
from sdlm_megatron.parallel.optimizer import build_schedule, set_rate

PEAK = 5e-6


def rates(config: ScheduleConfig, steps: int, peak: float = PEAK) -> list[float]:
    group = {"wd_mult": 1.0, "max_lr": peak, "min_lr": None}  # as Megatron-Core makes them
    optimizer: Any = SimpleNamespace(param_groups=[group], config=SimpleNamespace(weight_decay=0.01))
    schedule = build_schedule(optimizer, config, peak, steps)
    result = []
    for step in range(1, steps + 1):
        set_rate(schedule, step)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def theirs(name: str, steps: int, warmup: int, **more: Any) -> list[float]:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedule = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=more)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize(
    ("style", "name", "more"),
    [
        ("constant", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 6, "decay_type": "linear"}),
    ],
)
def test_rates_equal_those_of_transformers_after_the_warm_up(style: str, name: str, more: dict, warmup: int) -> None:
    config = ScheduleConfig(style=style, warmup_steps=warmup, decay_steps=more.get("num_decay_steps", 0))
    ours = rates(config, 20)
    assert ours[warmup:] == pytest.approx(theirs(name, 20, warmup, **more)[warmup:], rel=1e-12)
    # transformers' first warm-up step has the rate 0; here the last one has the peak
    assert ours[:warmup] == pytest.approx([PEAK * (step + 1) / warmup for step in range(warmup)], rel=1e-12)


def test_last_steps_have_the_expected_rates() -> None:
    assert rates(ScheduleConfig(style="linear"), 4, 1.0) == [1.0, 0.75, 0.5, 0.25]
    assert rates(ScheduleConfig(style="linear", warmup_steps=1, min_lr=0.2), 5, 1.0) == pytest.approx(
        [1.0, 1.0, 0.8, 0.6, 0.4]
    )
    assert rates(ScheduleConfig(style="wsd", decay_steps=2), 4, 1.0) == [1.0, 1.0, 1.0, 0.5]
    assert rates(ScheduleConfig(style="wsd", warmup_steps=2, decay_steps=1), 3, 1.0) == [0.5, 1.0, 1.0]
    assert rates(ScheduleConfig(), 3) == [PEAK] * 3  # the published recipe


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "LoRA"])
def test_every_group_of_the_engines_optimizer_has_the_rate(make_engine: Callable, tmp_path: Path, rank: int) -> None:
    engine = make_engine(make_hf(tmp_path / "hf", layers=1), rank=rank)
    config, groups = ScheduleConfig(style="linear", min_lr=2e-6), engine.optimizer.param_groups
    schedule = build_schedule(engine.optimizer, config, engine.config.optimizer.lr, 4)
    set_rate(schedule, 4)
    expected = 2e-6 + (engine.config.optimizer.lr - 2e-6) / 4
    assert len(groups) == (1 if rank else 2), "norms and biases have a group of their own"
    assert [group["lr"] for group in groups] == pytest.approx([expected] * len(groups), rel=1e-12)
