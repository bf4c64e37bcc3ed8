"""A layout: how the model and a step are spread over the GPUs, and the sizes one GPU then holds."""

from dataclasses import dataclass, replace

from sdlm_megatron.config.schema import ModelConfig, RunConfig
from sdlm_megatron.data.order import micro_batches
from sdlm_megatron.weights.vocabulary import padded_vocab

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Kernels:
    """What decides which tensors a layer keeps for the backward pass."""

    name: str
    fused_norm: bool
    """The norm keeps its input and one number a row; otherwise (torch's RMSNorm on a CPU) fp32 copies too."""
    fused_swiglu: bool
    """SwiGLU keeps its input only; otherwise every step of it."""
    fused_rope: bool
    """RoPE keeps nothing; otherwise a cosine and a sine in the weights' type, for queries and for keys."""
    fused_accumulation: bool
    """Weight gradients are added to the fp32 buffer by the matrix product itself."""
    logit_bytes: int
    """What the head allocates for a logit of a chunk, in bf16."""
    logit_fp32: int
    """The same in fp32."""


CPU = Kernels("megatron", False, False, False, False, 3, 4)
"""Megatron-Core's own layers as they run on a CPU: what the tests measure. The head there has a few rows at a time in
fp32, on a GPU all rows of a chunk."""
MEGATRON = Kernels("megatron", True, True, False, False, 6, 8)
TRANSFORMER_ENGINE = Kernels("transformer_engine", True, True, True, True, 6, 8)
ON_GPU = {k.name: k for k in (MEGATRON, TRANSFORMER_ENGINE)}


@dataclass(frozen=True)
class Layout:
    """Everything of a run that decides memory and time, apart from the rows."""

    gpus: int
    tensor: int
    pipeline: int
    virtual: int
    sequence: bool
    distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    overlap_tensor: bool
    recompute: str
    recompute_layers: int
    """With recompute full: layers of each model chunk, all of them if 0."""
    kernels: Kernels
    precision: str
    fp8: str
    logits_mb: float

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def bytes(self) -> int:
        """Of a weight or activation."""
        return BYTES[self.precision]

    def micro_batches(self, rows: int) -> int:
        """Of a data-parallel rank for a step of `rows` rows; the interleaved schedule takes them in turns of PP."""
        multiple = self.pipeline if self.virtual > 1 else 1
        return micro_batches(rows, self.data, multiple)

    def with_recompute(self, kind: str, layers: int = 0) -> "Layout":
        return replace(self, recompute=kind, recompute_layers=layers)

    def settings(self) -> dict[str, object]:
        """The settings of a run with this layout."""
        return {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.virtual_pipeline": self.virtual,
            "parallel.sequence": self.sequence,
            "parallel.distributed_optimizer": self.distributed_optimizer,
            "parallel.overlap_grad_reduce": self.overlap_grad_reduce,
            "parallel.overlap_param_gather": self.overlap_param_gather,
            "parallel.overlap_tensor": self.overlap_tensor,
            "train.layers": self.kernels.name,
            "train.fp8": self.fp8,
            "train.recompute": self.recompute,
            "train.recompute_layers": self.recompute_layers,
        }


def layout_of(config: RunConfig, gpus: int, kernels: Kernels | None = None) -> Layout:
    """The layout of a configuration on so many GPUs; `train.layers=auto` means TransformerEngine, as on a GPU."""
    parallel, train = config.parallel, config.train
    name = "transformer_engine" if train.layers == "auto" else train.layers
    return Layout(
        gpus=gpus,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        sequence=parallel.sequence,
        distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        overlap_tensor=parallel.overlap_tensor,
        recompute=train.recompute,
        recompute_layers=train.recompute_layers,
        kernels=kernels or ON_GPU[name],
        precision=train.precision,
        fp8=train.fp8,
        logits_mb=train.logits_mb,
    )


@dataclass(frozen=True)
class Sizes:
    """Sizes on one GPU, in elements."""

    hidden: int
    attention: int
    """Query heads times their dimension."""
    kv: int
    """KV heads times their dimension; at least one head."""
    heads: int
    head_dim: int
    ffn: int
    vocab: int
    """Rows of embedding and head, padding included."""
    qkv: int
    """Rows of the QKV weight: a share of q, k and v, also where KV heads are fewer than TP (then the product is
    gathered, and every GPU takes the KV head it needs)."""


def sizes_of(model: ModelConfig, tensor: int) -> Sizes:
    """Sizes of a model that is split over `tensor` GPUs."""
    dim = model.head_dim or model.hidden_size // model.num_attention_heads
    return Sizes(
        hidden=model.hidden_size,
        attention=model.num_attention_heads * dim // tensor,
        kv=max(1, model.num_query_groups // tensor) * dim,
        heads=model.num_attention_heads // tensor,
        head_dim=dim,
        ffn=model.ffn_hidden_size // tensor,
        vocab=padded_vocab(model.vocab_size, tensor) // tensor,
        qkv=(model.num_attention_heads + 2 * model.num_query_groups) * dim // tensor,
    )
