"""Memory of one GPU: what the code of model/ and parallel/ and Megatron-Core 0.16 to 0.19 allocate, tensor by tensor.

Weights, gradients and optimizer follow from the shapes. Activations are what autograd keeps for the backward pass,
layer by layer, times the micro-batches that a pipeline stage has in flight, plus the largest moment of one layer's
backward pass or of the head. The sum is what tensors hold; what the allocator and the CUDA libraries take on top is
an assumption (`reserve`), not part of this.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.planner.parallel_layout import Layout, Sizes, sizes_of

LABEL_LOSS_BYTES = 8
"""What a logit of a chunk costs with everything made from it, by which the head cuts its chunks."""


@dataclass(frozen=True)
class Row:
    """A packed row, in tokens."""

    length: int
    clean: float
    block: float
    response: float
    """Tokens that the blocks are drawn from."""
    targets: float
    """Of blocks."""
    block_size: int
    next_token_targets: float = 0.0
    """Of clean tokens."""

    @property
    def label_rows(self) -> float:
        """Tokens that go through the head."""
        return self.targets + self.next_token_targets


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    stage: int
    """Pipeline stage it belongs to."""
    weights: float
    gradients: float
    """fp32, in the buffers that are reduced over data parallelism."""
    optimizer: float
    """fp32 master weights and Adam's two moments."""
    activations: float
    """Kept for the backward pass, of all micro-batches in flight."""
    working: float
    """The largest moment on top: one layer's backward pass, or the head."""
    logits: float
    """One chunk's logits, their softmax and gradient, if the head is that moment."""
    buffers: float
    """Gathered sequence (sequence parallelism), FP8 copies of the weights."""

    @property
    def total(self) -> float:
        return sum(self.items().values())

    def items(self) -> dict[str, float]:
        names = ("weights", "gradients", "optimizer", "activations", "working", "logits", "buffers")
        return {name: getattr(self, name) for name in names}


def stage_parameters(model: ModelConfig, layout: Layout, stage: int) -> list[list[int]]:
    """Elements of each parameter of a stage, one list a buffer bucket; the order is the model's, backwards."""
    z, h = sizes_of(model, layout.tensor), model.hidden_size
    layer = [h, z.attention * h, z.qkv * h, *([z.qkv] if model.qkv_bias else []), h, 2 * z.ffn * h, h * z.ffn]
    chunk = layer * (model.num_layers // (layout.pipeline * layout.virtual))
    first, last = stage == 0, stage == layout.pipeline - 1
    table = z.vocab * h
    copies = ([table] if first else []) + ([table] if last and not (first and model.tied_embeddings) else [])
    chunks = [chunk] * (layout.virtual - 1) + [chunk + ([h] if last else [])]
    if model.tied_embeddings and layout.pipeline > 1:  # the copies of a shared embedding are buckets of their own
        return [*chunks, *([x] for x in copies)]
    return [*chunks[:-1], chunks[-1] + copies]


def linear_weights(model: ModelConfig, layout: Layout) -> int:
    """Weights of the linear layers on one GPU, without embedding and head."""
    z = sizes_of(model, layout.tensor)
    return (z.attention + z.qkv + 3 * z.ffn) * z.hidden * (model.num_layers // layout.pipeline)


def stage_memory(model: ModelConfig, layout: Layout, row: Row, micro_batches: int, stage: int) -> Memory:
    """Peak of a step on a GPU of this stage, apart from what the allocator adds."""
    buckets = stage_parameters(model, layout, stage)
    numel = sum(sum(b) for b in buckets)
    b, dp = layout.bytes, layout.data
    padded = [_padded(bucket, dp) for bucket in buckets] if layout.distributed_optimizer else []
    held = sum(padded) or numel
    states = (2 if layout.precision == "fp32" else 3) * 4
    owned = min(numel, held / dp) if layout.distributed_optimizer else numel
    kept, working, logits = _activations(model, layout, row, micro_batches, stage)
    gathered = row.length * model.hidden_size * b if layout.sequence else 0
    fp8 = 2 * linear_weights(model, layout) if layout.fp8 != "none" else 0  # as they are and transposed, a byte each
    return Memory(stage, held * b, held * 4, owned * states, kept, working, logits, gathered + fp8)


def peak_memory(model: ModelConfig, layout: Layout, row: Row, micro_batches: int) -> Memory:
    """The stage that needs most. The stages between first and last never need more than the first two or the last."""
    stages = {0, min(1, layout.pipeline - 1), layout.pipeline - 1}
    found = (stage_memory(model, layout, row, micro_batches, s) for s in sorted(stages))
    return max(found, key=lambda m: m.total)


def _padded(bucket: list[int], dp: int) -> int:
    """Elements of a bucket of the distributed optimizer: parameters start at multiples of 64, its end splits evenly."""
    end = sum(-(-n // 64) * 64 for n in bucket[:-1]) + bucket[-1]
    multiple = math.lcm(dp, 128)
    return -(-end // multiple) * multiple


def in_flight(layout: Layout, micro_batches: int, stage: int) -> int:
    """Forward passes of a model chunk whose activations a stage holds at once."""
    pp, vp = layout.pipeline, layout.virtual
    if pp == 1:
        return 1
    if vp == 1:
        return min(micro_batches, pp - stage)
    warm_up = 2 * (pp - stage - 1) + (vp - 1) * pp
    return min(micro_batches * vp, warm_up + 1)


@dataclass(frozen=True)
class LayerMemory:
    """Bytes a layer keeps for its backward pass, by part."""

    norms: float
    attention: float
    mlp: float
    recomputed: float
    """Part of `norms` that selective recompute makes again."""

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.mlp


def layer_memory(z: Sizes, layout: Layout, row: Row) -> LayerMemory:
    """What autograd keeps of one layer and micro-batch."""
    k, b, s = layout.kernels, layout.bytes, row.length
    local = s / layout.tensor if layout.sequence else s
    # a norm: its input (the residual stream, in which every norm's input is a tensor of its own) and its output
    kept_by_norm = 2 * b if k.fused_norm else (12 if layout.precision == "fp32" else 10)
    norms = 2 * local * (kept_by_norm * z.hidden + 4)
    again = norms - 2 * local * b * z.hidden if layout.recompute == "selective" else 0
    rope = 0 if k.fused_rope else 4 * s * z.head_dim * b
    attention = s * b * (2 * z.attention + 2 * z.kv) + 4 * s * z.heads + rope  # q, k, v, output, log-sum-exp
    mlp = s * b * (3 if k.fused_swiglu else 5) * z.ffn
    return LayerMemory(norms, attention, mlp, again)


def backward_peak(z: Sizes, layout: Layout, row: Row) -> float:
    """Most bytes while a layer runs backward, with all that it kept; its parts are freed one after the other."""
    kept, b, s, h = layer_memory(z, layout, row), layout.bytes, row.length, z.hidden
    k, local = layout.kernels, s / layout.tensor if layout.sequence else s
    weight = 0 if k.fused_accumulation else b
    whole = s * h * b if layout.sequence else 0  # the output's gradient, gathered
    residual = local * h * b
    one_norm, ffn = kept.norms / 2, s * b * z.ffn
    blocks = row.block * z.attention
    prefix = row.response * row.block_size * z.attention  # queries of attention_decomposed's second part
    attention_work = b * (s * (z.attention + 2 * z.kv) + 3 * blocks + 4 * prefix) + 16 * blocks
    moments = {
        "second matrix": kept.total + residual + whole + ffn + weight * z.ffn * h,
        "SwiGLU": kept.total - ffn + residual + 3 * ffn,
        "first matrix": kept.norms + kept.attention + residual + 2 * ffn + s * h * b + weight * 2 * z.ffn * h,
        "attention": one_norm + kept.attention + residual + s * b * z.attention + attention_work,
    }
    return max(moments.values())


def _activations(
    model: ModelConfig, layout: Layout, row: Row, micro_batches: int, stage: int
) -> tuple[float, float, float]:
    """Bytes kept, and on top of that at the largest moment: all but the logits, and logits."""
    z, b, s, h = sizes_of(model, layout.tensor), layout.bytes, row.length, model.hidden_size
    local = s / layout.tensor if layout.sequence else s
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = model.num_layers // (layout.pipeline * layout.virtual)
    layer = layer_memory(z, layout, row)
    again = (layout.recompute_layers or layers) if layout.recompute == "full" else 0
    again = min(again, layers)
    chunk = again * local * h * b + (layers - again) * (layer.total - layer.recomputed)
    chunk += 4 * s * z.head_dim  # the angles of RoPE
    if not last:
        chunk += local * h * b  # the output that was sent on is kept until its gradient arrives
    flying = in_flight(layout, micro_batches, stage)
    kept = flying * chunk
    # moments: the backward pass of the last layer of a chunk, or of the last one that is run again
    final_norm = local * h * ((b if layout.kernels.fused_norm else 8) + b) if last else 0
    table = z.vocab * h
    waiting = table * b if first and last and model.tied_embeddings else 0  # the head's part of the shared gradient
    body = backward_peak(z, layout, row)
    # where all layers run again, the layer's input is counted twice, but its output is made again and held meanwhile
    moment = body if again == layers else body - (layer.total - layer.recomputed)
    candidates = [(moment + waiting, 0.0)]
    if first:  # the embedding's gradient comes when the layers of one micro-batch are done
        candidates.append((table * b * (3 if waiting else 1) - chunk, 0.0))
    if last:
        candidates += _head(model, z, layout, row, final_norm)
    working, logits = max(candidates, key=sum)
    return kept, working, logits


def _head(model: ModelConfig, z: Sizes, layout: Layout, row: Row, final_norm: float) -> Iterator[tuple[float, float]]:
    """Moments of the head (model/label_loss.py): its last chunk, and its backward pass."""
    b, n, h, k = layout.bytes, row.label_rows, z.hidden, layout.kernels
    rows, table = head_rows(z, layout, row), z.vocab * h
    chunks = math.ceil(n / rows)
    weight = table * (4 if chunks > 1 else b)
    part = table * b if chunks > 1 and b < 4 else 0  # one chunk's product, before it is added in fp32
    hidden = row.length * h * b * (1 / layout.tensor + 1 if layout.sequence else 1)  # the last norm's output, gathered
    yield (
        final_norm + hidden + 2 * n * h * b + weight + part,
        rows * z.vocab * (k.logit_bytes if b < 4 else k.logit_fp32),
    )
    padding = weight if z.vocab * layout.tensor > model.vocab_size else 0
    yield final_norm + n * h * b + weight + max(padding, part), 0.0


def head_rows(z: Sizes, layout: Layout, row: Row) -> float:
    """Label rows of a chunk."""
    return min(row.label_rows, max(1, int(layout.logits_mb * 1e6) // (LABEL_LOSS_BYTES * z.vocab)))
