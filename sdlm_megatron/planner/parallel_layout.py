"""Parallel layout of a run: how model and step are spread over the GPUs, and the sizes on one GPU."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sdlm_megatron.config.schema import LoraConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from sdlm_megatron.weights.names import padded_vocab

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Kernels:
    """Properties of a kind of layers that decide which tensors it keeps for the backward pass."""

    name: str
    """As in train.layers."""
    fused_norm: bool
    """The norm keeps its input and one number per token; torch's RMSNorm on a CPU also keeps fp32 copies."""
    fused_swiglu: bool
    """SwiGLU keeps only its input; otherwise every intermediate."""
    fused_rope: bool
    """RoPE keeps nothing; otherwise cosines and sines in the weights' dtype, for queries and for keys."""
    fused_accumulation: bool
    """The matrix product adds weight gradients to their buffer; otherwise they are separate tensors first."""
    logit_bytes: int
    """Bytes that the head allocates per logit of a chunk, in bf16."""
    logit_fp32: int
    """The same in fp32."""


# Megatron-Core's own layers on a CPU, which is what the tests can measure. There the head processes a few rows at a
# time in fp32, on a GPU all rows of a chunk.
CPU = Kernels("megatron", False, False, False, False, 3, 4)
MEGATRON = Kernels("megatron", True, True, False, False, 6, 8)
TRANSFORMER_ENGINE = Kernels("transformer_engine", True, True, True, True, 6, 8)
ON_GPU = {k.name: k for k in (MEGATRON, TRANSFORMER_ENGINE)}


@dataclass(frozen=True)
class ParallelLayout:
    """Number of GPUs and the settings of a run that decide memory and time per row."""

    gpus: int
    parallel: ParallelConfig
    train: TrainConfig
    kernels: Kernels
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def frozen(self) -> bool:
        """Whether adapters are trained and the base's weights are not."""
        return self.lora.rank > 0

    @property
    def tensor(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return self.parallel.pipeline

    @property
    def virtual(self) -> int:
        """Model chunks per stage."""
        return self.parallel.virtual_pipeline

    @property
    def context(self) -> int:
        """Ranks that share a row."""
        return self.parallel.context

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.gpus // self.parallel.model_size

    @property
    def replicas(self) -> int:
        """GPUs with the same weights, over which gradients are reduced and the distributed optimizer is sharded."""
        return self.data * self.context

    @property
    def bytes(self) -> int:
        """Bytes of a weight or activation."""
        return BYTES[self.train.precision]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient in the buffers that are summed over micro-batches and data parallelism."""
        return BYTES[self.train.gradient_dtype]

    def recomputed_layers(self, layers: int) -> int:
        """Layers of a model chunk of `layers` layers that full recomputation runs again."""
        if self.train.recompute != "full":
            return 0
        return min(self.train.recompute_layers or layers, layers)

    def change(self, **settings: Any) -> "ParallelLayout":
        """A copy with other settings, by their names in the sections `parallel` and `train`."""
        of_parallel = {key: value for key, value in settings.items() if hasattr(self.parallel, key)}
        of_train = {key: value for key, value in settings.items() if key not in of_parallel}
        return replace(self, parallel=replace(self.parallel, **of_parallel), train=replace(self.train, **of_train))

    def with_recompute(self, kind: str, layers: int = 0) -> "ParallelLayout":
        """A copy with other recomputation."""
        return self.change(recompute=kind, recompute_layers=layers)

    def settings(self) -> dict[str, object]:
        """Settings of a run with this layout."""
        train = {"layers": self.kernels.name}
        keys = ("gradient_dtype", "fp8", "micro_batches", "recompute", "recompute_layers")
        train |= {key: getattr(self.train, key) for key in keys}
        return {f"parallel.{key}": value for key, value in asdict(self.parallel).items()} | {
            f"train.{key}": value for key, value in train.items()
        }


def layout_of(config: RunConfig, gpus: int, kernels: Kernels | None = None) -> ParallelLayout:
    """The layout of a configuration; `train.layers=auto` means, as on a GPU, TransformerEngine in bf16."""
    usual = "transformer_engine" if config.train.precision == "bf16" else "megatron"
    name = usual if config.train.layers == "auto" else config.train.layers
    return ParallelLayout(gpus, config.parallel, config.train, kernels or ON_GPU[name], config.lora)


@dataclass(frozen=True)
class ShardSizes:
    """Sizes of a model's tensors on one GPU, in elements."""

    hidden: int
    attention: int
    """Query heads times their dimension."""
    kv: int
    """KV heads times their dimension; at least one head."""
    heads: int
    head_dim: int
    normed_heads: int
    """Query and KV heads with a norm of their own (model.qk_norm)."""
    ffn: int
    vocab: int
    """Rows of embedding and head, with padding."""
    qkv: int
    """Rows of the QKV weight. It is divided evenly even where KV heads are fewer than TP ranks: then its output is
    gathered, and each rank takes the KV head it needs."""


def sizes_of(model: ModelConfig, tensor: int) -> ShardSizes:
    """Sizes of a model that is split over `tensor` GPUs."""
    dim = model.head_size
    return ShardSizes(
        hidden=model.hidden_size,
        attention=model.num_attention_heads * dim // tensor,
        kv=max(1, model.num_query_groups // tensor) * dim,
        heads=model.num_attention_heads // tensor,
        head_dim=dim,
        normed_heads=model.qk_norm * (model.num_attention_heads // tensor + max(1, model.num_query_groups // tensor)),
        ffn=model.ffn_hidden_size // tensor,
        vocab=padded_vocab(model.vocab_size, tensor) // tensor,
        qkv=(model.num_attention_heads + 2 * model.num_query_groups) * dim // tensor,
    )
