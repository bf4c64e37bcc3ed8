"""The training engine as a model for decoding, without a cache: a window of decoding is a block of training."""

from dataclasses import replace

import numpy as np
import torch

from sdlm_megatron.diffusion.decode_step import Step
from sdlm_megatron.diffusion.layout import pack_row
from sdlm_megatron.diffusion.row import make_micro_batch
from sdlm_megatron.parallel.engine import Engine


class EngineProposer:
    """Proposals of the weights as they are now; see diffusion.decode_step.Proposer.

    Each pass is one whole forward pass over one row [tokens of all batch rows | their windows | padding], inside
    `Engine.inference`. All processes of a copy of the model decode the same prompts together.

    Args:
        engine: the engine.
        mask_token_id: fills slots 1 ... n-1.
        row_length: tokens of a row; everything that is decoded at a time has to fit.
    """

    def __init__(self, engine: Engine, *, mask_token_id: int, row_length: int) -> None:
        self.engine, self.mask_token_id, self.row_length = engine, mask_token_id, row_length

    def __call__(self, step: Step) -> torch.Tensor:
        """Logits (B, W, n, V) of the windows' proposals, on the engine's device."""
        rows = zip(step.ids.tolist(), step.end.tolist(), step.anchors.tolist(), strict=True)
        documents = [(i, np.array(ids[:end]), np.array(starts)) for i, (ids, end, starts) in enumerate(rows)]
        tokens, layout = pack_row(
            documents,
            block_size=step.window,
            mask_token_id=self.mask_token_id,
            target_shift=self.engine.config.diffusion.target_shift is not False,
        )
        row = make_micro_batch(tokens, layout, row_length=self.row_length, pad_token_id=0, eos_token_id=-1, number=None)
        index = torch.arange(layout.n_clean, layout.used)
        none = torch.zeros_like(index)
        logits = self.engine.logits(
            self.engine.prepare(replace(row, label_index=index, label_targets=none, label_slots=none))
        )
        return logits.view(*step.anchors.shape, step.window, -1)
