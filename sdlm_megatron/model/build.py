"""From a shape to a Megatron-Core model on this process."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from sdlm_megatron.config.schema import ModelConfig, ParallelConfig, TrainConfig
from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.core_attention import SDLMCoreAttention
from sdlm_megatron.model.gpt import SDLMModel
from sdlm_megatron.model.layers import TRANSFORMER_ENGINE, Layers
from sdlm_megatron.weights.names import partition_dim
from sdlm_megatron.weights.vocabulary import padded_vocab


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark Megatron-Core needs to sum its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def transformer_config(
    shape: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    layers: Layers,
    *,
    dtype: torch.dtype,
    initialize: bool,
) -> TransformerConfig:
    """Megatron-Core's configuration of a Qwen2.5 / Llama shape."""
    cuda = torch.cuda.is_available()
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim or shape.hidden_size // shape.num_attention_heads,
        layernorm_epsilon=shape.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        # between two stages the interleaved schedule sends both ways at once, which one batched call cannot keep apart
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=parallel.sequence,
        **_recompute(train),
        calculate_per_token_loss=True,
        use_cpu_initialization=not cuda,
        perform_initialization=initialize,
        init_method_std=0.02,
        gradient_accumulation_fusion=fuses_gradient_accumulation(),
        batch_p2p_sync=False,  # a guard for old versions of torch: the host would wait at every hand-over of a stage
        **layers.arguments,
    )


def _recompute(train: TrainConfig) -> dict[str, Any]:
    """What the backward pass computes again, in Megatron-Core's terms."""
    if train.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    if train.recompute == "full" and train.recompute_layers:
        return {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": train.recompute_layers,
        }
    if train.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def fuses_gradient_accumulation() -> bool:
    """Whether Megatron-Core's linear layers can add a weight's gradient straight into the fp32 gradient buffer.

    They can on a GPU where Apex was built with its CUDA extensions, and refuse to be built with the setting elsewhere:
    there the gradient is made first, in the weight's precision, and then added. TransformerEngine's layers need no
    Apex: `build_model` tells them.
    """
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def block_spec(config: TransformerConfig, kind: str) -> TransformerBlockSubmodules:
    """This stage's layers of the kind that `choose_layers` names, with our core attention."""
    if kind == TRANSFORMER_ENGINE:
        spec, norm = _transformer_engine_spec(config)
    else:
        spec, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    spec.submodules.self_attention.submodules.core_attention = SDLMCoreAttention
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)


def _transformer_engine_spec(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """Norm and linear layer in one module; apart where the norm's output is to be recomputed.

    Checkpoints name the norms as the fused modules do, as those of Megatron-Core's own layers also do.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    spec = get_gpt_layer_with_transformer_engine_spec()
    if config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ()):
        layer, mlp = spec.submodules, spec.submodules.mlp
        layer.input_layernorm = layer.pre_mlp_layernorm = TENorm
        layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        # a partial in 0.19, a ModuleSpec in 0.16
        parts: Any = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
        parts.linear_fc1 = TEColumnParallelLinear
        layer.sharded_state_dict_keys_map = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
    return spec, TENorm


def build_model(
    shape: ModelConfig,
    config: TransformerConfig,
    layers: Layers,
    *,
    first_stage: bool,
    last_stage: bool,
    max_positions: int,
    row_attention: Callable[[RowLayout, int], RowAttention],
    logits_mb: float,
    chunk: int = 0,
) -> SDLMModel:
    """One of this process's model chunks: a pipeline stage has one, under the interleaved schedule several.

    `first_stage`, `last_stage`: the process is the first or last of the pipeline. Stage p of P holds the chunks p,
    p + P, p + 2 P, … of the model; `chunk` counts them.
    """
    chunks = config.virtual_pipeline_model_parallel_size or 1
    model = SDLMModel(
        config=config,
        transformer_layer_spec=block_spec(config, layers.kind),
        vocab_size=padded_vocab(shape.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=max_positions,
        pre_process=first_stage and chunk == 0,
        post_process=last_stage and chunk == chunks - 1,
        vp_stage=chunk if chunks > 1 else None,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        rotary_base=shape.rope_theta,
        real_vocab_size=shape.vocab_size,
        row_attention=row_attention,
        logits_mb=logits_mb,
    )
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):  # TransformerEngine's; asked in each forward pass
            module.fuse_wgrad_accumulation = True
    for name, parameter in model.named_parameters():
        # Megatron-Core marks split tensors while it fills them; without the mark the gradient norm would count
        # TP rank 0's part only. Where the weights come from a file nothing is filled, so the mark is set here.
        dim = partition_dim(name)
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    return model
