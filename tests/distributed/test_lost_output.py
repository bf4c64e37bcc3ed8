"""Output that cannot be shown, drawn or printed does not end training, and does not change it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENV, REPO, make_dataset, make_hf, read_metrics, train

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
    line = [sys.executable, "-m", "sdlm_megatron.train", "--config", "tiny", *options, "--profile", "2"]
    environment = {**os.environ, **ENV, "PYTHONIOENCODING": "ascii"}
    if kind == "full disk":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, output = os.pipe()
        os.close(reading)
    try:
        with open(tmp_path / "errors", "wb") as errors:
            code = subprocess.run(line, stdout=output, stderr=errors, env=environment, cwd=REPO, timeout=600).returncode
    finally:
        os.close(output)
    text = (tmp_path / "errors").read_text()
    assert code == 0, text
    assert [r["loss"] for r in read_metrics(run)] == [r["loss"] for r in read_metrics(usual / "run")]
    assert (run / "ckpt" / "step-0000003" / "complete.json").exists()
    assert "Traceback" not in text
    assert text.count("WARNING: standard output cannot be written, its text is lost") == 1
    assert text.count("TensorBoard's files cannot be written") == 1
    for what in ("the profile", "the output of a validation", "the output of samples"):
        assert text.count(f"WARNING: {what} failed, training goes on: ") == 1, what
