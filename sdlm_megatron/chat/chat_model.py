"""A Hugging Face folder that answers conversations, by SDLM's decoding or by transformers' own greedy one."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from sdlm_megatron.bf16 import slow_bf16
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM, IM_END, IM_START
from sdlm_megatron.data.tokenizer_identity import has_tokenizer, vocabulary_size
from sdlm_megatron.diffusion.decode import Decoded, Stop, decode
from sdlm_megatron.diffusion.decode_rules import Warp
from sdlm_megatron.errors import CheckpointError, ConfigError, DataError
from sdlm_megatron.weights.hf_reader import HFConfig, open_tensors, read_hf_config, read_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Message = Mapping[str, str]
OnPass = Callable[[list[int]], None]
"""Called after each pass with the tokens it gave."""


@dataclass(frozen=True)
class Settings:
    """How to decode."""

    alg: str
    window: int
    """n, tokens proposed in a pass; 1 with "ar"."""
    threshold: float
    product: bool
    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""
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


@dataclass(frozen=True)
class Answer:
    """One answer, end token included."""

    tokens: list[int]
    accepted: list[int]
    """Tokens of each pass; they add up to len(tokens)."""
    text: str
    """Without special tokens."""
    seconds: float
    """From the prompt to the last token."""
    complete: bool
    """False: cut at max_new_tokens, or interrupted."""
    interrupted: bool = False


@dataclass(frozen=True)
class ChatModel:
    """Model and tokenizer of a folder."""

    folder: Path
    config: HFConfig
    model: Any
    tokenizer: Any
    defaults: Mapping[str, Any]
    """generation_config.json: sdlm_alg, sdlm_n, sdlm_threshold, sdlm_product if the folder sets them."""
    end_tokens: tuple[int, ...]

    def describe(self) -> str:
        """Folder, size, dtype and device in one line; also where another dtype would be much faster."""
        count = sum(p.numel() for p in self.model.parameters())
        size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
        kind = f"SDLM, D = {self.config.block_size}" if self.config.is_sdlm else self.config.model_type
        dtype = str(self.model.dtype).removeprefix("torch.")
        slow = slow_bf16() if self.model.dtype == torch.bfloat16 and self.model.device.type == "cpu" else None
        hint = f"; {slow}, fp32 is the faster dtype here" if slow else ""
        return f"{self.folder} ({kind}, {size} parameters, {dtype}, {self.model.device}){hint}"

    # --- conversations

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the next answer begins.

        By the tokenizer's chat template; without one in ChatML, as the training data is rendered. Raises
        CheckpointError when neither is possible, DataError on text that is no valid Unicode.
        """
        for message in messages:
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"the text is no valid Unicode: {error.reason}", f"the {message['role']} turn"
                ) from None
        return self._by_template(messages) if self.tokenizer.chat_template else self._chatml(messages)

    def _by_template(self, messages: Sequence[Message]) -> list[int]:
        try:
            out = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise CheckpointError(
                f"the chat template cannot render the conversation: {error}",
                f"{self.folder}, chat_template",
                "mend the template, or remove it: ChatML is then used",
            ) from None
        return list(out["input_ids"])

    def _chatml(self, messages: Sequence[Message]) -> list[int]:
        start, end = (self._id(token) for token in (IM_START, IM_END))
        if start is None or end is None:
            raise CheckpointError(
                f"the tokenizer has no chat template and not both of {IM_START} and {IM_END}",
                str(self.folder),
                "add a chat_template to its tokenizer_config.json",
            )
        ids = []
        for message in messages:  # a text that spells <|im_end|> does not end its turn
            ids += [start, *self._plain(f"{message['role']}\n{message['content']}"), end, *self._plain("\n")]
        return [*ids, start, *self._plain("assistant\n")]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _id(self, token: str) -> int | None:
        found: int | None = self.tokenizer.get_vocab().get(token)
        return found

    def default_system(self) -> str | None:
        """The system turn of a chat that sets none; a template puts its own."""
        return None if self.tokenizer.chat_template else DEFAULT_SYSTEM

    # --- answers

    def decode(self, input_ids: torch.Tensor, **options: Any) -> Decoded:
        """diffusion.decode with the folder's mask token, end tokens and kind of windows, unless `options` say other."""
        folder = {
            "mask_token_id": self.config.text_mask_token_id or 0,  # unused where the window is 1
            "eos_token_ids": self.end_tokens,
            **self.config.window_options,
        }
        with torch.inference_mode():
            return decode(self.model, input_ids, **folder | options)

    def answer(self, ids: Sequence[int], settings: Settings, on_pass: OnPass) -> Answer:
        """Continues `ids` by SDLM's decoding; an interrupt (Ctrl-C) ends the answer where it is."""
        stop = self.stop_at(settings.stop) if settings.stop else None

        def run(keep: OnPass) -> None:
            self.decode(
                torch.tensor([ids], device=self.model.device),
                window=settings.window,
                max_new_tokens=settings.max_new_tokens,
                alg=settings.alg,
                threshold=settings.threshold,
                product=settings.product,
                warp=warp_of(settings),
                seed=settings.seed,
                stop=stop,
                on_tokens=lambda _, tokens: keep(tokens),
            )

        return self._timed(run, settings, on_pass)

    def greedy(self, ids: Sequence[int], settings: Settings, on_pass: OnPass) -> Answer:
        """Continues `ids` by transformers' own greedy next-token decoding: same end tokens, stops and length."""
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

    def stop_at(self, texts: Sequence[str]) -> Stop:
        """Ends an answer whose last token completes one of `texts`, which may begin in the prompt."""
        from transformers import StopStringCriteria

        criteria = StopStringCriteria(self.tokenizer, list(texts))
        return lambda tokens: criteria(tokens, None)

    def _timed(self, run: Callable[[OnPass], None], settings: Settings, on_pass: OnPass) -> Answer:
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


def warp_of(settings: Settings) -> Warp | None:
    """The logits to draw from, by transformers' own rules and in its order; None: greedy."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if not settings.temperature:
        return None
    warpers: list[Any] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k is not None:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return lambda logits: reduce(lambda now, warper: warper(None, now), warpers, logits)


class _Streamer:
    """A streamer of transformers: gets the prompt first, then each token."""

    def __init__(self, keep: OnPass) -> None:
        self._keep, self._prompt = keep, True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self._keep(value.tolist())
        self._prompt = False

    def end(self) -> None:
        pass


def load(folder: Path, *, dtype: str | None, device: str | None) -> ChatModel:
    """Loads a folder through transformers, as its stock class: no code of the folder is run.

    Args:
        folder: exported, published, or a plain Qwen2 or Llama.
        dtype: "bf16", "fp16", "fp32"; None as the folder says.
        device: as torch writes it; None: a GPU if there is one.

    Raises:
        CheckpointError: no such folder, no tokenizer, missing or broken weights, a model of another kind.
        ConfigError: no such device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config = _check_folder(folder)
    where = _device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation="sdpa",
            dtype=DTYPES[dtype] if dtype else "auto",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"transformers cannot load the folder: {error}", str(folder), "export or download the folder again"
        ) from None
    network, info = loaded
    if info["missing_keys"]:
        raise CheckpointError(
            f"{len(info['missing_keys'])} weights are missing, e.g. {min(info['missing_keys'])}",
            str(folder),
            "export or download the folder again",
        )
    network.generation_config = GenerationConfig()  # the folder's sampling settings are not asked for
    path = folder / "generation_config.json"
    im_end = tokenizer.get_vocab().get(IM_END)
    ends = dict.fromkeys([*config.eos_token_ids, *([] if im_end is None else [im_end])])
    defaults = read_json(path) if path.is_file() else {}
    return ChatModel(folder, config, network.eval().to(where), tokenizer, defaults, tuple(ends))


def _check_folder(folder: Path) -> HFConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "no model folder: it has no config.json" if folder.is_dir() else "no such folder",
            str(folder),
            "name a Hugging Face folder on this machine; a training run becomes one with "
            "python -m checkpoints_tools.mcore_to_hf --ckpt RUN --out FOLDER",
        )
    config = read_hf_config(folder)
    open_tensors(folder)
    if not has_tokenizer(folder):
        raise CheckpointError(
            "the folder holds no tokenizer",
            str(folder),
            "copy tokenizer.json and tokenizer_config.json of its base model into it",
        )
    if vocabulary_size(folder) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {vocabulary_size(folder)} tokens, the model {config.vocab_size}",
            str(folder),
            "put the tokenizer of this model into the folder",
        )
    return config


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says both
        raise ConfigError(f"no device '{name}': {str(error).splitlines()[0]}", "--device", "e.g. cpu or cuda") from None
    return device
