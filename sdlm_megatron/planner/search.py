"""A layout's plan, and the best layouts for a number of GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.config.validate import check_model, check_run
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.planner.assumptions import Assumptions, Device
from sdlm_megatron.planner.flops import ModelShape
from sdlm_megatron.planner.memory import Memory, peak_memory
from sdlm_megatron.planner.parallel_layout import ON_GPU, Kernels, Layout
from sdlm_megatron.planner.step_time import Costs, StepTime, step_time
from sdlm_megatron.planner.workload import Workload, rows_per_step, steps

MOST_CHUNKS = 8
"""Model chunks of a stage that are tried."""
CLOSE = 0.02
"""Differences in time that mean nothing: the model is not better than that."""


@dataclass(frozen=True)
class Plan:
    """What a run with one layout needs."""

    layout: Layout
    memory: Memory
    room: float
    """Bytes that tensors may take on a GPU."""
    time: StepTime
    rows: int
    """Rows of a step."""
    micro_batches: int
    """Of a data-parallel rank in a step."""
    steps: int
    seconds: float
    """Of the whole run."""
    mfu: float
    """Model FLOPs over the GPUs' peak, while training."""
    flops: float
    """Model FLOPs of the run."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.layout.gpus / 3600

    @property
    def empty_rows(self) -> int:
        """Rows a step that only fill up."""
        return self.micro_batches * self.layout.data - self.rows


@dataclass(frozen=True)
class Planner:
    """A run on a kind of GPU."""

    config: RunConfig
    work: Workload
    device: Device
    given: Assumptions

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def shape(self) -> ModelShape:
        """The sizes that decide the model FLOPs."""
        return ModelShape.of(self.model)

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return rows_per_step(self.config, self.work)

    @property
    def room(self) -> float:
        """Bytes that tensors may take on a GPU."""
        return self.device.memory * (1 - self.given.reserve)

    def plan(self, layout: Layout) -> Plan:
        """Memory, time and cost of a layout, whether or not it fits."""
        rows = self.rows
        time = step_time(Costs(self.model, layout, self.work, self.device, self.given), rows)
        count = steps(self.config, self.work, rows)
        flops = self.work.row_flops(self.shape) * rows
        return Plan(
            layout=layout,
            memory=self.memory(layout),
            room=self.room,
            time=time,
            rows=rows,
            micro_batches=layout.micro_batches(rows),
            steps=count,
            seconds=time.total * count / (1 - self.given.lost_time),
            mfu=flops / (time.total * layout.gpus * self.device.peak),
            flops=flops * count,
        )

    def memory(self, layout: Layout) -> Memory:
        """Of the stage that needs most."""
        return peak_memory(self.model, layout, self.work.row, layout.micro_batches(self.rows))

    def best(self, gpus: int) -> list[Plan]:
        """The layouts that fit on so many GPUs, fastest first."""
        found = (self._fitting(layout) for layout in self.layouts(gpus))
        return sorted((p for p in found if p is not None), key=lambda p: (p.seconds, p.memory.total))

    def _fitting(self, layout: Layout) -> Plan | None:
        """The layout with the least recomputation that fits, None if none does."""
        for kind in ("none", "selective"):
            asked = layout.with_recompute(kind)
            if self.memory(asked).total <= self.room:
                return self.plan(asked)
        layers = self.model.num_layers // (layout.pipeline * layout.virtual)
        if self.memory(layout.with_recompute("full", layers)).total > self.room:
            return None
        low, high = 1, layers  # more recomputed layers never take more memory
        while low < high:
            middle = (low + high) // 2
            if self.memory(layout.with_recompute("full", middle)).total <= self.room:
                high = middle
            else:
                low = middle + 1
        return self.plan(layout.with_recompute("full", 0 if low == layers else low))

    def layouts(self, gpus: int) -> Iterator[Layout]:
        """Every allowed layout, without recomputation."""
        fixed = self.config.train.layers
        kernels = [k for k in ON_GPU.values() if fixed in ("auto", k.name)]
        if self.config.train.fp8 != "none":
            kernels = [k for k in kernels if k.name == "transformer_engine"]
        in_node = int(self.given.gpus_per_node)
        for tensor in range(1, min(gpus, in_node) + 1):
            if gpus % tensor or in_node % tensor:
                continue
            for pipeline in _divisors(gpus // tensor):
                if self.model.num_layers % pipeline:
                    continue
                for virtual in _divisors(self.model.num_layers // pipeline) if pipeline > 1 else [1]:
                    yield from self._variants(gpus, tensor, pipeline, virtual, kernels)

    def _variants(
        self, gpus: int, tensor: int, pipeline: int, virtual: int, kernels: list[Kernels]
    ) -> Iterator[Layout]:
        if virtual > MOST_CHUNKS:
            return
        for kernel in kernels:
            for sequence in (False, True) if tensor > 1 else (False,):
                for sharded in (True, False):
                    layout = Layout(
                        gpus=gpus,
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual=virtual,
                        sequence=sequence,
                        distributed_optimizer=sharded,
                        overlap_grad_reduce=True,
                        overlap_param_gather=sharded,
                        overlap_tensor=self.config.parallel.overlap_tensor and kernel.name != "megatron" and tensor > 1,
                        recompute="none",
                        recompute_layers=0,
                        kernels=kernel,
                        precision=self.config.train.precision,
                        fp8=self.config.train.fp8,
                        logits_mb=self.config.train.logits_mb,
                    )
                    if self.allowed(layout):
                        yield layout

    def allowed(self, layout: Layout) -> bool:
        """Whether training would take it."""
        try:
            self.check(layout)
        except ConfigError:
            return False
        return True

    def check(self, layout: Layout) -> None:
        """ConfigError where training would refuse the layout."""
        config = self.config
        parallel = replace(
            config.parallel,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual,
            sequence=layout.sequence,
            distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap_grad_reduce,
            overlap_param_gather=layout.overlap_param_gather,
            overlap_tensor=layout.overlap_tensor,
        )
        train = replace(
            config.train,
            layers=layout.kernels.name,
            recompute=layout.recompute,
            recompute_layers=layout.recompute_layers,
        )
        data = replace(config.data, path=config.data.path or "a dataset")
        asked = replace(config, parallel=parallel, train=train, data=data)
        check_run(asked, layout.gpus)
        check_model(self.model, asked, self.work.row.length)


def recommended(plans: list[Plan]) -> Plan | None:
    """The simplest of the plans that are nearly as fast as the first; None if there is none."""

    def effort(plan: Plan) -> tuple:
        at = plan.layout
        return at.recompute != "none", at.virtual, at.pipeline * at.tensor, at.pipeline, plan.seconds

    near = [p for p in plans if p.seconds <= plans[0].seconds * (1 + CLOSE)]
    return min(near, key=effort, default=None)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
