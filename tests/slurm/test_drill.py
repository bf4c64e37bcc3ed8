"""Short form of `make drill`: a requeue and a killed process, on two nodes of a real Slurm."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import drill

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
SHORT = ("USR1 before the time limit", "a rank killed with -9")


def test_run_with_faults_ends_with_the_undisturbed_weights(cluster, tmp_path: Path) -> None:
    outcomes = drill.all_faults(cluster, tmp_path / "drill", cluster.nodes[:3], SHORT)
    assert [outcome.name for outcome in outcomes] == list(SHORT)
    assert (tmp_path / "drill" / "disturbed" / "report.html").exists()
