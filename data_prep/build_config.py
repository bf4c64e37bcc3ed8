"""Settings of `sdlm prepare`."""

import codecs
import glob
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from data_prep.source_formats import FIELD_NAMES, FORMATS
from data_prep.truncate import FITS
from sdlm_megatron.config.validate import check_ranges
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM
from sdlm_megatron.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
_ONE_LINE: dict[str, Any] = {"allow_unicode": True, "sort_keys": False, "width": float("inf")}


# Field names and defaults are part of a dataset's manifest: adding, renaming or reordering fields changes its bytes.
@dataclass
class SourceConfig:
    """One set of conversations, read from `path` (local files) or `hub` (Hugging Face hub)."""

    name: str = ""
    """Name of the source in reports; unique."""
    format: str = ""
    """Row format: one of the source formats above; empty: the one that the rows match."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the file by our names (turns, prompt, input, answer, system, history, tools, weight, text, chosen,
    rejected, label), and keys of a turn (role, content), where they differ from those of the format."""
    ignore: list[str] = field(default_factory=list)
    """Columns and fields of turns ("messages.x") to ignore although they hold something."""
    preference: str = ""
    """chosen: train the chosen answers of a preference file. Empty: such files are refused."""
    path: str = ""
    """A .jsonl, .ndjson, .json, .parquet, .arrow or .csv file, perhaps compressed (.gz, .zst, .bz2, .xz), a glob, a
    folder of such files (read in order of their names), or a local copy of a hub dataset."""
    paths: list[str] = field(default_factory=list)
    """Several such files, globs and folders, read in this order, instead of `path`."""
    encoding: str = ""
    """Encoding of text files, such as utf-16 or cp1252. Empty: UTF-8, or what their byte order mark says."""
    hub: str = ""
    """Dataset name for `datasets.load_dataset`, which downloads it into HF_HOME."""
    subset: str = ""
    """Configuration of a hub dataset or of a local copy of one."""
    split: str = "train"
    """Split of a hub dataset or of a local copy of one."""
    revision: str = ""
    """Commit, tag or branch of a hub dataset; empty: the newest."""
    limit: int = 0
    """Use only this many rows from the start; 0: all."""
    weight: float = 1.0
    """Times that each row is used per epoch: 2 uses every row twice, each time with its own blocks; 0.5 uses half of
    the rows, and the other half in the next epoch."""
    expected_rows: int = 0
    """Expected number of rows; a difference is reported. 0: unknown."""
    licence: str = ""
    """License of the data, recorded in the manifest."""

    def option(self, key: str, value: str | list[str] | dict[str, str]) -> str:
        """The argument that sets `key` of this source, as it is typed in a shell."""
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, **_ONE_LINE).strip()
        return shlex.quote(f"--sources.{self.name}.{key}={text}")


@dataclass
class BuildConfig:
    """A packed dataset: its sources and how it is built."""

    out: str = ""
    """Folder to create."""
    tokenizer: str = ""
    """Folder with the tokenizer files of the base model, or a SentencePiece .model file."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Sets of conversations. On the command line an entry is addressed by its name or number."""
    block_size: int = 4
    """Block size D in tokens."""
    repeat: int = 3
    """Average number of times that each answer token is a target."""
    target_shift: bool = True
    """Train slot j of a block on the token j + 1 positions ahead, as in SDLM. false (ablation): on the token at its
    own position, in blocks of at least 2."""
    max_document_length: int = 5632
    """Maximum length of a document including its blocks, in tokens."""
    row_length: int = 5632
    """Length S of the packed rows, in tokens."""
    seed: int = 42
    """Seed of the block draws and of the order of documents and rows."""
    epochs: int = 1
    """Number of epochs to write, each with its own blocks and order."""
    overlong: str = "keep_whole_turns"
    """Rule for documents longer than max_document_length: keep_whole_turns | reference (as for the published
    models)."""
    system_prompt: str | None = DEFAULT_SYSTEM
    """System turn prepended to conversations without one; null: none."""
    mask_token: str = "<text_mask>"
    """Mask token. If the tokenizer lacks it, it gets the first free id (Qwen2.5: 151665)."""
    pad_token: str = "<|endoftext|>"
    """Padding token; must exist in the tokenizer."""
    window: int = 65536
    """Number of documents that best-fit packing considers together."""
    trim: float = 0.0
    """Largest share of its blocks that a document may lose to fill a row instead of opening another. 0: documents
    keep all their blocks."""
    duplicates: str = "keep"
    """Documents whose tokens equal those of an earlier one: keep | drop. They are counted either way."""
    near_duplicates: str = "off"
    """Documents whose words are mostly those of an earlier one: off | report | drop."""
    near_duplicate_similarity: float = 0.8
    """Similarity from which a document is a near-duplicate: the share of runs of 5 words that two documents have in
    common among all their runs (Jaccard)."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation files or folders, of any type that sources can have. Rows that share 13 consecutive words with one
    of their texts, or a whole shorter text, are counted."""
    contaminated: str = "report"
    """Rows that share words with the files of `decontaminate`: report | drop."""
    max_rejected: float = 0.05
    """Largest share of the rows of a source that may be rejected; more stop the build. 1: any number."""


POLICIES = {
    "duplicates": ("keep", "drop"),
    "near_duplicates": ("off", "report", "drop"),
    "contaminated": ("report", "drop"),
}
"""Values of the settings about rows that repeat others."""
RANGES = {
    "block_size": "[1, 4096]",
    "repeat": "[1, 1000]",
    "max_document_length": "[1, 1e7]",
    "row_length": "[1, 1e7]",
    "seed": "[0, 4294967295]",
    "epochs": "[1, 10000]",
    "window": "[1, 1e8]",
    "trim": "[0, 1)",
    "near_duplicate_similarity": "[0.5, 1]",
    "max_rejected": "[0, 1]",
    "sources.limit": "[0, 1e12]",
    "sources.weight": "(0, 10000]",
    "sources.expected_rows": "[0, 1e12]",
}
"""Values that each number may have, as in config/validate.py."""


def check(config: BuildConfig) -> None:
    """Raises ConfigError on the first invalid setting. Changes nothing."""
    # Everything that can be checked without reading data is checked here, before the first unit is tokenized.
    for key in ("out", "tokenizer"):
        if not getattr(config, key):
            raise ConfigError(f"`{key}` is not set", key, f"--{key}=FOLDER")
    check_ranges(config, RANGES)
    if config.max_document_length > config.row_length:
        raise ConfigError(
            f"documents of up to {config.max_document_length} tokens do not fit into rows of {config.row_length}",
            "max_document_length",
            "set row_length to at least max_document_length",
        )
    if config.block_size == 1 and not config.target_shift:
        what = "block_size 1 trains a single mask token without the target shift, and decoding has no such window"
        raise ConfigError(what, "target_shift", "set block_size to 2 or more, or leave out target_shift: false")
    if config.overlong not in FITS:
        raise ConfigError(f"unknown value {config.overlong!r}", "overlong", f"use one of {', '.join(FITS)}")
    for key, values in POLICIES.items():
        if getattr(config, key) not in values:
            raise ConfigError(f"unknown value {getattr(config, key)!r}", key, f"use {' or '.join(values)}")
    if not config.sources:
        raise ConfigError("no sources", "sources", "sources: [{name: mine, format: messages, path: FILE.jsonl}]")
    for i, source in enumerate(config.sources):
        _check_source(source, f"sources[{i}]")
        _check_outside(config.out, source)
    # Reports and --sources.NAME.key address a source by its name.
    names = [source.name for source in config.sources]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two sources are named {duplicates[0]!r}", "sources", "give each source its own name")


def _check_source(source: SourceConfig, where: str) -> None:
    if not source.name:
        raise ConfigError("the source has no name", f"{where}.name", "set a name; reports use it")
    if sum(map(bool, (source.path, source.paths, source.hub))) != 1:
        raise ConfigError("a source needs either path, paths or hub", where, "set exactly one of them")
    try:
        codecs.lookup(source.encoding or "utf-8")
    except LookupError:
        raise ConfigError(f"unknown encoding {source.encoding!r}", f"{where}.encoding", "such as utf-16") from None
    if source.format and source.format not in FORMATS:
        fix = f"use one of {', '.join(FORMATS)}"
        raise ConfigError(f"unknown format {source.format!r}", f"{where}.format", fix)
    if unknown := [name for name in source.columns if name not in FIELD_NAMES]:
        raise ConfigError(f"unknown name {unknown[0]!r}", f"{where}.columns", f"use one of {', '.join(FIELD_NAMES)}")
    if source.preference not in ("", "chosen"):
        raise ConfigError(f"unknown value {source.preference!r}", f"{where}.preference", "use chosen")


def _check_outside(out: str, source: SourceConfig) -> None:
    """Raises ConfigError if files of a build in `out` would be input of a source: it could not resume."""
    partial = Path(f"{Path(out)}.partial").resolve()
    for path in filter(None, source.paths or [source.path]):
        parts = Path(path).parts
        plain = parts if os.path.lexists(path) else [*takewhile(lambda part: not glob.has_magic(part), parts)]
        folder, pattern = Path(*plain).resolve(), parts[len(plain) :]
        matched = any(parent.match(str(folder.joinpath(*pattern))) for parent in (partial, *partial.parents))
        if matched or (partial.is_relative_to(folder) and (not pattern or "**" in pattern)):
            what = f"`out` lies inside the source {source.name!r}, {path}: what a build writes would be its input"
            raise ConfigError(what, f"out: {out}", "name a folder outside")


def lasting(settings: dict[str, Any], unread: Mapping[str, Iterable[str]] | None = None) -> dict[str, Any]:
    """Settings without those that only decide whether a build is refused, and may change when it is resumed: the limit
    of rejected rows, and fields to ignore that its sources do not read anyway (`unread`, by name of the source)."""
    sources = []
    for source in settings["sources"]:
        # The sources of a meta JSON are named NAME/ENTRY.
        own = [fields for name, fields in (unread or {}).items() if f"{name}/".startswith(f"{source['name']}/")]
        sources.append({**source, "ignore": sorted({*source["ignore"]}.difference(*own))})
    return {**{key: value for key, value in settings.items() if key != "max_rejected"}, "sources": sources}
