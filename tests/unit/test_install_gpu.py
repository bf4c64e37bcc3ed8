"""Installation of TransformerEngine: the variables of its compilation, and what is refused before it."""

from pathlib import Path

import pytest

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
    with pytest.raises(ConfigError, match="needs torch with CUDA"):
        install_gpu.main([])
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"missing: gcc, g\+\+"):
        install_gpu.main([])
