"""The planner's memory against real steps of Megatron-Core: weights, gradients and optimizer exactly, the peak of a
forward and backward pass within 10 %."""

import json
from functools import cache
from subprocess import CompletedProcess

import pytest
from helpers import run_python
from measure_memory import CASES, config_of

from sdlm_megatron.model.label_loss import BYTES
from sdlm_megatron.planner.memory import LABEL_LOSS_BYTES, RowTokens, stage_memory
from sdlm_megatron.planner.parallel_layout import CPU, layout_of

PEAK = 0.08  # the aim is 0.10; the worst case is at 0.065


@cache
def measured(processes: int) -> CompletedProcess:
    """The run that measures all cases with so many processes, once."""
    names = [name for name, (n, *_) in CASES.items() if n == processes]
    return run_python("tests/measure_memory.py", *names, processes=processes, check=False)


def test_chunks_of_the_head_are_those_of_the_model() -> None:
    assert LABEL_LOSS_BYTES == BYTES


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_real_step(name: str) -> None:
    processes, micro_batches, settings = CASES[name]
    config = config_of(settings)
    done = measured(processes)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [line for line in lines if line["case"] == name]
    assert len(found) == processes, done.stderr[-3000:]
    layout = layout_of(config, processes, CPU)
    for one in found:
        memory = stage_memory(config.model, layout, RowTokens(**one["row"]), micro_batches, one["stage"])
        assert (memory.weights, memory.gradients) == (one["weights"], one["gradients"])
        assert memory.optimizer == pytest.approx(one["optimizer"], rel=1e-3 if layout.data > 1 else 0)
        peak = memory.activations + memory.working + memory.logits + memory.buffers
        print(f"{name}, stage {one['stage']}: measured {one['peak'] / 1e6:.2f} MB, predicted {peak / one['peak']:.1%}")
        assert peak == pytest.approx(one["peak"], rel=PEAK)
