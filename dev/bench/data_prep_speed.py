"""Conversations to packed rows, one core, side by side in one run: `python -m dev.bench.data_prep_speed --tokenizer FOLDER`.

- the bare tokenizers: what tokenizing alone costs;
- the reference's processing of one sample (a checkout of OpenGVLab/SDLM, with `--reference`), in memory, with the fast
  tokenizer; reading, padding and collating, which it does too, are left out;
- ours, from the JSONL file to the dataset on the disk, in one process; a second build, with timers in it, says where
  the time goes.

The text is real: documentation and source code that lie beside every Python installation, cut into conversations with
the mixture's lengths.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from data_prep import documents, readers
from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.encoders import FastTokenizer, TextTokenizer, open_encoder
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data import format as data_format
from sdlm_megatron.data.indexed import IndexedWriter
from sdlm_megatron.errors import run_cli

QUIET = Console(quiet=True)
SUFFIXES = (".py", ".md", ".rst", ".txt", ".json", ".html", ".c", ".h", ".pyi")


def real_texts(characters: int, rng: np.random.Generator) -> str:
    """Text files beside this Python, in random order, as one string of about so many characters."""
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    files = sorted(f for root in roots for f in Path(root).rglob("*") if f.suffix in SUFFIXES and f.is_file())
    parts, found = [], 0
    for i in rng.permutation(len(files)):
        text = files[i].read_text(encoding="utf-8", errors="ignore")[:20_000]
        parts.append(text)
        found += len(text)
        if found >= characters:
            break
    return "".join(parts)


def conversations(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n ShareGPT rows of one to three rounds; the answers hold about two thirds of the text."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(np.log(2400) - 0.32, 0.8, n).astype(int) + 60
    text = real_texts(int(sizes.sum()) + 1, rng)
    rows, at = [], 0
    for size in sizes.tolist():
        rounds, turns = int(rng.integers(1, 4)), []
        for _ in range(rounds):
            for speaker, share in (("human", 0.3), ("gpt", 0.7)):
                length = int(size * share / rounds)
                turns.append({"from": speaker, "value": text[at : at + length]})
                at = (at + length) % max(1, len(text) - 4 * length - 1)
        rows.append({"conversations": turns})
    return rows


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def reference(folder: Path, tokenizer: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The reference's function on every row: clean tokens, seconds, seconds in its tokenizer."""
    from transformers import AutoTokenizer

    sys.path.insert(0, str(folder))
    from sdlm.preprocess.preprocess_sdlm import preprocess_mask_block  # type: ignore[import-not-found]

    inner = AutoTokenizer.from_pretrained(str(tokenizer))
    spent = 0.0

    class Timed:
        """The tokenizer, timed."""

        model_max_length, pad_token_id = 5632, inner.pad_token_id

        def __call__(self, *args: Any, **options: Any) -> Any:
            nonlocal spent
            seconds, result = timed(lambda: inner(*args, **options))
            spent += seconds
            return result

    def run() -> int:
        clean = 0
        options = {"block_size": 4, "mask_token_id": 151665, "expected_mask_repeat_times": 3}
        for row in rows:
            found = preprocess_mask_block("Qwen-2-5", [row["conversations"]], Timed(), **options)
            clean += (
                int((found["position_ids"][0].diff() < 0).nonzero()[0]) + 1
            )  # its blocks begin where positions drop
        return clean

    with contextlib.redirect_stdout(io.StringIO()):
        seconds, clean = timed(run)
    return {"clean": clean, "seconds": seconds, "tokenizing": spent, "samples": len(rows)}


@contextlib.contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Adds up, for a build in this process, the CPU seconds in reading, tokenizing, and checksums with writing."""

    def timer(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            seconds, result = timed(lambda: call(*args, **options))
            spent[name] += seconds
            return result

        return run

    def reading(*args: Any) -> Iterator[Any]:
        rows = readers.read_unit(*args)
        end = object()
        while (row := timer("reading", lambda: next(rows, end))()) is not end:
            yield row

    with contextlib.ExitStack() as patches:
        for owner, attribute, name in (
            (FastTokenizer, "encode_flat", "tokenizing"),
            (FastTokenizer, "spelled", "tokenizing"),
            (IndexedWriter, "add", "disk"),
            (IndexedWriter, "finish", "disk"),
            (data_format, "_checksum", "disk"),
        ):
            patches.enter_context(patch.object(owner, attribute, timer(name, getattr(owner, attribute))))
        patches.enter_context(patch.object(documents, "read_unit", reading))
        yield


def ours(tokenizer: Path, rows: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """A build of one process, from the file to the dataset, and where its time goes."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source = SourceConfig(name="real", format="sharegpt", path=str(file))
    config = BuildConfig(out=str(folder / "data"), tokenizer=str(tokenizer), sources=[source])
    empty = folder / "empty.jsonl"
    empty.write_text(json.dumps(rows[0]) + "\n")
    nothing = BuildConfig(
        out=str(folder / "one"),
        tokenizer=str(tokenizer),
        sources=[SourceConfig(name="one", format="sharegpt", path=str(empty))],
    )
    start, _ = timed(lambda: build(nothing, QUIET))  # opens the tokenizer, which the next one finds open
    spent = dict.fromkeys(("reading", "tokenizing", "disk"), 0.0)
    with watched(spent):
        build(replace(config, out=config.out + "2"), QUIET)
    seconds, manifest = timed(lambda: build(config, QUIET))
    return {
        **spent,
        "clean": manifest["accounting"]["clean_tokens"],
        "seconds": seconds,
        "start": start,
        "samples": manifest["accounting"]["packed"] + manifest["accounting"]["truncated"],
    }


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser(
        "python -m dev.bench.data_prep_speed",
        __doc__,
        example="taskset -c 0 python -m dev.bench.data_prep_speed --tokenizer Qwen2.5-3B --reference ../SDLM",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen2.5's tokenizer.json")
    parser.add_argument("--reference", type=Path, help="checkout of github.com/OpenGVLab/SDLM")
    parser.add_argument("--rows", type=int, default=20_000, help="conversations to prepare")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    rows = conversations(args.rows)
    pieces = [f"{turn['from']}\n{turn['value']}" for row in rows for turn in row["conversations"]]
    few = max(1, args.rows // 10)
    columns = ("M tokens/s", "us a sample", "tokenizing", "reading", "checksums, disk", "the rest", "samples")
    table = Table(Column("", no_wrap=True), *columns, box=SIMPLE_HEAD)
    encoder, slow = open_encoder(args.tokenizer), TextTokenizer.from_folder(args.tokenizer)
    chunks = [pieces[at : at + 1024] for at in range(0, len(pieces), 1024)]
    seconds, n = timed(lambda: sum(len(encoder.encode_flat(chunk)[0]) for chunk in chunks))
    table.add_row(f"bare {encoder.backend}", f"{n / seconds / 1e6:.2f}", f"{seconds / len(rows) * 1e6:.0f}")
    part = chunks[: max(1, len(chunks) // 10)]
    seconds, n = timed(lambda: sum(len(slow.encode_flat(chunk)[0]) for chunk in part))
    table.add_row(f"bare {slow.backend}", f"{n / seconds / 1e6:.2f}")
    theirs = reference(args.reference, args.tokenizer, rows[:few]) if args.reference else None
    if theirs:
        _row(table, "reference, in memory", theirs)
    folder = Path(tempfile.mkdtemp(dir="."))
    try:
        found = ours(args.tokenizer, rows, folder)
    finally:
        shutil.rmtree(folder)
    _row(table, "ours, file to dataset", found)
    console = Console(width=120)
    console.print(table)
    console.print(f"ours without the {found['start']:.1f} s it takes to open the tokenizer", highlight=False)
    if theirs:
        ratio = found["clean"] / found["seconds"] / (theirs["clean"] / theirs["seconds"])
        console.print(f"ours / reference: {ratio:.1f}x clean tokens a second", highlight=False)


def _row(table: Table, name: str, found: dict[str, float]) -> None:
    each = 1e6 / found["samples"]
    parts = [found.get(part, 0.0) for part in ("tokenizing", "reading", "disk")]
    cells = [f"{seconds * each:.0f}" for seconds in (found["seconds"], *parts, found["seconds"] - sum(parts))]
    table.add_row(name, f"{found['clean'] / found['seconds'] / 1e6:.2f}", *cells, f"{found['samples']:,.0f}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
