"""SDLM for transformers: the base's weights and forward pass, with decoding of several tokens per pass.

Load with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` and call `generate`. The
folder also loads as plain `Qwen2ForCausalLM`; then `generate` is ordinary next-token decoding.
"""

# ruff: noqa: E402 (the version is checked before anything that an older one lacks is imported)

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import transformers

OLDEST = (4, 57)
"""Older versions load this class but ignore its attention mask, and so generate wrong text silently."""

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"SDLM needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, this is {transformers.__version__}. "
        "Update transformers; or, for next-token decoding, remove the folder's custom_generate and load it as plain "
        "Qwen2ForCausalLM."
    )

from transformers import DynamicCache, GenerationConfig, Qwen2ForCausalLM, StoppingCriteriaList
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)
from transformers.generation.utils import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.utils import ModelOutput, logging

# Put beside this file by the exporter. All of them are named here because transformers 4 copies only what
# this file itself imports, not what those files import.
from .decode import ALGORITHMS, Decoded, decode  # type: ignore[import-not-found]
from .decode_model import TransformersProposer  # type: ignore[import-not-found]  # noqa: F401
from .decode_random import mix64  # type: ignore[import-not-found]  # noqa: F401
from .decode_rules import Warp  # type: ignore[import-not-found]
from .decode_step import Step  # type: ignore[import-not-found]  # noqa: F401
from .settings import LOSSLESS_UNTRAINED, MOST_BLOCK, SDLMSettings  # type: ignore[import-not-found]

logger = logging.get_logger(__name__)

WARPERS = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "NoBadWordsLogitsProcessor",
    "SequenceBiasLogitsProcessor",
)
"""Logits processors of transformers that depend on the logits of one position only; the last two for single tokens."""


@dataclass
class SDLMOutput(ModelOutput):
    """Result of `generate(..., return_dict_in_generate=True)`.

    sequences: int64 (B, P + new), prompts and answers; shorter answers are padded.
    accepted: per row, the number of tokens accepted in each pass.
    passes: forward passes, including the prefill of a long prompt.
    past_key_values: always empty; for callers that pass it to the next call, as transformers' server does.
    """

    sequences: torch.LongTensor | None = None
    accepted: list[list[int]] | None = None
    passes: int | None = None
    past_key_values: DynamicCache | None = None


@dataclass(frozen=True)
class DecodeOptions:
    """Options of one call of `generate`; their keys in generation_config.json have the prefix `sdlm_`."""

    alg: str
    n: int
    threshold: float
    product: bool
    seed: int | None
    cache_implementation: str | None
    streamer: Any

    def checked(self) -> "DecodeOptions":
        """The options as Python's numbers; ValueError names the first invalid one, its value and the valid ones."""
        whole = isinstance(self.n, Integral) and not isinstance(self.n, bool)
        number = isinstance(self.threshold, Real) and not isinstance(self.threshold, bool)
        rules = {
            "alg": (self.alg in ALGORITHMS, f"one of {', '.join(map(repr, ALGORITHMS))}"),
            "n": (whole and 1 <= self.n <= MOST_BLOCK, f"a whole number from 1 to {MOST_BLOCK}"),
            "threshold": (number and 0 <= self.threshold <= 1, "a number from 0 to 1"),
            "product": (isinstance(self.product, bool | np.bool_), "True or False"),
            "seed": (
                self.seed is None or (isinstance(self.seed, Integral) and abs(int(self.seed)) < 2**62),
                "a whole number of less than 63 bits, or None",
            ),
        }
        for name, (good, choices) in rules.items():
            if not good:
                raise ValueError(f"sdlm_{name} must be {choices}, got {getattr(self, name)!r}")
        seed = None if self.seed is None else int(self.seed)
        return replace(self, n=int(self.n), threshold=float(self.threshold), product=bool(self.product), seed=seed)


# GenerationMixin is named again: without it, transformers derives a new class at each load, which cannot be pickled.
class SDLMForCausalLM(Qwen2ForCausalLM, GenerationMixin):
    """The base's class with block decoding; its config adds block_size, causal_attn, text_mask_token(_id)."""

    _auto_class = "AutoModelForCausalLM"  # save_pretrained of transformers 4 then copies this file and what it imports

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        sdlm_alg: str | None = None,
        sdlm_n: int | None = None,
        sdlm_threshold: float | None = None,
        sdlm_product: bool | None = None,
        sdlm_seed: int | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generates like transformers, with five more options, each also read from generation_config.

        Args:
            sdlm_alg: "prob_conf" (default) or "entropy_conf": accept tokens by confidence; "self_speculative": draft
                and verify, with the text of one token per pass; "ar": transformers' own next-token decoding;
                "lossless", for models trained with causal_attn: the text, or the distribution, of "ar" by drafts.
            sdlm_n: tokens proposed per pass; default block_size.
            sdlm_threshold: confidence, 0 to 1, that an accepted token must exceed; default 0.9.
            sdlm_product: apply the threshold to the product of the confidences of all accepted tokens.
            sdlm_seed: seed for do_sample; row b uses seed + b. Default: torch's generator.

        Sampling (temperature, top_k, top_p, min_p, …), suppress_tokens, remove_invalid_values, bad words of one token,
        stop_strings with tokenizer, stopping criteria that depend on the tokens only, num_return_sequences, max_time
        and a streamer for one row work as usual.
        `cache_implementation="static"` gives all passes the same shapes, and compiles them on a GPU. Logits processors
        that depend on earlier tokens (repetition_penalty, no_repeat_ngram_size, …), beams, assistants and output_scores
        raise ValueError; `sdlm_alg="ar"` supports them.
        """
        stored = (generation_config, self.generation_config)
        defaults = SDLMSettings.from_config_json(self.config.to_dict())
        if defaults is None:
            raise ValueError(
                "config.json has no block_size: the settings of the training are lost. Copy block_size, causal_attn, "
                "text_mask_token, text_mask_token_id from the original export's config.json, or load Qwen2ForCausalLM."
            )
        settings = DecodeOptions(
            _first(sdlm_alg, stored, "sdlm_alg", defaults.alg),
            _first(sdlm_n, stored, "sdlm_n", defaults.window),
            _first(sdlm_threshold, stored, "sdlm_threshold", defaults.threshold),
            _first(sdlm_product, stored, "sdlm_product", defaults.product),
            _first(sdlm_seed, stored, "sdlm_seed", None),
            _first(kwargs.get("cache_implementation"), stored, "cache_implementation", None),
            streamer,
        ).checked()
        stock: Any = GenerationMixin.generate  # not super(): a stock model comes here too, see custom_generate.py
        if settings.alg == "ar":
            return stock(self, inputs, generation_config, streamer=streamer, tokenizer=tokenizer, **kwargs)
        _refuse_arguments(self, kwargs, stored, settings.cache_implementation)
        if settings.cache_implementation is not None:  # transformers would prepare a cache of its own
            kwargs["cache_implementation"] = None
        stop_strings = _first(kwargs.get("stop_strings"), stored, "stop_strings", None)
        if stop_strings is not None:  # transformers loses the tokenizer on the way to custom code
            kwargs["stop_strings"] = None
            kwargs["stopping_criteria"] = _with_stop_strings(kwargs.get("stopping_criteria"), stop_strings, tokenizer)
        with _without_checkpointing(self):
            return stock(self, inputs, generation_config, custom_generate=_sdlm, sdlm_settings=settings, **kwargs)

    @property
    def loss_function(self) -> Any:
        """The loss of `forward(labels=…)`: transformers' next-token loss, with a warning."""
        if not hasattr(self, "_loss_function"):
            logger.warning_once(
                "forward(labels=…) computes the plain next-token loss, not the loss over blocks that SDLM is trained "
                "with; training with it alone does not train the proposal of several tokens per pass."
            )
        return super().loss_function

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """None: the folder's custom_generate is for the stock class."""
        raise OSError(f"{type(self).__name__} decodes by itself")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: it bypasses `generate` and would silently decode token by token."""
        raise NotImplementedError(
            "continuous batching bypasses SDLM's decoding; use generate(), or load as Qwen2ForCausalLM"
        )


def _first(argument: Any, stored: tuple[Any, ...], name: str, default: Any) -> Any:
    """The first value that is set: argument, the caller's generation_config, the folder's, default."""
    candidates = (argument, *(getattr(config, name, None) for config in stored))
    return next((value for value in candidates if value is not None), default)


def _refuse(what: list[str]) -> None:
    """Raises ValueError naming every unsupported option: ignoring one would silently give a wrong answer."""
    if what:
        raise ValueError(f"SDLM's decoding does not support {', '.join(what)}. Leave out, or pass sdlm_alg='ar'.")


def _refuse_arguments(model: Any, kwargs: dict[str, Any], stored: tuple[Any, ...], cache_implementation: Any) -> None:
    names = ("assistant_model", "custom_generate", "inputs_embeds", "position_ids", "synced_gpus")
    bad = [name for name in names if kwargs.get(name) is not None and kwargs[name] is not False]
    if _first(kwargs.get("token_healing"), stored, "token_healing", False):
        bad.append("token_healing")
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        bad.append("past_key_values that hold tokens")
    if cache_implementation not in (None, "dynamic", "dynamic_full", "static"):
        bad.append(f"cache_implementation={cache_implementation!r}")
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    several = sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if several and kwargs.get("synced_gpus") is not False:
        raise ValueError(
            "SDLM's decoding does not support synced_gpus, which ZeRO-3 and FSDP imply on several ranks: gather the "
            "parameters, or make as many passes on all ranks, and pass synced_gpus=False; or pass sdlm_alg='ar'"
        )
    _refuse(bad)


def _refuse_configured(config: Any, processors: list[Any], criteria: list[Any]) -> None:
    mode = config.get_generation_mode()
    bad = [f"num_beams={config.num_beams}"] if (config.num_beams or 1) > 1 else []
    if not bad and mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        bad.append(mode.value)
    flags = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    bad += [name for name in flags if getattr(config, name, None)]
    bad += [type(item).__name__ for item in processors if not _of_one_position(item)]
    bad += [type(item).__name__ for item in criteria if isinstance(item, ConfidenceCriteria)]
    _refuse(bad)


def _of_one_position(processor: Any) -> bool:
    """Whether a processor depends on the logits of one position only, not on the tokens before it."""
    biases = getattr(processor, "sequence_bias", {})
    return type(processor).__name__ in WARPERS and all(len(sequence) == 1 for sequence in biases)


@contextmanager
def _without_checkpointing(model: Any) -> Iterator[None]:
    """Switches gradient checkpointing off: in train mode it takes a layer's cache away, to save gradients' memory."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in layers:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in layers:
            module.gradient_checkpointing = True


def _with_stop_strings(criteria: Any, strings: Any, tokenizer: Any) -> StoppingCriteriaList:
    if tokenizer is None:
        raise ValueError(f"stop_strings={strings!r} needs tokenizer=…, the model's tokenizer")
    return StoppingCriteriaList([*(criteria or ()), StopStringCriteria(tokenizer, strings)])


def _warp(processors: list[Any]) -> Warp:
    together: Any = LogitsProcessorList(processors)
    no_tokens = torch.zeros(0, 0, dtype=torch.long)
    return lambda logits: together(no_tokens, logits)


def _stop(criteria: list[Any]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    together: Any = StoppingCriteriaList(criteria)
    return (lambda tokens: together(tokens, None)) if criteria else None


def _sdlm(  # called by transformers' generate; a parameter named attention_mask would break that call
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    sdlm_settings: Any = None,
    **model_kwargs: Any,
) -> Any:
    settings, processors, criteria = sdlm_settings, list(logits_processor or ()), list(stopping_criteria or ())
    _refuse_configured(generation_config, processors, criteria)
    if model.device.type != "meta":  # of an offloaded embedding
        input_ids = input_ids.to(model.device)
    streamer = settings.streamer
    if streamer is not None:
        if len(input_ids) > 1:
            raise ValueError(f"a streamer shows one answer, these are {len(input_ids)}: pass one prompt, one sequence")
        streamer.put(input_ids.cpu())
    ends = [token for c in criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.flatten().tolist()]
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    trained = SDLMSettings.from_config_json(model.config.to_dict())
    if settings.alg == "lossless" and not trained.next_token_weight:
        logger.warning_once(LOSSLESS_UNTRAINED)
    pad = generation_config.pad_token_id
    pad = pad if pad is not None else (ends or [0])[0]
    result = decode(
        model,
        input_ids,
        window=settings.n,
        max_new_tokens=min(generation_config.max_length, *lengths) - input_ids.shape[1],
        alg=settings.alg,
        threshold=settings.threshold,
        product=settings.product,
        eos_token_ids=ends,
        attention_mask=model_kwargs.get("attention_mask"),
        **trained.decode_options,
        warp=_warp(processors) if processors else None,
        sample=bool(generation_config.do_sample),
        seed=settings.seed,
        stop=_stop([c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]),
        pad_token_id=pad if ends else None,
        use_cache=generation_config.use_cache is not False,
        fixed_shape=_fixed_shape(settings, generation_config, model),
        on_tokens=None if streamer is None else lambda _, ids: streamer.put(torch.tensor(ids)),
    )
    if streamer is not None:
        streamer.end()
    return _output(input_ids, result, pad, generation_config)


def _fixed_shape(settings: DecodeOptions, config: Any, model: Any) -> bool | Callable[[Any], Any]:
    """Whether all passes have one shape; on a GPU the compiler that turns them into CUDA graphs, as in transformers."""
    places = {*map(str, getattr(model, "hf_device_map", {}).values())}
    offloaded = len(places) > 1 and places & {"cpu", "disk"}
    plain = not offloaded and getattr(getattr(model, "hf_quantizer", None), "is_compileable", True)
    if settings.cache_implementation != "static" or model.device.type != "cuda" or config.disable_compile or not plain:
        return settings.cache_implementation == "static"
    return partial(torch.compile, mode="reduce-overhead", dynamic=False)


def _output(input_ids: torch.Tensor, result: Decoded, pad: int, config: Any) -> Any:
    longest = max(len(row) for row in result.tokens)
    new = torch.tensor([row + [pad] * (longest - len(row)) for row in result.tokens], device=input_ids.device)
    sequences = torch.cat([input_ids, new], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return SDLMOutput(
        sequences=sequences,  # type: ignore[arg-type]
        accepted=result.accepted,
        passes=result.passes + result.prefill_passes,
        past_key_values=DynamicCache(),
    )
