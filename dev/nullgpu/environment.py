"""The environment of the lab: PyPI's CUDA build of torch, Megatron-Core and TransformerEngine, and the null GPU.

It is made once in NULLGPU_HOME (default: .cache/nullgpu of this repository). Settings, all from the environment:

NULLGPU_HOME    its folder
NULLGPU_PYTHON  interpreter to make it with; default: this one
NULLGPU_TORCH   version of torch; default: that of constraints.txt
TE_SITE         a folder with TransformerEngine for that Python and torch, as `pip install --target` makes it; "none":
                leave it out. Default: TransformerEngine is built from PyPI, which takes some minutes of many cores.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dev.nullgpu.library import build_library
from sdlm_megatron.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]
TRANSFORMER_ENGINE = "2.20.2"
PACKAGES = ("megatron-core", "numpy", "psutil", "pyyaml", "safetensors", "packaging", "rich", "setuptools")
BUILD = ("wheel", "ninja", "pybind11", "nvidia-cuda-crt==13.0.*")
"""For CUDA's headers and the build of TransformerEngine."""
LOADED = "NULLGPU_LOADED"
"""Set in processes that run on the null GPU."""


@dataclass(frozen=True)
class NullEnvironment:
    """The lab's interpreter, and what a process on the null GPU has in its environment."""

    python: Path
    variables: dict[str, str]
    transformer_engine: str
    """Why TransformerEngine is missing; empty if it is there."""


def make_environment() -> NullEnvironment:
    """Makes what is missing; minutes the first time, a second afterwards."""
    home = Path(os.environ.get("NULLGPU_HOME") or REPO / ".cache" / "nullgpu").resolve()
    python, site = home / "venv" / "bin" / "python", os.environ.get("TE_SITE", "")
    stamp = home / "venv" / "installed"
    if not stamp.exists():
        _install(home)
        stamp.touch()
    if not site:
        missing = _build_transformer_engine(home)
    else:
        missing = "left out by TE_SITE=none" if site == "none" else ""
        if not missing and not (Path(site) / "transformer_engine").is_dir():
            raise ConfigError(f"{site} has no folder transformer_engine", "TE_SITE", "name the folder that contains it")
    packages = next((home / "venv" / "lib").glob("python3*/site-packages"))
    places = [packages, *([Path(site)] if site not in ("", "none") else [])]
    library = build_library(home / "lib", packages, _objects(places))
    variables = {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_CACHE_DIR": str(home / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of compilers would be waited for at the end
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [REPO, *places[1:]])),
        LOADED: "1",
    }
    return NullEnvironment(python, variables, missing)


def _objects(places: list[Path]) -> list[Path]:
    """Shared objects that call CUDA."""
    patterns = (
        "torch/lib/lib*cuda*.so",
        "torch/lib/libtorch_python.so",
        "transformer_engine*.so",
        "transformer_engine/**/*.so",
    )
    return [file for place in places for pattern in patterns for file in place.glob(pattern)]


def _install(home: Path) -> None:
    """A virtual environment with torch for CUDA and Megatron-Core."""
    python = home / "venv" / "bin" / "python"
    _run([os.environ.get("NULLGPU_PYTHON") or sys.executable, "-m", "venv", str(home / "venv")])
    torch, text = os.environ.get("NULLGPU_TORCH", ""), (REPO / "constraints.txt").read_text(encoding="utf-8")
    # packages that torch chooses itself differ between its versions
    own = ("torch==", "triton==", "setuptools==", "nvidia")
    kept = [line for line in text.splitlines() if not (torch and line.startswith(own))]
    constraints = home / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
    wanted = [f"torch=={torch}" if torch else "torch", *PACKAGES, *BUILD]
    _run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", str(constraints), *wanted])


def _build_transformer_engine(home: Path) -> str:
    """Builds TransformerEngine into the environment, once; the reason if that fails."""
    python, failed = home / "venv" / "bin" / "python", home / "transformer_engine.failed"
    if next((home / "venv" / "lib").glob("python3*/site-packages/transformer_engine_torch*.so"), None):
        return ""
    if not failed.exists():
        packages = next((home / "venv" / "lib").glob("python3*/site-packages"))
        include = os.pathsep.join(str(packages / "nvidia" / name / "include") for name in ("cu13", "cudnn", "nccl"))
        options = {"NVTE_FRAMEWORK": "pytorch", "NVTE_PYTORCH_FORCE_BUILD": "TRUE", "NVTE_WITH_NCCL_EP": "0"}
        options |= {"CPLUS_INCLUDE_PATH": include, "CUDA_HOME": str(packages / "nvidia" / "cu13")}
        name = f"transformer_engine[pytorch]=={TRANSFORMER_ENGINE}"
        line = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", name]
        done = subprocess.run(line, env={**os.environ, **options}, capture_output=True, text=True, check=False)
        if not done.returncode:
            return ""
        failed.write_text(done.stdout + done.stderr, encoding="utf-8")
    return f"it could not be built, see {failed}; remove that file to try again, or set TE_SITE"


def _run(line: list[str]) -> None:
    done = subprocess.run(line, check=False)
    if done.returncode:
        raise ConfigError(
            f"{' '.join(line[:6])} … failed with {done.returncode}", "the environment of the lab", "see above"
        )
