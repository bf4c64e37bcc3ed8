"""The data of experiment E1: English descriptions of lines of Python, from the user's own copy of the data set.

    git clone https://github.com/odashi/ase15-django-dataset DIR
    python -m dev.evidence.django_lines DIR --out runs/e1/data

The data set (Oda et al., ASE 2015) has 18,805 lines of Django, each with a description; its license is MIT, Django's
own is BSD-3-Clause. Nothing of it is in this repository. The files must be those of commit c37fa28 (2018), by their
SHA-256. Written are train.jsonl (16,000 lines less the long ones), dev.jsonl (1,000) and test.jsonl (1,805), split in
the order of the files as in the literature. A row has the fields `prompt`, `expected` and `line`:

    {"prompt": "import module warnings.", "expected": "import warnings", "line": 1}

Runs of white space become one space, at the ends none: the code is a sequence of Python tokens with spaces between
them, without indentation. Pairs with a long description or line are left out of all three parts (MOST_CHARACTERS).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import DataError, run_cli
from sdlm_megatron.files import sha256, write_text

SHA256 = {
    "all.anno": "86b38c7bf6ffe2882d4603f799e92f48ddaab8a7d9b2af41bba923e59b41800a",
    "all.code": "d20b345fd3cdcf8d54b9cd123b3de4078f8f9a3c6bfc9fed9cd215bc857f99db",
}
"""Files of the data set's folder django/."""
PARTS = {"train": (0, 16_000), "dev": (16_000, 17_000), "test": (17_000, 18_805)}
"""First line and end of each part, counted from 0."""
MOST_CHARACTERS = {"prompt": 500, "expected": 300}
"""Longer texts are left out: a limit on the tokens of an answer keeps the cost of answers that do not end small."""


def check_file(path: Path, expected: str, repository: str, commit: str) -> None:
    """DataError unless `path` is the file of a GitHub repository's commit with the SHA-256 `expected`."""
    if not path.is_file():
        raise DataError("the data set has no such file", str(path), f"name a clone of https://github.com/{repository}")
    if sha256(path) != expected:
        raise DataError("not the expected file: SHA-256 differs", str(path), f"check out commit {commit}")


def read_lines(folder: Path, *, checked: bool = True) -> list[dict[str, str | int]]:
    """Rows {prompt, expected, line} of the whole data set, in its order.

    Args:
        folder: the clone of the data set.
        checked: compare the files with SHA256.

    Raises:
        DataError: a file is missing, differs from the expected one, or the files differ in length.
    """
    texts = []
    for name, expected in SHA256.items():
        path = folder / "django" / name
        if checked:
            check_file(path, expected, "odashi/ase15-django-dataset", "c37fa28")
        # str.splitlines would also split at form feeds and other rare characters.
        texts.append([" ".join(line.split()) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")])
    if len(texts[0]) != len(texts[1]):
        raise DataError(f"{len(texts[0])} descriptions but {len(texts[1])} lines", str(folder), "clone it again")
    return [{"prompt": a, "expected": c, "line": i} for i, (a, c) in enumerate(zip(*texts, strict=True), 1)]


def part_rows(rows: Sequence[dict[str, str | int]], part: str) -> list[dict[str, str | int]]:
    """The rows of a part that are short enough."""
    return [
        row
        for row in rows[slice(*PARTS[part])]
        if all(row[name] and len(str(row[name])) <= most for name, most in MOST_CHARACTERS.items())
    ]


def write_parts(folder: Path, out: Path) -> None:
    """Writes OUT/train.jsonl, dev.jsonl, test.jsonl and says how many pairs each has."""
    rows = read_lines(folder)
    out.mkdir(parents=True, exist_ok=True)
    for part, (first, end) in PARTS.items():
        taken = part_rows(rows, part)
        write_text(out / f"{part}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in taken))
        print(f"{out / part}.jsonl: {len(taken):,} pairs, {end - first - len(taken)} long ones left out")


def read_part(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `write_parts` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def new_prompts(data: Path) -> str:
    """A text of 1 for each test prompt that does not occur in the training part, and 0 for the others."""
    known = {row["prompt"] for row in read_part(data / "train.jsonl")}
    return "".join(str(int(row["prompt"] not in known)) for row in read_part(data / "test.jsonl"))


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.evidence.django_lines"
    parser = make_parser(command, __doc__, example=f"{command} ase15-django-dataset --out runs/e1/data")
    parser.add_argument("dataset", type=Path, metavar="DIR", help="clone of odashi/ase15-django-dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the three parts")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    write_parts(args.dataset, args.out)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
