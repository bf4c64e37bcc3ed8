"""Facts about a run for the model card, saved in each checkpoint as run.json. No secrets, no paths of a machine."""

import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sdlm_megatron
from sdlm_megatron.config.schema import RunConfig

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine")
_SECTIONS = ("diffusion", "optimizer", "schedule", "train", "parallel", "lora")
_DATA = ("row_length", "max_document_length", "block_size", "repeat", "seed", "overlong", "system_prompt", "checksum")
_TALLY = ("rows", "packed", "truncated", "clean_tokens", "blocks")


def run_facts(
    config: RunConfig, manifest: Mapping[str, Any], losses: Mapping[str, Any], *, dp_size: int
) -> dict[str, Any]:
    """Facts as plain JSON values.

    Args:
        config: configuration of the run.
        manifest: manifest of the packed dataset.
        losses: the newest log record; {} before the first.
        dp_size: data-parallel size.
    """
    settings = asdict(config)
    return {
        "base": Path(config.checkpoint.base).name,
        "adapter": Path(config.checkpoint.adapter).name,
        "settings": {section: settings[section] for section in _SECTIONS},
        "data_parallel": dp_size,
        "data": _data(Path(config.data.path).name, manifest),
        "losses": {k: v for k, v in losses.items() if k in ("step", "epoch", "targets") or k.startswith("loss")},
        "versions": dict(versions()),
    }


def _data(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    accounting = manifest.get("accounting", {})
    origin = {source["name"]: source for source in manifest.get("sources", [])}
    sources = []
    for tally in accounting.get("by_source", []):
        source = origin.get(tally["name"], {})
        known = {key: source[key] for key in ("hub", "subset", "split", "revision", "licence") if source.get(key)}
        sources.append({"name": tally["name"], "weight": tally.get("weight", 1.0), **known, **_tally(tally)})
    counts = manifest["counts"]
    return {
        "name": name,
        **{key: manifest[key] for key in _DATA if key in manifest},
        "tokenizer": manifest["tokenizer"],
        "epochs": [{key: epoch[key] for key in ("rows", "documents", "clean", "block", "targets")} for epoch in counts],
        "total": _tally(accounting),
        "sources": sources,
    }


def _tally(tally: Mapping[str, Any]) -> dict[str, int]:
    return {key: tally[key] for key in _TALLY if key in tally}


@lru_cache(maxsize=1)
def versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of this package, with its git commit in a checkout, and of PACKAGES."""
    return (("sdlm_megatron", sdlm_megatron.__version__ + _commit()), *package_versions())


def software() -> str:
    """Python, this package and PACKAGES with their versions."""
    return ", ".join(f"{name} {number}" for name, number in (("Python", platform.python_version()), *versions()))


def package_versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of those of PACKAGES that are installed."""
    installed = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed.append((package, version(package)))
    return tuple(installed)


def _commit() -> str:
    """ " (commit 12ab...)" in a checkout, "" elsewhere."""
    root = Path(sdlm_megatron.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # GIT_DIR of a hook
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        commit = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" (commit {commit})"
