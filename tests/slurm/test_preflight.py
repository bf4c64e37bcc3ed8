"""The pre-flight on a real Slurm: what is wrong with a node is found, the node is written down, the others go on."""

import json
import sys
from pathlib import Path

from helpers import ENV, REPO

from sdlm_megatron.job.verdict import read_bad_nodes

LIMITS = "preflight: {run_disk_gb: 0.1, local_disk_gb: 0.1, shm_gb: 0, write_mb: 2, answer_seconds: 60}\n"


def fly(cluster, folder: Path, *, needed: int, config: str) -> tuple[int, dict, str]:
    """Exit code, preflight.json and output of a pre-flight over all nodes of the cluster."""
    (folder / "cluster.yaml").write_text("gpus_per_node: 8\n" + LIMITS)
    script = folder / "job.sh"
    line = f"{sys.executable} -m sdlm_megatron.preflight --run-dir {folder}/run --nodes-needed {needed}"
    script.write_text(
        f"#!/bin/bash\ncd {REPO}\n{line} --cluster {folder}/cluster.yaml --config {config}\necho $? >{folder}/code\n"
    )
    size = [f"-N{len(cluster.nodes)}", "--gpus-per-node=8", "--export=ALL"]
    job = cluster.submit(
        *size, "-o", folder / "out.txt", script, env={**cluster.env, **ENV, "GLOO_SOCKET_IFNAME": "eth0"}
    )
    cluster.wait(job, 120)
    output = (folder / "out.txt").read_text()
    file = folder / "run" / "logs" / f"{job}-0" / "preflight.json"
    assert file.exists(), output
    return int((folder / "code").read_text()), json.loads(file.read_text()), output


def test_a_slow_link_is_named_and_the_others_are_enough(cluster, tmp_path: Path) -> None:
    slow, *good = cluster.nodes
    cluster.slow(slow, "40mbit")
    try:
        code, report, output = fly(cluster, tmp_path, needed=2, config="sdlm_3b_d4")
    finally:
        cluster.slow(slow)
    assert code == 0, output
    assert report["healthy"] == good
    assert list(report["bad"]) == [slow]
    for node in good:  # slow with both
        assert f"with {node} 0.00" in report["bad"][slow]
    assert list(read_bad_nodes(tmp_path / "run")) == [slow]
    assert f"once more with {good[0]}" in output or f"once more with {good[1]}" in output


def test_lost_gpu_full_disk_and_other_config_are_found(cluster, tmp_path: Path) -> None:
    lost, full, other = cluster.nodes
    config = tmp_path / "own.yaml"
    config.write_text("extends: sdlm_3b_d4\n")
    (tmp_path / "stale.yaml").write_text("extends: sdlm_3b_d4\noptimizer: {lr: 1.0e-4}\n")
    undo = [
        (lost, "mknod", "-m", "666", "/dev/nvidia7", "c", "1", "3"),
        (full, "umount", "/dev/shm"),
        (other, "umount", config),
    ]
    try:
        cluster.inside(lost, "rm", "/dev/nvidia7")
        cluster.inside(full, "mount", "-t", "tmpfs", "-o", "size=512k", "small", "/dev/shm")
        cluster.inside(other, "mount", "--bind", tmp_path / "stale.yaml", config)
        code, report, output = fly(cluster, tmp_path, needed=1, config=str(config))
    finally:
        for node, *command in undo:
            cluster.inside(node, *command, check=False)
    assert code == 3, output
    assert report["healthy"] == []
    assert report["bad"][lost] == "gpus: 7 of 8 GPUs (/dev/nvidia*)"
    assert report["bad"][full].startswith("shm: /dev/shm: a file of 1 MB cannot be written: full")
    assert report["bad"][other].startswith("config: ") and "on 2 nodes" in report["bad"][other]
    bad = read_bad_nodes(tmp_path / "run")
    assert set(bad) == set(cluster.nodes)
    assert "0 of 3 nodes are healthy, 1 are needed" in output
    assert (tmp_path / "run" / "logs").is_dir() and "7/8!" in output
