"""Tasks of the paper, as definitions for lm-evaluation-harness that read local copies of the datasets.

paper_recipe.yaml names the definition of lm_eval, the changes and the published figures. `write_definitions` writes
what lm_eval reads: files that include its own definition and replace the dataset by a folder.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.files import make_folder, write_text

RECIPE = Path(__file__).with_name("paper_recipe.yaml")
STOP_STRINGS: list[str] = []  # those of lm_eval are for continued texts, and cut the answers of a chat
CODE_METRIC = "evaluate-metric/code_eval"
"""The metric of the tasks that run code: a Space of the hub, and its folder below --data."""


@dataclass(frozen=True)
class PaperTask:
    """One column of the paper's tables; fields as in paper_recipe.yaml."""

    key: str
    name: str
    base: str
    data: str
    split: int
    shots: int
    metric: str
    filter: str = "none"
    packages: Sequence[str] = ()
    files: Sequence[str] = ()
    executes: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    def missing(self, data: Path, *, run_code: bool) -> str:
        """Why the task cannot run with this folder of datasets, with the way out; empty if it can."""
        if not (data / self.data).is_dir():
            return f"no dataset: hf download {self.data} --repo-type dataset --local-dir {data / self.data}"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"needs {', '.join(absent)}: pip install 'sdlm-megatron[paper]'"
        for file in self.files:
            if not (data / file).exists():
                root, name = data / Path(file).parts[0], Path(file).name
                return f"no {name}: python -m nltk.downloader -d {root} {name}"
        if self.executes and not run_code:
            return "runs code that the model writes, with your rights: --confirm-run-unsafe-code, in a sandbox"
        if self.executes and not (data / CODE_METRIC).is_dir():
            return f"no metric: hf download {CODE_METRIC} --repo-type space --local-dir {data / CODE_METRIC}"
        return ""


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables: percent, and tokens per pass; absent values are missing keys."""

    model: str
    size: str
    block_size: int
    threshold: float | None
    scores: Mapping[str, float]
    """By key of the task."""
    tokens_per_pass: Mapping[str, float]
    choice: Mapping[str, float]
    """Scores of the choice tasks, which are published for no particular threshold."""


@cache
def _recipe() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    return value


def paper_tasks() -> dict[str, PaperTask]:
    """The tasks by key, in the order of the paper."""
    return {key: PaperTask(key, **entry) for key, entry in _recipe()["tasks"].items()}


def published() -> list[Published]:
    """The paper's rows, in its order."""
    keys = list(_recipe()["tasks"])

    def by_task(values: Sequence[float], start: int) -> dict[str, float]:
        return dict(zip(keys[start:], values, strict=False))

    rows = []
    for entry in _recipe()["published"]:
        scores = by_task(entry["scores"], 0)
        choice = by_task(_recipe()["published_choice"].get(entry["model"], ()), len(scores))
        speeds = by_task(entry.get("tokens_per_pass", ()), 0)
        named = (entry["model"], entry["size"], entry["block_size"], entry.get("threshold"))
        rows.append(Published(*named, scores, speeds, choice))
    return rows


def choose_tasks(names: Sequence[str], data: Path, *, run_code: bool) -> tuple[list[PaperTask], dict[str, str]]:
    """The tasks to run, and why the others are left out; with `names`, all of those must be able to run.

    Raises:
        ConfigError: an unknown name, a named task that cannot run, or none that can.
    """
    tasks = paper_tasks()
    for name in names:
        if name not in tasks:
            raise ConfigError(f"unknown task '{name}'", "--tasks", f"some of {', '.join(tasks)}")
    reasons = {task.key: task.missing(data, run_code=run_code) for task in tasks.values()}
    for name in names:
        if reasons[name]:
            raise ConfigError(f"{tasks[name].name} cannot run", f"--tasks {name}", reasons[name])
    ready = [task for task in tasks.values() if not reasons[task.key] and (not names or task.key in names)]
    if not ready:
        raise ConfigError("no task can run", f"--data {data}", next(reason for reason in reasons.values() if reason))
    return ready, {key: reason for key, reason in reasons.items() if reason}


def write_definitions(task: PaperTask, data: Path, folder: Path, *, tokens: int, installed: Path) -> list[str]:
    """Writes the task for lm_eval into `folder` and returns the names by which it knows the task or its parts.

    Args:
        data: folder of the datasets.
        tokens: most new tokens of an answer.
        installed: lm_eval's own folder of tasks.
    """
    make_folder(folder)
    sources = sorted(installed.glob(task.base))
    if not sources:
        fix = "install the version of lm_eval in constraints.txt"
        raise ConfigError(f"lm_eval has no definition of {task.name}", str(installed / task.base), fix)
    names = []
    for source in sources:
        names.append(f"paper_{task.key}" if len(sources) == 1 else f"paper_{source.stem}")
        definition = {
            "include": str(source),
            "task": names[-1],
            "tag": None,
            "dataset_path": str((data / task.data).resolve()),
            "dataset_kwargs": {"cache_dir": str((folder / "cache").resolve())},
            "num_fewshot": task.shots,
            **task.changes,
            "generation_kwargs": {"until": STOP_STRINGS, "max_gen_toks": tokens, "do_sample": False},
        }
        write_text(folder / f"{names[-1]}.yaml", yaml.safe_dump(definition, sort_keys=False, allow_unicode=True))
    return names
