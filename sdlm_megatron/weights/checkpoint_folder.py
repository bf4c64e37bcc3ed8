"""Files of a training checkpoint besides the weights: completeness, state of the run, retention.

    FOLDER/
      weights/        model (and optimizer) shards in Megatron-Core's torch_dist format (weights/torch_dist.py)
      state.json      TrainState: step, rows consumed, rows per step, model shape, diffusion settings, dataset
      run.json        for the model card: recipe, data, losses, versions (an imported base: at most system_prompt)
      hf/             config.json, tokenizer and generation files of the base, for the export
      complete.json   size and sha256 of all files; written last, in a folder that is then renamed into place

A training checkpoint is RUN/ckpt/step-0000500. step-0000500.partial is an interrupted save, step-0000500.damaged one
whose checksums did not match. All other names are not the run's, and are left alone. An imported base has the same form
without an optimizer. Nothing here imports Megatron, so that errors are reported before its ten seconds of imports.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from sdlm_megatron.config.schema import DiffusionConfig, LoraConfig, ModelConfig, RunConfig
from sdlm_megatron.config.validate import CHOICES, RANGES, SIZES, check_lora, check_ranges
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import CheckpointError, ConfigError, UnreadableError
from sdlm_megatron.files import checked, optional_file, raise_passing, read_json_object, regular_file, sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
DAMAGED, PARTIAL = ".damaged", ".partial"
_NAME = re.compile(r"step-(\d{7}|[1-9]\d{7,15})(\.partial|\.replaced\.partial|\.damaged|)", re.ASCII)
ASSETS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
"""Files of the base that travel with a checkpoint."""


@dataclass
class TrainState:
    """State of a run apart from weights and optimizer: what resuming and exporting need."""

    step: int
    """Updates made."""
    consumed_rows: int
    rows_per_step: int
    """Unchanged by a resume under another layout."""
    shape: ModelConfig
    diffusion: DiffusionConfig
    mask_token_id: int
    precision: str
    """bf16 | fp16 | fp32: dtype of the weights."""
    with_optimizer: bool
    """Whether the checkpoint holds the optimizer's state, which resuming needs."""
    dataset: dict[str, Any]
    """Identity of the packed dataset: checksums of its files, row length; {} for an imported base."""
    eos_token_id: int = -1
    """Token that ends a turn in the dataset; -1 for an imported base."""
    running_block_loss: float = 0.0
    """Running sum of the losses of block targets, for train.next_token_balance; 0 without it."""
    running_next_token_loss: float = 0.0
    """The same of clean targets."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in the checkpoint; rank 0: none."""

    def sdlm_settings(self, decoding: SDLMSettings | None = None) -> SDLMSettings | None:
        """Settings for the export; None without a mask token.

        Args:
            decoding: settings of the base, whose decoding defaults are kept.
        """
        if self.mask_token_id < 0:
            return None
        trained = {**asdict(self.diffusion), "mask_token_id": self.mask_token_id}
        return SDLMSettings(**(asdict(decoding) if decoding is not None else {}) | trained)


def read_state(folder: Path) -> TrainState:
    """state.json of a complete checkpoint; CheckpointError when the folder is no checkpoint or is incomplete."""
    check_complete(folder)
    path = regular_file(folder, "state.json", CheckpointError)
    raw = read_json_object(path, CheckpointError, "use another checkpoint")
    shape, diffusion = (checked(raw, key, dict, path, CheckpointError) for key in ("shape", "diffusion"))
    values = {
        **raw,
        "shape": ModelConfig(**_typed(ModelConfig, shape, path)),
        "diffusion": DiffusionConfig(**_typed(DiffusionConfig, {"target_shift": True, **diffusion}, path)),
    }
    lora = checked(raw, "lora", dict, path, CheckpointError) if "lora" in raw else {}
    values["lora"] = LoraConfig(**_typed(LoraConfig, lora, path))
    absent = {"eos_token_id": -1, "running_block_loss": 0.0, "running_next_token_loss": 0.0}  # in older checkpoints
    state = TrainState(**_typed(TrainState, {**absent, **values}, path, whole=True))
    check_ranges(state.shape, RANGES, "model.", str(path))
    if state.shape.rope_type not in (kinds := CHOICES["model.rope_type"]):
        what = f"rope_type is {state.shape.rope_type!r:.60}, not one of {', '.join(kinds)}"
        raise CheckpointError(what, str(path), "use the version that wrote it")
    check_ranges(state.lora, RANGES, "lora.", str(path))
    try:
        check_lora(state.lora, str(path))
    except ConfigError as error:
        raise CheckpointError(error.what, str(path), "use another checkpoint") from None
    for key in shape.keys() & {*SIZES}:
        checked(shape, key, int, path, CheckpointError, least=1)
    for key, least in (("step", 0), ("consumed_rows", 0), ("rows_per_step", 0 if state.step == 0 else 1)):
        checked(raw, key, int, path, CheckpointError, least)
    return state


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a complete checkpoint (see ops/run_facts.py); {} where there is none."""
    if not os.path.lexists(folder / "run.json"):
        return {}
    path = regular_file(folder, "run.json", CheckpointError)
    content = read_json_object(path, CheckpointError, "copy the checkpoint again")
    kinds = {"base": str, "adapter": str, "settings": dict, "data_parallel": int, "data": dict, "losses": dict}
    kinds["versions"] = dict
    for key in content.keys() & kinds.keys():
        checked(content, key, kinds[key], path, CheckpointError)
    data = content.get("data", {})
    for key in data.keys() & {"epochs", "sources"}:
        if not all(isinstance(entry, dict) for entry in checked(data, key, list, path, CheckpointError)):
            raise CheckpointError(f"{key} is not a list of objects", str(path), "copy the checkpoint again")
    checked({"tokenizer": {}, **data}, "tokenizer", dict, path, CheckpointError)
    sections, settings = get_type_hints(RunConfig), content.get("settings", {})
    for section in settings.keys() & sections.keys():
        section_values = checked(settings, section, dict, path, CheckpointError)
        known = {f.name for f in fields(sections[section])}
        _typed(sections[section], {k: v for k, v in section_values.items() if k in known}, path)
    for key in (losses := content.get("losses", {})):
        checked(losses, key, float, path, CheckpointError)
    return content


def _typed(kind: type, raw: dict[str, Any], path: Path, *, whole: bool = False) -> dict[str, Any]:
    """`raw`, whose values have the types of a dataclass's fields; CheckpointError names any other.

    Args:
        whole: every field must be there.
    """
    hints = get_type_hints(kind)
    # Dropping a setting that this version does not know could silently change the training.
    if unknown := sorted(raw.keys() - hints.keys()):
        raise CheckpointError(f"unknown keys {unknown}: written by another version", str(path), "use that version")
    for key in hints if whole else raw:
        hint = hints[key]
        kind_of = get_origin(hint)
        options = (kind_of,) if kind_of in (dict, list) else get_args(hint) or (hint,)  # bool | None has two
        if not (raw.get(key) is None and type(None) in options):
            checked(raw, key, options[0], path, CheckpointError)
    return raw


@contextmanager
def _reading() -> Iterator[None]:
    """An OSError of reading a checkpoint becomes an UnreadableError, which says nothing about its files."""
    try:
        yield
    except OSError as error:
        what = f"{Path(error.filename).name} cannot be read: {error.strerror}"
        if isinstance(error, PermissionError):
            fix = "give yourself permission to read it: the run takes no older checkpoint in its place"
            raise UnreadableError(what, error.filename, fix) from None
        fix = "try again; if it stays so, rename the folder to step-….damaged: the run then takes the one before"
        raise UnreadableError(what, error.filename, fix, 1) from None


@_reading()
def check_complete(folder: Path) -> None:
    """CheckpointError unless every file of the checkpoint exists with its full size."""
    if not folder.is_dir():
        fix = "name a run, its ckpt/step-NNNNNNN, or a folder that `sdlm import` wrote"
        raise CheckpointError("no such checkpoint folder", str(folder), fix)
    for name, (size, _) in _listed(folder).items():
        if (actual := _file(folder, name).stat().st_size) != size:
            raise CheckpointError(
                f"{name} has {actual} bytes instead of {size}",
                str(folder / name),
                "the checkpoint is truncated: copy it again or use another",
            )


@_reading()
def check_files(folder: Path, share: tuple[int, int] = (0, 1), only: str = "") -> None:
    """Compares checksums of a complete checkpoint; CheckpointError for the first file that differs.

    Args:
        folder: a checkpoint.
        share: (i, n) reads every n-th file from the i-th, largest first, so that n processes read about equally much.
        only: read this file alone.
    """
    # Largest first: dealing the files out in turn then balances bytes, not only counts.
    files = sorted(_listed(folder).items(), key=lambda entry: (-entry[1][0], entry[0]))
    files = [entry for entry in files if only in ("", entry[0])]
    for name, (_, expected) in files[share[0] :: share[1]]:
        if sha256(_file(folder, name)) != expected:
            raise CheckpointError(
                f"{name} is damaged: its checksum differs from the one recorded when it was written",
                str(folder / name),
                "copy it again or use another",
            )


def _file(folder: Path, name: str) -> Path:
    """`regular_file`; without permission its PermissionError, as the file may be intact."""
    try:
        return regular_file(folder, name, CheckpointError)
    except CheckpointError as error:
        raise error.__context__ if isinstance(error.__context__, PermissionError) else error from None


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """complete.json: (size, sha256) of each file."""
    marker = folder / "complete.json"
    if not marker.exists():
        raise CheckpointError(
            "not a complete checkpoint: complete.json is missing",
            str(folder),
            "name a step-NNNNNNN folder or one that `sdlm import` wrote; an interrupted save cannot be used",
        )
    content = read_json_object(_file(folder, marker.name), CheckpointError, "use another")
    if "state.json" not in content:
        raise CheckpointError("complete.json lists no state.json", str(marker), "copy the checkpoint again")
    entries = {name: checked(content, name, dict, marker, CheckpointError) for name in content}
    return {
        name: (
            checked(entry, "size", int, marker, CheckpointError, 0),
            checked(entry, "sha256", str, marker, CheckpointError),
        )
        for name, entry in entries.items()
    }


class StepFolder(NamedTuple):
    """An entry of a run's ckpt folder that the run has written."""

    step: int
    path: Path
    suffix: str
    """ "" for a checkpoint; .partial, .replaced.partial or .damaged."""


def step_folders(folder: Path) -> list[StepFolder]:
    """The run's own folders in RUN/ckpt, ascending by step; [] where there is no such folder.

    Other names, links and files are a user's, such as a copy step-0000500-good: nothing reads or removes them.

    Raises:
        CheckpointError: the folder cannot be listed. It does not count as empty: a run would start from its base again.
    """
    return sorted(entry for entry in _entries(folder) if isinstance(entry, StepFolder))


def _entries(folder: Path) -> Iterator[StepFolder | Path]:
    """Everything in RUN/ckpt, the run's own folders as StepFolder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                match, path = _NAME.fullmatch(entry.name), folder / entry.name
                own = match is not None and entry.is_dir(follow_symlinks=False)
                yield StepFolder(int(match[1]), path, match[2]) if match and own else path
    except FileNotFoundError:
        return
    except OSError as error:
        raise_passing(error, folder)
        fix = "correct its permissions, or remove what is in its place"
        raise CheckpointError(f"the folder cannot be listed: {error.strerror}", str(folder), fix) from None


def newest(folder: Path, log: Callable[[str], None]) -> Path | None:
    """Newest complete checkpoint in a run's ckpt folder; what is skipped is logged with the reason."""
    for other in sorted(path for path in _entries(folder) if isinstance(path, Path)):
        if not other.name.startswith("."):
            log(f"ignored {other}: not {'a folder' if _NAME.fullmatch(other.name) else 'a name of a checkpoint'}")
    for _, candidate, suffix in reversed(step_folders(folder)):
        if suffix:
            damaged = "its checksums did not match at an earlier start"
            log(f"ignored {candidate}: {damaged if suffix == DAMAGED else 'an interrupted save'}")
            continue
        try:
            check_complete(candidate)
            # Hashing the weights of every candidate would take minutes; the checkpoint that is chosen gets it later.
            check_files(candidate, only="state.json")
        except UnreadableError:
            raise
        except CheckpointError as error:
            log(f"ignored {candidate}: {error.what}")
            continue
        return candidate
    return None


def refuse_restart(folder: Path, gather: Callable[[list[str]], list[list[str]]] = lambda names: [names]) -> None:
    """CheckpointError where RUN/ckpt has checkpoints, called when not one can be used: a run would start over.

    Args:
        gather: the names that each process sees; a shared folder may show others to others, and the main one's count.
    """
    if own := gather([path.name for _, path, suffix in step_folders(folder) if suffix in ("", DAMAGED)])[0]:
        what = f"none of the run's checkpoints can be used: {', '.join(own)}"
        fix = "the lines above say why: copy or repair one (an intact .damaged one: rename it back), or remove them to "
        raise CheckpointError(what, str(folder), fix + "start from the base")


def find_checkpoint(path: Path) -> Path:
    """`path` itself, or the newest complete checkpoint if `path` is a run folder; CheckpointError if it has none."""
    if (path / "complete.json").exists() or not (path / "ckpt").is_dir():
        return path
    folder = newest(path / "ckpt", partial(print, file=sys.stderr))  # stdout may be a command's JSON
    if folder is None:
        ignored = [*_entries(path / "ckpt")]
        fix = "the lines above say why each is ignored; copy them again, or train on" if ignored else ""
        raise CheckpointError("the run has no complete checkpoint", str(path), fix or "train until it has saved one")
    return folder


def newest_step(run_dir: Path) -> int:
    """Step of a run's newest complete checkpoint; -1 if it has none."""
    folder = newest(run_dir / "ckpt", lambda text: None)
    return step_of(folder) if folder else -1


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint so that it is neither used nor counted; returns the new path."""
    # One of the same step may be left from an earlier start.
    aside = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def prune(folder: Path, keep_last: int, keep_every: int = 0) -> None:
    """Removes old checkpoints, and interrupted saves older than the newest checkpoint.

    Args:
        folder: RUN/ckpt.
        keep_last: newest checkpoints to keep; 0: all.
        keep_every: also keep those whose step is a multiple of this; 0: none.
    """
    folders = step_folders(folder)
    complete = [(step, path) for step, path, suffix in folders if not suffix]
    for step, unfinished, suffix in folders:
        if suffix.endswith(PARTIAL) and complete and step < complete[-1][0]:
            shutil.rmtree(unfinished)
    for step, old in complete[:-keep_last] if keep_last else []:
        if keep_every and step % keep_every == 0:
            continue
        # Renamed first: a removal killed half-way must not leave a folder that looks like a checkpoint.
        renamed = old.with_name(old.name + PARTIAL)
        os.rename(old, renamed)
        shutil.rmtree(renamed)


def step_of(folder: Path) -> int:
    """500 of RUN/ckpt/step-0000500."""
    return int(folder.name.removeprefix("step-"))


def step_folder(run_dir: Path, step: int) -> Path:
    """RUN/ckpt/step-0000500."""
    return run_dir / "ckpt" / f"step-{step:07d}"


def read_assets(folder: Path | None) -> dict[str, bytes]:
    """Name to content of those of ASSETS that the folder has."""
    files = {} if folder is None else {name: optional_file(folder, name, CheckpointError) for name in ASSETS}
    return {name: file.read_bytes() for name, file in files.items() if file}


def write_assets(assets: Mapping[str, bytes], folder: Path) -> None:
    """Writes what `read_assets` returned into the folder, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in assets.items():
        (folder / name).write_bytes(content)


def checksums(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Content of complete.json: size in bytes and sha256 of every file below `folder`, by relative path.

    Args:
        known: entries that need not be computed again.
    """
    known, entries = known or {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        entries[name] = dict(known[name]) if name in known else {"size": path.stat().st_size, "sha256": sha256(path)}
    return entries
