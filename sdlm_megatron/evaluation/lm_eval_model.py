"""Model class for lm-evaluation-harness 0.4.13, known to it as `sdlm`; evaluation/lm_eval.py registers it.

Likelihoods of an SDLM are those of slot 0 of the windows, or of the plain causal pass where that was trained too.
Generated text comes from SDLM decoding. Batching, truncation, templates and post-processing are the harness' own.
"""

import difflib
import logging
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sdlm_megatron.chat.chat_model import AnswerSettings, load
from sdlm_megatron.diffusion.decode_model import TransformersProposer
from sdlm_megatron.diffusion.decode_step import Step
from sdlm_megatron.errors import ConfigError, DataError
from sdlm_megatron.weights.dtypes import HF_DTYPES, PRECISIONS, precision_name
from sdlm_megatron.weights.positions import trained_positions

# Model arguments with the meaning they have for the harness' `hf`.
HARNESS_ARGS = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token", "prefix_token_id"),
    *("logits_cache", "softmax_dtype", "chat_template_args", "enable_thinking", "think_end_token"),
)
MODEL_ARGS = ("pretrained", "alg", "n", "threshold", "product", "dtype", "device", "likelihood", *HARNESS_ARGS)
LIKELIHOODS = ("slot0", "plain")
ANCHORS = 64  # windows per forward pass of a slot-0 likelihood: bounds the logits in memory
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
        likelihood: "slot0": slot 0 of a window of the trained block size behind each token, as self-speculation writes
            text; "plain": a causal pass without windows. Default: slot0 where no loss was put on the plain pass.
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
        likelihood: str | None = None,
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
        sdlm = self.chat.config.sdlm
        trained = sdlm is None or sdlm.trains_plain_pass
        self.likelihood = likelihood or ("plain" if trained else "slot0")
        valid = LIKELIHOODS if sdlm else ("plain",)
        _check_known(self.likelihood, valid, valid, "--model_args likelihood")
        if self.likelihood == "plain" and not trained:
            log.warning(
                "likelihood=plain: no loss was put on the plain causal pass of this model (next_token_weight 0)"
            )
        self.counts: dict[str, TaskCounts] = {}  # by task, of the latest `generate_until`
        # by task, of the latest `generate_until`: tokens and those that each pass kept, in the order of the requests
        self.answers: dict[str, list[tuple[list[int], list[int]]]] = {}
        self.whole_prompts = False  # True: a prompt that is too long is an error; the harness drops its beginning
        self._task = TaskCounts()
        self._contexts: list[str] = []  # of the batch that is decoded next
        # by context; requests of one context keep their order when the harness sorts by length
        self._answers: dict[str, deque[tuple[list[int], list[int]]]] = {}
        # the harness reads config.json alone, whose number may be the one before YaRN extended the positions
        options["max_length"] = options.get("max_length") or trained_positions(self.chat.config)
        super().__init__(self.chat.model, backend="causal", tokenizer=self.chat.tokenizer, **options)
        # the harness looks a relative name up on the hub
        self.pretrained = str(self.chat.folder.resolve())
        self.end_tokens = tuple({*self.chat.end_tokens, self.eot_token_id})
        log.info("%s: %s", self.chat.describe(), self.rule.name)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers in the order of the requests; updates `counts` and `answers`."""
        for request in requests if self.whole_prompts else ():
            size, most = len(self.tok_encode(request.args[0])), self.max_length - request.args[1]["max_gen_toks"]
            if size > most:
                what = f"the prompt has {size} tokens, and the model has positions for {most} beside the longest answer"
                fix = "use a smaller --max-new-tokens, or name other tasks with --tasks"
                raise DataError(what, f"{request.task_name}, row {request.doc_id}", fix)
        texts = [""] * len(requests)
        for task in dict.fromkeys(request.task_name for request in requests):
            rows = [i for i, request in enumerate(requests) if request.task_name == task]
            self._task = counts = self.counts[task] = TaskCounts()
            self._answers = defaultdict(deque)
            answers = super().generate_until([requests[i] for i in rows], disable_tqdm=disable_tqdm)
            self.answers[task] = [self._answers[requests[i].args[0]].popleft() for i in rows]
            for i, text in zip(rows, answers, strict=True):
                texts[i] = text
            values = (counts.tokens_per_pass, counts.tokens, counts.passes, counts.prompts, counts.seconds)
            log.info("%s: %.2f tokens per pass (%d tokens, %d passes, %d prompts, %.1f s)", task, *values)
        return texts

    def tok_batch_encode(self, strings: list[str], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The harness' own; it encodes the contexts of a batch right before they are decoded."""
        self._contexts = list(strings)
        encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, *args, **options)
        return encoded

    def get_model_info(self) -> dict[str, Any]:
        """The harness' own facts about the model and, under "sdlm", the rule and the counts of each task."""
        tasks = {
            task: asdict(counts) | {"tokens_per_pass": counts.tokens_per_pass} for task, counts in self.counts.items()
        }
        return super().get_model_info() | {"sdlm": {**asdict(self.rule), "likelihood": self.likelihood, "tasks": tasks}}

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of the tokens, int64 (B, T), padded on the right."""
        # decoding has no window of one slot either
        if self.likelihood == "plain" or self.chat.config.decoding.block_size == 1:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        settings, size = self.chat.config.decoding, inps.shape[1]
        propose = TransformersProposer(self.model, **settings.decode_options)
        end, parts = torch.full_like(inps[:, 0], size), []
        for start in range(0, size, ANCHORS):
            anchors = torch.arange(start, min(start + ANCHORS, size), device=inps.device).expand(len(inps), -1)
            width, cached = (0, end) if start else (size, torch.zeros_like(end))
            step = Step(inps, end, cached, width, size, anchors, settings.block_size, None)
            parts.append(propose(step)[:, :, 0])
        return torch.cat(parts, 1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Continues a batch of the harness: int64 (B, T), padded on the left, to (B, T + new), padded on the right."""
        mask = generation_kwargs.pop("attention_mask")
        settings = self._settings(generation_kwargs, max_length - context.shape[1], stop)
        started = time.perf_counter()
        # the harness searches the answer only, not across the end of the prompt as the rule of transformers does
        rule = self.chat.stop_at(settings.stop, context.shape[1])
        options = {**settings.options, "eos_token_ids": self.end_tokens, "stop": rule}
        decoded = self.chat.decode(context, attention_mask=mask, **options)
        self._task.seconds += time.perf_counter() - started
        self._task.prompts += len(decoded.tokens)
        self._task.tokens += sum(map(len, decoded.tokens))
        self._task.passes += sum(map(len, decoded.accepted))
        for text, *answer in zip(self._contexts, decoded.tokens, decoded.accepted, strict=True):
            self._answers[text].append((answer[0], answer[1]))
        width = max(map(len, decoded.tokens))
        padded = [tokens + [self.tokenizer.pad_token_id] * (width - len(tokens)) for tokens in decoded.tokens]
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


def _check_known(name: str, accepted: Sequence[str], known: Sequence[str], where: str) -> None:
    """ConfigError with the nearest known name where `name` is not accepted."""
    if name not in accepted:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"'{name}' is not known", where, f"{hint}one of {', '.join(known)}")
