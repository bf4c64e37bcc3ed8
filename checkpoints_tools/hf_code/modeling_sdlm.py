"""SDLM for transformers: Qwen2's weights and forward pass, with a decoding that yields several tokens a pass.

Load with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` and call `generate`. The
folder also loads as plain `Qwen2ForCausalLM`; then `generate` is ordinary next-token decoding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, Qwen2ForCausalLM
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.utils import ModelOutput

from .decode import Decoded, decode  # type: ignore[import-not-found]  # put beside this file by the exporter

OLDEST = (4, 57)
"""Older versions load this class and then ignore the window's mask: wrong text without a word."""

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"SDLM needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, this is {transformers.__version__}. "
        "Update transformers, or load the folder as plain Qwen2ForCausalLM for next-token decoding."
    )


@dataclass
class SDLMOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    sequences: int64 (B, P + new), prompts and answers, shorter answers filled with the pad token.
    accepted: for each row the tokens it kept in each pass.
    passes: forward passes, a prefill of a long prompt included.
    """

    sequences: torch.LongTensor | None = None
    accepted: list[list[int]] | None = None
    passes: int | None = None


class SDLMForCausalLM(Qwen2ForCausalLM):
    """Qwen2 with block decoding; its config adds block_size, causal_attn, text_mask_token(_id)."""

    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        sdlm_alg: str | None = None,
        sdlm_n: int | None = None,
        sdlm_threshold: float | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generates as transformers does, with three more settings (also read from generation_config).

        Args:
            sdlm_alg: "prob_conf" (several tokens a pass) or "ar" (transformers' own next-token decoding).
            sdlm_n: tokens proposed in one pass; default block_size.
            sdlm_threshold: keep a token when its probability is above this; default 0.9.

        Everything else as in transformers; prob_conf is greedy: sampling, beams, logits processors and
        stopping criteria other than length and end tokens raise ValueError.
        """
        stored = (generation_config, self.generation_config)
        alg = _setting(sdlm_alg, stored, "sdlm_alg", "prob_conf")
        if "inputs" in kwargs:
            input_ids = kwargs.pop("inputs")
        if alg == "ar":
            return super().generate(  # type: ignore[misc]  # the mixin wants a protocol of its own
                input_ids, generation_config, streamer=streamer, **kwargs
            )
        if alg != "prob_conf":
            raise ValueError(f"sdlm_alg must be 'prob_conf' or 'ar', got {alg!r}")
        settings = {
            "window": int(_setting(sdlm_n, stored, "sdlm_n", self.config.block_size)),
            "threshold": float(_setting(sdlm_threshold, stored, "sdlm_threshold", 0.9)),
            "streamer": streamer,
        }
        return super().generate(  # type: ignore[misc]
            input_ids, generation_config, custom_generate=_prob_conf, sdlm_settings=settings, **kwargs
        )


def _setting(given: Any, stored: tuple[Any, ...], name: str, default: Any) -> Any:
    """The first that is set: the argument, the caller's generation_config, the folder's, the default."""
    candidates = (given, *(getattr(config, name, None) for config in stored), default)
    return next(value for value in candidates if value is not None)


def _refuse_unsupported(config: Any, logits_processor: Any, stopping_criteria: Any) -> None:
    """Silence would be a wrong answer: whatever prob_conf cannot honour is named."""
    bad = ["do_sample"] if config.do_sample else []
    counts = {name: getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")}
    bad += [f"{name}={count}" for name, count in counts.items() if count > 1]
    bad += [type(item).__name__ for item in logits_processor or ()]
    known = (MaxLengthCriteria, EosTokenCriteria)
    bad += [type(item).__name__ for item in stopping_criteria or () if not isinstance(item, known)]
    if bad:
        raise ValueError(
            f"sdlm_alg='prob_conf' decodes greedily and does not support: {', '.join(bad)}. "
            "Leave these out or pass sdlm_alg='ar'."
        )


def _token_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _prob_conf(  # called by transformers' generate; a parameter named attention_mask would break that call
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    sdlm_settings: Any = None,
    **model_kwargs: Any,
) -> Any:
    _refuse_unsupported(generation_config, logits_processor, stopping_criteria)
    input_ids = input_ids.to(model.device)
    streamer, eos = sdlm_settings["streamer"], _token_ids(generation_config.eos_token_id)
    if streamer is not None:
        if len(input_ids) > 1:
            raise ValueError("a streamer shows one row: pass one prompt")
        streamer.put(input_ids.cpu())
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError("a cache with tokens in it cannot be continued: pass the whole conversation")
    result = decode(
        model,
        input_ids,
        mask_token_id=model.config.text_mask_token_id,
        window=sdlm_settings["window"],
        threshold=sdlm_settings["threshold"],
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        eos_token_ids=eos,
        attention_mask=model_kwargs.get("attention_mask"),
        causal_attn=bool(model.config.causal_attn),
        on_tokens=None if streamer is None else lambda _, ids: streamer.put(torch.tensor(ids)),
    )
    if streamer is not None:
        streamer.end()
    pad = (_token_ids(generation_config.pad_token_id) or eos or [0])[0]
    return _output(input_ids, result, pad, generation_config.return_dict_in_generate)


def _output(input_ids: torch.Tensor, result: Decoded, pad: int, as_dict: bool) -> Any:
    longest = max(len(row) for row in result.tokens)
    new = torch.tensor([row + [pad] * (longest - len(row)) for row in result.tokens], device=input_ids.device)
    sequences = torch.cat([input_ids, new], dim=1)
    if not as_dict:
        return sequences
    return SDLMOutput(
        sequences=sequences,  # type: ignore[arg-type]
        accepted=result.accepted,
        passes=result.passes + result.prefill_passes,
    )
