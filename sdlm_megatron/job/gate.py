"""The pre-flight as the driver sees it: which nodes are not to be used, and why."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.job.cluster_file import ClusterFile, cluster_path
from sdlm_megatron.job.launch import with_setup
from sdlm_megatron.job.slurm import Job


def preflight(
    name: str, cluster: ClusterFile, job: Job, nodes: Sequence[str], needed: int, run_dir: Path, training: Sequence[str]
) -> dict[str, str]:
    """Runs `python -m sdlm_megatron.preflight` on nodes of this job; its report is beside the driver's log.

    Args:
        name: of the cluster file.
        training: arguments of sdlm_megatron.train, `--config NAME` first.

    Returns:
        bad nodes, with the reason. A pre-flight that fails by itself finds all nodes bad.
    """
    report = run_dir / "logs" / job.name / "preflight.json"
    report.unlink(missing_ok=True)
    line = [sys.executable, "-m", "sdlm_megatron.preflight", f"--run-dir={run_dir}", f"--nodes-needed={needed}"]
    line += [f"--nodes={','.join(nodes)}", f"--cluster={cluster_path(name)}"]
    code = subprocess.run(with_setup(cluster, [*line, *training]), stdin=subprocess.DEVNULL).returncode
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return dict.fromkeys(nodes, f"the pre-flight itself ended with {code}: see the job's output")
    return dict(found["bad"])
