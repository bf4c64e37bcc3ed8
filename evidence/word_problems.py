"""The task that needs content: word problems whose sums the model has to work out.

    Lily has 7 stamps and buys 5 more. How many stamps does Lily have now?
    Lily had 7 stamps and buys 5: 7 + 5 = 12. Lily has 12 stamps now.

Held out is what a hash says, as in quickstart.task: the calculation ("7+5") goes through SHA-256, and one in eight
hash values belongs to the held-out part. So no calculation of a held-out prompt was ever trained on, with whatever
name and thing; copying cannot solve one.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from quickstart.task import HELD_OUT_SHARE, NAMES, THINGS

LARGEST = 12
MORE = ("buys", "finds", "gets", "makes", "wins")
LESS = ("loses", "sells", "breaks", "eats", "uses")


@dataclass(frozen=True)
class Problem:
    """One conversation: what the user writes, the one right answer, and the calculation in it."""

    prompt: str
    answer: str
    calculation: str

    @property
    def held_out(self) -> bool:
        """Whether the hash of the calculation puts the problem in the held-out part."""
        digest = hashlib.sha256(self.calculation.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def problems(seed: int) -> Iterator[Problem]:
    """Endless problems with distinct prompts; a pure function of `seed`. Numbers are 2 to `LARGEST`."""
    rng = random.Random(f"word problems, {seed}")
    seen: set[str] = set()
    while True:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        first, second, more = rng.randint(2, LARGEST), rng.randint(2, LARGEST), rng.random() < 0.5
        if not more and second >= first:
            first, second = second + 1, first
        verb = rng.choice(MORE if more else LESS)
        sign, result = ("+", first + second) if more else ("-", first - second)
        amount = f"{second} more" if more else f"{second} of them"
        prompt = f"{name} has {first} {thing} and {verb} {amount}. How many {thing} does {name} have now?"
        answer = (
            f"{name} had {first} {thing} and {verb} {second}: {first} {sign} {second} = {result}. "
            f"{name} has {result} {thing} now."
        )
        if prompt not in seen:
            seen.add(prompt)
            yield Problem(prompt, answer, f"{first}{sign}{second}")
