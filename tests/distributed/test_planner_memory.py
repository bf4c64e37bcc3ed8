"""Planner memory against real steps of Megatron-Core: weights, gradients and optimizer exactly, the peak of a forward
and backward pass within 10 %."""

import json
from functools import cache
from subprocess import CompletedProcess

import pytest
from helpers import run_python
from measure_memory import CASES, config_of

from sdlm_megatron.model.label_loss import BYTES
from sdlm_megatron.planner.memory import LABEL_LOSS_BYTES, RowTokens, stage_memory
from sdlm_megatron.planner.parallel_layout import CPU, layout_of

PEAK = 0.08  # relative error; the goal is 0.10, the worst case is 0.065


@cache
def measured(processes: int) -> CompletedProcess:
    """Measurements of all cases with this number of processes, cached."""
    names = [name for name, (n, *_) in CASES.items() if n == processes]
    return run_python("tests/measure_memory.py", *names, processes=processes, check=False)


def test_head_chunk_sizes_agree() -> None:
    assert LABEL_LOSS_BYTES == BYTES


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_predicted_memory_equals_a_real_step(name: str) -> None:
    processes, micro_batches, settings = CASES[name]
    config = config_of(settings)
    done = measured(processes)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    records = [line for line in lines if line["case"] == name]
    assert len(records) == processes, done.stderr[-3000:]
    layout = layout_of(config, processes, CPU)
    for record in records:
        memory = stage_memory(config.model, layout, RowTokens(**record["row"]), micro_batches, record["stage"])
        assert (memory.weights, memory.gradients) == (record["weights"], record["gradients"])
        assert memory.optimizer == pytest.approx(record["optimizer"], rel=1e-3 if layout.replicas > 1 else 0)
        peak = memory.activations + memory.working + memory.logits + memory.buffers
        measured_mb, ratio = record["peak"] / 1e6, peak / record["peak"]
        print(f"{name}, stage {record['stage']}: measured {measured_mb:.2f} MB, predicted {ratio:.1%}")
        assert peak == pytest.approx(record["peak"], rel=PEAK)
