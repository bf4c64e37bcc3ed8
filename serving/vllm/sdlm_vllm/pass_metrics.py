"""Prometheus counters of passes and tokens, on the /metrics page of vLLM's server."""

from typing import Any

import prometheus_client
from vllm.v1.metrics.loggers import StatLoggerBase

from sdlm_vllm.served_config import ARCHITECTURES

LABELS = ("model_name", "engine")


class PassCounter(StatLoggerBase):
    """Loaded by vLLM in its server (entry point `vllm.stat_logger_plugins`); counts nothing for other models.

    Tokens per pass: rate(sdlm:tokens_total[5m]) / rate(sdlm:passes_total[5m]).
    """

    counters: tuple[prometheus_client.Counter, prometheus_client.Counter] | None = None

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.active = bool(set(ARCHITECTURES.values()) & set(vllm_config.model_config.architectures))
        self.labels = (vllm_config.model_config.served_model_name, str(engine_index))
        if self.active and PassCounter.counters is None:
            PassCounter.counters = (
                prometheus_client.Counter("sdlm:passes", "Passes of requests: one per canvas.", LABELS),
                prometheus_client.Counter("sdlm:tokens", "Generated tokens.", LABELS),
            )

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called by vLLM after each step."""
        if not self.active or self.counters is None:
            return
        passes, tokens = (counter.labels(*self.labels) for counter in self.counters)
        if scheduler_stats is not None and scheduler_stats.spec_decoding_stats is not None:
            passes.inc(scheduler_stats.spec_decoding_stats.num_drafts)
        if iteration_stats is not None:
            tokens.inc(iteration_stats.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
