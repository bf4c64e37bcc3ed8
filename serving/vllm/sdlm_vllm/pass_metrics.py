"""Prometheus counters of passes and tokens, on the /metrics page of vLLM's server."""

from typing import Any

import prometheus_client
from vllm.v1.metrics.loggers import StatLoggerBase

from sdlm_vllm.folder_parser import ARCHITECTURES

LABELS = ("model_name", "engine")


class PassCounter(StatLoggerBase):
    """Loaded by vLLM in its server (entry point `vllm.stat_logger_plugins`); counts nothing for other models.

    Tokens per pass: rate(sdlm:tokens_total[5m]) / rate(sdlm:passes_total[5m]).
    """

    counters: tuple[prometheus_client.Counter, prometheus_client.Counter] | None = None

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.active = bool(set(ARCHITECTURES.values()) & set(vllm_config.model_config.architectures))
        if self.active and PassCounter.counters is None:
            PassCounter.counters = (
                prometheus_client.Counter("sdlm:passes", "Passes of requests: one per canvas.", LABELS),
                prometheus_client.Counter("sdlm:tokens", "Generated tokens.", LABELS),
            )
        if self.active and PassCounter.counters:
            # Now, because a counter of several processes is on the page only where it has labels.
            labels = vllm_config.model_config.served_model_name, str(engine_index)
            self.passes, self.tokens = (counter.labels(*labels) for counter in PassCounter.counters)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called by vLLM after each step."""
        if not self.active:
            return
        if scheduler_stats is not None and scheduler_stats.spec_decoding_stats is not None:
            self.passes.inc(scheduler_stats.spec_decoding_stats.num_drafts)
        if iteration_stats is not None:
            self.tokens.inc(iteration_stats.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
