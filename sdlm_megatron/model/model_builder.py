"""Construction of this process's model chunks in Megatron-Core from our configuration."""

import math
from functools import partial
from importlib.util import find_spec
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

from sdlm_megatron.config.schema import LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from sdlm_megatron.model.attention.contract import BuildAttention
from sdlm_megatron.model.gpt import SDLMCoreAttention, SDLMModel
from sdlm_megatron.model.layers import TRANSFORMER_ENGINE, Layers
from sdlm_megatron.model.lora_layers import add_adapters
from sdlm_megatron.model.packages import FUSED_GRADIENTS
from sdlm_megatron.weights.names import padded_vocab, partition_dim


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm of torch, marked for Megatron-Core's sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        # each TP rank sees its share of the tokens; Megatron-Core sums the gradients of marked parameters over TP
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
    """Megatron-Core's configuration for a model of one of the families in weights/hf_config.py."""
    cuda = torch.cuda.is_available()
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_size,
        layernorm_epsilon=shape.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=silu,
        normalization="RMSNorm",
        qk_layernorm=shape.qk_norm,
        no_rope_freq=[int(_is_nope(i + 1, shape)) for i in range(shape.num_layers)] if shape.nope_interval else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        # the interleaved schedule sends in both directions between two stages at the same time; batched calls of
        # several chunks could not be matched
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        **_recompute(train),
        calculate_per_token_loss=True,  # numerators and denominators are summed, so empty rows weigh nothing
        use_cpu_initialization=not cuda,
        perform_initialization=initialize,
        init_method_std=0.02,
        # without Apex's extension Megatron-Core's layers refuse it; TransformerEngine's need none, see `build_model`
        gradient_accumulation_fusion=find_spec(FUSED_GRADIENTS) is not None,
        batch_p2p_sync=False,  # a workaround for old versions of torch that makes the host wait at each transfer
        **layers.arguments,
    )


def _is_nope(number: int, shape: ModelConfig) -> bool:
    """Whether layer `number`, from 1, has no rotary embedding."""
    return shape.nope_interval > 0 and number % shape.nope_interval == 0


def scaled_frequencies(frequencies: torch.Tensor, shape: ModelConfig) -> torch.Tensor:
    """Rope scaling of frequencies in radians per position, fp32 (head_dim / 2,)."""
    if shape.rope_type == "yarn":
        share = _yarn_share(shape).to(frequencies)
    else:
        turns = shape.rope_original_positions / (2 * math.pi / frequencies)  # within the original context
        unscaled = (turns - shape.rope_low_freq) / (shape.rope_high_freq - shape.rope_low_freq)
        share = unscaled.clamp(0, 1)  # 0: long wavelengths, 1: short ones
    return (1 - share) * frequencies / shape.rope_factor + share * frequencies


def _yarn_share(shape: ModelConfig) -> torch.Tensor:
    """Unscaled share of each frequency in YaRN: a ramp over their indices, where Llama 3 has one over the turns."""

    def index(turns: float) -> float:
        """Index of the frequency with this number of turns within the original context."""
        log = math.log(shape.rope_original_positions / (turns * 2 * math.pi)) / math.log(shape.rope_theta)
        return shape.head_size / 2 * log

    first = max(math.floor(index(shape.rope_high_freq)), 0)
    last = min(math.ceil(index(shape.rope_low_freq)), shape.head_size - 1)
    # the width of 0.001 of a ramp without any is transformers'
    ramp = (torch.arange(shape.head_size // 2, dtype=torch.float32) - first) / (last - first or 0.001)
    return 1 - ramp.clamp(0, 1)


def _recompute(train: TrainConfig) -> dict[str, Any]:
    """Arguments of TransformerConfig for `train.recompute`."""
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


def block_spec(config: TransformerConfig, kind: str, *, separate_norms: bool = False) -> TransformerBlockSubmodules:
    """Specification of this stage's layers, of the kind chosen by `choose_layers`, with our core attention.

    Args:
        separate_norms: norms are modules of their own also in TransformerEngine's layers.
    """
    if kind == TRANSFORMER_ENGINE:
        spec, norm = _transformer_engine_spec(config, separate_norms)
    else:
        spec, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
    spec.submodules.self_attention.submodules.core_attention = SDLMCoreAttention
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)


def _transformer_engine_spec(config: TransformerConfig, separate_norms: bool) -> tuple[ModuleSpec, type]:
    """Specification of TransformerEngine's layers, and their norm.

    Norm and linear layer are one module, except where the output of the norm is to be recomputed or an adapter reads
    it. Parameter names in checkpoints are the same either way.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    recomputed = config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ())
    if recomputed or separate_norms:
        layer, mlp = spec.submodules, spec.submodules.mlp
        layer.input_layernorm = layer.pre_mlp_layernorm = TENorm
        layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        # Megatron-Core 0.19 has a partial here, 0.16 a ModuleSpec
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
    row_attention: BuildAttention,
    logits_mb: float,
    lora: LoraConfig,
    mask_token_id: int = -1,
    chunk: int = 0,
) -> SDLMModel:
    """Builds one of this process's model chunks.

    A pipeline stage has one chunk, under the interleaved schedule several: stage p of P holds the chunks p, p + P,
    p + 2 P, … of the model.

    Args:
        shape: of the model.
        config: from `transformer_config`.
        layers: from `choose_layers`.
        first_stage, last_stage: whether this process is the first or last stage of the pipeline.
        max_positions: longest position id + 1.
        row_attention, logits_mb: see SDLMModel.
        lora, mask_token_id: adapters, and the token whose row of the embedding is trained with them.
        chunk: index of the chunk on this stage.
    """
    chunks = config.virtual_pipeline_model_parallel_size or 1
    model = SDLMModel(
        config=config,
        transformer_layer_spec=block_spec(config, layers.kind, separate_norms=lora.rank > 0),
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
        mask_token_id=mask_token_id,
    )
    if lora.rank:
        add_adapters(model, shape, lora)
    _scale_positions(model, shape)
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):  # TransformerEngine's layers read it in each forward pass
            module.fuse_wgrad_accumulation = True
    for name, parameter in model.named_parameters():
        # Megatron-Core marks sharded parameters while it initializes them. When weights are loaded instead, nothing
        # is initialized, and without the mark the gradient norm would count the shard of TP rank 0 only.
        dim = partition_dim(name)
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    return model


def _scale_positions(model: SDLMModel, shape: ModelConfig) -> None:
    """The base's rope scaling, in the rotary frequencies and the scale of attention."""
    if shape.rope_factor != 1:
        # not Megatron-Core's own scaling: it fixes all numbers but the factor
        model.rotary_pos_emb.inv_freq = scaled_frequencies(model.rotary_pos_emb.inv_freq, shape)
    for module in model.modules():
        if isinstance(module, SDLMCoreAttention) and not _is_nope(module.layer_number, shape):
            module.scale *= shape.rope_magnitude**2  # here, because TransformerEngine's fused RoPE takes no factor
