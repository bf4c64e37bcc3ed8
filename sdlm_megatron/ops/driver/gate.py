"""The pre-flight as the driver sees it: which nodes are not to be used, and why."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.ops.driver.cluster_file import ClusterFile, cluster_path
from sdlm_megatron.ops.driver.launch import with_setup
from sdlm_megatron.ops.driver.slurm_commands import Job


def preflight(
    name: str,
    cluster: ClusterFile,
    job: Job,
    nodes: Sequence[str],
    needed: int,
    run_dir: Path,
    training: Sequence[str],
    *,
    quick: bool,
) -> tuple[dict[str, str], str]:
    """Runs `python -m sdlm_megatron.ops.driver.preflight` on nodes of this job; its report is beside the driver's log.

    Args:
        name: of the cluster file.
        training: arguments of sdlm_megatron.train, `--config NAME` first.
        quick: without measurements of speed.

    Returns:
        bad nodes, with the reason; and what no other node would mend, such as a run folder on a full disk, or a
        pre-flight that fails itself.
    """
    report = run_dir / "logs" / job.name / "preflight.json"
    report.unlink(missing_ok=True)
    line = [
        sys.executable,
        "-m",
        "sdlm_megatron.ops.driver.preflight",
        f"--run-dir={run_dir}",
        f"--nodes-needed={needed}",
    ]
    line += [f"--nodes={','.join(nodes)}", f"--cluster={cluster_path(name)}"]
    line += ["--quick"] if quick else []
    code = subprocess.run(with_setup(cluster, [*line, *training]), stdin=subprocess.DEVNULL).returncode
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, f"it ended with code {code} and without a report: see the job's output"
    return dict(found["bad"]), str(found["everywhere"])
