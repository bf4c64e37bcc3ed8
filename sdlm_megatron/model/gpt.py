"""GPTModel of Megatron-Core with three changes: RoPE by position id, attention by row layout, head on label rows."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import record_function

from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.model.attention.contract import BuildAttention, RowAttention
from sdlm_megatron.model.label_loss import LabelLosses, Vocabulary, label_logits, label_losses
from sdlm_megatron.model.lora_layers import MaskRow


@dataclass
class SDLMRowParams(PackedSeqParams):
    """Carrier of the row's attention to the core attention of every layer."""

    # Megatron-Core passes its PackedSeqParams unchanged to every layer, also under recomputation. The attention mask
    # argument would not work: recomputation saves tensors only, and a mask tensor would be S x S.
    attention: RowAttention = field(default=None)  # type: ignore[assignment]  # the base's fields have defaults

    @classmethod
    def of(cls, attention: RowAttention, row_length: int) -> "SDLMRowParams":
        return cls(attention=attention, qkv_format="sbhd", max_seqlen_q=row_length, max_seqlen_kv=row_length)


class SDLMCoreAttention(torch.nn.Module):
    """Core attention module of Megatron-Core's layers; it applies the RowAttention in `packed_seq_params`."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.layer_number = layer_number
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
            # squeeze, because the gradient of an index is a cleared tensor and a copy into it
            q, k, v = (x.squeeze(1) for x in (query, key, value))
            out = packed_seq_params.attention(q, k, v, self.scale)
        return out.reshape(out.shape[0], 1, -1)


class SDLMModel(GPTModel):
    """One model chunk of a pipeline stage.

    Args:
        args, kwargs: of GPTModel.
        real_vocab_size: rows of the Hugging Face embedding; rows added for tensor parallelism stay out of the softmax.
        row_attention: builds the attention of a row.
        logits_mb: memory limit of a chunk of logits, MB; see label_loss.
        mask_token_id: token whose row is trained apart, in a model with adapters (lora_layers).
    """

    def __init__(
        self,
        *args: Any,
        real_vocab_size: int,
        row_attention: BuildAttention,
        logits_mb: float,
        mask_token_id: int = -1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, position_embedding_type="rope", **kwargs)
        self.rotary_pos_emb.cp_group = None  # it would take this rank's part by index; see _preprocess
        self.real_vocab_size, self.row_attention, self.logits_mb = real_vocab_size, row_attention, logits_mb
        self.mask_token_id = mask_token_id
        if self.post_process:
            # Replacing forward and calling the layer as a module keeps its hooks: with overlap_param_gather, one of
            # them waits for the gather of this layer's weight.
            self.output_layer.forward = self._label_losses

    @property
    def trained_row(self) -> MaskRow | None:
        """The mask token's row on this chunk, in a model with adapters."""
        return getattr(self.embedding if self.pre_process else self, "mask_row", None)

    def forward(self, batch: MicroBatch) -> torch.Tensor | LabelLosses:
        """Forward pass of this chunk over one row.

        Returns:
            Hidden states [S(/TP), 1, hidden] except on the last chunk; there the losses of the N label rows, or with
            `batch.logits` their logits [N, V].
        """
        self._batch = batch
        attention = cast("RowAttention | None", batch.attention)
        if attention is None:
            attention = self.row_attention(batch.shard or batch.layout, batch.tokens.shape[1]).to(batch.tokens.device)
        return super().forward(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.label_targets,
            packed_seq_params=SDLMRowParams.of(attention, batch.tokens.shape[1]),
        )

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        """GPTModel's inputs of the decoder, with RoPE angles by position id instead of by index in the row."""
        # Blocks repeat positions of the clean part and documents restart at 0, so indices would be wrong.
        embedded, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.pre_process and self.trained_row is not None:
            embedded = self.trained_row.embedded(embedded, input_ids, self.mask_token_id)
        inverse = self.rotary_pos_emb.inv_freq.to(position_ids.device)
        angles = position_ids[0].float()[:, None] * inverse  # fp32: bf16 represents integers only up to 256
        freqs = torch.cat([angles, angles], dim=-1)[:, None, None, :]  # [S, 1, 1, d]
        return (embedded, freqs, *rest)

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor | LabelLosses:
        """LM head and vocab-parallel cross entropy on the label rows only."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # label_losses already sums the gradient over TP, so the backward pass here only has to split it
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return self.output_layer(hidden_states)

    def _label_losses(self, hidden_states: torch.Tensor) -> torch.Tensor | LabelLosses:
        """Losses or logits of the label rows, from the hidden states [S, 1, hidden] of the whole row."""
        batch, tp = self._batch, self.pg_collection.tp
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        first = tp.rank() * len(weight)
        vocabulary = Vocabulary(
            first=first,
            real=min(max(0, self.real_vocab_size - first), len(weight)),
            group=tp if tp.size() > 1 else None,
        )
        row = None
        if tied and self.trained_row is not None:
            row = self.trained_row.of_head(weight, self.mask_token_id - first)
        with record_function("sdlm::head"):
            rows = hidden_states[batch.label_index, 0]
            if batch.logits:
                return label_logits(rows, weight, vocabulary.group)[:, : self.real_vocab_size]
            return label_losses(
                rows,
                weight,
                batch.label_targets,
                vocabulary,
                logits_mb=self.logits_mb,
                loss_weights=batch.label_weights,
                measure=batch.measure,
                trained_row=row,
                trained_index=self.mask_token_id - first,
            )
