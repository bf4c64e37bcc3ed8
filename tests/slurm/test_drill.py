"""Short form of `make drill`: a requeue and a killed process, on two nodes of a real Slurm."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import drill
from drill_tools import Drill, Run
from helpers import run_python

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
SHORT = ("USR1 before the time limit", "a rank killed with -9")


def without_slurm(plan: Drill) -> Run:
    """The undisturbed run in two forks on this machine: bitwise equal, and sooner done than a job."""
    run = Run(plan.work / "undisturbed")
    paths = {"data.path": plan.data, "checkpoint.base": plan.base, "run_dir": run.folder, "observe.wandb": "disabled"}
    options = [*plan.overrides(keep=0), *(f"--{key}={value}" for key, value in paths.items())]
    run_python("-m", "sdlm_megatron.train", "--config", "sdlm_32b_d4", *options, processes=2)
    return run


def test_run_with_faults_ends_with_the_undisturbed_weights(cluster, tmp_path: Path) -> None:
    outcomes = drill.all_faults(cluster, tmp_path / "drill", cluster.nodes[:3], SHORT, without_slurm)
    assert [outcome.name for outcome in outcomes] == list(SHORT)
    assert (tmp_path / "drill" / "disturbed" / "report.html").exists()
