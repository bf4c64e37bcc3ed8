"""SDLM served by vLLM: several tokens per forward pass, as a plugin (entry point `vllm.general_plugins`).

A folder of `sdlm export` is served as it is. vLLM calls `register` in each of its processes; what follows from it:

- folder_parser.py recognizes such a folder;
- served_config.py prepares the engine for it, or refuses what cannot work;
- request_options.py reads and checks the options of a request;
- canvas_scheduler.py reserves a canvas, the tokens of a pass, for each request in each step;
- sdlm_model.py gives every request the attention of canvas.py; window_sampler.py keeps the confident tokens.
"""

SUPPORTED = "0.32"
"""Minor version of vLLM that the plugin was written for: most of what it builds on is no stable interface."""


def wrong_version() -> str:
    """Why the installed vLLM cannot serve an SDLM, and the way out; empty if it can."""
    import vllm

    if vllm.__version__.startswith(f"{SUPPORTED}."):
        return ""
    return (
        f"sdlm-vllm serves SDLM folders with vLLM {SUPPORTED}.*, and this is {vllm.__version__}. Install "
        f"'vllm=={SUPPORTED}.*', or a version of sdlm-vllm for it; or serve the folder as plain Qwen2, one token per "
        'pass: VLLM_PLUGINS="" vllm serve …'
    )


def register() -> None:
    """Called by vLLM, possibly several times in one process."""
    from vllm.transformers_utils import config as hf

    from sdlm_vllm.folder_parser import ARCHITECTURES, SDLMFolderParser

    # Not `register_config_parser`: it warns about replacing a parser, in every process.
    hf._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = SDLMFolderParser
    if wrong_version():
        return  # the parser refuses SDLM folders; other models are served as ever
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from sdlm_vllm.served_config import SDLMEngineRules

    for name in ARCHITECTURES.values():
        MODELS_CONFIG_MAP[name] = SDLMEngineRules
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"sdlm_vllm.sdlm_model:{name}")
