"""Environment of a process that only its node knows: gloo's network interface, and folders of compiled kernels."""

import os
import socket
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sdlm_megatron.errors import ConfigError

CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "CUDA_CACHE_PATH": "cuda",
}
"""Folders of compiled kernels. Most of them are in the home folder by default, which all nodes share and wait for."""
NCCL, GLOO = "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"


def set_local_environment() -> None:
    """Sets those variables that are not set: gloo takes NCCL's interface, and kernels are compiled on the own disk.

    Raises:
        ConfigError: no interface of this node fits, or the folder belongs to somebody else.
    """
    os.environ.update(cache_variables())
    if (pattern := os.environ.get(NCCL)) and not os.environ.get(GLOO):
        os.environ[GLOO] = choose_interface(pattern, network_interfaces())


def cache_variables() -> dict[str, str]:
    """CACHES in a folder of this user on this node; a variable that is set keeps its value."""
    folder = Path(tempfile.gettempdir()) / f"sdlm-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    # Everybody may write into /tmp, and what lies in these folders is executed.
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise ConfigError(
            f"{folder} on {socket.gethostname()} is not a folder that only this user can write",
            "the folder of compiled kernels",
            f"remove it, or set TMPDIR or {', '.join(CACHES)} in env of the cluster file",
        )
    return {name: os.environ.get(name) or str(folder / part) for name, part in CACHES.items()}


def network_interfaces() -> list[str]:
    """Names of this node's network interfaces that are up and have an IP address."""
    import psutil

    up = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name in up and up[name].isup and any(address.family in families for address in addresses)
    ]


def choose_interface(pattern: str, interfaces: Sequence[str]) -> str:
    """The first interface that NCCL_SOCKET_IFNAME means; gloo knows only exact names.

    Args:
        pattern: prefixes (eth,ib), exact names (=eth0), or either to be left out (^docker, ^=docker0).
        interfaces: names of this node's interfaces.
    """
    without = pattern.startswith("^")
    exact = pattern[without:].startswith("=")
    names = [name for name in pattern[without + exact :].split(",") if name]
    for interface in interfaces:
        listed = any(interface == name if exact else interface.startswith(name) for name in names)
        if listed != without and not (without and interface == "lo"):
            return interface
    raise ConfigError(
        f"{NCCL}={pattern} fits no network interface of {socket.gethostname()}, which has {', '.join(interfaces)}",
        "env of the cluster file",
        f"set {NCCL} to an interface that all nodes have, or {GLOO} to one for gloo",
    )
