"""Files of a training checkpoint besides the weights: completeness, state of the run, retention.

    FOLDER/
      weights/        model (and optimizer) shards in Megatron-Core's torch_dist format (weights/torch_dist.py)
      state.json      TrainState: step, rows consumed, rows per step, model shape, diffusion settings, dataset
      run.json        content of the model card: recipe, data, losses, versions (not in an imported base)
      hf/             config.json, tokenizer and generation files of the base, for the export
      complete.json   size and sha256 of all files; written last, in a folder that is then renamed into place

A training checkpoint is RUN/ckpt/step-0000500. step-0000500.partial is an interrupted save, step-0000500.damaged one
whose checksums did not match. An imported base has the same form without an optimizer. Nothing here imports Megatron,
so that errors are reported before its ten seconds of imports.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sdlm_megatron.config.schema import DiffusionConfig, ModelConfig
from sdlm_megatron.diffusion.settings import SDLMSettings
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
DAMAGED = ".damaged"
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
    try:
        raw = json.loads((folder / "state.json").read_text())
        raw["shape"] = _section(ModelConfig, raw["shape"])
        raw["diffusion"] = _section(DiffusionConfig, {"target_shift": True, **raw["diffusion"]})
        return TrainState(**raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"state.json cannot be read: {error}", str(folder / "state.json"), "use another checkpoint"
        ) from None


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a complete checkpoint (see ops/run_facts.py); {} where there is none, as in an imported base."""
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"run.json cannot be read: {error}", str(folder / "run.json"), "copy the checkpoint again"
        ) from None
    return dict(content)


def check_complete(folder: Path) -> None:
    """CheckpointError unless every file of the checkpoint exists with its full size."""
    if not folder.is_dir():
        fix = "name a run, its ckpt/step-NNNNNNN, or a folder that `sdlm import` wrote"
        raise CheckpointError("no such checkpoint folder", str(folder), fix)
    for name, (size, _) in _listed(folder).items():
        file = folder / name
        actual = file.stat().st_size if file.exists() else None
        if actual != size:
            raise CheckpointError(
                f"{name} is missing" if actual is None else f"{name} has {actual} bytes instead of {size}",
                str(file),
                "the checkpoint is truncated: copy it again or use another",
            )


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
        try:
            actual = sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error}", str(folder / name), "use another") from None
        if actual != expected:
            raise CheckpointError(
                f"{name} is damaged: its checksum differs from the one recorded when it was written",
                str(folder / name),
                "copy it again or use another",
            )


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """complete.json: (size, sha256) of each file."""
    marker = folder / "complete.json"
    if not marker.exists():
        raise CheckpointError(
            "not a complete checkpoint: complete.json is missing",
            str(folder),
            "name a step-NNNNNNN folder or one that `sdlm import` wrote; an interrupted save cannot be used",
        )
    try:
        entries = json.loads(marker.read_text())
        return {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"complete.json is damaged: {error}", str(marker), "use another checkpoint") from None


def newest(folder: Path, log: Callable[[str], None]) -> Path | None:
    """Newest complete checkpoint step-* in a run's ckpt folder; incomplete ones are skipped, and the log says why."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if candidate.suffix:
            reason = {".partial": "an interrupted save", DAMAGED: "its checksums did not match at an earlier start"}
            log(f"ignored {candidate}: {reason.get(candidate.suffix, 'not a checkpoint')}")
            continue
        try:
            check_complete(candidate)
            # Hashing the weights of every candidate would take minutes; the checkpoint that is chosen gets it later.
            check_files(candidate, only="state.json")
        except CheckpointError as error:
            log(f"ignored {candidate}: {error.what}")
            continue
        return candidate
    return None


def find_checkpoint(path: Path) -> Path:
    """`path` itself, or the newest complete checkpoint if `path` is a run folder; CheckpointError if it has none."""
    if (path / "complete.json").exists() or not (path / "ckpt").is_dir():
        return path
    folder = newest(path / "ckpt", print)
    if folder is None:
        raise CheckpointError("the run has no complete checkpoint", str(path), "train until it has saved one")
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
    folders = sorted(folder.glob("step-*"))
    complete = [p for p in folders if not p.suffix]
    for unfinished in folders:
        if unfinished.suffix == ".partial" and complete and unfinished.name < complete[-1].name:
            shutil.rmtree(unfinished)
    for old in complete[:-keep_last] if keep_last else []:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        # Renamed first: a removal killed half-way must not leave a folder that looks like a checkpoint.
        renamed = old.with_name(old.name + ".partial")
        os.rename(old, renamed)
        shutil.rmtree(renamed)


def step_of(folder: Path) -> int:
    """500 of RUN/ckpt/step-0000500."""
    return int(folder.name.removeprefix("step-"))


def step_folder(run_dir: Path, step: int) -> Path:
    """RUN/ckpt/step-0000500."""
    return run_dir / "ckpt" / f"step-{step:07d}"


def copy_assets(source: Path | None, target: Path) -> None:
    """Copies those of ASSETS that `source` has into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        if source is not None and (source / name).exists():
            shutil.copyfile(source / name, target / name)


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


def _section(kind: type, raw: dict) -> Any:
    # Dropping a setting that this version does not know could silently change the training.
    known = {f.name for f in fields(kind)}
    if unknown := set(raw) - known:
        raise ValueError(f"unknown keys {sorted(unknown)}: written by another version")
    return kind(**raw)
