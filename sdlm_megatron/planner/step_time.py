"""Time of a step, item by item, from the arithmetic, the bytes moved, and the planner's assumptions.

A pipeline stage works for `per row` seconds on each micro-batch; a step takes as long as the slowest stage's
micro-batches, the pipeline's bubble, and what comes once a step: the reduction of gradients, the gathering of
weights, the optimizer.
"""

from dataclasses import dataclass

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.planner.assumptions import Assumptions, Device
from sdlm_megatron.planner.memory import Row, linear_weights, stage_parameters
from sdlm_megatron.planner.parallel_layout import Layout, sizes_of
from sdlm_megatron.planner.workload import Workload

NORMS_AGAIN = 0.08
"""Share of the element-wise work that selective recompute adds: two norms forward, apart from their linear layers."""
LAYER_KERNELS = {"megatron": 110, "transformer_engine": 60}
"""Kernels of a layer, forward and backward; their starts hide behind each other's work, their tails do not."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they are spent on; all items are on the critical path."""

    gemm: float
    """Matrix products of the layers, without recomputation."""
    attention: float
    head: float
    """LM head and cross entropy on the label rows."""
    elementwise: float
    """Norms, RoPE, SwiGLU, residuals, and adding weight gradients up where no kernel does it on the way."""
    recompute: float
    """Everything that runs forward a second time."""
    empty_rows: float
    """Work on rows that fill up the last micro-batches."""
    tensor_communication: float
    pipeline_bubble: float
    pipeline_communication: float
    data_communication: float
    """Reduction of gradients and gathering of weights that nothing hides."""
    optimizer: float
    overhead: float
    """Between steps, and waiting for the slowest."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Costs:
    """Everything the times are made of."""

    model: ModelConfig
    layout: Layout
    work: Workload
    device: Device
    given: Assumptions

    @property
    def row(self) -> Row:
        return self.work.row

    def products(self, flops: float, *, fp8: bool = False) -> float:
        """Seconds of matrix products."""
        speed = self.device.peak * self.given.gemm_efficiency * (self.given.fp8_speedup if fp8 else 1)
        return flops / speed

    def moved(self, count: float) -> float:
        """Seconds of an element-wise kernel that moves so many bytes."""
        return count / (self.device.bandwidth * self.given.memory_efficiency)


@dataclass(frozen=True)
class RowTime:
    """Seconds of one micro-batch on one stage, forward and backward, without recomputation and communication."""

    gemm: float
    attention: float
    elementwise: float

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.elementwise

    @property
    def forward(self) -> float:
        """Of which the forward pass is a third."""
        return self.total / 3


def row_time(c: Costs) -> RowTime:
    """All layers of a stage; padding costs what tokens cost, but for attention."""
    layout, z, s = c.layout, sizes_of(c.model, c.layout.tensor), c.row.length
    layers = c.model.num_layers // layout.pipeline
    local = s / layout.tensor if layout.sequence else s
    flops = 6 * linear_weights(c.model, layout) * s
    start = LAYER_KERNELS[layout.kernels.name] * c.given.kernel_overhead_us * 1e-6
    attention = 14 * z.attention * c.work.pairs * layers  # a flash kernel makes the scores again in the backward
    norms = 10 * local * z.hidden  # two norms (read, write) and two residual sums (two reads, a write)
    rope = (2 if layout.kernels.fused_rope else 8) * s * (z.attention + z.kv)
    moved = 3 * (norms + rope + 3 * s * z.ffn) * layout.bytes * layers
    summed = 0 if layout.kernels.fused_accumulation else linear_weights(c.model, layout) * (8 + layout.bytes)
    return RowTime(
        gemm=c.products(flops, fp8=layout.fp8 != "none") + start * layers,
        attention=attention / (c.device.peak * c.given.attention_efficiency),
        elementwise=c.moved(moved + summed),
    )


def head_time(c: Costs) -> float:
    """Seconds of the head for one row: three products, and about 20 bytes a logit through memory."""
    z = sizes_of(c.model, c.layout.tensor)
    return c.products(6 * z.hidden * z.vocab * c.row.label_rows) + c.moved(20 * z.vocab * c.row.label_rows)


def step_time(c: Costs, rows: int) -> StepTime:
    """A step of `rows` rows."""
    layout, given = c.layout, c.given
    micro_batches = layout.micro_batches(rows)
    part, head = row_time(c), head_time(c)
    pp = layout.pipeline
    layers = c.model.num_layers // (pp * layout.virtual)
    share = (min(layout.recompute_layers or layers, layers) / layers) if layout.recompute == "full" else 0
    again = share * part.forward
    if layout.recompute == "selective":
        again = NORMS_AGAIN * part.elementwise
    tensor = _tensor_communication(c, share)
    one = part.total + again + tensor
    slowest = one + head  # the last stage
    useful = rows / (layout.data * micro_batches)
    pipes = _pipeline_communication(c, micro_batches)
    # all stages but the last wait for its head; the bubble is the time the first and last micro-batch travel
    bubble = (pp - 1) / layout.virtual * one
    data = _data_communication(c, slowest / 3, 2 * slowest / 3)
    optimizer = _optimizer(c)
    items = {
        "gemm": part.gemm * micro_batches * useful,
        "attention": part.attention * micro_batches * useful,
        "head": head * micro_batches * useful,
        "elementwise": part.elementwise * micro_batches * useful,
        "recompute": again * micro_batches * useful,
        "empty_rows": (part.gemm + part.elementwise + again) * micro_batches * (1 - useful),
        "tensor_communication": tensor * micro_batches,
        "pipeline_bubble": bubble,
        "pipeline_communication": pipes,
        "data_communication": data,
        "optimizer": optimizer,
    }
    whole = sum(items.values())
    return StepTime(**items, overhead=given.step_overhead_ms * 1e-3 + given.straggler * whole)


def _collective(c: Costs, count: float, members: int, speed: float) -> float:
    """Seconds of an all-gather or reduce-scatter of `count` bytes (the whole, not a member's part)."""
    if members == 1:
        return 0.0
    return count * (members - 1) / members / speed + c.given.collective_latency_us * 1e-6


def _tensor_communication(c: Costs, recomputed: float) -> float:
    """Seconds a micro-batch on one stage: two all-reduces a layer and direction, or gathers and scatters."""
    layout, tp = c.layout, c.layout.tensor
    if tp == 1:
        return 0.0
    layers = c.model.num_layers // layout.pipeline
    one = _collective(c, c.row.length * c.model.hidden_size * layout.bytes, tp, c.device.nvlink)
    # Forward and backward each have 2 all-reduces = 4 halves. Sequence parallelism gathers the inputs of two layers
    # again in the backward pass, under a matrix product; a recomputed layer's forward repeats its 4.
    halves = 4 * (2 + recomputed)
    z = sizes_of(c.model, tp)
    if c.model.num_query_groups < tp:  # the product of the QKV layer is gathered, and its gradient scattered
        whole = _collective(c, c.row.length * z.qkv * tp * layout.bytes, tp, c.device.nvlink)
        halves += (2 + recomputed) * whole / one
    hidden = c.given.hidden_tp if layout.overlap_tensor else 0.0
    return halves * one * layers * (1 - hidden)


def _network(c: Costs, members_of_a_node: float) -> float:
    """Bytes/s of a GPU in a ring that leaves the node: it has the ports of its members there."""
    return min(c.device.nvlink, c.given.network_gb * 1e9 * max(1.0, members_of_a_node))


def _pipeline_communication(c: Costs, micro_batches: int) -> float:
    """Seconds a step: activations and gradients to the neighbours; hidden for the most part when interleaved."""
    layout = c.layout
    if layout.pipeline == 1:
        return 0.0
    count = c.row.length * c.model.hidden_size * layout.bytes / (layout.tensor if layout.sequence else 1)
    inside = layout.gpus <= c.given.gpus_per_node
    speed = c.device.nvlink if inside else c.given.network_gb * 1e9
    one = count / speed + c.given.collective_latency_us * 1e-6
    transfers = 2 * layout.virtual * (micro_batches + layout.pipeline - 1)
    return transfers * one * (1 if layout.virtual == 1 else 0.3)


def _data_communication(c: Costs, forward: float, backward: float) -> float:
    """Seconds a step: fp32 gradients reduced, weights gathered, less what a pass of one micro-batch hides."""
    layout, dp = c.layout, c.layout.data
    if dp == 1:
        return 0.0
    numel = max(sum(sum(b) for b in stage_parameters(c.model, layout, s)) for s in (0, layout.pipeline - 1))
    in_node = min(dp, c.given.gpus_per_node / min(layout.tensor, c.given.gpus_per_node))
    speed = c.device.nvlink if layout.gpus <= c.given.gpus_per_node else _network(c, in_node)
    reduced = _collective(c, 4 * numel, dp, speed) * (1 if layout.distributed_optimizer else 2)
    gathered = _collective(c, layout.bytes * numel, dp, speed) if layout.distributed_optimizer else 0.0
    if layout.overlap_grad_reduce:
        reduced = max(reduced - c.given.hidden_dp * backward, 0.05 * reduced)
    if layout.overlap_param_gather:
        gathered = max(gathered - c.given.hidden_dp * forward, 0.05 * gathered)
    return reduced + gathered


def _optimizer(c: Costs) -> float:
    """Seconds a step: zeroing gradients, their norm, clipping, and Adam on this GPU's share."""
    layout = c.layout
    numel = max(sum(sum(b) for b in stage_parameters(c.model, layout, s)) for s in (0, layout.pipeline - 1))
    owned = numel / layout.data if layout.distributed_optimizer else numel
    return c.moved(4 * numel + (4 + 8 + 28 + layout.bytes) * owned)
