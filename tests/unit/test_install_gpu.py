"""Installation of TransformerEngine: the variables of its compilation, and what is refused before it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

from dev import install_gpu
from sdlm_megatron.errors import ConfigError


def test_headers_come_from_torchs_packages(tmp_path: Path) -> None:
    assert "NVTE_BUILD_USE_NVIDIA_WHEELS" not in install_gpu.build_environment([tmp_path])
    (tmp_path / "nccl" / "include").mkdir(parents=True)
    (tmp_path / "nccl" / "include" / "nccl.h").touch()
    settings = install_gpu.build_environment([tmp_path / "none", tmp_path])
    assert settings["NVTE_BUILD_USE_NVIDIA_WHEELS"] == "1" and settings["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE"
    assert install_gpu.headers("13.0") == ["nvidia-cuda-crt==13.0.*", "nvidia-cuda-cccl==13.0.*"]


def test_impossible_compilations_are_refused_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_gpu.subprocess, "run", None)
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(ConfigError, match="(?s)needs torch with CUDA.*rm -r .venv"):
        install_gpu.main([])
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"missing: gcc, g\+\+"):
        install_gpu.main([])


def test_make_installs_extras_that_the_environment_lacks(tmp_path: Path) -> None:
    """Over an environment with the extra `test`: that one again is nothing to do, `gpu` is installed."""
    shutil.copy(REPO / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("setup.py", "constraints.txt", "pyproject.toml", ".venv/.installed-test"):  # the stamp is the newest
        (tmp_path / name).touch()

    def commands(extras: str) -> str:
        line = ["make", "-n", "venv", f"EXTRAS={extras}", f"PYTHON={sys.executable}"]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "pip install" not in commands("test")
    assert "dev.install_gpu" in commands("gpu") and "-e '.'" in commands("gpu")
    both = commands("test,gpu")
    assert both.index("-e '.[test]'") < both.index("dev.install_gpu")


def test_make_stops_where_it_would_test_something_else(tmp_path: Path) -> None:
    """A script that prints the path of other packages fails; PYTHON is another one than the environment's."""
    shutil.copy(REPO / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\ncase "$1" in -c) echo "(2, 7)";; -m) echo "pytest ran";; *) exit 1;; esac\n')
    python.chmod(0o755)
    for name in ("setup.py", "constraints.txt", "pyproject.toml", ".venv/.installed-test"):
        (tmp_path / name).touch()

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["make", *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    for target in ("test-newest", "test-transformers"):
        assert (done := run(target)).returncode and "pytest ran" not in done.stdout
    assert "rm -r .venv" in run("test", f"PYTHON={sys.executable}").stderr
    assert "pytest ran" in run("test", f"PYTHON={python}").stdout
