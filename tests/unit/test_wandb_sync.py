"""W&B runs of several attempts: what the real client and `wandb sync` send to a server on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ENV

from sdlm_megatron.metrics.sinks import read_metrics
from tests.wandb_server import StoredRun, serving

KEY = "0123456789abcdef0123456789abcdef01234567"

ATTEMPT = """
import json, os, sys
from types import SimpleNamespace
from sdlm_megatron.metrics.sinks import Sinks
folder, mode, first, last, resume_step, crash = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
settings = SimpleNamespace(tensorboard=False, wandb=mode, wandb_project="sdlm-test")
sinks = Sinks.open(folder, settings, resume_step, run_config={"attempt": resume_step})
for step in range(first, last + 1):
    sinks.log(step, {"loss": step + resume_step / 100})
    if step % 3 == 0 and not (crash and step == last):
        sample = {"prompt": "p", "answer_tokens": [{"text": "a", "pass": 1}, {"text": "b", "pass": 2}]}
        sinks.log_samples(step, {"tokens_per_pass": 1.5, "samples": [sample]})
        sinks.log_validation(step, {"val_loss": step + resume_step / 100})
sinks.close()
"""


def attempt(folder: Path, *numbers: int, mode: str = "offline", crash: int = 0, **environment: str) -> str:
    """Logs the steps first..last of a run that resumes from a step; returns what was printed."""
    arguments = [str(folder), mode, *map(str, numbers), str(crash)]
    environment = {**os.environ, **ENV, "WANDB_API_KEY": KEY, "PYTHONPATH": ENV["PYTHONPATH"], **environment}
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPT, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def sync(address: str, *parts: Path) -> None:
    """Uploads parts as docs/operations.md says."""
    environment = {**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY}
    command = [str(Path(sys.executable).with_name("wandb")), "sync", *map(str, parts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def column(run: StoredRun, field: str) -> list[tuple[int, Any]]:
    """(step, value) of the rows with a field, in the order of the history."""
    return [(row["step"], row[field]) for _, row in sorted(run.history.items()) if field in row]


def check(run: StoredRun, folder: Path) -> None:
    """One run without a gap: nine steps, of which the first record was kept, and three validations."""
    assert sorted(run.history) == list(range(len(run.history))) and not run.replaced
    assert [row["_step"] for _, row in sorted(run.history.items())] == sorted(run.history)
    steps = [1.0, 2.0, 3.0, 4.0, 5.02, 6.02, 7.06, 8.06, 9.06]
    assert column(run, "loss") == [(n, pytest.approx(loss)) for n, loss in enumerate(steps, 1)]
    assert column(run, "val_loss") == [(3, 3), (6, pytest.approx(6.02)), (9, pytest.approx(9.06))]
    assert [step for step, _ in column(run, "samples")] == [3, 6, 9]
    assert (run.summary["loss"], run.summary["step"]) == (pytest.approx(9.06), 9)
    assert run.config["attempt"]["value"] == 6
    assert set(run.names) == {folder.name}
    # metrics.jsonl has the last record of each step
    assert [r["loss"] for r in read_metrics(folder / "metrics.jsonl")] == pytest.approx(
        [1, 2, 3.02, 4.02, 5.02, 6.02, 7.06, 8.06, 9.06]
    )


@pytest.mark.slow
def test_offline_parts_are_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "night"
    printed = attempt(folder, 1, 4, 0) + attempt(folder, 3, 6, 2) + attempt(folder, 7, 9, 6)
    assert KEY not in printed and "WARNING" not in printed
    parts = sorted(folder.glob("wandb/offline-run-*"))
    run_id = (folder / "wandb" / "run-id").read_text().strip()
    tables = [json.loads(t.read_text())["data"] for t in folder.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert (len(parts), tables) == (3, [[["p", "a|b", None]]] * 3)
    with serving() as (address, runs):
        sync(address, *parts)
        assert list(runs) == [run_id]
        check(runs[run_id], folder)
    for part in parts:
        for mark in part.glob("*.sync*"):
            mark.unlink()
    with serving() as (address, runs):
        for part in parts:  # one at a time, as after each job
            sync(address, part)
        check(runs[run_id], folder)


@pytest.mark.slow
def test_parts_of_killed_attempts_do_not_stop_the_upload(tmp_path: Path) -> None:
    """Parts cut within a record, and before the first: what they lost comes from metrics.jsonl, once."""
    folder = tmp_path / "night"
    for last in (6, 8):
        attempt(folder, last - 5, last, last - 6)
        part = max(folder.glob("wandb/offline-run-*/*.wandb"))
        part.write_bytes(part.read_bytes()[: -900 if last == 6 else 7])
    attempt(folder, 8, 9, 7)
    parts = sorted(folder.glob("wandb/offline-run-*"))
    assert len(parts) == 2 and len([*folder.glob("wandb/empty-offline-run-*")]) == 1
    with serving() as (address, runs):
        sync(address, *parts)
        (run,) = runs.values()
    assert [step for step, _ in column(run, "loss")] == [*range(1, 10)]
    assert [step for step, _ in column(run, "val_loss")] == [3, 6, 9]
    assert [step for step, _ in column(run, "sample_tokens_per_pass")] == [3, 6, 9]
    assert sorted(run.history) == list(range(len(run.history))) and not run.replaced


@pytest.mark.slow
def test_crash_before_the_validation_of_a_logged_step(tmp_path: Path) -> None:
    """The record of step 6 is kept, its validation comes from the second attempt; the third logs nothing new."""
    folder = tmp_path / "night"
    attempt(folder, 1, 6, 0, crash=1)
    attempt(folder, 5, 6, 4)
    attempt(folder, 5, 6, 4)
    with serving() as (address, runs):
        sync(address, *sorted(folder.glob("wandb/offline-run-*")))
        (run,) = runs.values()
    assert column(run, "loss") == [(n, n) for n in range(1, 7)]
    assert column(run, "val_loss") == [(3, 3), (6, pytest.approx(6.04))]
    assert (run.summary["loss"], run.summary["val_loss"]) == (pytest.approx(6.04), pytest.approx(6.04))
    assert sorted(run.history) == list(range(len(run.history))) and not run.replaced


@pytest.mark.slow
def test_online_attempts_are_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "night"
    with serving() as (address, runs):
        for numbers in ((1, 4, 0), (3, 6, 2), (7, 9, 6)):
            assert "WARNING" not in attempt(folder, *numbers, mode="online", WANDB_BASE_URL=address)
        (run,) = runs.values()
    check(run, folder)
