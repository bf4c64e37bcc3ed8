"""The task that needs content: words sorted into their categories, which the prompt names but does not explain.

    Sort into food, tool, animal and vehicle: hammer, apple, horse, bus.
    {"food":"apple","tool":"hammer","animal":"horse","vehicle":"bus"}

Which word belongs where is not in the prompt: the model has to know it, from before or from the training prompts. Held
out is what a hash says, as in dev.quickstart.task: the words, sorted, go through SHA-256, and one in eight hash values
belongs to the held-out part. So no held-out prompt has the four words of a training prompt, in whatever order.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from dev.quickstart.task import HELD_OUT_SHARE

SORTED_AT_A_TIME = 4

WORDS = {
    "animal": "horse dog cat lion tiger bear goat sheep rabbit mouse snake frog whale shark eagle owl duck camel "
    "monkey elephant zebra wolf fox deer",
    "food": "apple bread cheese rice soup pizza pasta butter banana cake egg salad potato carrot honey sandwich cookie "
    "tomato onion sugar yogurt corn peach sausage",
    "tool": "hammer saw drill wrench pliers screwdriver axe shovel rake chisel ladder file clamp pick spade crowbar "
    "mallet level vise trowel sander hoe jack plane",
    "clothing": "shirt hat coat sock glove scarf dress skirt jacket sweater belt shoe boot jeans tie suit vest blouse "
    "cap robe pants shorts sandal uniform",
    "vehicle": "car bus truck train bicycle boat ship airplane helicopter tractor motorcycle van taxi tram ferry "
    "scooter rocket yacht canoe submarine jeep wagon ambulance sled",
    "furniture": "table chair sofa bed desk shelf cabinet stool bench couch dresser wardrobe bookcase armchair crib "
    "cupboard mattress nightstand drawer ottoman recliner futon sideboard hutch",
    "instrument": "piano guitar violin drum flute trumpet cello harp saxophone clarinet banjo organ tuba trombone "
    "oboe bassoon accordion harmonica mandolin ukulele lute viola xylophone bagpipe",
    "metal": "iron gold silver copper tin zinc lead nickel aluminum steel bronze brass titanium platinum mercury "
    "chromium tungsten cobalt magnesium uranium lithium palladium sodium calcium",
}


@dataclass(frozen=True)
class Sorting:
    """One conversation: what the user writes, the one right answer, and the words in it."""

    prompt: str
    answer: str
    words: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether the hash of the words puts the prompt in the held-out part."""
        digest = hashlib.sha256(" ".join(sorted(self.words)).encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def sortings(seed: int) -> Iterator[Sorting]:
    """Endless prompts with distinct words; a pure function of `seed`."""
    rng = random.Random(f"categories, {seed}")
    words = {name: text.split() for name, text in WORDS.items()}
    seen: set[tuple[str, ...]] = set()
    while True:
        names = rng.sample(sorted(words), SORTED_AT_A_TIME)
        picked = {name: rng.choice(words[name]) for name in names}
        shown = list(picked.values())
        rng.shuffle(shown)
        prompt = f"Sort into {', '.join(names[:-1])} and {names[-1]}: {', '.join(shown)}."
        key = tuple(sorted(shown))
        if key not in seen:
            seen.add(key)
            yield Sorting(prompt, json.dumps(picked, separators=(",", ":")), key)
