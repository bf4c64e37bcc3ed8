"""Lossless decoding: which drafts a pass keeps, so that the text is that of next-token decoding; see canvas.py.

R requests of the step, S slots of the largest window, L lossless windows, k the largest number of drafts in one of
them, N rows of logits, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from sdlm_vllm.decode_rules import ACCEPT, REDRAW, accept_drafts, uniforms, verified_prefix
from sdlm_vllm.settings import lossless_fault


class LosslessDrafts:
    """Compares drafts with what the clean tokens predict, and keeps the distributions they were drawn from."""

    def __init__(self, state: Any, sampler: Any) -> None:
        self.req_states, self.sampling_states = sampler.req_states, sampler.sampling_states
        slots, canvas, defaults = state.max_num_reqs, state.canvas, state.defaults
        if lossless_fault(defaults.causal_attn, defaults.target_shift):
            slots = 0
        # (request slots, largest n - 1, V). Made at the start, so that it counts where vLLM measures free memory.
        self.probs = torch.zeros(slots, canvas.most - 1, self.sampling_states.vocab_size, device=state.device)

    def verify(
        self, tokens: Tensor, warped: Tensor, windows: Any, slots: Tensor, known: Tensor, on_host: np.ndarray
    ) -> Tensor:
        """Number of tokens that each lossless window keeps, int64 (L,).

        Args:
            tokens: int64 (R, S), proposals for the positions known, known + 1, … of each request. Where tokens are
                sampled, those up to the one behind the last draft are replaced by the tokens to keep.
            warped: float32 (N, V), the logits that the proposals were chosen by.
            windows: StepWindows.
            slots: int64 (R,), request slots.
            known: int64 (R,), known tokens.
            on_host: (R,) `slots`.
        """
        request, count, most = windows.verified_row, windows.drafts, windows.most_drafts
        ahead = torch.arange(most + 1, device=tokens.device)
        is_draft = ahead[:-1] < count[:, None]
        drafts = torch.where(is_draft, self.req_states.draft_tokens[slots[request], 1 : most + 1], -1)
        kept = verified_prefix(tokens[request, : most + 1], torch.cat([drafts[:, :1], drafts], 1))
        warm = np.flatnonzero(self.sampling_states.temperature.np[on_host[windows.verified]])
        if len(warm):
            some = async_tensor_h2d(warm, device=tokens.device)
            request, count, slot = request[some], count[some][:, None], slots[request[some]]
            position = known[request][:, None] + ahead
            seeds = self.sampling_states.seeds.gpu[slot]
            first = windows.first[some][:, None]
            last_row = len(warped) - 1
            p = warped[(first + ahead).clamp(max=last_row)].softmax(-1)
            # A draft that does not exist is never accepted, and then the rule draws from p itself.
            q = self.probs[slot, :most].masked_fill(~is_draft[some][..., None], torch.inf)
            accept, redraw = (uniforms(seeds, position, stream) for stream in (ACCEPT, REDRAW))
            chosen, kept[some] = accept_drafts(p, q, drafts[some].clamp(min=0), accept, redraw)
            tokens[request, : most + 1] = torch.where(ahead <= count, chosen, tokens[request, : most + 1])
            behind = first + count + 1 + torch.arange(self.probs.shape[1], device=tokens.device)
            self.probs[slot] = warped[behind.clamp(max=last_row)].softmax(-1)
        return kept
