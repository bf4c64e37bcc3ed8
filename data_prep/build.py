"""Builds a packed dataset: `python -m data_prep.build --config FILE [--a.b=c]`.

Two stages. All rows are rendered, tokenized and fitted once, into a temporary file. Then, for every epoch,
the documents are shuffled, packed, given their blocks, and the rows written in shuffled order. The result
depends on the config and the input alone.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from data_prep.accounting import Rejects, Tally, total
from data_prep.chat import IM_END, render_parsed
from data_prep.config import PRESETS, BuildConfig, SourceConfig, check
from data_prep.packing import best_fit, order
from data_prep.progress import Advance, track
from data_prep.sources import InputRow, conversation, count, expand, read
from data_prep.spill import Spill
from data_prep.tokenizer import TextTokenizer
from data_prep.truncate import FITS
from sdlm_megatron.config.load import parse_cli
from sdlm_megatron.data.format import DatasetWriter
from sdlm_megatron.data.tokenizer import fingerprint, special_token_id, vocabulary_size
from sdlm_megatron.diffusion.layout import draw_starts, pack_row
from sdlm_megatron.errors import DataError, run_cli

CHUNK = 256
"""Rows tokenized in one call."""


@dataclass(frozen=True)
class TokenIds:
    """What the tokenizer says about the tokens that training needs."""

    mask: int
    eos: int
    pad: int
    vocab_size: int
    fingerprint: str | None


def build(config: BuildConfig, console: Console | None = None) -> dict[str, Any]:
    """Builds the dataset of `config` and returns its manifest.

    The folder appears whole or not at all; an existing one is left alone.

    Raises:
        ConfigError, DataError: a setting, a source or the tokenizer cannot be used, or nothing is left to
        train on.
    """
    check(config)
    console = console or Console()
    sources = expand(config.sources)
    sizes = [count(source) for source in sources]
    ids = token_ids(config)
    with DatasetWriter(config.out, meta=_meta(config, sources, ids), epochs=config.epochs) as writer:
        with Spill(writer.partial / "documents.tmp") as spill:
            with Rejects(writer.partial / "rejects.jsonl") as rejects:
                tallies = _render_all(config, sources, sizes, spill, rejects, console)
            n_rows = len(spill) * config.epochs
            with track("pack", n_rows, "documents", console) as advance:
                for epoch in range(config.epochs):
                    _write_epoch(config, epoch, spill, ids.mask, writer, advance)
        manifest = writer.finish({"accounting": _accounting(sources, tallies), "build": asdict(config)})
    _report(manifest, config, console)
    return manifest


def token_ids(config: BuildConfig) -> TokenIds:
    """Looks the special tokens up in the tokenizer's files; DataError when the folder cannot be used."""
    folder = config.tokenizer
    mask, size = special_token_id(folder, config.mask_token), vocabulary_size(folder)
    known = {token: special_token_id(folder, token) for token in (IM_END, config.pad_token)}
    for token, found in known.items():
        if found >= size:
            fix = "set pad_token to a token it has" if token == config.pad_token else "use a ChatML tokenizer"
            raise DataError(f"the tokenizer has no `{token}`", folder, fix)
    return TokenIds(mask, known[IM_END], known[config.pad_token], max(size, mask + 1), fingerprint(folder))


def _meta(config: BuildConfig, sources: list[SourceConfig], ids: TokenIds) -> dict[str, Any]:
    kept = (
        "row_length",
        "max_document_length",
        "block_size",
        "repeat",
        "seed",
        "overlong",
        "system_prompt",
        "mask_token",
    )
    return {
        **{key: getattr(config, key) for key in kept},
        "mask_token_id": ids.mask,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "vocab_size": ids.vocab_size,
        "tokenizer": {"fingerprint": ids.fingerprint, "name": Path(config.tokenizer).name},
        "sources": [asdict(source) for source in sources],
    }


def _render_all(
    config: BuildConfig,
    sources: list[SourceConfig],
    sizes: list[int],
    spill: Spill,
    rejects: Rejects,
    console: Console,
) -> list[Tally]:
    """Stage one: every row of every source into `spill`. Returns the tally of each source."""
    encoder = TextTokenizer.from_folder(config.tokenizer, config.mask_token)
    tallies = []
    number = 0  # of the input row, over all sources and repeats: it is the document's identity
    n_rows = sum(size * source.repeat for size, source in zip(sizes, sources, strict=True))
    with track("tokenize", n_rows, "rows", console) as advance:
        for source in sources:
            tally = Tally()
            for _ in range(source.repeat):
                rows = read(source)
                while chunk := list(islice(rows, CHUNK)):
                    _render_chunk(config, source.format, chunk, number, encoder, spill, rejects, tally)
                    number += len(chunk)
                    advance(len(chunk))
            tally.check()
            tallies.append(tally)
    return tallies


def _render_chunk(
    config: BuildConfig,
    form: str,
    rows: Sequence[InputRow],
    first_number: int,
    encoder: TextTokenizer,
    spill: Spill,
    rejects: Rejects,
    tally: Tally,
) -> None:
    numbers, conversations = [], []
    for number, row in enumerate(rows, first_number):
        try:
            conversations.append(conversation(row, form))
            numbers.append(number)
        except DataError as error:
            rejects.add(row, number, error)
            tally.reject()
    fit = FITS[config.overlong]
    for number, document in zip(
        numbers, render_parsed(conversations, encoder, default_system=config.system_prompt), strict=True
    ):
        fitted = fit(document, max_len=config.max_document_length, block_size=config.block_size, repeat=config.repeat)
        if tally.take(fitted):
            spill.add(number, fitted.input_ids, fitted.anchors, fitted.n_blocks)


def _write_epoch(
    config: BuildConfig, epoch: int, spill: Spill, mask_token_id: int, writer: DatasetWriter, advance: Advance
) -> None:
    """Stage two for one epoch: shuffle, pack, shuffle the rows, draw the blocks, write."""
    documents = order(config.seed, epoch, len(spill), "documents")
    rows = best_fit(spill.lengths(config.block_size)[documents], config.row_length, config.window)
    for row in order(config.seed, epoch, len(rows), "rows"):
        content = list(_draw(config, epoch, spill, documents[rows[row]]))
        tokens, layout = pack_row(content, block_size=config.block_size, mask_token_id=mask_token_id)
        writer.add(epoch, tokens, layout)
        advance(len(content))


def _draw(
    config: BuildConfig, epoch: int, spill: Spill, documents: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(document number, clean ids, block starts) of some documents in one epoch."""
    for i in documents:
        number, input_ids, anchors, n_blocks = spill.read(int(i))
        yield (
            number,
            input_ids,
            draw_starts(anchors, n_blocks, seed=config.seed, epoch=epoch, document=number),
        )


def _accounting(sources: list[SourceConfig], tallies: list[Tally]) -> dict[str, Any]:
    """The totals, and of each source its tally and the number of its first document."""
    by_source, first = [], 0
    for source, tally in zip(sources, tallies, strict=True):
        by_source.append({"name": source.name, "first_document": first, **tally.to_dict()})
        first += tally.rows
    whole = total(tallies)
    whole.check()
    return {**whole.to_dict(), "by_source": by_source}


def _report(manifest: dict[str, Any], config: BuildConfig, console: Console) -> None:
    """Prints what became of the rows, and how full the rows are."""
    accounting = manifest["accounting"]
    names = ("rows", "packed", "truncated", "dropped", "rejected", "tokens", "blocks")
    table = Table("source", *(Column(name, justify="right", no_wrap=True) for name in names), box=SIMPLE_HEAD)
    for entry in [*accounting["by_source"], {"name": "total", **accounting}]:
        rows = [entry["rows"], entry["packed"], entry["truncated"], sum(entry["dropped"].values())]
        cells = [f"{figure:,}" for figure in [*rows, entry["rejected"]]]
        table.add_row(entry["name"], *cells, _short(entry["clean_tokens"]), _short(entry["blocks"]))
    console.print(table)
    for reason, number in accounting["dropped"].items():
        console.print(f"dropped {number:,}: {reason}", highlight=False)
    if accounting["blocks_missing"] or accounting["tokens_cut"]:
        console.print(
            f"long documents: {accounting['turns_cut']:,} turns and {accounting['tokens_cut']:,} tokens cut, "
            f"{accounting['blocks_missing']:,} blocks without room",
            highlight=False,
        )
    if accounting["rejected"]:
        console.print(f"rejected rows are listed in {Path(config.out) / 'rejects.jsonl'}", highlight=False)
    rows, clean, block = (sum(epoch[key] for epoch in manifest["counts"]) for key in ("rows", "clean", "block"))
    filled = (clean + block) / (rows * config.row_length)
    console.print(
        f"{config.out}: {config.epochs} epoch(s), {rows:,} rows of {config.row_length} tokens, "
        f"{filled:.1%} filled, {manifest['mean_documents_per_row']:.1f} documents a row",
        highlight=False,
    )


def _short(number: int) -> str:
    """A count in three digits: 950, 12.3k, 2.93M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}" if number < 999.5 * unit else f"{number / unit:.0f}{letter}"
    return str(number)


def _dry_run(config: BuildConfig, console: Console) -> None:
    """Checks settings, sources and tokenizer, and says what would be done."""
    check(config)
    ids = token_ids(config)
    for source in expand(config.sources):
        times = f" x {source.repeat}" if source.repeat > 1 else ""
        console.print(f"{source.name}: {count(source):,} rows{times} ({source.format})", highlight=False)
    console.print(f"mask token {config.mask_token} = {ids.mask}, end of turn = {ids.eos}", highlight=False)
    state = "exists already: the build would refuse" if Path(config.out).exists() else "would be created"
    console.print(f"{config.out} {state}", highlight=False)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check settings and sources, build nothing")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    config, args = parse_cli(
        BuildConfig,
        presets=PRESETS,
        description="Conversations -> packed dataset for `python -m sdlm_megatron.train`.",
        example="python -m data_prep.build --config data.yaml --out=data/mine --block_size=8",
        argv=argv,
        extra=_add_dry_run,
    )
    if args.dry_run:
        _dry_run(config, Console())
    else:
        build(config)


if __name__ == "__main__":
    run_cli(main)
