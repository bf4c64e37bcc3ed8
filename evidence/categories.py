"""The task that needs content: words sorted into their categories, which the prompt names but does not explain.

    Sort into food, tool, animal and vehicle: hammer, apple, horse, bus.
    {"food":"apple","tool":"hammer","animal":"horse","vehicle":"bus"}

Held out is what a hash says, as in quickstart.task: each word goes through SHA-256, and one in four hash values
belongs to the held-out part. A held-out prompt has held-out words only, a training prompt none of them: what category
they belong to was never trained on, it has to come from what the model knew before.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

HELD_OUT_SHARE = 4
"""One in this many words is held out."""
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
    """One conversation: what the user writes and the one right answer."""

    prompt: str
    answer: str


def held_out(word: str) -> bool:
    """Whether the hash of the word puts it in the held-out part."""
    digest = hashlib.sha256(word.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def sortings(seed: int, *, of_held_out: bool) -> Iterator[Sorting]:
    """Endless distinct prompts of one part; a pure function of the arguments."""
    rng = random.Random(f"categories, {seed}, {of_held_out}")
    words = {name: [word for word in text.split() if held_out(word) == of_held_out] for name, text in WORDS.items()}
    seen: set[str] = set()
    while True:
        names = rng.sample(sorted(words), SORTED_AT_A_TIME)
        picked = {name: rng.choice(words[name]) for name in names}
        shown = list(picked.values())
        rng.shuffle(shown)
        prompt = f"Sort into {', '.join(names[:-1])} and {names[-1]}: {', '.join(shown)}."
        if prompt not in seen:
            seen.add(prompt)
            yield Sorting(prompt, json.dumps(picked, separators=(",", ":")))
