"""Held-out prompts with their expected answers: reading, encoding, decoding in batches, exact match."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sdlm_megatron.chat.chat_model import ChatModel, DecodingRule
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import DataError
from sdlm_megatron.weights.positions import trained_positions

BATCH = 64  # prompts per batch, unless --batch says otherwise


class ShortAnswersError(DataError):
    """No expected answer is as long as a window."""


@dataclass(frozen=True)
class HeldOutPrompt:
    """One user turn and its expected answer; "": unknown."""

    text: str
    expected: str


@dataclass(frozen=True)
class DecodedPrompts:
    """Answers in the order of the prompts."""

    tokens: list[list[int]]  # tokens of each answer, with the end token if there is one
    accepted: list[list[int]]  # for each prompt, the tokens that each of its passes kept
    seconds: float  # wall time of all prompts together

    @property
    def tokens_per_pass(self) -> float:
        return sum(map(sum, self.accepted)) / sum(map(len, self.accepted))

    @property
    def counts(self) -> dict[str, list[int]]:
        """Tokens and passes of each prompt, as fields of a result row."""
        return {"tokens": [sum(kept) for kept in self.accepted], "passes": [len(kept) for kept in self.accepted]}


def read_prompts(path: Path, most: int = 0, *, answered: bool = True) -> list[HeldOutPrompt]:
    """The first `most` prompts of a JSONL file of {"prompt": …, "expected": …}; 0: all.

    Args:
        answered: every prompt has an expected answer; False: a line may leave it out, or have null or "" there.

    Raises:
        DataError: the file cannot be read or has no prompts, or a line lacks a field.
    """
    fix = 'each line is an object {"prompt": text, "expected": text}'
    fix += "" if answered else "; expected may be left out"
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the prompts cannot be read: {reason}", str(path), fix) from None
    if lines == [""]:
        raise DataError("the file has no prompts", str(path), fix)
    prompts = []
    for number, line in enumerate(lines[: most or None], 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"not JSON: {error}", where, fix) from None
        fields = row if isinstance(row, dict) else {}
        for field in ("prompt", "expected"):
            value, optional = fields.get(field), field == "expected" and not answered
            if not (isinstance(value, str) and value) and not (optional and value in (None, "")):
                raise DataError(f"no text under {field!r}", where, fix)
        prompts.append(HeldOutPrompt(fields["prompt"], fields.get("expected") or ""))
    return prompts


def prompts_sha256(prompts: Sequence[HeldOutPrompt]) -> str:
    """SHA-256 of prompts and expected answers in their order."""
    texts = [[prompt.text, prompt.expected] for prompt in prompts]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def encode(chat: ChatModel, prompt: HeldOutPrompt, shots: Sequence[HeldOutPrompt] = ()) -> list[int]:
    """Token ids up to where the answer begins; `shots` precede the prompt as solved earlier turns."""
    turns = []
    for shot in shots:
        turns += [{"role": "user", "content": shot.text}, {"role": "assistant", "content": shot.expected}]
    return chat.encode([*turns, {"role": "user", "content": prompt.text}])


def encode_prompts(chat: ChatModel, prompts: Sequence[HeldOutPrompt], *, own: bool = False) -> list[list[int]]:
    """`encode` of each prompt. DataError where one and the longest expected answer exceed the model's positions.

    own: each prompt takes its own expected answer, for what decodes none.
    """
    encoded, sizes = [encode(chat, prompt) for prompt in prompts], list(map(len, encode_answers(chat, prompts)))
    most, longest = trained_positions(chat.config), max(sizes)
    for line, (ids, size) in enumerate(zip(encoded, sizes, strict=True), 1):
        if len(ids) + (size if own else longest) > most:
            what = f"the prompt has {len(ids):,} tokens and {'its' if own else 'the longest'} expected answer "
            what += f"{size if own else longest:,}, the model was trained for {most:,} positions"
            raise DataError(what, f"--prompts, line {line}", "use shorter prompts")
    return encoded


def encode_answer(chat: ChatModel, text: str) -> list[int]:
    """Token ids of an answer with its end token, as in the training data."""
    return [*chat.encode_text(text), chat.end_tokens[0]]


def encode_answers(chat: ChatModel, prompts: Sequence[HeldOutPrompt]) -> list[list[int]]:
    """`encode_answer` of the expected answer of each prompt."""
    return [encode_answer(chat, prompt.expected) for prompt in prompts]


def longest_answer(chat: ChatModel, prompts: Sequence[HeldOutPrompt]) -> int:
    """Tokens of the longest expected answer, end token included: any longer answer is wrong already."""
    return max(map(len, encode_answers(chat, prompts)))


def plain_rules(settings: SDLMSettings) -> list[DecodingRule]:
    """n = 1, unless the model was never trained to predict the next token from a clean one."""
    # a block of one token has no other rule
    measured = settings.target_shift or settings.next_token_weight or settings.block_size == 1
    return [DecodingRule()] if measured else []


def decode_prompts(
    chat: ChatModel,
    encoded: Sequence[Sequence[int]],
    rule: DecodingRule,
    *,
    max_new_tokens: int,
    batch: int = BATCH,
    progress: Callable[[int], None] | None = None,
) -> DecodedPrompts:
    """Decodes prompts in batches; each prompt counts its own passes.

    Args:
        encoded: token ids of each prompt.
        batch: prompts per batch.
        progress: called after each batch with the number of its prompts.
    """
    # prompts of similar length share a batch, which keeps padding small
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    tokens: list[list[int]] = [[] for _ in encoded]
    accepted: list[list[int]] = [[] for _ in encoded]
    started = time.perf_counter()
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        rows = [torch.tensor(encoded[i], device=chat.model.device) for i in part]
        decoded = chat.decode(
            pad_sequence(rows, batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            max_new_tokens=max_new_tokens,
            **rule.options,
        )
        for i, kept, counts in zip(part, decoded.tokens, decoded.accepted, strict=True):
            tokens[i], accepted[i] = kept, counts
        if progress is not None:
            progress(len(part))
    return DecodedPrompts(tokens, accepted, time.perf_counter() - started)


def exact_matches(chat: ChatModel, prompts: Sequence[HeldOutPrompt], decoded: DecodedPrompts) -> list[int]:
    """1 for each prompt whose whole answer equals the expected text, else 0."""
    texts: list[Any] = [
        chat.tokenizer.decode([t for t in tokens if t not in chat.end_tokens], clean_up_tokenization_spaces=False)
        for tokens in decoded.tokens
    ]
    return [int(text == prompt.expected) for text, prompt in zip(texts, prompts, strict=True)]
