"""Slow bf16 on a CPU is measured, reported and not chosen as the default."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_dataset

from sdlm_megatron import bf16
from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.train import train


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not measured")
def test_measured_precision_matches_cpu_features() -> None:
    """x86 Linux lists bf16 instructions as CPU flags; with only AVX2, torch uses generic loops."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        assert bf16.best_precision() == "bf16" and bf16.slow_bf16() is None
    elif "avx2" in flags and "avx512f" not in flags:
        assert bf16.bf16_cost() > 3 and bf16.best_precision() == "fp32"
    else:
        pytest.skip("no such x86 CPU")


@pytest.mark.parametrize(("cost", "chosen"), [(0.0, "bf16"), (0.4, "bf16"), (1.2, "bf16"), (14.2, "fp32")])
def test_slow_bf16_is_reported_and_not_chosen(cost: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "bf16_cost", lambda: cost)
    assert bf16.best_precision() == chosen
    warning = bf16.slow_bf16()
    assert warning is None if chosen == "bf16" else warning == "this CPU takes 14 times as long in bf16 as in fp32"


def test_training_warns_about_slow_bf16_before_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_dataset(tmp_path / "data", rows=6, row_length=64)
    settings = [f"--run_dir={tmp_path / 'run'}", f"--data.path={data}", "--train.steps=1", "--train.global_batch=2"]
    warned = {}
    for precision in ("bf16", "fp32"):
        for cost in (14.2, 0.4):
            monkeypatch.setattr(bf16, "bf16_cost", lambda cost=cost: cost)
            train(load_config(RunConfig, "tiny", [*settings, f"--train.precision={precision}"], PRESETS), None)
            warned[precision, cost] = "--train.precision=fp32" in capsys.readouterr().out
    assert warned == {("bf16", 14.2): True, ("bf16", 0.4): False, ("fp32", 14.2): False, ("fp32", 0.4): False}


def test_model_description_mentions_slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "bf16_cost", lambda: 14.2)
    config: Any = SimpleNamespace(sdlm=SimpleNamespace(block_size=4))
    descriptions = {}
    for dtype in (torch.bfloat16, torch.float32):
        network: Any = torch.nn.Linear(2, 3, dtype=dtype)
        network.device, network.dtype = torch.device("cpu"), dtype
        descriptions[dtype] = ChatModel(Path("hf"), config, network, None, ()).describe()
    assert descriptions[torch.float32] == "hf (SDLM, D = 4, 9e-06M parameters, float32, cpu)"
    assert descriptions[torch.bfloat16].endswith("in bf16 as in fp32, fp32 is the faster dtype here")
