"""SDLM folders for lm-evaluation-harness 0.4.13: the model `sdlm` of `python -m sdlm_megatron.evaluation.lm_eval_command`.

Likelihoods are the harness' own, of the plain causal model, as its `hf` has them; what is generated comes from SDLM's
decoding. The class takes the harness' batching, truncation, templates and post-processing as they are.
"""

import difflib
import logging
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sdlm_megatron.chat.chat_model import DTYPES, ChatModel, Settings, load, warp_of
from sdlm_megatron.diffusion.decode import ALGORITHMS, Decoded
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.evaluation.decoding import Setting

HARNESS_ARGS = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token", "prefix_token_id"),
    *("logits_cache", "softmax_dtype", "chat_template_args", "enable_thinking", "think_end_token"),
)
"""Model arguments that mean what they mean for the harness' `hf`."""
MODEL_ARGS = ("pretrained", "alg", "n", "threshold", "product", "dtype", "device", *HARNESS_ARGS)
GENERATION_ARGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed")
LONG_NAMES = {"auto": None, "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

log = logging.getLogger("lm_eval.sdlm")  # below the harness' logger: shown by its handler at its level


@dataclass
class Counts:
    """What the decoding of one task took."""

    prompts: int = 0
    tokens: int = 0
    """Generated, end tokens included."""
    passes: int = 0
    """Forward passes that proposed tokens, of each prompt for itself."""
    seconds: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(1, self.passes)


class SDLM(HFLM):
    """An exported, published or plain folder.

    Args:
        pretrained: the folder; no code of it is run.
        alg, n, threshold, product: how to decode, as in docs/inference.md; default: as the folder says.
        dtype: "auto" (as the folder says), "bf16", "fp16", "fp32" or torch's name of one.
        device: as torch writes it; the harness' default, cuda:0, is the CPU where there is no GPU.
        options: HARNESS_ARGS.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: no such argument, or a value that it cannot have.
    """

    def __init__(
        self,
        pretrained: str,
        alg: str | None = None,
        n: int | None = None,
        threshold: float | None = None,
        product: bool | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        for name in options:
            if name not in HARNESS_ARGS:
                raise _unknown(name, MODEL_ARGS, "--model_args")
        if dtype not in (*LONG_NAMES, *DTYPES):
            raise _unknown(dtype, (*LONG_NAMES, *DTYPES), "--model_args dtype")
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None
        self.chat = load(Path(pretrained), dtype=LONG_NAMES.get(dtype, dtype), device=device)
        self.setting = setting_of(self.chat, alg, n, threshold, product)
        self.counts: dict[str, Counts] = {}
        self._now = Counts()
        super().__init__(self.chat.model, backend="causal", tokenizer=self.chat.tokenizer, **options)
        self.pretrained = str(self.chat.folder.resolve())  # an absolute path: not looked up on the hub
        self.end_tokens = tuple({*self.chat.end_tokens, self.eot_token_id})
        log.info("%s: %s", self.chat.describe(), self.setting.name)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers; `counts` then holds what each task's took."""
        texts = [""] * len(requests)
        for task in dict.fromkeys(request.task_name for request in requests):
            rows = [i for i, request in enumerate(requests) if request.task_name == task]
            self._now = now = self.counts[task] = Counts()
            answers = super().generate_until([requests[i] for i in rows], disable_tqdm=disable_tqdm)
            for i, text in zip(rows, answers, strict=True):
                texts[i] = text
            figures = (now.tokens_per_pass, now.tokens, now.passes, now.prompts, now.seconds)
            log.info("%s: %.2f tokens per pass (%d tokens, %d passes, %d prompts, %.1f s)", task, *figures)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """The harness' facts about the model, and under "sdlm" the decoding and what it took; stands in the results."""
        tasks = {
            task: asdict(counts) | {"tokens_per_pass": counts.tokens_per_pass} for task, counts in self.counts.items()
        }
        return super().get_model_info() | {"sdlm": {**asdict(self.setting), "tasks": tasks}}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """A batch of the harness: int64 (B, T) padded on the left -> (B, T + new tokens), padded on the right."""
        mask = generation_kwargs.pop("attention_mask")
        settings = self._settings(generation_kwargs, max_length - context.shape[1], stop)
        started = time.perf_counter()
        done = self._decode(context, mask, settings, settings.stop)
        rows = [self._ended(i, context, mask, settings, done) for i in range(len(context))]
        self._now.seconds += time.perf_counter() - started
        self._now.prompts += len(rows)
        self._now.tokens += sum(len(tokens) for tokens, _ in rows)
        self._now.passes += sum(passes for _, passes in rows)
        width = max(len(tokens) for tokens, _ in rows)
        padded = [tokens + [self.tokenizer.pad_token_id] * (width - len(tokens)) for tokens, _ in rows]
        return torch.cat([context, torch.tensor(padded, device=context.device)], 1)

    def _settings(self, wanted: dict[str, Any], most: int, stop: Sequence[str]) -> Settings:
        """What a task asks for; ConfigError on what is no setting of SDLM's decoding."""
        for name, value in wanted.items():
            if name not in GENERATION_ARGS and (name, value) != ("num_beams", 1):
                raise _unknown(name, GENERATION_ARGS, "generation_kwargs of the task, or --gen_kwargs")
        sample = bool(wanted.get("do_sample"))
        temperature = float(wanted.get("temperature") or 0)
        top_p, top_k = wanted.get("top_p"), wanted.get("top_k")
        wrong = {
            "temperature": (temperature, temperature > 0 or not sample, "above 0 with do_sample"),
            "top_p": (top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
            "top_k": (top_k, top_k is None or top_k >= 1, "at least 1"),
            "max_gen_toks": (most, most >= 1, "at least 1"),
        }
        _check(wrong, "generation_kwargs")
        seed = wanted.get("seed")
        if seed is None:  # from the harness' --seed; greedy decoding leaves the generator as it is
            seed = int(torch.randint(2**62, ())) if sample else 0
        return Settings(
            alg=self.setting.alg,
            window=self.setting.window,
            threshold=self.setting.threshold,
            product=self.setting.product,
            max_new_tokens=most,
            temperature=temperature if sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            seed=seed + self._now.prompts,  # each prompt draws for itself
            stop=tuple(text for text in stop if text),
        )

    def _decode(self, ids: Tensor, mask: Tensor, settings: Settings, stop: Sequence[str]) -> Decoded:
        return self.chat.decode(
            ids,
            attention_mask=mask,
            window=settings.window,
            alg=settings.alg,
            threshold=settings.threshold,
            product=settings.product,
            max_new_tokens=settings.max_new_tokens,
            eos_token_ids=self.end_tokens,
            warp=warp_of(settings),
            seed=settings.seed,
            stop=self.chat.stop_at(stop) if stop else None,
        )

    def _ended(
        self, row: int, context: Tensor, mask: Tensor, settings: Settings, done: Decoded
    ) -> tuple[list[int], int]:
        """Tokens and passes of a row that ends where the harness has it end.

        The rule of transformers also ends a row where the stop string began in the prompt (a prompt that ends in one
        line break, an answer that begins with one). The harness looks for it in the answer only: such a row is rare,
        and decoded again by itself.
        """
        tokens, counts = done.tokens[row], done.accepted[row]
        ended = len(tokens) == settings.max_new_tokens or tokens[-1] in self.end_tokens
        if ended or self._stops(tokens, settings.stop):
            return tokens, len(counts)
        alone = Settings(**{**vars(settings), "seed": settings.seed + row})
        again = self._decode(context[row : row + 1], mask[row : row + 1], alone, ())
        tokens, counts = again.tokens[0], again.accepted[0]
        most = range(1, len(tokens))
        length = 1 + bisect_left(most, True, key=lambda k: self._stops(tokens[:k], settings.stop))
        return tokens[:length], 1 + sum(total < length for total in accumulate(counts))

    def _stops(self, tokens: list[int], stop: Sequence[str]) -> bool:
        text = self.tok_decode(tokens, skip_special_tokens=False)
        return any(end in text for end in stop)


def setting_of(
    chat: ChatModel, alg: str | None, n: int | None, threshold: float | None, product: bool | None
) -> Setting:
    """What the model arguments ask for, completed by the folder; ConfigError names the one that does not fit."""
    folder: Mapping[str, Any] = chat.defaults if chat.config.is_sdlm else {"sdlm_alg": "ar"}
    alg = alg or folder.get("sdlm_alg") or "prob_conf"
    if alg not in ALGORITHMS:
        raise _unknown(alg, ALGORITHMS, "--model_args alg")
    if alg != "ar" and not chat.config.is_sdlm:
        raise ConfigError(
            f"alg={alg} needs an SDLM folder, this is a plain {chat.config.model_type}",
            str(chat.folder),
            "leave it out, or name a folder that was trained as an SDLM",
        )
    window: Any = n if n is not None else folder.get("sdlm_n") or chat.config.block_size or 1
    tau: Any = threshold if threshold is not None else folder.get("sdlm_threshold", 0.9)
    product = product if product is not None else bool(folder.get("sdlm_product"))
    _check(
        {
            "n": (window, isinstance(window, int) and window >= 1, "a whole number of at least 1"),
            "threshold": (tau, isinstance(tau, int | float) and 0 <= tau <= 1, "between 0 and 1"),
            "product": (product, isinstance(product, bool), "True or False"),
        },
        "--model_args",
    )
    return Setting(alg, 1 if alg == "ar" else window, float(tau), product)


def _check(values: dict[str, tuple[Any, bool, str]], where: str) -> None:
    for name, (value, fits, fix) in values.items():
        if not fits:
            raise ConfigError(f"{name} is {value!r}", where, f"give {fix}")


def _unknown(name: str, known: Sequence[str], where: str) -> ConfigError:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    fix = f"did you mean '{near[0]}'? " if near else ""
    return ConfigError(f"'{name}' is not known", where, f"{fix}one of {', '.join(known)}")
