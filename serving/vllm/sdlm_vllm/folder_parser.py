"""Recognizes a folder of `sdlm export`. Of vLLM it imports only what other versions have too, to refuse it there."""

import json
from pathlib import Path
from typing import Any

from vllm.transformers_utils.config import HFConfigParser

from sdlm_vllm import wrong_version
from sdlm_vllm.settings import SDLMSettings

ARCHITECTURES = {
    "qwen2": "SDLMQwen2ForCausalLM",
    "qwen3": "SDLMQwen3ForCausalLM",
    "llama": "SDLMLlamaForCausalLM",
    "mistral": "SDLMMistralForCausalLM",
}
"""Classes of sdlm_model.py by `model_type`, known to vLLM only: config.json names the stock class, so that other
engines and transformers load the folder."""


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
