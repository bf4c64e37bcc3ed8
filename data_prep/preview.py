"""Some rows of each source as a build would use them: outcomes, reasons, roles, and rendered examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.chat import RenderedBatch
from data_prep.decontaminate import open_evaluations
from data_prep.documents import UsedRows, reason_fields, use_rows
from data_prep.encoders import TokenizerMismatch
from data_prep.encoding import TextEncoder
from data_prep.first_rows import first_rows
from data_prep.forms import FormReader
from data_prep.inspect import FRAME, TokenText, open_text
from data_prep.outcomes import Reasons, SourceRows, reason_lines
from data_prep.readers import InputUnit, of_table, where
from sdlm_megatron.errors import neutral
from sdlm_megatron.files import write_text
from sdlm_megatron.weights.positions import base_config

# Rows read per source: a few seconds for all sources of the published mixture.
SAMPLE = 200
EDGE = 400  # characters shown at both ends of a long text
TRAINED, OPEN, CLOSE = "bold green", "[[", "]]"
"""Style of trained text in a terminal, and the marks around it elsewhere."""


@dataclass(frozen=True)
class SourceSample:
    """Rows from the starts of the files of one source."""

    source: SourceConfig
    places: list[str]  # file and row of each
    files: int
    used: UsedRows
    reasons: Reasons

    def source_rows(self) -> SourceRows:
        """Number of rows by outcome."""
        rejected = sum(left.outcome == "rejected" for left in self.used.left_out)
        return SourceRows(self.source.name, len(self.places), rejected, int((self.used.fitted.n_blocks > 0).sum()))


def take_samples(
    config: BuildConfig,
    sources: Sequence[SourceConfig],
    units: Sequence[InputUnit],
    encoder: TextEncoder,
    mismatch: Path | None = None,
) -> list[SourceSample]:
    """Reads and renders rows of each source as a build does, from the starts of all its files, or of SAMPLE files.
    `units` are those of all sources; `mismatch` is written if fastokens returns wrong ids. Raises DataError if a file
    cannot be read."""
    samples, texts, base = [], open_evaluations(config.decontaminate), base_config(config.tokenizer)
    for number, source in enumerate(sources):
        own = [unit for unit in units if unit.source == number]
        rows = list(first_rows(source, own, SAMPLE))
        readers = {table: FormReader(source, config.system_prompt, columnar=table) for table in (False, True)}
        each = [(unit, row, readers[of_table(unit, source)]) for unit, row in rows]
        try:
            used = use_rows(config, each, texts, encoder, base)
        except TokenizerMismatch as error:  # the encoder no longer uses fastokens, whose ids so far are doubtful
            if mismatch:
                write_text(mismatch, str(error), shared=True)
            return take_samples(config, sources, units, encoder)
        places, reasons = [where(unit, row.place, 0) for unit, row in rows], Reasons()
        for left in used.left_out:
            head = {"source": source.name, "row": left.row, "where": places[left.row]}
            reasons.add({**head, **reason_fields(rows[left.row][1], left)})
        samples.append(SourceSample(source, places, len({unit.file for unit, _ in rows}), used, reasons))
    return samples


def show_samples(config: BuildConfig, samples: Sequence[SourceSample], console: Console) -> None:
    """Prints examples of each source with the trained text marked, the turns by role, and the reasons of rows that are
    left out."""
    text_of = open_text(config.tokenizer)
    colored = console.color_system is not None and not console.no_color  # no colors: a file, or a plain terminal
    marks = Text("green", style=TRAINED) if colored else Text(f"between {OPEN} and {CLOSE}")
    for sample in samples:
        usable = np.flatnonzero(sample.used.fitted.n_blocks > 0)
        # the first and the last one: of several files, they are not of the same
        examples = sorted({int(i) for i in (*usable[:1], *usable[-1:])})
        if examples:
            head = f"{len(examples)} example{'s' * (len(examples) != 1)}; what is trained is "
            _print(console, Text(head).append_text(marks))
        for i in examples:
            place = sample.places[sample.used.rows[i]]
            _print(console, Text(f"\n{neutral(place, one_line=True)}", style="bold"))
            _print(console, _example(sample.used.batch, i, text_of, colored))
        _print(console, Text(_roles(sample)))
        for line in reason_lines(sample.reasons.counts()):
            _print(console, Text(f"  {neutral(line, one_line=True)}"))


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _example(batch: RenderedBatch, number: int, text_of: TokenText, colored: bool) -> Text:
    """The text of a document, its trained tokens marked."""
    document = batch.document(number)
    trained = np.zeros(len(document.input_ids), dtype=bool)
    trained[document.anchors + 1] = True  # an anchor precedes its target
    texts = text_of(document.input_ids.tolist())
    edges = [0, *(1 + np.flatnonzero(trained[1:] != trained[:-1])).tolist(), len(texts)]
    result = Text()
    for start, end in pairwise(edges):
        text = _shortened(neutral("".join(texts[start:end])))
        if not trained[start]:
            result.append(text, style=FRAME)
        elif colored:
            result.append(text, style=TRAINED)
        else:
            result.append(f"{OPEN}{text}{CLOSE}")
    return result


def _shortened(text: str) -> str:
    omitted = len(text) - 2 * EDGE
    return f"{text[:EDGE]} … {omitted:,} characters omitted … {text[-EDGE:]}" if omitted > 0 else text


def _roles(sample: SourceSample) -> str:
    """Number of turns by role, and of those that are trained."""
    batch, rows = sample.used.batch, len(sample.places)
    turns, trained = Counter(batch.roles), Counter[str]()
    for role, n in zip(batch.roles, batch.n_anchors.tolist(), strict=True):
        trained[role] += n > 0
    added = len(batch.roles) - sum(map(len, sample.used.conversations))
    notes = {"system": f" ({added:,} added by system_prompt)"} if added else {}
    notes |= {role: f" ({n:,} trained)" for role, n in trained.items() if n}
    roles = ", ".join(f"{role} {n:,}{notes.get(role, '')}" for role, n in turns.items()) or "none"
    files = f"{sample.files:,} file{'s' * (sample.files != 1)}"
    return f"source {sample.source.name!r}, {rows:,} rows from the start of {files}: turns: {roles}"
