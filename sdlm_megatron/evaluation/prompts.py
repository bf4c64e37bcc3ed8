"""Held-out prompts with the answers that are right, from JSONL of {"prompt": …, "expected": …}."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One user turn, and the one right answer to it."""

    text: str
    expected: str


def read_prompts(path: Path, most: int = 0) -> list[Prompt]:
    """The first `most` prompts of a file; 0: all. DataError names line and field of what is no prompt."""
    fix = 'each line is an object {"prompt": text, "expected": text}'
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts cannot be read: {error}", str(path), fix) from None
    prompts = []
    for number, line in enumerate(lines[: most or None], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"no JSON: {error}", f"{path}, line {number}", fix) from None
        for field in ("prompt", "expected"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field]:
                raise DataError(f"no text under {field!r}", f"{path}, line {number}", fix)
        prompts.append(Prompt(row["prompt"], row["expected"]))
    if not prompts:
        raise DataError("the file has no prompts", str(path), fix)
    return prompts


def encode(chat: ChatModel, prompt: Prompt, shots: Sequence[Prompt] = ()) -> list[int]:
    """Ids up to where the answer begins; `shots` are solved before it, as earlier turns of the conversation."""
    turns = []
    for shot in shots:
        turns += [{"role": "user", "content": shot.text}, {"role": "assistant", "content": shot.expected}]
    return chat.encode([*turns, {"role": "user", "content": prompt.text}])


def encode_answer(chat: ChatModel, text: str) -> list[int]:
    """Ids of an answer with its end token, as training has them."""
    ids: list[int] = chat.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, chat.end_tokens[-1]]
