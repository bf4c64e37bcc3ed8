"""Megatron-Core's GPTModel with three differences: RoPE by position id, attention by layout, head on labels."""

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.profiler import record_function

from sdlm_megatron.diffusion.layout import RowLayout
from sdlm_megatron.diffusion.row import MicroBatch
from sdlm_megatron.model.attention.contract import RowAttention
from sdlm_megatron.model.attention.core_attention import SDLMRowParams
from sdlm_megatron.model.label_loss import LabelLosses, Vocabulary, label_logits, label_losses


class SDLMModel(GPTModel):
    """One pipeline stage.

    Args beyond GPTModel's: `real_vocab_size`, the rows of the Hugging Face embedding; rows added for tensor
    parallelism are kept out of the softmax. `row_attention`: from a row's layout and length to its attention.
    `logits_mb`: see label_loss.
    """

    def __init__(
        self,
        *args: Any,
        real_vocab_size: int,
        row_attention: Callable[[RowLayout, int], RowAttention],
        logits_mb: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, position_embedding_type="rope", **kwargs)
        self.real_vocab_size, self.row_attention, self.logits_mb = real_vocab_size, row_attention, logits_mb
        if self.post_process:
            # Called as a module, so that its hooks run: an overlapped gather of its weight is waited for in one.
            self.output_layer.forward = self._label_losses

    def forward(self, batch: MicroBatch) -> torch.Tensor | LabelLosses:
        """Hidden states [S(/TP), 1, hidden] on inner stages; on the last, the losses of the label rows, or where the
        batch asks for them their logits [N, V].
        """
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

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor | LabelLosses:
        """LM head and vocab-parallel cross entropy on the label rows only."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # label_losses sums the gradient over TP, so here it is only split
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return self.output_layer(hidden_states)

    def _label_losses(self, hidden_states: torch.Tensor) -> torch.Tensor | LabelLosses:
        """Hidden states [S, 1, hidden] of the whole row -> the losses of its label rows, or their logits."""
        batch, tp = self._batch, self.pg_collection.tp
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        first = tp.rank() * len(weight)
        vocabulary = Vocabulary(
            first=first,
            real=min(max(0, self.real_vocab_size - first), len(weight)),
            group=tp if tp.size() > 1 else None,
        )
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
                counts=batch.label_weights,
                measure=batch.measure,
            )
