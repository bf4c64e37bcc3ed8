"""The sampler of a step: chooses the tokens of each window, keeps the confident ones, lays out the next canvases.

The rules are those of the folder's own `generate` (decode_rules.py, the same file). Everything stays on the device;
what the host knows before the step comes in StepWindows, one for each group of windows: choosing makes several copies
of the logits, so it takes a limited number of them at once. R requests of the step, N rows of logits: those of all
windows of a group, S slots of the largest window, V vocabulary.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from sdlm_vllm.decode_rules import choose, confidence, confident_prefix, uniforms
from sdlm_vllm.logit_warp import warp_rows
from sdlm_vllm.lossless_drafts import LosslessDrafts
from sdlm_vllm.request_options import read_options

GROUP_BYTES = 2**27
"""Of a group's float32 logits; its last window may go beyond."""
COPIES = 20
"""What choosing needs at most, in copies of a group's logits: 7 were counted, the rest is for the sorting on a GPU."""


@dataclass(frozen=True)
class StepWindows:
    """A group of a step's windows. NumPy arrays are on the host, tensors on the device."""

    request: np.ndarray
    """(W,) index in the step of each request with a window."""
    sizes: np.ndarray
    """(W,) slots of its window."""
    rows: Tensor
    """int64 (N,): which of the step's sampled hidden states are slots."""
    owner: Tensor
    """int64 (N,): index in `request` of each slot."""
    slot: Tensor
    """int64 (N,): place of each slot in its window."""
    batch_row: Tensor
    """int64 (W,): `request` on the device."""
    single: Tensor
    """int64: those of `request` whose canvas has one token."""
    n: Tensor
    """int64 (R,): window of each request of the step, whether it has one in this step or not."""
    in_prompt: Tensor
    """bool (R,): the prompt does not end in this step."""
    lossless: Tensor
    """bool (R,): requests whose passes verify drafts; L of them have a window."""
    verified: np.ndarray
    """(L,) those of `request`."""
    verified_row: Tensor
    """int64 (L,): `verified` on the device."""
    first: Tensor
    """int64 (L,): first row of the group's logits of each of their windows."""
    drafts: Tensor
    """int64 (L,): drafts in each of them: slots 1, 2, …"""
    most_drafts: int
    """The largest of these numbers."""
    masked: Tensor
    """int64: their mask tokens, as indices of the step's tokens."""


class WindowSampler:
    """Takes the place of vLLM's `Sampler`, and has the attributes of it that the engine reads."""

    def __init__(self, state: Any, sampler: Any) -> None:
        self.state, self.base = state, sampler
        self.req_states, self.sampling_states = sampler.req_states, sampler.sampling_states
        self.logprob_token_ids_state = sampler.logprob_token_ids_state
        self.get_logprobs_dims, self.compute_nans = sampler.get_logprobs_dims, sampler.compute_nans
        self.drafts = LosslessDrafts(state, sampler)
        self.penalties_state = SimpleNamespace(output_bin_counts=None)  # no counts of tokens: penalties are refused
        self.bias: Any = next(item for item in sampler.logits_processors if isinstance(item, LogitBiasState))
        size = state.max_num_reqs
        self.threshold = UvaBackedTensor(size, dtype=torch.float32)
        self.entropy, self.product = (UvaBackedTensor(size, dtype=torch.bool) for _ in range(2))

    def add_request(self, slot: int, params: Any) -> None:
        """Called by vLLM for a request that enters; `slot` is its index in all states."""
        options = read_options(params.extra_args, self.state.defaults, self.state.canvas.most)
        self.threshold.np[slot] = options.threshold
        self.entropy.np[slot], self.product.np[slot] = options.alg == "entropy_conf", options.product
        self.sampling_states.add_request(slot, params)
        self.bias.add_request(slot, params)
        self.logprob_token_ids_state.add_request(slot, params)

    def apply_staged_writes(self) -> None:
        """Called by vLLM before a step: copies to the device what `add_request` wrote."""
        for states in (self.sampling_states, self.bias, self.logprob_token_ids_state):
            states.apply_staged_writes()
        for tensor in (self.threshold, self.entropy, self.product):
            tensor.copy_to_uva()

    def __call__(self, logits: Tensor, batch: Any) -> SamplerOutput:
        """Tokens kept by the step, as vLLM's sampler returns them: rejected ones count back to where keys are clean."""
        groups, self.state.step_windows = self.state.step_windows, None
        if groups is None:
            self._take_most_memory(logits.device)
            return _nothing(batch, logits.device)
        slots = batch.idx_mapping[: batch.num_reqs]
        known = self.req_states.total_len.gpu[slots].long()
        sizes = np.concatenate([windows.sizes for windows in groups])
        width = int(sizes.max(initial=1))
        tokens = torch.zeros(batch.num_reqs, width, dtype=torch.int64, device=logits.device)  # no copy, no wait
        kept = torch.zeros_like(known)
        nans = torch.zeros_like(known, dtype=torch.int32) if self.compute_nans else None
        parts = logits.split([len(windows.owner) for windows in groups])
        if nans is not None:
            rows = torch.cat([windows.batch_row[windows.owner] for windows in groups])
            nans.index_add_(0, rows, logits.isnan().sum(-1, dtype=torch.int32))
        scores = [self._decide(*each, batch, slots, known, tokens, kept) for each in zip(parts, groups, strict=True)]
        starts = np.zeros(batch.num_reqs, dtype=np.int64)  # first row of logits of each request that has some
        starts[np.concatenate([windows.request for windows in groups])] = np.cumsum(sizes) - sizes
        rejected = self._lay_out(slots, known, tokens, kept, groups[0], batch)
        return SamplerOutput(
            sampled_token_ids=tokens.int(),
            logprobs_tensors=LogprobsTensors.cat(scores, starts.tolist()) if scores[0] is not None else None,
            num_nans=nans,
            num_sampled=kept.int(),
            num_rejected=rejected.int(),
        )

    def _take_most_memory(self, device: torch.device) -> None:
        """Takes what the largest step needs, and drops it. In the run in which vLLM measures memory: it gives the rest
        of the device to the keys."""
        state, (verified, drafts, vocab) = self.state, self.drafts.probs.shape
        window = state.canvas.most + drafts * bool(verified)
        rows = state.max_num_reqs * window
        hidden = torch.zeros(rows, state.inputs_embeds_size, dtype=state.dtype, device=device)
        logits = state.model.compute_logits(hidden)
        shape = COPIES, min(rows, rows_at_once(vocab) + window), vocab
        copies = torch.empty(shape, dtype=torch.float32, device=device)
        del logits, copies  # only now

    def _decide(
        self,
        logits: Tensor,
        windows: StepWindows,
        batch: Any,
        slots: Tensor,
        known: Tensor,
        tokens: Tensor,
        kept: Tensor,
    ) -> LogprobsTensors | None:
        """Writes the group's part of `tokens` and `kept`; returns the logprobs of its slots, if any are asked for."""
        if not len(windows.request):
            return None
        flat, warped, raw = self._choose(logits, windows, batch, slots, known)
        tokens[windows.batch_row[windows.owner], windows.slot] = flat
        kept[windows.batch_row] = self._kept(flat, raw, windows, slots, batch, tokens.shape[1])
        if len(windows.verified):
            on_host = batch.idx_mapping_np[: batch.num_reqs]
            kept[windows.verified_row] = self.drafts.verify(tokens, warped, windows, slots, known, on_host)
            flat = tokens[windows.batch_row[windows.owner], windows.slot]
        return self._logprobs(raw, warped, flat, windows, slots, batch)

    def _choose(
        self, logits: Tensor, windows: StepWindows, batch: Any, slots: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The token of each slot, int64 (N,), the logits it was chosen by and those of the model, float32 (N, V)."""
        states, on_host = self.sampling_states, batch.idx_mapping_np[windows.request]
        row = windows.batch_row[windows.owner]
        slot_of_row, position = slots[row], known[row] + windows.slot
        raw = logits.float()
        warped = raw
        if self.bias.use_logit_bias[on_host].any():
            context = LogitsContext(
                expanded_idx_mapping=slot_of_row.int(),
                idx_mapping=slots[windows.batch_row],
                idx_mapping_np=on_host,
                expanded_local_pos=windows.slot.int(),
                input_ids=windows.slot,  # not read by the bias
                pos=position - 1,
                seq_lens_upper_bound_np=batch.seq_lens_cpu_upper_bound.numpy(),
            )
            warped = self.bias.apply(raw.clone(), context)
        temperature = states.temperature.np[on_host]
        if not temperature.any():
            return choose(warped, None, None), warped, raw
        greedy = choose(warped, None, None)
        warped = warp_rows(warped, states, slot_of_row, on_host)
        uniform = uniforms(states.seeds.gpu[slot_of_row], position)
        drawn = choose(warped, None, uniform)
        return torch.where(states.temperature.gpu[slot_of_row] > 0, drawn, greedy), warped, raw

    def _kept(self, tokens: Tensor, raw: Tensor, windows: StepWindows, slots: Tensor, batch: Any, width: int) -> Tensor:
        """Length of the confident prefix of each window, int64 (W,)."""
        sure = confidence(tokens, raw, "prob_conf")
        on_host, of_window = batch.idx_mapping_np[windows.request], slots[windows.batch_row]
        if self.entropy.np[on_host].any():
            by_entropy = self.entropy.gpu[of_window][windows.owner]
            sure = torch.where(by_entropy, confidence(tokens, raw, "entropy_conf"), sure)
        # slots that a smaller window does not have are never kept
        table = sure.new_full((len(windows.request), width), -1)
        table[windows.owner, windows.slot] = sure
        if self.product.np[on_host].any():
            table = torch.where(self.product.gpu[of_window][:, None], table.clamp(min=0).cumprod(-1), table)
            exists = torch.zeros_like(table, dtype=torch.bool)
            exists[windows.owner, windows.slot] = True
            table = torch.where(exists, table, -1)
        return confident_prefix(table, self.threshold.gpu[of_window][:, None], product=False)  # type: ignore[arg-type]

    def _logprobs(
        self, raw: Tensor, warped: Tensor, tokens: Tensor, windows: StepWindows, slots: Tensor, batch: Any
    ) -> LogprobsTensors | None:
        """Logprobs of all slots; vLLM takes as many of each request as were kept."""
        dims = self.get_logprobs_dims(batch.idx_mapping_np)
        if dims is None:
            return None
        return compute_topk_scores(
            warped if self.base.logprobs_mode.startswith("processed") else raw,
            dims[0],
            tokens,
            logprob_token_ids_state=self.logprob_token_ids_state,
            expanded_idx_mapping=slots[windows.batch_row[windows.owner]].int(),
            max_per_req_token_ids=dims[1],
            logits_mode=self.base.logprobs_mode.endswith("logits"),
        )

    def _lay_out(
        self, slots: Tensor, known: Tensor, tokens: Tensor, kept: Tensor, windows: StepWindows, batch: Any
    ) -> Tensor:
        """Writes the next canvas of each request; returns the number of "rejected" tokens of the step, int64 (R,):
        vLLM subtracts it from the computed ones, and the next step begins there."""
        states, canvas = self.req_states, self.state.canvas
        total = known + kept
        start = total - canvas.lead(windows.n) * 1 - canvas.clean(total, windows.n, windows.lossless)
        ahead = torch.arange(canvas.width, device=slots.device)
        position = start[:, None] + ahead
        old = states.all_token_ids.gpu[slots[:, None], position.clamp(max=canvas.max_model_len - 1)].long()
        new = tokens.gather(1, (position - known[:, None]).clamp(0, tokens.shape[1] - 1))
        content = torch.where(position < known[:, None], old, new)
        # Drafts of a lossless request; where a next canvas has none, `prepare_inputs` writes masks over them.
        written = total + (windows.n - 1) * windows.lossless
        content = torch.where(position < written[:, None], content, self.state.defaults.mask_token_id)
        states.draft_tokens[slots] = content[:, : states.draft_tokens.shape[1]].to(states.draft_tokens.dtype)
        ends = batch.query_start_loc[: batch.num_reqs + 1].long()
        computed = states.num_computed_tokens.gpu[slots].long() + ends[1:] - ends[:-1]
        return torch.where(windows.in_prompt, 0, computed - start)


def rows_at_once(vocab: int) -> int:
    """Rows of logits that a group has."""
    return max(1, GROUP_BYTES // (4 * vocab))


def grouped(requests: np.ndarray, sizes: np.ndarray, vocab: int) -> list[np.ndarray]:
    """Groups of `requests`, at least one, of which each has a window of so many rows of logits."""
    ends = np.cumsum(sizes)
    return np.split(requests, np.flatnonzero(np.diff((ends - 1) // rows_at_once(vocab))) + 1)


def _nothing(batch: Any, device: torch.device) -> SamplerOutput:
    none = torch.zeros(batch.num_reqs, dtype=torch.int32, device=device)
    return SamplerOutput(
        sampled_token_ids=none[:, None], logprobs_tensors=None, num_nans=None, num_sampled=none, num_rejected=none
    )
