"""Command lines of a job: launchers, containers, environment; and reading cluster files."""

import os
from pathlib import Path

import pytest

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.attempt import adopt_slurm_ranks
from sdlm_megatron.ops.driver.cluster_file import CLUSTERS, ClusterFile, Container, load_cluster, seconds_of
from sdlm_megatron.ops.driver.launch import attempt_environment, node_address, training_command, with_setup
from sdlm_megatron.ops.driver.slurm_commands import SlurmJob

NODES = ["n1", "n2"]


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "96")


def line(cluster: ClusterFile, launcher: str, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    return training_command(cluster, launcher, NODES, tmp_path, "7-0-1", ["--config", "tiny"])


def test_srun_starts_one_process_per_gpu(tmp_path: Path) -> None:
    command, extra = line(ClusterFile(), "srun", tmp_path)
    assert command[0] == "srun"
    assert {"--ntasks=16", "--ntasks-per-node=8", "--nodelist=n1,n2", "--cpus-per-task=12"} <= set(command)
    assert f"--output={tmp_path}/logs/7-0-1/rank-%5t.log" in command
    assert command[-4:] == ["-m", "sdlm_megatron.train", "--config", "tiny"]
    assert extra["SDLM_LAUNCH"] == "srun"


def test_torchrun_runs_once_per_node(tmp_path: Path) -> None:
    command, extra = line(ClusterFile(), "torchrun", tmp_path)
    assert {"--ntasks=2", "--ntasks-per-node=1", "--nproc-per-node=8", "--cpus-per-task=96"} <= set(command)
    assert command.count("bash") == 2
    assert "SDLM_LAUNCH" not in extra


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_containers_wrap_the_rank_command(launcher: str, tmp_path: Path) -> None:
    options = {"image": "image.sif", "mounts": ["/a", "/b:/c"], "python": "python3.12"}
    pyxis, _ = line(ClusterFile(container=Container("pyxis", **options)), launcher, tmp_path)
    assert "--container-image=image.sif" in pyxis
    assert "--container-mounts=/a,/b:/c" in pyxis
    assert "python3.12" in pyxis
    apptainer, _ = line(ClusterFile(container=Container("apptainer", **options)), launcher, tmp_path)
    start = apptainer.index("apptainer")
    assert apptainer[start : start + 3] == ["apptainer", "exec", "--nv"]
    after_image = apptainer[apptainer.index("image.sif") + 1]
    assert after_image == ("python3.12" if launcher == "srun" else "bash")


def test_environment_precedence_cluster_file_shell_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    cluster = ClusterFile(env={"NCCL_SOCKET_IFNAME": "bond0"})
    environment = attempt_environment(cluster, SlurmJob("7", 0, NODES), NODES, Path("run"), "7-0-1")
    assert environment["NCCL_NVLS_ENABLE"] == "1"
    assert environment["NCCL_SOCKET_IFNAME"] == "bond0"
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == environment["TORCH_NCCL_HIGH_PRIORITY"] == "1"
    assert "TORCH_NCCL_AVOID_RECORD_STREAMS" not in environment  # deprecated
    assert (environment["MASTER_ADDR"], environment["SDLM_ATTEMPT"]) == ("n1", "7-0-1")
    again = attempt_environment(cluster, SlurmJob("7", 0, NODES), NODES, Path("run"), "7-0-2")
    assert environment["MASTER_PORT"] != again["MASTER_PORT"]


def test_setup_lines_come_first() -> None:
    assert with_setup(ClusterFile(), ["srun", "x"]) == ["srun", "x"]
    script = with_setup(ClusterFile(setup=["module load cuda"]), ["srun", "x"])[2]
    assert script.splitlines()[1:] == ["module load cuda", 'exec "$@"']


def test_rank_environment_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "none")
    for name, value in (("PROCID", "9"), ("LOCALID", "1"), ("NTASKS", "16")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    adopt_slurm_ranks()  # torchrun inside a job: its ranks take precedence
    assert os.environ["RANK"] == "none"
    monkeypatch.setenv("SDLM_LAUNCH", "srun")
    adopt_slurm_ranks()
    assert [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["9", "1", "16"]
    monkeypatch.delenv("SLURM_LOCALID")
    with pytest.raises(ConfigError, match="SDLM_LAUNCH=srun without SLURM_LOCALID"):
        adopt_slurm_ranks()


@pytest.mark.parametrize("file", sorted(CLUSTERS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_cluster_files_load(file: Path) -> None:
    assert load_cluster(file.stem).gpus_per_node == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: x", "did you mean partition"),
        ("container: {kind: docker}", "one of none, pyxis, apptainer"),
        ("container: {kind: pyxis}", "without an image"),
        ("gpus_per_node: 0", "gpus_per_node is 0"),
        ("time: tomorrow", "the time limit is 'tomorrow', no time of Slurm"),
        ("time: 1-12:30:45:10", "no time of Slurm"),
        ('partition: "a b"', "partition is 'a b': Slurm reads no white"),
        ('qos: "a\\nb"', "qos is .*: Slurm reads no white"),
        ("sbatch: [reservation=x]", "'reservation=x', which sbatch would take for the script"),
        ("sbatch: ['--time=1:00:00']", "time is a setting of its own"),
    ],
)
def test_errors_in_a_cluster_file_are_reported(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_cluster(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("60", 3600),
        ("60:30", 3630),
        ("01:00:05", 3605),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("2-00:00:01", 172801),
        ("UNLIMITED", float("inf")),
        ("infinite", float("inf")),
        ("0", float("inf")),
    ],
)
def test_slurm_time_limits_are_parsed(limit: str, seconds: float) -> None:
    assert seconds_of(limit) == seconds


def test_address_of_a_node() -> None:
    assert node_address("192.0.2.7") == "192.0.2.7"
    # An address of this node alone, or an unknown name, stays a name.
    assert [node_address(name) for name in ("localhost", "127.0.1.1", "no-such-node.invalid")] == [
        "localhost",
        "127.0.1.1",
        "no-such-node.invalid",
    ]
