"""A row's attention inside Megatron-Core's layers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import record_function

from sdlm_megatron.model.attention.contract import RowAttention


@dataclass
class SDLMRowParams(PackedSeqParams):
    """The row's attention on its way to every layer of every pipeline stage.

    Megatron-Core hands its PackedSeqParams unchanged to every layer, also under recompute, so this one carries ours.
    (The attention mask argument would not do: recompute saves tensors only, and a mask tensor would be S x S.)
    """

    attention: RowAttention = field(default=None)  # type: ignore[assignment]  # the base's fields have defaults

    @classmethod
    def of(cls, attention: RowAttention, row_length: int) -> "SDLMRowParams":
        return cls(attention=attention, qkv_format="sbhd", max_seqlen_q=row_length, max_seqlen_kv=row_length)


class SDLMCoreAttention(torch.nn.Module):
    """Megatron-Core's core attention module; the row's description arrives in `packed_seq_params`."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.scale = kwargs.get("softmax_scale") or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: SDLMRowParams,
        **_: Any,
    ) -> torch.Tensor:
        """query [S, 1, heads, d], key and value [S, 1, kv_heads, d] after RoPE -> [S, 1, heads * d]."""
        assert query.shape[1] == 1, "a micro-batch is one packed row"
        with record_function("sdlm::attention"):
            out = packed_seq_params.attention(query[:, 0], key[:, 0], value[:, 0], self.scale)
        return out.reshape(out.shape[0], 1, -1)
