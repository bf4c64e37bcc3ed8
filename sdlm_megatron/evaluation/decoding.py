"""Decodes prompts in batches with one setting, and keeps what each of them took."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from sdlm_megatron.chat.chat_model import ChatModel


@dataclass(frozen=True)
class Setting:
    """One way to decode: what diffusion.decode takes."""

    alg: str = "ar"
    window: int = 1
    threshold: float = 1.0
    """Unused by "ar" and "self_speculative"."""
    product: bool = False

    @property
    def name(self) -> str:
        if self.alg == "ar":
            return "n = 1"
        if self.alg == "self_speculative":
            return f"self-speculative, n = {self.window}"
        kind = "prob" if self.alg == "prob_conf" else "entropy"
        return f"{kind} {self.threshold:g}{', product' * self.product}, n = {self.window}"


@dataclass(frozen=True)
class Decoded:
    """What came out, prompt by prompt in the order given."""

    tokens: list[list[int]]
    """With the end token, if one came."""
    accepted: list[list[int]]
    """Tokens kept in each pass."""
    seconds: float
    """Of all prompts together."""


def decode_prompts(
    chat: ChatModel,
    encoded: Sequence[Sequence[int]],
    setting: Setting,
    *,
    max_new_tokens: int,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Decoded:
    """Answers to prompts given as ids; prompts of similar length share a batch, each row counts its own passes.

    Args:
        batch: prompts at a time.
        progress: called with the number of prompts done after each batch.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    tokens: list[list[int]] = [[] for _ in encoded]
    accepted: list[list[int]] = [[] for _ in encoded]
    started = time.perf_counter()
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        rows = [torch.tensor(encoded[i], device=chat.model.device) for i in part]
        done = chat.decode(
            pad_sequence(rows, batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            window=setting.window,
            alg=setting.alg,
            threshold=setting.threshold,
            product=setting.product,
            max_new_tokens=max_new_tokens,
        )
        for i, kept, counts in zip(part, done.tokens, done.accepted, strict=True):
            tokens[i], accepted[i] = kept, counts
        if progress is not None:
            progress(len(part))
    return Decoded(tokens, accepted, time.perf_counter() - started)
