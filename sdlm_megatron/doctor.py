"""Check this machine's environment: each line says ok, or what is missing and how to fix it.

On a GPU it also compiles SwiGLU, runs a TransformerEngine layer and the attention kernel, and compares their results
with the definitions. Exit code 0: training is possible, on a CPU where torch has no GPU. 1: something that is needed is
broken (marked FAIL). Lines marked with -- only limit what can be used here, such as GPUs or Slurm.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement

from sdlm_megatron import __version__
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError, run_cli
from sdlm_megatron.ops.node.local_environment import cache_variables

DISTRIBUTION, MEGATRON = "sdlm-megatron", "megatron-core"
OLDEST_PYTHON = (3, 11)
LOW_DISK_GB = 20
"""A 0.5B checkpoint with optimizer state takes 7 GB, and two are kept."""
SMI_SECONDS = 8
TRIAL_SECONDS = 600
"""Time limit of a trial. The first one compiles, and imports torch from a file system that may be slow."""
OLDEST_DRIVERS = {"11": 450, "12": 525, "13": 580}
"""Oldest release of NVIDIA's driver for torch's major version of CUDA."""
_CHECKOUT = (Path(__file__).parents[1] / "Makefile").exists()
PACKAGES_FIX = (
    f"pip install {'-c constraints.txt -e . in the checkout' if _CHECKOUT else f'the wheel of {DISTRIBUTION} again'}"
)
TE_FIX = "on a GPU machine: " + (
    "make venv EXTRAS=gpu"
    if _CHECKOUT
    else f"pip install --no-build-isolation '{DISTRIBUTION}[gpu]' after torch, with the packages and variables that "
    "docs/operations.md of the repository lists (Install)"
)
MARKS = {"ok": "ok", "limited": "--", "broken": "FAIL"}
"""limited: something optional is missing; broken: something needed does not work."""


class Problem(Exception):
    """A failed check."""


def _python() -> str:
    if sys.version_info < OLDEST_PYTHON:
        raise Problem(f"{platform.python_version()} is too old")
    return f"{platform.python_version()}, {sys.executable}"


def _requirements(*, megatron: bool) -> str:
    """Versions of Megatron-Core, or of all other required packages, against the ranges in the wheel's metadata."""
    try:
        lines = [line for line in importlib.metadata.requires(DISTRIBUTION) or [] if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:
        return "not checked: this is a checkout that is not installed"
    chosen = [r for r in map(Requirement, lines) if (r.name == MEGATRON) is megatron]
    wrong, version = [], ""
    for requirement in chosen:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, supported: {requirement.specifier}")
    if wrong:
        raise Problem("; ".join(wrong))
    return version if megatron else f"{len(chosen)} required packages in their supported ranges"


def _torch() -> str:
    import torch

    cuda = torch.version.cuda
    return f"{torch.__version__}, {f'built for CUDA {cuda}' if cuda else 'built without CUDA'}"


def check_driver() -> str:
    """Version of NVIDIA's driver; Problem if it is missing, or older than torch's CUDA needs."""
    if not shutil.which("nvidia-smi"):
        raise Problem("nvidia-smi is not installed")
    # The time limit is for nvidia-smi on a node whose GPU has fallen off the bus: it never returns.
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    # One line per GPU, all with the same version; errors go to either stream.
    output = (done.stdout + done.stderr).split("\n")[0].strip()
    if done.returncode or not output:
        raise Problem(output or "nvidia-smi printed nothing")
    import torch

    oldest = OLDEST_DRIVERS.get((cuda := torch.version.cuda or "").split(".")[0], 0)
    if int(output.split(".")[0]) < oldest:
        raise Problem(f"{output}; torch's CUDA {cuda} needs {oldest} or newer")
    return output


def _gpus() -> str:
    import torch

    from sdlm_megatron.config.hardware import cpu_reason, gpu_available

    try:
        if not gpu_available():
            raise Problem(f"{cpu_reason()}; training runs on the CPU")
    except ConfigError as error:
        raise Problem(f"{error.what}; training ends with this error") from None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(len(names)))
    return f"{', '.join(f'{names.count(n)} x {n}' for n in sorted(set(names)))}, {memory / 2**30:.0f} GiB each"


def _optional(name: str, *parts: str) -> str:
    """Version of an optional package that loads; in a process of its own, as training may hide it in this one."""
    if importlib.util.find_spec(name) is None:
        raise Problem("not installed")
    code = f"import torch, {', '.join((name, *parts))}; print(getattr({name}, '__version__', 'loads'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise Problem(f"installed, but it does not load: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout.strip()


def _bf16() -> str:
    from sdlm_megatron.config.hardware import bf16_cost, slow_bf16

    if slow := slow_bf16():
        raise Problem(slow)
    return f"{bf16_cost():.2f} times the CPU time of fp32" if bf16_cost() else "computed on the GPU"


def check_compiler() -> str:
    """C and C++ compiler and Python's header; Problem if one is missing."""
    # Triton and torch.compile build C sources for GPU kernels. A training run on the CPU compiles nothing.
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [name for name in ("gcc", "g++") if not shutil.which(name)] + [str(header)] * (not header.exists())
    if missing:
        raise Problem(f"missing: {', '.join(missing)}; GPU kernels cannot be compiled")
    return f"{shutil.which('gcc')}, {shutil.which('g++')}, Python.h"


def _folder(folder: Callable[[], Path]) -> str:
    """Write access and free space. A folder that does not exist yet is judged by the one it will be created in."""
    path = folder()
    existing = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        raise Problem(f"{path} cannot be written: {error.strerror}") from None
    free = shutil.disk_usage(existing).free / 1e9
    detail = f"{path}: writable, {free:,.0f} GB free"
    if free < LOW_DISK_GB:
        raise Problem(detail)
    return detail


def _cache() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or cache).expanduser()


def _trial(name: str) -> str:
    """A trial of model/gpu_trials.py in a process of its own, which a library may end; with its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "sdlm_megatron.model.gpu_trials", name]
    environment = {**os.environ, **cache_variables()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False, env=environment)
    seconds = f"{time.perf_counter() - started:.0f} s"
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or done.stderr.splitlines()
        how = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        raise Problem(f"{errors[-1].removeprefix('error: ') if errors else 'no message'} ({how}, {seconds})")
    return f"{done.stdout.strip().splitlines()[-1]}, {seconds}"


def _slurm() -> str:
    if not (sbatch := shutil.which("sbatch")):
        raise Problem("sbatch is not installed; needed only by `sdlm submit`")
    return sbatch


CHECKS: tuple[tuple[str, Callable[[], str], bool, str], ...] = (
    ("python", _python, True, f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"),
    ("sdlm_megatron", lambda: f"{__version__}, {Path(__file__).parent}", True, ""),
    (MEGATRON, partial(_requirements, megatron=True), True, PACKAGES_FIX),
    ("packages", partial(_requirements, megatron=False), True, PACKAGES_FIX),
    ("torch", _torch, True, "pip install --force-reinstall torch"),
    ("NVIDIA driver", check_driver, False, "install a driver for torch's CUDA; search `dmesg` for GPU errors"),
    ("GPUs", _gpus, False, "use a machine with an NVIDIA GPU, and a torch build for a CUDA version of its driver"),
    ("TransformerEngine", partial(_optional, "transformer_engine", "transformer_engine.pytorch"), False, TE_FIX),
    ("Apex", partial(_optional, "apex", "amp_C"), False, "optional; build github.com/NVIDIA/apex against this torch"),
    ("Triton", partial(_optional, "triton"), False, "comes with torch's CUDA builds; needed on GPUs only"),
    ("NVML", partial(_optional, "pynvml"), False, "pip install nvidia-ml-py; for the GPU checks of a job"),
    ("bf16", _bf16, False, "train with --train.precision=fp32 on this CPU"),
    ("compiler", check_compiler, False, "apt install gcc g++ python3-dev"),
    # multiprocessing keeps its sockets there: data preparation and background saves need it.
    ("temporary files", partial(_folder, lambda: Path(tempfile.gettempdir())), True, "set TMPDIR to another folder"),
    ("current folder", partial(_folder, Path.cwd), False, "use another folder, or absolute output paths"),
    ("cache", partial(_folder, _cache), False, "set HF_HOME to another folder"),
    ("Slurm", _slurm, False, "use a login node of a Slurm cluster"),
)
"""Name, check, whether every run needs it, and how to fix it."""


_UNTIL_THEN = "repair it, or until then --train.{}"
GPU_CHECKS: tuple[tuple[str, Callable[[], str], bool, str], ...] = (
    ("SwiGLU", partial(_trial, "SwiGLU"), True, "install gcc and Python.h, or another torch for this driver"),
    ("layer", partial(_trial, "layer"), True, f"{TE_FIX}; {_UNTIL_THEN.format('layers=megatron')}"),
    ("attention", partial(_trial, "attention"), True, _UNTIL_THEN.format("attention=flex")),
)
"""The same for machines with a GPU. A run there uses all of them."""


def diagnose() -> Iterator[dict[str, str]]:
    """Runs one check after the other: name, state (a key of MARKS), detail, and the fix where the state is not ok."""
    states = {}
    for name, check, needed, fix in CHECKS:
        result = _result(name, check, needed, fix)
        states[name] = result["state"]
        yield result
    for name, check, needed, fix in GPU_CHECKS if states["GPUs"] == "ok" else ():
        # without TransformerEngine, layers are Megatron-Core's: its own line says so
        if name != "layer" or states["TransformerEngine"] == "ok":
            yield _result(name, check, needed, fix)


def _result(name: str, check: Callable[[], str], needed: bool, fix: str) -> dict[str, str]:
    try:
        return {"name": name, "state": "ok", "detail": check()}
    except (Problem, ImportError, OSError, subprocess.SubprocessError) as error:
        state = "broken" if needed else "limited"
        return {"name": name, "state": state, "detail": str(error)[:300], "fix": fix}


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = make_parser("sdlm doctor", __doc__, example="sdlm doctor")
    parser.add_argument("--json", action="store_true", help="print one JSON object with a list of checks")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    results = []
    for result in diagnose():
        results.append(result)
        if not args.json:  # at once: a trial on a GPU can take minutes
            print(f"{MARKS[result['state']]:5} {result['name']:18} {result['detail']}", flush=True)
            if "fix" in result:
                print(f"{'':24} fix: {result['fix']}")
    healthy = all(result["state"] != "broken" for result in results)
    if args.json:
        print(json.dumps({"ok": healthy, "checks": results}, indent=1))
    else:
        print(f"\ntraining is {'possible' if healthy else 'not possible: see the lines marked FAIL'}")
    if not healthy:
        raise SystemExit(1)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
