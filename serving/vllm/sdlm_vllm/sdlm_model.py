"""vLLM's models with the attention of canvases.

R: requests of a step; rows: parts of a request with one kind of attention.
"""

from typing import Any

import numpy as np
import torch
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from sdlm_vllm.request_options import read_options
from sdlm_vllm.served_config import folder_settings, served_canvas
from sdlm_vllm.window_sampler import StepWindows, WindowSampler, grouped


class WindowLogits:
    """Before a stock class of vLLM: a step's logits are those of its windows."""

    windows: list[StepWindows] | None = None
    """Windows of the step that runs; `compute_logits` takes them once, because prompt logprobs call it too."""

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's hook: the class that prepares each step."""
        return SDLMModelState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits (tokens, V); of a step only those of its windows, since half of a canvas predicts known tokens."""
        windows, self.windows = self.windows, None
        stock: Any = super()
        if windows is not None:
            hidden_states = hidden_states[torch.cat([group.rows for group in windows])]
        return stock.compute_logits(hidden_states)


class SDLMQwen2ForCausalLM(WindowLogits, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class SDLMQwen3ForCausalLM(WindowLogits, Qwen3ForCausalLM):
    """Qwen3, dense."""


class SDLMLlamaForCausalLM(WindowLogits, LlamaForCausalLM):
    """Llama."""


class SDLMMistralForCausalLM(WindowLogits, MistralForCausalLM):
    """Mistral without sliding window."""


class SDLMModelState(DefaultModelState):
    """Prepares a step: which rows of attention it has, and what its sampler needs to know of its windows."""

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.defaults, self.canvas = folder_settings(vllm_config.model_config), served_canvas(vllm_config)
        self.step_windows: list[StepWindows] | None = None
        self.window = np.full(self.max_num_reqs, 1, dtype=np.int64)  # n of each request slot
        self.lossless = np.zeros(self.max_num_reqs, dtype=bool)

    def get_supported_generation_tasks(self) -> tuple[str, ...]:
        """Text generation only."""
        return ("generate",)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """vLLM's hook: by now `--max-model-len auto` has been shortened to what fits into memory."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.canvas = served_canvas(self.vllm_config)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Called by vLLM for a request that enters, also when it comes back after a preemption."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        options = read_options(params and params.extra_args, self.defaults, self.canvas.most)
        self.window[req_index], self.lossless[req_index] = options.n, options.lossless

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """vLLM's hook: arguments of the model. Writes the canvases that vLLM takes for the end of a prompt."""
        for windows in self.step_windows or ():
            # It writes draft tokens only where some lie behind the prompt, which a single repeated token does not.
            slots = input_batch.idx_mapping[windows.single]
            tokens = req_states.draft_tokens[slots, 0].to(input_batch.input_ids.dtype)
            input_batch.input_ids[input_batch.query_start_loc[windows.single].long()] = tokens
            input_batch.input_ids[windows.masked] = self.defaults.mask_token_id
        return super().prepare_inputs(input_batch, req_states)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """vLLM's hook: the sampler of each step, and no rejection sampler."""
        return WindowSampler(self, sampler), None

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: Any = None,
    ) -> dict[str, Any]:
        """Attention metadata of a step: for a canvas two rows on one block table, clean tokens and window."""
        count = input_batch.num_reqs
        lengths = np.diff(input_batch.query_start_loc_np[: count + 1]).astype(np.int64)
        is_canvas = np.diff(input_batch.cu_num_logits_np[: count + 1]) > 0
        slot = input_batch.idx_mapping_np[:count]
        n, lossless = self.window[slot], self.lossless[slot]
        known = input_batch.num_computed_tokens_np[:count].astype(np.int64)  # of a canvas: all known tokens
        # A canvas with drafts that the scheduler cut to n tokens is as good as one without.
        drafts = (n - 1) * (lossless & is_canvas & (lengths == 2 * n - 1))
        clean, rows = self.canvas.clean(known, n, lossless), self.canvas.rows(known, n, lossless, drafts)
        whole = is_canvas & (lengths == rows)
        if not for_capture:
            groups = grouped(np.flatnonzero(whole), (rows - clean)[whole], self.model_config.get_vocab_size())
            layout = clean, rows, n, lossless, drafts
            self.step_windows = [self._windows(input_batch, group, *layout) for group in groups]
            self.model.windows = self.step_windows
        # A prompt's tokens end at known + length; a canvas begins `clean` tokens before its window.
        end = np.where(is_canvas, known - self.canvas.lead(n) - clean + lengths, known + lengths)
        causal_part = np.where(whole & ~self.canvas.causal(n), clean, lengths)
        parts = np.stack([causal_part, lengths - causal_part], 1)
        ends = np.stack([end - parts[:, 1], end], 1)
        used = parts > 0
        return self._metadata(
            input_batch,
            attn_groups,
            kv_cache_config,
            block_tables,
            slot_mappings,
            request=np.nonzero(used)[0],
            lengths=parts[used],
            ends=ends[used],
            causal=np.broadcast_to([True, False], parts.shape)[used],
        )

    def _windows(
        self,
        batch: Any,
        whole: np.ndarray,
        clean: np.ndarray,
        rows: np.ndarray,
        n: np.ndarray,
        lossless: np.ndarray,
        drafts: np.ndarray,
    ) -> StepWindows:
        """Windows of the requests `whole`, a group; a canvas that the scheduler cut has none."""
        sizes = rows[whole] - clean[whole]
        owner = np.repeat(np.arange(len(whole)), sizes)
        slot = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        first = batch.cu_num_logits_np[:-1][whole] + clean[whole]
        masked = lossless[whole][owner] & (slot > drafts[whole][owner])
        lengths = np.diff(batch.query_start_loc_np[: batch.num_reqs + 1])
        prefilled = batch.num_computed_tokens_np[: batch.num_reqs] + lengths
        in_prompt = (np.diff(batch.cu_num_logits_np[: batch.num_reqs + 1]) == 0) & (prefilled < batch.prefill_len_np)

        def put(values: np.ndarray) -> torch.Tensor:
            return async_tensor_h2d(np.ascontiguousarray(values, dtype=np.int64), device=self.device)

        starts = np.zeros(batch.num_reqs, dtype=np.int64)
        starts[whole] = np.cumsum(sizes) - sizes
        verified = whole[lossless[whole]]
        return StepWindows(
            request=whole,
            sizes=sizes,
            rows=put(first[owner] + slot),
            owner=put(owner),
            slot=put(slot),
            batch_row=put(whole),
            single=put(whole[rows[whole] == 1]),
            n=put(n),
            in_prompt=put(in_prompt).bool(),
            lossless=put(lossless).bool(),
            verified=verified,
            most_drafts=int(drafts[verified].max(initial=0)),
            verified_row=put(verified),
            first=put(starts[verified]),
            drafts=put(drafts[verified]),
            masked=put((batch.query_start_loc_np[whole][owner] + slot)[masked]),
        )

    def _metadata(
        self,
        batch: Any,
        attn_groups: Any,
        kv_cache_config: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        *,
        request: np.ndarray,
        lengths: np.ndarray,
        ends: np.ndarray,
        causal: np.ndarray,
    ) -> dict[str, Any]:
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = torch.from_numpy(lengths.cumsum())
        tensor = lambda values: async_tensor_h2d(values.astype(np.int32), device=self.device)  # noqa: E731
        index = tensor(request).long()
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=len(lengths),
            num_tokens=batch.num_tokens,
            query_start_loc_gpu=starts.to(self.device, non_blocking=True),
            query_start_loc_cpu=starts,
            max_query_len=int(lengths.max()),
            seq_lens=tensor(ends),
            max_seq_len=int(ends.max()),
            block_tables=tuple(table[index] for table in block_tables),
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=torch.from_numpy(ends.astype(np.int32)),
            causal=True if causal.all() else tensor(causal),
        )
