"""Stage one: converts units of input rows to tokenized documents on disk, each unit independently.

The result of a unit is six or seven files in the work folder; it is complete when the last one exists:

    u0000007.tokens         int32: concatenated clean tokens of its documents
    u0000007.turns          int32 pairs: first anchor and number of anchors of each answer turn
    u0000007.docs           one DOCUMENT record per document
    u0000007.untrained      int64 keys (`turn_keys`) of the answers without anchors, with the row's index in the unit
    u0000007.rejects.jsonl  rows that became no document
    u0000007.minhash        SIGNATURE uint16 values per document, if near-duplicates are looked for
    u0000007.json           outcome of the rows (UnitResult), with the sizes of the other files
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash

from data_prep.build_config import BuildConfig, SourceConfig
from data_prep.chat import RenderedBatch, render_batch
from data_prep.decontaminate import EvaluationTexts, Overlap, OverlapCounts, open_evaluations
from data_prep.encoders import describe
from data_prep.encoding import TextEncoder, chat_format
from data_prep.forms import FormReader, InputRow, NotChosen, Unreadable
from data_prep.inst_template import check_exchanges
from data_prep.minhash import signatures
from data_prep.readers import LINES, InputUnit, count_lines, of_table, read_unit, where_in_file
from data_prep.row_rules import turn_keys
from data_prep.truncate import FittedBatch, fit_batch
from data_prep.turns import Conversation
from sdlm_megatron.errors import DataError
from sdlm_megatron.files import most_open, own_partial, write_json
from sdlm_megatron.weights.hf_config import HFConfig
from sdlm_megatron.weights.positions import base_config, check_positions, trained_positions

# Rows tokenized per call: enough to amortize the call, few enough to bound memory if rows are a megabyte each.
CHUNK = 512

DOCUMENT = np.dtype(
    [
        ("row", "i8"),  # index of the input row in its unit
        ("token", "i8"),  # offset of its first token in .tokens
        ("turn", "i8"),  # index of its first pair in .turns
        ("clean", "i4"),  # number of clean tokens kept
        ("turns", "i4"),  # number of pairs
        ("blocks", "i4"),
        ("turns_cut", "i4"),
        ("tokens_cut", "i4"),
        ("missing", "i4"),  # blocks that did not fit
        ("digest", "u8", (2,)),  # of the whole conversation's tokens
    ]
)
UNIT_FILES = ("tokens", "turns", "docs", "untrained", "rejects.jsonl")


@dataclass
class UnitResult:
    """Outcome of the rows of a unit; stored as its .json file."""

    rows: int = 0
    lines: int = 0  # physical lines; later units of the file need them for their line numbers
    documents: int = 0
    tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # number of valid rows without a training target, by reason
    rejected: int = 0  # rows that are not a valid conversation
    spelled: int = 0  # texts that spell a special token
    unread: dict[str, int] = field(default_factory=dict)  # number of rows, by field that is neither read nor ignored
    overlaps: dict[str, Any] = field(default_factory=dict)  # of its rows with evaluation files: OverlapCounts
    begun: str = ""  # digest of the settings of its build
    encoder: str = ""  # library that tokenized the unit, and the reason if it is not the fast one; two if it changed
    sizes: dict[str, int] = field(default_factory=dict)  # size of the other files in bytes


def unit_file(work: Path, number: int, kind: str) -> Path:
    """Path of one of the files of unit `number`."""
    return work / f"u{number:07d}.{kind}"


def load_result(work: Path, number: int) -> UnitResult | None:
    """The result of a unit; None while it is incomplete."""
    try:
        result = UnitResult(**json.loads(unit_file(work, number, "json").read_text(encoding="utf-8")))
        sizes = {kind: unit_file(work, number, kind).stat().st_size for kind in {*UNIT_FILES, *result.sizes}}
    except (OSError, ValueError, TypeError):
        return None
    return result if sizes == result.sizes else None


def tokenize_unit(
    config: BuildConfig,
    source: SourceConfig,
    unit: InputUnit,
    number: int,
    encoder: TextEncoder,
    work: Path,
    begun: str,
) -> UnitResult:
    """Reads, renders, tokenizes and fits one unit, and writes its files. Raises DataError if its file cannot be read,
    TokenizerMismatch if the fast encoder returned wrong ids."""
    with _UnitWriter(config, work, number) as writer:
        reader = FormReader(source, config.system_prompt, columnar=of_table(unit, source))
        writer.result.begun, writer.result.encoder = begun, describe(encoder)
        rows = read_unit(unit, source)
        while chunk := list(islice(rows, CHUNK)):
            _tokenize_chunk(config, reader, unit, chunk, encoder, writer)
        writer.result.unread = dict(reader.unread)
        writer.result.lines = count_lines(unit) if unit.kind == LINES else 0
        if (now := describe(encoder)) != writer.result.encoder:  # the rows before are verified by sample only
            writer.result.encoder += f", then {now}"
        return writer.finish()


def _tokenize_chunk(
    config: BuildConfig,
    reader: FormReader,
    unit: InputUnit,
    rows: Sequence[InputRow],
    encoder: TextEncoder,
    writer: "_UnitWriter",
) -> None:
    first, writer.result.rows = writer.result.rows, writer.result.rows + len(rows)
    used = use_rows(config, [(unit, row, reader) for row in rows], writer.texts, encoder, writer.base)
    for i, overlap in used.overlaps.items():
        writer.overlaps.add(first + i, overlap)
    for left in used.left_out:
        writer.reject(first + left.row, rows[left.row], left)
    # The text stays as it is, but many matches hint at data that was rendered before.
    writer.result.spelled += encoder.spelled([text for turns in used.conversations for _, text, _ in turns])
    if used.rows:
        signed = signatures(used.conversations) if config.near_duplicates != "off" else None
        writer.add(used.batch, used.fitted, np.array(used.rows) + first, signed)


class RowLeftOut(NamedTuple):
    """A row that becomes no document."""

    row: int  # index among the rows that were used
    outcome: str  # rejected or dropped
    error: DataError
    evaluation: dict[str, Any] | None = None  # the text that it overlaps


class UsedRows(NamedTuple):
    """Some rows as a build uses them."""

    rows: list[int]  # those that are valid; each is one document of the others
    conversations: list[Conversation]
    batch: RenderedBatch
    fitted: FittedBatch
    left_out: list[RowLeftOut]
    overlaps: dict[int, list[Overlap]]  # with evaluation files, by row


def use_rows(
    config: BuildConfig,
    rows: Sequence[tuple[InputUnit, InputRow, FormReader]],
    data: EvaluationTexts | None,
    encoder: TextEncoder,
    base: HFConfig | None,
) -> UsedRows:
    """Reads, checks, renders and fits rows, each with its unit and its reader. `data`: evaluation files; `base`: the
    tokenizer's."""
    valid, conversations, left_out = list[int](), list[Conversation](), list[RowLeftOut]()
    exchanges = chat_format(encoder).exchanges
    for i, (_, row, reader) in enumerate(rows):
        try:
            conversation = reader.read(row.content)
            if exchanges:
                check_exchanges(conversation)
            conversations.append(conversation)
            valid.append(i)
        except DataError as error:
            left_out.append(RowLeftOut(i, "dropped" if isinstance(error, NotChosen) else "rejected", error))
    shared = data.find(conversations) if data else {}
    overlaps = {valid[i]: overlap for i, overlap in shared.items()}
    if config.contaminated == "drop" and shared:
        for row_number, (overlap, *_) in overlaps.items():
            where = {"file": config.decontaminate[overlap.file], "row": overlap.row, "words": overlap.words}
            what = f"shares words with the evaluation file {where['file']}"
            reason = DataError(what, fix="--contaminated=report keeps such rows")
            left_out.append(RowLeftOut(row_number, "dropped", reason, where))
        kept = [i for i in range(len(valid)) if i not in shared]
        valid, conversations = [valid[i] for i in kept], [conversations[i] for i in kept]
    batch = render_batch(conversations, encoder, default_system=config.system_prompt)
    size = {"block_size": config.block_size, "repeat": config.repeat}
    fitted = fit_batch(batch, config.overlong, max_len=config.max_document_length, **size)
    _check_lengths(config, fitted, [rows[i][:2] for i in valid], base)
    left_out += [RowLeftOut(valid[i], "dropped", DataError(why)) for i, why in sorted(fitted.drop_reasons.items())]
    return UsedRows(valid, conversations, batch, fitted, left_out, overlaps)


def _check_lengths(
    config: BuildConfig, fitted: FittedBatch, rows: Sequence[tuple[InputUnit, InputRow]], base: HFConfig | None
) -> None:
    """UnfitError for a document, each of a row, that is longer than the tokenizer's model was trained for."""
    clean = np.where(fitted.n_blocks > 0, fitted.clean_lens, 0)
    if base and clean.max(initial=0) > trained_positions(base):
        unit, row = rows[int(clean.argmax())]
        what = f"the document of {where_in_file(unit, row.place)}"
        check_positions(int(clean.max()), what, base, config.tokenizer)


class _UnitWriter:
    """Files of one unit, under temporary names until they are complete."""

    def __init__(self, config: BuildConfig, work: Path, number: int) -> None:
        self.result, self.overlaps = UnitResult(), OverlapCounts()
        self.texts, self.base = open_evaluations(config.decontaminate), base_config(config.tokenizer)
        self._kinds = UNIT_FILES if config.near_duplicates == "off" else (*UNIT_FILES, "minhash")
        self._work, self._number = work, number
        self._files: dict[str, IO[bytes]] = {}
        self._token = self._turn = 0

    def __enter__(self) -> "_UnitWriter":
        for kind in self._kinds:
            # Two shards may tokenize the same unit after a requeue.
            self._files[kind] = open(own_partial(unit_file(self._work, self._number, kind)), "wb")
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)

    def reject(self, index: int, row: InputRow, left: RowLeftOut) -> None:
        """Records that row `index` of the unit becomes no document."""
        if left.outcome == "rejected":
            self.result.rejected += 1
        else:
            self.result.dropped[left.error.what] = self.result.dropped.get(left.error.what, 0) + 1
        line = {"index": index, "place": row.place, **reason_fields(row, left)}
        # A Parquet row may contain dates or bytes, which JSON cannot represent: `repr` of these.
        self._files["rejects.jsonl"].write(json.dumps(line, ensure_ascii=True, default=repr).encode() + b"\n")

    def add(
        self, batch: RenderedBatch, fitted: FittedBatch, indices: np.ndarray, signed: np.ndarray | None = None
    ) -> None:
        """Appends documents; `indices`, int (documents,), are their rows in the unit, `signed` their signatures."""
        kept = fitted.n_blocks > 0
        clean = np.where(kept, fitted.clean_lens, 0)
        whole = np.diff(batch.doc_edges)
        tokens = batch.input_ids
        if (clean < whole).any():  # rare: most chunks are written without a copy
            inside = np.arange(len(tokens)) - np.repeat(batch.doc_edges[:-1], whole)
            tokens = tokens[inside < np.repeat(clean, whole)]
        pairs, n_pairs = _answer_turns(batch, np.where(kept, fitted.n_anchors, 0))
        records = np.zeros(len(batch), DOCUMENT)
        records["row"] = indices
        records["token"] = self._token + np.cumsum(clean) - clean
        records["turn"] = self._turn + np.cumsum(n_pairs) - n_pairs
        records["clean"], records["turns"], records["blocks"] = clean, n_pairs, fitted.n_blocks
        records["turns_cut"], records["tokens_cut"] = fitted.turns_cut, fitted.tokens_cut
        records["missing"] = fitted.blocks_missing
        records["digest"] = _digests(batch)
        untrained = _untrained(batch, np.where(kept, indices, -1))
        files = (("tokens", tokens), ("turns", pairs), ("docs", records[kept]), ("untrained", untrained))
        for kind, content in files:
            self._files[kind].write(content.tobytes())
        if signed is not None:
            self._files["minhash"].write(signed[kept].tobytes())
        self._token, self._turn = self._token + len(tokens), self._turn + len(pairs)
        self.result.documents += int(kept.sum())
        self.result.tokens += len(tokens)

    def finish(self) -> UnitResult:
        """Renames the files to their final names, the summary last."""
        # Renamed only after the data is on disk: a unit whose summary exists is never tokenized again.
        for kind, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self.result.sizes[kind] = file.tell()
            os.replace(file.name, unit_file(self._work, self._number, kind))
        self.result.overlaps = self.overlaps.to_dict()
        write_json(unit_file(self._work, self._number, "json"), asdict(self.result), shared=True)
        return self.result


def reason_fields(row: InputRow, left: RowLeftOut) -> dict[str, Any]:
    """Fields of a line of rejects.jsonl about a row: outcome, reason, field, fix and content."""
    if isinstance(row.content, Unreadable):  # what a parser says about one row would make each reason unique
        reason, _, detail = row.content.reason.partition(": ")
        return {"outcome": left.outcome, "field": "", "reason": reason, "detail": detail, "content": row.content.line}
    fields = {"outcome": left.outcome, "field": left.error.where, "reason": left.error.what}
    fix = {"fix": left.error.fix} if left.error.fix else {}
    evaluation = {"evaluation": left.evaluation} if left.evaluation else {}
    return {**fields, **fix, "content": row.content, **evaluation}


def _answer_turns(batch: RenderedBatch, n_anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Answer turns that contain the first `n_anchors` anchors of each document.

    Returns:
        (first anchor, number of anchors) of each, int32 (pairs, 2), and the number of pairs of each document.
    """
    turns = np.diff(batch.turn_edges)
    before = np.cumsum(batch.n_anchors) - batch.n_anchors
    before -= np.repeat(before[batch.turn_edges[:-1]], turns)
    left = np.clip(np.repeat(n_anchors, turns) - before, 0, batch.n_anchors)
    answers = left > 0
    sums = np.concatenate([[0], np.cumsum(answers)])
    return np.stack([batch.first_anchors, left], axis=1)[answers].astype(np.int32), np.diff(sums[batch.turn_edges])


def _untrained(batch: RenderedBatch, rows: np.ndarray) -> np.ndarray:
    """int64: keys of the answers that are not trained. `rows`: index of each document's row; -1 if it is dropped."""
    answers = np.array([role == "assistant" for role in batch.roles], dtype=bool)
    turns = np.flatnonzero(answers & (batch.n_anchors == 0))
    row = np.repeat(rows, np.diff(batch.turn_edges))[turns]
    return turn_keys(row, batch.starts[turns])[row >= 0]


def _digests(batch: RenderedBatch) -> np.ndarray:
    """uint64 (documents, 2): 128-bit hash of the tokens of each whole document, and of which turns are trained."""
    data = np.ascontiguousarray(batch.input_ids, dtype="<i4").tobytes()
    trained, turns = (batch.n_anchors > 0).tobytes(), batch.turn_edges.tolist()
    parts = zip(pairwise((4 * batch.doc_edges).tolist()), pairwise(turns), strict=True)
    digests = b"".join(xxhash.xxh3_128_digest(data[a:b] + trained[c:d]) for (a, b), (c, d) in parts)
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 2)


def _map_file(work: Path, unit: int, kind: str) -> np.ndarray:
    file = unit_file(work, unit, kind)
    return np.asarray(np.memmap(file, np.int32, "r")) if file.stat().st_size else np.empty(0, np.int32)


class DocumentStore:
    """Memory-mapped random access to tokens and anchors of the documents of all units, which must be complete."""

    def __init__(self, work: Path) -> None:
        # without self: in a reference cycle the files would stay open until the garbage collector runs
        self._map = lru_cache(maxsize=most_open(256, 4))(partial(_map_file, work))

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads documents by their index records (planning.INDEX).

        Returns:
            Concatenated clean tokens, int32 (tokens,); concatenated anchors, int32 (anchors,), relative to their
            document's first token; number of anchors of each document, int64 (documents,).
        """
        tokens, pairs = [], []
        fields = (index[name].tolist() for name in ("unit", "token", "clean", "turn", "turns"))
        for unit, token, clean, turn, turns in zip(*fields, strict=True):
            tokens.append(self._map(unit, "tokens")[token : token + clean])
            pairs.append(self._map(unit, "turns")[2 * turn : 2 * (turn + turns)])
        flat_pairs = np.concatenate(pairs).reshape(-1, 2).astype(np.int64)
        first, count = flat_pairs[:, 0], flat_pairs[:, 1]
        anchors = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
        sums = np.concatenate([[0], np.cumsum(count)])
        edges = np.concatenate([[0], np.cumsum(index["turns"])])
        return np.concatenate(tokens), anchors.astype(np.int32), np.diff(sums[edges])


def read_rejects(work: Path, number: int) -> Iterator[dict[str, Any]]:
    """Rows of a unit that became no document."""
    with open(unit_file(work, number, "rejects.jsonl"), encoding="utf-8") as lines:
        yield from map(json.loads, lines)
