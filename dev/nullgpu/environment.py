"""The environment of the lab: PyPI's CUDA build of torch, Megatron-Core and TransformerEngine, and the null GPU.

It is made in NULLGPU_HOME (default: .cache/nullgpu of this repository), again when the interpreter or versions of the
packages change. Settings, all from the environment:

NULLGPU_HOME    its folder
NULLGPU_PYTHON  interpreter to make it with; default: this one
NULLGPU_TORCH   version of torch; default: that of constraints.txt
TE_SITE         a folder with TransformerEngine for that Python and torch, as `pip install --target` makes it; "none":
                leave it out. Default: TransformerEngine is built from PyPI, which takes some minutes of many cores.

The null GPU is one shared library, loaded first, with all functions of CUDA that the packages call. Written by hand are
runtime.c and libraries.c. Every other function that a shared object of the packages asks for, or that cuda.h declares,
is generated: it succeeds and does nothing.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.files import write_text

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
SOURCES = ("runtime.c", "libraries.c")
NAME = "libcuda.so.1"
"""Also the name of the driver, which Triton links against."""
_REPLACED = re.compile(r"(__cuda|cuda|cublas|nccl|nvrtc)\w+")
_DRIVER = re.compile(r"\bCUDAAPI\s+(cu[A-Z]\w+)\s*\(|#\s*define\s+cu\w+\s+(cu[A-Z]\w+_v\d+)\b")

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
    chosen = [os.environ.get("NULLGPU_PYTHON") or sys.version.split()[0], TRANSFORMER_ENGINE, *_packages()[0]]
    old = stamp.read_text(encoding="utf-8").splitlines() if stamp.exists() else []
    if old != chosen:
        _install(home)
        if old and old[2] != chosen[2]:  # pip's cache has a wheel that was compiled against the old torch
            _run([str(python), "-m", "pip", "cache", "remove", "transformer_engine_torch"])
        write_text(stamp, "\n".join(chosen))
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


def _packages() -> tuple[list[str], list[str]]:
    """The packages to install, and the constraints of the others."""
    torch, text = os.environ.get("NULLGPU_TORCH", ""), (REPO / "constraints.txt").read_text(encoding="utf-8")
    # packages that torch chooses itself differ between its versions
    own = ("torch==", "triton==", "setuptools==", "nvidia")
    kept = [line for line in text.splitlines() if not (torch and line.startswith(own))]
    version = torch or next(line.removeprefix("torch==") for line in text.splitlines() if line.startswith("torch=="))
    pins = [line for line in kept if line.startswith(tuple(f"{name}==" for name in PACKAGES))]
    pinned = {line.partition("==")[0] for line in pins}
    # three equal signs: PyPI's build, which has no suffix, also where an index with "+cpu" is configured
    return [f"torch==={version}", *pins, *(name for name in PACKAGES if name not in pinned), *BUILD], kept


def _install(home: Path) -> None:
    """A virtual environment with torch for CUDA and Megatron-Core, in place of one with other versions."""
    python = home / "venv" / "bin" / "python"
    if (home / "venv").exists():
        shutil.rmtree(home / "venv")
        (home / "transformer_engine.failed").unlink(missing_ok=True)
    _run([os.environ.get("NULLGPU_PYTHON") or sys.executable, "-m", "venv", str(home / "venv")])
    wanted, kept = _packages()
    constraints = home / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", str(constraints), *wanted])


def _build_transformer_engine(home: Path) -> str:
    """Builds TransformerEngine into the environment, once; the reason if that fails."""
    python, failed = home / "venv" / "bin" / "python", home / "transformer_engine.failed"
    if next((home / "venv" / "lib").glob("python3*/site-packages/transformer_engine_torch*.so"), None):
        return ""
    if not failed.exists():
        options = {"NVTE_FRAMEWORK": "pytorch", "NVTE_PYTORCH_FORCE_BUILD": "TRUE", "NVTE_WITH_NCCL_EP": "0"}
        options["NVTE_BUILD_USE_NVIDIA_WHEELS"] = "1"  # CUDA's headers from the packages, without a toolkit
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


# --- the library


def build_library(out: Path, packages: Path, objects: Iterable[Path]) -> Path:
    """The library, in the folder `out`; made again where a source or a package is newer or another one.

    Args:
        packages: site-packages with CUDA's headers.
        objects: shared objects whose undefined functions are needed.

    Raises:
        ConfigError: there is no C compiler, or it fails.
    """
    library, objects, known = out / NAME, sorted(objects), out / "objects.txt"
    listed = "\n".join(map(str, objects))
    inputs = [*(HERE / name for name in SOURCES), Path(__file__), *objects]
    same = library.exists() and known.exists() and known.read_text(encoding="utf-8") == listed
    if same and library.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return library
    out.mkdir(parents=True, exist_ok=True)
    include = packages / "nvidia" / "cu13" / "include"
    compiled = [compile_object(HERE / name, out, include) for name in SOURCES]
    wanted = {name for name in functions(objects, "--undefined-only") if _REPLACED.fullmatch(name)}
    wanted |= {
        name for pair in _DRIVER.findall((include / "cuda.h").read_text(encoding="utf-8")) for name in pair if name
    }
    write_text(out / "generated.c", generated_source(wanted, functions(compiled, "--defined-only")))
    compiled.append(compile_object(out / "generated.c", out))
    partial = library.with_name(f"{NAME}.partial")
    run_tool(["gcc", "-shared", f"-Wl,-soname,{NAME}", *map(str, compiled), "-lpthread", "-ldl", "-o", str(partial)])
    partial.rename(library)
    write_text(known, listed)
    return library


def generated_source(wanted: Iterable[str], written: Iterable[str]) -> str:
    """C source of the wanted functions that are not written by hand."""
    return "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(set(wanted) - set(written)))


def compile_object(source: Path, out: Path, include: Path | None = None) -> Path:
    """The object file of a C source."""
    target = out / f"{source.stem}.o"
    includes = [f"-I{include}"] if include else []
    # -w: the arguments of functions that do nothing are unused, and generated ones have none
    run_tool(["gcc", "-O1", "-fPIC", "-w", *includes, "-c", str(source), "-o", str(target)])
    return target


def functions(objects: Iterable[Path], kind: str) -> set[str]:
    """Names of functions in object files, without versions: "--undefined-only" or "--defined-only"."""
    names = set()
    for file in objects:
        dynamic = [] if file.suffix == ".o" else ["--dynamic"]
        text = run_tool(["nm", *dynamic, "--extern-only", "--format=posix", kind, str(file)])
        names |= {line.split()[0].partition("@")[0] for line in text.splitlines() if line}
    return names


def run_tool(line: Sequence[str]) -> str:
    """Output of a compiler's tool."""
    if shutil.which(line[0]) is None:
        raise ConfigError(
            f"there is no {line[0]}", "PATH", "install a C compiler and binutils (Debian: apt install gcc)"
        )
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{line[0]} failed: {done.stderr[-1500:]}", " ".join(line[:8]), "install CUDA's headers")
    return done.stdout
