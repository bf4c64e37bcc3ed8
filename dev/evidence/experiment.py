"""The models ("arms") that docs/evidence.md compares, and the two tasks they are trained on.

The second task needs knowledge that is not in the prompt:

    Sort into food, tool, animal and vehicle: hammer, apple, horse, bus.
    {"food":"apple","tool":"hammer","animal":"horse","vehicle":"bus"}

The prompt names the categories but does not say which word belongs to which. One in eight prompts is held out, selected
by the SHA-256 of its sorted words, so no held-out prompt has the four words of a training prompt in any order.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dev.quickstart.task import Example, examples

TASKS = {"json": "sentence to JSON", "categories": "words to categories"}
"""Name of a task in file names, and in tables."""
DOCUMENTS_PER_STEP = 6
"""Approximate number of documents in the one row of a step; rows are sized so that every arm makes the same number of
steps."""
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


def sortings(seed: int) -> Iterator[Example]:
    """Endless examples of "words to categories" with distinct words, determined by `seed`."""
    # As in dev.quickstart.task, the order of the draws defines the task.
    rng = random.Random(f"categories, {seed}")
    words = {name: text.split() for name, text in WORDS.items()}
    seen: set[str] = set()
    while True:
        # Sorted, so that the order of the dictionary does not matter.
        names = rng.sample(sorted(words), SORTED_AT_A_TIME)
        picked = {name: rng.choice(words[name]) for name in names}
        shown = list(picked.values())
        rng.shuffle(shown)
        prompt = f"Sort into {', '.join(names[:-1])} and {names[-1]}: {', '.join(shown)}."
        key = " ".join(sorted(shown))
        if key not in seen:
            seen.add(key)
            yield Example(prompt, json.dumps(picked, separators=(",", ":")), key)


def task_examples(task: str, seed: int, *, held_out: bool) -> Iterator[Example]:
    """Endless training or held-out examples of one of TASKS."""
    source = examples(seed) if task == "json" else sortings(seed)
    return (example for example in source if example.held_out == held_out)


def ramps(steps: int) -> tuple[int, int]:
    """Steps of the warm-up and of the decay of a training: an eighth and two fifths."""
    return max(1, steps // 8), max(1, 2 * steps // 5)


@dataclass(frozen=True)
class Arm:
    """One training recipe."""

    name: str
    text: str
    """Name in tables."""
    block_size: int = 4
    causal_attn: bool = False
    next_token_weight: float = 0.0
    target_shift: bool = True
    share: float = 1.0
    """Share of the conversations that is trained on."""
    lr: float = 5e-4
    random_base: bool = False
    """Start from random weights instead of the pretrained ones."""
    row_length: int = 960
    """Tokens of a row; a step is one row."""

    @property
    def repeat(self) -> int:
        """Expected number of times an answer token is a target; blocks of one token cover each token once."""
        return 3 if self.block_size > 1 else 1


# A block of one token is a copy of its anchor and sees what the anchor sees, so D = 1 is exactly next-token training.
_AR = Arm("ar", "autoregressive (D = 1)", block_size=1, row_length=560)
_D4 = Arm("d4", "SDLM, D = 4")
MAIN = (_AR, _D4, Arm("d8", "SDLM, D = 8", block_size=8))
VARIANTS = (
    _D4,
    replace(_D4, name="unshifted", text="targets not shifted", target_shift=False),
    replace(_D4, name="causal", text="causal_attn", causal_attn=True),
    replace(_D4, name="next_token", text="with the AR loss on clean rows", next_token_weight=1.0),
)
"""D = 4 and changes of one setting each."""
RATES = (
    replace(_AR, name="ar_slow", text="autoregressive, learning rate 1e-4", lr=1e-4),
    replace(_D4, name="d4_slow", text="SDLM, D = 4, learning rate 1e-4", lr=1e-4),
)
"""The main comparison at a fifth of the learning rate."""
SENSITIVITY = (
    replace(_D4, name="d4_half", text="D = 4, half of the conversations", share=0.5),
    replace(_D4, name="d4_quarter", text="D = 4, a quarter of the conversations", share=0.25),
    Arm("d2", "D = 2", block_size=2, row_length=800),
    replace(_D4, name="random", text="D = 4, from random weights", random_base=True),
)
"""Measured with one seed only."""
ARMS = {arm.name: arm for arm in (*MAIN, *VARIANTS, *RATES, *SENSITIVITY)}
