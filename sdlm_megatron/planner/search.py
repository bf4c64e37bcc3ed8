"""Search for the best parallel layouts: memory, time and cost of each layout that training would accept."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.config.validate import check_model, check_run, row_unit
from sdlm_megatron.data.cut import StepGrid
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.planner.assumptions import Assumptions, Device, Range, device_of
from sdlm_megatron.planner.memory import GpuMemory, RowTokens, peak_memory
from sdlm_megatron.planner.parallel_layout import ON_GPU, Kernels, ParallelLayout, layout_of
from sdlm_megatron.planner.step_time import Costs, StepTime, step_time
from sdlm_megatron.planner.workload import Workload, rows_per_step, steps, workload

LEAST_PART = 4096
"""Fewest tokens of a row per rank of context parallelism in the search: shorter parts make matrix products slow."""
MOST_CHUNKS = 8
"""Largest number of model chunks per stage that the search tries."""
CLOSE = 0.02
"""Differences in time below this share are within the error of the model."""
_OF_MIXTURE = {"documents", "content_tokens", "template_tokens", "length_spread", "response_share", "repeat", "fill"}


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
    """Rows of the dataset per step."""
    grid: StepGrid
    """The rows that their documents are cut into."""
    spread: tuple[float, float]
    """Largest visible pairs over their mean: of a row, and of the sum of a rank."""
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
    def micro_batches(self) -> int:
        """Micro-batches per data-parallel rank and step."""
        return self.grid.micro_batches

    @property
    def padding(self) -> float:
        """Share of a step's tokens that is padding."""
        row = self.planner.work.row
        tokens = self.grid.ranks * self.grid.micro_batches * self.grid.row_length
        return 1 - self.rows * (row.clean + row.block) / tokens

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
        same = self.data or not values.keys() & {*_OF_MIXTURE, "row_length"}
        work = self.work if same else workload(self.config, "", assumed)
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
        rows, grid = self.rows, self.grid(layout)
        spread = self.work.sample.spread(rows, grid)
        work = self.work.scaled(grid.row_length, rows / (grid.ranks * grid.micro_batches))
        costs = Costs(self.model, layout, work.part(layout), self.device, self.assumed)
        time = step_time(costs, grid.micro_batches, spread[1])
        count = steps(self.config, self.work, rows)
        flops = self.work.row_flops(self.model, frozen=self.config.lora.rank > 0) * rows
        return LayoutPlan(
            layout=layout,
            memory=self.memory(layout),
            room=self.room,
            time=time,
            rows=rows,
            grid=grid,
            spread=spread,
            steps=count,
            seconds=time.total * count / (1 - self.assumed.lost_time),
            mfu=flops / (time.total * layout.gpus * self.device.peak),
            flops=flops * count,
            costs=costs,
            planner=self,
        )

    def memory(self, layout: ParallelLayout) -> GpuMemory:
        """Memory of the stage that needs most."""
        grid = self.grid(layout)
        return peak_memory(self.model, layout, self.full_row(grid), grid.micro_batches)

    def grid(self, layout: ParallelLayout) -> StepGrid:
        """The rows of a step in a layout."""
        length, train = self.work.row.length, layout.train
        parallel = (layout.data, layout.parallel.group, row_unit(length, layout.parallel, train))
        by_row = train.loss_normalization == "rows"
        return self.work.sample.grid(self.rows, length, parallel, (train.micro_batches, by_row))

    def full_row(self, grid: StepGrid) -> RowTokens:
        """A row of a step that documents fill."""
        return self.work.scaled(grid.row_length, grid.row_length / self.work.row.length).row

    def best(self, gpus: int) -> list[LayoutPlan]:
        """The layouts that fit on `gpus` GPUs, fastest first. Raises ConfigError where training accepts none."""
        plans = (self._fitting(layout) for longest in self.layouts(gpus) for layout in self._shorter_rows(longest))
        return sorted((p for p in plans if p is not None), key=lambda p: (p.seconds, p.memory.total))

    def _shorter_rows(self, layout: ParallelLayout) -> list[ParallelLayout]:
        """The layout, and the one with more micro-batches if that makes rows shorter: they take less memory."""
        grid = self.grid(layout)
        if layout.train.micro_batches or grid.row_length == self.work.row.length:
            return [layout]
        return [layout, layout.change(micro_batches=grid.micro_batches + grid.multiple)]

    def _fitting(self, layout: ParallelLayout) -> LayoutPlan | None:
        """The layout with the least recomputation that fits; None if it does not fit even with all layers."""
        # training refuses selective recomputation with delayed scaling (config/validate.py)
        for kind in ("none", "selective") if layout.train.fp8 != "delayed" else ("none",):
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
        """All layouts on `gpus` GPUs that training would accept, without recomputation; if none, its first error."""
        first: ConfigError | None = None
        accepted = False
        for layout in self._candidates(gpus):
            try:
                self.check(layout)
            except ConfigError as error:
                first = first or error
                continue
            accepted = True
            yield layout
        if first and not accepted:
            raise first

    def _candidates(self, gpus: int) -> Iterator[ParallelLayout]:
        """The layouts that the search considers."""
        train = self.config.train
        both = train.layers == "auto" and train.precision == "bf16" and train.fp8 == "none"
        kernels = list(ON_GPU.values()) if both else [layout_of(self.config, gpus).kernels]
        in_node = int(self.assumed.gpus_per_node)
        for tensor in range(1, min(gpus, in_node) + 1):
            if gpus % tensor or in_node % tensor:  # a TP group must not leave the node
                continue
            for pipeline in _divisors(gpus // tensor):
                if self.model.num_layers % pipeline:
                    continue
                chunks = _divisors(self.model.num_layers // pipeline) if pipeline > 1 else [1]
                for virtual in filter(lambda n: n <= MOST_CHUNKS, chunks):
                    for context in _divisors(gpus // (tensor * pipeline)):
                        if context == 1 or self.work.row.length >= context * LEAST_PART:
                            degrees = {"tensor": tensor, "pipeline": pipeline, "context": context}
                            yield from self._variants(gpus, {**degrees, "virtual_pipeline": virtual}, kernels)

    def _variants(self, gpus: int, degrees: dict[str, int], kernels: list[Kernels]) -> Iterator[ParallelLayout]:
        """The layouts with these degrees: both kinds of layers, sequence parallelism and distributed optimizer."""
        tensor = degrees["tensor"]
        for kernel in kernels:
            for sequence in (False, True) if tensor > 1 else (False,):
                for sharded in (True, False):
                    yield layout_of(self.config, gpus, kernel).change(
                        **degrees,
                        sequence=sequence,
                        distributed_optimizer=sharded,
                        overlap_grad_reduce=True,
                        overlap_param_gather=sharded,
                        overlap_tensor=self.config.parallel.overlap_tensor and kernel.name != "megatron" and tensor > 1,
                        recompute="none",
                        recompute_layers=0,
                    )

    def check(self, layout: ParallelLayout) -> None:
        """Raises ConfigError if training would refuse the layout."""
        train = replace(layout.train, layers=layout.kernels.name)
        data = replace(self.config.data, path=self.config.data.path or "a dataset")
        config = replace(self.config, parallel=layout.parallel, train=train, data=data)
        check_run(config, layout.gpus)
        check_model(self.model, config, self.work.row.length)
        if layout.context > 1 and train.precision == "fp32":  # model/attention/choice.py, on a GPU
            what, fix = "no attention kernel for parts of rows supports fp32 on a GPU", "train.precision=bf16"
            raise ConfigError(what, "parallel.context", f"set {fix} or parallel.context=1")


def recommended(plans: list[LayoutPlan]) -> LayoutPlan | None:
    """The simplest of the plans within CLOSE of the fastest, which comes first; None if there is none."""

    def complexity(plan: LayoutPlan) -> tuple:
        at = plan.layout
        plain = at.train.recompute != "none", at.train.micro_batches > 0
        return *plain, at.virtual, at.parallel.model_size, at.context, at.pipeline, plan.seconds

    near = [p for p in plans if p.seconds <= plans[0].seconds * (1 + CLOSE)]
    return min(near, key=complexity, default=None)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
