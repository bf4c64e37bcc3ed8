"""Speed of preparing data on one core: bare tokenizers, the reference's function, and a whole build.

The reference (a checkout of OpenGVLab/SDLM, with --reference) processes samples in memory with the fast tokenizer;
its reading, padding and collating are left out. Our build goes from a JSONL file to the dataset on the disk in one
process; a second build with timers shows where the time goes. "Near-duplicates" and "decontamination" are what these
options add per row: the signatures, and the search for 100,000 words of an evaluation file, none of which occur. The
text is the source code and documentation of this Python installation, cut into conversations with the mixture's
lengths. All times are CPU time.
"""

import argparse
import contextlib
import io
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console

from data_prep import documents, readers
from data_prep.build import build
from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.decontaminate import EvaluationTexts
from data_prep.encoders import FastTokenizer, TextTokenizer, open_encoder
from data_prep.minhash import signatures
from dev.bench.timing import print_table
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.data import format as data_format
from sdlm_megatron.data.indexed import IndexedWriter
from sdlm_megatron.errors import run_cli

SUFFIXES = (".py", ".md", ".rst", ".txt", ".json", ".html", ".c", ".h", ".pyi")
PARTS = ("tokenizing", "reading", "checksums, disk")
HEAD = ("", "M tokens/s", "µs a sample", *PARTS, "rest", "samples")


@cache
def text_files() -> list[Path]:
    """Text files of this Python installation."""
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    return sorted(f for root in roots for f in Path(root).rglob("*") if f.suffix in SUFFIXES and f.is_file())


def real_text(characters: int, rng: np.random.Generator) -> str:
    """Text files of this Python installation in random order, joined to at least `characters` if there are enough."""
    parts, total = [], 0
    for i in rng.permutation(len(text_files())):
        # The limit keeps a few huge tables from making up most of the text.
        parts.append(text_files()[i].read_text(encoding="utf-8", errors="ignore")[:20_000])
        total += len(parts[-1])
        if total >= characters:
            break
    return "".join(parts)


def sharegpt_rows(n: int) -> list[dict[str, Any]]:
    """n ShareGPT rows of one to three rounds, in which answers hold about two thirds of the text."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(np.log(2400) - 0.32, 0.8, n).astype(int) + 60
    text = real_text(int(sizes.sum()) + 1, rng)
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


class CpuClock:
    """CPU seconds by part, accumulated over calls."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*PARTS, "all"), 0.0)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with its CPU time added to `part`."""

        def run(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            result = call(*args, **options)
            self.seconds[part] += time.process_time() - start
            return result

        return run

    def row(self, name: str, clean_tokens: int, samples: int) -> tuple[str, ...]:
        """Row of the table."""
        parts = [self.seconds[part] for part in PARTS]
        each = [f"{s / samples * 1e6:.0f}" for s in (self.seconds["all"], *parts, self.seconds["all"] - sum(parts))]
        return name, f"{clean_tokens / self.seconds['all'] / 1e6:.2f}", *each, f"{samples:,}"


def measure_tokenizer(encoder: Any, texts: list[str], samples: int) -> tuple[str, ...]:
    """Row of the table for a tokenizer alone."""
    clock = CpuClock()
    chunks = [texts[at : at + 1024] for at in range(0, len(texts), 1024)]
    tokens = clock.timed("all", lambda: sum(len(encoder.encode_flat(chunk)[0]) for chunk in chunks))()
    return clock.row(f"bare {encoder.backend}", tokens, samples)


def measure_reference(folder: Path, tokenizer: Path, rows: list[dict[str, Any]]) -> tuple[CpuClock, int]:
    """The reference's function on every row: its times, and the number of clean tokens."""
    from transformers import AutoTokenizer

    sys.path.insert(0, str(folder))
    from sdlm.preprocess.preprocess_sdlm import preprocess_mask_block  # type: ignore[import-not-found]

    inner, clock = AutoTokenizer.from_pretrained(str(tokenizer)), CpuClock()

    class TimedTokenizer:
        model_max_length, pad_token_id = 5632, inner.pad_token_id
        __call__ = staticmethod(clock.timed("tokenizing", inner))

    def run() -> int:
        clean = 0
        options = {"block_size": 4, "mask_token_id": 151665, "expected_mask_repeat_times": 3}
        for row in rows:
            sample = preprocess_mask_block("Qwen-2-5", [row["conversations"]], TimedTokenizer(), **options)
            # Positions grow over the clean tokens and drop where the first block begins.
            clean += int((sample["position_ids"][0].diff() < 0).nonzero()[0]) + 1
        return clean

    with contextlib.redirect_stdout(io.StringIO()):
        clean = clock.timed("all", run)()
    return clock, clean


@contextlib.contextmanager
def watched(clock: CpuClock) -> Iterator[None]:
    """Adds the time of a build in this process to the parts of `clock`."""

    def read_unit(*args: Any) -> Iterator[Any]:
        rows, end = original(*args), object()
        while (row := clock.timed("reading", next)(rows, end)) is not end:
            yield row

    original = readers.read_unit
    with contextlib.ExitStack() as patches:
        for owner, attribute, part in (
            (FastTokenizer, "encode_flat", "tokenizing"),
            (FastTokenizer, "spelled", "tokenizing"),
            (IndexedWriter, "add", "checksums, disk"),
            (IndexedWriter, "finish", "checksums, disk"),
            (data_format, "_checksum", "checksums, disk"),
        ):
            patches.enter_context(patch.object(owner, attribute, clock.timed(part, getattr(owner, attribute))))
        patches.enter_context(patch.object(documents, "read_unit", read_unit))
        yield


def measure_build(tokenizer: Path, rows: list[dict[str, Any]], folder: Path) -> tuple[CpuClock, int, int]:
    """A build in one process: its times, clean tokens and samples."""

    def config_of(name: str, some: list[dict[str, Any]]) -> BuildConfig:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
        source = SourceConfig(name="real", format="sharegpt", path=str(file))
        return BuildConfig(out=str(folder / name), tokenizer=str(tokenizer), sources=[source])

    clock, watch = CpuClock(), CpuClock()
    console = Console(quiet=True)
    build(config_of("warm-up", rows[:1]), console)  # opens the tokenizer, which later builds reuse
    with watched(watch):
        build(config_of("watched", rows), console)
    accounting = clock.timed("all", build)(config_of("data", rows), console)["accounting"]
    clock.seconds = {**watch.seconds, "all": clock.seconds["all"]}
    return clock, accounting["clean_tokens"], accounting["packed"] + accounting["truncated"]


def measure_repetitions(rows: list[dict[str, Any]], folder: Path, tokens: int) -> list[tuple[str, ...]]:
    """Rows of the table for the two options that compare words."""
    chats = [[(turn["from"], turn["value"]) for turn in row["conversations"]] for row in rows]
    words = [word for chat in chats[:500] for _, text in chat for word in text.split()]
    mixed = np.random.default_rng(1).choice(words, (1000, 100)).tolist()
    file = folder / "evaluation.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(part)}) + "\n" for part in mixed), encoding="utf-8")
    result = []
    for name, work in (("near-duplicates", signatures), ("decontamination", EvaluationTexts([str(file)]).find)):
        clock = CpuClock()
        for at in range(0, len(chats), documents.CHUNK):
            clock.timed("all", work)(chats[at : at + documents.CHUNK])
        result.append(clock.row(name, tokens, len(chats)))
    return result


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.bench.data_prep_speed"
    parser = make_parser(command, __doc__, example=f"taskset -c 0 {command} --tokenizer Qwen2.5-3B --reference ../SDLM")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen2.5's tokenizer.json")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="checkout of github.com/OpenGVLab/SDLM")
    parser.add_argument("--rows", type=int, default=20_000, help="conversations; the slow cases take a tenth of them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    rows = sharegpt_rows(args.rows)
    few = rows[: max(1, len(rows) // 10)]
    texts, few_texts = (
        [f"{turn['from']}\n{turn['value']}" for row in some for turn in row["conversations"]] for some in (rows, few)
    )
    table = [
        measure_tokenizer(open_encoder(args.tokenizer), texts, len(rows)),
        measure_tokenizer(TextTokenizer.from_folder(args.tokenizer), few_texts, len(few)),
    ]
    reference_speed = None
    if args.reference:
        clock, clean = measure_reference(args.reference, args.tokenizer, few)
        reference_speed = clean / clock.seconds["all"]
        table.append(clock.row("reference, in memory", clean, len(few)))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        clock, clean, samples = measure_build(args.tokenizer, rows, Path(folder))
        options = measure_repetitions(rows, Path(folder), clean)
    table += options
    table.append(clock.row("ours, file to dataset", clean, samples))
    print_table(HEAD, table)
    if reference_speed:
        print(f"ours / reference: {clean / clock.seconds['all'] / reference_speed:.1f}x clean tokens per CPU second")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
