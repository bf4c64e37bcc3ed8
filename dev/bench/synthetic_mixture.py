"""Writes a training mixture of made-up text: the sets of `mixture_3p5m` in their true row forms and file layouts,
in the mixture's proportions and with its lengths, and a ShareGPT set with its meta JSON.

Prose, code, maths, tables, JSON, and some CJK and emoji, from word lists and templates. A share of the rows is
planted: rows that are no conversation, and copies of rows of the same and of other sets. The same seed writes the
same bytes. Beside the sets lie `build.yaml`, for `python -m data_prep.build`, and `planted.json`, which says how many
rows are what.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow
import pyarrow.parquet
import yaml

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli

ROWS_OF_A_FILE = 50_000
Turns = list[tuple[str, str]]
"""[(ChatML role, text)…]"""


# ------------------------------------------------------------------------------------------------ text
def _words(text: str) -> list[str]:
    return text.split()


WORDS = _words("""
the of and to in is that for it as with on be at by this from or which are an was have not but they more one
has their its been other when there can all if would who some into them time these only could new then than
first also any may such like our over after most made where many well before must through back years way much
your down should because each just those people how too little state good very make world still own see work
long here get between both life being under never day same another know while last might great old year off
come since against go came right used take three states himself few house use during without again place
around however home small found thought went say part once general high upon school every does got united left
number course war until always away something fact water though public less put think almost hand enough far
took head yet government system set better told nothing night end why called find look asked later point knew
city next program business group give days let room side social order present case best need several given
form power point area national possible though matter function value result example answer question data model
method step check input output list table column row test error file code string return equation total average
therefore assume consider solve area circle triangle number sum product factor price cost rate speed distance
minutes hours students teacher garden market river letter language history music image sample study patient
treatment protein cell energy theory evidence analysis summary report
""")
NAMES = _words("""
Anna Björn Chen Dmitri Elif Fatima Giorgos Hana Ibrahim Jürgen Kofi Łukasz María Noor Olivia Priya Quentin
Rosa Søren Tomás Uma Věra Wei Ximena Yusuf Zoë
""")
SYLLABLES = _words("""
an be con de el fra gra ho in ju ka lo mi no or pre qui ra sti tion tra un ver wi xy yo zen pha lex mor din
tur cle ble ster ism ity ment ology
""")
HAN = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出"
    "就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所"
)
KANA = (
    "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをんアイウエオカキクケコ"
)
EMOJI = ("🙂", "🚀", "👩‍💻", "🇩🇪", "❤️", "🤔", "✅", "👍🏽")


def _stock(rng: random.Random, n: int) -> list[str]:
    """n words as a text has them: most are common and real, some of a long tail that is made up."""
    common, rare = list(dict.fromkeys(WORDS)), _made(rng, 60_000)
    weights = [(i + 20) ** -0.7 for i in range(len(common))]
    tail = [(i + 20) ** -0.7 for i in range(len(rare))]
    scale = 0.12 * sum(weights) / sum(tail)
    return rng.choices(common + rare, weights + [scale * weight for weight in tail], k=n)


def _made(rng: random.Random, n: int) -> list[str]:
    return list(dict.fromkeys("".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(n)))


def _sentence(words: Iterator[str], rng: random.Random) -> str:
    found = [next(words) for _ in range(rng.randint(5, 24))]
    if rng.random() < 0.2:
        found[rng.randrange(len(found))] = rng.choice(NAMES)
    if rng.random() < 0.15:
        found[rng.randrange(len(found))] = f"{rng.randint(1, 9999):,}"
    found[rng.randrange(len(found))] += ","
    text = " ".join(found).rstrip(",") + rng.choice(("", "", "", "", "?", "!", ":", ";"))
    return text[0].upper() + text[1:] + ("" if text[-1] in "?!:;" else ".")


def prose(words: Iterator[str], rng: random.Random) -> str:
    """A paragraph, sometimes a heading or a list."""
    kind = rng.random()
    if kind < 0.1:
        return f"## {next(words).title()} {next(words)}\n\n"
    if kind < 0.25:
        mark = rng.choice(("- ", "* ", "1. "))
        return "".join(f"{mark}**{next(words)}** {_sentence(words, rng)}\n" for _ in range(rng.randint(2, 5))) + "\n"
    return " ".join(_sentence(words, rng) for _ in range(rng.randint(2, 6))) + "\n\n"


def code(words: Iterator[str], rng: random.Random) -> str:
    """A function in Python, C or C#, or a shell session."""
    a, b, c, said = next(words), next(words), next(words), _sentence(words, rng)
    n, m = rng.randint(0, 99), rng.randint(2, 4096)
    forms = (
        f'```python\ndef {a}_{b}({c}, limit={m}):\n    """{said}"""\n    found = []\n'
        f"    for i, {b} in enumerate({c}):\n        if {b} % {n + 1} == 0 and i < limit:  # {n}\n"
        f"            found.append({b} ** 2 + {n})\n    return sorted(found, key=lambda x: -x)\n\n\n"
        f'assert {a}_{b}([1, 2, 3]) == [{n}]\nprint(f"{{{a}_{b}(range({m}))=}}")\n```\n\n',
        f'```c\n#include <stdio.h>\n#include "{a}.h"\n\nint main(void) {{\n    unsigned int {b}[{m}] = {{0}};\n'
        f"    for (int i = 0; i < {m}; ++i) {{\n        {b}[i] = i << {n % 8};  /* {said} */\n    }}\n"
        f'    printf("%u\\n", {b}[{n}]);\n    return 0;\n}}\n```\n\n',
        f"```csharp\npublic sealed class {a.title()}{b.title()} : I{c.title()}\n{{\n\tprivate int _{b} = {n};\n"
        f"\n\t// C# {said}\n\tpublic int Get{c.title()}() => _{b} * {m};\n}}\n```\n\n",
        f"```bash\n$ grep -rn '{a}' ./{b} | wc -l\n{m}\n$ ./{a} --{b}={n} --{c} 2>&1 | tail -{n}\n```\n\n",
        f"The function `{a}_{b}` takes `{c}` and returns `{n}`. {said}\n\n",
    )
    return rng.choice(forms)


def maths(words: Iterator[str], rng: random.Random) -> str:
    """A step of a solution."""
    a, b, c, x = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 999), rng.choice("xyzntk")
    said, one, two = _sentence(words, rng), next(words), next(words)
    root = f"\\frac{{{b} \\pm \\sqrt{{{b * b - 4 * a * c}}}}}{{{2 * a}}}"
    forms = (
        f"Let ${x}$ be the {one} of {a} {two}. {said}\n\n",
        f"\\[\n{a}{x}^2 - {b}{x} + {c} = 0 \\implies {x} = {root}\n\\]\n\n",
        f"**Step {a % 9 + 1}:** {said} So ${a} \\times {b} = {a * b}$ and ${a * b} + {c} = {a * b + c}$.\n\n",
        f"$$\\sum_{{k=1}}^{{{a}}} k = \\frac{{{a}({a}+1)}}{{2}} = {a * (a + 1) // 2}$$\n\n",
        f"Therefore, the {one} is $\\boxed{{{a * b + c}}}$.\n\n",
        f"{rng.choice(NAMES)} buys {a} {one}s at \\${b}.{c % 90 + 10} each and pays {c}% tax. {said}\n\n",
    )
    return rng.choice(forms)


def table(words: Iterator[str], rng: random.Random) -> str:
    """A table in Markdown, and a question on it."""
    n = rng.randint(2, 6)
    cells: tuple[Callable[[], str], ...] = (
        lambda: next(words),
        lambda: str(rng.randint(0, 99_999)),
        lambda: f"{rng.random() * 100:.2f}%",
        lambda: f"{rng.randint(1950, 2024)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
        lambda: rng.choice(NAMES),
        lambda: "",
    )
    kinds = rng.choices(cells, k=n)
    lines = ["|" + "|".join(next(words).title() for _ in range(n)) + "|", "|" + "---|" * n]
    lines += ["|" + "|".join(kind() for kind in kinds) + "|" for _ in range(rng.randint(2, 9))]
    return "\n".join(lines) + f"\n\n{_sentence(words, rng)}\n\n"


def records(words: Iterator[str], rng: random.Random) -> str:
    """A piece of JSON, as extraction tasks answer."""
    content = {next(words): [f"{next(words)} {next(words)}" for _ in range(rng.randint(1, 4))] for _ in range(3)}
    return json.dumps(content, indent=rng.choice((None, 2))) + "\n\n"


def scripts(words: Iterator[str], rng: random.Random) -> str:
    """A sentence in another script, or with emoji."""
    kind = rng.random()
    if kind < 0.4:
        return "".join(rng.choices(HAN, k=rng.randint(8, 40))) + "。\n"
    if kind < 0.6:
        return "".join(rng.choices(KANA, k=rng.randint(8, 30))) + f"、{next(words)}。\n"
    return f"{_sentence(words, rng)} {rng.choice(EMOJI)} {rng.choice(EMOJI)}\n"


GENRES = {"prose": prose, "code": code, "maths": maths, "table": table, "records": records, "scripts": scripts}


class Library:
    """Long texts of every genre; a conversation takes stretches of them.

    Args:
        seed: of the text.
        size: characters a genre.
    """

    def __init__(self, seed: int, size: int) -> None:
        self._texts: dict[str, tuple[str, list[int]]] = {}
        words = _stock(random.Random(f"{seed} words"), 500_009)
        for name, write in GENRES.items():
            rng = random.Random(f"{seed} {name}")
            rng.shuffle(words)
            stock = cycle(words)
            pieces, starts, at = [], [], 0
            while at < size:
                pieces.append(write(stock, rng))
                starts.append(at)
                at += len(pieces[-1])
            self._texts[name] = ("".join(pieces), starts)

    def take(self, genre: str, characters: int, rng: random.Random) -> str:
        """A stretch of about so many characters that begins where a piece begins."""
        text, starts = self._texts[genre]
        characters = min(characters, len(text) // 2)
        at = starts[int(rng.random() * len(starts))]
        if at + characters > len(text):
            at = starts[int(rng.random() * (len(starts) // 3))]
        return text[at : at + characters].rstrip()


# ------------------------------------------------------------------------------------------------ sets
@dataclass(frozen=True)
class SyntheticSet:
    """A set of the mixture."""

    name: str
    form: str
    rows: int
    """In the real mixture: its share."""
    tokens: float
    """Mean content tokens of a row."""
    genres: dict[str, float]
    """Genre -> weight."""
    folder: str
    pattern: str
    """Files in the folder; {i} and {n} are filled in."""
    config: str = ""
    turns: tuple[int, ...] = (2,)
    system: float = 0.0
    """Share of rows with a system turn."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns that training does not read."""


PARQUET = "train-{i:05}-of-{n:05}.parquet"
OPC: dict[str, tuple[int, dict[str, Any]]] = {
    "educational_instruct": (
        118_278,
        {"code": "def f(x): ...", "entry_point": "f", "testcase": ["assert f(1)", "f(2)"]},
    ),
    "evol_instruct": (111_183, {}),
    "mceval_instruct": (35_943, {"language": "Rust"}),
    "package_instruct": (170_943, {}),
}
CHAT = {"prose": 5.0, "code": 2.0, "maths": 2.0, "scripts": 0.3, "records": 0.3}
_META = {"domains": ["biomedicine"], "input_context": "paragraph", "output_context": "json", "task_family": "ie"}
SETS = (
    SyntheticSet(
        "scalequest-math", "query_response", 1_003_467, 465, {"maths": 9, "prose": 1}, "ScaleQuest-Math", "train.json"
    ),
    SyntheticSet(
        "smoltalk", "messages", 1_043_917, 831, CHAT, "smoltalk", f"data/all/{PARQUET}", "all", (2, 2, 4, 6), 0.2,
        {"source": "smol-magpie-ultra"},
    ),
    *(
        SyntheticSet(
            f"opc-{name.split('_')[0]}", "instruction_output", rows, 585, {"code": 8, "prose": 2}, "opc-sft-stage2",
            f"{name}/{PARQUET}", name, extra={"seq_id": 1, "tag": "x", **extra},
        )
        for name, (rows, extra) in OPC.items()
    ),
    SyntheticSet(
        "tulu-3", "messages", 939_334, 678, {**CHAT, "scripts": 1.0}, "tulu-3-sft-mixture", f"data/{PARQUET}",
        "default", (2, 2, 2, 4), 0.05, {"id": "tulu_1", "source": "ai2-adapt-dev/flan_v2_converted"},
    ),
    SyntheticSet(
        "sciriff", "input_output", 70_521, 1203, {"prose": 7, "records": 3}, "SciRIFF", f"4096/{PARQUET}", "4096",
        extra={"metadata": _META, "_instance_id": "x:train:1"},
    ),
    SyntheticSet(
        "table-gpt", "messages", 13_222, 877, {"table": 9, "prose": 1}, "Table-GPT", "train/train_All.jsonl", "All",
        extra={"task": "T-8", "prompt": "p", "completion": "c"},
    ),
    SyntheticSet("sharegpt", "sharegpt", 70_000, 663, CHAT, "sharegpt", "chat.jsonl", turns=(2, 4, 6, 8), system=0.3),
)  # fmt: skip
CHARACTERS = {"prose": 4.1, "code": 3.0, "maths": 2.4, "table": 1.8, "records": 3.1, "scripts": 2.1}
"""Of a token, by Qwen2.5's vocabulary."""
SIGMA, ANSWER_SHARE = 0.8, 0.68
_SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}
_COLUMNS = {
    "query_response": ("query", "response"),
    "instruction_output": ("instruction", "output"),
    "input_output": ("input", "output"),
}
BAD_LINES = (b"{not json", b'{"conversations": [', b"\xff\xfe\x00", b"[1, 2]", b'"text"', b"null")
"""Lines that are no row."""


@dataclass
class Planted:
    """How many rows of a set are what."""

    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    no_answer: int = 0
    """Valid conversations without an assistant turn."""
    copies: Counter[str] = field(default_factory=Counter)
    """Source set -> rows that are copies of one of its rows."""
    characters: int = 0


def conversations(a_set: SyntheticSet, n: int, library: Library, rng: random.Random) -> Iterator[Turns]:
    """n conversations of the set's kind; each has a number in its first user turn, so that no two are alike."""
    draws = np.random.default_rng(rng.getrandbits(64))
    tokens = draws.lognormal(np.log(a_set.tokens) - SIGMA**2 / 2, SIGMA, n).clip(12, 60_000)
    genres = rng.choices(list(a_set.genres), list(a_set.genres.values()), k=n)
    for i, (count, genre) in enumerate(zip(tokens.tolist(), genres, strict=True)):
        pairs = rng.choice(a_set.turns) // 2
        turns: Turns = []
        if a_set.system and rng.random() < a_set.system:
            turns.append(("system", library.take("prose", 120, rng)))
        each = count * CHARACTERS[genre] / pairs
        for _ in range(pairs):
            asked = library.take(
                "prose" if genre in ("code", "scripts") else genre, int(each * (1 - ANSWER_SHARE)), rng
            )
            head = f"{asked} (No. {i})" if len(turns) < 2 else asked
            turns += [("user", head), ("assistant", library.take(genre, int(each * ANSWER_SHARE), rng))]
        yield turns


def _row(a_set: SyntheticSet, turns: Turns) -> dict[str, Any]:
    if a_set.form == "messages":
        return {"messages": [{"content": text, "role": role} for role, text in turns], **a_set.extra}
    if a_set.form == "sharegpt":
        return {"conversations": [{"from": _SHAREGPT[role], "value": text} for role, text in turns]}
    prompt, answer = _COLUMNS[a_set.form]
    return {prompt: turns[-2][1], answer: turns[-1][1], **a_set.extra}


def _spoil(a_set: SyntheticSet, turns: Turns, rng: random.Random, planted: Planted) -> dict[str, Any] | bytes:
    """A row that is no conversation, or has no answer."""
    if a_set.pattern.endswith((".json", ".jsonl")) and rng.random() < 0.5:
        planted.rejected["not a row"] += 1
        return rng.choice(BAD_LINES)
    if a_set.form in _COLUMNS:
        planted.rejected["null"] += 1
        return {**_row(a_set, turns), _COLUMNS[a_set.form][rng.randrange(2)]: None}
    column = "messages" if a_set.form == "messages" else "conversations"
    keys = ("role", "content") if a_set.form == "messages" else ("from", "value")
    kind = rng.choice(("role", "null", "empty", "no answer"))
    if kind == "no answer":
        planted.no_answer += 1
        return _row(a_set, [turn for turn in turns if turn[0] != "assistant"])
    planted.rejected[kind] += 1
    spoilt: dict[str, list[Any]] = {
        "role": [{keys[0]: "robot", keys[1]: "x"}],
        "null": [{keys[0]: "user" if keys[0] == "role" else "human", keys[1]: None}],
        "empty": [],
    }
    return {**_row(a_set, turns), column: spoilt[kind]}


class Mixture:
    """Writes the sets one after the other, keeping some conversations to copy them later.

    Args:
        out: folder of the mixture.
        seed: of everything.
        bad, duplicates: shares of planted rows.
    """

    def __init__(self, out: Path, seed: int, bad: float, duplicates: float, library: Library) -> None:
        self._out, self._bad, self._duplicates, self._library = out, bad, duplicates, library
        self._rng = random.Random(f"{seed} rows")
        self._kept: list[tuple[str, Turns]] = []

    def write(self, a_set: SyntheticSet, n: int) -> Planted:
        """n rows of one set into its files."""
        planted, rows = Planted(rows=n), self._rows(a_set, n)
        folder = self._out / a_set.folder
        lines = a_set.pattern.endswith((".json", ".jsonl"))
        files = 1 if lines else -(-n // ROWS_OF_A_FILE)
        for i in range(files):
            path = folder / a_set.pattern.format(i=i, n=files)
            path.parent.mkdir(parents=True, exist_ok=True)
            share = n * (i + 1) // files - n * i // files
            self._file(a_set, path, [next(rows) for _ in range(share)] if not lines else rows, planted)
        return planted

    def _rows(self, a_set: SyntheticSet, n: int) -> Iterator[tuple[str, Turns]]:
        """(set that the row is a copy from, or "bad", or "", turns)."""
        rng = self._rng
        for turns in conversations(a_set, n, self._library, rng):
            kind = rng.random()
            if kind < self._bad:
                yield "bad", turns
            elif kind < self._bad + self._duplicates and self._kept:
                source, copy = rng.choice(self._kept)
                pair = len(copy) == 2 and copy[0][0] == "user"
                yield (source, copy) if pair or a_set.form not in _COLUMNS else ("", turns)
            else:
                if rng.random() < 0.02 and len(self._kept) < 20_000:
                    self._kept.append((a_set.name, turns))
                yield "", turns

    def _file(self, a_set: SyntheticSet, path: Path, rows: Any, planted: Planted) -> None:
        content: list[dict[str, Any]] = []
        with open(path, "wb") as file:
            for kind, turns in rows:
                if kind == "bad":
                    row = _spoil(a_set, turns, self._rng, planted)
                else:
                    row = _row(a_set, turns)
                    planted.copies.update([kind] if kind else [])
                planted.characters += sum(len(text) for _, text in turns)
                if path.suffix == ".parquet":
                    assert isinstance(row, dict)
                    content.append(row)
                else:
                    file.write((row if isinstance(row, bytes) else orjson.dumps(row)) + b"\n")
        if content:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=1000)


def write_readmes(out: Path) -> None:
    """README.md of every set, with the YAML that names the files of its configurations."""
    for name in sorted({a_set.folder for a_set in SETS if a_set.form != "sharegpt"}):
        configs = [
            {
                "config_name": a_set.config,
                "data_files": [{"split": "train", "path": a_set.pattern.replace("{i:05}-of-{n:05}.parquet", "*")}],
            }
            for a_set in SETS
            if a_set.folder == name and a_set.config
        ]
        header = {"license": "mit", **({"configs": configs} if configs else {})}
        (out / name / "README.md").write_text(f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n")


def write_build(out: Path, sizes: dict[str, int]) -> None:
    """The ShareGPT set's meta JSON, and build.yaml."""
    meta = {"chat": {"root": "", "annotation": "chat.jsonl", "repeat_time": 1, "length": sizes["sharegpt"]}}
    (out / "sharegpt" / "meta.json").write_text(json.dumps(meta, indent=2))
    sources = []
    for a_set in SETS:
        path = out / a_set.folder / ("meta.json" if a_set.form == "sharegpt" else "")
        source = {"name": a_set.name, "format": a_set.form, "path": str(path.resolve())}
        if a_set.config:
            source["subset"] = a_set.config
        expected = {"expected_rows": sizes[a_set.name]} if a_set.form != "sharegpt" else {}
        sources.append({**source, **expected, "licence": "made up"})
    text = "# A made-up mixture. Give --tokenizer=FOLDER and --out=FOLDER.\n"
    (out / "build.yaml").write_text(text + yaml.safe_dump({"sources": sources}, sort_keys=False, width=1000))


def sizes(rows: int) -> dict[str, int]:
    """Set -> rows, in the proportions of the mixture and together exactly `rows`."""
    total = sum(a_set.rows for a_set in SETS)
    edges = np.cumsum([0] + [a_set.rows for a_set in SETS]) * rows // total
    return {a_set.name: int(n) for a_set, n in zip(SETS, np.diff(edges), strict=True)}


def generate(out: Path, *, rows: int, seed: int, bad: float, duplicates: float) -> dict[str, Planted]:
    """Writes the mixture into `out`, a new folder; what was planted in each set."""
    out.mkdir(parents=True)
    mixture = Mixture(out, seed, bad, duplicates, Library(seed, min(6_000_000, 40_000 + 100 * rows)))
    found = {a_set.name: mixture.write(a_set, n) for a_set, n in zip(SETS, sizes(rows).values(), strict=True)}
    write_readmes(out)
    write_build(out, sizes(rows))
    (out / "planted.json").write_text(json.dumps({name: vars(planted) for name, planted in found.items()}, indent=2))
    return found


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.synthetic_mixture",
        __doc__,
        example="python -m dev.bench.synthetic_mixture --out MIXTURE --rows 200000\n"
        "sdlm prepare --config MIXTURE/build.yaml --tokenizer=Qwen2.5-3B --out=DATA",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of all sets together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the conversations")
    parser.add_argument("--bad", type=float, default=0.002, help="share of rows that are no conversation")
    parser.add_argument("--duplicates", type=float, default=0.02, help="share of rows that are copies")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists")
    if args.rows < 1000:
        parser.error("--rows: 1000 at least, so that no set is empty")
    started = time.perf_counter()
    found = generate(args.out, rows=args.rows, seed=args.seed, bad=args.bad, duplicates=args.duplicates)
    print(f"{'set':18}{'rows':>9}{'rejected':>10}{'no answer':>11}{'copies':>8}{'characters':>12}")
    for name, planted in found.items():
        figures = (
            planted.rejected.total(),
            planted.no_answer,
            planted.copies.total(),
            planted.characters // planted.rows,
        )
        print(f"{name:18}{planted.rows:>9,}{figures[0]:>10,}{figures[1]:>11,}{figures[2]:>8,}{figures[3]:>12,}")
    print(f"{args.rows:,} rows in {time.perf_counter() - started:.0f} s: {args.out / 'build.yaml'}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
