"""Writes a synthetic training mixture: the sets of `mixture_3p5m` in their real row formats and file layouts.

The sets have the mixture's proportions and lengths, and there is a ShareGPT set with its meta JSON. The text is taken
from the source code and documentation of this Python installation. The same seed gives the same bytes on the same
installation. `build.yaml` in the same folder is the configuration for `sdlm prepare`.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow
import pyarrow.parquet
import yaml

from dev.bench.data_prep_speed import real_text
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, run_cli

ROWS_OF_A_FILE = 50_000
CHARACTERS_PER_TOKEN = 3.2
"""Of the text, with Qwen2.5's vocabulary."""
SIGMA, ANSWER_SHARE = 0.8, 0.68
PARQUET = "train-{i:05}-of-{n:05}.parquet"


@dataclass(frozen=True)
class SyntheticSet:
    """One set of the mixture."""

    name: str
    form: str
    rows: int
    """Rows in the real mixture, which give its share."""
    tokens: float
    """Mean content tokens of a row."""
    folder: str
    pattern: str
    """Files in the folder, with fields i and n."""
    config: str = ""
    turns: tuple[int, ...] = (2,)
    """Numbers of turns to draw from."""
    system: float = 0.0
    """Share of rows with a system turn."""


OPC = {"educational": 118_278, "evol": 111_183, "mceval": 35_943, "package": 170_943}
SETS = (
    SyntheticSet("scalequest-math", "query_response", 1_003_467, 465, "ScaleQuest-Math", "train.json"),
    SyntheticSet("smoltalk", "messages", 1_043_917, 831, "smoltalk", f"data/all/{PARQUET}", "all", (2, 2, 4, 6), 0.2),
    *(
        SyntheticSet(f"opc-{name}", "instruction_output", rows, 585, "opc-sft-stage2", f"{folder}/{PARQUET}", folder)
        for name, rows in OPC.items()
        for folder in [f"{name}_instruct"]
    ),
    SyntheticSet(
        *("tulu-3", "messages", 939_334, 678, "tulu-3-sft-mixture", f"data/{PARQUET}", "default", (2, 2, 2, 4), 0.05)
    ),
    SyntheticSet("sciriff", "input_output", 70_521, 1203, "SciRIFF", f"4096/{PARQUET}", "4096"),
    SyntheticSet("table-gpt", "messages", 13_222, 877, "Table-GPT", "train/train_All.jsonl", "All"),
    SyntheticSet("sharegpt", "sharegpt", 70_000, 663, "sharegpt", "chat.jsonl", turns=(2, 4, 6, 8), system=0.3),
)
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
COLUMNS = {
    "query_response": ("query", "response"),
    "instruction_output": ("instruction", "output"),
    "input_output": ("input", "output"),
}


class ConversationSource:
    """Random conversations cut from a text."""

    def __init__(self, text: str, seed: int) -> None:
        self._text, self._rng = text, random.Random(f"{seed} rows")

    def row(self, a_set: SyntheticSet, tokens: float, number: int) -> dict[str, Any]:
        """One row of about `tokens` content tokens in the set's format."""
        rounds = self._rng.choice(a_set.turns) // 2
        turns = [("system", self._take(40))] if self._rng.random() < a_set.system else []
        for i in range(rounds):
            # The number makes every row distinct, so that a build finds no duplicates.
            label = f" (No. {a_set.name} {number})" if i == 0 else ""
            turns.append(("user", self._take(tokens * (1 - ANSWER_SHARE) / rounds) + label))
            # Stripped text can be empty, and an empty answer would be rejected.
            turns.append(("assistant", self._take(tokens * ANSWER_SHARE / rounds) or "-"))
        if a_set.form == "messages":
            return {"messages": [{"content": text, "role": role} for role, text in turns]}
        if a_set.form == "sharegpt":
            return {"conversations": [{"from": SPEAKERS[role], "value": text} for role, text in turns]}
        prompt, answer = COLUMNS[a_set.form]
        return {prompt: turns[-2][1], answer: turns[-1][1]}

    def _take(self, tokens: float) -> str:
        characters = min(int(tokens * CHARACTERS_PER_TOKEN), len(self._text) // 2)
        at = self._rng.randrange(len(self._text) - characters)
        return self._text[at : at + characters].strip()


def write_set(out: Path, a_set: SyntheticSet, n: int, source: ConversationSource, rng: np.random.Generator) -> None:
    """Writes n rows of a set into its files below `out`."""
    tokens = rng.lognormal(np.log(a_set.tokens) - SIGMA**2 / 2, SIGMA, n).clip(12, 60_000)
    parquet = a_set.pattern.endswith(".parquet")
    files = -(-n // ROWS_OF_A_FILE) if parquet else 1
    for i, part in enumerate(np.array_split(np.arange(n), files)):
        path = out / a_set.folder / a_set.pattern.format(i=i, n=files)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [source.row(a_set, tokens[number], number) for number in part.tolist()]
        if parquet:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
        else:
            path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def write_metadata(out: Path, rows: dict[str, int]) -> None:
    """Writes README.md of every set (its YAML names the files of each configuration), the meta JSON and build.yaml."""
    for folder in sorted({a_set.folder for a_set in SETS if a_set.form != "sharegpt"}):
        configs = [
            {"config_name": s.config, "data_files": [{"split": "train", "path": s.pattern.replace(PARQUET, "*")}]}
            for s in SETS
            if s.folder == folder and s.config
        ]
        header = {"license": "mit", **({"configs": configs} if configs else {})}
        (out / folder / "README.md").write_text(f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n")
    meta = {"chat": {"root": "", "annotation": "chat.jsonl", "repeat_time": 1, "length": rows["sharegpt"]}}
    (out / "sharegpt" / "meta.json").write_text(json.dumps(meta, indent=2))
    sources = []
    for a_set in SETS:
        path = out / a_set.folder / ("meta.json" if a_set.form == "sharegpt" else "")
        source = {"name": a_set.name, "format": a_set.form, "path": str(path.resolve()), "licence": "synthetic"}
        subset = {"subset": a_set.config} if a_set.config else {}
        expected = {} if a_set.form == "sharegpt" else {"expected_rows": rows[a_set.name]}
        sources.append({**source, **subset, **expected})
    (out / "build.yaml").write_text(yaml.safe_dump({"sources": sources}, sort_keys=False, width=1000))


def set_rows(rows: int) -> dict[str, int]:
    """Set to its number of rows: the mixture's proportions, `rows` in total."""
    # Rounding the cumulative sums, not the parts, makes the total exact.
    edges = np.cumsum([0] + [a_set.rows for a_set in SETS])
    return {s.name: int(n) for s, n in zip(SETS, np.diff(edges * rows // edges[-1]), strict=True)}


def generate(out: Path, *, rows: int, seed: int) -> None:
    """Writes the mixture into the new folder `out`."""
    out.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    source = ConversationSource(real_text(min(20_000_000, 200_000 + 100 * rows), rng), seed)
    for a_set in SETS:
        write_set(out, a_set, set_rows(rows)[a_set.name], source, rng)
    write_metadata(out, set_rows(rows))


EXAMPLE = """
python -m dev.bench.synthetic_mixture --out MIXTURE --rows 200000
sdlm prepare --config MIXTURE/build.yaml --tokenizer=Qwen2.5-3B --out=DATA
"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("python -m dev.bench.synthetic_mixture", __doc__, example=EXAMPLE)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of all sets together, at least 1000")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if args.out.exists():
        raise ConfigError("the folder exists", str(args.out), "name a new one")
    if args.rows < 1000:  # with fewer, some sets would be empty
        raise ConfigError(f"--rows {args.rows} is too small", "the command line", "--rows 1000 or more")
    started = time.perf_counter()
    generate(args.out, rows=args.rows, seed=args.seed)
    print(f"{args.rows:,} rows in {time.perf_counter() - started:.0f} s: {args.out / 'build.yaml'}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
