"""The newest supported Megatron-Core equals the installed one (`make test-newest` runs all tests on it)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import REPO, make_dataset, make_hf, read_metrics, train
from newest_megatron import NEWEST, fetch

pytestmark = pytest.mark.distributed

STEPS, SAVED = 6, 2


@pytest.fixture(scope="module")
def newest() -> dict[str, str]:
    """Environment variables that select it. Skips if it cannot be downloaded, except in CI."""
    try:
        return {"PYTHONPATH": fetch(REPO / ".cache")}
    except subprocess.CalledProcessError as error:
        message = f"megatron-core {NEWEST} could not be fetched: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


def test_newest_trains_the_same_and_resumes_older_checkpoints(newest: dict[str, str], tmp_path: Path) -> None:
    common = {
        "data.path": make_dataset(tmp_path / "data"),
        "checkpoint.base": make_hf(tmp_path / "hf"),
        "model.num_layers": 0,
        "train.steps": STEPS,
        "checkpoint.save_every": SAVED,
        "checkpoint.keep_last": 0,
        "observe.tensorboard": False,
    }
    installed, spread, resumed = (tmp_path / name for name in ("installed", "spread", "resumed"))
    train({**common, "run_dir": installed})
    layout = {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2, "train.stop_after": SAVED}
    done = train({**common, "run_dir": spread, **layout}, processes=4, env=newest)
    for line in done.stderr.splitlines():  # a note that every process prints belongs in compat.KNOWN_NOTICES
        assert "DEPRECATED" not in line.upper(), line
    shutil.copytree(installed / "ckpt" / f"step-{SAVED:07d}", resumed / "ckpt" / f"step-{SAVED:07d}")
    train({**common, "run_dir": resumed}, env=newest)
    expected = read_metrics(installed)
    actual = read_metrics(spread) + read_metrics(resumed)
    assert [r["step"] for r in actual] == [r["step"] for r in expected]
    for record, reference in zip(actual, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert record[key] == pytest.approx(reference[key], rel=1e-5), f"step {record['step']}, {key}"
