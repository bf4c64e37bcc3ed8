"""Folders and engine options that cannot be served say so before the engine starts; others change what it serves."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_runs
import pytest
import sdlm_vllm
import torch
from served_models import Asked, edit_json, generated, make_folder
from vllm.engine.arg_utils import EngineArgs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "hf")


def configured(folder: Path, **options: Any) -> Any:
    """The engine's configuration, as at the start of a server."""
    return EngineArgs(model=str(folder), **{"dtype": "float32"} | options).create_engine_config()


def test_a_folder_is_recognized_without_any_option(folder: Path) -> None:
    fewer = {"max_num_batched_tokens": 2048, "max_num_scheduled_tokens": 1600, "max_num_active_seqs": 250}
    config = configured(folder, max_num_seqs=256, diffusion_config={}, **fewer)
    assert config.model_config.architectures == ["SDLMQwen2ForCausalLM"]
    assert config.diffusion_config.canvas_length == 8 and not config.scheduler_config.async_scheduling
    assert (config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_active_seqs) == (200, 200)


def test_lost_or_wrong_settings_are_named(folder: Path) -> None:
    edit_json(folder / "config.json", "text_mask_token_id")
    with pytest.raises(ValueError, match="text_mask_token_id"):
        configured(folder)
    edit_json(folder / "config.json", "block_size")
    with pytest.raises(ValueError, match="field 'block_size' is missing.*Copy block_size"):
        configured(folder)


def test_a_family_without_a_class_in_vllm_is_named(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="smollm3")
    with pytest.raises(ValueError, match="serves model_type qwen2, qwen3, llama, mistral, not 'smollm3'"):
        configured(folder)


def test_a_folder_that_is_no_sdlm_is_served_as_ever(folder: Path) -> None:
    edit_json(folder / "config.json", "block_size", "auto_map", "text_mask_token_id", "text_mask_token", "causal_attn")
    config = configured(folder)
    assert config.model_config.architectures == ["Qwen2ForCausalLM"] and config.diffusion_config is None


def test_another_version_of_vllm_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That lacks modules of 0.32, too."""
    monkeypatch.setattr("vllm.__version__", "0.41.0")
    with monkeypatch.context() as older:
        older.setitem(sys.modules, "vllm.v1.worker.gpu.sample.logits_processor", None)
        for name in ("served_config", "request_options"):
            older.delitem(sys.modules, f"sdlm_vllm.{name}", raising=False)
        sdlm_vllm.register()
    with pytest.raises(ValueError, match=r"vLLM 0\.32\.\*, and this is 0\.41\.0.*VLLM_PLUGINS"):
        configured(folder)
    edit_json(folder / "config.json", "block_size", "auto_map")
    assert configured(folder).model_config.architectures == ["Qwen2ForCausalLM"]


def test_without_the_plugin_the_folder_is_plain_qwen2(folder: Path) -> None:
    code = "import sys; from vllm.engine.arg_utils import EngineArgs as A; "
    code += "print(A(model=sys.argv[1]).create_engine_config().model_config.architectures)"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "['Qwen2ForCausalLM']" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "--enable-lora"),
        ({"async_scheduling": True}, "--async-scheduling"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"logits_processors": ["a_module:Processor"]}, "--logits-processors"),
        ({"scheduler_cls": "a_module.Scheduler"}, "--scheduler-cls"),
        ({"ubatch_size": 2}, "--enable-dbo"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"return_sampling_mask": True}, "--return-sampling-mask"),
        ({"diffusion_config": {"max_denoising_steps": 4}}, "max_denoising_steps"),
        ({"diffusion_config": {"canvas_length": 9}}, "canvas_length is 9, expected an even number, at least 8"),
        ({"diffusion_config": {"canvas_length": 6}}, "canvas_length is 6, expected an even number, at least 8"),
        ({"max_num_batched_tokens": 6, "max_num_seqs": 2}, "--max-num-batched-tokens is 6"),
        ({"max_num_scheduled_tokens": 7}, "--max-num-scheduled-tokens is 7"),
        ({"override_generation_config": {"sdlm_alg": "self_speculative"}}, "self_speculative"),
        (
            {"override_generation_config": {"sdlm_alg": "lossless"}},
            "'lossless', which needs a model trained with causal",
        ),
        ({"override_generation_config": {"sdlm_threshold": 3}}, "sdlm_threshold is 3"),
    ],
)
def test_engine_options_that_do_not_fit_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(folder, max_model_len=64, **options)


def test_calls_that_do_not_check_requests_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    engine: Any = SimpleNamespace(model_config=configured(folder).model_config)
    with pytest.raises(ValueError, match="SDLM does not support a prompt in parts"):
        AsyncLLM._add_streaming_input_request(engine, "name", None, None)  # type: ignore[arg-type]
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND"):
        configured(folder)


@pytest.mark.parametrize(
    ("has_version_4", "cache", "asked", "chosen"),
    [
        (True, "auto", {}, ("FLASH_ATTN", 4)),
        (True, "fp8", {}, ("TRITON_ATTN", 4)),
        (False, "auto", {}, ("TRITON_ATTN", None)),
        (True, "auto", {"backend": "TRITON_ATTN"}, ("TRITON_ATTN", 4)),
        (True, "auto", {"flash_attn_version": 3}, ("TRITON_ATTN", 3)),
        (True, "int4_per_token_head", {}, "int4_per_token_head"),
        (True, "auto", {"backend": "FLASH_ATTN", "flash_attn_version": 3}, "needs its version 4"),
        (False, "auto", {"backend": "FLASH_ATTN"}, "needs its version 4"),
        (True, "auto", {"backend": "FLASHINFER"}, "FLASHINFER: a window needs"),
        (True, "auto", {"backend_per_kind": {"full_attention": "FLASHINFER"}}, "FLASHINFER: a window needs"),
    ],
)
def test_attention_on_a_gpu_takes_both_kinds_of_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, has_version_4: bool, cache: str, asked: dict[str, Any], chosen: Any
) -> None:
    from sdlm_vllm.served_config import _choose_attention
    from vllm.config.attention import AttentionConfig
    from vllm.platforms import current_platform

    config = configured(folder, dtype="bfloat16")
    config.attention_config, config.cache_config.cache_dtype = AttentionConfig(**asked), cache
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    monkeypatch.setattr("vllm.v1.attention.backends.fa_utils.is_fa_version_supported", lambda _: has_version_4)
    if isinstance(chosen, str):
        with pytest.raises(ValueError, match=chosen):
            _choose_attention(config)
        return
    _choose_attention(config)
    assert (config.attention_config.backend.name, config.attention_config.flash_attn_version) == chosen
    config.model_config.dtype, config.attention_config = torch.float32, AttentionConfig()
    _choose_attention(config)
    assert config.attention_config.backend.name == "TRITON_ATTN"


def test_a_larger_window_is_served_with_a_larger_canvas(folder: Path) -> None:
    llm = engine_runs.start(folder, diffusion_config={"canvas_length": 16})
    asked = Asked([1, 2, 3], 20, {"sdlm_n": 8, "sdlm_threshold": 0.02})
    answers = engine_runs.run(llm, [asked])
    assert (answers.tokens[0], answers.accepted[0]) == generated(folder, asked)


def test_an_automatic_length_is_that_of_the_scheduler(folder: Path) -> None:
    llm = engine_runs.start(folder, max_model_len=-1, num_gpu_blocks_override=4)
    most = llm.model_config.max_model_len
    assert most < 2048
    (canvas,) = llm.collective_rpc(lambda worker: worker.model_runner.model_state.canvas)
    assert canvas == llm.llm_engine.engine_core.engine_core.scheduler.canvas
    answers = engine_runs.run(llm, [Asked([5, 6, 7], 500, {"sdlm_n": n}) for n in (4, 1)], ignore_eos=True)
    assert [3 + len(tokens) for tokens in answers.tokens] == [most - 2 * 4 + 1, most]
