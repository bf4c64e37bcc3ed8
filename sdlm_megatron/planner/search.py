"""Search for the best parallel layouts: memory, time and cost of each layout that training would accept."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.config.validate import check_model, check_run
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.planner.assumptions import Assumptions, Device, Range, device_of
from sdlm_megatron.planner.memory import GpuMemory, peak_memory
from sdlm_megatron.planner.parallel_layout import ON_GPU, Kernels, ParallelLayout, layout_of
from sdlm_megatron.planner.step_time import Costs, StepTime, step_time
from sdlm_megatron.planner.workload import Workload, rows_per_step, steps, workload

MOST_CHUNKS = 8
"""Largest number of model chunks per stage that the search tries."""
CLOSE = 0.02
"""Differences in time below this share are within the error of the model."""
NEAR = 0.10
"""Share of a step's rows by which documents may turn out longer or shorter than assumed."""


@dataclass(frozen=True)
class LayoutPlan:
    """Memory, time and cost of a run with one layout."""

    layout: ParallelLayout
    memory: GpuMemory
    """Of the stage that needs most."""
    room: float
    """Bytes available to tensors on a GPU."""
    time: StepTime
    rows: int
    """Rows per step."""
    micro_batches: int
    """Micro-batches per data-parallel rank and step."""
    steps: int
    seconds: float
    """Duration of the run, with checkpoints, starts and stops."""
    mfu: float
    """Model FLOPs over the GPUs' peak, during steps."""
    flops: float
    """Model FLOPs of the run."""
    costs: Costs = field(repr=False, compare=False)
    planner: "Planner" = field(repr=False, compare=False)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.layout.gpus / 3600

    @property
    def empty_rows(self) -> int:
        """Empty rows per step that fill the last micro-batches."""
        return self.micro_batches * self.layout.data - self.rows

    @cached_property
    def band(self) -> tuple["LayoutPlan", "LayoutPlan"]:
        """The layout with each assumption at that end of its range which makes the run shorter, and longer."""
        fast = slow = self
        for name, between in self.planner.ranges.items():
            fast, slow = (
                pick(at, *(at.planner.change({name: end}).plan(at.layout) for end in between), key=lambda p: p.seconds)
                for at, pick in ((fast, min), (slow, max))
            )
        return fast, slow

    @property
    def roundings(self) -> list[tuple[int, int, float]]:
        """(rows, micro-batches, GPU-hours) of the nearest steps with fewer and with more micro-batches, if NEAR.

        Rows of a step follow from the mean length of documents, and micro-batches from rows by rounding up, so a small
        error of the one can be a large one of the other.
        """
        if self.planner.config.train.global_batch_unit == "rows":
            return []
        at, nearest = self.layout, []
        group = at.pipeline if at.virtual > 1 else 1
        for rows in ((self.micro_batches - group) * at.data, self.micro_batches * at.data + 1):
            if rows > 0 and abs(rows - self.rows) <= NEAR * self.rows:
                share = step_time(self.costs, rows).total / self.time.total
                nearest.append((rows, at.micro_batches(rows), self.gpu_hours * share))
        return nearest


@dataclass(frozen=True)
class Planner:
    """A run on one kind of GPU."""

    config: RunConfig
    work: Workload
    device: Device
    assumed: Assumptions
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Assumptions that are not certain."""
    data: str = ""
    """The dataset; empty for the mixture, which follows from the assumptions."""

    def change(self, values: Mapping[str, float]) -> "Planner":
        """The planner with other assumptions."""
        assumed = replace(self.assumed, **values)
        work = self.work if self.data else workload(self.config, "", assumed)
        return replace(self, assumed=assumed, work=work, device=device_of(self.device.name, assumed))

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def rows(self) -> int:
        """Rows per step."""
        return rows_per_step(self.config, self.work)

    @property
    def room(self) -> float:
        """Bytes available to tensors on a GPU."""
        return self.device.memory * (1 - self.assumed.reserve)

    def plan(self, layout: ParallelLayout) -> LayoutPlan:
        """The plan of a layout, whether or not it fits."""
        rows, costs = self.rows, Costs(self.model, layout, self.work, self.device, self.assumed)
        time = step_time(costs, rows)
        count = steps(self.config, self.work, rows)
        flops = self.work.row_flops(self.model) * rows
        return LayoutPlan(
            layout=layout,
            memory=self.memory(layout),
            room=self.room,
            time=time,
            rows=rows,
            micro_batches=layout.micro_batches(rows),
            steps=count,
            seconds=time.total * count / (1 - self.assumed.lost_time),
            mfu=flops / (time.total * layout.gpus * self.device.peak),
            flops=flops * count,
            costs=costs,
            planner=self,
        )

    def memory(self, layout: ParallelLayout) -> GpuMemory:
        """Memory of the stage that needs most."""
        return peak_memory(self.model, layout, self.work.row, layout.micro_batches(self.rows))

    def best(self, gpus: int) -> list[LayoutPlan]:
        """The layouts that fit on `gpus` GPUs, fastest first."""
        plans = (self._fitting(layout) for layout in self.layouts(gpus))
        return sorted((p for p in plans if p is not None), key=lambda p: (p.seconds, p.memory.total))

    def _fitting(self, layout: ParallelLayout) -> LayoutPlan | None:
        """The layout with the least recomputation that fits; None if it does not fit even with all layers."""
        for kind in ("none", "selective"):
            candidate = layout.with_recompute(kind)
            if self.memory(candidate).total <= self.room:
                return self.plan(candidate)
        layers = self.model.num_layers // (layout.pipeline * layout.virtual)
        if self.memory(layout.with_recompute("full", layers)).total > self.room:
            return None
        low, high = 1, layers  # bisection: recomputing more layers never takes more memory
        while low < high:
            middle = (low + high) // 2
            if self.memory(layout.with_recompute("full", middle)).total <= self.room:
                high = middle
            else:
                low = middle + 1
        return self.plan(layout.with_recompute("full", 0 if low == layers else low))

    def layouts(self, gpus: int) -> Iterator[ParallelLayout]:
        """All layouts on `gpus` GPUs that training would accept, without recomputation."""
        choice = self.config.train.layers
        kernels = [k for k in ON_GPU.values() if choice in ("auto", k.name)]
        if self.config.train.fp8 != "none":
            kernels = [k for k in kernels if k.name == "transformer_engine"]
        in_node = int(self.assumed.gpus_per_node)
        for tensor in range(1, min(gpus, in_node) + 1):
            if gpus % tensor or in_node % tensor:  # a TP group must not leave the node
                continue
            for pipeline in _divisors(gpus // tensor):
                if self.model.num_layers % pipeline:
                    continue
                chunks = _divisors(self.model.num_layers // pipeline) if pipeline > 1 else [1]
                for virtual in filter(lambda n: n <= MOST_CHUNKS, chunks):
                    yield from self._variants(gpus, tensor, pipeline, virtual, kernels)

    def _variants(
        self, gpus: int, tensor: int, pipeline: int, virtual: int, kernels: list[Kernels]
    ) -> Iterator[ParallelLayout]:
        """The layouts with these degrees: both kinds of layers, sequence parallelism and distributed optimizer."""
        for kernel in kernels:
            for sequence in (False, True) if tensor > 1 else (False,):
                for sharded in (True, False):
                    layout = layout_of(self.config, gpus, kernel).change(
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        sequence=sequence,
                        distributed_optimizer=sharded,
                        overlap_grad_reduce=True,
                        overlap_param_gather=sharded,
                        overlap_tensor=self.config.parallel.overlap_tensor and kernel.name != "megatron" and tensor > 1,
                        recompute="none",
                        recompute_layers=0,
                    )
                    try:
                        self.check(layout)
                    except ConfigError:
                        continue
                    yield layout

    def check(self, layout: ParallelLayout) -> None:
        """Raises ConfigError if training would refuse the layout."""
        train = replace(layout.train, layers=layout.kernels.name)
        data = replace(self.config.data, path=self.config.data.path or "a dataset")
        config = replace(self.config, parallel=layout.parallel, train=train, data=data)
        check_run(config, layout.gpus)
        check_model(self.model, config, self.work.row.length)


def recommended(plans: list[LayoutPlan]) -> LayoutPlan | None:
    """The simplest of the plans within CLOSE of the fastest, which comes first; None if there is none."""

    def complexity(plan: LayoutPlan) -> tuple:
        at = plan.layout
        return at.train.recompute != "none", at.virtual, at.pipeline * at.tensor, at.pipeline, plan.seconds

    near = [p for p in plans if p.seconds <= plans[0].seconds * (1 + CLOSE)]
    return min(near, key=complexity, default=None)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
