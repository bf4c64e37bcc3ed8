"""What to build from a Hugging Face folder: its shape, and the row of a mask token that it does not know yet."""

from dataclasses import dataclass

import torch

from sdlm_megatron.config.schema import ModelConfig
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.weights.hf_reader import HFConfig


@dataclass(frozen=True)
class NewMaskToken:
    """A mask token that the base does not know yet: its row becomes the mean of the other tokens' rows."""

    row: int
    n_tokens: int
    """Rows [0, n_tokens) belong to tokens; those above are the base's padding and do not count for the mean."""


def mean_row(embedding: torch.Tensor, new_mask: NewMaskToken) -> torch.Tensor:
    """Mean in fp32 of the other tokens' rows, (hidden,): how the reference starts the mask token's output row."""
    tokens = embedding[: new_mask.n_tokens]
    total = tokens.sum(0, dtype=torch.float32)
    count = tokens.shape[0]
    if new_mask.row < count:
        total, count = total - tokens[new_mask.row].float(), count - 1
    return total / count


def shape_of(hf: HFConfig) -> ModelConfig:
    """The model section that describes a Hugging Face folder."""
    return ModelConfig(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=hf.num_heads,
        num_query_groups=hf.num_kv_heads,
        head_dim=hf.head_dim,
        vocab_size=hf.vocab_size,
        rope_theta=hf.rope_theta,
        rms_norm_eps=hf.rms_norm_eps,
        tied_embeddings=hf.tied,
        qkv_bias=hf.qkv_bias,
    )


def resolve_shape(asked: ModelConfig, base: ModelConfig | None, where: str) -> ModelConfig:
    """The shape to build: the base's where there is one; ConfigError where the config says otherwise."""
    if base is None:
        head_dim = asked.head_dim or asked.hidden_size // max(1, asked.num_attention_heads)
        return ModelConfig(**{**vars(asked), "head_dim": head_dim})
    if asked.num_layers:
        for key, value in vars(asked).items():
            found = getattr(base, key)
            if value != found and not (key == "head_dim" and value == 0):
                raise ConfigError(
                    f"model.{key} is {value}, the base has {found}",
                    where,
                    f"--model.{key}={found}, or leave the model section out to read it from the base",
                )
    return base
