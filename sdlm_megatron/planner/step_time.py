"""Time of a step, item by item, from its arithmetic, the bytes it moves, and the planner's assumptions.

A step takes the time of the slowest pipeline stage's micro-batches, the pipeline bubble, and the work that comes once
per step: reduction of gradients, gathering of weights, optimizer. A micro-batch takes what is longer: its kernels on
the GPU, or the work of the host that launches them. The two cannot be evened out over more than a pass, because a GPU
queues only about a thousand launches.
"""

import math
from dataclasses import dataclass

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.planner.assumptions import Assumptions, Device
from sdlm_megatron.planner.memory import (
    RowTokens,
    adapter_parameters,
    head_rows,
    labeled,
    linear_weights,
    trained_parameters,
)
from sdlm_megatron.planner.parallel_layout import ParallelLayout, sizes_of
from sdlm_megatron.planner.workload import Workload
from sdlm_megatron.weights.names import adapted

NORMS_AGAIN = 0.08
"""Element-wise work that selective recomputation adds, as a share: two norms forward, not fused with linear layers."""
LAUNCHES = {"megatron": 79, "transformer_engine": 38}
"""Launches per layer and micro-batch, forward and backward, with attention in Triton kernels (4 of them).

Counted with the CUDA builds of torch and TransformerEngine on a machine whose GPU library does nothing: a rank of the
32B preset (32 layers, 6 micro-batches) makes 7,291 launches a step with TransformerEngine's layers, 15,163 with
Megatron-Core's, matrix products included (docs/benchmarks.md). Launches overlap with other kernels, the kernels' tails
do not.
"""

SPLIT_LAUNCHES = 145
"""Launches per layer and micro-batch in addition, of decomposed attention over a part of a row.

Counted in the same way: rank 63 of 64 makes 11,855 launches for 32 layers and 2 micro-batches (docs/long_context.md).
"""


ADAPTER_LAUNCHES = 10
"""The same of an adapter of a layer, net of the weight gradients that it saves: with adapters at all 4 fused layers, 16
layers of the 32B preset in 2 micro-batches make 2,865 instead of 1,734 launches, 64 layers in 4 make 20,763."""

ADAPTER_HOST = 0.17
"""Host time that an adapter of a layer adds, as a share of `host_ms`: 0.232 instead of 0.138 s of CPU in the first case
above, with 4 of them."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by item; all items are on the critical path."""

    gemm: float = labeled("matrix products of the layers")  # without recomputation
    attention: float = labeled("attention")
    head: float = labeled("LM head and cross entropy")
    elementwise: float = labeled("norms, RoPE, SwiGLU, residuals")
    weight_gradients: float = labeled("weight gradients of the layers")  # their sum over micro-batches
    recompute: float = labeled("recomputation")
    imbalance: float = labeled("attention of the rank with most visible pairs")  # what it has above the mean
    host: float = labeled("waiting for the host")
    tensor_communication: float = labeled("tensor-parallel communication")
    context_communication: float = labeled("keys and values of context parallelism")
    pipeline_bubble: float = labeled("pipeline bubble")
    pipeline_communication: float = labeled("pipeline communication")
    data_communication: float = labeled("data-parallel communication, not hidden")
    optimizer: float = labeled("optimizer")
    overhead: float = labeled("host work, waiting for the slowest GPU")

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Costs:
    """Inputs of the time model."""

    model: ModelConfig
    layout: ParallelLayout
    work: Workload
    device: Device
    assumed: Assumptions

    @property
    def row(self) -> RowTokens:
        return self.work.row

    @property
    def peak(self) -> float:
        """FLOP/s in the run's precision."""
        return self.device.peak if self.layout.train.precision == "bf16" else self.device.fp32_peak

    def products(self, flops: float, *, layers: bool = False) -> float:
        """Seconds of matrix products; those of `layers` may be in FP8, and in fp32 TransformerEngine's are in TF32."""
        train, speed = self.layout.train, self.peak * self.assumed.gemm_efficiency
        if layers and train.fp8 != "none":
            speed *= self.assumed.fp8_speedup
        if layers and train.precision == "fp32" and self.layout.kernels.name == "transformer_engine":
            speed = self.device.peak / 2 * self.assumed.gemm_efficiency
        return flops / speed

    def moved(self, count: float) -> float:
        """Seconds of element-wise kernels that move `count` bytes."""
        return count / (self.device.bandwidth * self.assumed.memory_efficiency)


def row_time(c: Costs) -> dict[str, float]:
    """Seconds of a stage's layers for one row, forward and backward, without recomputation and communication.

    Padding costs as much as tokens, except in attention.
    """
    layout, z, s = c.layout, sizes_of(c.model, c.layout.tensor), c.row.length
    layers = c.model.num_layers // layout.pipeline
    local = s / layout.tensor if layout.parallel.sequence else s
    # with adapters a linear layer computes no gradient of its weight
    trained = linear_weights(c.model, layout) if not layout.frozen else adapter_weights(c)
    flops = 6 * trained * s + (4 * linear_weights(c.model, layout) * s if layout.frozen else 0)
    overhead = launches(c) * c.assumed.kernel_overhead_us * 1e-6
    # 4 per pair forward and 10 backward, because a flash kernel recomputes the scores
    attention = 14 * z.attention * c.work.pairs * layers
    norms = 10 * local * z.hidden  # two norms (read, write) and two residual sums (two reads, a write)
    norms += 2 * s * z.normed_heads * z.head_dim
    rope = (2 if layout.kernels.fused_rope else 8) * s * (z.attention + z.kv)
    moved = 3 * (norms + rope + 3 * s * z.ffn) * layout.bytes * layers
    moved += adapter_traffic(c) * layout.bytes * layers
    # the sum is read and written; unfused, the gradient of the micro-batch is read again
    again = 0 if layout.kernels.fused_accumulation else layout.bytes
    summed = trained * (2 * layout.gradient_bytes + again)
    return {
        "gemm": c.products(flops, layers=True) + overhead * layers,
        "attention": attention / (c.peak * c.assumed.attention_efficiency),
        "elementwise": c.moved(moved),
        "weight_gradients": c.moved(summed),
    }


def adapter_weights(c: Costs) -> int:
    """Elements of A and B of all adapters on a stage."""
    layers = c.model.num_layers // c.layout.pipeline
    return layers * sum(map(sum, adapter_parameters(c.model, c.layout)))


def adapter_traffic(c: Costs) -> float:
    """Numbers that adapters move per row and layer beside their products: the layers' outputs, to which they add, are
    read and written twice, and the gradients of their inputs added (two reads, a write)."""
    s, total = c.row.length, 0.0
    local = s / c.layout.tensor if c.layout.parallel.sequence else s
    names, rank = adapted(c.layout.lora), c.layout.lora.rank
    for (name, kinds), (a, b) in zip(names.items(), adapter_parameters(c.model, c.layout), strict=True):
        column = name in ("self_attention.linear_qkv", "mlp.linear_fc1")
        inputs, outputs = (local, s) if column else (s, local)
        total += 3 * inputs * a / (rank * len(kinds)) + 4 * outputs * b / rank
    return total


def launches(c: Costs) -> float:
    """Kernel launches per layer and micro-batch, without recomputation."""
    adapters = ADAPTER_LAUNCHES * len(adapted(c.layout.lora))
    return c.assumed.launches or LAUNCHES[c.layout.kernels.name] + SPLIT_LAUNCHES * (c.layout.context > 1) + adapters


def host_time(c: Costs) -> float:
    """Seconds of host CPU per micro-batch on a stage."""
    layers = c.model.num_layers // c.layout.pipeline
    again = c.layout.recomputed_layers(layers // c.layout.virtual) * c.layout.virtual
    adapters = 1 + ADAPTER_HOST * len(adapted(c.layout.lora))
    return (layers + again / 3) * c.assumed.host_ms * adapters * 1e-3


def head_time(c: Costs) -> float:
    """Seconds of the head for one row: three products, about 20 bytes of memory traffic per logit, weight gradients."""
    z, rows = sizes_of(c.model, c.layout.tensor), c.row.label_rows
    chunks = math.ceil(rows / head_rows(z, c.layout, c.row))
    added = 2 + 2 * c.layout.gradient_bytes
    # Bytes per weight, beside its addition to the sum over micro-batches. One chunk: scaled in bf16 4. Several: made
    # fp32 6, 8 for each further chunk, scaled 8, made bf16 6.
    summed = added + (4 if chunks == 1 else 6 + 8 * (chunks - 1) + 14)
    if c.layout.frozen:  # logits and the gradient of the hidden states
        return c.products(4 * z.hidden * z.vocab * rows) + c.moved(20 * z.vocab * rows)
    if c.layout.pipeline == 1:  # the embedding's dense gradient: zeroed 2, added (6 to the head's, if tied)
        summed += 8 if c.model.tied_embeddings else 2 + added
    return c.products(6 * z.hidden * z.vocab * rows) + c.moved(20 * z.vocab * rows + summed * z.vocab * z.hidden)


def gpu_time(c: Costs) -> float:
    """Seconds of the kernels of a micro-batch with a full row on the slowest stage, the last."""
    return sum(_passes(c))


def _passes(c: Costs) -> tuple[float, float, float, float, float]:
    """Seconds of a row on a stage: layers, recomputation, TP and CP communication; and of the head."""
    layers = c.model.num_layers // (c.layout.pipeline * c.layout.virtual)
    share, part = c.layout.recomputed_layers(layers) / layers, row_time(c)
    forward = sum(part.values()) - part["weight_gradients"]
    again = share * forward / (2 if c.layout.frozen else 3)  # the forward pass's part, as in the FLOP count
    if c.layout.train.recompute == "selective":
        again = NORMS_AGAIN * part["elementwise"]
    return sum(part.values()), again, _tensor_communication(c, share), _context_communication(c, share), head_time(c)


def step_time(c: Costs, micro_batches: int, spread: float) -> StepTime:
    """Time of a step. `spread`: visible pairs of the rank with most, over the ranks' mean."""
    layout, assumed = c.layout, c.assumed
    part, (layers, again, tensor, context, head), host = row_time(c), _passes(c), host_time(c)
    per_row = layers + again + tensor + context
    slowest = per_row + head  # the last stage
    pipes = _pipeline_communication(c, micro_batches)
    # all stages wait for the head on the last one; the bubble is the time the first and last micro-batch travel
    travel = (layout.pipeline - 1) / layout.virtual
    longest = max(slowest, host)
    data = _data_communication(c, longest / 3, 2 * longest / 3)
    optimizer = _optimizer(c)
    items = {
        **{name: seconds * micro_batches for name, seconds in part.items()},
        "imbalance": part["attention"] * micro_batches * (spread - 1),
        "head": head * micro_batches,
        "recompute": again * micro_batches,
        "host": (longest - slowest) * micro_batches + max(0.0, host - per_row) * travel,
        "tensor_communication": tensor * micro_batches,
        "context_communication": context * micro_batches,
        "pipeline_bubble": travel * per_row,
        "pipeline_communication": pipes,
        "data_communication": data,
        "optimizer": optimizer,
    }
    whole = sum(items.values())
    return StepTime(**items, overhead=assumed.step_overhead_ms * 1e-3 + assumed.straggler * whole)


def _collective(c: Costs, count: float, members: int, speed: float) -> float:
    """Seconds of a ring all-gather or reduce-scatter; `count` is the total of bytes, not that of one member."""
    if members == 1:
        return 0.0
    return count * (members - 1) / members / speed + c.assumed.collective_latency_us * 1e-6


def _tensor_communication(c: Costs, recomputed: float) -> float:
    """Seconds per micro-batch and stage: two all-reduces per layer and direction, or gathers and scatters."""
    layout, tp = c.layout, c.layout.tensor
    if tp == 1:
        return 0.0
    layers, speed = c.model.num_layers // layout.pipeline, _group_speed(c, tp)
    half = _collective(c, c.row.length * c.model.hidden_size * layout.bytes, tp, speed)
    # Forward and backward pass have 2 all-reduces each = 4 halves. Sequence parallelism gathers two inputs again in the
    # backward pass, which overlaps with a matrix product. A recomputed layer repeats the 4 halves of its forward pass.
    halves = 4 * (2 + recomputed)
    z = sizes_of(c.model, tp)
    if c.model.num_query_groups < tp:  # the output of the QKV layer is gathered, and its gradient scattered
        whole = _collective(c, c.row.length * z.qkv * tp * layout.bytes, tp, speed)
        halves += (2 + recomputed) * whole / half
    hidden = c.assumed.hidden_tp if layout.parallel.overlap_tensor else 0.0
    return halves * half * layers * (1 - hidden)


def _context_communication(c: Costs, recomputed: float) -> float:
    """Seconds per micro-batch and stage: keys and values of all clean tokens are gathered in both passes of a layer,
    and once more where it is recomputed; their gradients are scattered in the backward pass."""
    layout, count = c.layout, c.layout.context
    if count == 1:
        return 0.0
    speed = _group_speed(c, count * layout.tensor, layout.tensor)  # TP comes first in the order of ranks
    transfer = _collective(c, 2 * c.row.gathered * sizes_of(c.model, layout.tensor).kv * layout.bytes, count, speed)
    return (3 + recomputed) * transfer * (c.model.num_layers // layout.pipeline)


def _group_speed(c: Costs, block: int, apart: int = 1) -> float:
    """Bytes/s per GPU in a ring of every `apart`-th GPU of consecutive blocks of `block` GPUs."""
    node = max(1, int(c.assumed.gpus_per_node))
    if c.layout.gpus <= node or node % block == 0:
        return c.device.nvlink
    return _network(c, math.gcd(block, node) / apart)


def _network(c: Costs, members_of_a_node: float) -> float:
    """Bytes/s per GPU in a ring that leaves the node: it uses the network ports of its members on the node."""
    return min(c.device.nvlink, c.assumed.network_gb * 1e9 * max(1.0, members_of_a_node))


def _pipeline_communication(c: Costs, micro_batches: int) -> float:
    """Seconds per step to send activations and gradients to neighboring stages."""
    layout = c.layout
    if layout.pipeline == 1:
        return 0.0
    count = c.row.length * c.model.hidden_size * layout.bytes / (layout.tensor if layout.parallel.sequence else 1)
    inside = layout.gpus <= c.assumed.gpus_per_node
    speed = c.device.nvlink if inside else c.assumed.network_gb * 1e9
    transfer = count / speed + c.assumed.collective_latency_us * 1e-6
    transfers = 2 * layout.virtual * (micro_batches + layout.pipeline - 1)
    # the interleaved schedule sends while it computes (overlap_p2p_comm), so most of it is hidden
    return transfers * transfer * (1 if layout.virtual == 1 else 0.3)


def _data_communication(c: Costs, forward: float, backward: float) -> float:
    """Seconds per step: reduction of gradients and gather of weights, minus what one micro-batch's pass hides."""
    layout, dp = c.layout, c.layout.replicas
    if dp == 1:
        return 0.0
    numel = _largest_stage(c)
    in_node = min(dp, c.assumed.gpus_per_node / min(layout.tensor, c.assumed.gpus_per_node))
    speed = c.device.nvlink if layout.gpus <= c.assumed.gpus_per_node else _network(c, in_node)
    reduced = _collective(c, layout.gradient_bytes * numel, dp, speed)
    if not layout.parallel.distributed_optimizer:
        reduced *= 2  # an all-reduce
    gathered = _collective(c, layout.bytes * numel, dp, speed) if layout.parallel.distributed_optimizer else 0.0
    # at least 5 % stays visible: the last bucket is ready only when the backward pass ends
    if layout.parallel.overlap_grad_reduce:
        reduced = max(reduced - c.assumed.hidden_dp * backward, 0.05 * reduced)
    if layout.parallel.overlap_param_gather:
        gathered = max(gathered - c.assumed.hidden_dp * forward, 0.05 * gathered)
    return reduced + gathered


def _optimizer(c: Costs) -> float:
    """Seconds per step: zeroing gradients; scaling, norm, clipping and Adam on this GPU's share."""
    layout, numel = c.layout, _largest_stage(c)
    owned = numel / layout.replicas if layout.parallel.distributed_optimizer else numel
    gradient = layout.gradient_bytes
    # bytes per element: division by the targets, a copy in fp32, norm 4, clipping 8, Adam 28 and the new weight
    copied = gradient + 4 if gradient < 4 else 0
    return c.moved(gradient * numel + (2 * gradient + copied + 4 + 8 + 28 + layout.bytes) * owned)


def _largest_stage(c: Costs) -> int:
    """Parameters on a GPU of the first or the last stage, whichever has more."""
    return max(sum(map(sum, trained_parameters(c.model, c.layout, s))) for s in (0, c.layout.pipeline - 1))
