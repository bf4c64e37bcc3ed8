"""Slurm for the tests: one cluster per test session, from Debian's packages, or a skip with the reason."""

import importlib.util
import os
import string
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("slurm_cluster", HERE / "cluster.py")
assert _spec is not None and _spec.loader is not None
slurm_cluster = sys.modules["slurm_cluster"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(slurm_cluster)


def _sweep() -> None:
    """Removes clusters left by test sessions that were killed."""
    for owner in Path("/run").glob("slurm-t???/owner"):
        if not slurm_cluster.alive(owner):
            slurm_cluster.Cluster(owner.parent.name.removeprefix("slurm-"), 0).down()


@pytest.fixture(scope="session")
def cluster():
    """Three nodes with 8 fake GPUs each; `cluster.run("squeue")`, `cluster.submit(SCRIPT)`, `cluster.cut(node)`.

    In CI (CI=true) a cluster that cannot be started is an error.
    """
    reason = slurm_cluster.missing()
    if reason and os.environ.get("CI") != "true":
        pytest.skip(f"no Slurm here: {reason}")
    _sweep()
    letters = string.ascii_lowercase
    name = "t" + "".join(letters[os.getpid() // 26**i % 26] for i in range(3))
    slurm = slurm_cluster.Cluster(name, nodes=3)
    try:
        slurm.lab.mkdir(parents=True, exist_ok=True)
        (slurm.lab / "owner").write_text(str(os.getpid()))
        yield slurm.up()
    finally:
        slurm.down()
