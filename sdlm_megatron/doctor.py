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


def _result(name: str, detail: str, problem: str = "", fix: str = "", *, needed: bool = False) -> Diagnosis:
    """`detail` if there is no problem, else the problem and its fix."""
    if not problem:
        return Diagnosis(name, "ok", detail)
    return Diagnosis(name, "broken" if needed else "limited", problem, fix)


def _python() -> Iterator[Diagnosis]:
    version, wanted = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    problem = "" if sys.version_info >= OLDEST_PYTHON else f"{version}, older than {wanted}"
    yield _result("python", f"{version}, {sys.executable}", problem, f"install Python {wanted}", needed=True)
    yield _result("sdlm_megatron", f"{sdlm_megatron.__version__}, {Path(sdlm_megatron.__file__).parent}")


def _requirements() -> Iterator[Diagnosis]:
    """Versions of the packages against the ranges in the installed distribution's metadata."""
    try:
        listed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        problem = f"{DISTRIBUTION} is not installed, so the versions of its packages were not checked"
        yield _result("packages", "", problem, "pip install .   in the checkout")
        return
    results = [_version(Requirement(line)) for line in listed if "extra ==" not in line]
    yield from (result for result in results if result.state != "ok" or result.name == "megatron-core")
    if all(result.state == "ok" for result in results):
        yield _result("packages", f"{len(results)} required packages in their supported ranges")


def _version(requirement: Requirement) -> Diagnosis:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    fits = version[0].isdigit() and requirement.specifier.contains(version, prereleases=True)
    detail = f"{version}, supported: {requirement.specifier}"
    fix = f"pip install '{requirement}'"
    return _result(requirement.name, detail, "" if fits else detail, fix, needed=True)


def _gpus() -> Iterator[Diagnosis]:
    """torch, the driver, the GPUs, and the libraries that need them."""
    try:
        import torch
    except (ImportError, OSError) as error:
        fix = "pip install --force-reinstall torch"
        yield _result("torch", "", f"cannot be imported: {error}", fix, needed=True)
        return
    cuda = torch.version.cuda
    yield _result("torch", f"{torch.__version__}, {f'built for CUDA {cuda}' if cuda else 'built without CUDA'}")
    driver = _driver()
    yield driver
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(len(names)))
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
        yield _result("GPUs", f"{kinds}, {memory / 2**30:.0f} GiB each")
    elif driver.state == "ok":
        fix = "install a torch build for a CUDA version that the driver supports"
        yield _result("GPUs", "", "there is a driver, but torch cannot use a GPU", fix)
    else:
        yield _result("GPUs", "", "none; training runs on the CPU", "use a machine with an NVIDIA GPU")
    yield from _gpu_libraries()
    yield from _bf16()


def _driver() -> Diagnosis:
    name, fix = "NVIDIA driver", "install NVIDIA's driver to train on GPUs"
    if not shutil.which("nvidia-smi"):
        return _result(name, "", "nvidia-smi is not installed", fix)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _result(name, "", f"nvidia-smi failed: {error}", "search the output of `dmesg` for GPU errors")
    # One line per GPU, all with the same version; errors go to either stream.
    output = (done.stdout + done.stderr).split("\n")[0].strip()
    return _result(name, output, (output or "no output of nvidia-smi") if done.returncode or not output else "", fix)


def _gpu_libraries() -> Iterator[Diagnosis]:
    # It hides packages that do not work, as in training, so the check must not run in a process that trains later.
    from sdlm_megatron.model.packages import find_packages

    packages = find_packages()
    te, apex = packages.transformer_engine, packages.apex
    fix = f"pip install '{DISTRIBUTION}[gpu]' on a GPU machine"
    yield _result("TransformerEngine", te.version, te.problem and f"not used: {te.problem}", fix)
    fix = "optional; build it from github.com/NVIDIA/apex against this torch"
    yield _result("Apex", apex.version, apex.problem and f"not used: {apex.problem}", fix)


def _bf16() -> Iterator[Diagnosis]:
    from sdlm_megatron.bf16 import bf16_cost, slow_bf16

    cost = bf16_cost()
    detail = f"{cost:.2f} times the CPU time of fp32" if cost else "computed on the GPU"
    yield _result("bf16", detail, slow_bf16() or "", "train with --train.precision=fp32 on this CPU")


def _compiler() -> Iterator[Diagnosis]:
    # Triton and torch.compile build C sources for GPU kernels. A training run on the CPU compiles nothing.
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [name for name in ("gcc", "g++") if not shutil.which(name)] + [str(header)] * (not header.exists())
    problem = f"missing: {', '.join(missing)}; GPU kernels cannot be compiled" if missing else ""
    detail = f"{shutil.which('gcc')}, {shutil.which('g++')}, Python.h"
    yield _result("compiler", detail, problem, "apt install gcc g++ python3-dev")


def _folders() -> Iterator[Diagnosis]:
    """Write access and free space of the folders that the commands use when nothing else is configured."""
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    for name, folder, needed, fix in (
        # multiprocessing keeps its sockets here: data preparation and background saves need it.
        ("temporary files", Path(tempfile.gettempdir()), True, "set TMPDIR to a folder that can be written"),
        ("current folder", Path.cwd(), False, "change to another folder, or use absolute output paths"),
        ("cache", cache.expanduser(), False, "set HF_HOME to a folder that can be written"),
    ):
        # A folder that a command will create is judged by the one that it will be created in.
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(b"x")
        except OSError as error:
            yield _result(name, "", f"{folder} cannot be written: {error.strerror}", fix, needed=needed)
            continue
        free = shutil.disk_usage(existing).free / 1e9
        detail = f"{folder}: writable, {free:,.0f} GB free"
        yield _result(name, detail, detail if free < LOW_DISK_GB else "", "free space before training")


def _slurm() -> Iterator[Diagnosis]:
    sbatch = shutil.which("sbatch")
    problem = "" if sbatch else "sbatch is not installed; needed only by `sdlm submit`"
    yield _result("Slurm", sbatch or "", problem, "use a login node of a Slurm cluster")


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
