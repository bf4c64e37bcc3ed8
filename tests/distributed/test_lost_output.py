"""Output that cannot be shown, drawn or printed does not end training, and does not change it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENV, REPO, make_dataset, make_hf, read_metrics, train

from tests import ranks

pytestmark = pytest.mark.distributed


def settings(folder: Path, run: Path) -> dict[str, object]:
    return {
        "run_dir": run,
        "data.path": folder / "data",
        "data.validation": folder / "data",
        "checkpoint.base": folder / "hf",
        "model.num_layers": 0,
        "train.steps": 3,
        "train.global_batch": 4,
        "checkpoint.save_every": 0,
        "observe.sample_every": 1,
        "observe.validate_every": 1,
    }


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    make_dataset(folder / "data", rows=12)
    make_hf(folder / "hf")
    train(settings(folder, folder / "run"))
    return folder


def without_reader(line: list[str], errors: Path) -> int:
    """Exit code of a command in an interpreter of its own, whose output is an ASCII pipe that nothing reads."""
    reading, output = os.pipe()
    os.close(reading)
    environment = {**os.environ, **ENV, "PYTHONIOENCODING": "ascii"}
    try:
        with errors.open("wb") as file:
            return subprocess.run(line, stdout=output, stderr=file, env=environment, cwd=REPO, timeout=600).returncode
    finally:
        os.close(output)


@pytest.mark.parametrize("kind", ["full disk", "broken pipe"])
def test_losses_are_the_same_without_any_output(usual: Path, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    # what hooks write: a file where a folder is expected, and folders where files are
    for name in ("tensorboard", "profile"):
        (run / name).write_text("")
    for name in ("samples.jsonl", "validation.jsonl", "spikes.jsonl"):
        (run / name).mkdir()
    options = [f"--{key}={value}" for key, value in settings(usual, run).items()]
    line = ["-m", "sdlm_megatron.train", "--config", "tiny", *options, "--profile", "2"]
    if kind == "full disk":
        code = ranks.run(line, {**os.environ, **ENV}, ["/dev/full", str(tmp_path / "errors")], 1, 600)
    else:
        code = without_reader([sys.executable, *line], tmp_path / "errors")
    text = (tmp_path / "errors").read_text()
    assert code == 0, text
    assert [r["loss"] for r in read_metrics(run)] == [r["loss"] for r in read_metrics(usual / "run")]
    assert (run / "ckpt" / "step-0000003" / "complete.json").exists()
    assert "Traceback" not in text
    assert text.count("WARNING: standard output cannot be written, its text is lost") == 1
    assert text.count("TensorBoard's files cannot be written") == 1
    for what in ("the profile", "the output of a validation", "the output of samples"):
        assert text.count(f"WARNING: {what} failed, training goes on: ") == 1, what
