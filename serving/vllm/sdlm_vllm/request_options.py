"""Options of a request: read from `SamplingParams.extra_args`, which OpenAI clients set as `vllm_xargs`.

Imported by the frontend too, so nothing here imports torch.
"""

from dataclasses import dataclass
from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from sdlm_vllm.settings import MOST_BLOCK, SDLMSettings, lossless_fault

ALGORITHMS = ("prob_conf", "entropy_conf", "lossless", "ar")
NAMES = ("sdlm_alg", "sdlm_n", "sdlm_threshold", "sdlm_product")


@dataclass(frozen=True)
class WindowOptions:
    """How the passes of a request choose their tokens; the fields are named as in `generate`, without `sdlm_`."""

    alg: str
    n: int
    """Proposed tokens per pass; 1 with the algorithm `ar`."""
    threshold: float
    product: bool

    @property
    def lossless(self) -> bool:
        """Whether passes verify drafts; a window of one token has none."""
        return self.alg == "lossless" and self.n > 1


def read_options(extra: dict[str, Any] | None, defaults: SDLMSettings, most: int) -> WindowOptions:
    """Options of a request, with the folder's where it has none.

    Raises:
        ValueError: an unknown name, a value out of range, or a window larger than `most`.
    """
    given = {name: value for name, value in (extra or {}).items() if name.startswith("sdlm_") and value is not None}
    if unknown := sorted(given.keys() - set(NAMES)):
        fix = "use `seed`" if unknown == ["sdlm_seed"] else f"the options are {', '.join(NAMES)}"
        raise ValueError(f"{unknown[0]} is no option of a request; {fix}")
    alg = given.get("sdlm_alg", defaults.alg)
    if alg not in ALGORITHMS:
        verifies = alg == "self_speculative"
        why = " (a window behind each draft needs key slots that vLLM does not have)" if verifies else ""
        raise ValueError(f"sdlm_alg must be one of {', '.join(ALGORITHMS)}, got {alg!r:.60}{why}")
    if alg == "lossless" and (fault := lossless_fault(defaults.causal_attn, defaults.target_shift)):
        raise ValueError(f"sdlm_alg 'lossless' {fault}; use prob_conf")
    n, threshold = given.get("sdlm_n", defaults.window), given.get("sdlm_threshold", defaults.threshold)
    if isinstance(n, float) and n.is_integer():
        n = int(n)  # `vllm_xargs` may turn numbers into floats
    if type(n) is not int or not 1 <= n <= MOST_BLOCK:
        raise ValueError(f"sdlm_n must be a whole number from 1 to {MOST_BLOCK}, got {n!r:.60}")
    if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
        raise ValueError(f"sdlm_threshold must be a number from 0 to 1, got {threshold!r:.60}")
    product = given.get("sdlm_product", defaults.product)
    if product not in (0, 1):
        raise ValueError(f"sdlm_product must be true or false, got {product!r:.60}")
    n = 1 if alg == "ar" else n
    if n > most:
        fix = f"""start the server with --diffusion-config '{{"canvas_length": {2 * n}}}'"""
        raise ValueError(f"sdlm_n is {n}, and the windows of this server have at most {most} tokens; {fix}")
    return WindowOptions(alg, n, float(threshold), bool(product))


def refuse_params(params: Any) -> None:
    """Raises ValueError naming sampling parameters that would be ignored: tokens of a pass are proposed together."""
    refused = {
        "structured_outputs (response_format, guided decoding, tool_choice with a schema)": params.structured_outputs,
        "repetition_penalty": params.repetition_penalty != 1,
        "presence_penalty": params.presence_penalty != 0,
        "frequency_penalty": params.frequency_penalty != 0,
        "bad_words": params.bad_words,
        "thinking_token_budget": params.thinking_token_budget is not None,
        "trace_decode_token_ids": params.trace_decode_token_ids,
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(
            f"SDLM does not support {', '.join(names)}: these depend on the tokens so far, and a pass proposes several "
            'at once. Leave out, or serve the folder as plain Qwen2, one token per pass: VLLM_PLUGINS="" vllm serve …'
        )


class RequestRules(LogitsProcessor):
    """Checks the parameters of requests in the frontend; no processor of logits, but vLLM has no other such hook."""

    served: tuple[SDLMSettings, int] | None = None
    """Defaults of the folder and largest window of the newest engine in this process; set by
    served_config.SDLMEngineRules. vLLM does not say which engine a request is for."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which becomes the HTTP status 400."""
        if cls.served is not None:
            read_options(sampling_params.extra_args, *cls.served)
            refuse_params(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """False: changes no logits."""
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        """The logits unchanged."""
        return logits
