"""Model class for lm-evaluation-harness 0.4.13, known to it as `sdlm`; evaluation/lm_eval.py registers it.

Likelihoods are those of the plain causal model, by the harness' own class for transformers models. Generated text comes
from SDLM decoding. Batching, truncation, templates and post-processing are the harness' own.
"""

import dataclasses
import difflib
import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sdlm_megatron.chat.chat_model import AnswerSettings, load
from sdlm_megatron.diffusion.decode import Decoded
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.weights.dtypes import HF_DTYPES, PRECISIONS, precision_name

# Model arguments with the meaning they have for the harness' `hf`.
HARNESS_ARGS = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token", "prefix_token_id"),
    *("logits_cache", "softmax_dtype", "chat_template_args", "enable_thinking", "think_end_token"),
)
MODEL_ARGS = ("pretrained", "alg", "n", "threshold", "product", "dtype", "device", *HARNESS_ARGS)
GENERATION_ARGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed")
LONG_NAMES = {"auto": None, **{name: precision_name(dtype) for name, dtype in HF_DTYPES.items()}}

log = logging.getLogger("lm_eval.sdlm")  # a child of the harness' logger: shown by its handler at its level


@dataclass
class TaskCounts:
    """Decoding effort of one task."""

    prompts: int = 0
    tokens: int = 0  # generated tokens, end tokens included
    passes: int = 0  # forward passes that proposed tokens, counted for each prompt by itself
    seconds: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(1, self.passes)


class SDLMForLMEval(HFLM):
    """An exported, published or plain model folder.

    Args:
        pretrained: the folder; none of its code is run.
        alg, n, threshold, product: decoding rule, see docs/inference.md; default: the folder's generation_config.json.
        dtype: "auto" (the folder's own), "bf16", "fp16", "fp32", or torch's name of one of them.
        device: a torch device; the harness' default, cuda:0, means the CPU on a machine without a GPU.
        options: HARNESS_ARGS.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: an unknown argument, or an invalid value.
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
            _check_known(name, HARNESS_ARGS, MODEL_ARGS, "--model_args")
        dtypes = (*LONG_NAMES, *PRECISIONS)
        _check_known(dtype, dtypes, dtypes, "--model_args dtype")
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None
        self.chat = load(Path(pretrained), dtype=LONG_NAMES.get(dtype, dtype), device=device)
        self.rule = self.chat.decoding_rule("--model_args", alg=alg, n=n, threshold=threshold, product=product)
        self.counts: dict[str, TaskCounts] = {}  # by task, of the latest `generate_until`
        self._task = TaskCounts()
        super().__init__(self.chat.model, backend="causal", tokenizer=self.chat.tokenizer, **options)
        # the harness looks a relative name up on the hub
        self.pretrained = str(self.chat.folder.resolve())
        self.end_tokens = tuple({*self.chat.end_tokens, self.eot_token_id})
        log.info("%s: %s", self.chat.describe(), self.rule.name)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers in the order of the requests; updates `counts`."""
        texts = [""] * len(requests)
        for task in dict.fromkeys(request.task_name for request in requests):
            rows = [i for i, request in enumerate(requests) if request.task_name == task]
            self._task = counts = self.counts[task] = TaskCounts()
            answers = super().generate_until([requests[i] for i in rows], disable_tqdm=disable_tqdm)
            for i, text in zip(rows, answers, strict=True):
                texts[i] = text
            values = (counts.tokens_per_pass, counts.tokens, counts.passes, counts.prompts, counts.seconds)
            log.info("%s: %.2f tokens per pass (%d tokens, %d passes, %d prompts, %.1f s)", task, *values)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """The harness' own facts about the model and, under "sdlm", the rule and the counts of each task."""
        tasks = {
            task: asdict(counts) | {"tokens_per_pass": counts.tokens_per_pass} for task, counts in self.counts.items()
        }
        return super().get_model_info() | {"sdlm": {**asdict(self.rule), "tasks": tasks}}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Continues a batch of the harness: int64 (B, T), padded on the left, to (B, T + new), padded on the right."""
        mask = generation_kwargs.pop("attention_mask")
        settings = self._settings(generation_kwargs, max_length - context.shape[1], stop)
        started = time.perf_counter()
        decoded = self._decode(context, mask, settings, settings.stop)
        rows = [self._cut_at_stop(i, context, mask, settings, decoded) for i in range(len(context))]
        self._task.seconds += time.perf_counter() - started
        self._task.prompts += len(rows)
        self._task.tokens += sum(len(tokens) for tokens, _ in rows)
        self._task.passes += sum(passes for _, passes in rows)
        width = max(len(tokens) for tokens, _ in rows)
        padded = [tokens + [self.tokenizer.pad_token_id] * (width - len(tokens)) for tokens, _ in rows]
        return torch.cat([context, torch.tensor(padded, device=context.device)], 1)

    def _settings(self, requested: dict[str, Any], most: int, stop: Sequence[str]) -> AnswerSettings:
        """Settings from the generation arguments of a task; ConfigError names one that SDLM decoding lacks."""
        for name, value in requested.items():
            if (name, value) != ("num_beams", 1):
                where = "generation_kwargs of the task, or --gen_kwargs"
                _check_known(name, GENERATION_ARGS, GENERATION_ARGS, where)
        sample = bool(requested.get("do_sample"))
        temperature = float(requested.get("temperature") or 0)
        top_p, top_k = requested.get("top_p"), requested.get("top_k")
        for name, value, valid, expected in (
            ("temperature", temperature, temperature > 0 or not sample, "above 0 with do_sample"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
            ("max_gen_toks", most, most >= 1, "at least 1"),
        ):
            if not valid:
                raise ConfigError(f"{name} is {value!r}", "generation_kwargs", f"use a value {expected}")
        seed = requested.get("seed")
        if seed is None:
            # the harness' --seed has seeded torch; greedy decoding must not advance its generator
            seed = int(torch.randint(2**62, ())) if sample else 0
        return AnswerSettings(
            **self.rule.options,
            max_new_tokens=most,
            temperature=temperature if sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            seed=seed + self._task.prompts,  # row b of a batch draws with seed + b: every prompt has its own seed
            stop=tuple(text for text in stop if text),
        )

    def _decode(self, ids: Tensor, mask: Tensor, settings: AnswerSettings, stop: Sequence[str]) -> Decoded:
        options = {**settings.options, "eos_token_ids": self.end_tokens, "stop": self.chat.stop_at(stop)}
        return self.chat.decode(ids, attention_mask=mask, **options)

    def _cut_at_stop(
        self, row: int, context: Tensor, mask: Tensor, settings: AnswerSettings, decoded: Decoded
    ) -> tuple[list[int], int]:
        """Tokens and passes of a row that ends where the harness ends it.

        The stop rule of transformers also ends a row at a stop string that began in the prompt (such as a line break
        at the end of the prompt and another at the start of the answer); the harness searches the answer only. Such a
        row is rare. It is decoded again by itself, without the rule, and then cut.
        """
        tokens, counts = decoded.tokens[row], decoded.accepted[row]
        ended = len(tokens) == settings.max_new_tokens or tokens[-1] in self.end_tokens
        if ended or self._stops(tokens, settings.stop):
            return tokens, len(counts)
        alone = dataclasses.replace(settings, seed=settings.seed + row)
        again = self._decode(context[row : row + 1], mask[row : row + 1], alone, ())
        tokens, counts = again.tokens[0], again.accepted[0]
        lengths = range(1, len(tokens))
        length = 1 + bisect_left(lengths, True, key=lambda k: self._stops(tokens[:k], settings.stop))
        return tokens[:length], 1 + sum(total < length for total in accumulate(counts))

    def _stops(self, tokens: list[int], stop: Sequence[str]) -> bool:
        text = self.tok_decode(tokens, skip_special_tokens=False)
        return any(end in text for end in stop)


def _check_known(name: str, accepted: Sequence[str], known: Sequence[str], where: str) -> None:
    """ConfigError with the nearest known name where `name` is not accepted."""
    if name not in accepted:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"'{name}' is not known", where, f"{hint}one of {', '.join(known)}")
