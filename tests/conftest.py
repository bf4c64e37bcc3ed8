"""Fixtures shared by the tests."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # the time of an example depends on the load of the machine
settings.load_profile("no deadline")
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("WANDB_SILENT", "true")
# Read when torch is imported. With a thread per core in each worker, small steps spend their time waiting for a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on the CPU; read when triton is imported
os.fsync = os.fstat  # no test cuts the power, and each wait for the disk takes up to 0.1 s


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marks of transformers' own tests (parity/test_transformers_mixins.py)."""
    flash = ("flash_attn_test", "flash_attn_3_test", "flash_attn_4_test")
    for name in ("accelerate_tests", "torch_compile_test", "torch_export_test", "order", *flash):
        config.addinivalue_line("markers", f"{name}: used by tests of transformers")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("unexpected network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def forked_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `run_command` of the quickstart and the campaigns fork its commands (ranks.py): each imports torch."""
    from dev.quickstart import pipeline
    from tests.helpers import run_forked

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=run_forked))


@pytest.fixture
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirects the cache of `datasets` to a temporary folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def groups() -> Any:
    """Megatron-Core's process groups for one process, over gloo; a process can join once only."""
    from sdlm_megatron.parallel import cpu

    cpu.install()
    from sdlm_megatron.config.schema import ParallelConfig
    from sdlm_megatron.parallel.groups import init_groups

    return init_groups(ParallelConfig(), seed=1)


@pytest.fixture(scope="session")
def make_engine(groups: Any) -> Callable:
    """Builds single-process engines inside pytest, with real Megatron-Core over gloo."""
    from sdlm_megatron.checkpoint.restore import load_base
    from sdlm_megatron.config.schema import RunConfig
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.weights.hf_config import read_hf_config

    def build(
        folder: Path, *, block_size: int = 4, causal_attn: bool = False, rows: bool = False, rank: int = 0
    ) -> Engine:
        config = RunConfig()
        config.train.precision = "fp32"
        config.train.loss_normalization = "rows" if rows else "targets"
        config.diffusion.block_size, config.diffusion.causal_attn = block_size, causal_attn
        config.lora.rank = rank
        shape, options = read_hf_config(folder).shape, {"max_positions": 4096, "steps": 10, "initialize": False}
        engine = Engine(config, shape, groups, mask_token_id=3, **options)
        load_base(folder, engine, new_mask=None)
        return engine

    return build
