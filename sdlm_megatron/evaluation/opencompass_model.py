"""Model class for OpenCompass 0.5.4, used as `type=SDLM` in a config; no file of OpenCompass is changed.

OpenCompass requires older packages than this project and therefore has an environment of its own. This module imports
nothing else of the project: the exported folder's own code decodes (transformers 4.57 or newer).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opencompass.models.base import BaseModel
from opencompass.models.base_api import APITemplateParser
from opencompass.utils import get_logger
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROUND = [{"role": "HUMAN", "api_role": "HUMAN"}, {"role": "BOT", "api_role": "BOT", "generate": True}]
ROLES = {"HUMAN": "user", "BOT": "assistant", "SYSTEM": "system"}


class SDLMForOpenCompass(BaseModel):
    """An exported or plain model folder as a chat model.

    Args:
        path: the folder. The code it contains is run to decode.
        max_seq_len: prompts are truncated on the left to this many tokens.
        alg, n, threshold, product: decoding rule, see docs/inference.md; default: the folder's generation_config.json.
            Leave them out for a folder without SDLM's code.
        system: system turn of prompts that have none; default: the chat template's.
        stop_words: an answer ends before the first of these.
        generation_kwargs: further arguments of transformers' `generate`, such as do_sample, temperature, top_p.
        dtype, device: as in torch; dtype "auto": the folder's own; device None: a GPU if there is one.
        meta_template, tokenizer_only: OpenCompass' own.
    """

    def __init__(
        self,
        path: str,
        max_seq_len: int = 2048,
        alg: str | None = None,
        n: int | None = None,
        threshold: float | None = None,
        product: bool | None = None,
        system: str | None = None,
        stop_words: Sequence[str] = (),
        generation_kwargs: dict[str, Any] | None = None,
        dtype: str = "auto",
        device: str | None = None,
        meta_template: dict[str, Any] | None = None,
        tokenizer_only: bool = False,
    ) -> None:
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"{path}: not a model folder, it has no config.json")
        super().__init__(path, max_seq_len, tokenizer_only, generation_kwargs=generation_kwargs or {})
        self.template_parser = APITemplateParser(meta_template or {"round": ROUND})
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        rule = {"sdlm_alg": alg, "sdlm_n": n, "sdlm_threshold": threshold, "sdlm_product": product}
        self.settings = {name: value for name, value in rule.items() if value is not None}
        self.system, self.stop_words = system, list(stop_words)
        # Tokens generated since the model was loaded, end tokens included, and their forward passes.
        self.tokens = self.passes = 0
        if not tokenizer_only:
            if device is None and not torch.cuda.is_available() and any(Path("/dev").glob("nvidia[0-9]*")):
                raise RuntimeError("torch cannot use the GPU: install a build for its driver, or set device='cpu'")
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True)
            self.model = model.eval().to(device)

    # --- answers

    def generate(self, inputs: list[Any], max_out_len: int, stopping_criteria: Sequence[str] = ()) -> list[str]:
        """An answer to each prompt or conversation, decoded as one batch."""
        stop = list(dict.fromkeys([*self.stop_words, *stopping_criteria]))
        batch = self._encode([self._render(each) for each in inputs])
        answers, passes = self._answers(batch, max_out_len, stop)
        for i, answer in enumerate(answers):
            ended_early = len(answer) < max_out_len and answer[-1] not in self._ends()
            if ended_early and not any(end in self.tokenizer.decode(answer) for end in stop):
                # the stop string began in the prompt, where it does not count: decode the row again without it
                again, again_passes = self._answers({k: v[i : i + 1] for k, v in batch.items()}, max_out_len, [])
                answers[i], passes[i] = again[0], again_passes[0]
        self.tokens, self.passes = self.tokens + sum(map(len, answers)), self.passes + sum(passes)
        get_logger().info(
            f"{self.tokens / self.passes:.2f} tokens per pass ({self.tokens} tokens, {self.passes} passes so far)"
        )
        texts: list[str] = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for end in stop:
            texts = [text.split(end)[0] for text in texts]
        return texts

    def _answers(self, batch: dict[str, Tensor], most: int, stop: list[str]) -> tuple[list[list[int]], list[int]]:
        """New tokens of each row, end token included, and the number of its passes."""
        options = {"stop_strings": stop, "tokenizer": self.tokenizer} if stop else {}
        out = self.model.generate(
            **batch,
            max_new_tokens=most,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            **{"do_sample": False, **self.settings, **self.generation_kwargs, **options},
        )
        rows = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
        accepted = getattr(out, "accepted", None)  # absent from transformers' own generate: one token per pass
        if accepted is not None:
            return [row[: sum(a)] for row, a in zip(rows, accepted, strict=True)], [len(a) for a in accepted]
        rows = [row[: next((i + 1 for i, t in enumerate(row) if t in self._ends()), len(row))] for row in rows]
        return rows, [len(row) for row in rows]

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return list(ends) if isinstance(ends, list) else [ends]

    # --- prompts

    def _render(self, prompt: Any) -> str:
        """Text of a prompt (a user turn) or of a conversation in OpenCompass' form, up to the answer's beginning."""
        turns = [{"role": "HUMAN", "prompt": prompt}] if isinstance(prompt, str) else prompt
        messages = [{"role": ROLES[turn["role"]], "content": turn["prompt"]} for turn in turns]
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def _encode(self, texts: list[str], **options: Any) -> dict[str, Tensor]:
        """input_ids and attention_mask, int64 (B, T), padded on the left."""
        defaults = {"truncation": True, "max_length": self.max_seq_len, "add_special_tokens": False}
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, **(defaults | options))
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def get_token_len(self, prompt: str) -> int:
        """Number of tokens of a prompt as the model receives it."""
        return len(self.tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"])

    # --- likelihood

    def get_ppl(self, inputs: list[Any], mask_length: list[int] | None = None) -> np.ndarray:
        """Mean negative log-likelihood of each text in nats, by the plain causal model; float64 (B,).

        Normalized as OpenCompass' own models do: the sum over all tokens but the first, divided by the number of all
        tokens; with `mask_length`, both only over the tokens after that many. A conversation is its concatenated turns.
        """
        texts = [each if isinstance(each, str) else "".join(turn["prompt"] for turn in each) for each in inputs]
        batch = self._encode(texts, add_special_tokens=True, padding_side="right")
        ids, real = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            logits = self.model(**batch).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        first = torch.tensor(mask_length or [0] * len(texts), device=ids.device)
        counted = real[:, 1:] * (torch.arange(1, ids.shape[1], device=ids.device) >= first[:, None])
        means: np.ndarray = ((losses * counted).sum(1).double() / (real.sum(1) - first)).cpu().numpy()
        return means


SDLM = SDLMForOpenCompass  # the name used in configs of OpenCompass: `type=SDLM`
