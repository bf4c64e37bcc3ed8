"""Words of texts, normalized for comparison, and hashes of runs of words.

Words are what lm-evaluation-harness and GPT-3 (arXiv:2005.14165, appendix C) compare: the text in lower case, without
punctuation, split at white space. Beyond ASCII, characters are compared in their NFKC form, and a character of a
script that is written without spaces (Chinese, Japanese, Thai ...) counts as one word.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# Characters of the conversations that are hashed together, and bytes hashed at once: small enough for the cache.
CHARACTERS = 1 << 18

_SPACES = b"\t\n\v\f\r\x1c\x1d\x1e\x1f "
_LOWER = bytes(32 if i in _SPACES else i for i in range(256)).lower()
_DELETED = bytes(i for i in range(128) if i not in _SPACES and not chr(i).isalnum())
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_BASE = 0x9E3779B97F4A7C15  # odd, and thereby invertible modulo 2^64


def split_words(text: str) -> list[str]:
    """The normalized words of a text."""
    return [word.decode("utf-8", "surrogatepass") for word in _normalize(text).split()]


def _normalize(text: str) -> bytes:
    """The words of a text with white space between them, in UTF-8."""
    if text.isascii():
        return text.encode().translate(_LOWER, _DELETED)
    text = _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).lower())
    return " ".join(_UNSPACED.sub(r" \g<0> ", text).split()).encode("utf-8", "surrogatepass")


def mix(hashes: np.ndarray) -> np.ndarray:
    """uint64 hashes whose bits all depend on all bits of the argument (finalizer of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(33))


_BYTES = mix(np.arange(1, 257, dtype=np.uint64))
"""Random number of each byte."""


@lru_cache(maxsize=4)
def _powers(base: int, size: int) -> np.ndarray:
    """uint64 (size,): base^0, base^1, ... modulo 2^64."""
    factors = np.full(size, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


class _RunHashes:
    """Hashes of runs of a sequence of numbers: the same for equal runs, wherever they are."""

    def __init__(self, numbers: np.ndarray) -> None:
        # Sizes are rounded up to a power of two, so that the powers of a few sizes are computed once.
        size = 1 << len(numbers).bit_length()
        terms = numbers * _powers(_BASE, size)[: len(numbers)]
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        self._inverse = _powers(pow(_BASE, -1, 1 << 64), size)

    def __call__(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """uint64: hash of each run [start, end)."""
        # the sum over the run of number * _BASE^(position in the run), which does not depend on the run's start
        return mix((self._sums[ends] - self._sums[starts]) * self._inverse[starts])


def _hash_words(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First byte, int64, and hash, uint64, of the words in bytes that begin and end with a space."""
    inside = data > 32
    changes = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = changes[::2], changes[1::2]
    return starts, _RunHashes(_BYTES[data])(starts, ends)


@dataclass(frozen=True)
class HashedWords:
    """The words of several texts, as hashes."""

    edges: np.ndarray  # int64 (texts + 1,): text i has words [edges[i], edges[i + 1])
    _runs: _RunHashes

    @classmethod
    def of(cls, texts: Sequence[str]) -> "HashedWords":
        """Splits and hashes the texts."""
        parts = [_normalize(text) for text in texts]
        data = b" " + b" ".join(parts) + b" "
        first, hashes, at = [], [], 0
        while at + 1 < len(data):
            # Long texts in pieces that end with a space; a longer word counts as several.
            end = len(data) if len(data) - at <= CHARACTERS else data.rfind(b" ", at + 1, at + CHARACTERS) + 1
            end = end or at + CHARACTERS
            piece = np.frombuffer(b" " + data[at:end] + b" ", np.uint8)
            starts, codes = _hash_words(piece)
            first.append(starts + at - 1)
            hashes.append(codes)
            at = end
        lengths = np.array([len(part) + 1 for part in parts], dtype=np.int64)
        edges = np.searchsorted(np.concatenate(first), 1 + np.concatenate([[0], np.cumsum(lengths)]))
        return cls(edges.astype(np.int64), _RunHashes(np.concatenate(hashes)))

    def starts(self, length: int) -> np.ndarray:
        """int64: the words at which a run of `length` words within one text begins."""
        sizes = np.maximum(np.diff(self.edges) - length + 1, 0)
        before = np.cumsum(sizes) - sizes
        return np.arange(sizes.sum()) + np.repeat(self.edges[:-1] - before, sizes)

    def hashes(self, starts: np.ndarray, length: int | np.ndarray) -> np.ndarray:
        """uint64: hash of the run of `length` words from each of `starts`; equal runs have equal hashes."""
        return self._runs(starts, starts + length)


def groups(conversations: Sequence[Sequence[tuple[Any, ...]]]) -> Iterator[range]:
    """Ranges of conversations with about CHARACTERS each; the text is element 1 of a turn."""
    first = size = 0
    for i, turns in enumerate(conversations):
        size += sum(len(turn[1]) for turn in turns)
        if size >= CHARACTERS:
            yield range(first, i + 1)
            first, size = i + 1, 0
    if first < len(conversations):
        yield range(first, len(conversations))
