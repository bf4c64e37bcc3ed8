"""`sdlm plan --simulate`: a step of some ranks by the real engine without numbers, in a process of its own.

This side needs no torch; parallel/simulate.py says what is simulated.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdlm_megatron.config.validate import resolve_shape
from sdlm_megatron.planner.memory import stage_memory
from sdlm_megatron.planner.parallel_layout import ParallelLayout
from sdlm_megatron.planner.search import LayoutPlan, Planner

FIXED = ("weights", "gradients", "optimizer")
"""Items of the memory that a simulated step shows."""


@dataclass(frozen=True)
class SimulatedRank:
    """A step of one rank."""

    rank: int
    stage: int
    build: float
    """Seconds that it took to build the engine, and to make the step."""
    step: float
    weights: int
    """Bytes, as of gradients and optimizer."""
    gradients: int
    optimizer: int


def default_ranks(layout: ParallelLayout) -> list[int]:
    """The first rank, the first of a middle stage, and the last."""
    per_stage, stages = layout.gpus // layout.pipeline, layout.pipeline
    return sorted({0, stages // 2 * per_stage if stages > 2 else 0, layout.gpus - 1})


def simulated_micro_batches(plan: LayoutPlan) -> int:
    """Micro-batches to simulate: warm-up, steady state and end of the pipeline's schedule, but no more than a step."""
    return min(plan.micro_batches, 2 * plan.layout.pipeline)


def run_simulation(planner: Planner, plan: LayoutPlan, ranks: Sequence[int]) -> list[SimulatedRank]:
    """A step of these ranks in the layout of the plan; SystemExit where one fails, after its reason was printed."""
    config, row = planner.config, planner.work.row
    request: dict[str, Any] = {name: asdict(getattr(config, name)) for name in ("lora", "optimizer", "schedule")}
    request |= {
        "model": asdict(resolve_shape(config.model, None, "")),
        "diffusion": asdict(config.diffusion) | {"block_size": row.block_size},
        "parallel": asdict(plan.layout.parallel) | {"overlap_tensor": False},
        # what only TransformerEngine has, which needs a GPU
        "train": asdict(plan.layout.train) | {"layers": "megatron", "fp8": "none"},
        "gpus": plan.layout.gpus,
        "ranks": list(ranks),
        "row_length": plan.grid.row_length,
        "micro_batches": simulated_micro_batches(plan),
        "steps": max(plan.steps, config.schedule.warmup_steps + config.schedule.decay_steps + 1),
    }
    line = [sys.executable, "-m", "sdlm_megatron.parallel.simulate"]
    environment = {**os.environ, "SDLM_DEVICE": "cpu", "RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(line, input=json.dumps(request), stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [SimulatedRank(**json.loads(text)) for text in done.stdout.splitlines() if text.startswith("{")]


def simulation_text(planner: Planner, plan: LayoutPlan, ranks: Sequence[SimulatedRank]) -> str:
    """The simulated ranks and their fixed memory beside the planner's, for people."""
    count = simulated_micro_batches(plan)
    lines = [
        f"simulated: one step of {count} micro-batches passes (shapes, devices and arguments; Megatron-Core's layers); "
        "GB, in parentheses as planned:",
        f"  {'rank':>6}  stage  {'weights':>16}  {'gradients':>16}  {'optimizer':>16}  wall time",
    ]
    for rank in ranks:
        items = [f"{getattr(rank, x) / 1e9:7.2f} ({y / 1e9:6.2f})" for x, y in planned(planner, plan, rank).items()]
        lines.append(f"  {rank.rank:6}  {rank.stage:5}  {'  '.join(items)}  {rank.build + rank.step:7.1f} s")
    return "\n".join(lines)


def planned(planner: Planner, plan: LayoutPlan, rank: SimulatedRank) -> dict[str, float]:
    """The planner's bytes of weights, gradients and optimizer state on the stage of a rank."""
    memory = stage_memory(planner.model, plan.layout, planner.full_row(plan.grid), plan.micro_batches, rank.stage)
    return {name: getattr(memory, name) for name in FIXED}
