"""What a campaign has measured: reads runs/evidence/ARM-SEED, whatever of it is there."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev.evidence.arms import ARMS
from sdlm_megatron.errors import DataError
from sdlm_megatron.evaluation.result_files import KINDS, Result, Results

TASKS = {"json": "sentence to JSON", "categories": "words to categories"}
BASE = "base"
"""The untouched model; it has no seeds."""


def text_of(arm: str) -> str:
    """An arm's words in tables and figures."""
    return ARMS[arm].text if arm in ARMS else "untouched"


@dataclass
class Campaign:
    """Results by arm and seed."""

    measured: dict[tuple[str, str], dict[str, dict[int, Result]]] = field(default_factory=dict)
    """(task, kind) -> arm -> seed -> result; perplexity has the task ""."""
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    """arm -> seed -> seconds of preparing, training and exporting."""

    def seeds(self, task: str, kind: str, arm: str) -> dict[int, Result]:
        return self.measured.get((task, kind), {}).get(arm, {})

    def of(self, task: str, kind: str, arms: list[str]) -> Results:
        """Results of these arms under their words, those that are there."""
        found = {text_of(arm): list(self.seeds(task, kind, arm).values()) for arm in arms}
        return {text: seeds for text, seeds in found.items() if seeds}


def read_campaign(folder: Path) -> Campaign:
    """Everything below `folder` that dev.evidence.train_arms and dev.evidence.measure wrote.

    Raises:
        DataError: nothing is there, or a file is not what its name says.
    """
    campaign = Campaign()
    for one in sorted(folder.glob("*")):
        name = re.fullmatch(r"(\w+)-(\d+)", one.name)
        arm, seed = (name[1], int(name[2])) if name else (one.name, 0)
        if arm not in (ARMS if name else (BASE,)):
            continue
        if name and (one / "facts.json").exists():
            campaign.seconds.setdefault(arm, {})[seed] = float(_read(one / "facts.json")["seconds"])
        files = [(task, one / task / f"{kind}.json") for task in TASKS for kind in KINDS if kind != "perplexity"]
        for task, path in [*files, ("", one / "perplexity.json")]:
            if path.exists():
                value = _read(path)
                campaign.measured.setdefault((task, path.stem), {}).setdefault(arm, {})[seed] = value
    if not campaign.measured:
        raise DataError(
            "no results in the campaign's folder", str(folder), "measure first: python -m dev.evidence.measure"
        )
    return campaign


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read JSON: {error}", str(path), "remove it, and measure again") from None
    if not isinstance(value, dict) or value.get("kind", path.stem) != path.stem:
        raise DataError("no result file", str(path), "remove it, and measure again")
    return value
