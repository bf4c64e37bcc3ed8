"""SDLM's decoding for the stock Qwen2ForCausalLM, when it is loaded with `trust_remote_code=True`.

`transformers serve` takes the class that config.json names under `architectures`, not the one of auto_map, and would
silently decode token by token. In the folder this file is custom_generate/generate.py, which transformers calls instead
of that class's `generate`.
"""

from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """`SDLMForCausalLM.generate` for a model of another class."""
    revision = getattr(model.config, "_commit_hash", None)
    sdlm: Any = get_class_from_dynamic_module("modeling_sdlm.SDLMForCausalLM", model.name_or_path, revision=revision)
    return sdlm.generate(model, *args, **kwargs)
