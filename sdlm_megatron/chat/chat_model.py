"""A model and tokenizer loaded from a Hugging Face folder, and the answers they give.

Every command that decodes an exported folder loads it here: the chat, the evaluation and the harness adapters.
"""

import difflib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdlm_megatron.chat.template import render, template_file
from sdlm_megatron.config.hardware import default_device, slow_bf16
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM, format_of
from sdlm_megatron.data.tokenizer_identity import has_tokenizer, vocabulary_size
from sdlm_megatron.diffusion.decode import ALGORITHMS, SPECULATIVE, Decoded, LogitsError, Stop, decode
from sdlm_megatron.diffusion.decode_rules import Warp
from sdlm_megatron.diffusion.settings import MOST_BLOCK, MOST_DRAFTS, lossless_fault
from sdlm_megatron.errors import CheckpointError, ConfigError, DataError
from sdlm_megatron.weights.dtypes import PRECISIONS
from sdlm_megatron.weights.hf_config import HFConfig, read_hf_config, warn_of_lost_code
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.tensors import HFAsCheckpoint, is_finite

# Test and description of the valid values of a decoding rule; numpy's numbers are fine, bool is no number.
RULE_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alg": (lambda value: value in ALGORITHMS, f"one of {', '.join(ALGORITHMS)}"),
    "n": (
        lambda value: isinstance(value, Integral) and not isinstance(value, bool) and 1 <= int(value) <= MOST_BLOCK,
        f"an integer from 1 to {MOST_BLOCK}",
    ),
    "threshold": (
        lambda value: isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1,
        "a number between 0 and 1",
    ),
    "product": (lambda value: isinstance(value, bool | np.bool_), "True or False"),
}
Message = Mapping[str, str]
OnPass = Callable[[list[int]], None]  # called after each pass with the tokens that the pass kept


@dataclass(frozen=True)
class DecodingRule:
    """Decoding algorithm and its parameters; the defaults are plain next-token decoding."""

    alg: str = "ar"
    window: int = 1  # n, the tokens proposed in a pass; 1 with "ar"
    # Smallest confidence, exclusive, of a token that is kept. Unused by "ar", "self_speculative" and "lossless".
    threshold: float = 1.0
    # Compare the product of the confidences up to a token with the threshold, not the token's own.
    product: bool = False

    @property
    def name(self) -> str:
        """Short label for tables and figures, such as "prob 0.98, n = 4"."""
        if self.alg == "ar":
            return "n = 1"
        if self.alg in SPECULATIVE:
            return f"{self.alg.replace('_', '-')}, n = {self.window}"
        kind = "prob" if self.alg == "prob_conf" else "entropy"
        return f"{kind} {self.threshold:g}{', product' * self.product}, n = {self.window}"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `diffusion.decode`."""
        return {"alg": self.alg, "window": self.window, "threshold": self.threshold, "product": self.product}

    @property
    def row(self) -> dict[str, Any]:
        """Fields that identify the rule in a result file; the threshold is None for rules without one."""
        threshold = self.threshold if self.alg.endswith("_conf") else None
        return {"alg": self.alg, "n": self.window, "threshold": threshold}


@dataclass(frozen=True)
class AnswerSettings(DecodingRule):
    """A decoding rule together with the length, sampling and stop strings of an answer."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.alg]
        if self.alg != "ar":
            parts.append(f"n = {self.window}")
        if self.alg.endswith("_conf"):
            parts.append(f"threshold {self.threshold:g}{' on the product' * self.product}")
        if self.temperature:
            parts.append(f"temperature {self.temperature:g}")
        return ", ".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `diffusion.decode`, without the stop strings."""
        rest = {"max_new_tokens": self.max_new_tokens, "warp": self._warp(), "seed": self.seed}
        return super().options | rest

    def _warp(self) -> Warp | None:
        """Logits to sample from, by the warpers of transformers in its order; None for greedy decoding."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        if not self.temperature:
            return None
        warpers: list[Any] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(self.top_p))
        return lambda logits: reduce(lambda warped, warper: warper(None, warped), warpers, logits)


@dataclass(frozen=True)
class Answer:
    """One answer, end token included."""

    tokens: list[int]
    accepted: list[int]  # tokens kept in each pass; they add up to len(tokens)
    text: str  # without special tokens
    seconds: float  # from the prompt to the last token
    complete: bool  # False: cut at max_new_tokens, or interrupted
    interrupted: bool = False


@dataclass(frozen=True)
class ChatModel:
    """Model and tokenizer of a folder."""

    folder: Path
    config: HFConfig
    model: Any
    tokenizer: Any
    end_tokens: tuple[int, ...]  # the one that ends a turn comes first

    def describe(self) -> str:
        """Folder, size, dtype and device in one line, with a hint where another dtype would be much faster."""
        count = sum(p.numel() for p in self.model.parameters())
        size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
        kind = f"SDLM, D = {self.config.sdlm.block_size}" if self.config.sdlm else self.config.model_type
        dtype = str(self.model.dtype).removeprefix("torch.")
        slow = slow_bf16() if self.model.dtype == torch.bfloat16 and self.model.device.type == "cpu" else None
        hint = f"; {slow}, fp32 is the faster dtype here" if slow else ""
        return f"{self.folder} ({kind}, {size} parameters, {dtype}, {self.model.device}){hint}"

    def decoding_rule(self, where: str, **requested: Any) -> DecodingRule:
        """The requested rule, completed from the folder's generation_config.json and then from the defaults.

        Args:
            where: where the request came from, for error messages.
            requested: alg, n, threshold, product; None or absent: not requested.

        Raises:
            ConfigError: an invalid value, or an algorithm that a plain model does not support.
        """
        folder = self.config.decoding
        stored = {"alg": folder.alg, "n": folder.window, "threshold": folder.threshold, "product": folder.product}
        values: dict[str, Any] = {}
        for name in stored:
            label, value, source = name, requested.get(name), where
            if value is None:
                label, value, source = f"sdlm_{name}", stored[name], f"{self.folder}/generation_config.json"
            values[name] = value
            valid, expected = RULE_VALUES[name]
            if not valid(value):
                near = difflib.get_close_matches(str(value), ALGORITHMS, 1, 0.5)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise ConfigError(f"{label} is {value!r}", source, f"{hint}use {expected}")
        if values["alg"] != "ar" and not self.config.is_sdlm:
            raise ConfigError(
                f"alg {values['alg']} needs an SDLM folder, this is a plain {self.config.model_type}: "
                "its config.json has no block_size",
                str(self.folder),
                "leave it out (ar is the only algorithm here), or name a folder that was trained as an SDLM",
            )
        window = 1 if values["alg"] == "ar" else int(values["n"])
        if values["alg"] in SPECULATIVE and window > MOST_DRAFTS:
            raise ConfigError(f"n is {window}", where, f"use at most {MOST_DRAFTS} with {values['alg']}")
        if values["alg"] == "lossless" and (fault := lossless_fault(folder.causal_attn, folder.target_shift)):
            raise ConfigError(
                f"alg lossless {fault}", str(self.folder), "use self_speculative, which any SDLM supports"
            )
        return DecodingRule(values["alg"], window, float(values["threshold"]), bool(values["product"]))

    # --- conversations

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to the point where the next answer begins.

        Uses the tokenizer's chat template; a tokenizer without one gets the format of the training data.

        Raises:
            CheckpointError: the template fails, or there is neither a template nor the tokens of ChatML.
            DataError: a text is not valid Unicode.
        """
        for message in messages:
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:
                where, fix = f"the {message['role']} turn", "remove the characters that are half of a surrogate pair"
                raise DataError(f"the text is not valid Unicode: {error.reason}", where, fix) from None
        return self._by_template(messages) if self.tokenizer.chat_template else self._chatml(messages)

    def _by_template(self, messages: Sequence[Message]) -> list[int]:
        tokenizer = self.tokenizer
        text = render(tokenizer.get_chat_template(), messages, tokenizer.special_tokens_map, template_file(self.folder))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _chatml(self, messages: Sequence[Message]) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        chat = format_of(vocabulary.__contains__)
        lacking = any(token not in vocabulary for token in chat.specials)
        if chat.exchanges or lacking:
            lacks = f" and lacks {' or '.join(chat.specials)}" if lacking else ""
            raise CheckpointError(
                f"the tokenizer has no chat template{lacks}",
                str(self.folder),
                "add a chat_template to its tokenizer_config.json",
            )
        ids = [vocabulary[chat.document]] if chat.document else []
        for message in [*messages, {"role": "assistant", "content": ""}]:
            # special tokens are added by id, so that a text which spells <|im_end|> does not end its turn
            ids.append(vocabulary[chat.start])
            if chat.role_end:
                ids += [*self.encode_text(message["role"]), vocabulary[chat.role_end]]
            ids += self.encode_text(chat.encoded(message["role"], message["content"]))
            ending = [vocabulary[chat.end], *self.encode_text(chat.tail)]
            ids += ending
        return ids[: -len(ending)]  # the last turn is the answer

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text; a spelled special token is encoded as ordinary characters."""
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        )

    def default_system(self) -> str | None:
        """The system turn of a conversation that sets none; None where the chat template adds its own."""
        return None if self.tokenizer.chat_template else DEFAULT_SYSTEM

    # --- answers

    def decode(self, input_ids: torch.Tensor, **options: Any) -> Decoded:
        """`diffusion.decode` with the folder's mask token, end tokens and attention of windows; `options` override."""
        folder = {"eos_token_ids": self.end_tokens, **self.config.decoding.decode_options}
        try:
            with torch.inference_mode():
                return decode(self.model, input_ids, **folder | options)
        except LogitsError as error:
            raise CheckpointError(str(error), str(self.folder), "--dtype bf16, or fp32") from None

    def answer(self, ids: Sequence[int], settings: AnswerSettings, on_pass: OnPass) -> Answer:
        """Continues `ids` by SDLM decoding. An interrupt (Ctrl-C) ends the answer early."""
        stop = self.stop_at(settings.stop)
        prompt = torch.tensor([ids], device=self.model.device)

        def run(keep: OnPass) -> None:
            self.decode(prompt, stop=stop, on_tokens=lambda _, tokens: keep(tokens), **settings.options)

        return self._timed(run, settings, on_pass)

    def greedy(self, ids: Sequence[int], settings: AnswerSettings, on_pass: OnPass) -> Answer:
        """Continues `ids` by the greedy `generate` of transformers: same end tokens, stop strings and length."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=list(self.end_tokens) or None,
            pad_token_id=next(iter(self.end_tokens), 0),
            stop_strings=list(settings.stop) or None,
        )
        prompt = torch.tensor([ids], device=self.model.device)

        def run(keep: OnPass) -> None:
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                tokenizer=self.tokenizer,
                streamer=_Streamer(keep),
            )

        return self._timed(run, settings, on_pass)

    def stop_at(self, texts: Sequence[str], begin: int = 0) -> Stop | None:
        """A rule that ends an answer whose last token completes one of `texts`.

        A text may begin at the column `begin` or later: by default in the prompt, as in transformers.
        """
        from transformers import StopStringCriteria

        if not texts:
            return None
        criteria = StopStringCriteria(self.tokenizer, list(texts))
        return lambda tokens: criteria(tokens[:, begin:], None)

    def _timed(self, run: Callable[[OnPass], None], settings: AnswerSettings, on_pass: OnPass) -> Answer:
        tokens: list[int] = []
        accepted: list[int] = []

        def keep(new: list[int]) -> None:
            tokens.extend(new)
            accepted.append(len(new))
            on_pass(new)

        interrupted = False
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                run(keep)
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - started
        cut = len(tokens) >= settings.max_new_tokens and tokens[-1] not in self.end_tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(tokens, accepted, text, seconds, not (cut or interrupted), interrupted)


class _Streamer:
    """A streamer for `generate` of transformers, which sends it the prompt first and then each token."""

    def __init__(self, keep: OnPass) -> None:
        self._keep, self._prompt = keep, True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self._keep(value.tolist())
        self._prompt = False

    def end(self) -> None:
        pass


def quiet_transformers() -> None:
    """Silences advice of transformers, which is not about our settings, and its progress bars outside a terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load(folder: Path, *, dtype: str | None, device: str | None) -> ChatModel:
    """Loads a folder through transformers' stock class; none of the folder's own code is run.

    Args:
        folder: an exported or published SDLM folder, or a plain model of a supported family.
        dtype: "bf16", "fp16" or "fp32"; None: the folder's own.
        device: a torch device; None: a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: no such folder, no tokenizer, missing or damaged weights, or an unsupported model.
        ConfigError: no such device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config = _check_folder(folder)
    warn_of_lost_code(folder)
    where = _device(device)
    fix = "export or download the folder again"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=PRECISIONS[dtype] if dtype else "auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        # the last three: values of another type in the tokenizer's files, which transformers does not check
        text = error if isinstance(error, OSError | ValueError | RuntimeError) else repr(error)
        raise CheckpointError(f"transformers cannot load the folder: {text}", str(folder), fix) from None
    network, info = loaded
    missing = info["missing_keys"]
    if missing:
        raise CheckpointError(f"{len(missing)} weights are missing, e.g. {min(missing)}", str(folder), fix)
    if wrong := next((name for name, weight in network.named_parameters() if not is_finite(weight.data)), ""):
        raise CheckpointError(f"'{wrong}' has values that are NaN or infinite", str(folder), fix)
    # transformers would merge the folder's sampling settings into every call of `generate`
    network.generation_config = GenerationConfig()
    vocabulary = tokenizer.get_vocab()
    turn_end = vocabulary.get(format_of(vocabulary.__contains__).end)
    ends = dict.fromkeys([*([] if turn_end is None else [turn_end]), *config.eos_token_ids])
    return ChatModel(folder, config, network.eval().to(where), tokenizer, tuple(ends))


def _check_folder(folder: Path) -> HFConfig:
    config = read_hf_config(folder)
    HFAsCheckpoint(HFWeights(folder), config.shape, where=folder)  # checks files, dtypes, names and shapes
    if not has_tokenizer(folder):
        raise CheckpointError(
            "the folder holds no tokenizer",
            str(folder),
            "copy tokenizer.json and tokenizer_config.json of its base model into it",
        )
    if vocabulary_size(folder) > config.shape.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {vocabulary_size(folder)} tokens, the model {config.shape.vocab_size}",
            str(folder),
            "put the tokenizer of this model into the folder",
        )
    return config


def _device(name: str | None) -> torch.device:
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        # torch.device accepts "cuda" on a machine without one; only an allocation tells
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises AssertionError
        raise ConfigError(f"no device '{name}': {str(error).splitlines()[0]}", "--device", "e.g. cpu or cuda") from None
    return device
