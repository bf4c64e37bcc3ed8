"""The first rows of each source as a build would use them: outcomes, reasons, roles, and rendered examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from rich.console import Console
from rich.text import Text

from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.chat import RenderedBatch, render_batch
from data_prep.documents import reason_fields
from data_prep.encoding import TextEncoder
from data_prep.forms import FormReader, NotChosen, conversation
from data_prep.inspect import FRAME, TokenText, open_text
from data_prep.outcomes import Reasons, SourceRows, reason_lines
from data_prep.readers import InputUnit, read_unit, where
from data_prep.truncate import FittedBatch, fit_batch
from sdlm_megatron.errors import DataError, neutral

# Rows read per source: a few seconds for all sources of the published mixture.
SAMPLE = 200
# Shown examples, and characters shown at both ends of a long text.
EXAMPLES, EDGE = 2, 400
TRAINED, OPEN, CLOSE = "bold green", "[[", "]]"
"""Style of trained text in a terminal, and the marks around it elsewhere."""


@dataclass(frozen=True)
class SourceSample:
    """The first rows of one source."""

    rows: int
    rejected: int
    places: list[str]  # file and row of each valid conversation
    turns: int  # turns of the rows, without added system turns
    batch: RenderedBatch  # the valid conversations
    fitted: FittedBatch
    reasons: Reasons

    def source_rows(self, name: str) -> SourceRows:
        """Number of rows by outcome."""
        return SourceRows(name, self.rows, self.rejected, int((self.fitted.n_blocks > 0).sum()))


def take_sample(
    config: BuildConfig, source: SourceConfig, units: Sequence[InputUnit], encoder: TextEncoder
) -> SourceSample:
    """Reads and renders the first rows of a source, whose units are `units`. Raises DataError if its file cannot be
    read."""
    reader, reasons = FormReader(source, config.system_prompt), Reasons()
    rejected, valid, conversations = 0, [], []
    rows = list(islice(read_unit(units[0], source), SAMPLE)) if units else []
    for n, row in enumerate(rows):
        head = {"source": source.name, "row": n, "where": where(units[0], row.place, 0)}
        try:
            conversations.append(conversation(row, reader))
            valid.append((head, row))
        except DataError as error:
            outcome = "dropped" if isinstance(error, NotChosen) else "rejected"
            rejected += outcome == "rejected"
            reasons.add({**head, "outcome": outcome, **reason_fields(row, error)})
    batch = render_batch(conversations, encoder, default_system=config.system_prompt)
    size = {"block_size": config.block_size, "repeat": config.repeat}
    fitted = fit_batch(batch, config.overlong, max_len=config.max_document_length, **size)
    for i, reason in sorted(fitted.drop_reasons.items()):
        reasons.add({**valid[i][0], "outcome": "dropped", "reason": reason})
    turns = sum(map(len, conversations))
    places = [str(head["where"]) for head, _ in valid]
    return SourceSample(len(rows), rejected, places, turns, batch, fitted, reasons)


def show_samples(
    config: BuildConfig,
    sources: Sequence[SourceConfig],
    units: Sequence[InputUnit],
    encoder: TextEncoder,
    console: Console,
) -> None:
    """Samples and shows each source; `units` are those of all sources."""
    for i, source in enumerate(sources):
        own = [unit for unit in units if unit.source == i]
        show_sample(config, source, take_sample(config, source, own, encoder), console)


def show_sample(config: BuildConfig, source: SourceConfig, sample: SourceSample, console: Console) -> None:
    """Prints examples with the trained text marked, the turns by role, and the reasons of rows that are left out."""
    text_of = open_text(config.tokenizer)
    colored = console.color_system is not None and not console.no_color  # no colors: a file, or a plain terminal
    examples = np.flatnonzero(sample.fitted.n_blocks > 0)[:EXAMPLES].tolist()
    if examples:
        marks = Text("green", style=TRAINED) if colored else Text(f"between {OPEN} and {CLOSE}")
        _print(
            console,
            Text(f"{len(examples)} example{'s' * (len(examples) != 1)}; what is trained is ").append_text(marks),
        )
    for i in examples:
        _print(console, Text(f"\n{neutral(sample.places[i], one_line=True)}", style="bold"))
        _print(console, _example(sample.batch, i, text_of, colored))
    _print(console, Text(_roles(source, sample)))
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


def _roles(source: SourceConfig, sample: SourceSample) -> str:
    """Number of turns by role, and of those that are trained."""
    turns, trained = Counter(sample.batch.roles), Counter[str]()
    for role, n in zip(sample.batch.roles, sample.batch.n_anchors.tolist(), strict=True):
        trained[role] += n > 0
    added = len(sample.batch.roles) - sample.turns
    notes = {"system": f" ({added:,} added by system_prompt)"} if added else {}
    notes |= {role: f" ({n:,} trained)" for role, n in trained.items() if n}
    roles = ", ".join(f"{role} {n:,}{notes.get(role, '')}" for role, n in turns.items()) or "none"
    return f"source {source.name!r}, first {sample.rows:,} rows: turns: {roles}"
