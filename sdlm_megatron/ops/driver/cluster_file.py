"""What a cluster is like, apart from what is trained on it: slurm/clusters/NAME.yaml."""

from dataclasses import dataclass, field
from pathlib import Path

from sdlm_megatron.config.load import load_config
from sdlm_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
"""The repository."""
CLUSTERS = ROOT / "slurm" / "clusters"
FIELD_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # order of kernels that overlapped tensor parallelism needs on Hopper
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",  # memory of freed communication buffers comes back at once
    "NCCL_NVLS_ENABLE": "0",  # NVLink SHARP takes memory that a run at the limit does not have
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",  # TransformerEngine's norms leave room for communication kernels
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # the last collectives of each rank, written down when one hangs
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "OMP_NUM_THREADS": "1",
}
"""Set for training where neither the cluster file nor the submitting shell says otherwise."""


@dataclass
class Container:
    """Where the training processes run; the job's driver itself always runs on the host."""

    kind: str = "none"
    """none | pyxis (srun --container-image) | apptainer."""
    image: str = ""
    """pyxis: a registry's name or a .sqsh file; apptainer: a .sif file."""
    mounts: list[str] = field(default_factory=list)
    """HOST or HOST:INSIDE; the repository and the folders of the run, the data and the base are needed inside."""
    python: str = "python"
    """Python inside the image."""


@dataclass
class ClusterFile:
    """Settings of a cluster. What is empty or 0 is left to Slurm, or to the script's own #SBATCH lines."""

    account: str = ""
    """Slurm account."""
    partition: str = ""
    """Slurm partition."""
    qos: str = ""
    """Slurm quality of service."""
    constraint: str = ""
    """Node features that the job requires."""
    gpus_per_node: int = 8
    """Training processes a node; also asked of Slurm as --gpus-per-node."""
    cpus_per_task: int = 0
    """CPUs of a training process; 0: the node's, shared out evenly."""
    time: str = ""
    """Time limit, such as 2-00:00:00."""
    signal_seconds: int = 900
    """How long before the time limit training stops and saves."""
    spares: int = 0
    """Nodes in the allocation beyond those that train; they replace bad ones."""
    gpu: str = "h100"
    """For the planner: h100, h200, ..."""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch, such as --reservation=NAME."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the start of a job, such as `module load cuda`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the training: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, ..."""
    container: Container = field(default_factory=Container)
    """Container of the training processes."""
    preflight: dict[str, float | None] = field(default_factory=dict)
    """Limits of the pre-flight that differ from its defaults."""


def cluster_path(name: str) -> Path:
    """File of a cluster: a path, or NAME of slurm/clusters/NAME.yaml."""
    return Path(name) if Path(name).is_file() else CLUSTERS / f"{name}.yaml"


def load_cluster(name: str) -> ClusterFile:
    """Reads slurm/clusters/NAME.yaml, or a file of that path; ConfigError names what is wrong."""
    cluster = load_config(ClusterFile, name, presets=CLUSTERS)
    kind, image = cluster.container.kind, cluster.container.image
    if kind not in ("none", "pyxis", "apptainer"):
        raise ConfigError(f"container.kind is {kind!r}", f"cluster {name}", "one of none, pyxis, apptainer")
    if kind != "none" and not image:
        raise ConfigError(f"a {kind} container without an image", f"cluster {name}", "set container.image")
    for key, least in (("gpus_per_node", 1), ("spares", 0), ("signal_seconds", 0), ("cpus_per_task", 0)):
        if getattr(cluster, key) < least:
            raise ConfigError(f"{key} is {getattr(cluster, key)}", f"cluster {name}", f"give {least} or more")
    return cluster
