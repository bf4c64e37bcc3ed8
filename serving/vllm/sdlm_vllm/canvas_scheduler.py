"""vLLM's scheduler with a canvas for each request that is past its prompt.

For the scheduler all known tokens of such a request are computed, and the canvas are draft tokens behind them, of which
a pass accepts some. In truth the keys of the last ones are not clean; canvas.py says which.
"""

from typing import Any

import numpy as np
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from sdlm_vllm.request_options import WindowOptions, read_options
from sdlm_vllm.served_config import folder_settings, served_canvas


class CanvasScheduler(Scheduler):
    """Chosen by served_config.SDLMEngineRules."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.canvas, self.defaults = served_canvas(self.vllm_config), folder_settings(self.vllm_config.model_config)
        self.num_sampled_tokens_per_step = 0  # a prefill yields no token, a pass only tokens of its canvas
        self._count_clean_blocks_only()

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Adds the canvases and schedules; a canvas that is cut to the token budget is tried again in the next step."""
        for request in self.running:
            past_prompt = request.num_computed_tokens >= request.num_tokens
            request.spec_token_ids = [-1] * (self._rows(request) if past_prompt else 0)
        return super().schedule(throttle_prefills)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Also notes which lossless requests have drafts for their next pass."""
        self._hold_prompt_scores(model_runner_output)
        canvases = scheduler_output.scheduled_spec_decode_tokens
        for name, index in model_runner_output.req_id_to_index.items():
            request: Any = self.requests.get(name)
            if request is not None and (options := self._options(request)).lossless:
                # Only the proposals of a whole window count, and only where all tokens before it were kept.
                kept = len(model_runner_output.sampled_token_ids[index])
                request.sdlm_has_drafts = kept and kept - 1 == len(canvases.get(name, ())) - options.n
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self, spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *_: Any, **__: Any
    ) -> SpecDecodingStats | None:
        """Counts a pass like speculative decoding: its first token is no draft."""
        if not self.log_stats or not num_accepted_tokens:
            return spec_decoding_stats
        stats = spec_decoding_stats or SpecDecodingStats.new(self.num_spec_tokens)
        stats.observe_draft(num_draft_tokens=num_draft_tokens - 1, num_accepted_tokens=num_accepted_tokens - 1)
        return stats

    def _hold_prompt_scores(self, output: Any) -> None:
        """Those of a prompt come from the step that ends it, and vLLM sends them with a token: that of a later step."""
        for name, index in output.req_id_to_index.items():
            request: Any = self.requests.get(name)
            for field in ("prompt_logprobs_dict", "prompt_token_id_logprobs_dict"):
                scores = getattr(output, field)
                if request is not None and name in scores:
                    setattr(request, f"sdlm_{field}", scores.pop(name))
                if output.sampled_token_ids[index] and hasattr(request, f"sdlm_{field}"):
                    scores[name] = request.__dict__.pop(f"sdlm_{field}")

    def _options(self, request: Request) -> WindowOptions:
        params = request.sampling_params
        return read_options(params and params.extra_args, self.defaults, self.canvas.most)

    def _rows(self, request: Any) -> int:
        options, total = self._options(request), np.int64(request.num_tokens)
        drafts = self.canvas.drafts(total, options.n) if getattr(request, "sdlm_has_drafts", False) else 0
        return int(self.canvas.rows(total, options.n, options.lossless, drafts))

    def _update_request_with_output(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        options = self._options(request)
        limit, self.max_model_len = self.max_model_len, self.canvas.limit(options.n, options.lossless)
        try:
            return super()._update_request_with_output(request, *args, **kwargs)
        finally:
            self.max_model_len = limit

    def _count_clean_blocks_only(self) -> None:
        """Prefix caching: other requests may share only blocks that no later pass of this one writes.

        A pass kept at most `most` tokens, and the one before them is written again; what lies further back is clean. A
        request that adopts blocks feeds its own last tokens again, so these must not be among them either.
        """
        coordinator, most = self.kv_cache_manager.coordinator, self.canvas.most
        cache_blocks, find = coordinator.cache_blocks, coordinator.find_longest_cache_hit

        def cache_clean(request: Request, num_computed_tokens: int, *args: Any, **kwargs: Any) -> Any:
            return cache_blocks(
                request, max(0, min(num_computed_tokens, request.num_tokens - 1 - most)), *args, **kwargs
            )

        def find_shorter(block_hashes: Any, max_cache_hit_length: int, *args: Any, **kwargs: Any) -> Any:
            return find(block_hashes, max(0, max_cache_hit_length - most), *args, **kwargs)

        coordinator.cache_blocks, coordinator.find_longest_cache_hit = cache_clean, find_shorter
