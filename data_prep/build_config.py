"""Every setting of `python -m data_prep.build`."""

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.truncate import FITS
from sdlm_megatron.data.chatml import DEFAULT_SYSTEM
from sdlm_megatron.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
FORMATS = ("messages", "query_response", "instruction_output", "input_output", "sharegpt")


@dataclass
class SourceConfig:
    """One set of conversations; give `path` (files here) or `hub` (a dataset of the Hugging Face hub)."""

    name: str = ""
    """Name in reports."""
    format: str = "messages"
    """messages ({messages: [{role, content}]}) | query_response | instruction_output | input_output (columns
    of these names) | sharegpt ({conversations: [{from, value}]}, or a meta JSON with `annotation` and
    `repeat_time`)."""
    path: str = ""
    """A .jsonl, .json, .parquet or .arrow file, a folder of such files (taken in the order of their names), or a
    local copy of a hub dataset."""
    hub: str = ""
    """Name of a dataset for `datasets.load_dataset`."""
    subset: str = ""
    """Configuration of a hub dataset, or of a local copy of one."""
    split: str = "train"
    """Split of a hub dataset, or of a local copy of one."""
    revision: str = ""
    """With hub: commit, tag or branch of the dataset; empty: the newest."""
    limit: int = 0
    """Use the first rows only; 0: all."""
    weight: float = 1.0
    """How often a row is taken in an epoch: 2 takes every row twice, each time with its own blocks; 0.5 takes half
    of them, the other half in the next epoch."""
    expected_rows: int = 0
    """Rows the set had when the config was written; a difference is printed. 0: not known."""
    licence: str = ""
    """Kept in the manifest."""


@dataclass
class BuildConfig:
    """A packed dataset: where it comes from and how it is made."""

    out: str = ""
    """Folder to create."""
    tokenizer: str = ""
    """Folder with tokenizer.json: the base model's."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Sets of conversations. On the command line an entry is addressed by its name or number."""
    block_size: int = 4
    """Tokens D of a block."""
    repeat: int = 3
    """Each answer token is a target about this often."""
    target_shift: bool = True
    """Slot j of a block is trained on the token j + 1 places on, as in SDLM; false: on that of its own place, an
    ablation."""
    max_document_length: int = 5632
    """Limit of a document with its blocks, in tokens."""
    row_length: int = 5632
    """Length S of the packed rows, in tokens."""
    seed: int = 42
    """Of the block draws and of the order of documents and rows."""
    epochs: int = 1
    """Epochs to write, each with its own blocks and order."""
    overlong: str = "keep_whole_turns"
    """Documents beyond max_document_length: keep_whole_turns | reference (cut as the published models'
    were)."""
    system_prompt: str | None = DEFAULT_SYSTEM
    """Put in front of conversations without a system turn; null: none."""
    mask_token: str = "<text_mask>"
    """If the tokenizer lacks it, it gets the first free id (Qwen2.5: 151665)."""
    pad_token: str = "<|endoftext|>"
    """Token that fills the end of a row."""
    window: int = 65536
    """Documents that best-fit packing looks at together."""
    trim: float = 0.0
    """Share of its blocks that a document may lose to fill a row, rather than begin another. 0: documents keep all
    their blocks."""
    duplicates: str = "keep"
    """Documents whose tokens all equal those of an earlier one: keep | drop. They are counted either way."""


def check(config: BuildConfig) -> None:
    """Raises ConfigError on the first setting that cannot be used. Changes nothing."""
    for key in ("out", "tokenizer"):
        if not getattr(config, key):
            raise ConfigError(f"`{key}` is not set", key, f"--{key}=FOLDER")
    _check_numbers(config)
    if config.max_document_length > config.row_length:
        raise ConfigError(
            f"documents of {config.max_document_length} tokens do not fit into rows of {config.row_length}",
            "max_document_length",
            "set row_length to at least max_document_length",
        )
    if config.overlong not in FITS:
        raise ConfigError(f"overlong is {config.overlong!r}", "overlong", f"one of {', '.join(FITS)}")
    if config.duplicates not in ("keep", "drop"):
        raise ConfigError(f"duplicates is {config.duplicates!r}", "duplicates", "keep or drop")
    if not config.sources:
        raise ConfigError("no sources", "sources", "sources: [{name: mine, format: messages, path: FILE.jsonl}]")
    for i, source in enumerate(config.sources):
        _check_source(source, f"sources[{i}]")
    names = [source.name for source in config.sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two sources are called {twice[0]!r}", "sources", "give each its own name")


def _check_numbers(config: BuildConfig) -> None:
    for key in ("block_size", "repeat", "max_document_length", "row_length", "epochs", "window"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key} is {getattr(config, key)}", key, "give a number above 0")
    if config.seed < 0:
        raise ConfigError(f"seed is {config.seed}", "seed", "give 0 or more")
    if not 0 <= config.trim < 1:
        raise ConfigError(f"trim is {config.trim}", "trim", "give a share: 0 (whole documents) up to below 1")


def _check_source(source: SourceConfig, where: str) -> None:
    if not source.name:
        raise ConfigError("a source without a name", f"{where}.name", "name it; reports use the name")
    if bool(source.path) == bool(source.hub):
        raise ConfigError("a source needs either path or hub", where, "set exactly one of them")
    if source.format not in FORMATS:
        raise ConfigError(f"format is {source.format!r}", f"{where}.format", f"one of {', '.join(FORMATS)}")
    if source.limit < 0:
        raise ConfigError(f"limit is {source.limit}", f"{where}.limit", "give 0 (all) or more")
    if not 0 < source.weight < float("inf"):
        raise ConfigError(f"weight is {source.weight}", f"{where}.weight", "give a number above 0")
    if source.expected_rows < 0:
        raise ConfigError(f"expected_rows is {source.expected_rows}", f"{where}.expected_rows", "give 0 or more")
