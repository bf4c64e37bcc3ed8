"""Prepares the engine for an SDLM folder, or refuses what cannot work."""

from functools import wraps
from typing import Any

import torch
from vllm import envs
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.utils.torch_utils import is_quantized_kv_cache

from sdlm_vllm.canvas import Canvas
from sdlm_vllm.folder_parser import ARCHITECTURES
from sdlm_vllm.request_options import ALGORITHMS, RequestRules
from sdlm_vllm.settings import LOSSLESS_UNTRAINED, SDLMSettings, SettingError, lossless_fault

logger = init_logger(__name__)

CHECKS = "sdlm_vllm.request_options:RequestRules"
"""The only entry of `logits_processors`, which vLLM would otherwise ignore with this plugin's sampler."""
SCHEDULER = "sdlm_vllm.canvas_scheduler.CanvasScheduler"


def folder_settings(model_config: Any) -> SDLMSettings:
    """SDLM's settings in config.json and generation_config.json, as overridden on the command line."""
    generation = model_config.try_get_generation_config() | model_config.override_generation_config
    settings = SDLMSettings.from_config_json(model_config.hf_config.to_dict(), generation)
    if settings is None:
        raise SettingError("the model is no SDLM", "config.json", "block_size")
    return settings


def served_canvas(vllm_config: Any) -> Canvas:
    """Layout of the passes of this engine; after SDLMEngineRules."""
    settings, model_config = folder_settings(vllm_config.model_config), vllm_config.model_config
    most = vllm_config.diffusion_config.canvas_length // 2
    return Canvas(most, settings.causal_attn, settings.target_shift, model_config.max_model_len)


class SDLMEngineRules(VerifyAndUpdateConfig):
    """Settings of the engine that SDLM needs."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Called once by vLLM, before the engine starts.

        Raises:
            ValueError: an option of the engine that SDLM's passes do not work with.
        """
        from vllm.config.diffusion import DiffusionConfig

        model = vllm_config.model_config
        settings = folder_settings(model)
        _check_algorithm(settings)
        asked = vllm_config.diffusion_config
        if asked and asked.max_denoising_steps is not None:
            raise ValueError("--diffusion-config: SDLM does not support max_denoising_steps; leave it out")
        if asked is None or asked.canvas_length is None:
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=2 * max(settings.block_size, settings.window))
        canvas_length, least = vllm_config.diffusion_config.canvas_length, 2 * settings.window
        if canvas_length % 2 or canvas_length < least:
            raise ValueError(
                f"--diffusion-config: canvas_length is {canvas_length}, expected an even number, at least {least}: "
                "twice the folder's window sdlm_n"
            )
        _refuse_engine_options(vllm_config)
        _refuse_calls()
        scheduler, canvas = vllm_config.scheduler_config, served_canvas(vllm_config)
        scheduler.async_scheduling = False
        scheduler.scheduler_cls = SCHEDULER
        _limit_requests(scheduler, canvas)
        # The answer of the folder's own `generate` is greedy; vLLM would sample at temperature 1.
        generation = model.try_get_generation_config()
        if not generation.get("do_sample") and "temperature" not in generation:
            model.override_generation_config.setdefault("temperature", 0.0)
        RequestRules.served = settings, canvas.most
        model.logits_processors = [CHECKS]
        if not settings.causal_attn:
            _choose_attention(vllm_config)
        mode = vllm_config.compilation_config.cudagraph_mode
        if mode is None or mode.has_full_cudagraphs():
            # A full graph would record one shape of attention; a step has up to two rows of it for each request.
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
        logger.info(
            "SDLM: %s, windows of %d tokens, threshold %g; a canvas has at most %d tokens",
            settings.alg,
            settings.window,
            settings.threshold,
            canvas.width,
        )


def _check_algorithm(settings: SDLMSettings) -> None:
    """The folder's default. ValueError: it cannot be served."""
    why = f"and vLLM serves {', '.join(ALGORITHMS)}" if settings.alg not in ALGORITHMS else ""
    if settings.alg == "lossless" and (fault := lossless_fault(settings.causal_attn, settings.target_shift)):
        why = f"which {fault}"
    if why:
        raise ValueError(
            f"generation_config.json: sdlm_alg is {settings.alg!r}, {why}. Start with "
            """--override-generation-config '{"sdlm_alg": "prob_conf"}'"""
        )
    if settings.alg == "lossless" and not settings.next_token_weight:
        logger.warning("SDLM: %s", LOSSLESS_UNTRAINED)


def _refuse_engine_options(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    refused = {
        "--speculative-config": vllm_config.speculative_config is not None,
        "--enable-lora (merge the adapter into the folder instead)": vllm_config.lora_config is not None,
        "--async-scheduling": vllm_config.scheduler_config.async_scheduling is True,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "--kv-transfer-config (its keys may not be clean yet)": vllm_config.kv_transfer_config is not None,
        # vLLM turns it into a --kv-transfer-config after these checks
        "--kv-offloading-size": vllm_config.cache_config.kv_offloading_size is not None,
        "--scheduler-cls": vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER),
        "--enable-dbo": parallel.use_ubatching,
        "--enable-prompt-embeds": vllm_config.model_config.enable_prompt_embeds,
        "--return-sampling-mask": vllm_config.model_config.return_sampling_mask,
        "VLLM_USE_RUST_FRONTEND (it does not check requests)": envs.VLLM_USE_RUST_FRONTEND,
        "--logits-processors": {*(vllm_config.model_config.logits_processors or ())} - {CHECKS},
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"SDLM cannot be served with {', '.join(names)}. Leave out.")
    if not vllm_config.use_v2_model_runner:
        raise ValueError("SDLM needs vLLM's second model runner, and that needs Triton; VLLM_USE_V2_MODEL_RUNNER=1")


def _refuse_calls() -> None:
    """Of engines of an SDLM, in the frontend: what sends the engine requests that look like any other."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine.async_llm import AsyncLLM

    def guarded(call: Any, why: str) -> Any:
        @wraps(call)
        def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
            if {*self.model_config.architectures} & {*ARCHITECTURES.values()}:
                raise ValueError(
                    f"SDLM does not support {why}. Leave out, or serve the folder as plain Qwen2: "
                    'VLLM_PLUGINS="" vllm serve …'
                )
            return call(self, *args, **kwargs)

        return refusing

    beams = "beam search: it extends every beam by one token"
    parts = "a prompt in parts: the last tokens of an answer have no keys yet where the next part begins"
    for owner, name, why in (
        (BeamSearchOfflineMixin, "beam_search", beams),
        (BeamSearchOnlineMixin, "beam_search", beams),
        (AsyncLLM, "_add_streaming_input_request", parts),
    ):
        if not hasattr(getattr(owner, name), "__wrapped__"):  # by an engine before, in this process
            setattr(owner, name, guarded(getattr(owner, name), why))


def _limit_requests(scheduler: Any, canvas: Canvas) -> None:
    """As many requests at a time as have a whole canvas in every step."""
    budgets = {
        "--max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "--max-num-scheduled-tokens": scheduler.max_num_scheduled_tokens,
        "--long-prefill-token-threshold": scheduler.long_prefill_token_threshold or None,
    }
    for name, tokens in budgets.items():
        if tokens is not None and tokens < canvas.width:
            raise ValueError(
                f"{name} is {tokens}: a pass of one request has up to {canvas.width} tokens; use at least as many, or "
                "leave out"
            )
    tokens = min(filter(None, (scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens)))
    most = tokens // canvas.width
    if scheduler.max_num_seqs > most:
        logger.info(
            "SDLM: at most %d requests at a time, not %d, %d tokens each; for more, raise --max-num-batched-tokens",
            most,
            scheduler.max_num_seqs,
            canvas.width,
        )
        scheduler.max_num_seqs = most
        if scheduler.max_num_active_seqs is not None:  # vLLM has compared the two before
            scheduler.max_num_active_seqs = min(scheduler.max_num_active_seqs, most)


def _choose_attention(vllm_config: Any) -> None:
    """A backend that takes causal and two-way rows in one batch: on a GPU FlashAttention 4 or Triton."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return
    from vllm.v1.attention.backends.fa_utils import is_fa_version_supported
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    cache = vllm_config.cache_config.cache_dtype
    if cache == "int4_per_token_head":
        raise ValueError(f"--kv-cache-dtype {cache}: its attention is causal, and a window is not; use fp8")
    attention, model = vllm_config.attention_config, vllm_config.model_config
    flash, triton = AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN
    chosen = {attention.backend, *attention.backend_per_kind.values()} - {None}
    if wrong := sorted(backend.name for backend in chosen - {flash, triton}):
        raise ValueError(f"--attention-backend {wrong[0]}: a window needs FLASH_ATTN or TRITON_ATTN")
    version_4 = (
        is_fa_version_supported(4)
        and attention.flash_attn_version in (None, 4)
        # else vLLM falls back to version 2, or has no FlashAttention
        and model.get_head_size() <= 128
        and model.dtype != torch.float32
        and not envs.VLLM_BATCH_INVARIANT
    )
    if flash in chosen and not version_4:
        raise ValueError(
            "--attention-backend FLASH_ATTN: a window needs its version 4, which takes heads up to 128 in 16 bits, on "
            "newer GPUs; use TRITON_ATTN"
        )
    if attention.backend is None:  # vLLM's own choice may be FlashInfer
        attention.backend = flash if version_4 and not is_quantized_kv_cache(cache) else triton
    if version_4:
        attention.flash_attn_version = 4
