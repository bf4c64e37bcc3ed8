"""A GPU that torch cannot use is an error, each process takes its own; slow bf16 on a CPU is measured and reported."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ENV, make_dataset

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.config import hardware
from sdlm_megatron.config.load import PRESETS, load_config
from sdlm_megatron.config.schema import RunConfig
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.train import train


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not measured")
def test_measured_precision_matches_cpu_features() -> None:
    """x86 Linux lists bf16 instructions as CPU flags; with only AVX2, torch uses generic loops."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        assert hardware.best_precision() == "bf16" and hardware.slow_bf16() is None
    elif "avx2" in flags and "avx512f" not in flags:
        assert hardware.bf16_cost() > 3 and hardware.best_precision() == "fp32"
    else:
        pytest.skip("no such x86 CPU")


@pytest.mark.parametrize(("cost", "chosen"), [(0.0, "bf16"), (0.4, "bf16"), (1.2, "bf16"), (14.2, "fp32")])
def test_slow_bf16_is_reported_and_not_chosen(cost: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bf16_cost", lambda: cost)
    assert hardware.best_precision() == chosen
    warning = hardware.slow_bf16()
    assert warning is None if chosen == "bf16" else warning == "this CPU takes 14 times as long in bf16 as in fp32"


def test_training_warns_about_slow_bf16_before_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_dataset(tmp_path / "data", rows=6, row_length=64)
    settings = [f"--run_dir={tmp_path / 'run'}", f"--data.path={data}", "--train.steps=1", "--train.global_batch=2"]
    warned = {}
    for precision in ("bf16", "fp32"):
        for cost in (14.2, 0.4):
            monkeypatch.setattr(hardware, "bf16_cost", lambda cost=cost: cost)
            train(load_config(RunConfig, "tiny", [*settings, f"--train.precision={precision}"], PRESETS), None)
            warned[precision, cost] = "--train.precision=fp32" in capsys.readouterr().out
    assert warned == {("bf16", 14.2): True, ("bf16", 0.4): False, ("fp32", 14.2): False, ("fp32", 0.4): False}


def test_model_description_mentions_slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bf16_cost", lambda: 14.2)
    config: Any = SimpleNamespace(sdlm=SimpleNamespace(block_size=4))
    descriptions = {}
    for dtype in (torch.bfloat16, torch.float32):
        network: Any = torch.nn.Linear(2, 3, dtype=dtype)
        network.device, network.dtype = torch.device("cpu"), dtype
        descriptions[dtype] = ChatModel(Path("hf"), config, network, None, ()).describe()
    assert descriptions[torch.float32] == "hf (SDLM, D = 4, 9e-06M parameters, float32, cpu)"
    assert descriptions[torch.bfloat16].endswith("in bf16 as in fp32, fp32 is the faster dtype here")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that nothing shows a GPU on, with torch's CPU side."""
    for name in (hardware.DEVICE, hardware.VISIBLE, *hardware.SLURM_GPUS, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(hardware, "_DEV", tmp_path / "dev")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hardware._listed_gpu.cache_clear()
    yield monkeypatch
    hardware._listed_gpu.cache_clear()


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_machine_without_gpu_computes_on_cpu(cuda: str | None, bare: pytest.MonkeyPatch) -> None:
    """PyPI's torch is built for CUDA, also on a laptop."""
    bare.setattr(torch.version, "cuda", cuda)
    assert hardware.default_device() == torch.device("cpu") and hardware.cpu_reason() == "there is no GPU"
    bare.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")  # Slurm's word in a task without GPUs
    bare.setenv("SLURM_GPUS_ON_NODE", "0")
    assert hardware.cpu_reason() == "there is no GPU"


@pytest.mark.parametrize("cuda", [None, "13.0"])
@pytest.mark.parametrize(
    "evidence",
    ["SLURM_JOB_GPUS=0", "SLURM_GPUS_ON_NODE=8", "CUDA_VISIBLE_DEVICES=0,1", "/dev/nvidia0", "nvidia-smi: GPU 0: H100"],
)
def test_gpu_that_torch_cannot_use_is_an_error(evidence: str, cuda: str | None, bare: pytest.MonkeyPatch) -> None:
    bare.setattr(torch.version, "cuda", cuda)

    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check\nmore")

    bare.setattr(torch.cuda, "init", init)
    if evidence.startswith("/dev"):
        (hardware._DEV / "nvidia0").touch()
    elif evidence.startswith("nvidia-smi"):
        smi = hardware._DEV.parent / "bin" / "nvidia-smi"
        smi.write_text("#!/bin/sh\necho GPU 0: H100\n")
        smi.chmod(0o755)
    else:
        bare.setenv(*evidence.split("="))
    with pytest.raises(ConfigError) as caught:
        hardware.default_device()
    assert evidence in caught.value.what.replace(str(hardware._DEV), "/dev")
    why = "Found no NVIDIA driver on your system. Please check (torch is built for CUDA 13.0)"
    assert caught.value.what.endswith(why if cuda else "torch is built without CUDA")
    assert "SDLM_DEVICE=cpu" in caught.value.fix and "torch build" in caught.value.fix
    bare.setenv("SDLM_DEVICE", "cpu")
    assert hardware.default_device() == torch.device("cpu") and hardware.cpu_reason() == "set by SDLM_DEVICE"
    assert hardware.os.environ["CUDA_VISIBLE_DEVICES"] == ""  # for libraries that ask torch
    bare.delenv("SDLM_DEVICE")
    assert hardware.default_device() == torch.device("cpu")
    assert hardware.cpu_reason() == "CUDA_VISIBLE_DEVICES hides all GPUs"


@pytest.mark.parametrize("bench", ["attention_speed", "decode_speed"])
def test_benchmarks_refuse_a_gpu_that_torch_cannot_use(bench: str, bare: pytest.MonkeyPatch) -> None:
    bare.setenv("SLURM_JOB_GPUS", "0")
    module = importlib.import_module(f"dev.bench.{bench}")
    with pytest.raises(ConfigError, match="torch cannot use the GPU"):
        module.main([] if bench == "attention_speed" else ["--model", "x", "--prompts", "x"])


def test_unknown_device_name_is_refused(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("SDLM_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="no such device 'gpu'"):
        hardware.default_device()


@pytest.mark.parametrize(
    ("visible", "local", "number"), [(8, 3, 3), (1, 0, 0), (1, 3, 0), (2, 1, 1), (2, 3, None), (0, 0, None)]
)
def test_process_takes_its_own_gpu(visible: int, local: int, number: int | None, bare: pytest.MonkeyPatch) -> None:
    """One visible GPU is the process's own (--gpus-per-task); two GPUs for process 3 have no reading."""
    bare.setattr(torch.cuda, "device_count", lambda: visible)
    bare.setenv("LOCAL_RANK", str(local))
    if number is not None:
        assert hardware.gpu_number() == number
        return
    with pytest.raises(ConfigError, match="more processes than GPUs, or each process should see one") as caught:
        hardware.gpu_number()
    assert "--gpus-per-task=1" in caught.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_training_refuses_an_unusable_gpu() -> None:
    """In a job with GPUs, on this torch."""
    code = "from sdlm_megatron.parallel import cpu; print(cpu.install())"
    environment = {**ENV, "PATH": "", "SLURM_JOB_GPUS": "0,1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "torch cannot use the GPU that this machine has (SLURM_JOB_GPUS=0,1)" in done.stderr
    named = {**environment, "SDLM_DEVICE": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], env=named, capture_output=True, text=True).stdout == "True\n"
