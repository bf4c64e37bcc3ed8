"""Checks this machine's environment: each line says ok, or what is missing and how to fix it.

Exit code 0: training on the CPU is possible. 1: something that is always needed is broken (marked FAIL). Lines marked
with -- only limit what can be used here, such as GPUs or Slurm.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement

import sdlm_megatron
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import run_cli

DISTRIBUTION = "sdlm-megatron"
OLDEST_PYTHON = (3, 11)
LOW_DISK_GB = 20
"""A 0.5B checkpoint with optimizer state takes 7 GB, and two are kept."""
SMI_SECONDS = 8
"""nvidia-smi hangs where a GPU has fallen off the bus."""
MARKS = {"ok": "ok", "limited": "--", "broken": "FAIL"}


@dataclass(frozen=True)
class Diagnosis:
    """Result of one check."""

    name: str
    state: str
    """ok | limited (something optional is missing) | broken (something needed does not work)."""
    detail: str
    fix: str = ""


def _python() -> Iterator[Diagnosis]:
    wanted = ".".join(map(str, OLDEST_PYTHON))
    state = "ok" if sys.version_info >= OLDEST_PYTHON else "broken"
    yield Diagnosis("python", state, f"{platform.python_version()}, {sys.executable}", f"install Python {wanted}")
    where = Path(sdlm_megatron.__file__).parent
    yield Diagnosis("sdlm_megatron", "ok", f"{sdlm_megatron.__version__}, {where}")


def _requirements() -> Iterator[Diagnosis]:
    """Versions of the packages against the ranges in the installed distribution's metadata."""
    try:
        listed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        detail = f"{DISTRIBUTION} is not installed: the packages' versions were not checked"
        yield Diagnosis("packages", "limited", detail, "pip install .   in the checkout")
        return
    requirements = [Requirement(line) for line in listed if "extra ==" not in line]
    wrong = []
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        fits = bool(version) and requirement.specifier.contains(version, prereleases=True)
        if requirement.name == "megatron-core":
            detail = f"{version or 'not installed'}, supported: {requirement.specifier}"
            yield Diagnosis("megatron-core", "ok" if fits else "broken", detail, f"pip install '{requirement}'")
        elif not fits:
            wrong.append((requirement, version or "not installed"))
    for requirement, version in wrong:
        detail = f"{version}, supported: {requirement.specifier}"
        yield Diagnosis(requirement.name, "broken", detail, f"pip install '{requirement}'")
    if not wrong:
        yield Diagnosis("packages", "ok", f"{len(requirements)} required packages in their supported ranges")


def _gpus() -> Iterator[Diagnosis]:
    """torch, the driver, the GPUs, and the libraries that need them."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Diagnosis("torch", "broken", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    cuda = torch.version.cuda
    yield Diagnosis("torch", "ok", f"{torch.__version__}, {f'built for CUDA {cuda}' if cuda else 'built without CUDA'}")
    driver = _driver()
    yield driver
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(len(names)))
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
        yield Diagnosis("GPUs", "ok", f"{kinds}, {memory / 2**30:.0f} GiB each")
    elif driver.state == "ok":
        detail = "there is a driver, but torch cannot use a GPU"
        yield Diagnosis("GPUs", "limited", detail, "install a torch build for a CUDA version that the driver supports")
    else:
        yield Diagnosis("GPUs", "limited", "none; training runs on the CPU", "use a machine with an NVIDIA GPU")
    yield from _gpu_libraries()
    yield from _bf16()


def _driver() -> Diagnosis:
    fix = "install NVIDIA's driver to train on GPUs"
    if not shutil.which("nvidia-smi"):
        return Diagnosis("NVIDIA driver", "limited", "nvidia-smi is not installed", fix)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Diagnosis("NVIDIA driver", "limited", f"nvidia-smi failed: {error}", "check `dmesg` for GPU errors")
    if done.returncode or not done.stdout.strip():
        return Diagnosis("NVIDIA driver", "limited", (done.stdout + done.stderr).strip() or "no GPU", fix)
    return Diagnosis("NVIDIA driver", "ok", done.stdout.split()[0])


def _gpu_libraries() -> Iterator[Diagnosis]:
    from sdlm_megatron.model.packages import find_packages

    packages = find_packages()
    for name, package, fix in (
        ("TransformerEngine", packages.transformer_engine, f"pip install '{DISTRIBUTION}[gpu]' on a GPU machine"),
        ("Apex", packages.apex, "optional; build it from github.com/NVIDIA/apex against this torch"),
    ):
        if package.version:
            yield Diagnosis(name, "ok", package.version)
        else:
            yield Diagnosis(name, "limited", f"not used: {package.problem}", fix)


def _bf16() -> Iterator[Diagnosis]:
    from sdlm_megatron.bf16 import bf16_cost, slow_bf16

    slow = slow_bf16()
    if slow:
        yield Diagnosis("bf16", "limited", slow, "train with --train.precision=fp32 on this CPU")
    else:
        cost = bf16_cost()
        yield Diagnosis("bf16", "ok", f"{cost:.2f} times the CPU time of fp32" if cost else "computed on the GPU")


def _compiler() -> Iterator[Diagnosis]:
    """Triton and torch.compile build C sources at run time; on a CPU nothing of a training run does."""
    missing = [f"no {name}" for name in ("gcc", "g++") if not shutil.which(name)]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        missing.append(f"no {header}")
    if missing:
        fix = "apt install gcc g++ python3-dev"
        yield Diagnosis("compiler", "limited", f"{', '.join(missing)}: kernels for GPUs cannot be compiled", fix)
    else:
        yield Diagnosis("compiler", "ok", f"{shutil.which('gcc')}, {shutil.which('g++')}, Python.h")


def _folders() -> Iterator[Diagnosis]:
    """Write access and free space of the folders that the commands use when nothing else is configured."""
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    for name, folder, needed, fix in (
        ("temporary files", Path(tempfile.gettempdir()), True, "set TMPDIR to a folder that can be written"),
        ("current folder", Path.cwd(), False, "change to another folder, or give absolute output paths"),
        ("cache", cache.expanduser(), False, "set HF_HOME to a folder that can be written"),
    ):
        error = _write_error(folder)
        if error:
            yield Diagnosis(name, "broken" if needed else "limited", f"{folder} cannot be written: {error}", fix)
            continue
        free = shutil.disk_usage(_existing(folder)).free / 1e9
        state, hint = ("ok", "") if free >= LOW_DISK_GB else ("limited", "free space before training")
        yield Diagnosis(name, state, f"{folder}: writable, {free:,.0f} GB free", hint)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _write_error(folder: Path) -> str:
    """Why no file can be created in `folder`, or in the nearest existing folder above it; "" if one can."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _slurm() -> Iterator[Diagnosis]:
    sbatch = shutil.which("sbatch")
    detail = sbatch or "sbatch is not installed; needed only by `sdlm submit`"
    yield Diagnosis("Slurm", "ok" if sbatch else "limited", detail, "" if sbatch else "run it on a login node")


CHECKS: tuple[Callable[[], Iterator[Diagnosis]], ...] = (_python, _requirements, _gpus, _compiler, _folders, _slurm)


def diagnose() -> list[Diagnosis]:
    """Runs all checks."""
    return [result for check in CHECKS for result in check()]


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm doctor", __doc__, example="sdlm doctor")
    parser.add_argument("--json", action="store_true", help="print one JSON object with a list of checks")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    results = diagnose()
    healthy = all(result.state != "broken" for result in results)
    if args.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(result) for result in results]}, indent=1))
    else:
        for result in results:
            text = textwrap.shorten(result.detail, 300)
            print(f"{MARKS[result.state]:5} {result.name:18} {text}")
            if result.state != "ok":
                print(f"{'':24} fix: {result.fix}")
        print(f"\ntraining is {'possible' if healthy else 'not possible: see the lines marked FAIL'}")
    if not healthy:
        raise SystemExit(1)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
