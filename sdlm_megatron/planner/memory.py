"""Memory of one GPU, tensor by tensor, as allocated by model/, parallel/ and Megatron-Core 0.16 to 0.19.

Weights, gradients and optimizer follow from the shapes. Activations are the tensors that autograd keeps for the
backward pass, layer by layer, times the micro-batches in flight on a pipeline stage, plus the peak of one layer's
backward pass or of the head. Memory that the allocator and the CUDA libraries use beyond tensors is an assumption
(`reserve`) and not included.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.config.validate import token_multiple
from sdlm_megatron.diffusion.shard import shard_length
from sdlm_megatron.planner.parallel_layout import ParallelLayout, ShardSizes, sizes_of
from sdlm_megatron.weights.names import ADAPTED, adapted

LABEL_LOSS_BYTES = 8
"""Bytes per logit by which the head sizes its chunks (model/label_loss.py, which this room must not import)."""


@dataclass(frozen=True)
class RowTokens:
    """Tokens of a packed row, by kind."""

    length: int
    clean: float
    block: float
    response: float
    """Clean tokens that blocks are drawn from."""
    targets: float
    """Targets of blocks."""
    block_size: int
    next_token_targets: float = 0.0
    """Targets of clean tokens."""
    gathered: float = 0.0
    """Clean tokens of the whole row, whose keys and values a rank gathers where the others are those of its part."""

    @property
    def label_rows(self) -> float:
        """Tokens that pass through the head."""
        return self.targets + self.next_token_targets

    def part(self, layout: ParallelLayout) -> "RowTokens":
        """The share of a rank under context parallelism; without it, the row."""
        if layout.context == 1:
            return self
        multiple = token_multiple(layout.parallel, layout.train)
        names = ("clean", "block", "response", "targets", "next_token_targets")
        shares = {name: getattr(self, name) / layout.context for name in names}
        length = shard_length(self.length, self.block_size, layout.context, multiple)
        return replace(self, length=length, gathered=self.clean, **shares)


def labeled(label: str) -> float:
    """A field of a dataclass with its label in the planner's output."""
    return field(metadata={"label": label})


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU by item, and its pipeline stage."""

    stage: int
    weights: float = labeled("weights")
    gradients: float = labeled("gradients")  # buffers that are reduced over data parallelism
    optimizer: float = labeled("optimizer state")  # fp32 master weights and Adam's two moments
    activations: float = labeled("activations")  # kept for the backward pass, of all micro-batches in flight
    working: float = labeled("peak of a backward pass")  # on top: of a layer, the head without logits, or the update
    logits: float = labeled("logits")  # of a chunk with softmax and gradient, if the head is that peak
    buffers: float = labeled("buffers")  # gathered sequence (sequence parallelism) and FP8 copies of the weights

    @property
    def total(self) -> float:
        return sum(self.items().values())

    def items(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "stage"}


def adapter_parameters(model: ModelConfig, layout: ParallelLayout) -> list[tuple[int, int]]:
    """Elements of A and B of each adapter of a layer on one GPU (model/lora_layers.py)."""
    z, rank, h = sizes_of(model, layout.tensor), layout.lora.rank, model.hidden_size
    inputs = {"linear_proj": z.attention, "linear_fc2": z.ffn}
    rows = {"q_proj": z.attention, "o_proj": h, "down_proj": h, "gate_proj": z.ffn, "up_proj": z.ffn}
    result = []
    for name, kinds in adapted(layout.lora).items():
        whole_qkv = len(kinds) == 3  # split evenly, also where KV heads are fewer than TP ranks
        of_b = z.qkv if whole_qkv else sum(rows.get(kind, z.kv) for kind in kinds)
        result.append((len(kinds) * rank * inputs.get(name.split(".")[1], h), rank * of_b))
    return result


def trained_parameters(model: ModelConfig, layout: ParallelLayout, stage: int) -> list[list[int]]:
    """`stage_parameters` of those that are trained: with adapters these and the mask token's row of the embedding."""
    if not layout.frozen:
        return stage_parameters(model, layout, stage)
    layer = [size for pair in reversed(adapter_parameters(model, layout)) for size in reversed(pair)]
    chunks = [layer * (model.num_layers // (layout.pipeline * layout.virtual))] * layout.virtual
    first, last, row = stage == 0, stage == layout.pipeline - 1, [model.hidden_size]
    if model.tied_embeddings and layout.pipeline > 1:  # as the buckets of the tied embedding itself
        return [*chunks, *([row] if first or last else [])]
    return [*chunks[:-1], chunks[-1] + (row if first else [])]


def stage_parameters(model: ModelConfig, layout: ParallelLayout, stage: int) -> list[list[int]]:
    """Number of elements of each parameter of a stage, one list per bucket of the gradient buffer, last layer first."""
    z, h = sizes_of(model, layout.tensor), model.hidden_size
    biases, head_norms = [z.qkv] * model.qkv_bias, [z.head_dim] * 2 * model.qk_norm
    layer = [h, z.attention * h, z.qkv * h, *biases, *head_norms, h, 2 * z.ffn * h, h * z.ffn]
    chunk = layer * (model.num_layers // (layout.pipeline * layout.virtual))
    first, last = stage == 0, stage == layout.pipeline - 1
    table = z.vocab * h
    copies = ([table] if first else []) + ([table] if last and not (first and model.tied_embeddings) else [])
    chunks = [chunk] * (layout.virtual - 1) + [chunk + ([h] if last else [])]
    if model.tied_embeddings and layout.pipeline > 1:  # Megatron-Core gives shared embeddings buckets of their own
        return [*chunks, *([x] for x in copies)]
    return [*chunks[:-1], chunks[-1] + copies]


def linear_weights(model: ModelConfig, layout: ParallelLayout) -> int:
    """Weights of the linear layers on one GPU, without embedding and head."""
    z = sizes_of(model, layout.tensor)
    return (z.attention + z.qkv + 3 * z.ffn) * z.hidden * (model.num_layers // layout.pipeline)


def stage_memory(
    model: ModelConfig, layout: ParallelLayout, row: RowTokens, micro_batches: int, stage: int
) -> GpuMemory:
    """Peak memory of tensors in a step of whole rows like `row`, on a GPU of this stage."""
    row = row.part(layout)
    buckets = trained_parameters(model, layout, stage)
    numel = sum(sum(b) for b in buckets)
    frozen = sum(map(sum, stage_parameters(model, layout, stage))) if layout.frozen else 0
    b, dp, sharded = layout.bytes, layout.replicas, layout.parallel.distributed_optimizer
    padded = [_padded(bucket, dp) for bucket in buckets] if sharded else []
    buffer = sum(padded) or numel
    states = (2 if layout.train.precision == "fp32" else 3) * 4  # fp32 weights are their own masters
    owned = min(numel, buffer / dp) if sharded else numel
    kept, working, logits = _activations(model, layout, row, micro_batches, stage)
    if layout.gradient_bytes < 4:  # the update reads them in fp32, when the activations are gone
        working += max(0.0, 4 * owned - kept - working - logits)
    gathered = row.length * model.hidden_size * b if layout.parallel.sequence else 0
    # FP8 keeps each weight and its transpose, one byte each
    fp8 = 2 * linear_weights(model, layout) if layout.train.fp8 != "none" else 0
    gradients = buffer * layout.gradient_bytes
    return GpuMemory(stage, (buffer + frozen) * b, gradients, owned * states, kept, working, logits, gathered + fp8)


def peak_memory(model: ModelConfig, layout: ParallelLayout, row: RowTokens, micro_batches: int) -> GpuMemory:
    """Memory of the stage that needs most."""
    # a stage between first and last never needs more than the second: it has fewer micro-batches in flight
    stages = {0, min(1, layout.pipeline - 1), layout.pipeline - 1}
    return max((stage_memory(model, layout, row, micro_batches, s) for s in sorted(stages)), key=lambda m: m.total)


def _padded(bucket: list[int], dp: int) -> int:
    """Elements of a bucket of the distributed optimizer."""
    # Megatron-Core starts each parameter at a multiple of 64 and makes the end divisible by DP and by 128
    end = sum(-(-n // 64) * 64 for n in bucket[:-1]) + bucket[-1]
    multiple = math.lcm(dp, 128)
    return -(-end // multiple) * multiple


def in_flight(layout: ParallelLayout, micro_batches: int, stage: int) -> int:
    """Forward passes of one model chunk whose activations a stage keeps at the same time."""
    pp, vp = layout.pipeline, layout.virtual
    if pp == 1:
        return 1
    if vp == 1:
        return min(micro_batches, pp - stage)  # 1F1B
    warm_up = 2 * (pp - stage - 1) + (vp - 1) * pp
    return min(micro_batches * vp, warm_up + 1)


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that a layer keeps for its backward pass, by part."""

    norms: float
    attention: float
    mlp: float
    recomputed: float
    """Part of `norms` that selective recomputation frees."""

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.mlp


def _local_tokens(layout: ParallelLayout, row: RowTokens) -> float:
    """Tokens of a row on one GPU outside of attention and MLP."""
    return row.length / layout.tensor if layout.parallel.sequence else row.length


def layer_memory(z: ShardSizes, layout: ParallelLayout, row: RowTokens) -> LayerMemory:
    """Tensors that autograd keeps of one layer and micro-batch."""
    k, b, s = layout.kernels, layout.bytes, row.length
    local = _local_tokens(layout, row)
    # in FP8 a linear layer keeps its input quantized: instead of the norm's and SwiGLU's output, beside the attention's
    fp8 = layout.train.fp8 != "none"
    linear_input = 1 if fp8 else b
    # a frozen layer keeps no input, unless its adapter does, in the weights' dtype
    names = adapted(layout.lora)
    kept = {name: b * (name in names) if layout.frozen else linear_input for name in ADAPTED}
    # per norm: its input, which is a tensor of its own (the residual stream is not updated in place), and its output
    kept_by_norm = b if k.fused_norm else (12 if layout.train.precision == "fp32" else 10) - b - 4 * layout.frozen
    outputs = kept["self_attention.linear_qkv"] + kept["mlp.linear_fc1"]
    norms = local * ((2 * kept_by_norm + outputs) * z.hidden + 8)
    again = norms - 2 * local * b * z.hidden if layout.train.recompute == "selective" else 0
    rope = 0 if k.fused_rope else 4 * s * z.head_dim * b
    attention = s * b * (2 * z.attention + 2 * z.kv) + 4 * s * z.heads + rope  # q, k, v, output, log-sum-exp
    attention += s * z.attention if fp8 else 0
    kept_by_head_norm = b if k.fused_norm else (12 if layout.train.precision == "fp32" else 8)
    attention += s * z.normed_heads * (kept_by_head_norm * z.head_dim + 4)
    mlp = s * ((2 if k.fused_swiglu else 4) * b + kept["mlp.linear_fc2"]) * z.ffn
    return LayerMemory(norms, attention + adapter_memory(z, layout, row), mlp, again)


def adapter_memory(z: ShardSizes, layout: ParallelLayout, row: RowTokens) -> float:
    """Bytes that a layer's adapters keep: A x of each token, and B of q, k, v and of gate, up as it is multiplied."""
    total, rank = 0.0, layout.lora.rank
    for name, kinds in adapted(layout.lora).items():
        column = name in ("self_attention.linear_qkv", "mlp.linear_fc1")
        total += len(kinds) * rank * (row.length if column else _local_tokens(layout, row))
        if column:
            total += len(kinds) * rank * (z.qkv if name.endswith("qkv") else 2 * z.ffn)
    return total * layout.bytes


def backward_peak(z: ShardSizes, layout: ParallelLayout, row: RowTokens) -> float:
    """Peak bytes during a layer's backward pass, including the tensors it kept, which are freed one after another."""
    kept, b, s, h = layer_memory(z, layout, row), layout.bytes, row.length, z.hidden
    k, local = layout.kernels, _local_tokens(layout, row)
    weight = 0 if k.fused_accumulation or layout.frozen else b
    whole = s * h * b if layout.parallel.sequence else 0  # gathered gradient of the output
    residual = local * h * b
    one_norm, ffn = kept.norms / 2, s * b * z.ffn
    blocks = row.block * z.attention
    prefix = row.response * row.block_size * z.attention  # queries of part (2) of model/attention/decomposed.py
    attention_work = b * (s * (z.attention + 2 * z.kv) + 3 * blocks + 4 * prefix) + 16 * blocks
    # keys and values of the whole row: as they arrive and in order, the gradients of a part, and their sums in fp32
    attention_work += row.gathered * 2 * z.kv * (3 * b + 4)
    freed = 0 if layout.frozen and "down_proj" not in layout.lora.targets else ffn
    moments = {
        "second matrix": kept.total + residual + whole + ffn + weight * z.ffn * h,
        "SwiGLU": kept.total - freed + residual + 3 * ffn,
        "first matrix": kept.norms + kept.attention + residual + 2 * ffn + s * h * b + weight * 2 * z.ffn * h,
        "attention": one_norm + kept.attention + residual + s * b * z.attention + attention_work,
    }
    return max(moments.values())


def _activations(
    model: ModelConfig, layout: ParallelLayout, row: RowTokens, micro_batches: int, stage: int
) -> tuple[float, float, float]:
    """Bytes kept for the backward pass; bytes on top at the peak, without logits; logits at the peak."""
    z, b, h = sizes_of(model, layout.tensor), layout.bytes, model.hidden_size
    local = _local_tokens(layout, row)
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = model.num_layers // (layout.pipeline * layout.virtual)
    layer = layer_memory(z, layout, row)
    again = layout.recomputed_layers(layers)
    chunk = again * local * h * b + (layers - again) * (layer.total - layer.recomputed)
    chunk += 4 * row.length * z.head_dim  # RoPE angles
    if not last:
        chunk += local * h * b  # the output stays until its gradient arrives from the next stage
    kept = in_flight(layout, micro_batches, stage) * chunk
    # candidates for the peak: backward pass of a chunk's last layer, or of the last layer that is recomputed
    final_norm = local * h * ((b if layout.kernels.fused_norm else 8) + b) if last else 0
    table = z.vocab * h
    # the head's gradient of the shared table
    waiting = table * b if first and last and model.tied_embeddings and not layout.frozen else 0
    body = backward_peak(z, layout, row)
    # with all layers recomputed, the layer's input is counted twice, but its recomputed output exists as well
    moment = body if again == layers else body - (layer.total - layer.recomputed)
    candidates = [(moment + waiting, 0.0)]
    if first and not layout.frozen:  # the embedding's gradient comes after the micro-batch's layers have been freed
        candidates.append((table * b * (3 if waiting else 1) - chunk, 0.0))
    if last:
        candidates += _head(model, z, layout, row, final_norm)
    working, logits = max(candidates, key=sum)
    return kept, working, logits


def _head(
    model: ModelConfig, z: ShardSizes, layout: ParallelLayout, row: RowTokens, final_norm: float
) -> Iterator[tuple[float, float]]:
    """Peaks of the head (model/label_loss.py), without and of logits: its last chunk, and its backward pass."""
    b, n, h, k = layout.bytes, row.label_rows, z.hidden, layout.kernels
    rows, table = head_rows(z, layout, row), z.vocab * h
    chunks = math.ceil(n / rows)
    weight = 0 if layout.frozen else table * (4 if chunks > 1 else b)
    part = table * b if chunks > 1 and b < 4 and weight else 0  # product of one chunk, before it is added in fp32
    # output of the last norm, gathered
    hidden = row.length * h * b * (1 / layout.tensor + 1 if layout.parallel.sequence else 1)
    # without a sum of weight gradients the softmax is the peak, which first converts a bf16 chunk to fp32
    per_logit = k.logit_bytes + (4 if layout.frozen and k.fused_norm else 0)
    yield (
        final_norm + hidden + 2 * n * h * b + weight + part,
        rows * z.vocab * (per_logit if b < 4 else k.logit_fp32),
    )
    padding = weight if z.vocab * layout.tensor > model.vocab_size else 0
    yield final_norm + n * h * b + weight + max(padding, part), 0.0


def head_rows(z: ShardSizes, layout: ParallelLayout, row: RowTokens) -> float:
    """Label rows per chunk of the head."""
    return min(row.label_rows, max(1, int(layout.train.logits_mb * 1e6) // (LABEL_LOSS_BYTES * z.vocab)))
