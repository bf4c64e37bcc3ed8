"""Failure signatures of decoded answers: repetition, answers that end early or not at all, and stalls.

Every signature is a ratio of sums over answers and follows from a few integers for each answer (`vectors`), which
result files keep. So it can be recomputed, and pooled over seeds. docs/evaluation.md explains the definitions.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GRAM = 4
"""Tokens of the runs whose recurrence is repetition."""
EARLY = 0.5
"""An answer that ends with less than this share of the expected answer's tokens has ended early."""
STALL_TOKENS, STALL_RATE = 16, 1.1
"""An answer of at least STALL_TOKENS tokens with fewer than STALL_RATE tokens per pass is a stall."""
LENGTHS = (64, 256)
"""Upper ends of the lengths, in tokens of the expected answer, that are shown separately; the last is open."""
REPETITION_LIMIT, EARLY_LIMIT = 0.2, 0.25
"""Repetition beyond that of the expected answers, and share of early ends, above which `warnings` warns."""


@dataclass(frozen=True)
class Signatures:
    """Shares from 0 to 1; None where they are not defined: no expected answers, one token per pass, short answers."""

    answers: int
    repetition: float | None  # GRAM-token runs of the answers that occurred earlier in the same answer
    expected_repetition: float | None  # the same, of the expected answers
    early: float | None  # answers with an end token and less than EARLY of the expected tokens
    cut: float  # answers without an end token: stopped by the token limit or a stop string
    stalled: float | None  # of the answers that are long enough, those with about one token per pass

    def warnings(self) -> list[str]:
        """Sentences about the signatures beyond their limits."""
        texts = []
        if self.repetition is not None and self.repetition - (self.expected_repetition or 0.0) > REPETITION_LIMIT:
            than = (
                "" if self.expected_repetition is None else f", of the expected answers' {self.expected_repetition:.0%}"
            )
            texts.append(f"{self.repetition:.0%} of the answers' {GRAM}-token runs repeat earlier ones{than}")
        if self.early is not None and self.early > EARLY_LIMIT:
            texts.append(f"{self.early:.0%} of the answers end before half of the expected length")
        return texts


def repeated_runs(tokens: Sequence[int]) -> int:
    """Runs of GRAM tokens that occurred earlier in the sequence; it has max(0, len - GRAM + 1) runs."""
    runs = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return len(runs) - len(set(runs))


def vectors(answers: Sequence[Sequence[int]], end_tokens: Collection[int]) -> dict[str, list[int]]:
    """`repeated` and `ended` (1: with an end token) of each answer, as fields of a result row."""
    return {
        "repeated": [repeated_runs(tokens) for tokens in answers],
        "ended": [int(len(tokens) > 0 and tokens[-1] in end_tokens) for tokens in answers],
    }


def measure(
    answers: Mapping[str, Sequence[int]],
    *,
    several: bool,
    expected: Mapping[str, Sequence[int]] | None = None,
    at: Sequence[int] | None = None,
) -> Signatures:
    """Signatures of some answers.

    Args:
        answers: `tokens` and `passes` of each answer, end tokens included, and its `vectors`.
        several: whether a pass can keep several tokens; if not, nothing stalls.
        expected: `tokens` and `repeated` of each expected answer, end tokens included.
        at: numbers of the answers to measure; None: all.
    """
    chosen = range(len(answers["tokens"])) if at is None else at

    def column(rows: Mapping[str, Sequence[int]], name: str) -> list[int]:
        return [rows[name][i] for i in chosen]

    tokens, passes, ended = (column(answers, name) for name in ("tokens", "passes", "ended"))
    long = [t / p < STALL_RATE for t, p in zip(tokens, passes, strict=True) if t >= STALL_TOKENS]
    early = None
    if expected is not None:
        pairs = zip(tokens, ended, column(expected, "tokens"), strict=True)
        early = _mean([bool(done) and t < EARLY * wanted for t, done, wanted in pairs])
    return Signatures(
        len(tokens),
        _repetition(tokens, column(answers, "repeated")),
        None if expected is None else _repetition(column(expected, "tokens"), column(expected, "repeated")),
        early,
        1.0 - (_mean(ended) or 0.0),
        _mean(long) if several else None,
    )


def by_length(
    answers: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], *, several: bool
) -> dict[str, Signatures]:
    """Signatures of all answers, and of those with expected answers of each range of lengths that occurs."""
    result = {"all": measure(answers, several=several, expected=expected)}
    for low, high in zip((0, *LENGTHS), (*LENGTHS, None), strict=True):
        at = [i for i, n in enumerate(expected["tokens"]) if low < n and (high is None or n <= high)]
        if at and len(at) < len(expected["tokens"]):
            name = f"more than {low}" if high is None else f"{low + 1} to {high}"
            result[name] = measure(answers, several=several, expected=expected, at=at)
    return result


def of_answers(
    answers: Sequence[Sequence[int]],
    accepted: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    end_tokens: Collection[int],
    *,
    several: bool = True,
) -> Signatures:
    """Signatures of decoded answers, from the tokens of each, what each pass kept, and the expected tokens.

    Args:
        several: whether a pass can keep several tokens.
    """
    rows = {"tokens": [len(a) for a in answers], "passes": [len(a) for a in accepted], **vectors(answers, end_tokens)}
    return measure(rows, several=several, expected=of_expected(expected))


def of_expected(expected: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """`tokens` and `repeated` of each expected answer."""
    return {"tokens": [len(tokens) for tokens in expected], "repeated": [repeated_runs(t) for t in expected]}


def fields(signatures: Signatures, digits: int = 4) -> dict[str, Any]:
    """The defined signatures for JSON, rounded."""
    values = asdict(signatures)
    return {name: round(value, digits) for name, value in values.items() if value is not None and name != "answers"}


def _repetition(tokens: Sequence[int], repeated: Sequence[int]) -> float | None:
    runs = sum(max(0, count - GRAM + 1) for count in tokens)
    return sum(repeated) / runs if runs else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
