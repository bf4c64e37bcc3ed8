"""Checks of a node that need nothing from other nodes: GPUs, disks, and hashes of code, configuration and data."""

import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import sdlm_megatron
from sdlm_megatron.config.load import PRESETS, expand_variables, load_config, to_yaml
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.files import fsync
from sdlm_megatron.ops.node.gpu_checks import gpu_checks
from sdlm_megatron.ops.node.limits import Check, Limits
from sdlm_megatron.ops.run_facts import package_versions


def check_node(
    limits: Limits, run_dir: str, config: str, overrides: Sequence[str]
) -> tuple[list[Check], dict[str, str]]:
    """All checks of this node, and the values that must be the same on every node.

    Args:
        limits: limits of the cluster file.
        run_dir: folder of the run.
        config: file or preset of the training; "": no configuration is compared.
        overrides: settings `--a.b=c` of the training.
    """
    checks, gpu_kinds = gpu_checks(limits)
    shared_values = hash_environment(config, overrides)
    # Only torch with CUDA brings Triton, which compiles a small extension of Python before its first kernel.
    if limits.gpus and find_spec("triton"):
        checks.append(compiler_check())
    if gpu_kinds:
        shared_values["gpu kind"] = gpu_kinds
    checks.append(check_disk("run disk", run_dir, limits.run_disk_gb, limits.write_mb))
    local = load_config(RunConfig, config, overrides, PRESETS).checkpoint.local_dir if config else ""
    if local:
        try:
            checks.append(check_disk("local disk", expand_variables(local), limits.local_disk_gb, limits.write_mb))
        except ConfigError as error:
            checks.append(Check("local disk", False, "no folder", error.what))
    if os.path.isdir("/dev/shm"):
        checks.append(check_disk("shm", "/dev/shm", limits.shm_gb, 1))
    return checks, shared_values


def compiler_check() -> Check:
    """Whether an extension of Python can be compiled, in the way in which Triton does it."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    fix = "install gcc, the C library's headers and Python's (python3-dev)"
    if not compiler:
        return Check("compiler", False, "none", f"no C compiler (CC, gcc or clang): {fix}")
    with tempfile.TemporaryDirectory() as folder:
        source, include = Path(folder) / "x.c", sysconfig.get_paths()["include"]
        source.write_text("#include <Python.h>\n#include <stdlib.h>\n", encoding="utf-8")
        line = [compiler, str(source), "-shared", "-fPIC", f"-I{include}", "-o", f"{folder}/x.so"]
        try:
            done = subprocess.run(line, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
            errors = [text for text in done.stderr.splitlines() if "error" in text] or done.stderr.splitlines()
            problem = f"{(errors or [f'exit code {done.returncode}'])[0][:200]}" if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    name = Path(compiler).name
    why = f"{compiler} cannot compile an extension of Python: {problem}: {fix}" if problem else ""
    return Check("compiler", not problem, name, why)


def hash_environment(config: str, overrides: Sequence[str]) -> dict[str, str]:
    """Hashes of the code, the package versions, the configuration as resolved on this node, and the data it names."""
    hashes = {"code": hash_code(), "packages": hash_versions()}
    if config:
        resolved = load_config(RunConfig, config, overrides, PRESETS)
        hashes["config"] = _hash(to_yaml(resolved).encode())
        start = resolved.checkpoint
        files = [Path(resolved.data.path) / "manifest.json", Path(start.base) / "config.json"]
        files += [Path(start.adapter) / "adapter_config.json"] if start.adapter else []
        hashes["data"] = _hash(b"\0".join(map(_read_or_error, files)))
    return hashes


def check_disk(name: str, folder: str, minimum_gb: float, write_mb: int) -> Check:
    """Free space of a folder, and whether a file that is written and flushed there reads back unchanged."""
    try:
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return Check(name, False, "no folder", f"{folder}: {error.strerror}")
    value = f"{free:.0f} GB" if free >= 10 else f"{free:.2f} GB"
    inodes = os.statvfs(folder)
    if free < minimum_gb:
        return Check(name, False, value, f"{folder} has {free:.2f} GB free, the minimum is {minimum_gb:g} GB")
    if inodes.f_files and not inodes.f_favail:  # file systems without inodes report 0 in both
        return Check(name, False, value, f"{folder} has no free inode")
    problem = _write_test(Path(folder), write_mb)
    return Check(name, not problem, value, problem)


def _write_test(folder: Path, megabytes: int) -> str:
    """Writes a file and reads it back; returns the problem, or ""."""
    file = folder / f".preflight-{platform.node()}-{uuid.uuid4().hex[:8]}"
    block = os.urandom(1 << 20)  # random, so that a file system cannot compress it away
    try:
        with open(file, "wb") as out:
            for _ in range(megabytes):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        fsync(folder)
        with open(file, "rb") as back:
            same = all(back.read(1 << 20) == block for _ in range(megabytes))
        return "" if same else f"{folder}: a file reads back with other content than was written"
    except OSError as error:
        reason = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        return f"{folder}: cannot write a file of {megabytes} MB: {reason}"
    finally:
        file.unlink(missing_ok=True)


def hash_code() -> str:
    """Hash over every Python and YAML file of this package, which tells a stale copy from the current one."""
    root = Path(sdlm_megatron.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def hash_versions() -> str:
    """Hash over the versions of Python and of the libraries that this package computes with."""
    return _hash(repr((platform.python_version(), platform.machine(), package_versions())).encode())


def _read_or_error(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        return str(error.strerror).encode()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
