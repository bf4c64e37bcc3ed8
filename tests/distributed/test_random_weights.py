"""Random initial weights are a function of train.seed."""

from pathlib import Path

import pytest
from helpers import make_dataset, read_metrics, train

pytestmark = pytest.mark.distributed


def test_initial_weights_follow_the_seed(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", rows=8)
    losses = []
    for i, (seed, processes) in enumerate([(1, 2), (1, 2), (2, 1)]):
        run_dir = tmp_path / f"run{i}"
        layout = {"parallel.pipeline": processes}
        train(
            {
                "data.path": data,
                "run_dir": run_dir,
                "model.vocab_size": 264,
                "train.steps": 1,
                "train.seed": seed,
                "observe.wandb": "disabled",
                **layout,
            },
            processes=processes,
        )
        losses.append(read_metrics(run_dir)[0]["loss"])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
