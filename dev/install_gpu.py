"""Installs the extra `gpu` into this environment: TransformerEngine, compiled against the torch that is installed.

Part of `make venv EXTRAS=gpu`. The compiler takes CUDA's headers from the packages that torch's CUDA build brings, so
neither a CUDA toolkit nor a GPU is needed; the GPU's driver is needed only to run.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.doctor import Problem, check_compiler, check_driver
from sdlm_megatron.errors import ConfigError, run_cli

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check")
BUILD = ("setuptools", "wheel", "ninja", "pybind11")
"""Packages that compile TransformerEngine's sources, as pip may not make an environment of their own for that."""


def headers(cuda: str) -> list[str]:
    """Packages with those headers of CUDA that torch's packages lack; `cuda`: torch's version of it."""
    if cuda.startswith("13."):
        return [f"nvidia-cuda-crt=={cuda}.*", f"nvidia-cuda-cccl=={cuda}.*"]
    return []


def build_environment(folders: Sequence[Path]) -> dict[str, str]:
    """Variables for the compilation, where `folders` are those of the package `nvidia`."""
    # Without the second, a binary is looked for on NVIDIA's release page first. The third leaves out a part for expert
    # parallelism, which needs further headers.
    settings = {"NVTE_FRAMEWORK": "pytorch", "NVTE_PYTORCH_FORCE_BUILD": "TRUE", "NVTE_WITH_NCCL_EP": "0"}
    if any(file for folder in folders for file in folder.glob("*/include/nccl.h")):
        settings["NVTE_BUILD_USE_NVIDIA_WHEELS"] = "1"
    return settings


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    return make_parser("python -m dev.install_gpu", __doc__, example="MAX_JOBS=8 python -m dev.install_gpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Checks what the compilation needs, then installs."""
    build_parser().parse_args(argv)
    import torch

    if torch.version.cuda is None:
        fix = "rm -r .venv, then make venv EXTRAS=gpu without TORCH_INDEX: PyPI's torch for Linux has CUDA"
        raise ConfigError("TransformerEngine needs torch with CUDA", f"torch {torch.__version__}", fix)
    try:
        check_compiler()
    except Problem as problem:
        raise ConfigError(str(problem), "TransformerEngine's sources", "apt install gcc g++ python3-dev") from None
    try:
        driver = f"this machine has {check_driver()}"
    except Problem as problem:
        driver = f"this machine cannot run it: {problem}"
    print(f"[gpu] torch {torch.__version__} for CUDA {torch.version.cuda}; {driver}", flush=True)
    print("[gpu] compiling TransformerEngine: minutes on 16 cores, more on fewer (MAX_JOBS=N limits them)", flush=True)
    spec = find_spec("nvidia")
    settings = build_environment([Path(x) for x in (spec.submodule_search_locations if spec else None) or []])
    subprocess.run([*PIP, *BUILD, *headers(torch.version.cuda)], check=True)
    command = [*PIP, "-c", "constraints.txt", "--no-build-isolation", "-e", ".[gpu]"]
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, check=False).returncode:
        fix = "the first `error:` above says what is missing; without TransformerEngine, `make venv` is enough to train"
        raise ConfigError("TransformerEngine could not be compiled", shutil.which("g++") or "", fix)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
