"""Secrets in text that is written or shown: keys, tokens and passwords become ***."""

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

MASK = "***"
_NAME = r"[\w-]*(?:SECRET|PASSW(?:OR)?D|CREDENTIAL)[\w-]*|[\w-]*(?:KEY|TOKEN)"
_SECRET_NAME, _NAMED = re.compile(_NAME, re.I), re.compile(rf"({_NAME})([=:][ \t]*)(\S+)", re.I)
_HARMLESS = re.compile(r"(mask|pad|eos|bos)[_-]token$", re.I)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|\bwandb_v1_\w{16,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
)
"""Keys of common services by their form, and the user and password of an address. A key of 40 hex digits has the form
of a commit: it is known by its name or by the environment only."""


def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret."""
    return bool(_SECRET_NAME.fullmatch(name.rpartition(".")[2])) and not _HARMLESS.search(name)


def mask_text(text: str) -> str:
    """`text` with *** in place of values of secret variables of this environment, of NAME=VALUE, and of known forms."""
    for name, value in os.environ.items():
        if len(value) >= 6 and is_secret_name(name):
            text = text.replace(value, MASK)
    text = _NAMED.sub(lambda m: f"{m[1]}{m[2]}{MASK}" if is_secret_name(m[1]) else m[0], text)
    return _VALUE.sub(MASK, text)


def mask_words(words: Sequence[str]) -> list[str]:
    """Words of a command, masked as `mask_text` does, and those that follow an option such as --api-key as a whole."""
    masked, secret = [], False
    for word in words:
        option = word.startswith("-")
        masked.append(MASK if secret and not option else mask_text(word))
        secret = is_secret_name(word.lstrip("-")) if option else secret
    return masked


def mask_output(text: str, words: Sequence[str]) -> str:
    """Output of a command with *** in place of what `mask_words` hides in its words, and of other known secrets."""
    for word, shown in zip(words, mask_words(words), strict=True):
        if word != shown and (value := word.removeprefix(shown.partition(MASK)[0])):
            text = text.replace(value, MASK)
    return mask_text(text)


def masked_command(words: Sequence[str]) -> str:
    """A command as it would be typed, with `mask_words`."""
    return shlex.join(mask_words(words))


def mask_values(value: Any, name: str = "") -> Any:
    """A copy of JSON-like values with masked texts; texts under a secret name are masked as a whole."""
    if isinstance(value, dict):
        return {key: mask_values(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [mask_values(inner, name) for inner in value]
    # A system prompt is content of the dataset, and must be read back as it is.
    if not isinstance(value, str) or not value or name == "system_prompt":
        return value
    return MASK if is_secret_name(name) else mask_text(value)
