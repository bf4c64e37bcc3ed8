"""The files of a checkpoint, without the weights: complete or ignored, newest first, and what a run's state is.

    FOLDER/
      weights/        model (and optimizer) shards, Megatron-Core's torch_dist format (weights/torch_dist.py)
      state.json      TrainState: step, rows consumed, rows a step, model shape, diffusion settings, dataset
      run.json        what the model card tells: recipe, data, losses, versions (not in a converted base)
      hf/             config.json, tokenizer and generation files of the base, for the export
      complete.json   size and sha256 of all files; written last, in a folder that is then renamed into place

A training checkpoint is RUN/ckpt/step-0000500; step-0000500.partial is one that was being written, .damaged one whose
bytes were not those written. A converted base has the same form without an optimizer. Nothing here needs Megatron, so
that a mistake is found before ten seconds of imports.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdlm_megatron.config.schema import DiffusionConfig, ModelConfig
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
    """Where a run stands, and what is needed to go on or to export."""

    step: int
    """Updates made."""
    consumed_rows: int
    rows_per_step: int
    """Kept over a resume, whatever the new layout."""
    shape: ModelConfig
    diffusion: DiffusionConfig
    mask_token_id: int
    precision: str
    """bf16 | fp16 | fp32: dtype of the weights."""
    with_optimizer: bool
    """Whether the checkpoint holds the optimizer's state, so that training can go on."""
    dataset: dict[str, Any]
    """Identity of the packed dataset: fingerprint of its files, rows; {} for a converted base."""
    eos_token_id: int = -1
    """Token that ends a turn in the dataset; -1 for a converted base."""


def read_state(folder: Path) -> TrainState:
    """state.json of a complete checkpoint. CheckpointError when the folder is none, incomplete or truncated."""
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
    """run.json of a complete checkpoint (see ops/run_facts.py); {} for a converted base, or one of an older version."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"run.json cannot be read: {error}", str(folder / "run.json"), "copy the checkpoint again"
        ) from None
    return dict(found)


def check_complete(folder: Path) -> None:
    """Raises CheckpointError unless every file of the checkpoint is there with its full size."""
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", str(folder), "name a folder that holds complete.json")
    for name, (size, _) in _listed(folder).items():
        file = folder / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            raise CheckpointError(
                f"{name} is missing" if found is None else f"{name} has {found} bytes instead of {size}",
                str(file),
                "the checkpoint was cut short: copy it again or use another",
            )


def check_files(folder: Path, share: tuple[int, int] = (0, 1), only: str = "") -> None:
    """Reads files of a complete checkpoint; CheckpointError where one is not what was written.

    Args:
        folder: a checkpoint.
        share: (i, n) reads every n-th file from the i-th, the largest first, so that n processes read about the same.
        only: reads this file alone.
    """
    files = sorted(_listed(folder).items(), key=lambda entry: (-entry[1][0], entry[0]))
    files = [entry for entry in files if only in ("", entry[0])]
    for name, (_, wanted) in files[share[0] :: share[1]]:
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error}", str(folder / name), "use another") from None
        if found != wanted:
            raise CheckpointError(
                f"{name} has other bytes than were written", str(folder / name), "copy it again or use another"
            )


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """complete.json: (size, sha256) of each file."""
    marker = folder / "complete.json"
    if not marker.exists():
        raise CheckpointError(
            "not a complete checkpoint: complete.json is missing",
            str(folder),
            "name a step-NNNNNNN folder or one that hf_to_mcore wrote; an interrupted save cannot be used",
        )
    try:
        entries = json.loads(marker.read_text())
        return {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"complete.json is damaged: {error}", str(marker), "use another checkpoint") from None


def newest(folder: Path, notice: Callable[[str], None]) -> Path | None:
    """Newest complete checkpoint step-* of a run; broken ones are skipped with a notice."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if candidate.suffix:
            reason = {".partial": "an interrupted save", DAMAGED: "found damaged at an earlier start"}
            notice(f"ignored {candidate}: {reason.get(candidate.suffix, 'not a checkpoint')}")
            continue
        try:
            check_complete(candidate)
            check_files(candidate, only="state.json")
        except CheckpointError as error:
            notice(f"ignored {candidate}: {error.what}")
            continue
        return candidate
    return None


def newest_step(run_dir: Path) -> int:
    """Step of a run's newest complete checkpoint; -1 without one."""
    folder = newest(run_dir / "ckpt", lambda text: None)
    return step_of(folder) if folder else -1


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint so that nobody uses it or counts it; returns the new name."""
    aside = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def prune(folder: Path, keep_last: int, keep_every: int = 0) -> None:
    """Removes all but the newest `keep_last` checkpoints (0: none) and those of every `keep_every`-th step.

    Renamed first, so that none is half there. What interrupted saves of earlier steps left goes too.
    """
    found = sorted(folder.glob("step-*"))
    complete = [p for p in found if not p.suffix]
    for left in found:
        if left.suffix == ".partial" and complete and left.name < complete[-1].name:
            shutil.rmtree(left)
    for old in complete[:-keep_last] if keep_last else []:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        doomed = old.with_name(old.name + ".partial")
        os.rename(old, doomed)
        shutil.rmtree(doomed)


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
    """The content of complete.json: size in bytes and sha256 of every file below `folder`, by relative path.

    `known` has those that need not be read.
    """
    known, found = known or {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        found[name] = dict(known[name]) if name in known else {"size": path.stat().st_size, "sha256": sha256(path)}
    return found


def _section(kind: type, raw: dict) -> Any:
    known = {f.name for f in fields(kind)}
    if unknown := set(raw) - known:
        raise ValueError(f"unknown keys {sorted(unknown)}: written by another version")
    return kind(**raw)
