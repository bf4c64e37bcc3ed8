"""The quickstart's task: a sentence in, its facts as one line of JSON out.

    Write as JSON: Lily has 96 stamps and gives 2 to Max.
    {"giver":"Lily","had":96,"thing":"stamps","verb":"gives","moved":2,"taker":"Max"}

Names, things, verbs and numbers are drawn independently (about 1.7e10 combinations, in two sentence forms), so an exact
answer must have been copied from the sentence. The constant text between the facts is what a block can predict ahead.

One in eight examples is held out, selected by the SHA-256 of its answer. The wording is not hashed, so the same facts
never appear in both parts, and the split does not depend on seed, order or amount. (Holding out whole names or digits
would keep them out of training, and the results would measure that instead.)
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdlm_megatron.errors import DataError
from sdlm_megatron.files import write_text

HELD_OUT_SHARE = 8
"""One in this many examples is held out."""

FORMS = (
    "Write as JSON: {giver} has {had} {thing} and {verb} {moved} to {taker}.",
    "Write as JSON: From {had} {thing}, {giver} {verb} {moved} to {taker}.",
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VERBS = ("gives", "sells", "sends", "lends", "brings", "hands", "offers", "mails")
NAMES = _words("""
    Adam Alex Alice Andrew Ann Anna Anne Arthur Ben Bill Bob Carl Charles Chris Dan Daniel David Ed Emily Frank
    Fred George Greg Henry Jack James Jane Jean Jeff Jim John Joseph Kim Lee Lily Louis Luke Maria Mark Martin
    Mary Matt Max Michael Nick Paul Peter Phil Ray Richard Rob Robert Rose Sam Sarah Scott Simon Stephen Thomas
    Tim Tom Victor Will William
""")
THINGS = _words("""
    apples bags balls bananas bars beans birds boards boats bones books bottles bowls boxes bricks brushes
    buttons cakes cameras candles cards cars chairs chips clips clocks coins computers cookies cups doors drums
    eggs feathers flags flowers forks forms frames games gifts glasses gloves hats horses images keys lamps
    leaves lemons letters lights lists magnets maps marbles masks mirrors models nets notes nuts onions oranges
    pages paintings papers pens phones photos pictures pieces pillows plants plates poems posters pots prints
    puzzles records ribbons rings robots ropes roses seeds sheets shells shirts shoes songs spoons stamps stars
    stickers sticks stones strings tables tags tapes tickets tiles tools towels toys trees vases videos wheels
    windows
""")


@dataclass(frozen=True)
class Example:
    """One conversation: the user's prompt and its only correct answer."""

    prompt: str
    answer: str
    key: str = ""
    """Text whose hash selects held-out examples; by default the answer."""

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256((self.key or self.answer).encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class TaskFiles:
    """Files that `write_task` wrote."""

    sources: dict[str, Path]
    """Source format (data_prep's name) to the file with training conversations in that format."""
    heldout: Path


def examples(seed: int) -> Iterator[Example]:
    """Endless examples with distinct facts, determined by `seed`."""
    # The order of the draws below defines the task: another order would give other examples for the same seed.
    rng = random.Random(f"sentence to JSON, {seed}")
    seen: set[str] = set()
    while True:
        giver, taker = rng.sample(NAMES, 2)
        had = rng.randint(3, 99)
        facts = {
            "giver": giver,
            "had": had,
            "thing": rng.choice(THINGS),
            "verb": rng.choice(VERBS),
            "moved": rng.randint(2, had - 1),
            "taker": taker,
        }
        prompt = rng.choice(FORMS).format(**facts)
        answer = json.dumps(facts, separators=(",", ":"))
        if answer not in seen:
            seen.add(answer)
            yield Example(prompt, answer)


def messages_row(example: Example) -> dict[str, list[dict[str, str]]]:
    """A row in the format "messages"."""
    turns = (("user", example.prompt), ("assistant", example.answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_task(folder: str | Path, n_train: int, n_heldout: int, seed: int) -> TaskFiles:
    """Writes training conversations in three source formats, and held-out prompts, as JSONL.

        messages.jsonl            {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}
        query_response.jsonl      {"query": …, "response": …}
        instruction_output.jsonl  {"instruction": …, "output": …}
        heldout.jsonl             {"prompt": …, "expected": …}

    Training examples go to the three files in turn. The contents depend on the arguments only; existing files are
    replaced.

    Args:
        folder: created if missing.
        n_train: training conversations in the three files together, at least 3.
        n_heldout: held-out prompts, at least 1.
        seed: seed of the draws.

    Raises:
        DataError: an amount is too small, or so large that the distinct facts would run out.
    """
    root = Path(folder)
    if n_train < 3 or n_heldout < 1 or n_train + n_heldout > 10_000_000:
        what = f"cannot write {n_train} training and {n_heldout} held-out conversations"
        raise DataError(what, str(root), "ask for at least 3 and 1, and for 10 million at most")
    # Both parts come from one stream, so they have the same distribution.
    train: list[Example] = []
    heldout: list[Example] = []
    for example in examples(seed):
        part, wanted = (heldout, n_heldout) if example.held_out else (train, n_train)
        if len(part) < wanted:
            part.append(example)
        if len(train) == n_train and len(heldout) == n_heldout:
            break
    root.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list] = {
        "messages": [messages_row(e) for e in train[0::3]],
        "query_response": [{"query": e.prompt, "response": e.answer} for e in train[1::3]],
        "instruction_output": [{"instruction": e.prompt, "output": e.answer} for e in train[2::3]],
        "heldout": [{"prompt": e.prompt, "expected": e.answer} for e in heldout],
    }
    paths = {name: root / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]))
    heldout_path = paths.pop("heldout")
    return TaskFiles(paths, heldout_path)
