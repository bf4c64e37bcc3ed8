"""What a node must offer: the limits of the pre-flight, from a cluster file's section `preflight`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sdlm_megatron.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits of the pre-flight; the defaults are meant for nodes with 8 H100."""

    gpus: int = 8
    """GPUs a node must have; 0: none is expected, and what asks for them is skipped."""
    temperature: float = 80.0
    """Hottest idle GPU, degrees Celsius."""
    idle_memory_mib: float = 2000.0
    """Most memory a GPU may have in use before the run starts."""
    xid_hours: float = 24.0
    """How far back the kernel log is searched for Xids of broken hardware."""
    run_disk_gb: float = 100.0
    """Least free space of the run folder, GB."""
    local_disk_gb: float = 10.0
    """Least free space of each node-local folder, GB."""
    shm_gb: float = 1.0
    """Least free space of /dev/shm, GB (NCCL and gloo share memory there)."""
    write_mb: int = 32
    """Written, flushed and read back in each folder."""
    clock_seconds: float = 2.0
    """Most that a node's clock may differ from the batch node's."""
    node_gbs: float | None = None
    """Least bus bandwidth of an all-reduce inside a node, GB/s; null: 100 with NCCL, 0.02 with gloo."""
    network_gbs: float | None = None
    """Least bus bandwidth of an all-reduce over two nodes, GB/s; null: 20 with NCCL, 0.02 with gloo."""
    slow_factor: float | None = None
    """A node (GPU) slower than so much of the median node (GPU) is bad; null: 0.7 with NCCL, 0.1 with gloo."""
    answer_seconds: float = 300.0
    """A node that takes longer to start, to check itself or to measure once is bad."""


# Bus bandwidth in GB/s (inside a node, between nodes) and slow_factor. Gloo is for machines without GPUs, where
# whatever else runs there decides the speed.
FLOORS = {"nccl": (100.0, 20.0, 0.7), "gloo": (0.02, 0.02, 0.1)}


def limits_from(settings: Mapping[str, Any] | None, where: str) -> Limits:
    """Limits with a cluster file's values over the defaults.

    Raises:
        ConfigError: unknown name or a value that is no number >= 0.
    """
    known = {field.name: field.type for field in fields(Limits)}
    for name, value in (settings or {}).items():
        if name not in known:
            raise ConfigError(f"unknown limit {name}", f"{where}, preflight", f"known: {', '.join(sorted(known))}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        may_be_null = value is None and name in ("node_gbs", "network_gbs", "slow_factor")
        if not number and not may_be_null:
            raise ConfigError(f"preflight.{name} is {value!r}", where, "write a number of at least 0")
    return Limits(**{name: int(v) if known[name] is int else v for name, v in (settings or {}).items()})
