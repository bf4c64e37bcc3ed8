"""Cluster files: the settings of a cluster, independent of what is trained on it (slurm/clusters/NAME.yaml)."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from sdlm_megatron.config.load import load_config
from sdlm_megatron.config.validate import check_ranges
from sdlm_megatron.config.yaml_settings import shown
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.ops.node.limits import Limits

SCRIPTS = Path(__file__).resolve().parents[1] / "slurm"
"""The batch scripts: a link to slurm/ in a checkout, a folder of the package in an installation."""
CLUSTERS = SCRIPTS / "clusters"
CLUSTER_HELP = "cluster file: a path, or NAME of ./clusters/NAME.yaml or of the package's slurm/clusters/NAME.yaml"
PLANNED_GPUS = ("h100", "h200", "b200")  # DEVICES of the planner, which needs numpy
FIELD_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # kernel order that overlapped tensor parallelism needs on Hopper
    "TORCH_NCCL_HIGH_PRIORITY": "1",  # communication is not delayed behind the kernels that it overlaps with
    "NCCL_NVLS_ENABLE": "0",  # NVLink SHARP takes memory that a run at the limit does not have
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # less fragmentation of the GPU's memory
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",  # TransformerEngine's norms leave SMs to communication kernels
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # the last collectives of each rank, written when it hangs
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "OMP_NUM_THREADS": "1",  # many ranks share the CPUs of a node
}
"""Environment of training where neither the cluster file nor the submitting shell sets a variable."""


@dataclass
class Container:
    """Container of the training processes. The job's driver always runs on the host."""

    kind: str = "none"
    """none | pyxis (srun --container-image) | apptainer."""
    image: str = ""
    """pyxis: a registry's name or a .sqsh file; apptainer: a .sif file."""
    mounts: list[str] = field(default_factory=list)
    """HOST or HOST:INSIDE. The code and the folders of the run, the data and the base model are needed inside."""
    python: str = "python"
    """Python inside the image."""


@dataclass
class ClusterFile:
    """Settings of a cluster. An empty or zero value is left to Slurm, or to the script's own #SBATCH lines."""

    account: str = ""
    """Account of Slurm that is charged."""
    partition: str = ""
    """Partition to submit to."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Required node features."""
    gpus_per_node: int = 8
    """Training processes per node; also requested from Slurm as --gpus-per-node."""
    cpus_per_task: int = 0
    """CPUs of a training process. 0: the node's CPUs, divided evenly."""
    time: str = ""
    """Time limit, such as 2-00:00:00."""
    signal_seconds: int = 900
    """Seconds before the time limit at which training stops and saves."""
    spares: int = 0
    """Nodes in the allocation beyond those that train; they replace bad ones."""
    gpu: str = "h100"
    """GPU model for the planner: h100, h200 or b200; for another one, a dry run leaves the planner out."""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch, such as --reservation=NAME."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the start of a job, such as `module load cuda`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the training: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, ..."""
    container: Container = field(default_factory=Container)
    """Container of the training processes."""
    preflight: Limits = field(default_factory=Limits)
    """Limits of the pre-flight."""

    @property
    def expected_gpus(self) -> int:
        """GPUs that the pre-flight expects on each node."""
        return self.gpus_per_node if self.preflight.gpus is None else self.preflight.gpus


RANGES = {
    "gpus_per_node": "[1, 1024]",
    "cpus_per_task": "[0, 100000]",
    "signal_seconds": "[0, 1e6]",
    "spares": "[0, 100000]",
    "preflight.gpus": "[0, 1024]",
    "preflight.temperature": "[0, 1000]",
    "preflight.idle_memory_mib": "[0, 1e9]",
    "preflight.xid_hours": "[0, 1e6]",
    "preflight.run_disk_gb": "[0, 1e9]",
    "preflight.local_disk_gb": "[0, 1e9]",
    "preflight.shm_gb": "[0, 1e9]",
    "preflight.write_mb": "[0, 1e6]",
    "preflight.clock_seconds": "[0, 1e6]",
    "preflight.node_gbs": "[0, 1e6]",
    "preflight.network_gbs": "[0, 1e6]",
    "preflight.slow_factor": "[0, 1]",
    "preflight.answer_seconds": "(0, 1e6]",
}
"""Values that each number may have, as in config/validate.py."""


_NAMES = ("account", "partition", "qos", "constraint")
"""Settings that contain no white space."""


def seconds_of(limit: str, where: str = "") -> float:
    """Seconds of a time limit of Slurm: minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:s]].

    Infinity for 0, -1, INFINITE and UNLIMITED. Raises ConfigError for any other text.
    """
    if limit.upper() in ("-1", "INFINITE", "UNLIMITED"):
        return math.inf
    if not re.fullmatch(r"(\d+-\d+|\d+)(:\d+){0,2}", limit, re.ASCII):
        fix = "MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]] or UNLIMITED"
        raise ConfigError(f"the time limit is {shown(limit)!r}, no time of Slurm", where, fix)
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return (
        86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    ) or math.inf


def cluster_path(name: str) -> Path:
    """File of a cluster: a path, or NAME of ./clusters/NAME.yaml, or of the package's own clusters."""
    own = Path("clusters") / f"{name}.yaml"
    return next((path for path in (Path(name), own) if path.is_file()), CLUSTERS / f"{name}.yaml")


def load_cluster(name: str) -> ClusterFile:
    """Reads a cluster file.

    Raises:
        ConfigError: an unknown key, a wrong type, or a value that cannot be meant.
    """
    if not name:
        raise ConfigError("the name of the cluster is empty", "--cluster", "name one, or leave --cluster out")
    path, where = cluster_path(name), f"cluster {name}"
    cluster = load_config(ClusterFile, str(path.absolute()) if path.is_file() else name, presets=CLUSTERS)
    kind, image = cluster.container.kind, cluster.container.image
    if kind not in ("none", "pyxis", "apptainer"):
        raise ConfigError(f"container.kind is {kind!r}", where, "one of none, pyxis, apptainer")
    if kind != "none" and not image:
        raise ConfigError(f"a {kind} container without an image", where, "set container.image")
    for key in _NAMES:
        if not re.fullmatch(r"[^\s\x00-\x1f\x7f]*", word := getattr(cluster, key)):
            raise ConfigError(f"{key} is {shown(word)!r}: Slurm reads no white space here", where, "remove it")
    for option in cluster.sbatch:
        if not re.fullmatch(r"-[^\n\0]+", option):
            what = f"sbatch has {shown(option)!r}, which sbatch would take for the script"
            raise ConfigError(what, where, "write one --name=value an entry")
        if (key := option[2:].partition("=")[0]) in ("time", *_NAMES):
            raise ConfigError(f"sbatch has {shown(option)!r}, and {key} is a setting of its own", where, f"set {key}")
    seconds_of(cluster.time or "0", where)
    for name in cluster.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ConfigError(f"env: {name!r} is no name of a variable", where, "use letters, digits and _")
    check_ranges(cluster, RANGES, where=where)
    return cluster
