"""Megatron-Core's GPTModel with three differences: RoPE by position id, attention by layout, head on labels."""

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from sdlm_megatron.diffusion.layout import IGNORE, RowLayout
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.model.attention import RowAttention
from sdlm_megatron.model.core_attention import SDLMRowParams


class SDLMModel(GPTModel):
    """One pipeline stage.

    Args beyond GPTModel's: `real_vocab_size`, the rows of the Hugging Face embedding; rows added for tensor
    parallelism are kept out of the softmax. `row_attention`: from a row's layout and length to its attention.
    """

    def __init__(
        self, *args: Any, real_vocab_size: int, row_attention: Callable[[RowLayout, int], RowAttention], **kwargs: Any
    ) -> None:
        super().__init__(*args, position_embedding_type="rope", **kwargs)
        self.real_vocab_size, self.row_attention = real_vocab_size, row_attention
        if self.post_process:
            # The head sees label rows gathered from the whole sequence, so it is never sequence parallel itself;
            # each rank's vocabulary shard gives part of the hidden gradient: they are summed here, once, and the
            # gather below then only splits (tensor_parallel_output_grad=False) instead of summing again.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [S(/TP), 1, hidden] on inner stages; on the last, nll (N,) of the labels in float32."""
        self._batch = batch
        attention = cast("RowAttention | None", batch.attention)
        if attention is None:
            attention = self.row_attention(batch.layout, batch.tokens.shape[1]).to(batch.tokens.device)
        return super().forward(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.label_targets,
            packed_seq_params=SDLMRowParams.of(attention, batch.tokens.shape[1]),
        )

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        """RoPE angles by position id: blocks repeat positions of the clean part, documents start again at 0."""
        found = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        inverse = self.rotary_pos_emb.inv_freq.to(position_ids.device)
        angles = position_ids[0].float()[:, None] * inverse  # fp32: bf16 cannot count to 32,768
        freqs = torch.cat([angles, angles], dim=-1)[:, None, None, :]  # [S, 1, 1, d]
        return (found[0], freqs, *found[2:])

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """LM head and vocab-parallel cross entropy on the label rows only."""
        if not self.post_process:
            return hidden_states
        batch = self._batch
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _bias = self.output_layer(hidden_states[batch.label_index], weight=weight)  # [N, 1, vocab/TP]
        logits = self._without_padding(logits)
        targets = batch.label_targets.masked_fill(batch.label_targets == IGNORE, 0)
        return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), targets[:, None])[:, 0]

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Takes the rows that pad the vocabulary out of the softmax."""
        if self.vocab_size == self.real_vocab_size:
            return logits
        local = logits.shape[-1]
        first = self.pg_collection.tp.rank() * local
        added = torch.arange(first, first + local, device=logits.device) >= self.real_vocab_size
        return logits.masked_fill(added, torch.finfo(logits.dtype).min)
