"""What a node finds out about itself before a run: GPUs, disks, code, configuration, data."""

import errno
import hashlib
import os
import platform
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import sdlm_megatron
from sdlm_megatron.config.load import PRESETS, load_config, to_yaml
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.files import fsync
from sdlm_megatron.ops.driver.gpu_checks import gpu_checks
from sdlm_megatron.ops.driver.limits import Limits
from sdlm_megatron.ops.driver.verdict import Check
from sdlm_megatron.ops.run_facts import versions

GB = 1e9


def check_node(
    limits: Limits, run_dir: str, config: str, overrides: Sequence[str], token_file: str, token: str
) -> tuple[list[Check], dict[str, str]]:
    """All checks of this node, and the values that must be the same on every node.

    Args:
        run_dir: folder of the run.
        config: file or preset of the training; "": none is compared.
        overrides: `--a.b=c` of the training.
        token_file: below run_dir, just written on the batch node.
        token: its content.
    """
    checks, kinds = gpu_checks(limits)
    same = same_values(config, overrides) | ({"gpu kind": kinds} if kinds else {})
    checks.append(run_disk_check(run_dir, token_file, token, limits))
    local = load_config(RunConfig, config, overrides, PRESETS).checkpoint.local_dir if config else ""
    if local:
        checks.append(disk_check("local disk", os.path.expandvars(local), limits.local_disk_gb, limits.write_mb))
    if os.path.isdir("/dev/shm"):
        checks.append(disk_check("shm", "/dev/shm", limits.shm_gb, 1))
    return checks, same


def same_values(config: str, overrides: Sequence[str]) -> dict[str, str]:
    """Hashes of code, package versions, the configuration as training will read it here, and the data it names."""
    found = {"code": code_hash(), "packages": packages()}
    if config:
        resolved = load_config(RunConfig, config, overrides, PRESETS)
        found |= {"config": _hash(to_yaml(resolved).encode()), "data": data_hash(resolved)}
    return found


def run_disk_check(run_dir: str, token_file: str, token: str, limits: Limits) -> Check:
    """`disk_check` of the run folder, and whether it is the one that the batch node sees."""
    try:
        same = Path(token_file).read_text() == token
    except OSError:
        same = False
    if not same:
        return Check("run disk", False, "not shared", f"{run_dir} is not the folder that the batch node sees")
    return disk_check("run disk", run_dir, limits.run_disk_gb, limits.write_mb)


def disk_check(name: str, folder: str, least_gb: float, write_mb: int) -> Check:
    """Free space of a folder, and whether a file written, flushed and read again there is the same."""
    try:
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free / GB
    except OSError as error:
        return Check(name, False, "no folder", f"{folder}: {error.strerror}")
    value = f"{free:.0f} GB" if free >= 10 else f"{free:.2f} GB"
    inodes = os.statvfs(folder)
    if free < least_gb:
        return Check(name, False, value, f"{folder} has {free:.2f} GB free, {least_gb:g} are needed")
    if inodes.f_files and not inodes.f_favail:
        return Check(name, False, value, f"{folder} has no inode left")
    problem = _write_test(Path(folder), write_mb)
    return Check(name, not problem, value, problem)


def _write_test(folder: Path, megabytes: int) -> str:
    """ "" or what went wrong."""
    file = folder / f".preflight-{platform.node()}-{uuid.uuid4().hex[:8]}"
    block = os.urandom(1 << 20)
    try:
        with open(file, "wb") as out:
            for _ in range(megabytes):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        fsync(folder)
        with open(file, "rb") as back:
            same = all(back.read(1 << 20) == block for _ in range(megabytes))
        return "" if same else f"{folder}: what was written reads differently"
    except OSError as error:
        said = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        return f"{folder}: a file of {megabytes} MB cannot be written: {said}"
    finally:
        file.unlink(missing_ok=True)


def code_hash() -> str:
    """Of every Python and YAML file of this package, by its path in it: tells a stale copy from a current one."""
    root = Path(sdlm_megatron.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def packages() -> str:
    """Hash of the versions of Python, this package (with its git commit) and those it computes with."""
    return _hash(repr((platform.python_version(), platform.machine(), versions())).encode())


def data_hash(config: RunConfig) -> str:
    """Of the dataset's manifest and the base model's config.json as this node sees them."""
    manifest, base = _content(config.data.path, "manifest.json"), _content(config.checkpoint.base, "config.json")
    return _hash(manifest + b"\0" + base)


def _content(folder: str, name: str) -> bytes:
    try:
        return (Path(folder) / name).read_bytes()
    except OSError as error:
        return str(error.strerror).encode()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
