"""Pre-flight on a real Slurm: node faults are detected and recorded, and the other nodes train."""

import json
import sys
from pathlib import Path

from helpers import ENV, REPO, make_dataset, make_hf

from sdlm_megatron.ops.attempt import read_events
from sdlm_megatron.ops.driver.verdict import read_bad_nodes

ENVIRONMENT = "env: {GLOO_SOCKET_IFNAME: eth0}\n"
CLUSTER = """
preflight: {gpus: 8, run_disk_gb: 0.1, local_disk_gb: 0.1, shm_gb: 0, write_mb: 2, answer_seconds: 60}
"""
SMALL = {
    "model.num_layers": 0,  # read from the base
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.virtual_pipeline": 1,
    "parallel.sequence": "false",
    "train.steps": 2,
    "train.global_batch": 4,
    "train.global_batch_unit": "rows",
    "checkpoint.save_every": 0,
    "observe.tensorboard": "false",
    "observe.sample_every": 0,
}


def test_spare_replaces_a_node_with_a_slow_link(cluster, tmp_path: Path) -> None:
    """The real job script: the first node of the allocation sends slowly, so the other two train."""
    slow, *good = cluster.nodes
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (tmp_path / "small.yaml").write_text("gpus_per_node: 1\n" + ENVIRONMENT + CLUSTER)
    environment = {
        **cluster.env,
        **ENV,
        "DATA": str(make_dataset(tmp_path / "data")),
        "BASE": str(make_hf(tmp_path / "hf")),
        "RUN_DIR": str(run),
        "PYTHON": sys.executable,
    }
    script = [REPO / "slurm" / "train_32b_d4.sh", "--cluster", tmp_path / "small.yaml", "--spares", "1", "--"]
    options = ["-N3", "--mem=10000", "-o", tmp_path / "out.txt"]
    cluster.slow(slow, "40mbit")
    try:
        job = cluster.submit(*options, *script, *(f"--{k}={v}" for k, v in SMALL.items()), env=environment, cwd=REPO)
        state = cluster.wait(job, 200)
    finally:
        cluster.slow(slow)
    output = (tmp_path / "out.txt").read_text()
    assert state == "COMPLETED", output
    report = json.loads((run / "logs" / f"{job}-0" / "preflight.json").read_text())
    assert report["ok"] and report["healthy"] == good
    assert list(report["bad"]) == list(report["blamed"]) == [slow]
    for node in good:  # slow in the measurements with both
        assert f"with {node} 0.00" in report["bad"][slow]
    assert f"{slow} is slow; measuring it again with" in output
    events = {event["kind"]: event for event in read_events(run)}
    assert list(events["preflight"]["bad"]) == [slow]
    assert events["train_start"]["nodes"] == good
    assert events["finished"]["step"] == 2
    assert list(read_bad_nodes(run)) == [slow]


def test_lost_gpu_full_disk_and_other_config_are_detected(cluster, tmp_path: Path) -> None:
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
        code, report, output = run_preflight(cluster, tmp_path, needed=1, config=str(config))
    finally:
        for node, *command in undo:
            cluster.inside(node, *command, check=False)
    assert code == 3, output
    assert report["healthy"] == []
    assert report["bad"][lost] == "gpus: 7 of 8 GPUs (/dev/nvidia*)"
    assert report["bad"][full].startswith("shm: /dev/shm: cannot write a file of 1 MB: full")
    assert report["bad"][other].startswith("config: ") and "on 2 nodes" in report["bad"][other]
    assert set(read_bad_nodes(tmp_path / "run")) == set(cluster.nodes)
    assert "0 of 3 nodes are healthy, 1 are needed" in output and "7/8!" in output


def test_host_names_that_resolve_to_loopback_are_detected(cluster, tmp_path: Path) -> None:
    """As on many installations of Debian: each node is 127.0.1.1 to itself. gloo needs an interface, that of NCCL."""
    nodes, hosts = cluster.nodes[:2], (cluster.lab / "hosts").read_text().splitlines()
    try:
        for node in nodes:
            own = [f"127.0.1.1 {node}" if line.split()[1] == node else line for line in hosts]
            (tmp_path / node).write_text("\n".join(own) + "\n")
            cluster.inside(node, "mount", "--bind", tmp_path / node, "/etc/hosts")
        arguments = {"needed": 2, "config": "sdlm_3b_d4", "nodes": 2}
        code, report, output = run_preflight(cluster, tmp_path, **arguments, env="")
        assert code == 3, output
        assert f"gloo cannot connect the nodes over the address of {nodes[0]}, 127.0.1.1: " in output
        assert "set NCCL_SOCKET_IFNAME (which gloo follows) or GLOO_SOCKET_IFNAME" in report["bad"][nodes[1]]
        prefix = "env: {NCCL_SOCKET_IFNAME: et}\n"
        code, report, output = run_preflight(cluster, tmp_path, **arguments, env=prefix)
        assert code == 0 and "gloo on eth0" in output, output
        code, report, output = run_preflight(cluster, tmp_path, **arguments, env="env: {NCCL_SOCKET_IFNAME: =et}\n")
        assert code == 3 and "NCCL_SOCKET_IFNAME==et fits no network interface of" in report["bad"][nodes[0]], output
    finally:
        for node in nodes:
            cluster.inside(node, "umount", "/etc/hosts", check=False)


def run_preflight(
    cluster, folder: Path, *, needed: int, config: str, nodes: int = 3, env: str = ENVIRONMENT
) -> tuple[int, dict, str]:
    """Exit code, preflight.json and output of a pre-flight over nodes of the cluster."""
    (folder / "cluster.yaml").write_text("gpus_per_node: 8\n" + env + CLUSTER)
    line = f"{sys.executable} -m sdlm_megatron.cli preflight --run-dir {folder}/run --nodes-needed {needed}"
    line += f" --cluster {folder}/cluster.yaml --config {config}"
    (folder / "job.sh").write_text(f"#!/bin/bash\ncd {REPO}\n{line}\necho $? >{folder}/code\n")
    options = [f"-N{nodes}", "--gpus-per-node=8", "-o", folder / "out.txt"]
    job = cluster.submit(*options, folder / "job.sh", env={**cluster.env, **ENV})
    cluster.wait(job, 180)
    output = (folder / "out.txt").read_text()
    file = folder / "run" / "logs" / f"{job}-0" / "preflight.json"
    assert file.exists(), output
    return int((folder / "code").read_text()), json.loads(file.read_text()), output
