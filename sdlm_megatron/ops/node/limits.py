"""Limits of the pre-flight (the section `preflight` of a cluster file), the result of one check, and the constants that
the batch node and the node program share. Nothing here needs torch."""

from dataclasses import dataclass

NOT_SHARED = 4  # exit code of the node program where the run folder is not the one that the batch node sees
CLOCK = "clock: "  # begins the line of the node program that holds the node's time, in seconds since 1970
CPU_RANKS = 2  # ranks of a node without GPUs in an all-reduce
MEASURE_SECONDS = 120.0  # time limit of one all-reduce measurement, including the start of its processes
MINIMUM_SPEEDS = {"nccl": (100.0, 20.0, 0.7), "gloo": (0.02, 0.02, 0.1)}
"""Defaults of node_gbs, network_gbs and slow_factor. Those of gloo are low: it is for machines without GPUs, where
whatever else runs there decides the speed."""


@dataclass
class Limits:
    """Limits of the pre-flight. The defaults suit nodes with 8 H100."""

    gpus: int | None = None
    """GPUs that a node must have; 0 skips all GPU checks. null: the cluster's gpus_per_node."""
    temperature: float = 80.0
    """Maximum temperature of an idle GPU, in degrees Celsius."""
    idle_memory_mib: float = 2000.0
    """Maximum memory in use on a GPU before the run starts, in MiB."""
    xid_hours: float = 24.0
    """Age up to which hardware Xids in the kernel log count, in hours."""
    run_disk_gb: float = 100.0
    """Minimum free space of the run folder, in GB."""
    local_disk_gb: float = 10.0
    """Minimum free space of checkpoint.local_dir on each node, in GB."""
    shm_gb: float = 1.0
    """Minimum free space of /dev/shm, in GB. NCCL and gloo share memory there."""
    write_mb: int = 32
    """Size of the file that is written, flushed and read back in each folder, in MB."""
    clock_seconds: float = 2.0
    """Maximum difference between a node's clock and the median of the nodes, in seconds."""
    node_gbs: float | None = None
    """Minimum bus bandwidth of an all-reduce inside a node, in GB/s. null: 100 with NCCL, 0.02 with gloo."""
    network_gbs: float | None = None
    """Minimum bus bandwidth of an all-reduce over two nodes, in GB/s. null: 20 with NCCL, 0.02 with gloo."""
    slow_factor: float | None = None
    """Minimum speed of a node or GPU as a fraction of the median. null: 0.7 with NCCL, 0.1 with gloo."""
    answer_seconds: float = 300.0
    """Time limit of each stage on a node, in seconds, measurements not included."""


@dataclass(frozen=True)
class Check:
    """Result of one check on one node."""

    name: str
    ok: bool | None  # none: skipped, for the reason in `why`
    value: str  # short text for the table
    why: str = ""  # reason of a failure, or of a skipped check
