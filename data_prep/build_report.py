"""Reports of a build: the estimate of a dry run, and the outcome of the rows afterwards."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from data_prep.build_config import BuildConfig, SourceConfig, check
from data_prep.encoders import describe, open_encoder
from data_prep.first_rows import check_fields, with_formats
from data_prep.input_bytes import limited_lines, open_utf8, skip
from data_prep.minhash import SIGNATURE
from data_prep.outcomes import ReasonCount, reason_lines, refusal
from data_prep.preview import SAMPLE, SourceSample, show_samples, take_samples
from data_prep.readers import LINES, InputUnit, plan_units
from data_prep.repetitions import repetition_lines
from data_prep.sources import expand, unread_files
from sdlm_megatron.chat.training_template import template_difference
from sdlm_megatron.data.tokenizer_identity import has_tokenizer, special_token_id
from sdlm_megatron.errors import neutral
from sdlm_megatron.files import make_folder


def report(manifest: dict[str, Any], config: BuildConfig, console: Console) -> None:
    """Prints the outcome of the input rows and the fill of the packed rows."""
    accounting = manifest["accounting"]
    names = ("rows", "packed", "cut", "dropped", "rejected", "tokens", "blocks")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("source", overflow="fold"), *columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for entry in [*accounting["by_source"], {"name": "total", **accounting}]:
        rows = [entry["rows"], entry["packed"], entry["truncated"], sum(entry["dropped"].values())]
        cells = [f"{figure:,}" for figure in [*rows, entry["rejected"]]]
        table.add_row(entry["name"], *cells, short(entry["clean_tokens"]), short(entry["blocks"]))
    console.print(table)
    for line in _remarks(manifest):
        console.print(line)
    rows, clean, block = (sum(epoch[key] for epoch in manifest["counts"]) for key in ("rows", "clean", "block"))
    console.print(
        f"wrote {config.out}: {config.epochs} epoch{'s' * (config.epochs != 1)}, {rows:,} rows of "
        f"{config.row_length} tokens, {(clean + block) / (rows * config.row_length):.2%} filled, "
        f"{manifest['mean_documents_per_row']:.1f} documents per row",
        soft_wrap=True,
    )


def _remarks(manifest: dict[str, Any]) -> list[str]:
    accounting, lines = manifest["accounting"], []
    for source, entry in zip(manifest["sources"], accounting["by_source"], strict=True):
        expected = source["expected_rows"]
        if expected and not source["limit"] and entry["rows"] != expected:
            lines.append(
                f"{entry['name']}: {entry['rows']:,} rows instead of the expected {expected:,}: the source changed"
            )
    lines += reason_lines([ReasonCount(**reason) for reason in accounting["reasons"]])
    if accounting["blocks_missing"] or accounting["tokens_cut"]:
        lines.append(
            f"long documents: {accounting['turns_cut']:,} turns and {accounting['tokens_cut']:,} tokens cut, "
            f"{accounting['blocks_missing']:,} blocks did not fit"
        )
    trimmed = sum(manifest["blocks_trimmed"])
    if trimmed:
        lines.append(f"trimmed to fill rows: {trimmed:,} blocks")
    if accounting["spelled"]:
        lines.append(f"texts that spell a special token, encoded as plain text: {accounting['spelled']:,}")
    duplicates = manifest["duplicates"]
    if duplicates["documents"]:
        verb = {"keep": "kept", "drop": "dropped"}[duplicates["policy"]]
        most = sorted(duplicates["pairs"], key=lambda pair: -pair["documents"])
        pairs = [f"{pair['documents']:,} of {pair['duplicate']} repeat {pair['kept']}" for pair in most]
        more = f" and {len(pairs) - 5} more pairs of sources (manifest.json)" if len(pairs) > 5 else ""
        lines.append(f"duplicates {verb}: {duplicates['documents']:,}; " + ", ".join(pairs[:5]) + more)
    lines += repetition_lines(manifest)
    if accounting["rejected"] or accounting["dropped"]:
        lines.append("rejects.jsonl lists every row that is not in the dataset, with the reason")
    return lines


def short(number: int) -> str:
    """A number with three significant digits: 950, 12.3k, 2.93M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}" if number < 999.5 * unit else f"{number / unit:.0f}{letter}"
    return str(number)


def dry_run(config: BuildConfig, console: Console, *, examples: bool = False) -> None:
    """Checks settings, sources and tokenizer, and prints estimates of input, output and disk space; with `examples`
    also how the first rows are rendered. Raises DataError if a build would stop at the first rows."""
    check(config)
    make_folder(Path(config.out).absolute().parent, dry=True)
    encoder = open_encoder(config.tokenizer, config.mask_token)
    mask = special_token_id(config.tokenizer, config.mask_token)
    sources = with_formats(expand(config.sources))
    units = plan_units(sources)
    check_fields(sources, units, config.system_prompt)
    samples = take_samples(config, sources, units, encoder)
    if examples:
        show_samples(config, samples, console)
    names = ("rows", "to read", "tokens", "with blocks", "unusable")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("source", overflow="fold"), *columns, box=SIMPLE_HEAD)
    work = final = 0.0
    for i, source in enumerate(sources):
        own = [unit for unit in units if unit.source == i]
        fitted, (_, n, _, usable) = samples[i].used.fitted, samples[i].source_rows()
        clean = np.where(fitted.n_blocks > 0, fitted.clean_lens, 0).sum() / max(1, n)
        expanded = clean + fitted.n_blocks.sum() * config.block_size / max(1, n)
        read = sum(Path(file).stat().st_size for file in {unit.file for unit in own}) if not source.hub else 0
        rows = sum(expected_rows([source], [replace(unit, source=0) for unit in own], range(len(own))).values())
        about = "~" if any(unit.kind == LINES for unit in own) else ""
        unusable = 1 - usable / n if n else 0.0
        size = f"{read / 1e6:,.1f} MB" if read else "?"
        cells = (f"{about}{rows:,.0f}", size, f"{clean:,.0f}", f"{expanded:,.0f}", f"{unusable:.1%}")
        table.add_row(source.name + (f" x{source.weight:g}" if source.weight != 1 else ""), *cells)
        # 4 bytes per token, about 100 bytes of records and two signatures per document, about 5 % for layouts
        work += rows * (4 * clean + 100 + 4 * SIGNATURE * (config.near_duplicates != "off"))
        final += rows * expanded * 4.2 * source.weight * config.epochs
    console.print(table)
    console.print(
        f"tokens: mean per row of about {SAMPLE} rows from the starts of the files of each source; "
        f"~: the number of rows is estimated; {len(units)} units of work"
    )
    console.print(f"tokenizer: {describe(encoder)}; mask token {config.mask_token} = {mask}")
    free = shutil.disk_usage(_existing_parent(config.out)).free
    cached = "; downloads of hub sources, in HF_HOME, come on top" * any(source.hub for source in sources)
    console.print(
        f"disk: {work / 1e9:.2f} GB during the build and {final / 1e9:.2f} GB for the dataset "
        f"({config.epochs} epoch{'s' * (config.epochs != 1)}); {free / 1e9:.0f} GB are free{cached}"
    )
    state = "would be created"
    if Path(config.out).exists():
        state = "already exists: the build would fail unless it has the same settings and input"
    elif Path(config.out).with_name(Path(config.out).name + ".partial").exists():
        state = "is incomplete: the build would resume"
    console.print(f"{config.out} {state}")
    for line in _repetitions(config, samples):
        console.print(line)
    sampled = [sample.source_rows() for sample in samples]
    counts = sorted((count for sample in samples for count in sample.reasons.counts()), key=lambda count: -count.rows)
    if error := refusal(sampled, lambda: counts, config.max_rejected, sample=True):
        raise error
    for line in reason_lines(counts):
        console.print(f"of the sampled rows, {line}")


def _repetitions(config: BuildConfig, samples: Sequence[SourceSample]) -> list[str]:
    """Lines about rows of a sample that repeat evaluation data, and about duplicates."""
    overlaps = Counter(overlap.file for sample in samples for row in sample.used.overlaps.values() for overlap in row)
    rows, verb = sum(len(sample.places) for sample in samples), {"report": "keep", "drop": "drop"}[config.contaminated]
    return [
        f"{file}: {overlaps[i]:,} of {rows:,} sampled rows share words with it; a build would {verb} such rows"
        for i, file in enumerate(config.decontaminate)
    ] + ["a dry run does not look for duplicates and near-duplicates: this needs all rows"]


def _existing_parent(out: str) -> Path:
    folder = Path(out).absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def expected_rows(
    sources: Sequence[SourceConfig], units: Sequence[InputUnit], numbers: Sequence[int]
) -> dict[int, float]:
    """Rows of the units with these numbers; estimated for lines, because counting would mean reading them twice."""
    first: dict[str, float] = {}
    for unit in units:
        if unit.kind == LINES and not unit.start:
            first[unit.file] = _line_bytes(unit, sources[unit.source])
    return {n: units[n].estimated_rows(first.get(units[n].file, 1.0)) for n in numbers}


def _line_bytes(unit: InputUnit, source: SourceConfig) -> float:
    """Mean bytes per line of the first lines of a unit of lines; at least 1."""
    with open_utf8(Path(unit.file), source.encoding) as file:
        skip(file, unit.start)
        lines = [len(line) for line in islice((line for line in limited_lines(file) if not line.isspace()), SAMPLE)]
    return max(1.0, sum(lines) / max(1, len(lines)))


def unread_lines(sources: Sequence[SourceConfig]) -> Iterator[str]:
    """The files in the folders of each source that are not read."""
    for source in sources:
        if names := unread_files(source):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            yield f"source {source.name}: not read: {', '.join(map(str, names[:5]))}{more}"


def template_lines(config: BuildConfig) -> Iterator[str]:
    """A warning where the base's chat template, which chat, servers and evaluation use, renders conversations unlike
    this dataset."""
    if not (config.tokenizer and has_tokenizer(config.tokenizer)):
        return  # an error of the build
    if difference := template_difference(Path(config.tokenizer), config.system_prompt):
        other = "remove it in a copy of the base: exports then have the template of the training data"
        fix = f"set {difference.setting}" if difference.setting else other
        what = f"the chat template of {config.tokenizer} {difference.what}"
        yield neutral(f"WARNING: {what}, and chat, servers and evaluation use it after training: {fix}")
