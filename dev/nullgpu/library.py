"""Builds the null GPU: one shared library, loaded first, with all functions of CUDA that the packages call.

The hand-written part is runtime.c and libraries.c. Every other function that a shared object of the packages asks for,
or that cuda.h declares, is generated: it succeeds and does nothing.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdlm_megatron.errors import ConfigError
from sdlm_megatron.files import write_text

HERE = Path(__file__).resolve().parent
SOURCES = ("runtime.c", "libraries.c")
NAME = "libcuda.so.1"
"""Also the name of the driver, which Triton links against."""
_REPLACED = re.compile(r"(__cuda|cuda|cublas|nccl|nvrtc)\w+")
_DRIVER = re.compile(r"\bCUDAAPI\s+(cu[A-Z]\w+)\s*\(|#\s*define\s+cu\w+\s+(cu[A-Z]\w+_v\d+)\b")


def build_library(out: Path, packages: Path, objects: Iterable[Path]) -> Path:
    """The library, in the folder `out`; made again where a source or a package is newer.

    Args:
        packages: site-packages with CUDA's headers.
        objects: shared objects whose undefined functions are needed.

    Raises:
        ConfigError: there is no C compiler, or it fails.
    """
    library, objects = out / NAME, list(objects)
    inputs = [*(HERE / name for name in SOURCES), Path(__file__), *objects]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
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
