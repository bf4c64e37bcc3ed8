"""Recognizes a folder of `sdlm export`, and prepares the engine for it."""

import json
from functools import wraps
from pathlib import Path
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import HFConfigParser

from sdlm_vllm import wrong_version
from sdlm_vllm.canvas import Canvas
from sdlm_vllm.request_options import ALGORITHMS, RequestRules
from sdlm_vllm.settings import LOSSLESS_UNTRAINED, SDLMSettings, SettingError, lossless_fault

logger = init_logger(__name__)

ARCHITECTURES = {
    "qwen2": "SDLMQwen2ForCausalLM",
    "qwen3": "SDLMQwen3ForCausalLM",
    "llama": "SDLMLlamaForCausalLM",
    "mistral": "SDLMMistralForCausalLM",
}
"""Classes of sdlm_model.py by `model_type`, known to vLLM only: config.json names the stock class, so that other
engines and transformers load the folder."""
CHECKS = "sdlm_vllm.request_options:RequestRules"
"""The only entry of `logits_processors`, which vLLM would otherwise ignore with this plugin's sampler."""


class SDLMFolderParser(HFConfigParser):
    """vLLM's reader of config.json, which sends SDLM folders to this plugin's class and leaves others alone."""

    def parse(self, model: str | Path, *args: Any, **kwargs: Any) -> tuple[dict, Any]:
        """The content of config.json and the configuration made of it.

        Raises:
            ValueError: an SDLM whose settings are lost or wrong, or an SDLM with another version of vLLM.
        """
        values, config = super().parse(model, *args, **kwargs)
        by_class = "SDLMForCausalLM" in json.dumps([values.get("auto_map"), values.get("architectures")])
        if values.get("block_size") is None:
            if by_class:
                raise ValueError(
                    f"{model}/config.json: the class is an SDLM, but the field 'block_size' is missing: the settings "
                    "of the training are lost. Copy block_size, causal_attn, text_mask_token and text_mask_token_id "
                    "from the original export's config.json."
                )
            return values, config
        if not by_class and values.get("text_mask_token_id") is None:
            return values, config  # another model with a field of that name
        if why := wrong_version():
            raise ValueError(why)
        SDLMSettings.from_config_json(values)  # SettingError is a ValueError that names file and field
        if (model_type := values.get("model_type")) not in ARCHITECTURES:
            raise ValueError(
                f"{model}/config.json: sdlm-vllm serves model_type {', '.join(ARCHITECTURES)}, not {model_type!r}; "
                'VLLM_PLUGINS="" vllm serve … serves the folder one token per pass'
            )
        config.update({"architectures": [ARCHITECTURES[model_type]]})
        return values, config


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
        if vllm_config.diffusion_config is None:
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=2 * max(settings.block_size, settings.window))
        _refuse_engine_options(vllm_config)
        _refuse_beam_search()
        scheduler, canvas = vllm_config.scheduler_config, served_canvas(vllm_config)
        scheduler.async_scheduling = False
        scheduler.scheduler_cls = "sdlm_vllm.canvas_scheduler.CanvasScheduler"
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
        "--logits-processors": {*(vllm_config.model_config.logits_processors or ())} - {CHECKS},
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"SDLM cannot be served with {', '.join(names)}. Leave out.")
    if not vllm_config.use_v2_model_runner:
        raise ValueError("SDLM needs vLLM's second model runner, and that needs Triton; VLLM_USE_V2_MODEL_RUNNER=1")


def _refuse_beam_search() -> None:
    """Of engines of an SDLM: vLLM sends a beam search as requests of one token, which look like any other."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    def guarded(search: Any) -> Any:
        @wraps(search)
        def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
            if {*self.model_config.architectures} & {*ARCHITECTURES.values()}:
                raise ValueError(
                    "SDLM does not support beam search: it extends every beam by one token. Leave out, or serve the "
                    'folder as plain Qwen2: VLLM_PLUGINS="" vllm serve …'
                )
            return search(self, *args, **kwargs)

        return beam_search

    for mixin in (BeamSearchOfflineMixin, BeamSearchOnlineMixin):
        if not hasattr(mixin.beam_search, "__wrapped__"):  # by an engine before, in this process
            mixin.beam_search = guarded(mixin.beam_search)  # type: ignore[method-assign]


def _limit_requests(scheduler: Any, canvas: Canvas) -> None:
    """As many requests at a time as have a whole canvas in every step."""
    most = scheduler.max_num_batched_tokens // canvas.width
    threshold = scheduler.long_prefill_token_threshold
    if most < 1 or 0 < threshold < canvas.width:
        raise ValueError(
            f"--max-num-batched-tokens is {scheduler.max_num_batched_tokens} and --long-prefill-token-threshold "
            f"{threshold}: a pass of one request has up to {canvas.width} tokens; use at least as many (0: none)"
        )
    if scheduler.max_num_seqs > most:
        logger.info(
            "SDLM: at most %d requests at a time, not %d, %d tokens each; for more, raise --max-num-batched-tokens",
            most,
            scheduler.max_num_seqs,
            canvas.width,
        )
        scheduler.max_num_seqs = most


def _choose_attention(vllm_config: Any) -> None:
    """A backend that takes causal and two-way rows in one batch: on a GPU FlashAttention 4 or Triton."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return
    from vllm.v1.attention.backends.fa_utils import is_fa_version_supported
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    fits = (None, AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN)
    if attention.backend not in fits:
        raise ValueError(f"--attention-backend {attention.backend.name}: a window needs FLASH_ATTN or TRITON_ATTN")
    if attention.backend != AttentionBackendEnum.TRITON_ATTN and is_fa_version_supported(4):
        attention.flash_attn_version = 4
    elif attention.backend is None:
        attention.backend = AttentionBackendEnum.TRITON_ATTN
    else:
        raise ValueError("--attention-backend FLASH_ATTN: a window needs its version 4; use TRITON_ATTN")
